"""Which checkpoint of a run has the lowest validation loss.

Known from `validation.jsonl` and the checkpoints that are there, never from memory: so a restart knows it too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from titan_yulan.checkpoint.layout import best_checkpoint, find_checkpoints, point_at_best
from titan_yulan.config.sections import RunConfig
from titan_yulan.config.values import Tokens, amount
from titan_yulan.monitor.metrics import read_lines

if TYPE_CHECKING:  # the launcher imports no torch
    from titan_yulan.parallel.process import World


def mean_validation_loss(losses: dict[str, float], mix: dict[str, float | Tokens]) -> float:
    """The mean over the held-out parts of the sources of `mix`, weighted by their shares; over all that were measured,
    evenly, if the mix has none of them.

    Args:
        losses: of a line of `validation.jsonl`, by source.
    """
    mixed = {name: amount(mix[name]) for name in losses if name in mix and amount(mix[name])}
    weights = mixed or dict.fromkeys(losses, 1.0)
    return sum(losses[name] * weight for name, weight in weights.items()) / sum(weights.values())


def mean_validation_losses(folder: Path, config: RunConfig) -> dict[int, float]:
    """Step -> mean validation loss, of all validations of a run. Every one is weighted by the last phase's mix, so that
    they can be compared; one that is not finite is left out."""
    mix = config.phases[-1].mix
    return {
        line["step"]: mean_validation_loss(line["validation_loss"], mix)
        for line in read_lines(folder / "validation.jsonl")
        if line["validation_loss"] and None not in line["validation_loss"].values()
    }


def show_best(folder: Path, config: RunConfig) -> None:
    """Let the link `best` be what the files of a run folder say, if the configuration asks for one: a kill may have
    come between a checkpoint and its link."""
    checkpoints = folder / "checkpoints"
    if config.checkpoint.keep_best and (found := find_checkpoints(checkpoints)):
        losses = mean_validation_losses(folder, config)
        point_at_best(checkpoints, best_checkpoint(checkpoints, losses, found[-1].step))


class KeepBest:
    """What `[checkpoint] keep_best` asks of a run; exists on every rank, and the main one decides."""

    def __init__(self, config: RunConfig, folder: Path, world: World, first: int) -> None:
        """
        Args:
            folder: the run folder.
            first: the step that the run began with, whose validation is of no model that it trained.
        """
        self._config, self._folder, self._world, self._first = config, folder, world, first
        self._validated = -1

    def validated(self, step: int) -> None:
        """Note that the validation after `step` is done and recorded."""
        self._validated = step

    def due(self, step: int) -> bool:
        """Whether to save after `step` because it was validated just now with the lowest loss so far; asked on all
        ranks alike."""
        if not self._config.checkpoint.keep_best or self._validated != step:
            return False
        return bool(self._world.agree(int(self._world.is_main and self._is_best(step))))

    def _is_best(self, step: int) -> bool:
        losses = mean_validation_losses(self._folder, self._config)
        before = [loss for other, loss in losses.items() if self._first < other < step]
        return step in losses and all(losses[step] < loss for loss in before)

    def losses(self) -> dict[int, float] | None:
        """What `checkpoint.layout.prune` keeps the best one by; None: it keeps none for that."""
        if not self._config.checkpoint.keep_best or not self._world.is_main:
            return None
        return mean_validation_losses(self._folder, self._config)
