"""The two kinds of failure a user meets, each with its exit code."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the configuration, the input files or the request. Exit code 2; nothing was started."""

    exit_code = 2


class RunError(UserError):
    """A failure while running (a full disk, a damaged file, a non-finite loss). Exit code 1; what was saved stays."""

    exit_code = 1
