"""Log-likelihoods of continuations, many at a time.

    log p(continuation | context) = sum over its tokens of log softmax(logits of the place before)[token]

Only the places that predict a continuation's tokens go through the output head, some thousand at a time; the logits
of a whole batch never exist. Continuations of the same context, such as the choices of one question, share a row: the
context is read once, and behind it the continuations, which do not see one another. One that is longer than its
context, where that would spare little, has a row of its own.

A continuation that is longer than the model reads is cut into windows whose predictions do not overlap, the last of
which reads as far back as it can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import RunError, UserError
from titan_yulan.eval.attending import Branches, attending
from titan_yulan.eval.batches import batches_of
from titan_yulan.eval.bidirectional import logits_of
from titan_yulan.eval.share import Share
from titan_yulan.model import Decoder


@dataclass(frozen=True)
class Span:
    """Tokens whose likelihood is asked for, and at least one token before them."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """Natural logarithm of a continuation's probability; its tokens; whether each was the model's first choice (None:
    not looked for), and whether tokens of the context were left out for want of room."""

    logprob: float
    tokens: int
    greedy: bool | None
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
        raise UserError(
            f"the tokenizer makes nothing of {continuation!r} after {context[-40:]!r}: correct that request"
        )
    return span


def _pieces(span: Span, context: int) -> list[Span]:
    """A span in windows of at most `context` tokens that do not overlap; each is predicted from what is before it."""
    if len(span.continuation) <= context:
        return [span]
    whole, first = [*span.context, *span.continuation], len(span.context)
    starts = range(first, len(whole), context)
    return [Span(whole[max(0, start - context) : start], whole[start : start + context]) for start in starts]


def require_finite(logprob: float) -> float:
    """
    Raises:
        RunError: it is not finite.
    """
    if not logprob > -math.inf:  # nor if it is no number
        raise RunError(
            f"the model gives a log-likelihood of {logprob}: its weights are damaged, or those of a run that failed; "
            "take an earlier checkpoint, or --precision float32"
        )
    return logprob


class _Row:
    """A context and continuations of it, without their last tokens, one after the other.

    tokens, positions: as the model reads them; branches: 0 for the context, else the number of the continuation.
    places: of the continuations in the list of spans; wanted: the places in the row that predict their tokens.
    """

    def __init__(self, context: tuple[int, ...]) -> None:
        self._context = len(context)
        self.tokens, self.positions = list(context), list(range(len(context)))
        self.branches = [0] * len(context)
        self.count = 0  # of the continuations that have tokens of their own
        self.places: list[int] = []
        self.wanted: list[int] = []

    def add(self, place: int, continuation: Sequence[int]) -> None:
        own, first = len(continuation) - 1, len(self.tokens)
        self.count += own > 0
        self.tokens += continuation[:-1]
        self.positions += range(self._context, self._context + own)
        self.branches += [self.count] * own
        self.places.append(place)
        self.wanted += [self._context - 1, *range(first, first + own)]


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

    def __call__(
        self, spans: Sequence[Span], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[Likelihood]:
        """The likelihood of each span, on all ranks.

        Args:
            progress: called with how much is done, and of how much.

        Raises:
            RunError: the model gives no finite likelihood.
        """
        pieces = [_pieces(span, self.context) for span in spans]
        values = iter(self._look_up_all([piece for part in pieces for piece in part], progress))
        results = []
        for span, part in zip(spans, pieces, strict=True):
            found = [next(values) for _ in part]
            logprob = require_finite(math.fsum(value for value, _ in found))
            cut = len(span.context) + len(span.continuation) - 1 > self.context
            results.append(Likelihood(logprob, len(span.continuation), all(greedy for _, greedy in found), cut))
        return results

    def _look_up_all(self, spans: Sequence[Span], progress: Callable[[int, int], None]) -> list[tuple[float, bool]]:
        """Log-likelihood and greediness of spans that fit."""
        rows = self._rows(spans)
        done = 0

        def work(batch: list[int]) -> dict[int, tuple[float, bool]]:
            nonlocal done
            values = self._batch([rows[row] for row in batch], spans)
            done += sum(len(rows[row].places) for row in batch) * self.share.size
            progress(min(done, len(spans)), len(spans))
            return values

        found = self.share.run(batches_of([len(row.tokens) for row in rows], self.batch_tokens), work)
        return [found[place] for place in range(len(spans))]

    def _rows(self, spans: Sequence[Span]) -> list[_Row]:
        rows: list[_Row] = []
        last: dict[tuple[int, ...], _Row] = {}
        for place, span in enumerate(spans):
            own = len(span.continuation) - 1  # its last token is only predicted
            context = tuple(span.context[own - self.context :])
            row = last.get(context)
            if row is None or (own and (len(row.tokens) + own > self.context or own > len(context))):
                row = last[context] = _Row(context)
                rows.append(row)
            row.add(place, span.continuation)
        return rows

    @torch.no_grad()
    def _batch(self, rows: Sequence[_Row], spans: Sequence[Span]) -> dict[int, tuple[float, bool]]:
        """Log-likelihood and greediness by place in `spans`."""
        length = len(rows[0].tokens) + -len(rows[0].tokens) % self.decoder.model.sharding.length_multiple
        asked = [place for row in rows for place in row.places]
        where = [number * length + place for number, row in enumerate(rows) for place in row.wanted]
        targets = [token for place in asked for token in spans[place].continuation]
        wanted, tokens = torch.tensor(where, device=self.device), torch.tensor(targets, device=self.device)

        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            whole = self.decoder.model.sharding.join_context(hidden)
            return self._look_up(whole.flatten(0, 1)[wanted], weight, tokens)

        with torch.compiler.set_stance("force_eager"):  # compiled, every length would be a graph of its own
            found = self._forward(rows, length, head).cpu()
        sizes = [len(spans[place].continuation) for place in asked]
        return {
            place: (float(logprobs.sum()), bool(first_choices.all()))
            for place, (logprobs, first_choices) in zip(asked, found.split(sizes, dim=1), strict=True)
        }

    def _forward(self, rows: Sequence[_Row], length: int, head: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        # what is added behind a row does not reach it
        inputs = self._padded([row.tokens for row in rows], length)
        if all(row.count < 2 for row in rows):
            sharding, positions = self.decoder.model.sharding, torch.arange(length, device=self.device)
            part, numbers = sharding.slice_context(inputs), sharding.slice_context(positions, dim=0)
            return self.decoder(part, position_ids=numbers, head=head)
        with attending(self.decoder, Branches(self._padded([row.branches for row in rows], length))):
            positions = self._padded([row.positions for row in rows], length)
            return self.decoder(inputs, position_ids=positions, head=head)

    def _padded(self, values: Sequence[Sequence[int]], length: int) -> Tensor:
        """(rows, length) int64."""
        return torch.tensor([[*row, *[0] * (length - len(row))] for row in values], device=self.device)

    def _look_up(self, hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        """For each place (places, hidden) the log-probability of its token and whether that is the likeliest one:
        (2, places) float64."""
        found, done = [], 0
        for logits in logits_of(self.decoder, hidden, weight):
            ids = tokens[done : done + len(logits)]
            done += len(logits)
            logprobs = logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1)
            found.append(torch.stack([logprobs, logits.argmax(1) == ids]).double())
        return torch.cat(found, dim=1)
