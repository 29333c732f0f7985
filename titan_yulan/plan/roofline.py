"""How long a step takes, by a roofline: the slower of arithmetic and memory traffic for each kind of work, plus what is
exchanged and not hidden behind it. No torch. docs/planning.md has the formulas and what they leave out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import PhaseSection, RunConfig
from titan_yulan.data.partition import micro_batches
from titan_yulan.monitor.flops import FORMULAS, flops_utilization
from titan_yulan.parallel.degrees import Degrees, resolve_degrees
from titan_yulan.plan.devices import Assumptions, Device
from titan_yulan.plan.memory import CHUNK_TOKENS, NUMBER_BYTES, Activations, Weights, count_weights, head_widths
from titan_yulan.plan.pattern import Pattern
from titan_yulan.plan.traffic import Exchange, exchanges

# Read and written in an update: weight, gradient and two moments read, weight and moments written; before it the
# gradient read for the norm, and read and written to be clipped.
_UPDATE_BYTES = 4 * (4 + 3 + 1 + 2)


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes read or written of the device's memory."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Category:
    """One kind of work in a step: how much of it, its seconds, and what they are spent on."""

    work: Work
    seconds: float
    bound: str  # "arithmetic" or "memory"


@dataclass(frozen=True)
class StepTime:
    """One step of a phase on one rank; ranks that are not the fullest wait for it.

    Attributes:
        categories: what is computed, recomputation included.
        exposed: seconds of each exchange that nothing hides, by its index in `exchanges`.
        idle: share of the computed rows that are no rows of the batch (it is in the seconds).
        tokens: of the global batch.
    """

    degrees: Degrees
    micro_batches: int
    categories: Mapping[str, Category]
    exchanges: tuple[Exchange, ...]
    exposed: tuple[float, ...]
    idle: float
    tokens: int

    @cached_property
    def computing(self) -> float:
        return sum(category.seconds for category in self.categories.values())

    @cached_property
    def seconds(self) -> float:
        return self.computing + sum(self.exposed)

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks, only tokens of the batch."""
        return self.tokens / self.seconds

    def mfu(self, formula: str, config: ModelConfig, sequence_length: int, device: Device) -> float:
        """Share of the device's peak by one of `monitor.flops.FORMULAS`."""
        rate = self.tokens_per_second / self.degrees.ranks
        return flops_utilization(FORMULAS[formula].per_token(config, sequence_length), rate, 1e12 * device.peak)


def step_time(config: RunConfig, phase: PhaseSection, world: int, device: Device, assumptions: Assumptions) -> StepTime:
    """The forecast of one step.

    Raises:
        UserError: the layout does not fit `world` ranks.
    """
    degrees = resolve_degrees(phase.parallel, world, config.model, phase.sequence_length)
    rows, micro = phase.batch.rows(phase.sequence_length), phase.batch.micro_batch_size
    count = micro_batches(rows, degrees.data, micro)
    rates = _Rates(device, assumptions, phase.parallel.compute_dtype)
    passes = _Passes(config, phase, degrees)
    forward, backward, head = passes.forward(), passes.backward(), passes.head()
    layers = config.model.num_hidden_layers
    works = {name: (forward[name] + backward[name]) * (count * layers) for name in forward}
    works["norm and elementwise"] += passes.embedding() * count
    works["head + loss"] = head * count
    works["optimizer"] = Work(0, _UPDATE_BYTES * (passes.weights.shard + passes.weights.replicated))
    found = tuple(exchanges(config, phase, degrees, count))
    forward_seconds, backward_seconds = (
        sum(rates.seconds(name, work) for name, work in one.items()) for one in (forward, backward)
    )
    return StepTime(
        degrees=degrees,
        micro_batches=count,
        categories={name: rates.category(name, work) for name, work in works.items()},
        exchanges=found,
        exposed=_exposed(found, phase, count, layers, forward_seconds, backward_seconds, device, assumptions),
        idle=1 - rows / (degrees.data * count * micro),
        tokens=rows * phase.sequence_length,
    )


def _exposed(
    found: tuple[Exchange, ...],
    phase: PhaseSection,
    count: int,
    layers: int,
    forward: float,
    backward: float,
    device: Device,
    assumptions: Assumptions,
) -> tuple[float, ...]:
    """Seconds of each exchange that are not hidden.

    A block's weights are gathered while the block before computes, and its gradients reduced while the next one's are
    made. The links are shared, so in backward the three add up, and what is too long is dealt out in proportion.
    """
    one = [exchange.seconds(device, assumptions) for exchange in found]
    names = [exchange.what for exchange in found]
    in_backward = {"gradients of blocks", "gradients of blocks, replicas"}
    if phase.parallel.reshard_after_forward:
        in_backward.add("weights of blocks")
    seconds = []
    for index, (exchange, call) in enumerate(zip(found, one, strict=True)):
        if exchange.waits:
            seconds.append(exchange.calls * call)
            continue
        hidden_forward = hidden_backward = 0.0
        if exchange.what == "weights of blocks":
            # the first block has nothing before it
            hidden_forward = count * (max(0.0, call - forward) * (layers - 1) + call)
        if exchange.what in in_backward:
            busy = sum(time for name, time in zip(names, one, strict=True) if name in in_backward)
            reductions = exchange.calls if exchange.what != "weights of blocks" else count * layers
            hidden_backward = reductions * max(0.0, busy - backward) * one[index] / busy
        seconds.append(hidden_forward + hidden_backward)
    return tuple(seconds)


class _Rates:
    """FLOP/s and bytes/s that are reached."""

    def __init__(self, device: Device, assumptions: Assumptions, compute_dtype: str) -> None:
        # float32 products run as TF32, at half the rate of bfloat16
        peak = 1e12 * device.peak * (1.0 if compute_dtype == "bfloat16" else 0.5)
        self._products, self._attention = peak * assumptions.products, peak * assumptions.attention
        self._bytes = 1e9 * device.bandwidth * assumptions.copies

    def seconds(self, name: str, work: Work) -> float:
        return self.category(name, work).seconds

    def category(self, name: str, work: Work) -> Category:
        arithmetic = work.flops / (self._attention if name == "attention" else self._products)
        memory = work.bytes / self._bytes
        return Category(work, max(arithmetic, memory), "arithmetic" if arithmetic > memory else "memory")


class _Passes:
    """The work of one rank in one micro-batch."""

    def __init__(self, config: RunConfig, phase: PhaseSection, degrees: Degrees) -> None:
        model = config.model
        self.weights: Weights = count_weights(model, degrees)
        self._hidden, self._inner = model.hidden_size, model.intermediate_size // degrees.tensor
        self._queries, self._keys = head_widths(model, degrees.tensor)
        self._size = NUMBER_BYTES[phase.parallel.compute_dtype]
        self._reduced = NUMBER_BYTES[phase.parallel.reduce_dtype]
        self._pattern = Pattern(config.objective)
        self._length, self._context, self._tensor = phase.sequence_length, degrees.context, degrees.tensor
        self._sharded = degrees.shard * degrees.context > 1
        self._gathered_twice = phase.parallel.reshard_after_forward
        section = phase.activation_checkpoint
        rows, length = phase.batch.micro_batch_size, phase.sequence_length
        shape = Activations(model, degrees, rows, length, self._size, self._pattern)
        self._tokens = shape.tokens
        self._again = shape.recomputed(section) / model.num_hidden_layers
        self._selective = section.mode == "selective"

    def forward(self) -> dict[str, Work]:
        """Of one block."""
        tokens, size, hidden, inner = self._tokens, self._size, self._hidden, self._inner
        queries, keys = self._queries, self._keys
        widths = 2 * queries + 2 * keys
        attention_flops = 4 * tokens * self._length * queries * (1.0 if self._pattern.whole_square else 0.5)
        moved = tokens * (2 * queries + 2 * keys * self._context)
        if self._pattern.masked:
            moved = tokens * (2 * queries + 2 * queries * self._context + self._length)
        projected = hidden * widths + tokens * (2 * hidden + widths)
        transformed = 3 * hidden * inner + tokens * (2 * hidden + 3 * inner)
        return {
            "attention": Work(attention_flops, size * moved),
            "projections": Work(2 * tokens * hidden * widths, size * projected),
            "MLP": Work(6 * tokens * hidden * inner, size * transformed),
            "norm and elementwise": self._elementwise() + self._packing(gathers=True),
        }

    def backward(self) -> dict[str, Work]:
        """Of one block, an average one: with the share of blocks that are computed again."""
        forward = self.forward()
        times = {"attention": 2.5, "projections": 2.0, "MLP": 2.0}
        works = {
            name: Work(work.flops * times[name], work.bytes * 2) + self._recomputed(work)
            for name, work in forward.items()
            if name in times
        }
        # the packed weights are made again, and their gradients scaled and summed
        unpacking = Work(0, 3 * self._size * self.weights.block)
        reducing = Work(0, (self._size + self._reduced) * self.weights.block if self._sharded else 0)
        elementwise = self._elementwise() * (2 + self._again) + self._packing(gathers=self._gathered_twice)
        works["norm and elementwise"] = elementwise + unpacking + reducing
        return works

    def _recomputed(self, work: Work) -> Work:
        return Work() if self._selective else work * self._again

    def _elementwise(self) -> Work:
        """Two norms with the additions before them, rotation, SwiGLU."""
        norms = 2 * 4 * self._hidden // self._tensor
        return Work(0, self._size * self._tokens * (norms + 2 * (self._queries + self._keys) + 3 * self._inner))

    def _packing(self, gathers: bool) -> Work:
        """Weights copied out of what was gathered, and copied again, scaled, into one matrix."""
        copies = 2 + (2 if gathers and self._sharded else 0)
        return Work(0, copies * self._size * self.weights.block)

    def head(self) -> Work:
        """The head's three products and its loss: logits written, read, overwritten by their gradients, read twice; the
        sum of the head's gradient read and written in float32 for each chunk."""
        numbers, chunks = self.weights.head, math.ceil(self._tokens / CHUNK_TOKENS)
        logits = self._tokens * numbers / self._hidden
        return Work(6 * self._tokens * numbers, 5 * self._size * logits + chunks * (8 + 2 * self._size) * numbers)

    def embedding(self) -> Work:
        """Rows looked up, the whole table's gradient written, and what `_packing` says of the root."""
        copied = (3 * self._size + self._reduced) * self.weights.root if self._sharded else 0
        return Work(0, self._size * (2 * self._tokens * self._hidden + self.weights.head) + copied)
