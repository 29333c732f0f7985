"""Mistakes of a user: one clear message, the documented exit code, no traceback, before any worker is started."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.end_to_end import harness
from tests.end_to_end.harness import train


@pytest.fixture
def data(reference, small_data, tmp_path) -> Path:
    """A copy of the prepared data that a test may damage (`reference` has prepared it)."""
    return shutil.copytree(small_data, tmp_path / "data")


@pytest.fixture
def refused(data, tmp_path):
    """Start and expect a refusal; gives the output."""
    config = harness.write_small_config(tmp_path, data, tmp_path / "outputs")

    def refused(*arguments: str, code: int = 2, processes: int = 2, file: str | Path = config) -> str:
        result = train(file, processes, *arguments)
        assert result.code == code, result.output
        assert "Traceback" not in result.output
        assert "dry run" not in result.output
        return result.output

    return refused


def test_missing_file(refused):
    output = refused(file="phase_that_is_not_there.toml")
    assert "phase_that_is_not_there.toml" in output


def test_six_mistakes_give_six_errors(refused, tmp_path, data):
    path = tmp_path / "wrong.toml"
    path.write_text(
        'extends = "small.toml"\n'
        "[optimizer]\n"
        "learning_rat = 0.1\n"  # 1 unknown key
        "eps = -1.0\n"  # 2 out of range
        'max_gradient_norm = "one"\n'  # 3 wrong type
        "[checkpoint]\n"
        'every = "7 stepps"\n'  # 4 no duration
        "[parallel]\n"
        'compute_dtype = "float12"\n'  # 5 not a choice
        "[eval]\n"
        "rows = 0\n"  # 6 out of range
    )
    lines = [line for line in refused(file=path).splitlines() if "wrong.toml:" in line]
    assert len(lines) == 6
    assert "wrong.toml:3: optimizer.learning_rat" in lines[0] and "learning_rate" in lines[0]


def test_missing_source(refused, data):
    shutil.rmtree(data / "code" / "train")
    (data / "code.txt").unlink()
    assert "code.txt" in refused()


def test_missing_source_that_cannot_be_made(refused, tmp_path):
    output = refused(f"--data.sources.code.path={tmp_path / 'nowhere'}", "--data.sources.code.text=[]")
    assert "1 of 3 sources are not prepared and have no text to be made from" in output
    assert "titan-yulan data prepare --name code --tokenizer " in output
    assert f" --output {tmp_path / 'nowhere'} " in output


def test_tokenizer_that_does_not_match(refused, data):
    ranks = (data / "tokenizer.tiktoken").read_text().splitlines()
    (data / "tokenizer.tiktoken").write_text("\n".join(ranks[:-24]) + "\n")
    output = refused("--tokenizer.train_vocab_size=0")
    assert "tokenizer" in output and "data.sources." in output


def test_truncated_shard(refused, data):
    shard = next((data / "math" / "train").glob("*.tokens.npy"))
    shard.write_bytes(shard.read_bytes()[:-100])
    output = refused(code=1)
    assert str(shard) in output and "copy it again" in output


def test_flipped_byte_in_a_shard(data, tmp_path):
    """Found when the shard is first read, on whichever rank that is; every rank then ends."""
    shard = next((data / "math" / "train").glob("*.tokens.npy"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 255
    shard.write_bytes(content)
    config = harness.write_small_config(tmp_path, data, tmp_path / "outputs")
    result = train(config, 2)
    assert result.code == 1, result.output
    assert f"ERROR: damaged: {shard}" in result.output and "Traceback" not in result.output


def test_sequence_longer_than_a_source(refused):
    output = refused("--phase.sequence_length=400000", "--model.max_position_embeddings=500000", "--phase.length=20M")
    assert "fewer than one row of phase" in output and "phase.sequence_length" in output


def test_more_ranks_than_rows(refused):
    output = refused(processes=5)
    assert "batch.global_batch_size of phase 'anneal' is 4 rows, fewer than the 5 ranks" in output
    assert "NPROC=4" in output


def test_checkpoint_of_another_model(refused, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "outputs" / "small")
    output = refused("--model.num_hidden_layers=3")
    assert "model.num_hidden_layers: 2 -> 3" in output and "another run.name" in output


def test_preset_that_does_not_fit(refused, tmp_path):
    output = refused(
        "--model.preset=llama3_8b", "--model.num_hidden_layers=5000", f"--run.output_dir={tmp_path}", file="debug.toml"
    )
    assert "does not fit" in output and "GiB" in output and "./run_train.sh" in output


def test_phase_that_needs_another_first(refused, tmp_path):
    for name, after in (("one", ""), ("two", 'after = "one.toml"')):
        (tmp_path / f"{name}.toml").write_text(
            f'extends = "base.toml"\n[phase]\nname = "{name}"\n{after}\nlength = "3 steps"\nsequence_length = 48\n'
            "mix = { code = 1.0 }\n"
        )
    base = (tmp_path / "small.toml").read_text().split("[[curriculum]]")[0]
    debug = (harness.ROOT / "train_configs" / "debug.toml").read_text().split("# --- the curriculum")[0]
    (tmp_path / "debug_base.toml").write_text(debug)
    first_line = base.splitlines()[1]
    (tmp_path / "base.toml").write_text(base.replace(first_line, 'extends = "debug_base.toml"'))
    output = refused(file=tmp_path / "two.toml")
    assert "phase 'two' comes after phase 'one', which is not finished" in output
    assert "phase.start_from" in output


@pytest.mark.parametrize(("name", "value"), [("NPROC", "two"), ("NPROC", "0"), ("MAX_RESTARTS", "-1"), ("NNODES", "2")])
def test_environment(name, value, data, tmp_path):
    config = harness.write_small_config(tmp_path, data, tmp_path / "outputs")
    result = train(config, 1, environment={name: value})
    assert result.code == 2
    assert f"{name}={value}" in result.output and "Traceback" not in result.output
