"""The nearest configuration that fits a device, for one that does not. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from titan_yulan.config.sections import ActivationCheckpointSection, ParallelSection, PhaseSection, RunConfig
from titan_yulan.errors import UserError
from titan_yulan.plan.devices import Assumptions, Device
from titan_yulan.plan.memory import GIB, MOST_RANKS, fills_ranks, phase_memory
from titan_yulan.plan.roofline import step_time

_NEARLY = 1.02  # steps that are at most this much slower than the fastest count as fast; fewer changes are then better


@dataclass(frozen=True)
class Suggestion:
    """A layout that fits.

    Attributes:
        gpus: that it needs.
        keys: what to set, by key, as on the command line without the dashes.
        phase: the phase with these settings.
        seconds: forecast for a step.
    """

    gpus: int
    keys: tuple[tuple[str, str], ...]
    phase: PhaseSection
    seconds: float

    @property
    def options(self) -> str:
        """For the command line."""
        return " ".join(f"--{key}={value}" for key, value in self.keys)


def usable_bytes(device: Device, assumptions: Assumptions) -> int:
    """Of a device's memory, for what `plan.memory` counts."""
    return int(device.memory * GIB * assumptions.usable)


def suggest(
    config: RunConfig, phase: PhaseSection, gpus: int, device: Device, assumptions: Assumptions
) -> Suggestion | None:
    """The layout with the fastest forecast step that fits `gpus` devices; of those nearly as fast the one with fewest
    changes. Where none does, the same for the next larger number for which one does; None if there is none.

    Tried: smaller micro-batches; every way to recompute; gathered weights freed, gradients reduced every time; more
    or fewer replicas; context; tensor.
    """
    for ranks in _numbers_of_gpus(gpus, device.node):
        fitting = list(_fitting(config, phase, ranks, device, assumptions))
        if fitting:
            fastest = min(found.seconds for found in fitting)
            fast = [found for found in fitting if found.seconds <= _NEARLY * fastest]
            return min(fast, key=lambda found: (len(found.keys), found.seconds))
    return None


def _numbers_of_gpus(gpus: int, node: int) -> Iterator[int]:
    """Those asked for, then doubled up to a node, then up to 8 nodes more, then doubled."""
    yield gpus
    ranks, step = gpus, 0
    while ranks < MOST_RANKS:
        if ranks < node:
            ranks = min(2 * ranks, node)
        elif step < 8:
            ranks, step = (ranks // node + 1) * node, step + 1
        else:
            ranks *= 2
        if ranks <= MOST_RANKS:
            yield ranks


def _fitting(
    config: RunConfig, phase: PhaseSection, ranks: int, device: Device, assumptions: Assumptions
) -> Iterator[Suggestion]:
    room = usable_bytes(device, assumptions)
    for candidate in _candidates(config, phase, ranks, device.node):
        try:
            need = phase_memory(config, candidate, ranks).total
        except UserError:
            continue
        if need <= room and fills_ranks(candidate, ranks):
            seconds = step_time(config, candidate, ranks, device, assumptions).seconds
            yield Suggestion(ranks, tuple(_changes(phase, candidate)), candidate, seconds)


def _candidates(config: RunConfig, phase: PhaseSection, ranks: int, node: int) -> Iterator[PhaseSection]:
    layers = config.model.num_hidden_layers
    for layout in _layouts(phase.parallel, ranks, node):
        for section in _recomputations(phase.activation_checkpoint, layers):
            for rows in _sizes(phase.batch.micro_batch_size):
                batch = replace(phase.batch, micro_batch_size=rows)
                yield replace(phase, batch=batch, parallel=layout, activation_checkpoint=section)


def _sizes(rows: int) -> list[int]:
    """Micro-batches of at most `rows` rows: it and its divisors, and 1 to 4."""
    return [size for size in range(rows, 0, -1) if rows % size == 0 or size <= 4]


def _recomputations(given: ActivationCheckpointSection, layers: int) -> list[ActivationCheckpointSection]:
    """As given, and all others."""
    every = [replace(given, mode="every", every=distance) for distance in (2, 3, 4, 7, 14) if distance < layers]
    others = [replace(given, mode=mode) for mode in ("none", "selective", "full")]
    return [given, *(section for section in [*others, *every] if section != given)]


def _layouts(given: ParallelSection, ranks: int, node: int) -> Iterator[ParallelSection]:
    """As given first. Tensor-parallel ranks stay in a node."""
    yield given
    tensors = sorted({given.tensor, *(ways for ways in (1, 2, 3, 4, 6, 8) if ways <= node)})
    contexts = sorted({given.context, 1, 2, 4, 8, 16})
    for tensor in tensors:
        for context in contexts:
            if ranks % (tensor * context):
                continue
            for replicas in _replicas(given.data_replicate, ranks // (tensor * context), node):
                layout = replace(given, tensor=tensor, context=context, data_replicate=replicas, data_shard=-1)
                yield from (layout, replace(layout, reshard_after_forward=True, synchronize="every"))


def _replicas(given: int, data: int, node: int) -> list[int]:
    """Numbers of replicas that divide what the other degrees leave: those up to the given one, and one for each, two
    or four nodes."""
    nodes = {data // (node * count) for count in (1, 2, 4) if data % (node * count) == 0}
    return sorted(nodes | {replicas for replicas in range(1, given + 1) if data % replicas == 0}, reverse=True)


def _changes(before: PhaseSection, after: PhaseSection) -> Iterator[tuple[str, str]]:
    """Keys that differ, as they are written on the command line."""
    sections = ("batch", ("micro_batch_size",)), ("activation_checkpoint", ("mode", "every"))
    layout = ("data_replicate", "data_shard", "context", "tensor", "reshard_after_forward", "synchronize")
    for section, names in (*sections, ("parallel", layout)):
        old, new = getattr(before, section), getattr(after, section)
        for name in names:
            value = getattr(new, name)
            if value != getattr(old, name):
                yield f"{section}.{name}", str(value).lower() if isinstance(value, bool) else str(value)
