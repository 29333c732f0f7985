"""When the mix of a phase is adjusted, and to what: `[adaptive]` at work on a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from titan_yulan.config.adaptive import adaptive_groups
from titan_yulan.curriculum.adaptive import Adjustment, next_shares, read_history
from titan_yulan.curriculum.plan import PhasePlan, Plan
from titan_yulan.errors import UserError

_LARGEST_LOSS = 700.0  # of which the exponential still fits a double


class MixtureController:
    """Adjusts the mix of the phases of one plan; has no state but the plan's history."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def due(self, step: int) -> bool:
        """Whether perplexities are to be measured, and shares adjusted, after `step` steps."""
        phase = self._plan.phase_at(step)
        done = step - phase.start.step
        every = _steps_between(phase)
        if every is None or done % every or step == phase.end.step:
            return False
        return all(entry.row != done * phase.batch_rows for entry in phase.adjustments)

    def constant_until(self, step: int) -> int:
        """The step after which the mix may change for the next time; at the latest the end of the phase."""
        phase = self._plan.phase_at(step)
        every = _steps_between(phase)
        if every is None:
            return phase.end.step
        done = step - phase.start.step
        return min(phase.start.step + (done // every + 1) * every, phase.end.step)

    def adjust(self, step: int, losses: Mapping[str, float]) -> tuple[Adjustment, dict[str, float]]:
        """Change the plan's rows after `step` steps.

        Args:
            losses: source -> cross-entropy of its held-out part, nats per token.

        Returns:
            the adjustment, and the shares before it.

        Raises:
            UserError: a source of a group was not measured.
        """
        phase = self._plan.phase_at(step)
        row = (step - phase.start.step) * phase.batch_rows
        shares = phase.shares(row)
        for group, members in adaptive_groups(phase.section.adaptive, _read(shares)).items():
            if missing := [name for name in members if name not in losses]:
                raise UserError(
                    f"adaptive.groups.{group}: the held-out part of {missing[0]!r} is shorter than one row, so that "
                    "its perplexity is not known: hold out more of it, or take it out of the group"
                )
        perplexity = {name: math.exp(loss) if loss < _LARGEST_LOSS else math.inf for name, loss in losses.items()}
        new = shares
        if phase.adjustments:
            new = next_shares(phase.section.adaptive, shares, phase.adjustments[-1].perplexity, perplexity)
        adjustment = Adjustment(phase.name, step, row, {name: new[name] for name in _read(new)}, perplexity)
        self._plan.adapt([*self._plan.history, adjustment])
        return adjustment, shares


def _steps_between(phase: PhasePlan) -> int | None:
    """Steps between two adjustments; None: the phase adjusts nothing, or repeats what was logged."""
    every = phase.section.adaptive.every
    return None if every is None or phase.section.mixture_history else phase.steps_in(every)


def _read(shares: Mapping[str, float]) -> list[str]:
    return [name for name, share in shares.items() if share]


def logged_history(phase: PhasePlan) -> list[Adjustment]:
    """What the log that `[phase] mixture_history` names says of a phase.

    Raises:
        UserError: it cannot be read, or is of other sources.
    """
    log = Path(phase.section.mixture_history)
    history = read_history(log, phase.name)
    mixed = {name for name, weight in zip(phase.sources, phase.weights.tolist(), strict=True) if weight}
    for entry in history:
        if unknown := sorted(name for name, share in entry.shares.items() if share and name not in mixed):
            raise UserError(
                f"phase.mixture_history: {log} has a share of {unknown[0]!r}, which the mix of phase {phase.name!r} "
                "does not read; give it a weight there, or name the log of a run with these sources"
            )
    return history
