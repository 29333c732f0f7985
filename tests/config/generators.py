"""The scripts that write configurations, as modules."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def load_generator(folder: Path) -> ModuleType:
    """`generate.py` of a folder of configurations."""
    spec = importlib.util.spec_from_file_location(f"{folder.name}_generate", folder / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
