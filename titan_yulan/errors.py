"""The two kinds of failure a user meets, each with its exit code."""

from __future__ import annotations

import errno
from pathlib import Path


class UserError(Exception):
    """A mistake in the configuration, the input files or the request. Exit code 2; nothing was started."""

    exit_code = 2


class RunError(UserError):
    """A failure while running (a full disk, a damaged file, a non-finite loss). Exit code 1; what was saved stays."""

    exit_code = 1


def explain_os_error(error: OSError, path: Path) -> str:
    """One sentence about a failed write below `path`, with the remedy where there is one."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk that holds {path} is full; free some space or lower checkpoint.keep, then start again"
    return f"{path} cannot be written: {error}"
