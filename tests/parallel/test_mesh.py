"""Which ranks work together; degrees that do not fit; FSDP2 and HSDP with and without tensor-parallel parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.distributed.ranks import run_ranks
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import ParallelSection
from titan_yulan.errors import UserError
from titan_yulan.parallel.collectives import gather_sequence, reduce_scatter_sequence
from titan_yulan.parallel.degrees import Degrees, resolve_degrees
from titan_yulan.parallel.mesh import Mesh, build_mesh
from titan_yulan.parallel.process import World

YULAN = ModelConfig(
    vocab_size=99000,
    hidden_size=1920,
    intermediate_size=4800,
    num_hidden_layers=56,
    num_attention_heads=30,
    num_key_value_heads=6,
)


def section(**degrees: Any) -> ParallelSection:
    return ParallelSection(**degrees)


@pytest.mark.parametrize(
    ("degrees", "world", "length", "expected"),
    [
        ({}, 1, 4095, Degrees(1, 1, 1, 1)),
        ({}, 56, 4096, Degrees(1, 56, 1, 1)),
        ({"data_replicate": 8, "context": 4, "tensor": 2}, 1024, 28672, Degrees(8, 16, 4, 2)),
        ({"data_shard": 1, "data_replicate": 4}, 4, 4096, Degrees(4, 1, 1, 1)),
        ({"tensor": 6}, 6, 4096, Degrees(1, 1, 1, 6)),
    ],
)
def test_the_rest_of_the_ranks_are_shards(degrees: dict[str, int], world: int, length: int, expected: Degrees) -> None:
    assert resolve_degrees(section(**degrees), world, YULAN, length) == expected


@pytest.mark.parametrize(
    ("degrees", "world", "length", "message"),
    [
        ({"tensor": 4}, 8, 4096, r"parallel.tensor = 4 must divide .* = 30, .* = 6 .* = 4800; legal .*: 1, 2, 3, 6$"),
        ({"tensor": 3}, 8, 4096, r"parallel.tensor = 3 does not divide the 8 ranks; legal .*: 1, 2$"),
        ({"context": 3}, 8, 4098, r"parallel.context = 3 does not divide the 8 ranks .*: 1$"),
        ({"context": 4}, 8, 4092, r"parallel.context = 4 needs a phase.sequence_length that 8 divides.*: 1, 2$"),
        ({"tensor": 2, "data_replicate": 3}, 8, 4096, r"parallel.data_replicate = 3, .*: 1 x 4, 2 x 2, 4 x 1 \("),
        ({"data_shard": 2}, 8, 4096, r"parallel.data_shard = 2: 8 ranks .*: 1 x 8, 2 x 4, 4 x 2, 8 x 1 \("),
        ({"data_shard": 0}, 2, 4096, r"parallel.data_shard = 0: .* legal: 1 x 2, 2 x 1 \("),
        ({"data_shard": 16}, 8, 4096, r"parallel.data_shard = 16"),
    ],
)
def test_a_degree_that_does_not_fit_is_named_with_the_legal_ones(
    degrees: dict[str, int], world: int, length: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolve_degrees(section(**degrees), world, YULAN, length)


@given(
    replicate=st.integers(1, 5),
    shard=st.sampled_from((-1, 1, 2, 3, 4)),
    context=st.integers(1, 5),
    tensor=st.integers(1, 7),
    world=st.integers(1, 48),
    length=st.integers(1, 200),
)
def test_what_is_accepted_fits_and_what_fits_is_accepted(
    replicate: int, shard: int, context: int, tensor: int, world: int, length: int
) -> None:
    chosen = section(data_replicate=replicate, data_shard=shard, context=context, tensor=tensor)
    shards = [shard] if shard > 0 else range(1, world + 1)
    fits = (
        any(replicate * s * context * tensor == world for s in shards)
        and math.gcd(30, 6, 4800) % tensor == 0
        and (context == 1 or length % (2 * context) == 0)
    )
    try:
        degrees = resolve_degrees(chosen, world, YULAN, length)
    except UserError:
        assert not fits
    else:
        assert fits and degrees.ranks == world


def test_the_line_for_the_log() -> None:
    assert Degrees(2, 2, 1, 2).describe() == "mesh: 8 ranks = 2 replicas x 2 shards x 1 context x 2 tensor"
    assert Degrees(1, 1, 1, 1).describe() == "mesh: 1 rank = 1 replica x 1 shard x 1 context x 1 tensor"


def members(degrees: Degrees, rank: int, free: str) -> list[int]:
    """Ranks whose coordinates equal this rank's, except those named in `free`; by counting coordinates out."""
    names = ("replicate", "shard", "context", "tensor")
    coordinates = list(itertools.product(*(range(getattr(degrees, name)) for name in names)))
    fixed = [i for i, name in enumerate(names) if name not in free]
    return [r for r, other in enumerate(coordinates) if all(other[i] == coordinates[rank][i] for i in fixed)]


def groups(mesh: Mesh) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: None if group is None else sorted(dist.get_process_group_ranks(group))
        for name, group in (("tensor", mesh.tensor_group), ("context", mesh.context_group), ("loss", mesh.loss_group))
    }
    found["fsdp"] = mesh.fsdp.mesh.tolist()
    found["places"] = mesh.data_rank, mesh.context_rank, mesh.tensor_rank
    found["names"] = mesh.fsdp.mesh_dim_names, None if mesh.tensor is None else mesh.tensor.mesh_dim_names
    return found


def expected_groups(degrees: Degrees, rank: int) -> dict[str, Any]:
    replicated = degrees.replicate > 1
    fsdp: list[Any] = members(degrees, rank, "shard context")
    if replicated:
        fsdp = [members(degrees, other, "shard context") for other in members(degrees, rank, "replicate")]
    coordinates = list(itertools.product(range(degrees.data), range(degrees.context), range(degrees.tensor)))
    return {
        "tensor": members(degrees, rank, "tensor") if degrees.tensor > 1 else None,
        "context": members(degrees, rank, "context") if degrees.context > 1 else None,
        "loss": members(degrees, rank, "replicate shard context"),
        "fsdp": fsdp,
        "places": coordinates[rank],
        "names": (("replicate", "fsdp") if replicated else ("fsdp",), ("tensor",) if degrees.tensor > 1 else None),
    }


@pytest.fixture(params=[0, 6, 13, 15])
def fake_rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """One of 16 ranks, of which the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=16)
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "degrees", [Degrees(2, 2, 2, 2), Degrees(1, 4, 2, 2), Degrees(4, 1, 1, 4), Degrees(1, 1, 16, 1)]
)
def test_groups_of_many_ranks(fake_rank: int, degrees: Degrees) -> None:
    assert groups(build_mesh(degrees, "cpu")) == expected_groups(degrees, fake_rank)


# Four gloo ranks in every kind of layout.
LAYOUTS = (
    Degrees(1, 4, 1, 1),
    Degrees(1, 2, 1, 2),
    Degrees(2, 2, 1, 1),
    Degrees(4, 1, 1, 1),
    Degrees(2, 1, 1, 2),
    Degrees(1, 2, 2, 1),
    Degrees(2, 1, 2, 1),
    Degrees(1, 1, 2, 2),
    Degrees(1, 1, 1, 4),
)
ROWS, LENGTH, HIDDEN, INNER = 4, 8, 3, 8  # no number of ranks divides the hidden size


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((ROWS, LENGTH, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    first, second, third = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return first, second, third


class Layer(nn.Module):
    """A column- and a row-parallel product between a gathered and a reduce-scattered sequence."""

    def __init__(self, mesh: Mesh | None) -> None:
        super().__init__()
        self.group = None if mesh is None else mesh.tensor_group
        _, up, down = tensors()
        if mesh is not None and mesh.tensor is not None:
            up, down = distribute_tensor(up, mesh.tensor, [Shard(0)]), distribute_tensor(down, mesh.tensor, [Shard(1)])
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)

    def forward(self, x: Tensor) -> Tensor:
        up, down = (p.to_local() if isinstance(p, DTensor) else p for p in (self.up, self.down))
        inner = functional.linear(gather_sequence(x, self.group, 1), up).tanh()
        return reduce_scatter_sequence(functional.linear(inner, down), self.group, 1)


def own_part(mesh: Mesh) -> Tensor:
    part = tensors()[0].tensor_split(mesh.data_size)[mesh.data_rank]
    return part.chunk(mesh.context_size, 1)[mesh.context_rank].chunk(mesh.tensor_size, 1)[mesh.tensor_rank]


def train(mesh: Mesh) -> tuple[Tensor, list[Tensor]]:
    """The loss of the global batch and the whole gradients."""
    layer = Layer(mesh)
    sharded = fully_shard(layer, mesh=mesh.fsdp)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
    loss = layer(own_part(mesh)).square().sum()
    loss.backward()
    total = loss.detach()
    if mesh.tensor_group is not None:
        dist.all_reduce(total, group=mesh.tensor_group)
    dist.all_reduce(total, group=mesh.loss_group)
    gradients = [p.grad for p in layer.parameters()]
    return total, [gradient.full_tensor() for gradient in gradients if isinstance(gradient, DTensor)]


def train_everywhere(world: World) -> dict[Degrees, tuple[dict[str, Any], Tensor, list[Tensor]]]:
    found = {}
    for degrees in LAYOUTS:
        mesh = build_mesh(degrees, "cpu")
        found[degrees] = groups(mesh), *train(mesh)
        assert build_mesh(degrees, "cpu") is mesh, "a layout that comes back makes no new process groups"
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[Degrees, tuple[dict[str, Any], Tensor, list[Tensor]]]]:
    return run_ranks(train_everywhere, 4)


@pytest.mark.parametrize("degrees", LAYOUTS, ids=lambda degrees: degrees.describe().partition("= ")[2])
def test_every_layout_finds_the_loss_and_gradients_of_one_process(found: list[Any], degrees: Degrees) -> None:
    layer = Layer(None)
    loss = layer(tensors()[0]).square().sum()
    expected = torch.autograd.grad(loss, (layer.up, layer.down))
    for rank in range(4):
        who, total, gradients = found[rank][degrees]
        assert who == expected_groups(degrees, rank)
        torch.testing.assert_close(total, loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(gradients, list(expected), rtol=1e-12, atol=1e-13)
