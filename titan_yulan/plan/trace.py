"""One rank of thousands, on a laptop: the model's own code, laid out over as many ranks as asked for, runs forward and
backward once with tensors that have shapes and no numbers, in a process group that sends nothing. What is counted: the
collectives, and the bytes of all living tensors. The only file of the plan that imports torch.

The tensors claim to be a CPU's, because FSDP2 wants streams from a GPU. Where the model's code differs between the two,
a GPU's is taken (dropout, attention under context parallelism), or the formula's number (inside the loss, an operator
that a trace cannot look into).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titan_yulan.config.sections import PhaseSection, RunConfig
from titan_yulan.kernels.runtime import Kernels
from titan_yulan.model import Decoder
from titan_yulan.model.attend import AttentionContext
from titan_yulan.model.sharding import local
from titan_yulan.objective.build import build_objective
from titan_yulan.objective.forward import forward
from titan_yulan.objective.objective import Inputs
from titan_yulan.optimizer.adamw import build_adamw
from titan_yulan.parallel import context
from titan_yulan.parallel.activation_checkpoint import apply_activation_checkpoint
from titan_yulan.parallel.degrees import resolve_degrees
from titan_yulan.parallel.fsdp import ShardedDecoder, shard_decoder, synchronize_next_backward
from titan_yulan.parallel.mesh import Mesh, build_mesh
from titan_yulan.parallel.sharding import RankSharding
from titan_yulan.parallel.tensor import distribute_parameters
from titan_yulan.plan.pattern import Pattern

_LOSS = "titan_yulan::linear_cross_entropy_forward"


@dataclass(frozen=True)
class Trace:
    """What one rank did in `micro_batches` micro-batches.

    Attributes:
        calls, received: of each collective ("all-gather" ...): how many, and the bytes that a ring brings the rank.
        state: bytes of weights, gradients and Adam's moments before, as in any micro-batch of a step but its first.
        kept: bytes that live between forward and backward of the first one, beyond `state` and a drawn mask.
        peak: most bytes that ever lived, `state` and a drawn mask included.
        peak_in: the pass in which they did.
    """

    micro_batches: int
    calls: dict[str, int]
    received: dict[str, int]
    state: int
    kept: int
    peak: int
    peak_in: str


class LiveBytes(TorchDispatchMode):
    """Adds up the memory of all tensors that operators make, until they are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.label = self.peak_in = ""
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}

    def add(self, tensors: Iterable[Any]) -> None:
        """Watch the memory of these tensors, too."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._note(local(tensor).untyped_storage())

    def beside(self, size: int) -> None:
        """`size` bytes more live for a moment."""
        if self.live + size > self.peak:
            self.peak, self.peak_in = self.live + size, self.label

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.add(tree_leaves(made))
        return made

    def __enter__(self) -> LiveBytes:
        resize = torch.UntypedStorage.resize_

        def resize_and_note(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if id(storage) in self._sizes:
                self._note(storage)
            return result

        # FSDP2 frees gathered weights by making their memory 0 bytes long, which no operator shows
        self._patch = patch.object(torch.UntypedStorage, "resize_", resize_and_note)
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        self._patch.stop()

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._references:
            self._references[key] = weakref.ref(storage, lambda _, key=key: self._forget(key))
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.beside(0)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
        del self._references[key]


class _Collectives(TorchDispatchMode):
    """Counts collectives outside of operators."""

    def __init__(self, replicas: int) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self._replicas = replicas

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.name()
        if name == "c10d::_allgather_base_":
            self._note("all-gather", args[0].nbytes - args[1].nbytes)
        elif name == "c10d::_reduce_scatter_base_":
            self._note("reduce-scatter", args[1].nbytes - args[0].nbytes)
        elif name == "_c10d_functional::all_gather_into_tensor":
            self._note("all-gather", args[0].nbytes * (args[1] - 1))
        elif name == "_c10d_functional::reduce_scatter_tensor":
            self._note("reduce-scatter", args[0].nbytes * (args[2] - 1) // args[2])
        elif name == "c10d::allreduce_":
            self._note("all-reduce", 2 * sum(x.nbytes for x in args[0]) * (self._replicas - 1) // self._replicas)
        return made

    def _note(self, what: str, size: int) -> None:
        if size:
            self.calls[what] += 1
            self.received[what] += size


class _WatchLoss(TorchDispatchMode):
    """Tells how much memory the loss needs inside its operator."""

    def __init__(self, tell: Callable[[], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == _LOSS:
            self._tell()
        return func(*args, **(kwargs or {}))


def trace(config: RunConfig, phase: PhaseSection, world: int, loss_bytes: int) -> Trace:
    """Run the first of `world` ranks through one micro-batch of a phase, or two where gradients are reduced last.

    Args:
        loss_bytes: that the loss's operator needs inside.

    Raises:
        UserError: the layout does not fit `world` ranks.
    """
    degrees = resolve_degrees(phase.parallel, world, config.model, phase.sequence_length)
    # A GPU's kernels keep nothing of attention's dropout but their generator's state; a CPU's cannot drop at all.
    model = replace(config.model, attention_dropout=0.0)
    if model.kernels == "triton":  # which insists; the operators are the same
        model = replace(model, kernels="auto")
    config = replace(config, model=model)
    with _ranks(world):
        mesh = build_mesh(degrees, "cpu")
        with FakeTensorMode(allow_non_fake_inputs=True), _real_meshes(), _as_on_a_gpu():
            return _run(config, phase, mesh, loss_bytes)


def _run(config: RunConfig, phase: PhaseSection, mesh: Mesh, loss_bytes: int) -> Trace:
    decoder = _lay_out(config, phase, mesh)
    kernels = cast(Kernels, config.model.kernels)
    # any token may stand for the hidden ones
    mask_token = config.model.vocab_size - 1
    objective = build_objective(config, len(config.data.sources), kernels, mask_token, mesh.tensor_group)
    optimizer = build_adamw(decoder, config.model, config.optimizer)
    inputs = _inputs(config, phase)
    passes = (False, True) if phase.parallel.synchronize == "last" else (True,)
    memory, collectives = LiveBytes(), _Collectives(mesh.degrees.replicate)
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
        memory.add((parameter, parameter.grad))
    memory.add(tensor for state in optimizer.state.values() for tensor in state.values())
    state = memory.live
    memory.add((inputs.visible,))
    before, kept = memory.live, 0
    with memory, collectives, _WatchLoss(lambda: memory.beside(loss_bytes)):
        for last in passes:
            synchronize_next_backward(decoder, phase.parallel, last)
            memory.label = "forward"
            sums = forward(decoder, objective, inputs, inputs.denominator)
            kept = kept or memory.live - before
            memory.label = "backward"
            sums.objective.backward()
            del sums
    return Trace(
        micro_batches=len(passes),
        calls=dict(collectives.calls),
        received=dict(collectives.received),
        state=state,
        kept=kept,
        peak=memory.peak,
        peak_in=memory.peak_in,
    )


def _lay_out(config: RunConfig, phase: PhaseSection, mesh: Mesh) -> ShardedDecoder:
    """As `parallel.parallelize.build_decoder` does, without a compiler and without values."""
    decoder = Decoder(config.model)
    decoder.model.sharding = RankSharding(mesh, config.model.vocab_size)
    if mesh.tensor is not None:
        distribute_parameters(decoder, mesh.tensor)
    apply_activation_checkpoint(decoder.model.layers, phase.activation_checkpoint)
    return shard_decoder(decoder, phase.parallel, mesh)


def _inputs(config: RunConfig, phase: PhaseSection) -> Inputs:
    rows, length = phase.batch.micro_batch_size, phase.sequence_length
    ids = torch.zeros(rows, length, dtype=torch.int64)
    pattern = Pattern(config.objective)
    documents = config.objective.document_mask and not pattern.drawn  # a drawn mask has them in it
    return Inputs(
        input_ids=ids,
        targets=ids.clone(),
        weights=torch.ones(rows, length),
        counts=torch.ones(rows, length),
        position_ids=torch.zeros_like(ids) if pattern.own_positions else None,
        document_ids=torch.zeros_like(ids) if documents else None,
        visible=torch.ones(rows, 1, length, length, dtype=torch.bool) if pattern.drawn else None,
        source=torch.zeros(rows, dtype=torch.int64),
        denominator=torch.ones(()),
    )


@contextmanager
def _ranks(world: int) -> Iterator[None]:
    """This process as the first of `world` ranks of which there are no others."""
    if dist.is_initialized():
        raise RuntimeError("a process group is there already; a trace needs one of its own")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _real_meshes() -> Iterator[None]:
    """FSDP2 makes meshes of its own under tensor parallelism, and they look into their tensors of ranks."""
    make = DeviceMesh.__init__

    def make_real(mesh: DeviceMesh, *arguments: Any, **options: Any) -> None:
        with unset_fake_temporarily():
            make(mesh, *arguments, **options)

    with patch.object(DeviceMesh, "__init__", make_real):
        yield


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    def drop(context: AttentionContext, x: Tensor) -> Tensor:
        return torch.native_dropout(x, context.hidden_dropout, train=True)[0] if context.hidden_dropout else x

    with (
        patch.object(context, "_attend_prefix", context._flash_prefix),
        patch.object(AttentionContext, "drop", drop),
    ):
        yield
