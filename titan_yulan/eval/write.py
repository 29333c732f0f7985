"""What a model writes after a context, always the likeliest token, many contexts at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.eval.batches import batches_of
from titan_yulan.eval.check import check_room
from titan_yulan.eval.requests import Generation
from titan_yulan.eval.sampling import Sampling
from titan_yulan.eval.share import Share
from titan_yulan.eval.unmask import writing
from titan_yulan.model import Decoder

_GREEDY = Sampling(temperature=0.0)
_TELL_EVERY = 16  # tokens; a batch of long answers takes minutes, and somebody waits for a sign


@dataclass(frozen=True)
class Written:
    """What was written, without the stop; its tokens; whether the context lost its first tokens for want of room."""

    text: str
    tokens: int
    cut: bool


class Writer:
    """Continues contexts with a decoder, whole or laid out over ranks."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        context: int,
        batch_tokens: int,
        share: Share | None = None,
        device: torch.device | None = None,
        mask_token_id: int | None = None,
    ) -> None:
        """
        Args:
            decoder: in the types that it computes in.
            context: tokens of a row, at most; longer contexts lose their first tokens.
            batch_tokens: tokens of a batch, padding and what may be written included.
            share: how ranks share the work; None: there is one.
            device: that it computes on; None: that of its weights.
            mask_token_id: see `eval.unmask.writing`.
        """
        self._continue = writing(mask_token_id)
        self.decoder, self.tokenizer, self.context, self.batch_tokens = decoder, tokenizer, context, batch_tokens
        self.share, self.device = share or Share(), device

    def __call__(
        self, requests: Sequence[Generation], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[Written]:
        """What the model writes for each request, on all ranks.

        Args:
            progress: called with how many requests are done, and of how many; on ranks that share the decoder equally
                often.

        Raises:
            UserError: a request may write more than the model reads.
            RunError: the model's numbers are not finite.
        """
        check_room(requests, self.context)
        prompts = [self.tokenizer.encode(request.context) or [self.tokenizer.eos_id] for request in requests]
        rooms = [self.context - request.max_new_tokens for request in requests]
        done = 0

        def tell() -> None:
            progress(min(done, len(requests)), len(requests))

        def work(batch: list[int]) -> dict[int, Written]:
            nonlocal done
            texts = self._write([prompts[i][-rooms[i] :] for i in batch], [requests[i] for i in batch], tell)
            done += len(batch) * self.share.size
            tell()
            cuts = [len(prompts[i]) > rooms[i] for i in batch]
            return {i: Written(*text, cut) for i, text, cut in zip(batch, texts, cuts, strict=True)}

        lengths = [len(prompt[-room:]) for prompt, room in zip(prompts, rooms, strict=True)]
        new = [request.max_new_tokens for request in requests]
        found = self.share.run(batches_of(lengths, self.batch_tokens, new), work)
        return [found[i] for i in range(len(requests))]

    def _write(
        self, prompts: list[list[int]], requests: list[Generation], tell: Callable[[], None]
    ) -> list[tuple[str, int]]:
        """Text and number of tokens for each prompt."""
        passes = 0

        def goes_on(row: int, ids: list[int]) -> bool:
            # a stop of n bytes lies in the last n tokens, where it ends in the last one
            reach = max((len(stop.encode()) for stop in requests[row].stop), default=0)
            tail = self.tokenizer.decode(ids[-reach:]) if reach else ""
            return not any(stop in tail for stop in requests[row].stop)

        def join(writing: bool) -> bool:
            nonlocal passes
            passes += 1
            if passes % _TELL_EVERY == 0:
                tell()
            return self.share.goes_on(writing)

        found = self._continue(
            self.decoder,
            prompts,
            _GREEDY,
            new_tokens=[request.max_new_tokens for request in requests],
            context=self.context,
            eos_id=self.tokenizer.eos_id,
            vocab_size=self.tokenizer.vocab_size,
            goes_on=goes_on,
            join=join,
            device=self.device,
        )
        texts = [self.tokenizer.decode(continuation.ids) for continuation in found]
        return [
            (_before(text, request.stop), len(continuation.ids))
            for text, request, continuation in zip(texts, requests, found, strict=True)
        ]


def _before(text: str, stops: Sequence[str]) -> str:
    places = [text.index(stop) for stop in stops if stop in text]
    return text[: min(places)] if places else text
