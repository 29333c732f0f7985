"""Files that are whole or absent: atomic writing, locks between processes, hashes, and full disks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from titan_yulan.errors import RunError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that `path` never names a half-written one, not even after a power cut.

    Args:
        path: the file; its folder must exist.
        write: gets the open temporary file.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_array(file: BinaryIO, array: np.ndarray) -> None:
    """Write a contiguous array as `.npy`. (`numpy.save` reports a full disk without its error number.)"""
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.data)


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` (made if absent); the lock goes away with its process.

    Args:
        path: the lock file. It is left in place: removing it would let two processes lock two files of one name.
        waiting: gets one line when another process holds the lock and this one has to wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting(f"waiting for another process that holds {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn "no space left" into a message that says what to do.

    Raises:
        RunError: the disk or the quota is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise RunError(
                f"no space left while writing under {folder}: free some space and run the same command again; "
                "it goes on where it stopped"
            ) from error
        raise


def sync_files(folder: Path) -> None:
    """Have the files of a folder on the disk itself, so that a rename of the folder cannot outlive their content."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
