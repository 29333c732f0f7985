"""Continue a text with a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from titan_yulan.data import hashing
from titan_yulan.model import Decoder


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
    """Ids of the continuation, without the prompt; ends before `eos_id` or after `new_tokens`.

    The draw of token i depends on (seed, i) alone, so all ranks of a sharded model draw the same. The whole prefix
    (its last `context` tokens) is computed anew for every token.

    Args:
        vocab_size: ids from here on are never drawn (the model may have more rows than the tokenizer entries).
        temperature: 0 takes the most likely token.
        top_k: only the k most likely tokens can be drawn.
    """
    ids = list(prompt)
    sharding = decoder.model.sharding
    uniform = hashing.uniform(hashing.key(seed, "generate"), np.arange(new_tokens))
    for u in uniform.tolist():
        window = torch.tensor([ids[-context:]], device=device)
        last = window.shape[1] - 1
        # what is added behind the last token does not reach it
        window = functional.pad(window, (0, -window.shape[1] % sharding.length_multiple))
        positions = torch.arange(window.shape[1], device=device)

        def last_logits(hidden: Tensor, weight: Tensor, last: int = last) -> Tensor:
            return sharding.gather_vocabulary(sharding.join_context(hidden)[:, last] @ weight.t())

        part, places = sharding.slice_context(window), sharding.slice_context(positions, dim=0)
        with torch.compiler.set_stance("force_eager"):  # compiled, every length would be a graph of its own
            logits = decoder(part, position_ids=places, head=last_logits)[0]
        # on the host: one row, and CUDA has no deterministic cumulative sum
        logits = logits[:vocab_size].double().cpu()
        logits, candidates = logits.topk(min(top_k, len(logits)))
        if temperature > 0:
            shares = (logits / temperature).softmax(0).cumsum(0)
            chosen = int((shares < u * shares[-1]).sum())
        else:
            chosen = 0
        if int(candidates[chosen]) == eos_id:
            break
        ids.append(int(candidates[chosen]))
    return ids[len(prompt) :]
