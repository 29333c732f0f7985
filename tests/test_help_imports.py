"""The help of the command line comes at once: it loads nothing that a verb needs only when it is called."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.test_import_graph import ROOT

HEAVY = {
    "torch",
    "numpy",
    "pyarrow",
    "datasets",
    "tomllib",
    "tomli",
    "tiktoken",
    "tensorboard",
    "matplotlib",
    "asyncio",
}
PRINT_HELP = """
import sys
from titan_yulan import cli
try:
    cli.main({words})
except SystemExit as end:
    assert end.code == 0
print("\\n" + " ".join(sorted({{name.split(".")[0] for name in sys.modules}})))
"""


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["data", "prepare", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", PRINT_HELP.format(words=words)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert answer.stdout.startswith("usage: ")
    loaded = set(answer.stdout.splitlines()[-1].split())
    assert "titan_yulan" in loaded and loaded & HEAVY == set()
