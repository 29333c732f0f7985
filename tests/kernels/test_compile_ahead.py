"""Every kernel, compiled for two GPU generations without a GPU: no spills, wide accesses, the table of resources."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from titan_yulan.config.presets import PRESETS
from titan_yulan.kernels import compile_ahead
from titan_yulan.kernels.compile_ahead import SHARED_LIMIT, SIZES, Resources, golden_file

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

Table = dict[str, dict[str, dict[str, Any]]]


# A size for each target: the whole table takes minutes and is for `--write`.
COMPILED = {"sm_80": "llama3_8b", "sm_90": "yulan_mini_2b"}


def compiled(target: str) -> Table:
    """The table made now, in a process of its own: Triton's settings of this one must not reach it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment |= {key: os.environ[key] for key in ("TRITON_CACHE_DIR", "TRITON_HOME") if key in os.environ}
    options = ["--target", target, "--size", COMPILED[target], "--json"]
    command = [sys.executable, "-m", "titan_yulan.kernels.compile_ahead", *options]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=220)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def problems(table: Table, target: str) -> list[str]:
    """What no kernel may have, whatever the version of Triton."""
    found = []
    for size, rows in table.items():
        for name, row in rows.items():
            wrong = {
                "spilled registers": row["spills"] or row["stack_bytes"],
                "float64 instructions": row["float64"],
                "atomic instructions, which make the order of sums depend on chance": row["atomics"],
                f"bytes of shared memory, more than {SHARED_LIMIT[target]}": row["shared_bytes"]
                * (row["shared_bytes"] > SHARED_LIMIT[target]),
                "global accesses narrower than 16 bytes": row["bulk"] and row["narrow_accesses"],
                "lack of 16-byte loads": row["bulk"] and "16" not in row["loads"],
            }
            found += [f"{size} {name}: {what}: {int(count)}" for what, count in wrong.items() if count]
    return found


def differences(table: Table, golden: Table) -> list[str]:
    """Where two tables differ, a line each."""

    def flat(table: Table) -> dict[tuple[str, str, str], Any]:
        rows = ((size, name, row) for size, named in table.items() for name, row in named.items())
        return {(size, name, field): value for size, name, row in rows for field, value in row.items()}

    before, now = flat(golden), flat(table)
    keys = dict.fromkeys([*before, *now])
    return [f"{' '.join(k)}: {before.get(k)} -> {now.get(k)}" for k in keys if before.get(k) != now.get(k)]


@pytest.mark.parametrize("target", sorted(SHARED_LIMIT))
def test_resources(target: str) -> None:
    table = compiled(target)
    assert table.keys() == {COMPILED[target]} and all(rows for rows in table.values())
    assert problems(table, target) == []
    path = golden_file(target)
    if not path.exists():
        pytest.skip(f"the kernels are sound, but there is no table of this version to compare with: {path.name}")
    golden = json.loads(path.read_text(encoding="utf-8"))
    changed = differences(table, {size: golden[size] for size in table})
    update = f"python -m titan_yulan.kernels.compile_ahead --target {target} --write"
    advice = f"resources changed; if that is meant, run '{update}' and review the diff:"
    assert not changed, "\n".join([advice, *changed])


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
@pytest.mark.parametrize("target", sorted(SHARED_LIMIT))
def test_golden_tables_hold_no_problem(target: str, version: str) -> None:
    """Of the Triton versions of the oldest and the newest PyTorch that is supported; one of them is not installed."""
    path = compile_ahead.GOLDEN_FOLDER / f"triton-{version}.{target}.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    assert {size: set(rows) for size, rows in table.items()} == {
        size: {f"{o}.{v.name}" for o in compile_ahead.OPERATIONS for v in compile_ahead.variants_of(o, size)}
        for size in SIZES
    }, "a kernel was added, renamed or removed: docs/kernels.md says how to write the tables of both versions"
    assert problems(table, target) == []


def test_the_page_shows_the_golden_table() -> None:
    page = compile_ahead.PAGE.read_text(encoding="utf-8")
    table = json.loads((compile_ahead.GOLDEN_FOLDER / "triton-3.7.1.sm_90.json").read_text(encoding="utf-8"))
    assert compile_ahead.markdown(table["yulan_mini_2b"]) in page
    assert compile_ahead.page_with_table(page, table, "sm_90", "3.7.1") == page
    table["yulan_mini_2b"]["rms_norm.forward"]["registers"] = 12345
    assert "| 12345 |" in compile_ahead.page_with_table(page, table, "sm_90", "3.7.1")
    assert compile_ahead.page_with_table(page, table, "sm_90", "3.6.0") == page


def test_sizes_are_those_of_the_presets() -> None:
    for name, sizes in SIZES.items():
        preset = PRESETS[name]
        assert sizes == (preset.hidden_size, preset.intermediate_size, preset.vocab_size)


GOOD = Resources(
    registers=32,
    spills=0,
    stack_bytes=0,
    float64=0,
    atomics=0,
    loads={"16": 2, "4": 1},
    stores={"16": 1},
    scalar_accesses=1,
    shared_bytes=4096,
    warps=4,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"spills": 3}, "spilled registers: 3"),
        ({"stack_bytes": 8}, "spilled registers: 8"),
        ({"float64": 1}, "float64 instructions: 1"),
        ({"atomics": 1}, "atomic instructions"),
        ({"shared_bytes": 200_000}, "more than 166912: 200000"),
        ({"loads": {"16": 2, "2": 8}}, "narrower than 16 bytes: 7"),
        ({"stores": {"8": 2}}, "narrower than 16 bytes: 2"),
        ({"loads": {"4": 1}}, "lack of 16-byte loads: 1"),
    ],
)
def test_problems_are_seen(change: dict[str, Any], message: str | None) -> None:
    resources = dataclasses.replace(GOOD, **change)
    row = dataclasses.asdict(resources) | {"narrow_accesses": resources.narrow_accesses, "bulk": True}
    found = problems({"debug": {"kernel": row}}, "sm_80")
    assert (found == []) if message is None else (len(found) == 1 and message in found[0])


def test_differences_are_seen() -> None:
    old, new = ({"debug": {name: {"registers": n}}} for name, n in (("a", 1), ("a", 2)))
    assert differences(old, new) == ["debug a registers: 2 -> 1"]
    assert differences(old, old) == []
    assert differences(old, {"debug": {}}) == ["debug a registers: None -> 1"]
