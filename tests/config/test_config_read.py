"""Lines of keys, and `extends`."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.config_texts import BASE, PHASE, write
from titan_yulan.config import load
from titan_yulan.config.read import key_lines, toml_string
from titan_yulan.errors import UserError

DOCUMENT = '''\
# comment = 1
title = "a"

[data.sources."my.code"]  # [not.a.table]
path = """
x = 1
[y]
"""
text = [
  "a",  # b]
  "c",
]
"quoted key" = 1
a.b.c = 2
[phase]
lr = {shape = "linear", over = "1%"}
mix.code = 1
[[curriculum]]
name = "one"
[curriculum.mix]
code = 1
[[curriculum]]
name = "two"
[curriculum.mix]
code = 2
'''


def test_every_key_has_its_line() -> None:
    lines = key_lines(DOCUMENT)
    source = ("data", "sources", "my.code")
    assert lines[("title",)] == 2
    assert lines[source] == 4
    assert lines[(*source, "path")] == 5
    assert lines[(*source, "text")] == 9
    assert lines[(*source, "quoted key")] == 13
    assert lines[(*source, "a", "b", "c")] == 14
    assert lines[("phase", "lr")] == lines[("phase", "lr", "over")] == 16
    assert lines[("phase", "mix", "code")] == 17
    assert lines[("curriculum", 0)] == 18
    assert lines[("curriculum", 0, "mix", "code")] == 21
    assert lines[("curriculum", 1, "name")] == 23
    assert lines[("curriculum", 1, "mix", "code")] == 25
    assert ("x",) not in lines and ("y",) not in lines and ("comment",) not in lines


@given(st.text(st.characters(codec="utf-8")))
def test_any_text_is_written_as_a_toml_string(text: str) -> None:
    assert tomllib.loads(f"a = {toml_string(text)}")["a"] == text


@given(st.lists(st.sampled_from(["k{} = 1", "k{} = [\n 1,\n 2]", 'k{} = """\na = 1\n"""', "# k = 1", ""]), max_size=12))
def test_the_line_of_a_key_is_the_line_it_starts_on(blocks: list[str]) -> None:
    text = "\n".join(block.format(i) for i, block in enumerate(blocks))
    rows = text.split("\n")
    assert {k: rows[line - 1].split(" ")[0] for k, line in key_lines(text).items() if len(k) == 1} == {
        (key,): key for key in tomllib.loads(text)
    }


def test_syntax_error_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", "[run]\nname = \n")
    with pytest.raises(UserError, match=r"^a\.toml:2: not valid TOML: Invalid value \(column 8\)$"):
        load(path)
    path = write(tmp_path, "b.toml", "[run]\nname = 'a'\ntext = [1,\n\n")
    with pytest.raises(UserError, match=r"^b\.toml:\d: not valid TOML: "):
        load(path)


def test_extends_merges_tables_and_replaces_lists_and_mix(tmp_path: Path) -> None:
    write(tmp_path, "deep/base.toml", BASE + PHASE + "lr = {shape = 'linear', from = 0.5, to = 1, over = '1%'}")
    write(tmp_path, "deep/middle.toml", 'extends = "base.toml"\n[optimizer]\nbetas = [0.8, 0.9]\n[run]\nseed = 7')
    write(tmp_path, "other.toml", "[run]\nseed = 8")
    top = write(
        tmp_path,
        "top.toml",
        """
        extends = ["deep/middle.toml", "other.toml"]
        [optimizer]
        eps = 1e-6
        [phase]
        mix = {math = 1}
        lr = {shape = "constant"}
        """,
    )
    loaded = load(top)
    assert loaded.config.optimizer.learning_rate == 1e-2
    assert loaded.config.optimizer.betas == (0.8, 0.9)
    assert loaded.config.optimizer.eps == 1e-6
    assert loaded.config.run.seed == 8
    assert loaded.config.phases[0].mix == {"math": 1.0}
    assert loaded.config.phases[0].lr[0].from_ == 1.0  # nothing left of the segment below
    assert loaded.origins["optimizer.eps"] == "top.toml:4"
    assert loaded.origins["optimizer.betas"] == "deep/middle.toml:3"
    assert loaded.origins["run.seed"] == "other.toml:2"
    assert loaded.origins["run.name"] == "deep/base.toml:2"
    assert loaded.origins["model.hidden_size"] == "preset debug"
    assert loaded.origins["eval.rows"] == "default"


def test_sources_of_any_name_merge(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", BASE + '[data.sources.mix]\npath = "m"\norder = "keep"\n' + PHASE)
    top = write(tmp_path, "top.toml", 'extends = "base.toml"\n[data.sources.mix]\npath = "n"')
    assert load(top).config.data.sources["mix"].order == "keep"
    assert load(top, ["--data.sources.mix.path=o"]).config.data.sources["mix"].order == "keep"


def test_extends_of_a_missing_file_and_cycles(tmp_path: Path) -> None:
    top = write(tmp_path, "top.toml", '\nextends = "no.toml"')
    with pytest.raises(
        UserError, match=r"^top\.toml:2: extends: no\.toml does not exist \(/.*\); write its path relative"
    ):
        load(top)
    write(tmp_path, "a.toml", 'extends = "b.toml"')
    write(tmp_path, "b.toml", 'extends = ["a.toml"]')
    with pytest.raises(UserError, match=r"^b\.toml:1: extends\[0\]: cycle a\.toml -> b\.toml -> a\.toml; remove one"):
        load(tmp_path / "a.toml")
    with pytest.raises(UserError, match=r"^c\.toml:1: extends: found 3; allowed: a file name or a list of them$"):
        load(write(tmp_path, "c.toml", "extends = 3"))
    with pytest.raises(UserError, match=r"^gone\.toml does not exist \(/"):
        load(tmp_path / "gone.toml")
