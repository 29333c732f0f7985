"""What a trace counted beside what the plan calculates, as text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from titan_yulan.config.sections import PhaseSection, RunConfig
from titan_yulan.parallel.degrees import resolve_degrees
from titan_yulan.plan.device_picture import Stage
from titan_yulan.plan.memory import GIB, NUMBER_BYTES, Memory, count_weights, phase_memory
from titan_yulan.plan.trace import Trace, trace
from titan_yulan.plan.traffic import Exchange, exchanges

# Not seen by a trace: inside the loss's operator, and after the last micro-batch.
_UNSEEN = ("statistics of the loss", "gradients of scalars and norms")


def trace_lines(config: RunConfig, stage: Stage, gpus: int) -> Iterator[str]:
    """The text for the phases of one stage."""
    section, memory = stage.phases[0].section, stage.memory
    begin = time.perf_counter()
    found = trace(config, section, gpus, dict(memory.moments)["head and loss"])
    seconds = time.perf_counter() - begin
    yield ""
    yield (
        f"{stage.name}, traced in {seconds:.0f} s: rank 0 of {gpus:,}, forward and backward of "
        f"{found.micro_batches} micro-batch(es), all {config.model.num_hidden_layers} blocks, not compiled"
    )
    yield from _rows("collective", ["calls", "GB"], _traffic(config, section, gpus, found))
    if not section.parallel.cpu_offload:  # a trace has no host beside its device
        kept = expected_kept(config, section, gpus)
        yield from _rows("memory", ["GiB"], _memory(memory, found, kept))


def expected_traffic(
    config: RunConfig, phase: PhaseSection, gpus: int, micro_batches: int
) -> dict[str, tuple[int, int]]:
    """Calls and received bytes of each collective that a trace sees, by the formulas."""
    degrees = resolve_degrees(phase.parallel, gpus, config.model, phase.sequence_length)
    kinds: dict[str, list[Exchange]] = {}
    for exchange in exchanges(config, phase, degrees, micro_batches):
        if exchange.what not in _UNSEEN:
            kinds.setdefault(exchange.collective, []).append(exchange)
    return {kind: (sum(one.calls for one in each), sum(one.received for one in each)) for kind, each in kinds.items()}


def expected_kept(config: RunConfig, phase: PhaseSection, gpus: int) -> int:
    """Bytes that live between forward and backward beyond the state: activations, what stays gathered, and the head's
    gradient, which the loss has made in float32."""
    degrees = resolve_degrees(phase.parallel, gpus, config.model, phase.sequence_length)
    weights, size = count_weights(config.model, degrees), NUMBER_BYTES[phase.parallel.compute_dtype]
    blocks = 0 if phase.parallel.reshard_after_forward else config.model.num_hidden_layers * weights.block
    kept = phase_memory(config, phase, gpus).activations
    return kept + size * (weights.root + blocks) + 4 * weights.head


def _traffic(
    config: RunConfig, phase: PhaseSection, gpus: int, found: Trace
) -> Iterator[tuple[str, list[str], list[str]]]:
    for kind, (calls, received) in expected_traffic(config, phase, gpus, found.micro_batches).items():
        traced = found.calls.get(kind, 0), found.received.get(kind, 0)
        yield kind, [f"{traced[0]:,}", f"{traced[1] / 1e9:.3f}"], [f"{calls:,}", f"{received / 1e9:.3f}"]


def _memory(memory: Memory, found: Trace, kept: int) -> Iterator[tuple[str, list[str], list[str]]]:
    pairs = (
        ("weights, gradients, moments", found.state, memory.state),
        ("kept for backward, with what stays gathered", found.kept, kept),
        (f"peak, in {found.peak_in}", found.peak, memory.total),
    )
    for name, traced, calculated in pairs:
        yield name, [f"{traced / GIB:.2f}"], [f"{calculated / GIB:.2f}"]


def _rows(head: str, columns: Sequence[str], rows: Iterator[tuple[str, list[str], list[str]]]) -> Iterator[str]:
    units = ", ".join(columns)
    cells = [(head, f"traced: {units}", f"calculated: {units}")]
    cells += [(name, "  ".join(traced), "  ".join(calculated)) for name, traced, calculated in rows]
    if len(cells) == 1:
        return
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    for name, traced, calculated in cells:
        yield f"    {name.ljust(widths[0])}  {traced.rjust(widths[1])}  {calculated.rjust(widths[2])}"
