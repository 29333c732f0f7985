"""Which errors of loading are a checkpoint's own, and which are crashes that a restart may mend."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from titan_yulan.checkpoint.store import why_unreadable
from titan_yulan.errors import RunError


def of_ranks(**failures: BaseException) -> CheckpointException:
    return CheckpointException("read", {int(name[1:]): (error, None) for name, error in failures.items()})  # type: ignore[misc]


def system(number: int) -> OSError:
    return OSError(number, os.strerror(number))


CRASHES = [
    RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"),
    dist.DistBackendError("NCCL error"),
    dist.DistStoreError("timed out"),
    torch.OutOfMemoryError("CUDA out of memory"),
    system(errno.EIO),
    system(errno.ESTALE),
    system(errno.ECONNRESET),
    system(errno.ETIMEDOUT),
    MemoryError(),
]
UNREADABLE = [
    system(errno.ENOENT),
    system(errno.EACCES),
    ValueError("size mismatch"),
    RunError("step-1/.metadata is damaged"),
    pickle.UnpicklingError("invalid load key"),
    EOFError("ran out of input"),
]


@pytest.mark.parametrize("error", CRASHES, ids=repr)
def test_what_says_nothing_of_the_files_is_a_crash(error: Exception) -> None:
    assert why_unreadable(error) is None
    assert why_unreadable(of_ranks(r0=error, r1=error)) is None


@pytest.mark.parametrize("error", UNREADABLE, ids=repr)
def test_what_says_that_a_file_cannot_be_read_is_told(error: Exception) -> None:
    line = f"{type(error).__name__}: {error}"
    assert why_unreadable(error) == line
    assert why_unreadable(of_ranks(r0=CRASHES[0], r3=error)) == line  # the same on every rank, whoever failed


def test_torch_s_word_for_a_damaged_archive_is_known(tmp_path: Path) -> None:
    path = tmp_path / "tensor"
    torch.save(torch.zeros(1000), path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(RuntimeError) as caught:
        torch.load(path)
    assert "PytorchStreamReader" in (why_unreadable(of_ranks(r0=caught.value)) or "")
