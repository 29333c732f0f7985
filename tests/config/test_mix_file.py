"""`mix = "FILE"`: recipes and tables of two columns, their place in the chain of files, and every mistake in them."""

from __future__ import annotations

import csv
import json
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.config_texts import BASE, write
from titan_yulan.config import load, to_toml
from titan_yulan.config.mix_file import source_name
from titan_yulan.errors import UserError

SOURCES = """
[data.sources.web-part_1]
path = "data/web"
"""
PHASE = """
[phase]
name = "one"
length = "10 steps"
sequence_length = 128
"""


def phase_file(folder: Path, mix: str, name: str = "phase.toml", extends: str = "") -> Path:
    return write(folder, name, (extends or BASE + SOURCES) + PHASE + f"mix = {mix}\n")


def recipe(folder: Path, amounts: dict[str, Any], name: str = "mix.json") -> Path:
    """A recipe with the keys that the published ones have."""
    content = {
        "Total Tokens(B)": 1.5,
        "Total Huggingface Datasets Directory": "somewhere",
        "Manual Selected Tokens(B)": dict.fromkeys(amounts, 9.0),
        "Number of Selected Tokens(B)": amounts,
        "Token ID Files Information": {path: [{"group index": 0, "token num(B)": 1.0}] for path in amounts},
    }
    return write(folder, name, json.dumps(content, indent=4))


def mix_of(path: Path, *overrides: str) -> dict[str, Any]:
    return load(path, overrides).config.phases[-1].mix


def test_a_recipe_gives_its_selected_billions_as_weights(tmp_path: Path) -> None:
    recipe(tmp_path / "mixes", {"web/part 1": 0.162982, "code": 1.2, "math": 0})
    mix = mix_of(phase_file(tmp_path, "'mixes/mix.json'"))
    assert mix == {"web-part_1": 0.162982, "code": 1.2, "math": 0.0}


@pytest.mark.parametrize("header", ["", "source,tokens_billion\n", "\nsource, B\n"])
def test_a_table_of_two_columns(tmp_path: Path, header: str) -> None:
    write(tmp_path, "mix.csv", header + "web/part 1,0.162982\n\n code , 1.2\n")
    assert mix_of(phase_file(tmp_path, "'mix.csv'")) == {"web-part_1": 0.162982, "code": 1.2}
    write(tmp_path, "mix.csv", header + '"web/part 1",300M\ncode,"1.2B"\n')
    amounts = mix_of(phase_file(tmp_path, "'mix.csv'"))
    assert {name: amount.value for name, amount in amounts.items()} == {
        "web-part_1": 300_000_000,
        "code": 1_200_000_000,
    }


@pytest.mark.parametrize("between", [" ", "\n", " \n\n"])
def test_quoted_pairs_of_weight_and_path(tmp_path: Path, between: str) -> None:
    write(tmp_path, "paths.txt", between.join(['"0.3  /web/part 1"', "'2 code'", '"1e-1 math"']) + "\n")
    assert mix_of(phase_file(tmp_path, "'paths.txt'")) == {"web-part_1": 0.3, "code": 2.0, "math": 0.1}


@given(st.lists(st.decimals(0, 100, places=6), min_size=2, max_size=2).filter(any))
def test_amounts_are_those_of_the_file_to_the_last_digit(amounts: list[Decimal]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, "mix.csv", f"code,{amounts[0]}\nmath,{amounts[1]}\n")
        mix = mix_of(phase_file(folder, "'mix.csv'"))
        inline = mix_of(phase_file(folder, f"{{ code = {amounts[0]:f}, math = {amounts[1]:f} }}", "inline.toml"))
    assert mix == inline == dict(zip(("code", "math"), map(float, amounts), strict=True))


def test_a_file_is_relative_to_the_one_that_names_it_and_mixes_replace_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "base/mix.csv", "code,1\n")
    phase_file(tmp_path / "base", "'mix.csv'", "base.toml")
    write(tmp_path, "own/mix.csv", "math,2\n")
    own = phase_file(tmp_path / "own", "'mix.csv'", extends='extends = "../base/base.toml"\n')
    inherited = write(tmp_path, "inherited.toml", 'extends = "base/base.toml"\n[phase]\nname = "two"\n')
    assert (mix_of(own), mix_of(inherited)) == ({"math": 2.0}, {"code": 1.0})
    monkeypatch.chdir(tmp_path / "base")
    assert mix_of(own, "--phase.mix=mix.csv") == {"code": 1.0}
    assert mix_of(own, "--phase.mix.code=3") == {"math": 2.0, "code": 3.0}
    assert mix_of(own, "--phase.mix=mix.csv", "--phase.mix.math=4") == {"code": 1.0, "math": 4.0}
    assert mix_of(own, "--phase.mix={code = 5}") == {"code": 5.0}


def test_phases_of_a_curriculum_and_of_a_chain(tmp_path: Path) -> None:
    write(tmp_path, "one.csv", "code,1\n")
    write(tmp_path, "two.csv", "math,2\n")
    phase_file(tmp_path, "'one.csv'", "one.toml")
    two = PHASE.replace('"one"', '"two"') + 'after = "one.toml"\nmix = "two.csv"\n'
    last = write(tmp_path, "two.toml", BASE + SOURCES + two)
    whole = write(tmp_path, "all.toml", 'curriculum = ["one.toml", "two.toml"]\n' + BASE + SOURCES)
    inline = "[[curriculum]]\nname = 'three'\nlength = '1 steps'\nsequence_length = 8\nmix = 'one.csv'\n"
    tables = write(tmp_path, "tables.toml", BASE + SOURCES + inline)
    for path in (last, whole):
        assert [phase.mix for phase in load(path).config.phases] == [{"code": 1.0}, {"math": 2.0}]
    assert mix_of(tables) == {"code": 1.0}


def test_the_resolved_configuration_does_not_need_the_file(tmp_path: Path) -> None:
    write(tmp_path, "mix.csv", "code,1\nmath,0.25\n")
    loaded = load(phase_file(tmp_path, "'mix.csv'"))
    assert loaded.origins["phase.one.mix.math"] == "mix.csv:2"
    (tmp_path / "mix.csv").unlink()
    again = load(write(tmp_path, "saved/config.toml", to_toml(loaded.config))).config
    assert again.phases[0].mix == {"code": 1.0, "math": 0.25}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "mix.csv",
            "code,1\nwebpart_1,2\n",
            r"^mix\.csv:2: phase\.mix\.webpart_1: no table .*did you mean 'web-part_1'",
        ),
        ("mix.csv", "code,1\nmath,x\n", r"^mix\.csv:2: phase\.mix\.math: .*'x'"),
        ("mix.csv", "code,1\nmath,-1\n", r"^mix\.csv:2: phase\.mix\.math: found -1"),
        ("mix.csv", "math,1\ncode,nan\n", r"^mix\.csv:2: phase\.mix\.code: found nan"),
        ("mix.csv", "code,inf\n", r"^mix\.csv:1: phase\.mix\.code: found inf"),  # no header
        ("mix.csv", "code,l.2\nmath,1\n", r"^mix\.csv:1: phase\.mix\.code: .*'l\.2'"),
        ("mix.csv", "code,\nmath,1\n", r"^mix\.csv:1: phase\.mix\.code: "),
        ("mix.csv", "a,b\nc,d\ncode,1", r"^mix\.csv:2: phase\.mix\.c: "),
        ("mix.csv", "code,1\n\nmath\n", r"^mix\.csv:3: 1 columns; needed: two"),
        ("mix.csv", "phase,source,tokens\n", r"^mix\.csv:1: 3 columns"),
        (
            "mix.csv",
            "web/part 1,1\nweb/part.1,1\n",
            r"^mix\.csv:2: 'web/part\.1' is the source 'web-part_1', as in mix\.csv:1",
        ),
        ("mix.csv", "", "nothing to read"),
        ("mix.json", '{"x": 1}', 'no data_mix recipe; it has no table "Number of Selected'),
        ("mix.json", '{\n"x": }', r"^mix\.json:2: not JSON"),
        (
            "mix.json",
            '{"Number of Selected Tokens(B)":\n{"code": 1,\n"mat": 2}}',
            r"^mix\.json:3: phase\.mix\.mat: .*'math'",
        ),
        (
            "mix.json",
            '{"Number of Selected Tokens(B)":\n{"code": 1,\n"math": [2]}}',
            r"^mix\.json:3: 'math' has the amount \[2\]",
        ),
        ("mix.json", '{"Number of Selected Tokens(B)": {"code": 1, "code": 2}}', "'code' stands twice"),
        ("mix.txt", "code,1", r"^mix\.txt:1: 'code,1' is no weight and path"),
        ("mix.txt", '"0.5 code"\n0.5 math', r"^mix\.txt:2: '0\.5' is no weight and path"),
        ("mix.txt", '"code 0.5"', r"^mix\.txt:1: 'code 0\.5' is no weight and path"),
        ("mix.txt", '"0.5 code', r"^mix\.txt:1: No closing quotation"),
        ("mix.txt", '"1 code" "1 mat"', r"^mix\.txt:1: phase\.mix\.mat: .*'math'"),
        ("mix.txt", '"1 code"\n"2 /code"', r"^mix\.txt:2: 'code' is the source 'code', as in mix\.txt:1"),
        ("mix.yaml", "code,1", r"^phase\.toml:\d+: phase\.mix: mix\.yaml is no mix"),
        ("other.csv", "code,1", r"^phase\.toml:\d+: phase\.mix: mix\.csv cannot be read: No such file"),
    ],
)
def test_mistakes_are_named_with_file_and_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    write(tmp_path, name, text)
    path = phase_file(tmp_path, f"'{'mix.csv' if name == 'other.csv' else name}'")
    with pytest.raises(UserError, match=message):
        load(path)
    if name == "other.csv":
        with pytest.raises(UserError, match=r"^--phase\.mix: .*no\.csv cannot be read"):
            load(path, ["--phase.mix=no.csv"])


def test_a_published_recipe_is_the_mix_of_its_phase_file(tmp_path: Path) -> None:
    folder = Path(__file__).resolve().parents[2] / "train_configs" / "yulan_mini"
    with (folder / "data_mix.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["phase"] == "25"]
    path = recipe(tmp_path, {row["source"]: float(row["tokens_billion"]) for row in rows})
    assert len(rows) > 50
    assert mix_of(folder / "phase25.toml", f"--phase.mix={path}") == mix_of(folder / "phase25.toml")


def test_names_of_sources() -> None:
    assert source_name("chinese-fineweb-edu_use/cci2_use") == "chinese-fineweb-edu_use-cci2_use"
    assert source_name("a b/c.d/日") == "a_b-c_d-_"
    assert source_name(source_name("x/y z")) == source_name("x/y z")
