"""What files of torch.save hold, read without torch and without running anything."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titan_yulan.checkpoint.pickled import PickledTensor, content_is_zero, read_pickle
from titan_yulan.errors import UserError

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tensors.pt"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pickled") / "tensors.pt"


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from(sorted(DTYPES, key=str)),
    transposed=st.booleans(),
    cut=st.booleans(),
)
def test_shape_type_and_content_are_those_of_the_tensor(
    shape: list[int], dtype: torch.dtype, transposed: bool, cut: bool, shared: Path
) -> None:
    whole = torch.zeros(*shape, dtype=dtype) if shape else torch.zeros((), dtype=dtype)
    tensor = whole.mT if transposed and len(shape) > 1 else whole
    tensor = tensor[1:] if cut and shape and tensor.shape[0] > 1 else tensor
    torch.save({"param": tensor, "cat_dim": 0}, shared)
    found = read_pickle(shared)["param"]
    assert (found.shape, found.dtype) == (tuple(tensor.shape), DTYPES[dtype])
    assert content_is_zero(shared, found)
    if tensor.numel():
        tensor[(-1,) * tensor.ndim] = 1
        torch.save({"param": tensor, "cat_dim": 0}, shared)
        assert not content_is_zero(shared, read_pickle(shared)["param"])


def test_state_dictionaries_parameters_and_numbers_are_read(file: Path) -> None:
    module = torch.nn.Linear(3, 2)
    for content in (module.state_dict(), {"weight": module.weight, "bias": module.bias}):
        torch.save(content, file)
        assert {name: tensor.shape for name, tensor in read_pickle(file).items()} == {"weight": (2, 3), "bias": (2,)}
    for number in (3, torch.tensor(3.0)):
        torch.save(number, file)
        assert read_pickle(file) == 3 or isinstance(read_pickle(file), PickledTensor)


class Touch:
    """A pickle of it calls os.system when it is read by pickle.load."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self._path}",)


def test_a_pickle_that_calls_something_is_refused_by_name_and_not_run(file: Path, tmp_path: Path) -> None:
    torch.save({"param": torch.ones(2), "more": Touch(tmp_path / "touched")}, file)
    with pytest.raises(UserError, match=r"tensors.pt is a pickle that calls (posix|nt)\.system; .* nothing in them is"):
        read_pickle(file)
    assert not (tmp_path / "touched").exists()
    with zipfile.ZipFile(file) as archive:  # the file does what the test says it would
        pickle.loads(pickle.dumps(Touch(tmp_path / "touched")))
        assert b"system" in archive.read("tensors/data.pkl")
    assert (tmp_path / "touched").exists()


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def old_format(file: Path) -> None:
    torch.save(torch.ones(3), file, _use_new_zipfile_serialization=False)


def no_archive(file: Path) -> None:
    file.write_bytes(b"")


def short_storage(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content[:-1] if name.endswith("data/0") else content)


def broken_pickle(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tensors/data.pkl", b"\x80\x02junk")


@pytest.mark.parametrize("spoil", [cut_off, old_format, no_archive, short_storage, broken_pickle])
def test_a_damaged_file_is_named(spoil: Callable[[Path], None], file: Path) -> None:
    torch.save(torch.ones(3), file)
    spoil(file)
    with pytest.raises(UserError, match=r"tensors.pt is damaged, incomplete, or not of PyTorch 1.6 or newer \("):
        read_pickle(file)
