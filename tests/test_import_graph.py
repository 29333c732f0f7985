"""Imports point one way, and what needs no heavy library does not import one. Read from the source files."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "titan_yulan"

# Each imports only those before it.
ORDER = (
    "errors",
    "config",
    "kernels",
    "data",
    "curriculum",
    "model",
    "objective",
    "optimizer",
    "parallel",
    "checkpoint",
    "monitor",
    "eval",
    "plan",
    "scaling",
    "inputs",
    "learner",
    "trainer",
    "train",
    "launch",
    "sweep",
    "verbs",
    "cli",
)


def imported(tree: ast.AST) -> set[str]:
    """Dotted names below the package that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides what it reaches"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == PACKAGE}


def parts() -> dict[str, list[Path]]:
    """The files of each part; the kernels' folder is reached through its link."""
    files: dict[str, list[Path]] = {}
    for folder in (ROOT / PACKAGE, *sorted(path for path in (ROOT / PACKAGE).iterdir() if path.is_dir())):
        if folder.name == "__pycache__":
            continue
        for path in sorted(folder.glob("*.py") if folder == ROOT / PACKAGE else folder.rglob("*.py")):
            if path != ROOT / PACKAGE / "__init__.py":
                files.setdefault(path.stem if folder == ROOT / PACKAGE else folder.name, []).append(path)
    return files


def test_every_part_has_its_place_in_the_order() -> None:
    assert set(parts()) == set(ORDER)


@pytest.mark.parametrize("part", ORDER)
def test_imports_point_one_way(part: str) -> None:
    allowed = set(ORDER[: ORDER.index(part) + 1])
    wrong = []
    for path in parts()[part]:
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            reached = name.split(".")[1]
            if reached not in allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_kernels_import_nothing_of_ours_but_each_other() -> None:
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        names = imported(ast.parse(path.read_text(encoding="utf-8")))
        assert {name for name in names if not name.startswith("titan_yulan.kernels")} == set(), path


def without_annotations(tree: ast.Module) -> ast.Module:
    """Without what is imported for the type checker alone."""
    body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    return ast.Module(body, tree.type_ignores)


def test_no_module_is_imported_around_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    modules = {}
    for files in parts().values():
        for path in files:
            dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            modules[dotted] = path
    for dotted, path in modules.items():
        names = imported(without_annotations(ast.parse(path.read_text(encoding="utf-8"))))
        reached = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[dotted] = {name for name in reached if name in modules and name != dotted}
    done: set[str] = set()
    while ready := {name for name, reached in graph.items() if name not in done and reached <= done}:
        done |= ready
    assert set(graph) - done == set()


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in memory after a statement in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(answer.stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import titan_yulan, titan_yulan.cli", {"torch", "numpy", "datasets", "tomli", "tiktoken", "tensorboard"}),
        ("import titan_yulan.config", {"torch", "numpy", "datasets"}),
        (
            "import titan_yulan.launch, titan_yulan.curriculum.plan, titan_yulan.checkpoint.resume",
            {"torch", "datasets", "torchdata", "tensorboard"},
        ),
        (
            "import titan_yulan, titan_yulan.model, titan_yulan.kernels.linear_cross_entropy",
            {"datasets", "torchdata", "tomli", "tensorboard", "transformers", "tiktoken"},
        ),
    ],
    ids=["command line", "config", "preflight", "model and kernels"],
)
def test_what_is_not_needed_is_not_imported(statement: str, absent: set[str]) -> None:
    loaded = loaded_by(statement)
    assert PACKAGE in loaded and loaded & absent == set()
