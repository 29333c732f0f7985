"""Write with a model of masked diffusion: all new places are hidden at first, and the surest are filled first.

A forward pass gives every hidden place the probabilities of its token. The places whose likeliest token has the highest
probability are filled (of equal ones the first), each with a token drawn from its own probabilities; what was filled
stays. (Confidence-ordered decoding: MaskGIT, arXiv 2202.04200; for text LLaDA, arXiv 2502.09992.)

A text ends before its first end-of-text token; the places behind one are not filled any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from titan_yulan.errors import RunError, UserError
from titan_yulan.eval.bidirectional import logits_of, see_all
from titan_yulan.eval.generate import Continuation, Speed, continue_ids
from titan_yulan.eval.sampling import Sampling
from titan_yulan.model import Decoder


def writing(mask_token_id: int | None, steps: int | None = None) -> Callable[..., list[Continuation]]:
    """How a model writes: `unmask_ids` where it was trained with hidden tokens, else `continue_ids`; both take the same
    arguments.

    Args:
        mask_token_id: what stands for a hidden token; None: the model predicts the next token.

    Raises:
        UserError: `steps` of a model that writes token by token.
    """
    if mask_token_id is not None:
        return partial(unmask_ids, mask_token_id=mask_token_id, steps=steps)
    if steps is not None:
        raise UserError(
            "--steps is for models of objective.kind = 'masked_diffusion'; this one writes token by token: leave it out"
        )
    return continue_ids


@torch.no_grad()
def unmask_ids(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    mask_token_id: int,
    steps: int | None = None,
    new_tokens: int | Sequence[int],
    context: int,
    eos_id: int,
    vocab_size: int,
    goes_on: Callable[[int, list[int]], bool] = lambda row, ids: True,
    placed: Callable[[int, int, int], bool] = lambda row, place, token: True,
    join: Callable[[bool], bool] = bool,
    device: torch.device | None = None,
    speed: Speed | None = None,
) -> list[Continuation]:
    """Continue a batch of prompts of any lengths; arguments that are not named here are those of `continue_ids`.

    Args:
        steps: forward passes that fill a text, at most; each fills equally many places, up to one. None: one place in
            each.
        new_tokens: places that are hidden at first; one number for all, or one for each.
        vocab_size: ids from here on, the mask token among them, are never written, and count in no probability.
        goes_on: called with (row, its new ids up to there) for each token before which none is hidden any more, in
            order; whether the row is to be continued.
        placed: called with (row, place from 0, token) for each token, when it is written; whether the row is to be
            continued.

    Raises:
        RunError: the model's logits are not finite.
    """
    speed = speed or Speed()
    device = device or decoder.model.embed_tokens.weight.device
    most = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
    texts = [
        _Text(prompt, count, context, steps, mask_token_id, sampling)
        for prompt, count in zip(prompts, most, strict=True)
    ]
    begin, read, again = time.perf_counter(), sum(map(len, prompts)), True
    rows = list(range(len(texts)))
    while rows:
        chosen = _choose(decoder, [texts[row] for row in rows], sampling, vocab_size, device)
        for row, tokens in zip(rows, chosen, strict=True):
            texts[row].fill(tokens, eos_id)
            if not all([placed(row, place - texts[row].first, token) for place, token in tokens.items()]):
                texts[row].end("stop")
            texts[row].advance(eos_id, partial(goes_on, row))
        rows = [row for row in rows if texts[row].hidden]
        begin, read = speed.add(begin, sum(map(len, chosen)), read), 0
        again = join(bool(rows))
    while again:
        see_all(decoder, [[0]], device, lambda hidden, weight: list(logits_of(decoder, hidden[0], weight)))
        again = join(False)
    return [text.found for text in texts]


class _Text:
    """A prompt and its continuation.

    ids: of both, the mask token in the places that are hidden.
    hidden: places that are still to be filled, in order; none when the text is done.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        count: int,
        context: int,
        steps: int | None,
        mask_token_id: int,
        sampling: Sampling,
    ) -> None:
        room = min(count, context - len(prompt))
        self.first = len(prompt)
        self.ids = [*prompt, *[mask_token_id] * room]
        self.hidden = list(range(self.first, len(self.ids)))
        self.numbers = sampling.numbers(prompt, room).tolist()
        self.found = Continuation(ending="length" if room == count else "context")
        self._passes = min(steps or room, room)
        self._pass = 0

    def share(self) -> int:
        """How many places the next forward pass fills: all of them in equal parts, up to one."""
        room = len(self.numbers)
        done, self._pass = self._pass, self._pass + 1
        return room * (done + 1) // self._passes - room * done // self._passes

    def fill(self, tokens: dict[int, int], eos_id: int) -> None:
        """Put tokens into their places."""
        for place, token in tokens.items():
            self.ids[place] = token
        end = min((place for place, token in tokens.items() if token == eos_id), default=len(self.ids))
        self.hidden = [place for place in self.hidden if place not in tokens and place < end]

    def end(self, ending: str) -> None:
        """Leave the rest hidden."""
        self.found.ending, self.hidden = ending, []

    def advance(self, eos_id: int, goes_on: Callable[[list[int]], bool]) -> None:
        """Count the tokens as written before which none is hidden any more."""
        if self.found.ending == "stop":
            return
        end = self.hidden[0] if self.hidden else len(self.ids)
        for token in self.ids[self.first + len(self.found.ids) : end]:
            if token == eos_id:
                return self.end("end of text")
            self.found.ids.append(token)
            if not goes_on(self.found.ids):
                return self.end("stop")


def _choose(
    decoder: Decoder, texts: Sequence[_Text], sampling: Sampling, vocab_size: int, device: torch.device
) -> list[dict[int, int]]:
    """One forward pass: of each text the places to fill now, with their tokens.

    Raises:
        RunError: logits are not finite.
    """
    rows = [number for number, text in enumerate(texts) for _ in text.hidden]
    places = [place for text in texts for place in text.hidden]

    def head(hidden: Tensor, weight: Tensor) -> list[dict[int, int]]:
        candidates = hidden[torch.tensor(rows, device=device), torch.tensor(places, device=device)]
        surest = []
        for logits in logits_of(decoder, candidates, weight):
            known = logits[:, :vocab_size]
            surest.append(known.amax(1) - known.logsumexp(1))
        chosen = _surest(texts, torch.cat(surest).cpu())
        draws = [texts[rows[i]].numbers[places[i] - texts[rows[i]].first] for i in chosen]
        tokens: list[int] = []
        for logits in logits_of(decoder, candidates[torch.tensor(chosen, device=device)], weight):
            numbers = draws[len(tokens) : len(tokens) + len(logits)]
            tokens += sampling.choose(logits[:, :vocab_size], numbers)
        found: list[dict[int, int]] = [{} for _ in texts]
        for i, token in zip(chosen, tokens, strict=True):
            found[rows[i]][places[i]] = token
        return found

    return see_all(decoder, [text.ids for text in texts], device, head)


def _surest(texts: Sequence[_Text], logprobs: Tensor) -> list[int]:
    """Which hidden places are filled now, numbered over all texts, by the (all,) log-probabilities of their likeliest
    tokens.

    Raises:
        RunError: one is not finite.
    """
    if not bool(logprobs.isfinite().all()):
        raise RunError(
            "the logits are not finite: the weights are damaged, or the precision is too low for them (--precision "
            "float32)"
        )
    chosen, first = [], 0
    for text in texts:
        part = logprobs[first : first + len(text.hidden)]
        order = part.argsort(descending=True, stable=True)[: text.share()]
        chosen += [first + place for place in sorted(order.tolist())]
        first += len(text.hidden)
    return chosen
