"""The forecast of a run on devices as text: what `titan-yulan plan --device` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from titan_yulan.config.sections import RunConfig
from titan_yulan.curriculum.plan import PhasePlan, Plan
from titan_yulan.errors import UserError
from titan_yulan.plan.devices import Assumptions, Device
from titan_yulan.plan.memory import GIB, Memory, fills_ranks, phase_memory
from titan_yulan.plan.pattern import Pattern
from titan_yulan.plan.picture import amount
from titan_yulan.plan.roofline import StepTime, step_time
from titan_yulan.plan.suggest import suggest, usable_bytes

_DAY = 86_400
_FORMULAS = ("published", "palm", "causal")


@dataclass(frozen=True)
class Stage:
    """Neighbouring phases that lie on the devices alike."""

    phases: tuple[PhasePlan, ...]
    memory: Memory
    step: StepTime

    @property
    def name(self) -> str:
        first, last = self.phases[0].name, self.phases[-1].name
        return first if len(self.phases) == 1 else f"{first} to {last}"

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def seconds(self) -> float:
        return self.steps * self.step.seconds


def stages(plan: Plan, gpus: int, device: Device, assumptions: Assumptions, only: str = "") -> list[Stage]:
    """The phases of a run in order, or the one named `only`.

    Raises:
        UserError: there is no such phase, or a layout does not fit `gpus` ranks.
    """
    chosen = [phase for phase in plan.phases if only in ("", phase.name)]
    if not chosen:
        names = ", ".join(phase.name for phase in plan.phases)
        raise UserError(f"--phase {only}: there is no such phase; the phases are {names}")
    found: list[Stage] = []
    for phase in chosen:
        if found and _shape(found[-1].phases[0]) == _shape(phase):
            found[-1] = Stage((*found[-1].phases, phase), found[-1].memory, found[-1].step)
            continue
        memory = phase_memory(plan.config, phase.section, gpus)
        found.append(Stage((phase,), memory, step_time(plan.config, phase.section, gpus, device, assumptions)))
    return found


def _shape(phase: PhasePlan) -> tuple:
    section = phase.section
    return section.parallel, section.activation_checkpoint, section.batch, section.sequence_length


def device_lines(
    plan: Plan, found: Sequence[Stage], gpus: int, device: Device, assumptions: Assumptions
) -> Iterator[str]:
    """The text, with a suggestion for every stage that does not fit."""
    yield (
        f"{plan.config.run.name} on {gpus:,} x {device.name}: {device.memory:g} GiB, {device.peak:g} TFLOP/s, "
        f"{device.bandwidth:,.0f} GB/s; {device.link:g} GB/s inside a node of {device.node}, {device.network:g} GB/s "
        "between nodes"
    )
    yield f"  {device.source}"
    yield (
        f"  assumed: {assumptions.products:.0%} of the peak by matrix products, {assumptions.attention:.0%} by "
        f"attention; {assumptions.copies:.0%} of the memory's and {assumptions.links:.0%} of the links' bandwidth; "
        f"{assumptions.hop:g} us a step of a ring; {assumptions.usable:.0%} of the memory usable"
    )
    for stage in found:
        yield ""
        yield from _stage_lines(plan.config, stage, gpus, device, assumptions)
    if len(found) > 1:
        yield ""
        yield _sum(found, gpus)
    warnings = [line for stage in found for line in _warnings(plan.config, stage, gpus, device, assumptions)]
    yield from ["", *warnings] if warnings else []


def _stage_lines(config: RunConfig, stage: Stage, gpus: int, device: Device, assumptions: Assumptions) -> Iterator[str]:
    phase, step = stage.phases[0], stage.step
    section = phase.section
    recompute = section.activation_checkpoint
    how = f'"every", every = {recompute.every}' if recompute.mode == "every" else f'"{recompute.mode}"'
    yield (
        f"{stage.name}: {stage.steps:,} steps of {phase.batch_rows:,} x {phase.sequence_length:,} tokens; "
        f"{step.degrees.describe()}; {step.micro_batches} micro-batch(es) of {section.batch.micro_batch_size}; "
        f"activation checkpointing {how}"
    )
    yield from _memory_lines(stage.memory, device, assumptions)
    yield f"  step {step.seconds:.3f} s: computing {step.computing:.3f}, waiting for others {sum(step.exposed):.3f}"
    yield from _work_lines(step)
    yield from _exchange_lines(step, device, assumptions)
    if section.parallel.cpu_offload:
        yield "  not counted: the update on the host and the way there (parallel.cpu_offload)"
    yield from _speed_lines(config, stage, gpus, device)


def _memory_lines(memory: Memory, device: Device, assumptions: Assumptions) -> Iterator[str]:
    room = usable_bytes(device, assumptions)
    inputs = f"masks of a step {memory.inputs / GIB:.1f}, " if memory.inputs else ""
    yield (
        f"  memory {memory.total / GIB:.1f} GiB a rank, {room / GIB:.1f} usable: state {memory.state / GIB:.1f}, "
        f"gathered {memory.gathered / GIB:.1f}, activations {memory.activations / GIB:.1f}, "
        f"{inputs}working {memory.working / GIB:.1f}"
    )
    yield f"    activations: {_parts(memory.kinds)}"
    yield f"    working, the largest of: {_parts(memory.moments)}"
    host = [f"offloaded state {memory.host / GIB:.1f}"] if memory.host else []
    host += [f"copies for checkpoints {memory.staging / GIB:.1f}"] if memory.staging else []
    if host:
        node = (memory.host + memory.staging) * device.node / GIB
        yield f"    on the host, GiB a rank: {', '.join(host)}; {node:.0f} for a node of {device.node}"


def _parts(parts: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)


def _work_lines(step: StepTime) -> Iterator[str]:
    rows = [["computed by a rank", "TFLOP", "GB", "s", "share", "bound by"]]
    for name, one in step.categories.items():
        share = f"{one.seconds / step.seconds:.1%}"
        rows.append([name, *_figures(one.work.flops / 1e12, one.work.bytes / 1e9, one.seconds), share, one.bound])
    yield from _table(rows)


def _exchange_lines(step: StepTime, device: Device, assumptions: Assumptions) -> Iterator[str]:
    rows = [["received by a rank", "collective", "ranks", "nodes", "calls", "GB", "s", "waited for, s"]]
    for exchange, waited in zip(step.exchanges, step.exposed, strict=True):
        seconds = exchange.calls * exchange.seconds(device, assumptions)
        where = [f"{exchange.ranks:,}", f"{exchange.nodes(device):,}", f"{exchange.calls:,}"]
        figures = _figures(exchange.received / 1e9, seconds, waited)
        rows.append([exchange.what, exchange.collective, *where, *figures])
    if len(rows) > 1:
        yield from _table(rows, 2)


def _figures(*numbers: float) -> list[str]:
    return [f"{number:,.3f}" if number < 100 else f"{number:,.0f}" for number in numbers]


def _table(rows: Sequence[Sequence[str]], left: int = 1) -> Iterator[str]:
    """Rows in columns, the first `left` of them flush left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "    " + "  ".join(cells)


def _speed_lines(config: RunConfig, stage: Stage, gpus: int, device: Device) -> Iterator[str]:
    step, phase = stage.step, stage.phases[0]
    rate = step.tokens_per_second
    formulas = [name for name in _FORMULAS if name != "causal" or Pattern(config.objective).causal]
    shares = [f"{step.mfu(name, config.model, phase.sequence_length, device):.1%} {name}" for name in formulas]
    idle = f"; {step.idle:.1%} of the computed rows are no rows of the batch" if step.idle else ""
    yield f"  {rate:,.0f} tokens/s, {rate / gpus:,.0f} a GPU; MFU {', '.join(shares)}{idle}"
    tokens = sum(one.rows_total for one in stage.phases) * phase.sequence_length
    yield f"  {amount(tokens)} tokens in {_time(stage.seconds, gpus)}"


def _time(seconds: float, gpus: int) -> str:
    return f"{seconds / _DAY:.2f} days, {seconds * gpus / 3600:,.0f} GPU-hours"


def _sum(found: Sequence[Stage], gpus: int) -> str:
    seconds = sum(stage.seconds for stage in found)
    tokens = sum(phase.rows_total * phase.sequence_length for stage in found for phase in stage.phases)
    return (
        f"together: {amount(tokens)} tokens in {_time(seconds, gpus)}; {tokens / seconds:,.0f} tokens/s, "
        f"{tokens / seconds / gpus:,.0f} a GPU; without validation, checkpoints and failures"
    )


def _warnings(config: RunConfig, stage: Stage, gpus: int, device: Device, assumptions: Assumptions) -> Iterator[str]:
    section = stage.phases[0].section
    if not fills_ranks(section, gpus):
        why = f"{stage.phases[0].batch_rows:,} rows a step for {stage.step.degrees.data:,} data-parallel ranks"
    elif stage.memory.total > usable_bytes(device, assumptions):
        room = usable_bytes(device, assumptions) / GIB
        why = f"does not fit: {stage.memory.total / GIB:.1f} GiB a rank, {room:.1f} usable"
    else:
        return
    yield f"WARNING: {stage.name}: {why}"
    found = suggest(config, section, gpus, device, assumptions)
    if found is None:
        yield f"  no layout that was tried fits {device.name}: take a larger device, or parallel.cpu_offload = true"
        return
    need = phase_memory(config, found.phase, found.gpus).total / GIB
    yield f"  fits: --gpus {found.gpus} {found.options}".rstrip()
    yield f"  with {need:.1f} GiB a rank and {found.seconds:.3f} s a step, of what fits {found.gpus} GPUs the fastest"
