"""Log-likelihoods of continuations, many at a time.

    log p(continuation | context) = sum over its tokens of log softmax(logits of the place before)[token]

Only the places that predict a continuation's tokens go through the output head, some thousand at a time; the logits
of a whole batch never exist. Continuations that are predicted from the same tokens, such as the letters A to D after
one question, share one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import RunError, UserError
from titan_yulan.eval.batches import batches_of
from titan_yulan.eval.share import Share
from titan_yulan.model import Decoder

# Logits that are held at a time: 8 MB in float32 stay in a CPU's cache, 256 MB keep a GPU busy.
_CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}


@dataclass(frozen=True)
class Span:
    """Tokens whose likelihood is asked for, and at least one token before them."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """Natural logarithm of a continuation's probability; its tokens; whether each was the model's first choice, and
    whether tokens of the context were left out for want of room."""

    logprob: float
    tokens: int
    greedy: bool
    cut: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Span:
    """Both as tokens. They are those of the whole text, split where the tokens of the context alone end.

    Blanks at the end of the context belong to the continuation: a tokenizer joins them with the word that follows. An
    empty context is the end of another text. (The convention of EleutherAI's lm-evaluation-harness.)

    Raises:
        UserError: the continuation adds no token.
    """
    bare = context.rstrip()
    continuation, context = context[len(bare) :] + continuation, bare
    if context:
        before = tokenizer.encode(context)
        span = Span(before, tokenizer.encode(context + continuation)[len(before) :])
    else:
        span = Span([tokenizer.eos_id], tokenizer.encode(continuation))
    if not span.continuation:
        raise UserError(f"the tokenizer makes nothing of {continuation!r} after {context[-40:]!r}")
    return span


def encode_text(tokenizer: Tokenizer, ids: Sequence[int], context: int) -> list[Span]:
    """Windows of at most `context` tokens that do not overlap, with what can be read before each.

    That is the one token before it, and more for a last window that is shorter. (The convention of EleutherAI's
    lm-evaluation-harness.)
    """
    whole = [tokenizer.eos_id, *ids]
    starts = range(1, len(whole), context)
    return [Span(whole[max(0, start - context) : start], whole[start : start + context]) for start in starts]


class Likelihoods:
    """Computes log-likelihoods under a decoder; see the head of this file."""

    def __init__(
        self,
        decoder: Decoder,
        context: int,
        batch_tokens: int,
        share: Share | None = None,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            decoder: whole, or laid out over ranks, in the types that it computes in.
            context: tokens of a row, at most; longer contexts lose their first tokens.
            batch_tokens: tokens of a batch, padding included; a batch holds at least one row.
            share: how ranks share the work; None: there is one.
            device: that it computes on; None: that of its weights.
        """
        self.decoder, self.context, self.batch_tokens = decoder, context, batch_tokens
        self.share = share or Share()
        self.device = device or decoder.model.embed_tokens.weight.device

    def __call__(self, spans: Sequence[Span], progress: Callable[[int], None] = lambda done: None) -> list[Likelihood]:
        """The likelihood of each span, on all ranks.

        Args:
            progress: called with the number of rows that are done.

        Raises:
            UserError: a continuation is longer than the context.
            RunError: the model gives no finite likelihood.
        """
        rows: dict[tuple[int, ...], list[int]] = {}
        for place, span in enumerate(spans):
            if len(span.continuation) > self.context:
                raise UserError(
                    f"a continuation has {len(span.continuation)} tokens, and the model reads {self.context}: raise "
                    "--context if the model can, or leave this request out"
                )
            inputs = (*span.context, *span.continuation[:-1])[-self.context :]
            rows.setdefault(inputs, []).append(place)
        kept = list(rows)
        done = 0

        def work(batch: list[int]) -> dict[int, tuple[float, bool]]:
            nonlocal done
            done += len(batch) * self.share.size
            progress(min(done, len(kept)))
            return self._batch([kept[row] for row in batch], [rows[kept[row]] for row in batch], spans)

        found = self.share.run(batches_of([len(row) for row in kept], self.batch_tokens), work)
        results = []
        for place, span in enumerate(spans):
            logprob, greedy = found[place]
            if not logprob > -float("inf"):  # nor if it is no number
                raise RunError(f"the model gives a log-likelihood of {logprob}: is it that of a run that failed?")
            cut = len(span.context) + len(span.continuation) - 1 > self.context
            results.append(Likelihood(logprob, len(span.continuation), greedy, cut))
        return results

    @torch.no_grad()
    def _batch(
        self, rows: Sequence[tuple[int, ...]], places: Sequence[Sequence[int]], spans: Sequence[Span]
    ) -> dict[int, tuple[float, bool]]:
        """Log-likelihood and greediness by place in `spans`; `places` are those that each row is for."""
        sharding = self.decoder.model.sharding
        length = len(rows[0]) + -len(rows[0]) % sharding.length_multiple
        inputs = torch.zeros(len(rows), length, dtype=torch.int64)
        where: list[int] = []  # in the flattened rows, the places that predict something
        targets: list[int] = []
        for row, ids in enumerate(rows):
            inputs[row, : len(ids)] = torch.tensor(ids)
            for place in places[row]:
                continuation = spans[place].continuation
                first = row * length + len(ids) - len(continuation)
                where += range(first, first + len(continuation))
                targets += continuation
        wanted, tokens = torch.tensor(where, device=self.device), torch.tensor(targets, device=self.device)

        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            return self._look_up(sharding.join_context(hidden).flatten(0, 1), weight, wanted, tokens)

        inputs = inputs.to(self.device)
        positions = torch.arange(length, device=self.device)
        part, numbers = sharding.slice_context(inputs), sharding.slice_context(positions, dim=0)
        with torch.compiler.set_stance("force_eager"):  # compiled, every length would be a graph of its own
            found = self.decoder(part, position_ids=numbers, head=head).cpu()
        asked = [place for row in places for place in row]
        sizes = [len(spans[place].continuation) for place in asked]
        return {
            place: (float(logprobs.sum()), bool(first_choices.all()))
            for place, (logprobs, first_choices) in zip(asked, found.split(sizes, dim=1), strict=True)
        }

    def _look_up(self, hidden: Tensor, weight: Tensor, wanted: Tensor, tokens: Tensor) -> Tensor:
        """For each token its log-probability and whether it is the likeliest one: (2, tokens) float64."""
        chunk = max(1, _CHUNK_ELEMENTS[hidden.device.type] // self.decoder.config.vocab_size)
        found = []
        for places, ids in zip(wanted.split(chunk), tokens.split(chunk), strict=True):
            logits = functional.linear(hidden[places], weight)
            logits = self.decoder.model.sharding.gather_vocabulary(logits).float()
            logprobs = logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1)
            found.append(torch.stack([logprobs, logits.argmax(1) == ids]).double())
        return torch.cat(found, dim=1)
