"""What the ranks exchange in one step of a phase: collectives, bytes, and how long they take. No torch.

Counted as `docs/parallelism.md` does ("What a step costs"). Times are those of rings, of which NCCL lays as many over a
group as there are network adapters: a group's members in one node share theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from titan_yulan.config.sections import PhaseSection, RunConfig
from titan_yulan.parallel.degrees import Degrees
from titan_yulan.plan.devices import Assumptions, Device
from titan_yulan.plan.memory import CHUNK_TOKENS, NUMBER_BYTES, Activations, Weights, count_weights, head_widths
from titan_yulan.plan.pattern import Pattern

# How many times a rank receives its share of the whole.
_PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}


@dataclass(frozen=True)
class Exchange:
    """One kind of collective in one step.

    Attributes:
        what: is exchanged.
        collective: all-gather, reduce-scatter or all-reduce.
        ranks: of a group.
        stride: distance of neighbours in a group, in ranks.
        calls: in a step.
        whole: bytes of one call's gathered, or still to be reduced, buffer.
        waits: whether nothing is computed meanwhile.
    """

    what: str
    collective: str
    ranks: int
    stride: int
    calls: int
    whole: int
    waits: bool

    @property
    def received(self) -> int:
        """Bytes that a rank receives in a step, through a ring."""
        return self.calls * _PASSES[self.collective] * self.whole * (self.ranks - 1) // self.ranks

    def nodes(self, device: Device) -> int:
        """Over how many nodes a group lies."""
        return math.ceil(self.ranks / self._in_node(device))

    def seconds(self, device: Device, assumptions: Assumptions) -> float:
        """Of one call: the slower of what goes through links inside nodes and through the network."""
        in_node, nodes = self._in_node(device), self.nodes(device)
        inside = (self.ranks - 1) / self.ranks / device.link if in_node > 1 else 0.0
        between = (nodes - 1) / nodes / (in_node * device.network)
        moved = self.whole * max(inside, between) / (1e9 * assumptions.links)
        return _PASSES[self.collective] * (moved + (self.ranks - 1) * assumptions.hop * 1e-6)

    def _in_node(self, device: Device) -> int:
        return max(1, min(self.ranks, device.node // self.stride))


def exchanges(
    config: RunConfig, phase: PhaseSection, degrees: Degrees, micro_batches: int, chunk_tokens: int = CHUNK_TOKENS
) -> list[Exchange]:
    """All exchanges of a step that are not of a few numbers, where there is more than one rank for them."""
    layout = phase.parallel
    size, reduced = NUMBER_BYTES[layout.compute_dtype], NUMBER_BYTES[layout.reduce_dtype]
    weights = count_weights(config.model, degrees)
    pattern = Pattern(config.objective)
    shape = Activations(config.model, degrees, phase.batch.micro_batch_size, phase.sequence_length, size, pattern)
    found = [
        *_of_weights(config, phase, degrees, weights, size, reduced, micro_batches),
        *_of_sequences(phase, shape, micro_batches),
        _scalars(degrees, weights),
    ]
    if degrees.tensor > 1:
        chunks = math.ceil(shape.tokens / chunk_tokens)
        statistics = 3 * 4 * degrees.tensor * shape.tokens // chunks
        calls = micro_batches * chunks
        found.append(Exchange("statistics of the loss", "all-gather", degrees.tensor, 1, calls, statistics, True))
    return [exchange for exchange in found if exchange.ranks > 1]


def _of_weights(
    config: RunConfig,
    phase: PhaseSection,
    degrees: Degrees,
    weights: Weights,
    size: int,
    reduced: int,
    micro_batches: int,
) -> Iterator[Exchange]:
    layout, layers = phase.parallel, config.model.num_hidden_layers
    ways, stride = degrees.shard * degrees.context, degrees.tensor
    gathers = micro_batches * layers * (2 if layout.reshard_after_forward else 1)
    reductions = 1 if layout.synchronize == "last" else micro_batches
    block, root = weights.block_shard * ways, weights.root_shard * ways
    yield Exchange("weights of blocks", "all-gather", ways, stride, gathers, size * block, False)
    yield Exchange("weights of embedding and head", "all-gather", ways, stride, micro_batches, size * root, True)
    yield Exchange("gradients of blocks", "reduce-scatter", ways, stride, reductions * layers, reduced * block, False)
    yield Exchange("gradients of embedding and head", "reduce-scatter", ways, stride, reductions, reduced * root, True)
    replicas, apart = degrees.replicate, ways * stride
    yield Exchange(
        "gradients of blocks, replicas",
        "all-reduce",
        replicas,
        apart,
        reductions * layers,
        reduced * weights.block_shard,
        False,
    )
    yield Exchange(
        "gradients of embedding and head, replicas",
        "all-reduce",
        replicas,
        apart,
        reductions,
        reduced * weights.root_shard,
        True,
    )


def _of_sequences(phase: PhaseSection, shape: Activations, micro_batches: int) -> Iterator[Exchange]:
    """Of tensor- and context-parallel ranks; what a recomputed block computes again, it exchanges again."""
    model, degrees, section = shape.model, shape.degrees, phase.activation_checkpoint
    layers, again = model.num_hidden_layers, shape.recomputed(section)
    # a block's end is computed again only to drop the same of it
    whole_again = 0 if section.mode == "selective" else again * (2 if model.hidden_dropout else 1)
    tensor, context = degrees.tensor, degrees.context
    own = phase.sequence_length // context
    stream = shape.size * shape.rows * (-(-own // tensor) * tensor) * model.hidden_size
    gathers = micro_batches * (4 * layers + 2 + 2 * again)
    scatters = micro_batches * (4 * layers + 2 + whole_again)
    yield Exchange("sequence", "all-gather", tensor, 1, gathers, stream, True)
    yield Exchange("sequence", "reduce-scatter", tensor, 1, scatters, stream, True)
    keys = 2 * head_widths(model, tensor)[1] * shape.size * shape.tokens * context
    yield Exchange("keys and values", "all-gather", context, tensor, micro_batches * (layers + again), keys, True)
    yield Exchange("their gradients", "reduce-scatter", context, tensor, micro_batches * layers, keys, True)


def _scalars(degrees: Degrees, weights: Weights) -> Exchange:
    return Exchange("gradients of scalars and norms", "all-reduce", degrees.ranks, 1, 1, 4 * weights.replicated, True)
