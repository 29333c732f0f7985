"""The schema, the generated documentation, `find`, and what importing the configuration costs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.config.config_texts import BASE, PHASE, write
from titan_yulan.config import find, load, schema, to_toml
from titan_yulan.config.override import all_keys
from titan_yulan.config.reference import schema_text, with_reference
from titan_yulan.errors import UserError

ROOT = Path(__file__).parents[2]
REFRESH = "run: python -m titan_yulan.config.reference docs"

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,),
    "integer": (int,), "number": (int, float),
}  # fmt: skip


def accepts(rule: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """The part of JSON Schema that our schema uses."""
    if "$ref" in rule:
        rule = root["$defs"][rule["$ref"].rpartition("/")[2]]
    if "anyOf" in rule:
        return any(accepts(one, value, root) for one in rule["anyOf"])
    if "const" in rule or "enum" in rule:
        return value in rule.get("enum", [rule.get("const")])
    if not isinstance(value, TYPES[rule["type"]]) or (isinstance(value, bool) and rule["type"] != "boolean"):
        return False
    if isinstance(value, dict):
        known, other = rule.get("properties", {}), rule["additionalProperties"]
        return all(
            accepts(known[key], child, root) if key in known else other is not False and accepts(other, child, root)
            for key, child in value.items()
        )
    if isinstance(value, list):
        bounds = rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", len(value))
        return bounds and all(accepts(rule["items"], child, root) for child in value)
    if isinstance(value, str):
        return re.search(rule.get("pattern", ""), value) is not None
    return (
        value >= rule.get("minimum", value)
        and value <= rule.get("maximum", value)
        and value > rule.get("exclusiveMinimum", value - 1)
        and value < rule.get("exclusiveMaximum", value + 1)
    )


def test_the_committed_schema_is_current() -> None:
    assert (ROOT / "docs" / "config.schema.json").read_text(encoding="utf-8") == schema_text(), REFRESH
    assert json.loads(schema_text()) == schema()


def test_the_reference_in_the_documentation_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == with_reference(page), REFRESH


def test_the_documented_example_loads_and_fits_the_schema(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    example = page.split("## A first file")[1].split("```toml\n")[1].split("```")[0]
    config = load(write(tmp_path, "first.toml", example)).config
    assert accepts(schema(), tomllib.loads(example), schema())
    assert accepts(schema(), tomllib.loads(to_toml(config)), schema())


def test_the_documented_errors_are_what_is_said(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    example = page.split("## A first file")[1].split("```toml\n")[1].split("```")[0]
    wrong = example.replace("learning_rate =", "learning_rat =").replace("code = 2", "cod = 2")
    with pytest.raises(UserError) as raised:
        load(write(tmp_path, "first.toml", wrong), ["--parallel.compute_dtype=float16"])
    assert str(raised.value) == page.split("```text\n")[1].split("\n```")[0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("learning_rate = 1e-2", "learning_rate = 0"),
        ("learning_rate = 1e-2", "learning_rat = 1e-2"),
        ("learning_rate = 1e-2", "learning_rate = true"),
        ("micro_batch_size = 2", "micro_batch_size = 0"),
        ("[optimizer]", "[optimiser]"),
        ('preset = "debug"', 'preset = "big"'),
        ('length = "100 steps"', 'length = "100 stepps"'),
        ("math = 1}", "math = '1%'}"),
        ("math = 1}", "math = -1}"),
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(tmp_path: Path, old: str, new: str) -> None:
    right = BASE + PHASE
    wrong = right.replace(old, new)
    assert wrong != right
    assert accepts(schema(), tomllib.loads(right), schema())
    assert not accepts(schema(), tomllib.loads(wrong), schema())
    with pytest.raises(UserError):
        load(write(tmp_path, "wrong.toml", wrong))


def test_every_key_is_described() -> None:
    def walk(rule: dict[str, Any], path: str) -> None:
        for key, child in rule.get("properties", {}).items():
            if "$ref" not in child:
                assert child["description"].strip(), f"{path}.{key}"
                walk(child, f"{path}.{key}")

    walk(schema(), "")
    walk(schema()["$defs"]["phase"], "phase")


def test_flags_are_those_of_the_sections() -> None:
    keys = list(all_keys())
    assert len(keys) == len(set(keys))
    assert {"run.seed", "batch.micro_batch_size", "phase.batch.micro_batch_size", "model.preset", "phase.mix"} <= set(
        keys
    )
    assert not {"phases", "first_phase", "checkpoint.every.value", "batch"} & set(keys)


def test_find_uses_a_path_or_a_unique_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write(tmp_path, "train_configs/a/phase01.toml", "")
    write(tmp_path, "train_configs/a/phase02.toml", "")
    two = write(tmp_path, "train_configs/b/phase02.toml", "")
    monkeypatch.chdir(tmp_path / "train_configs" / "b")
    assert find("phase01.toml", tmp_path) == one
    assert find(str(two), tmp_path) == two
    assert find("phase02.toml", tmp_path).samefile(two)  # an existing path wins
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--config phase02\.toml: 2 files have this name: .*a/phase02.*, .*b/phase02"):
        find("phase02.toml", tmp_path)
    with pytest.raises(
        UserError, match=r"^--config phase0\.toml: no such file, .*; did you mean phase0[12]\.toml, phase0"
    ):
        find("phase0.toml", tmp_path)
    with pytest.raises(UserError, match=r"^--config zzz: no such file"):
        find("zzz", tmp_path)


def test_importing_the_configuration_imports_nothing_but_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "import titan_yulan.config\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names) - {'titan_yulan'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
