"""How one key of a configuration section is declared: default, help and limits in one place.

A section is a frozen dataclass whose fields are made by `setting`. The reader (`config/bind.py`) checks every
value against the field's type and limits; the schema and `docs/configuration.md` are generated from the same
metadata, so a key is described exactly once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

REQUIRED: Any = dataclasses.MISSING


def setting(
    default: Any = REQUIRED,
    help: str = "",
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[Any] | None = None,
) -> Any:
    """Declare one key of a section.

    Args:
        default: value when the file does not set the key; `REQUIRED` (the default) makes the key mandatory.
        help: one sentence for the reader of the configuration, with the unit.
        ge, gt, le, lt: limits (inclusive / exclusive); for a list they hold for each element.
        choices: the allowed values.
    """
    metadata = {"help": help, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": tuple(choices) if choices else None}
    if isinstance(default, (dict, list)):
        make = type(default)
        return dataclasses.field(default_factory=lambda: make(default), metadata=metadata, kw_only=True)
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)
