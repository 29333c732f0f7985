"""The command line: every verb has help, mistakes have their exit code and no traceback."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoint.making import make_checkpoint
from tests.data.making import BYTES, make, write_files
from titan_yulan import cli
from titan_yulan.data import hashing
from titan_yulan.data.partition import rank_rows
from titan_yulan.data.source import Source
from titan_yulan.data.tape import Tape
from titan_yulan.data.tokenizer import save_ranks

PHASE = """
name = "{name}"
length = "{steps} steps"
sequence_length = 16
mix = {{ code = 0.6, math = 0.4 }}
"""
BASE = """
[run]
name = "test"
output_dir = "{folder}/outputs"
[model]
preset = "debug"
[tokenizer]
path = "{folder}/tokenizer.tiktoken"
[data.sources.code]
path = "{folder}/code"
[data.sources.math]
path = "{folder}/math"
[batch]
global_batch_size = 5
micro_batch_size = 2
[optimizer]
learning_rate = 0.01
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two sources, a tokenizer of single bytes, and config.toml with two phases."""
    folder = tmp_path_factory.mktemp("cli")
    for name, files in (("code", 6), ("math", 3)):
        make(write_files(folder / f"{name}_text", files), folder / name)
    save_ranks(folder / "tokenizer.tiktoken", BYTES.ranks)
    phases = "".join("[[curriculum]]" + PHASE.format(name=name, steps=steps) for name, steps in (("a", 4), ("b", 2)))
    (folder / "config.toml").write_text(BASE.format(folder=folder) + phases)
    return folder


def verbs(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command, from the parser itself."""
    found = [path]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                found += verbs(child, (*path, name))
    return found


@pytest.mark.parametrize("verb", verbs(cli._parser()), ids=" ".join)
def test_every_verb_has_help(verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([*verb, "--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: titan-yulan") and "show this help message" in printed


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["data"],
        ["config", "check", "--fast"],
        ["checkpoint", "list"],
        ["data", "stream", "--rows", "many"],
        ["checkpoint", "list", "folder", "--run.name=x"],
        ["data", "inspect", "folder", "extra"],
    ],
    ids=" ".join,
)
def test_a_wrong_request_ends_with_2_and_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("usage: titan-yulan")


def test_an_unknown_argument_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["config", "check", "debug.toml", "--fast"])
    assert "arguments: --fast" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["checkpoint", "list", "folder", "--run.name=x"])
    assert "'--run.name=x': this verb reads no configuration" in capsys.readouterr().err


def test_config_check_of_a_correct_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "check", "debug.toml"]) == 0
    assert capsys.readouterr().out == "debug.toml: correct\n"


def test_config_check_names_every_mistake_without_a_traceback(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.toml"
    text = (prepared / "config.toml").read_text()
    wrong.write_text(text.replace("learning_rate = 0.01", 'learning_rat = 0.01\neps = "small"'))
    assert cli.main(["config", "check", str(wrong)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ERROR: ") and "Traceback" not in error
    assert "optimizer.learning_rat" in error and "optimizer.eps" in error and str(wrong.name) in error


def test_debug_shows_the_traceback_before_or_after_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--debug", "config", "check", "missing.toml"], ["config", "check", "missing.toml", "--debug"]):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert "Traceback" in error and "ERROR: --config missing.toml: no such file" in error


def test_config_show_takes_keys_and_says_where_they_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", "debug.toml", "--run.seed=5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["seed", "=", "5", "#", "--run.seed"] for line in lines)


def test_config_diff_ends_with_1_when_they_differ(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepared / "config.toml"
    second = tmp_path / "second.toml"
    second.write_text(first.read_text().replace("learning_rate = 0.01", "learning_rate = 0.02"))
    assert cli.main(["config", "diff", str(first), str(first)]) == 0
    assert capsys.readouterr().out == ""
    assert cli.main(["config", "diff", str(first), str(second)]) == 1
    assert capsys.readouterr().out == "optimizer.learning_rate: 0.01 -> 0.02\n"


def test_config_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "schema"]) == 0
    assert "properties" in json.loads(capsys.readouterr().out)


def stream(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    code = cli.main(["data", "stream", "--config", str(folder / "config.toml"), *arguments])
    output = capsys.readouterr()
    assert code == 0 and output.err == ""
    return [json.loads(line) for line in output.out.splitlines()]


def test_data_stream_describes_every_row(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = stream(prepared, capsys, "--rows", "20")
    assert [set(row) for row in rows] == [{"row", "position", "source", "tape", "fingerprint"}] * 20
    assert [row["row"] for row in rows] == [row["position"] for row in rows] == list(range(20))
    stands = {"code": 0, "math": 0}
    for row in rows:
        assert row["tape"] == stands[row["source"]]
        stands[row["source"]] += 16
        tape = Tape(Source.open(prepared / row["source"]), 42)
        tokens = np.asarray(tape.read(row["tape"], 17).tokens)
        assert row["fingerprint"] == f"{int(hashing.fingerprint(tokens[None])[0]):016x}"
    assert abs(stands["code"] / 16 - 12) <= 2


def test_data_stream_of_a_later_phase_goes_on_where_the_tapes_stand(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = stream(prepared, capsys, "--rows", "20"), stream(prepared, capsys, "--phase", "b", "--rows", "10")
    assert [row["position"] for row in second] == list(range(20, 30))
    for source in ("code", "math"):
        last = [row["tape"] for row in first if row["source"] == source][-1]
        assert next(row["tape"] for row in second if row["source"] == source) == last + 16


def test_data_stream_from_a_row_is_the_same_stream(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = stream(prepared, capsys, "--rows", "20")
    assert stream(prepared, capsys, "--from-row", "7", "--rows", "9") == whole[7:16]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_data_stream_of_the_ranks_is_the_whole(prepared: Path, capsys: pytest.CaptureFixture[str], world: int) -> None:
    whole = stream(prepared, capsys, "--rows", "20")
    ranks = [
        stream(prepared, capsys, "--rows", "20", "--world", str(world), "--rank", str(rank)) for rank in range(world)
    ]
    assert sorted((row for rank in ranks for row in rank), key=lambda row: row["row"]) == whole
    for rank, rows in enumerate(ranks):
        start, stop = rank_rows(5, rank, world)
        assert {row["row"] % 5 for row in rows} == set(range(start, stop))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--phase", "c"], "--phase c: the configuration has a, b"),
        (["--world", "2"], "--world W and --rank R go together"),
        (["--world", "2", "--rank", "2"], "--world W and --rank R go together"),
    ],
    ids=["phase", "no rank", "rank"],
)
def test_data_stream_refuses(
    prepared: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    config = str(prepared / "config.toml")
    assert cli.main(["data", "stream", "--config", config, "--rows", "2", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_data_show_prints_the_text_of_a_step(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(prepared / "config.toml")
    assert cli.main(["data", "show", "--config", config, "--step", "5", "--rows", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 5 of 6, phase 'b': rows 0-4 of the phase, learning rate 0.01")
    assert sum(line.startswith("--- row ") for line in lines) == 2
    assert "ocument" in "".join(lines[1:])
    assert cli.main(["data", "show", "--config", config, "--step", "7"]) == 2
    assert "the run has the steps 1 to 6" in capsys.readouterr().err


def test_checkpoint_verbs_and_their_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoints", 3)
    assert cli.main(["checkpoint", "list", str(tmp_path)]) == 0
    assert cli.main(["checkpoint", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(": sound\n")
    (checkpoint.path / "__0_0.distcp").unlink()
    assert cli.main(["checkpoint", "verify", str(tmp_path)]) == 1
    assert "is missing" in capsys.readouterr().out
    assert cli.main(["checkpoint", "list", str(tmp_path / "elsewhere")]) == 1
    assert "holds no complete checkpoint" in capsys.readouterr().err


def test_a_reader_that_closes_early_is_no_error(prepared: Path) -> None:
    """`titan-yulan data stream ... | head -1`."""
    root = Path(cli.__file__).resolve().parent.parent
    config = str(prepared / "config.toml")
    command = [sys.executable, "-m", "titan_yulan.cli", "data", "stream", "--config", config, "--rows", "20000"]
    command.append("--phase.length=40000 rows")
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root, env=environment
    )
    assert process.stdout is not None and process.stderr is not None
    assert json.loads(process.stdout.readline())["row"] == 0
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
