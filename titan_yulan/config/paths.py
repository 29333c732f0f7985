"""Which paths the trainer can use: those of mounted file systems."""

from __future__ import annotations

import os
import re

# a Path folds the two slashes of an address into one
_ADDRESS = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/")


def refuse_address(path: str | os.PathLike[str]) -> str | None:
    """Why `path` cannot be used and what to do, if it is an address such as `s3://bucket/run`; else None.

    A checkpoint is committed by renaming and syncing files, which object stores do not have.
    """
    found = _ADDRESS.match(os.fspath(path))
    if found is None:
        return None
    return (
        f"{found[1]}:// addresses are not supported: a checkpoint needs a file system with atomic rename and fsync. "
        "Name a folder of a disk or of a mounted file system (Lustre, NFS, ...), and copy finished checkpoints from "
        "and to an object store with its own tool (aws s3 sync, gcloud storage rsync, hdfs dfs -get)"
    )
