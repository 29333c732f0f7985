"""Forward passes in which all tokens of a row see one another, as masked diffusion trains them.

Rows of a batch are filled up to one length at their ends, with tokens that no token of a text sees: what a row gives
does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from titan_yulan.model import Decoder

T = TypeVar("T")

# Logits that are held at a time: 8 MB in float32 stay in a CPU's cache, 256 MB keep a GPU busy.
_CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}


def see_all(
    decoder: Decoder, rows: Sequence[Sequence[int]], device: torch.device, head: Callable[[Tensor, Tensor], T]
) -> T:
    """What `head` makes of the final hidden states (rows, longest row or more, hidden) and the head's weight.

    Args:
        decoder: whole, or laid out over ranks in any way; context-parallel ranks cut the rows, and all get the whole
            hidden states.
        rows: token ids.
    """
    sharding, longest = decoder.model.sharding, max(map(len, rows))
    length = longest + -longest % sharding.length_multiple
    inputs = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
    documents = None
    if any(len(row) < length for row in rows):
        lengths = torch.tensor([len(row) for row in rows], device=device)
        documents = (torch.arange(length, device=device) >= lengths[:, None]).long()
    with torch.compiler.set_stance("force_eager"):  # compiled, every length would be a graph of its own
        return decoder(
            sharding.slice_context(inputs),
            position_ids=sharding.slice_context(torch.arange(length, device=device), dim=0),
            document_ids=documents,
            causal=False,
            head=lambda hidden, weight: head(sharding.join_context(hidden), weight),
        )


def logits_of(decoder: Decoder, hidden: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """Logits (some places, vocabulary), in float32 or wider, of hidden states (places, hidden), chunk after chunk; to
    be called in a forward pass, with the weight that its `head` gets."""
    chunk = max(1, _CHUNK_ELEMENTS[hidden.device.type] // decoder.config.vocab_size)
    for part in hidden.split(chunk):
        logits = decoder.model.sharding.gather_vocabulary(functional.linear(part, weight))
        yield logits.to(torch.promote_types(logits.dtype, torch.float32))
