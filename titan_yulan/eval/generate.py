"""Continue token ids with a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from titan_yulan.errors import RunError
from titan_yulan.eval.attending import attending
from titan_yulan.eval.cache import KeyValueCache
from titan_yulan.eval.sampling import Sampling
from titan_yulan.model import Decoder


@dataclass
class Continuation:
    """What was written after a prompt, without the end-of-text token, and why it ended there."""

    ids: list[int] = field(default_factory=list)
    ending: str = "length"  # or "end of text", "context"


@dataclass
class Speed:
    """Tokens of prompts and the seconds until the first new tokens; the tokens after those and their seconds."""

    read: int = 0
    reading: float = 0.0
    written: int = 0
    writing: float = 0.0


@torch.no_grad()
def continue_ids(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    new_tokens: int,
    context: int,
    eos_id: int,
    vocab_size: int,
    each: Callable[[int, int], None] = lambda row, token: None,
    speed: Speed | None = None,
) -> list[Continuation]:
    """Continue a batch of prompts of any lengths with a decoder that no two ranks share, keeping keys and values.

    A continuation ends before `eos_id`, after `new_tokens`, or where the context is full. The numbers that it is drawn
    by do not depend on the other prompts; the logits do by their rounding.

    Args:
        prompts: ids, at least one each and fewer than `context`.
        context: tokens of a row, at most, the prompt included.
        vocab_size: ids from here on are never drawn (the model may have more rows than the tokenizer entries).
        each: called with (row, token) for each token as it is drawn.
        speed: what was done is added to it.

    Raises:
        RunError: the model's logits are not finite.
    """
    begin, speed = time.perf_counter(), speed or Speed()
    width = max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    inputs = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)])
    device = decoder.model.embed_tokens.weight.device
    rooms = [min(new_tokens, context - len(prompt)) for prompt in prompts]
    draws = [sampling.numbers(prompt, room).tolist() for prompt, room in zip(prompts, rooms, strict=True)]
    found = [Continuation(ending="length" if room == new_tokens else "context") for room in rooms]
    writing = list(range(len(prompts)))
    cache = KeyValueCache(pads, width + max(rooms) - 1, device)  # the last token is never read
    with attending(decoder, cache):
        for place in range(max(rooms)):
            positions = cache.begin(inputs.shape[1])
            logits = decoder(inputs.to(device), position_ids=positions, head=_last_logits)[:, :vocab_size]
            tokens = _choose(logits, sampling, [draw[min(place, len(draw) - 1)] for draw in draws])
            for row in writing:
                if tokens[row] == eos_id:
                    found[row].ending = "end of text"
                else:
                    found[row].ids.append(tokens[row])
                    each(row, tokens[row])
            if place == 0:
                speed.read += sum(map(len, prompts))
                speed.reading += time.perf_counter() - begin
                begin = time.perf_counter()
            else:
                speed.written += len(writing)
            writing = [row for row in writing if tokens[row] != eos_id and place + 1 < rooms[row]]
            if not writing:
                break
            inputs = torch.tensor(tokens)[:, None]
    speed.writing += time.perf_counter() - begin
    return found


def _choose(logits: Tensor, sampling: Sampling, numbers: Sequence[float]) -> list[int]:
    if not bool(logits.amax(-1).isfinite().all()):
        raise RunError("the logits are not finite: the weights are damaged, or --precision is too low")
    return sampling.choose(logits, numbers)


def _last_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden[:, -1] @ weight.t()


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompt: Sequence[int],
    *,
    new_tokens: int,
    eos_id: int,
    vocab_size: int,
    context: int,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[int]:
    """Ids of the continuation of one prompt, without it, by a decoder that ranks may share in any way.

    All ranks draw the same. The whole prefix (its last `context` tokens) is computed anew for every token, which needs
    nothing from the decoder but a forward pass; `continue_ids` is the fast way in one process, and draws the same.

    Args:
        vocab_size, temperature, top_k, seed: as `continue_ids` and `Sampling` have them.
    """
    ids = list(prompt)
    sampling = Sampling(temperature, top_k, seed=seed)
    sharding = decoder.model.sharding
    for number in sampling.numbers(prompt, new_tokens).tolist():
        window = torch.tensor([ids[-context:]], device=device)
        last = window.shape[1] - 1
        # what is added behind the last token does not reach it
        window = functional.pad(window, (0, -window.shape[1] % sharding.length_multiple))
        positions = torch.arange(window.shape[1], device=device)

        def last_logits(hidden: Tensor, weight: Tensor, last: int = last) -> Tensor:
            return sharding.gather_vocabulary(sharding.join_context(hidden)[:, last] @ weight.t())

        part, places = sharding.slice_context(window), sharding.slice_context(positions, dim=0)
        with torch.compiler.set_stance("force_eager"):  # compiled, every length would be a graph of its own
            logits = decoder(part, position_ids=places, head=last_logits)
        (token,) = sampling.choose(logits[:, :vocab_size], [number])
        if token == eos_id:
            break
        ids.append(token)
    return ids[len(prompt) :]
