"""The lines that a run prints about its steps and measurements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_yulan.curriculum.adaptive import Adjustment
from titan_yulan.curriculum.plan import PhasePlan


def phase_line(phase: PhasePlan, step: int) -> str:
    """What a phase will do from `step` on."""
    known = phase.shares((step - phase.start.step) * phase.batch_rows)
    shares = ", ".join(f"{name} {share:.1%}" for name, share in known.items() if share)
    return (
        f"phase {phase.name!r}: steps {step + 1}-{phase.end.step}, {phase.batch_rows} rows of "
        f"{phase.sequence_length} tokens a step, mix {shares}"
    )


def step_line(line: Mapping[str, Any], end: int, rate: float, mfu: float | None, seconds_left: float) -> str:
    """One step.

    Args:
        line: of `metrics.jsonl`.
        end: the run's last step.
        rate: tokens per second, of all ranks.
        mfu: percent; None where the peak is not known.
    """
    return (
        f"step {line['step']}/{end}  loss {line['loss']:.4f}  gnorm {line['gradient_norm']:.3f}  "
        f"lr {line['learning_rate']:.3e}  {_short(rate)} tok/s  "
        f"mfu {'n/a' if mfu is None else f'{mfu:.1f}%'}  eta {_clock(seconds_left)}"
        + (f"  skipped: {line['skipped']}" if "skipped" in line else "")
    )


def validation_line(step: int, losses: Mapping[str, float], first: Mapping[str, float | None] | None) -> str:
    """Losses by source, with their change since those of the run's `first` validation; None: this is it."""
    parts = [
        f"{name} {loss:.4f}" + ("" if (before := (first or {}).get(name)) is None else f" ({loss - before:+.4f})")
        for name, loss in losses.items()
    ]
    return f"validation at step {step}: " + "  ".join(parts)


def mixture_line(adjustment: Adjustment, before: Mapping[str, float]) -> str:
    """A change of the mix; `before`: the shares until now."""
    parts = [
        f"{name} {before[name]:.2%} -> {share:.2%} (perplexity {adjustment.perplexity[name]:.3f})"
        for name, share in adjustment.shares.items()
        if name in adjustment.perplexity
    ]
    return f"mixture at step {adjustment.step}: " + ", ".join(parts)


def _short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
