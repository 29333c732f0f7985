"""What only a GPU runs: the flash kernel on a prefix, and training steps of one rank through NCCL.

python -m pytest tests/parallel/test_cuda.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.layout_cases import STEPS, TAPES, Case, make_learner
from titan_yulan.data.loader import Batch
from titan_yulan.learner import Learner
from titan_yulan.model.sharding import local
from titan_yulan.optimizer.guard import FINE, NOT_FINITE
from titan_yulan.parallel import process
from titan_yulan.parallel.compile import CompileWatch
from titan_yulan.parallel.context import _attend, _attend_prefix, _flash_prefix
from titan_yulan.parallel.process import World

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# bfloat16 beside float32 over ten steps: on CPUs 3e-4 and 1e-3 (tests/distributed/layouts.py); a wrong scale is 1e-2
LOSS_TOLERANCE, NORM_TOLERANCE = 2.0**-9, 2.0**-7
BATCH, HEADS, GROUPS, WIDTH = 2, 6, 2, 64
SCALE = 0.2  # not 1 / sqrt(WIDTH)
# (queries, keys): a first chunk, a later one, one key more than queries, lengths that fill no block of the kernel
LENGTHS = ((128, 128), (128, 512), (128, 129), (7, 1000), (1, 300), (257, 771))


def leaves(queries: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value; the same numbers, that bfloat16 holds, in every type."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(BATCH, heads, length, WIDTH) for heads, length in ((HEADS, queries), (GROUPS, keys), (GROUPS, keys))]
    made = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    return [x.to("cuda", dtype).requires_grad_() for x in made]


def masked(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same attention by a mask: the last query sees the last key."""
    shape = query.shape[2], key.shape[2]
    mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(shape[1] - shape[0])
    return _attend(query, key, value, mask, scale)


def results(attend: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients, in float64."""
    output = attend(*inputs, SCALE)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(8)).bfloat16().to(output)
    return [x.double() for x in (output.detach(), *torch.autograd.grad(output, inputs, upstream))]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
def test_the_flash_kernel_attends_to_a_prefix_as_a_mask_does(queries: int, keys: int, compiled: bool) -> None:
    torch._dynamo.reset()
    assert HEADS != GROUPS
    attend = torch.compile(_flash_prefix, fullgraph=True, dynamic=False) if compiled else _flash_prefix
    found = results(attend, leaves(queries, keys, torch.bfloat16))
    exact = results(masked, leaves(queries, keys, torch.float64))
    by_mask = results(masked, leaves(queries, keys, torch.bfloat16))
    for name, one, other, wanted in zip(("output", "query", "key", "value"), found, by_mask, exact, strict=True):
        size = wanted.abs().max()
        error, error_by_mask = (one - wanted).abs().max() / size, (other - wanted).abs().max() / size
        # a diagonal one place off is wrong by the size of the values themselves
        assert error <= max(2 * error_by_mask, 2**-7), (name, float(error), float(error_by_mask))


def test_the_flash_kernel_is_what_a_prefix_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr("titan_yulan.parallel.context._flash_prefix", lambda *arguments: taken.append(1))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        query, key, value = leaves(8, 24, dtype)
        _attend_prefix(query, key, value, SCALE)
    assert len(taken) == 2


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """This process alone, through NCCL."""
    started = process.start()
    yield started
    process.leave()


def trained(case: Case, world: World, spoiled: int = STEPS // 2) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step; before step `spoiled` (from 0), its rows come with a loss that is NaN, which
    must change nothing. From the third step on nothing is compiled."""
    torch.compiler.reset()
    learner = make_learner(case, world)
    watch, found = CompileWatch(), []
    with learner.loader(0, TAPES) as loader:
        for step, batches in enumerate(loader):
            if step == 2:
                watch.settle()
            if step == spoiled:
                assert_refused(learner, step, batches)
            values = learner.train_step(step, batches)
            assert int(values.verdict) == FINE
            found.append((float(values.totals[0] / values.denominator), float(values.gradient_norm)))
    assert watch.recompiled() == []
    return found


def assert_refused(learner: Learner, step: int, batches: list[Batch]) -> None:
    """A step with a loss that is NaN leaves every bit of weights, moments and window as it was."""
    tensors = {f"{part}.{name}": t for part, content in learner.tensors().items() for name, t in content.items()}
    before = {name: local(tensor.detach()).clone() for name, tensor in tensors.items()}
    loss = learner.objective.loss

    def spoil(*arguments: Any, **named: Any) -> Any:
        sums = loss(*arguments, **named)
        return sums._replace(objective=sums.objective * torch.nan)

    learner.objective.loss = spoil  # type: ignore[method-assign]
    assert int(learner.train_step(step, batches).verdict) == NOT_FINITE
    learner.objective.loss = loss  # type: ignore[method-assign]
    assert [name for name, tensor in tensors.items() if not torch.equal(local(tensor.detach()), before[name])] == []


LAYOUTS = {
    "FSDP2": Case(1, "FSDP2"),
    "grouped heads": Case(1, "FSDP2", model="grouped"),
    "documents": Case(1, "FSDP2", model="grouped", document_mask=True),
    "norms": Case(1, "FSDP2", model="norms", document_mask=True),
    "CPU offload": Case(1, "FSDP2", {"cpu_offload": True}),
    "selective": Case(1, "FSDP2", checkpointing="selective"),
    "inductor": Case(1, "FSDP2", backend="inductor"),
    "inductor, selective": Case(1, "FSDP2", model="grouped", checkpointing="selective", backend="inductor"),
    "inductor, CPU offload": Case(1, "FSDP2", {"cpu_offload": True}, backend="inductor"),
}


@pytest.fixture(scope="module")
def exact(world: World) -> dict[tuple[str, bool], list[tuple[float, float]]]:
    """Eager steps in float32 of every model."""
    models = dict.fromkeys((case.model, case.document_mask) for case in LAYOUTS.values())
    return {(model, mask): trained(Case(1, "", model=model, document_mask=mask), world) for model, mask in models}


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_rank_trains_in_bfloat16_as_in_float32(name: str, world: World, exact: dict) -> None:
    case = replace(LAYOUTS[name], compute_dtype="bfloat16")
    found, wanted = trained(case, world), exact[case.model, case.document_mask]
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found, wanted, strict=True):
        assert math.isclose(loss, wanted_loss, rel_tol=LOSS_TOLERANCE)
        assert math.isclose(norm, wanted_norm, rel_tol=NORM_TOLERANCE)


def test_inductor_trains_in_float32_as_eager_does(world: World, exact: dict) -> None:
    found = trained(LAYOUTS["inductor"], world)
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found, exact["plain", False], strict=True):
        assert math.isclose(loss, wanted_loss, rel_tol=1e-5) and math.isclose(norm, wanted_norm, rel_tol=5e-5)
    assert found[-1][0] < found[0][0] - 0.1
