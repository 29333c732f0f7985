"""The forecast of a run's phases as text: a table, a picture of every mix, and what to look at twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from titan_yulan.curriculum.plan import Plan
from titan_yulan.plan.curriculum import PhaseForecast, RankShare, SourceUse, repetitions, totals

_BAR = 30  # characters of a bar that stands for the largest source of the run
_MOVERS = 4


def plan_lines(
    plan: Plan, forecasts: Sequence[PhaseForecast], gpus: int | None, warn_share: float, top: int
) -> Iterator[str]:
    """The text of `titan-yulan plan`.

    Args:
        gpus: ranks of the run, if it was asked for them.
        warn_share: distance of neighbouring mixes above which there is a warning.
        top: sources that are shown for each phase; 0: all.
    """
    first, end = plan.phases[0].start, plan.end
    ranks = f", {gpus} ranks" if gpus is not None else ""
    yield (
        f"{plan.config.run.name}: {len(forecasts)} phase(s), {end.step - first.step:,} steps, "
        f"{end.row - first.row:,} rows, {end.token - first.token:,} tokens{ranks}"
    )
    yield ""
    yield from _table(forecasts)
    largest = max(forecast.uses[0].share for forecast in forecasts)
    for forecast in forecasts:
        yield ""
        yield f"{_head(forecast)} from {_counted(forecast.uses)}"
        yield from _mix(forecast.uses, largest, top)
    if len(forecasts) > 1:
        together = totals(forecasts)
        yield ""
        yield f"all phases: {end.token - first.token:,} tokens from {_counted(together)}"
        yield from _mix(together, largest, top)
    warnings = [line for forecast in forecasts for line in _warnings(forecast, warn_share)]
    yield from ["", *warnings] if warnings else []


def _table(forecasts: Sequence[PhaseForecast]) -> Iterator[str]:
    """One line a phase, in columns as wide as they must be."""
    head = ["phase", "first step", "last step", "steps", "tokens", "tokens a step", "first lr", "last lr", "mix moved"]
    if forecasts[0].on_ranks is not None:
        head += ["rows a rank", "micro-batches", "idle"]
    rows = [head, *(_cells(forecast) for forecast in forecasts)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        rest = "  ".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        yield f"{row[0].ljust(widths[0])}  {rest}"


def _cells(forecast: PhaseForecast) -> list[str]:
    phase = forecast.phase
    cells = [
        phase.name,
        f"{phase.start.step + 1:,}",
        f"{phase.end.step:,}",
        f"{phase.steps:,}",
        amount(phase.end.token - phase.start.token),
        f"{phase.batch_rows:,} x {phase.sequence_length:,}",
        *(f"{rate:.4e}" for rate in forecast.learning_rates),
        f"{forecast.moved:.1%}",
    ]
    if forecast.on_ranks is not None:
        share, micro = forecast.on_ranks, phase.section.batch.micro_batch_size
        cells += [str(share.rows), f"{share.micro_batches} of {micro}", f"{share.idle:.1%}"]
    return cells


def _head(forecast: PhaseForecast) -> str:
    phase = forecast.phase
    every, log = phase.section.adaptive.every, phase.section.mixture_history
    changes = f"changes as in {log}" if log else f"follows perplexities every {every}" if every else ""
    note = f" (its mix {changes}; this is where it begins)" if changes else ""
    return f"{phase.name}{note}: {phase.rows_total:,} rows of {phase.sequence_length:,} tokens"


def _counted(uses: Sequence[SourceUse]) -> str:
    return f"{len(uses)} source(s), {sum(use.prepared is not None for use in uses)} of them prepared"


def _mix(uses: Sequence[SourceUse], largest: float, top: int) -> Iterator[str]:
    """One line a source, `top` of them: share, rows, tokens, epochs, and a bar."""
    shown = uses[: top or len(uses)]
    width = max(len(use.name) for use in shown)
    for use in shown:
        bar = "█" * max(1, round(_BAR * use.share / largest))
        yield f"  {use.name.ljust(width)}  {_numbers(use)}  {bar}"
    if others := uses[len(shown) :]:
        rows, tokens = sum(use.rows for use in others), sum(use.tokens for use in others)
        share = sum(use.share for use in others)
        yield f"  {f'{len(others)} more'.ljust(width)}  {share:6.2%} {rows:>12,} rows {amount(tokens):>8}"


def _numbers(use: SourceUse) -> str:
    epochs = f"epochs {use.epochs[0]:.2f} to {use.epochs[1]:.2f}" if use.epochs else "not prepared"
    return f"{use.share:6.2%} {use.rows:>12,} rows {amount(use.tokens):>8}  {epochs:<19}"


def _warnings(forecast: PhaseForecast, warn_share: float) -> Iterator[str]:
    phase = forecast.phase
    if forecast.moved > warn_share:
        movers = ", ".join(f"{name} {change:+.1%}" for name, change in forecast.moves[:_MOVERS])
        yield f"WARNING: {phase.name}: {forecast.moved:.1%} of the mix differs from the phase before: {movers}"
    if forecast.on_ranks is not None and phase.batch_rows < forecast.on_ranks.ranks:
        yield f"WARNING: {phase.name}: {_too_few(phase.batch_rows, forecast.on_ranks)}"
    yield from (f"WARNING: {line}" for line in repetitions(forecast.phase, forecast.uses))


def _too_few(rows: int, share: RankShare) -> str:
    return f"{rows} rows a step for {share.ranks} data-parallel ranks; a start would be refused: at most {rows} ranks"


def amount(tokens: int) -> str:
    """A number of tokens in four digits: 40.16B, 731.2M."""
    for size, suffix in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if tokens >= size:
            return f"{tokens / size:#.4g}".rstrip(".") + suffix
    return str(tokens)
