"""A model's numbers on tasks."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.data.workers import default_workers
from titan_yulan.errors import UserError
from titan_yulan.eval.answers import grade
from titan_yulan.eval.check import check_works
from titan_yulan.eval.diffusion import Diffusion
from titan_yulan.eval.diffusion_likelihood import DiffusionLikelihoods
from titan_yulan.eval.find_work import Work
from titan_yulan.eval.held_out_bound import HeldOut, held_out_bounds
from titan_yulan.eval.likelihood import Likelihood, Likelihoods, Span, encode_pair
from titan_yulan.eval.metrics import Numbers, choice_numbers, cloze_numbers, means, text_numbers
from titan_yulan.eval.requests import Answer, Choice, Cloze, Code, Generation, Text, shortened
from titan_yulan.eval.sandbox import Outcome, run_program
from titan_yulan.eval.share import Share
from titan_yulan.eval.write import Writer, Written
from titan_yulan.model import Decoder

_PROGRAMS = 8  # that one rank runs before it tells how far it is


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
        progress: Callable[[str, int, int], None] = lambda task, done, total: None,
        max_new_tokens: int | None = None,
        execute_code: bool = False,
        device: torch.device | None = None,
        diffusion: Diffusion | None = None,
    ) -> None:
        """
        Args:
            decoder: in the types that it computes in; whole, or laid out over ranks.
            context: tokens of a row, at most.
            batch_tokens: tokens of a batch, padding included.
            share: how ranks share the work; None: there is one.
            progress: called with a task, how much of it is done, and of how much; after every batch, and now and then
                within a long one. Ranks that share the model call it equally often; it may raise to end the evaluation.
            max_new_tokens: lowers what requests may write; None: as they say.
            execute_code: run what the model writes, in the sandbox.
            device: that it computes on; None: that of its weights.
            diffusion: how a model of masked diffusion is evaluated; None: the model predicts the next token.
        """
        self.tokenizer, self.context, self._progress = tokenizer, context, progress
        self.share = share or Share()
        self.max_new_tokens, self.execute_code = max_new_tokens, execute_code
        self._diffusion = diffusion
        parts = decoder, context, batch_tokens, self.share, device
        self._likelihoods = DiffusionLikelihoods(*parts, diffusion=diffusion) if diffusion else Likelihoods(*parts)
        mask_token_id = diffusion.mask_token_id if diffusion else None
        self._write = Writer(decoder, tokenizer, context, batch_tokens, self.share, device, mask_token_id)

    def check(self, works: Sequence[Work]) -> None:
        """`check_works` for this model and what was asked for."""
        check_works(works, self.tokenizer, self.context, self.max_new_tokens, self.execute_code)

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
        if work.held_out is not None:
            return self._bound(work, work.held_out), 0
        items = cast(list[Text], work.items)
        texts = [item.ids or tuple(self.tokenizer.encode(item.text)) for item in items]
        for item, ids in zip(items, texts, strict=True):
            if not ids or max(ids) >= self.tokenizer.vocab_size:
                problem = "has token ids that the model's tokenizer does not have" if ids else "has no token"
                raise UserError(f"{work.task.name}: text {item.id} {problem}: leave it out, or prepare it again")
        parts = [item.parts or ((0, len(ids)),) for item, ids in zip(items, texts, strict=True)]
        spans = [
            [Span((self.tokenizer.eos_id, *ids[:first]), ids[first:end]) for first, end in places]
            for ids, places in zip(texts, parts, strict=True)
        ]
        sizes = [
            len((item.text or "".join(self.tokenizer.decode(span.continuation) for span in part)).encode())
            for item, part in zip(items, spans, strict=True)
        ]
        values = iter(self._look_up(work, [span for part in spans for span in part]))
        found = [[next(values) for _ in part] for part in spans]
        logprobs = [math.fsum(value.logprob for value in part) for part in found]
        tokens = [sum(value.tokens for value in part) for part in found]
        return text_numbers([item.id for item in items], logprobs, tokens, sizes), 0

    def _bound(self, work: Work, held_out: HeldOut) -> Numbers:
        if self._diffusion is None:
            raise UserError(
                f"{work.task.name} is read in rows, as masked diffusion is validated; this model predicts the next "
                "token: name files of text instead"
            )
        parts = held_out, self._diffusion, self.tokenizer, self._likelihoods.batch_tokens
        found = held_out_bounds(
            self._likelihoods.decoder, *parts, self.share, self._likelihoods.device, self._tell(work)
        )
        losses, tokens, sizes = zip(*found, strict=True)
        if not sum(sizes):
            raise UserError(f"{work.task.name}: none of its rows holds a token that counts; raise --limit")
        return text_numbers([cast(Text, item).id for item in work.items], [-loss for loss in losses], tokens, sizes)

    def _answer(self, work: Work) -> tuple[Numbers, int]:
        items = cast(list[Answer], work.items)
        written = self._written(work)
        rows = [
            {"id": item.id, "written": text.text, "exact_match": grade(text.text, item.answers, work.task.answer)}
            for item, text in zip(items, written, strict=True)
        ]
        return means(rows, ["exact_match"]), sum(text.cut for text in written)

    def _code(self, work: Work) -> tuple[Numbers, int]:
        self.check([work])
        items = cast(list[Code], work.items)
        written = self._written(work)
        programs = [item.prefix + text.text + item.test for item, text in zip(items, written, strict=True)]
        tell = self._tell(work)
        with ThreadPoolExecutor(max(1, default_workers() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))) as pool:

            def run(places: Sequence[int]) -> dict[int, Outcome]:
                outcomes = list(pool.map(run_program, [programs[place] for place in places]))
                tell(places[-1] + 1, len(programs))
                return dict(zip(places, outcomes, strict=True))

            numbers = range(len(programs))
            outcomes = self.share.run([numbers[i : i + _PROGRAMS] for i in numbers[::_PROGRAMS]], run)
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

    def _written(self, work: Work) -> list[Written]:
        items = cast(list[Generation], work.items)
        return self._write(shortened(items, self.max_new_tokens), self._tell(work))

    def _look_up(self, work: Work, spans: Sequence[Span]) -> list[Likelihood]:
        likelihoods, tell = self._likelihoods, self._tell(work)
        if not isinstance(likelihoods, DiffusionLikelihoods):
            return likelihoods(spans, tell)
        # of a text, left to right would take a forward pass for every token
        found = likelihoods(spans, tell, "bound" if work.task.kind == "text" else None)
        if work.task.kind != "cloze":
            return found
        written = likelihoods.written(spans, self.tokenizer, tell)
        return [replace(value, greedy=right) for value, right in zip(found, written, strict=True)]

    def _tell(self, work: Work) -> Callable[[int, int], None]:
        return lambda done, total: self._progress(work.task.name, done, total)
