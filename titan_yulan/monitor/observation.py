"""What a step of training measures when its statistics are due, at the three moments when there is something to see."""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor

from titan_yulan.config.sections import RunConfig
from titan_yulan.data.loader import Batch
from titan_yulan.monitor.hidden_states import observe
from titan_yulan.monitor.magnitudes import Magnitudes
from titan_yulan.monitor.statistics import Statistics, Summands, add_up, sampled_layers
from titan_yulan.objective.objective import Objective
from titan_yulan.optimizer.groups import assign, group_table
from titan_yulan.parallel.fsdp import ShardedDecoder, reshard


class Observation:
    """The statistics of one layout; a step calls the three methods in their order, all ranks together.

    They read the state of training and change no bit of it.
    """

    def __init__(
        self,
        config: RunConfig,
        decoder: ShardedDecoder,
        objective: Objective,
        optimizer: torch.optim.AdamW,
        device: torch.device,
    ) -> None:
        self._decoder, self._objective, self._device = decoder, objective, device
        self._rows = config.monitor.statistics_rows
        self._layers = sampled_layers(config.model.num_hidden_layers, config.monitor.statistics_layers)
        parameters = dict(decoder.named_parameters())
        groups = assign(parameters, group_table(config.model, config.optimizer))
        ranks = dist.get_world_size()
        self._magnitudes = Magnitudes(parameters, groups, self._layers, optimizer, device, ranks)
        self._parts: list[Summands] = []

    @torch.no_grad()
    def before_forward(self, batch: Batch) -> None:
        """Hidden states and attention over the first rows of a micro-batch on the device."""
        rows = Batch(**{f.name: getattr(batch, f.name)[: self._rows] for f in fields(batch)})
        inputs = self._objective.inputs(rows)
        self._parts = observe(self._decoder, inputs, rows.weight > 0, self._layers, self._objective.causal)
        reshard(self._decoder)

    def before_clipping(self) -> None:
        """Gradients, reduced over the ranks."""
        self._parts += self._magnitudes.gradients()

    def after_update(self, refused: Tensor) -> Statistics:
        """Weights and their updates, and the statistics of all three moments.

        Args:
            refused: () float32, 1 if the update was left out.
        """
        parts = self._parts + self._magnitudes.weights() + self._magnitudes.updates(refused)
        self._parts = []
        return add_up(parts, self._device)
