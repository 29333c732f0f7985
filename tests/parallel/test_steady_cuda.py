"""What only a GPU can tell: a steady step does nothing for which PyTorch makes the host wait for the device.

python -m pytest tests/parallel/test_steady_cuda.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.distributed.layout_cases import TAPES, Case, make_learner
from titan_yulan.parallel import process
from titan_yulan.parallel.process import World

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield process.start()
    process.leave()


@pytest.mark.parametrize("backend", ["", "inductor"], ids=["eager", "compiled"])
@pytest.mark.parametrize("document_mask", [False, True], ids=["rows", "documents"])
def test_a_steady_step_does_not_wait(world: World, backend: str, document_mask: bool) -> None:
    torch.compiler.reset()
    case = Case(1, "", model="grouped", document_mask=document_mask, backend=backend, compute_dtype="bfloat16")
    learner = make_learner(case, world)
    with learner.loader(0, TAPES) as loader:
        steps = [next(loader) for _ in range(6)]
    for number, batches in enumerate(steps[:3]):
        learner.train_step(number, batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = [learner.train_step(3 + number, batches) for number, batches in enumerate(steps[3:])]
        with pytest.raises(RuntimeError, match="synchronizing"):
            values[-1].totals.tolist()
    finally:
        torch.cuda.set_sync_debug_mode("default")
