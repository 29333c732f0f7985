"""Log-likelihoods of continuations under a model of masked diffusion, many at a time.

With m the tokens of a continuation y after a context c, all of which the model sees, and H a set of hidden places of y:

    left_to_right   sum over j of log P(y_j | c, y_1 .. y_{j-1}, y_j .. y_m hidden)
                    the chain rule in one order, m forward passes of one row each
    bound           - 1/n sum over i of 1/t_i sum over H_i of -log P(y_j | c, y with H_i hidden)
                    each place is in H_i with probability t_i = (u + i / n) mod 1, n samples; its expectation over u and
                    H bounds a log-likelihood from below (Sahoo et al., arXiv 2406.07524)

The times of a continuation are spread evenly, and so is what is hidden of it, which takes noise from the sum; that of
few tokens keeps much, for 1/t has no finite variance. Both follow from the context alone: continuations of one context
are compared with the same times and the same places hidden, on any number of ranks.

A row ends with its continuation, and nothing behind it is seen, neither hidden nor not. A continuation that does not
fit is cut into windows that do not overlap, each after as much of what is before it as fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from titan_yulan.data import hashing
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import UserError
from titan_yulan.eval.batches import batches_of
from titan_yulan.eval.bidirectional import see_all
from titan_yulan.eval.diffusion import Diffusion
from titan_yulan.eval.likelihood import Likelihood, Likelihoods, Span, require_finite
from titan_yulan.eval.sampling import Sampling
from titan_yulan.eval.share import Share
from titan_yulan.eval.unmask import unmask_ids
from titan_yulan.model import Decoder
from titan_yulan.objective.masked_diffusion import GOLDEN_RATIO

_GREEDY = Sampling(temperature=0.0)
Progress = Callable[[int, int], None]


def times(key: int, samples: int) -> np.ndarray:
    """(samples,) float64 in [0, 1): evenly spread, the first one random."""
    return (hashing.uniform(key, np.zeros(1)) + np.arange(samples) / samples) % 1.0


def draws(key: int, samples: int, places: int) -> Iterator[tuple[float, np.ndarray]]:
    """Times, and at each (places,) bool, what is hidden: place by place whatever their number.

    A place is hidden where its number is below the time. The numbers of a sample are independent; from sample to sample
    each goes on by the golden ratio, so that with the times they fill the unit square evenly (Kronecker's sequence).
    """
    numbers = hashing.uniform(hashing.key(key, "hidden"), np.arange(places))
    for i, time in enumerate(times(key, samples).tolist()):
        yield time, (numbers + i * GOLDEN_RATIO) % 1.0 < time


@dataclass(frozen=True)
class _Row:
    """One row to compute for a span.

    hidden: (m,) bool; asked: (m,) bool, the hidden tokens whose log-probabilities count, each `weight` times.
    """

    span: int
    hidden: np.ndarray
    asked: np.ndarray
    weight: float


class DiffusionLikelihoods(Likelihoods):
    """Computes them under a decoder; see the head of this file."""

    def __init__(
        self,
        decoder: Decoder,
        context: int,
        batch_tokens: int,
        share: Share | None = None,
        device: torch.device | None = None,
        *,
        diffusion: Diffusion,
    ) -> None:
        """The other arguments are those of `Likelihoods`.

        Raises:
            UserError: the context has no room for a token and one before it.
        """
        super().__init__(decoder, context, batch_tokens, share, device)
        if context < 2:
            raise UserError(f"a context of {context} tokens has no room for a token and one before it; raise --context")
        self.diffusion = diffusion

    def __call__(
        self,
        spans: Sequence[Span],
        progress: Progress = lambda done, total: None,
        likelihood: str | None = None,
    ) -> list[Likelihood]:
        """The likelihood of each span, on all ranks; whether it would be written is `written`'s to say.

        Args:
            progress: called with how much is done, and of how much.
            likelihood: how; None: as `diffusion` says.

        Raises:
            RunError: the model gives no finite likelihood.
        """
        pieces = [self._windows(span) for span in spans]
        found = iter(self._sums([piece for part in pieces for piece in part], progress, likelihood))
        results = []
        for span, part in zip(spans, pieces, strict=True):
            logprob = require_finite(math.fsum(next(found) for _ in part))
            results.append(Likelihood(logprob, len(span.continuation), None, self._is_cut(span)))
        return results

    def written(
        self, spans: Sequence[Span], tokenizer: Tokenizer, progress: Progress = lambda done, total: None
    ) -> list[bool]:
        """Whether the model, told how long each continuation is, writes it: the surest place first, in each forward
        pass one. One that is cut is written window by window, each after the true tokens before it."""
        pieces = [(place, piece) for place, span in enumerate(spans) for piece in self._windows(span)]

        def work(batch: list[int]) -> dict[int, bool]:
            return self._written([pieces[i][1] for i in batch], batch, tokenizer)

        lengths = [len(piece.context) + len(piece.continuation) for _, piece in pieces]
        found = self._run(lengths, work, progress)
        right = [True] * len(spans)
        for number, (place, _) in enumerate(pieces):
            right[place] &= found[number]
        return right

    def _written(self, spans: Sequence[Span], numbers: Sequence[int], tokenizer: Tokenizer) -> dict[int, bool]:
        wrong: set[int] = set()

        def is_right(row: int, place: int, token: int) -> bool:
            if token != spans[row].continuation[place]:
                wrong.add(row)
            return row not in wrong

        unmask_ids(
            self.decoder,
            [span.context for span in spans],
            _GREEDY,
            mask_token_id=self.diffusion.mask_token_id,
            new_tokens=[len(span.continuation) for span in spans],
            context=self.context,
            eos_id=tokenizer.eos_id,
            vocab_size=tokenizer.vocab_size,
            placed=is_right,
            join=self.share.goes_on,
            device=self.device,
        )
        return {number: row not in wrong for row, number in enumerate(numbers)}

    def _windows(self, span: Span) -> list[Span]:
        """Parts of a span that fit into rows, each after what is before it as far as there is room."""
        whole, first, room = [*span.context, *span.continuation], len(span.context), self.context - 1
        found = []
        for start in range(first, len(whole), room):
            end = min(start + room, len(whole))
            found.append(Span(whole[max(0, end - self.context) : start], whole[start:end]))
        return found

    def _is_cut(self, span: Span) -> bool:
        return len(span.context) + len(span.continuation) > self.context

    def _sums(self, spans: Sequence[Span], progress: Progress, likelihood: str | None) -> list[float]:
        """Log-likelihoods of spans that fit."""
        make = {"left_to_right": _left_to_right, "bound": self._samples}[likelihood or self.diffusion.likelihood]
        rows = [row for number, span in enumerate(spans) for row in make(number, span)]

        def work(batch: list[int]) -> dict[int, float]:
            return self._batch_sums([rows[i] for i in batch], batch, spans)

        lengths = [len(spans[row.span].context) + len(row.hidden) for row in rows]
        found = self._run(lengths, work, progress)
        parts: list[list[float]] = [[] for _ in spans]
        for number, row in enumerate(rows):
            parts[row.span].append(found[number])
        return [math.fsum(part) for part in parts]

    def _run(self, lengths: Sequence[int], work: Callable[[list[int]], dict], progress: Progress) -> dict:
        """What `work` gives for rows of these lengths, in batches shared by the ranks."""
        done = 0

        def tell(batch: list[int]) -> dict:
            nonlocal done
            values = work(batch)
            done += len(batch) * self.share.size
            progress(min(done, len(lengths)), len(lengths))
            return values

        return self.share.run(batches_of(lengths, self.batch_tokens), tell)

    def _samples(self, number: int, span: Span) -> list[_Row]:
        """The rows of the bound; a sample that hides nothing adds nothing, and needs none."""
        samples = self.diffusion.samples
        key = hashing.key("diffusion likelihood", " ".join(map(str, span.context)))
        return [
            _Row(number, hidden, hidden, 1 / (time * samples))
            for time, hidden in draws(key, samples, len(span.continuation))
            if hidden.any()
        ]

    @torch.no_grad()
    def _batch_sums(self, rows: Sequence[_Row], numbers: Sequence[int], spans: Sequence[Span]) -> dict[int, float]:
        """Weighted log-probabilities by number of the row, in one forward pass."""
        texts, places, targets = [], [], []
        for number, row in enumerate(rows):
            span = spans[row.span]
            answer = np.asarray(span.continuation)
            texts.append([*span.context, *np.where(row.hidden, self.diffusion.mask_token_id, answer).tolist()])
            asked = np.flatnonzero(row.asked)
            places += [(number, len(span.context) + place) for place in asked.tolist()]
            targets += answer[asked].tolist()
        wanted, tokens = torch.tensor(places, device=self.device), torch.tensor(targets, device=self.device)

        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            return self._look_up(hidden[wanted[:, 0], wanted[:, 1]], weight, tokens)

        found = see_all(self.decoder, texts, self.device, head)[0].cpu()
        parts = found.split([int(row.asked.sum()) for row in rows])
        return {number: row.weight * float(part.sum()) for number, row, part in zip(numbers, rows, parts, strict=True)}


def _left_to_right(number: int, span: Span) -> list[_Row]:
    places = np.arange(len(span.continuation))
    return [_Row(number, places >= place, places == place, 1.0) for place in places]
