"""What a model writes after a context, token by token the likeliest one, many contexts at a time.

Keys and values of what was read are kept, so that a new token costs one row. The decoder is written without such a
memory: it asks a `Sharding` to attend, and here that is one which remembers. Contexts of different lengths are padded
at their beginnings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import RunError, UserError
from titan_yulan.eval.attending import attending
from titan_yulan.eval.batches import batches_of
from titan_yulan.eval.cache import KeyValueCache
from titan_yulan.eval.requests import Generation
from titan_yulan.eval.share import Share
from titan_yulan.model import Decoder


@dataclass(frozen=True)
class Written:
    """What was written, without the stop; its tokens; whether the context lost its first tokens for want of room."""

    text: str
    tokens: int
    cut: bool


class Writer:
    """Continues contexts with a decoder that no two ranks share; see the head of this file."""

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, context: int, batch_tokens: int, share: Share | None = None
    ) -> None:
        """
        Args:
            decoder: on the device and in the types that it computes in.
            context: tokens of a row, at most; longer contexts lose their first tokens.
            batch_tokens: tokens of a batch, padding and what may be written included.
            share: how ranks share the work; None: there is one.
        """
        self.decoder, self.tokenizer, self.context, self.batch_tokens = decoder, tokenizer, context, batch_tokens
        self.share = share or Share()
        self.device = decoder.model.embed_tokens.weight.device

    def __call__(
        self, requests: Sequence[Generation], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[Written]:
        """What the model writes for each request, on all ranks.

        Args:
            progress: called with how many requests are done, and of how many.

        Raises:
            UserError: a request may write more than the model reads.
            RunError: the model's numbers are not finite.
        """
        self.check(requests)
        prompts = [self.tokenizer.encode(request.context) or [self.tokenizer.eos_id] for request in requests]
        rooms = [self.context - request.max_new_tokens for request in requests]
        done = 0

        def work(batch: list[int]) -> dict[int, Written]:
            nonlocal done
            texts = self._write([prompts[i][-rooms[i] :] for i in batch], [requests[i] for i in batch])
            done += len(batch) * self.share.size
            progress(min(done, len(requests)), len(requests))
            cuts = [len(prompts[i]) > rooms[i] for i in batch]
            return {i: Written(*text, cut) for i, text, cut in zip(batch, texts, cuts, strict=True)}

        lengths = [len(prompts[i][-rooms[i] :]) + requests[i].max_new_tokens for i in range(len(requests))]
        found = self.share.run(batches_of(lengths, self.batch_tokens), work)
        return [found[i] for i in range(len(requests))]

    def check(self, requests: Sequence[Generation]) -> None:
        """There must be room for what each request may write.

        Raises:
            UserError: a request may write more than the model reads.
        """
        for request in requests:
            if request.max_new_tokens >= self.context:
                raise UserError(
                    f"request {request.id} may write {request.max_new_tokens} tokens, and the model reads "
                    f"{self.context}: lower --max-new-tokens, or raise --context if the model can"
                )

    @torch.no_grad()
    def _write(self, prompts: list[list[int]], requests: list[Generation]) -> list[tuple[str, int]]:
        """Text and number of tokens for each prompt."""
        length = max(map(len, prompts))
        pads = [length - len(prompt) for prompt in prompts]
        inputs = torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)])
        inputs = inputs.to(self.device)
        most = max(request.max_new_tokens for request in requests)
        written: list[list[int]] = [[] for _ in prompts]
        writing = set(range(len(prompts)))
        cache = KeyValueCache(pads, length + most, self.device)

        def last_logits(hidden: Tensor, weight: Tensor) -> Tensor:
            return hidden[:, -1] @ weight.t()

        with attending(self.decoder, cache):
            while True:
                positions = cache.begin(inputs.shape[1])
                logits = self.decoder(inputs, position_ids=positions, head=last_logits)
                if not bool(logits.amax(-1).isfinite().all()):
                    raise RunError("the logits are not finite: the weights are damaged, or --precision is too low")
                inputs = logits[:, : self.tokenizer.vocab_size].argmax(1, keepdim=True)
                for row, token in enumerate(inputs[:, 0].tolist()):
                    if row in writing and not self._goes_on(written[row], token, requests[row]):
                        writing.remove(row)
                if not writing:
                    break
        return [
            (_before(self.tokenizer.decode(ids), request.stop), len(ids))
            for ids, request in zip(written, requests, strict=True)
        ]

    def _goes_on(self, ids: list[int], token: int, request: Generation) -> bool:
        """Add a token to what a request has written, unless it ends the text; whether there is more to write."""
        if token == self.tokenizer.eos_id:
            return False
        ids.append(token)
        # a stop of n bytes lies in the last n tokens, where it ends in the last one
        reach = max((len(stop.encode()) for stop in request.stop), default=0)
        tail = self.tokenizer.decode(ids[-reach:]) if reach else ""
        return len(ids) < request.max_new_tokens and not any(stop in tail for stop in request.stop)


def _before(text: str, stops: Sequence[str]) -> str:
    places = [text.index(stop) for stop in stops if stop in text]
    return text[: min(places)] if places else text
