"""torch.distributed.checkpoint's files, with their hashes: taken while writing, compared before the index is read."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter

from titan_yulan.checkpoint.layout import INDEX, Checkpoint
from titan_yulan.errors import RunError


class _HashingFile(io.RawIOBase):
    """Passes writes on to a file and hashes them on the way. Only appends: a seek would make the hash wrong."""

    def __init__(self, file: io.IOBase, errors: list[OSError]) -> None:
        self._file, self._hash, self._size, self._errors = file, hashlib.sha256(), 0, errors

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._size += memoryview(data).nbytes
        try:
            return self._file.write(data)  # type: ignore[attr-defined]
        except OSError as error:
            self._errors.append(error)
            raise

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def summary(self) -> dict:
        return {"size": self._size, "sha256": self._hash.hexdigest()}


class _HashingFileSystem(FileSystem):
    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, dict] = {}
        self.errors: list[OSError] = []  # torch.save hides them behind an error of its own

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            hashing = _HashingFile(stream, self.errors)
            yield hashing
            self.files[Path(path).name] = hashing.summary()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        if (summary := self.files.pop(Path(path).name, None)) is not None:
            self.files[Path(new_path).name] = summary


class HashingWriter(FileSystemWriter):
    """Writes durably; `hashing.files` has size and hash of what this rank wrote, `hashing.errors` the disk's errors."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=True)
        self.hashing = _HashingFileSystem()
        self.fs = self.hashing


class _CheckedFileSystem(FileSystem):
    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self._checkpoint = checkpoint

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        name = Path(path).name
        if not name.endswith(INDEX):  # there may be one for each rank
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        content = Path(path).read_bytes()
        if self._checkpoint.manifest().get(name, {}).get("sha256") != hashlib.sha256(content).hexdigest():
            raise RunError(f"{path} is damaged (its SHA-256 differs from the manifest's)")
        yield io.BytesIO(content)


class CheckedReader(FileSystemReader):
    """Reads a checkpoint; its index, a pickle, only from bytes whose hash is the manifest's."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.path)
        self.fs = _CheckedFileSystem(checkpoint)
