"""Next-token prediction, also in other orders than from left to right and with hidden tokens.

The two perturbations are those of the data-constrained study (arXiv 2507.15857), which asks what makes masked diffusion
learn from repeated data: is it the hidden context (`token_mask_share`), or predicting in many orders (`orders`)? Both
act in training alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from titan_yulan.data import hashing
from titan_yulan.data.loader import Batch
from titan_yulan.data.tensor_hashing import bits, uniform
from titan_yulan.objective.objective import Inputs, Objective, restarted_positions

_LEAST_MASK_RATIO = 1e-3  # of the keys that a chosen query does not see


class NextToken(Objective):
    """Predict token i + 1 from tokens 0..i."""

    causal = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """See `Objective`."""
        super().__init__(*arguments, **options)
        self._known_orders: dict[tuple[int, torch.device], Tensor] = {}

    def inputs(self, batch: Batch) -> Inputs:
        """Inputs and shifted targets of a micro-batch (the last token is only a target, the first only an input)."""
        inputs = self._ordered(batch) if self._section.orders > 1 else self.validation_inputs(batch)
        return self._hidden(inputs, batch.position) if self._section.token_mask_share else inputs

    def validation_inputs(self, batch: Batch, sample: int = 0) -> Inputs:
        """The same, from left to right, nothing hidden."""
        documents = batch.document_ids[:, :-1]
        weights = batch.loss_mask[:, 1:] * batch.weight[:, None]
        return Inputs(
            input_ids=batch.tokens[:, :-1],
            targets=batch.tokens[:, 1:],
            weights=weights,
            counts=weights,
            position_ids=restarted_positions(documents) if self._section.restart_positions else None,
            document_ids=documents if self._section.document_mask else None,
            visible=None,
            source=batch.source,
            denominator=weights.sum(),
        )

    def _ordered(self, batch: Batch) -> Inputs:
        """Every row in one of `orders` orders: token 0 stays, each token is predicted from those before it in the
        order, and rotary positions are those of the input tokens in the text."""
        length = batch.tokens.shape[1]
        orders = self._orders_on(length, batch.tokens.device)
        key = hashing.key(self._seed, "order of a row")
        chosen = (uniform(key, batch.position) * len(orders)).long()
        order = orders[chosen]  # (rows, S + 1)
        documents = batch.document_ids
        natural = torch.arange(length, device=order.device).expand_as(order)
        places = restarted_positions(documents) if self._section.restart_positions else natural
        permuted = replace(
            batch,
            tokens=batch.tokens.gather(1, order),
            document_ids=documents.gather(1, order),
            loss_mask=batch.loss_mask.gather(1, order),
        )
        plain = self.validation_inputs(permuted)
        return replace(plain, position_ids=places.gather(1, order)[:, :-1])

    def _orders_on(self, length: int, device: torch.device) -> Tensor:
        """Made and copied once: a copy from unpinned memory waits for the device."""
        if (length, device) not in self._known_orders:
            self._known_orders[length, device] = self._orders(length).to(device)
        return self._known_orders[length, device]

    def _orders(self, length: int) -> Tensor:
        """(orders, length) int64, a pure function of the seed: order 0 is the text's, token 0 is always first. The
        others are random, or `predefined`: places sorted by place + i * normal noise for i = 1, 2, ..."""
        places = torch.arange(1, length)
        rows = [torch.arange(length)]
        for i in range(1, self._section.orders):
            key = hashing.key(self._seed, "order", i)
            if self._section.order_kind == "predefined":
                draws = uniform(key, torch.stack([2 * places, 2 * places + 1]))
                # Box and Muller's normal numbers; 1 - u is never 0
                normal = torch.sqrt(-2 * torch.log(1 - draws[0])) * torch.cos(2 * torch.pi * draws[1])
                sort_by = places + i * normal
            else:
                sort_by = bits(key, places)
            rows.append(torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.argsort(sort_by, stable=True)]))
        return torch.stack(rows)

    def _hidden(self, inputs: Inputs, position: Tensor) -> Inputs:
        """Each query is chosen with probability `token_mask_share`; one that is chosen draws a ratio p and does not see
        each earlier key with probability p. It always sees itself."""
        rows, length = inputs.input_ids.shape
        places = torch.arange(length, device=position.device)
        key = [
            bits(hashing.key(self._seed, f"hidden keys: {what}"), position)[:, None] for what in ("query", "p", "key")
        ]
        chosen = uniform(key[0], places) < self._section.token_mask_share  # (rows, S)
        ratio = _LEAST_MASK_RATIO + (1 - _LEAST_MASK_RATIO) * uniform(key[1], places)
        pairs = (places[:, None] * length + places).flatten()
        hidden = (uniform(key[2], pairs).view(rows, length, length) < ratio[..., None]) & chosen[..., None]
        visible = places[:, None] >= places
        if inputs.document_ids is not None:
            visible = visible & (inputs.document_ids[:, :, None] == inputs.document_ids[:, None, :])
        visible = visible & ~hidden | (places[:, None] == places)
        return replace(inputs, visible=visible[:, None], document_ids=None)
