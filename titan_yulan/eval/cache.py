"""Keys and values of what a decoder has read, kept so that the next token costs one row.

The decoder is written without such a memory: it asks a `Sharding` to attend (`eval.attending`), and this one remembers.
Rows of different lengths are padded at their beginnings; rotary positions count from a row's first real token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from titan_yulan.eval.attending import WholeRows
from titan_yulan.model.attend import attend


class KeyValueCache(WholeRows):
    """Attends to all that was read before, too. Tensor-parallel ranks keep the keys and values of their own heads."""

    def __init__(self, pads: Sequence[int], length: int, device: torch.device) -> None:
        """
        Args:
            pads: how many of the first places of each row are padding.
            length: most places of a row; the memory for them is taken at once.
        """
        self.pads = torch.tensor(pads, device=device)
        self.padded = any(pads)
        self.length = length
        self.read = 0
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._layer = 0
        self._mask: Tensor | None = None

    def begin(self, new: int) -> Tensor:
        """To be called before `new` places are read: their rotary positions (rows, new).

        Raises:
            ValueError: there is no room for them.
        """
        if self.read + new > self.length:
            raise ValueError(f"the cache has room for {self.length} places, not for {self.read} + {new}")
        first, self._layer, self.read = self.read, 0, self.read + new
        queries = torch.arange(first, self.read, device=self.pads.device)
        if self.padded or 0 < first < self.read - 1:
            keys = torch.arange(self.read, device=self.pads.device)
            seen = (keys <= queries[:, None]) & (keys >= self.pads[:, None, None])
            # padding sees itself, or its softmax would be over nothing
            self._mask = (seen | (keys == queries[:, None]))[:, None]
        else:
            self._mask = None
        return (queries - self.pads[:, None]).clamp(min=0)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        mask: Tensor | None,
        causal: bool,
        dropout: float = 0.0,
    ) -> Tensor:
        """`model.attend.attend`, causal, to all places that were read; who may see whom is known here."""
        if len(self._kept) == self._layer:
            shape = (key.shape[0], self.length, *key.shape[2:])
            self._kept.append((key.new_empty(shape), value.new_empty(shape)))
        keys, values = self._kept[self._layer]
        self._layer += 1
        first = self.read - key.shape[1]
        keys[:, first : self.read], values[:, first : self.read] = key, value
        keys, values = keys[:, : self.read], values[:, : self.read]
        if query.shape[1] > 1:
            return attend(query, keys, values, scale, self._mask, causal=first == 0)
        # The heads of a group are as many queries to the same keys, which then need not be repeated for each.
        grouped = query.unflatten(2, (keys.shape[2], -1))[:, 0].transpose(1, 2)
        attended = attend(grouped, keys, values, scale, self._mask, causal=False)
        return attended.transpose(1, 2).flatten(1, 2)[:, None]
