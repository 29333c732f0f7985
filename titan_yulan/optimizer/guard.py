"""Judges a step from its loss and gradient norm, on the device, before the update that it would spoil.

The rule for spikes is that of OLMo-core's `SkipStepOptimizer` (described with OLMo 2, arXiv 2501.00656): a value is
compared with the mean and standard deviation of those before it. Here both numbers are judged, the window must be full,
and it is part of every checkpoint, so that a resumed run judges as the undisturbed one.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from titan_yulan.config.sections import RecoverySection

# Verdicts, from good to bad: the worst of all ranks counts.
FINE, SPIKE, NOT_FINITE = 0, 1, 2


class Guard:
    """The window of the newest accepted steps and the verdicts against it; nothing here waits for the device.

    A phase begins with an empty window: its mixture may move the mean further than any spike. A step is accepted if its
    update is made: also a spike that is only warned of, so that a new level is not complained about for ever.
    """

    def __init__(self, section: RecoverySection, device: torch.device) -> None:
        self._factor = section.spike_factor
        self._sees_spikes, self._keeps_spikes = section.spike != "off", section.spike == "warn"
        size = section.spike_window
        self._window = torch.zeros(2, size, device=device)  # losses and gradient norms, a ring
        self._accepted = torch.zeros((), dtype=torch.int64, device=device)
        self._slots = torch.arange(size, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """The very tensors of the state, the same on every rank, for saving and loading."""
        return {"window": self._window, "accepted": self._accepted}

    def forget(self) -> None:
        """Empty the window: what comes is of another mixture or length, and not to be compared with what was."""
        self._accepted.zero_()

    @torch.no_grad()
    def judge(self, loss: Tensor, gradient_norm: Tensor) -> tuple[Tensor, Tensor]:
        """Judge one step and, if it is accepted, take it into the window. All ranks of the process group call it.

        Args:
            loss, gradient_norm: () float32, of the whole global batch.

        Returns:
            the verdict, () float32: FINE; SPIKE, if a value is more than `spike_factor` standard deviations above the
                mean of a full window; NOT_FINITE. The worst verdict of all ranks, for a broken one may see another
                number than the rest.
            1.0 if the update is to be left out, else 0.0, () float32.
        """
        values = torch.stack([loss, gradient_norm])
        deviation, mean = torch.std_mean(self._window.double(), dim=1, correction=0)
        above = (values > mean + self._factor * deviation).any()
        spike = above & (self._accepted >= len(self._slots)) & self._sees_spikes
        verdict = torch.where(values.isfinite().all(), spike * SPIKE, NOT_FINITE).float()
        if dist.is_initialized():
            dist.all_reduce(verdict, op=dist.ReduceOp.MAX)
        refused = verdict > (SPIKE if self._keeps_spikes else FINE)
        here = (self._slots == self._accepted % len(self._slots)) & ~refused
        self._window.copy_(torch.where(here, values[:, None], self._window))
        self._accepted += ~refused
        return verdict, refused.float()
