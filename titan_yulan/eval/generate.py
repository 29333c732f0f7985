"""Continue token ids with a model, token by token, keeping keys and values of what was read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from titan_yulan.errors import RunError
from titan_yulan.eval.attending import WholeRows, attending
from titan_yulan.eval.cache import KeyValueCache
from titan_yulan.eval.sampling import Sampling
from titan_yulan.model import Decoder


@dataclass
class Continuation:
    """What was written after a prompt, without the end-of-text token, and why it ended there."""

    ids: list[int] = field(default_factory=list)
    ending: str = "length"  # or "end of text", "context", "stop"


@dataclass
class Speed:
    """Tokens of prompts and the seconds until the first new tokens; the tokens after those and their seconds."""

    read: int = 0
    reading: float = 0.0
    written: int = 0
    writing: float = 0.0

    def add(self, begin: float, new: int, read: int) -> float:
        """Count a forward pass since the time `begin`, the first of a batch if it read prompts; the time now."""
        now = time.perf_counter()
        if read:
            self.read += read
            self.reading += now - begin
        else:
            self.written += new
            self.writing += now - begin
        return now


@torch.no_grad()
def continue_ids(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    new_tokens: int | Sequence[int],
    context: int,
    eos_id: int,
    vocab_size: int,
    goes_on: Callable[[int, list[int]], bool] = lambda row, ids: True,
    join: Callable[[bool], bool] = bool,
    device: torch.device | None = None,
    speed: Speed | None = None,
) -> list[Continuation]:
    """Continue a batch of prompts of any lengths.

    A continuation ends before `eos_id`, after `new_tokens`, or where the context is full. The numbers that it is drawn
    by do not depend on the other prompts; the logits do by their rounding.

    Args:
        decoder: whole, or laid out over ranks in any way: those that share rows have the same prompts, and all run as
            many forward passes as the last of them needs (`join`).
        prompts: ids, at least one each and fewer than `context`.
        new_tokens: most that are written; one number for all, or one for each.
        context: tokens of a row, at most, the prompt included.
        vocab_size: ids from here on are never drawn (the model may have more rows than the tokenizer entries).
        goes_on: called with (row, its new ids) after each token; whether the row is to be continued.
        join: called after each forward pass with whether this rank needs another; whether any rank that it shares the
            decoder with does.
        device: that it computes on; None: that of its weights.
        speed: what was done is added to it.

    Raises:
        RunError: the model's logits are not finite.
    """
    begin, speed = time.perf_counter(), speed or Speed()
    device = device or decoder.model.embed_tokens.weight.device
    width = max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    inputs = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)])
    most = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
    rooms = [min(count, context - len(prompt)) for count, prompt in zip(most, prompts, strict=True)]
    draws = [sampling.numbers(prompt, room).tolist() for prompt, room in zip(prompts, rooms, strict=True)]
    found = [
        Continuation(ending="length" if room == count else "context") for room, count in zip(rooms, most, strict=True)
    ]
    writing, place, again = list(range(len(prompts))), 0, True
    cache = KeyValueCache(pads, width + max(rooms) - 1, device)  # the last token is never read
    while writing:
        logits = _next_logits(decoder, inputs.to(device), cache)[:, :vocab_size]
        tokens = sampling.choose(logits, [draw[min(place, len(draw) - 1)] for draw in draws])
        begin = speed.add(begin, len(writing), 0 if place else sum(map(len, prompts)))
        writing = [row for row in writing if _add(found[row], tokens[row], eos_id, rooms[row], row, goes_on)]
        inputs = torch.tensor(tokens)[:, None]
        again, place = join(bool(writing)), place + 1
    while again:
        _pass(decoder, inputs[:1].to(device), WholeRows())
        again = join(False)
    return found


def _add(
    found: Continuation, token: int, eos_id: int, room: int, row: int, goes_on: Callable[[int, list[int]], bool]
) -> bool:
    """Add a token to a continuation, unless it ends the text; whether there is more to write."""
    if token == eos_id:
        found.ending = "end of text"
        return False
    found.ids.append(token)
    if not goes_on(row, found.ids):
        found.ending = "stop"
        return False
    return len(found.ids) < room


def _next_logits(decoder: Decoder, inputs: Tensor, cache: KeyValueCache) -> Tensor:
    """(rows, new) ids -> (rows, vocabulary) logits of the token after them.

    Raises:
        RunError: they are not finite.
    """
    logits = _pass(decoder, inputs, cache, cache.begin(inputs.shape[1]))
    if not bool(logits.amax(-1).isfinite().all()):
        raise RunError(
            "the logits are not finite: the weights are damaged, or the precision is too low for them (--precision "
            "float32)"
        )
    return logits


def _pass(decoder: Decoder, inputs: Tensor, by: WholeRows, positions: Tensor | None = None) -> Tensor:
    def last_logits(hidden: Tensor, weight: Tensor) -> Tensor:
        return by.gather_vocabulary(hidden[:, -1] @ weight.t())

    # compiled, every length would be a graph of its own
    with attending(decoder, by), torch.compiler.set_stance("force_eager"):
        return decoder(inputs, position_ids=positions, head=last_logits)


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
    write: Callable[..., list[Continuation]] = continue_ids,
) -> list[int]:
    """Ids of the continuation of one prompt, without it, on ranks that all have this prompt.

    Args:
        prompt: of one that fills the context the end is read, half a context long.
        new_tokens, eos_id, vocab_size, context, temperature, top_k, seed, device: as `continue_ids` and `Sampling` have
            them.
        write: how the model writes (`eval.unmask.writing`).
    """
    read = prompt if len(prompt) < context else prompt[-max(1, context // 2) :]
    (found,) = write(
        decoder,
        [read],
        Sampling(temperature, top_k, seed=seed),
        new_tokens=new_tokens,
        context=context,
        eos_id=eos_id,
        vocab_size=vocab_size,
        device=torch.device(device),
    )
    return found.ids
