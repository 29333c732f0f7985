"""A model's numbers on tasks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch

from titan_yulan.data.report import Say
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import UserError
from titan_yulan.eval.answers import grade
from titan_yulan.eval.find_work import Work
from titan_yulan.eval.likelihood import Likelihood, Likelihoods, Span, encode_pair
from titan_yulan.eval.metrics import Numbers, choice_numbers, cloze_numbers, means, text_numbers
from titan_yulan.eval.requests import Answer, Choice, Cloze, Code, Generation, Text
from titan_yulan.eval.sandbox import Outcome, check_sandbox, run_program
from titan_yulan.eval.share import Share
from titan_yulan.eval.write import Writer
from titan_yulan.model import Decoder

T = TypeVar("T")

_SAY_EVERY = 5.0  # seconds between progress lines


@dataclass(frozen=True)
class Result:
    """What a model achieved on a task.

    metric: the one that the task is reported by; its value is `metrics[metric]`.
    errors: standard errors, of the metrics that are means.
    cut: requests whose context was too long for the model and lost its first tokens.
    data: SHA-256 over the files of the requests.
    rows: what is known of each item.
    """

    task: str
    kind: str
    metric: str
    items: int
    metrics: dict[str, float]
    errors: dict[str, float]
    cut: int
    seconds: float
    data: str
    rows: list[dict[str, Any]]


class Evaluator:
    """Runs tasks on a model; all ranks call it together, with the same tasks."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        context: int,
        batch_tokens: int = 16384,
        share: Share | None = None,
        say: Say = lambda line: None,
        max_new_tokens: int | None = None,
        execute_code: bool = False,
        device: torch.device | None = None,
        between: Callable[[str], None] = lambda what: None,
    ) -> None:
        """
        Args:
            decoder: in the types that it computes in; whole, where the model is to write.
            context: tokens of a row, at most.
            batch_tokens: tokens of a batch, padding included.
            share: how ranks share the work; None: there is one.
            say: gets lines about the progress.
            max_new_tokens: lowers what requests may write; None: as they say.
            execute_code: run what the model writes, in the sandbox.
            device: that it computes on; None: that of its weights.
            between: called after every batch, on all ranks alike; may raise to end the evaluation.
        """
        self.tokenizer, self.context, self.say, self.between = tokenizer, context, say, between
        self.share = share or Share()
        self.max_new_tokens, self.execute_code = max_new_tokens, execute_code
        self._likelihoods = Likelihoods(decoder, context, batch_tokens, self.share, device)
        self._write = Writer(decoder, tokenizer, context, batch_tokens, self.share)

    def check(self, works: Sequence[Work]) -> None:
        """See that all tasks can be run.

        Raises:
            UserError: one would execute code, which was not asked for or cannot be done safely; or its requests do not
                fit the model or the task.
        """
        programs = [work.task.name for work in works if work.task.kind == "code"]
        if programs and not self.execute_code:
            raise UserError(f"--tasks: {programs[0]} runs programs that the model writes; allow it with --execute-code")
        if programs:
            check_sandbox()
        for work in works:
            name = work.task.name
            if work.task.generates:
                self._write.check(self._shortened(cast(list[Generation], work.items)))
            if work.tokenizer not in (None, self.tokenizer.fingerprint):
                raise UserError(
                    f"{name} holds ids of another tokenizer than this model's: name the text files instead of held_out"
                )
            choices = cast(list[Choice], work.items) if work.task.metric == "accuracy_pmi" else []
            if any(item.unconditional is None for item in choices):
                raise UserError(f"{name} is reported by accuracy_pmi: its requests need the key 'unconditional'")

    def __call__(self, work: Work) -> Result:
        """
        Raises:
            UserError: a request does not fit into the context.
            RunError: the model gives numbers that are not finite.
        """
        begin = time.perf_counter()
        ways = {
            "choice": self._choice,
            "cloze": self._cloze,
            "text": self._text,
            "answer": self._answer,
            "code": self._code,
        }
        numbers, cut = ways[work.task.kind](work)
        return Result(
            work.task.name,
            work.task.kind,
            work.task.metric,
            len(work.items),
            numbers.metrics,
            numbers.errors,
            cut,
            time.perf_counter() - begin,
            work.data,
            numbers.items,
        )

    def _choice(self, work: Work) -> tuple[Numbers, int]:
        items = cast(list[Choice], work.items)
        spans = [
            [encode_pair(self.tokenizer, *pair) for pair in zip(item.contexts, item.choices, strict=True)]
            for item in items
        ]
        bare: list[list[Span]] = []
        contexts = [item.unconditional for item in items]
        known = all(context is not None for context in contexts)
        if known:
            bare = [
                [encode_pair(self.tokenizer, cast(str, context), choice) for choice in item.choices]
                for context, item in zip(contexts, items, strict=True)
            ]
        found = self._look_up(work, [span for choices in spans + bare for span in choices])
        values = iter(found)
        per_item = [[next(values) for _ in choices] for choices in spans]
        without = [[next(values) for _ in choices] for choices in bare] or None
        cut = sum(any(value.cut for value in choices) for choices in per_item)
        return choice_numbers(items, per_item, without), cut

    def _cloze(self, work: Work) -> tuple[Numbers, int]:
        items = cast(list[Cloze], work.items)
        found = self._look_up(work, [encode_pair(self.tokenizer, item.context, item.continuation) for item in items])
        return cloze_numbers(items, found), sum(value.cut for value in found)

    def _text(self, work: Work) -> tuple[Numbers, int]:
        items = cast(list[Text], work.items)
        ids = [item.ids or self.tokenizer.encode(item.text) for item in items]
        for item, part in zip(items, ids, strict=True):
            if not part or max(part) >= self.tokenizer.vocab_size:
                problem = "has token ids that the model's tokenizer does not have" if part else "has no token"
                raise UserError(f"{work.task.name}: text {item.id} {problem}")
        sizes = [
            len((item.text or self.tokenizer.decode(part)).encode()) for item, part in zip(items, ids, strict=True)
        ]
        found = self._look_up(work, [Span([self.tokenizer.eos_id], part) for part in ids])
        logprobs = [value.logprob for value in found]
        return text_numbers([item.id for item in items], logprobs, [len(part) for part in ids], sizes), 0

    def _answer(self, work: Work) -> tuple[Numbers, int]:
        items = cast(list[Answer], work.items)
        written = self._write(self._shortened(items), self._progress(work))
        rows = [
            {"id": item.id, "written": text.text, "exact_match": grade(text.text, item.answers, work.task.answer)}
            for item, text in zip(items, written, strict=True)
        ]
        return means(rows, ["exact_match"]), sum(text.cut for text in written)

    def _code(self, work: Work) -> tuple[Numbers, int]:
        self.check([work])
        items = cast(list[Code], work.items)
        written = self._write(self._shortened(items), self._progress(work))
        programs = [item.prefix + text.text + item.test for item, text in zip(items, written, strict=True)]
        places = self.share.mine(range(len(items)))
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))) as pool:
            outcomes: dict[int, Outcome] = dict(
                zip(places, pool.map(run_program, [programs[place] for place in places]), strict=True)
            )
        outcomes = self.share.merge(outcomes)
        rows = [
            {
                "id": item.id,
                "written": written[place].text,
                "pass@1": float(outcomes[place].passed),
                "reason": outcomes[place].reason,
            }
            for place, item in enumerate(items)
        ]
        return means(rows, ["pass@1"]), sum(text.cut for text in written)

    def _shortened(self, items: Sequence[Generation]) -> list[Generation]:
        most = self.max_new_tokens
        if most is None:
            return list(items)
        return [replace(item, max_new_tokens=min(most, item.max_new_tokens)) for item in items]

    def _look_up(self, work: Work, spans: Sequence[Span]) -> list[Likelihood]:
        return self._likelihoods(spans, self._progress(work))

    def _progress(self, work: Work) -> Callable[[int, int], None]:
        begin = said = time.perf_counter()

        def say(done: int, total: int) -> None:
            nonlocal said
            self.between(work.task.name)
            now = time.perf_counter()
            if now - said >= _SAY_EVERY:
                said = now
                self.say(f"{work.task.name}: {done:,} of {total:,}, {done / (now - begin):,.1f} a second")

        return say
