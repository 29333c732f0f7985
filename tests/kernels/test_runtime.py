"""Which implementation runs where, and what a machine without Triton can still do."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from titan_yulan.kernels import runtime
from titan_yulan.kernels.runtime import choose, use_operator

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[int, int]]:
    """A machine with one GPU, whose compute capability the test sets.

    A stand-in: the tests run without a GPU, and a machine that has one has one of one capability.
    """
    capabilities = {0: (9, 0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime, "_capability", lambda index: capabilities[index])
    monkeypatch.setattr(runtime, "HAVE_TRITON", True)
    runtime._warn_once.cache_clear()
    return capabilities


def test_a_supported_gpu_runs_triton_unless_told_otherwise(gpu: dict[int, tuple[int, int]]) -> None:
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 1)):
        gpu[0] = capability
        assert choose("auto", CUDA) and choose("triton", CUDA) and use_operator("auto", CUDA)
        assert not choose("reference", CUDA) and not use_operator("reference", CUDA)


def test_an_old_gpu_warns_once_and_runs_the_reference(gpu: dict[int, tuple[int, int]]) -> None:
    gpu[0] = (7, 5)
    with pytest.warns(UserWarning, match=r"cuda:0: compute capability 7\.5 is below 8\.0; the reference") as caught:
        assert not choose("auto", CUDA)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not choose("auto", CUDA) and not use_operator("auto", CUDA)
    with pytest.raises(ValueError, match=r'"triton" on cuda:0: compute capability 7\.5.*choose "auto" or "reference"'):
        choose("triton", CUDA)


def test_a_gpu_without_triton(gpu: dict[int, tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "HAVE_TRITON", False)
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert not use_operator("auto", CUDA)
    with pytest.raises(ValueError, match="Triton is not installed"):
        use_operator("triton", CUDA)


def test_the_cpu_runs_the_operators_but_not_triton() -> None:
    assert not choose("auto", CPU) and use_operator("auto", CPU) and not use_operator("reference", CPU)
    with pytest.raises(ValueError, match='"triton" on cpu: Triton'):
        choose("triton", CPU)
    assert not use_operator("auto", torch.device("mps"))


@pytest.mark.parametrize("kernels", ["", "Triton", "none"])
def test_another_word(kernels: str) -> None:
    with pytest.raises(ValueError, match='choose "auto", "triton" or "reference"'):
        choose(kernels, CPU)  # type: ignore[arg-type]


def test_without_triton_the_operations_still_import_and_run() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch
from titan_yulan.kernels import add_rms_norm, rms_norm, runtime, swiglu
assert not runtime.HAVE_TRITON
x = torch.randn(3, 8, requires_grad=True)
results = []
for kernels in ("auto", "reference"):
    y, s = add_rms_norm.add_rms_norm(x, x, torch.ones(8), 1e-6, kernels=kernels)
    z = swiglu.swiglu(rms_norm.rms_norm(y, torch.ones(8), 1e-6, kernels=kernels), s, kernels=kernels)
    results.append(torch.autograd.grad(z.sum(), x)[0])
torch.testing.assert_close(*results)
try:
    swiglu.swiglu(x, x, kernels="triton")
except ValueError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ))
    assert run.returncode == 0, run.stderr
    assert 'kernels = "triton" on cpu: Triton is not installed' in run.stdout
