"""Configuration texts that several tests start from."""

from __future__ import annotations

import textwrap
from pathlib import Path

# Everything of a run but its phases.
BASE = """\
[run]
name = "test"

[model]
preset = "debug"

[tokenizer]
path = "tok.tiktoken"

[data.sources.code]
path = "data/code"

[data.sources.math]
path = "data/math"

[optimizer]
learning_rate = 1e-2

[batch]
global_batch_size = 8
micro_batch_size = 2
"""

PHASE = """
[phase]
name = "warmup"
length = "100 steps"
sequence_length = 128
mix = {code = 2, math = 1}
"""


def write(folder: Path, name: str, text: str) -> Path:
    """Write a file below `folder`, its text dedented."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def phase(name: str, more: str = "") -> str:
    """A [phase] table; `more` are its further keys."""
    return PHASE.replace('"warmup"', f'"{name}"') + more
