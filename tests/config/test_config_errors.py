"""Every mistake in one go: exact texts of the lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.config_texts import BASE, PHASE, write
from titan_yulan.config import Duration, Tokens, load
from titan_yulan.errors import UserError

FOLDER = "it names a folder; allowed: letters, digits and . _ - + = @, first a letter or digit"
SEED = "allowed: a whole number >= 0 and < 9223372036854775808"
AMOUNT = "allowed: a number >= 0 or an amount of tokens like '1.2B'"
FAMILY = "'data_constrained_7m' ... 'data_constrained_16183m' (docs/data_constrained.md)"
PRESET = f"allowed: 'yulan_mini_2b', 'llama3_8b', 'debug', {FAMILY}; did you mean 'debug'?"
BETAS = "allowed: a list of 2 values, each a number >= 0 and < 1"


def errors(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as raised:
        load(path, overrides)
    return str(raised.value).split("\n")


def test_six_mistakes_come_in_one_go(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "six.toml",
        """\
        [run]
        name = "six"
        [model]
        preset = "debug"
        vocab_size = true
        [tokenizer]
        path = "tok"
        [data.sources.code]
        path = "data/code"
        [optimizer]
        learning_rat = 1e-2
        [batch]
        global_batch_size = 8
        micro_batch_size = 16
        [parallel]
        compute_dtype = "bfloat"
        [phase]
        name = "warmup"
        length = "100 stepps"
        sequence_length = 128
        mix = {coed = 1}
        """,
    )
    assert errors(path) == [
        "six.toml:5: model.vocab_size: found true; allowed: a whole number >= 1",
        "six.toml:10: optimizer.learning_rate: missing; required: a number > 0",
        "six.toml:11: optimizer.learning_rat: unknown key; did you mean 'learning_rate'?",
        "six.toml:14: batch.micro_batch_size: 16 exceeds the global batch of 8 rows; lower it",
        "six.toml:16: parallel.compute_dtype: found 'bfloat' (a string); allowed: 'bfloat16', 'float32'; "
        "did you mean 'bfloat16'?",
        "six.toml:19: phase.length: cannot read '100 stepps' as a duration; write '40B' (tokens), '1000 steps', "
        "'5000 rows' or '1%'",
        "six.toml:21: phase.mix.coed: no table [data.sources] has this name; did you mean 'code'?",
    ]


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("--optimizer.learning_rate=fast", "found 'fast' (a string); allowed: a number > 0"),
        ("--optimizer.learning_rate=nan", "found nan (a number); allowed: a number > 0"),
        ("--optimizer.learning_rate=inf", "found inf (a number); allowed: a number > 0"),
        ("--optimizer.betas=[0.9]", f"found [0.9] (a list); {BETAS}"),
        ("--optimizer.betas=0.9", f"found 0.9 (a number); {BETAS}"),
        ("--run.seed=1.5", f"found 1.5 (a number); {SEED}"),
        ("--run.seed=2024-01-01", f"found 2024-01-01 (a date or time); {SEED}"),
        ("--run.deterministic=1", "found 1 (a whole number); allowed: true or false"),
        ("--run.name=a/b", f"found 'a/b'; {FOLDER}"),
        ("--run.name=..", f"found '..'; {FOLDER}"),
        ("--run=3", "found 3 (a whole number); allowed: a table"),
        ("--run.nam=x", "unknown key; did you mean '--run.name'?"),
        ("--learning_rate=1", "unknown key; did you mean '--optimizer.learning_rate'?"),
        ("--optimzer.eps=1", "unknown key; did you mean '--optimizer.eps'?"),
        ("--zzz=1", "unknown key; write --section.key=value"),
        ("--optimizer.eps.x=1", "unknown key; did you mean '--optimizer.eps'?"),
        ("--model.preset=deb", f"found 'deb' (a string); {PRESET}"),
        ("--model.num_key_value_heads=4", "4 does not divide num_attention_heads = 6"),
        ("--tokenizer.train_vocab_size=9000", "9000 exceeds model.vocab_size = 8192; lower it"),
        ("--checkpoint.every=1%", "found '1%'; a share belongs to a phase; write tokens, steps or rows"),
        ("--eval.every=0 steps", "found '0 steps'; allowed: more than 0"),
        ("--phase.length=10%", "found '10%'; a share of the phase itself; write tokens, steps or rows"),
        ("--phase.length=40", "found 40 (a whole number); allowed: a duration like '40B' or '1000 steps'"),
        ("--phase.length=7 rows", "'7 rows' is less than one global batch (1024 tokens); raise it"),
        ("--phase.length=1.5 steps", "found '1.5 steps'; allowed: a whole number of steps"),
        (
            "--phase.length=none",
            "missing; required unless every amount of the mix is in tokens, or epochs and unique_tokens are set",
        ),
        ("--phase.mix={}", "nothing to read; allowed: at least one source above 0"),
        ("--phase.mix={code=0}", "nothing to read; allowed: at least one source above 0"),
        ("--phase.mix={code=1,math='1M'}",
         "code is a weight, math an amount of tokens; write all as weights or all as amounts"),
        ("--phase.mix.code=-1", f"found -1 (a whole number); {AMOUNT}"),
        ("--phase.mix.code=true", f"found true; {AMOUNT}"),
        ("--phase.sequence_length=2048", "2048 exceeds model.max_position_embeddings = 1024; lower it or raise that"),
    ],
)  # fmt: skip
def test_one_mistake_on_the_command_line(tmp_path: Path, override: str, error: str) -> None:
    path = write(tmp_path, "a.toml", BASE + PHASE)
    assert errors(path, override) == [f"{override.partition('=')[0]}: {error}"]


def test_tokens_of_a_batch_are_whole_rows(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", BASE.replace("global_batch_size = 8", 'global_batch_size = "1K"') + PHASE)
    assert errors(path) == [
        "a.toml:20: batch.global_batch_size: 1K tokens are no whole rows of sequence_length = 128; "
        "write '896' or '1024'"
    ]
    assert load(path, ["--batch.global_batch_size='1024'"]).config.phases[0].batch.global_batch_size == Tokens(1024)
    assert errors(path, "--batch.global_batch_size='100'") == [
        "--batch.global_batch_size: 100 tokens are no whole rows of sequence_length = 128; write '128'"
    ]


@pytest.mark.parametrize(
    ("lr", "error"),
    [
        ("{shape = 'linear'}", "phase.lr.over: missing; required with shape \"linear\""),
        ("[{shape = 'constant'}, {shape = 'constant'}]",
         "phase.lr[0].over: missing; required in every segment but the last"),
        ("{shape = 'constant', from = 0.5, to = 1}",
         "phase.lr.to: 1.0 differs from from = 0.5; a constant segment has one value"),
        ("{shape = 'constant', to = 0.5}",
         "phase.lr.to: 0.5 differs from from = 1.0; a constant segment has one value"),
        ("{shape = 'cosine', over = '50 steps', hold_at = '51 steps'}",
         "phase.lr.hold_at: '51 steps' is past the end of the segment, over = '50 steps'; lower it"),
        ("{shape = 'cosine', over = '50%', hold_at = '51 steps'}",
         "phase.lr.hold_at: '51 steps' is past the end of the segment, over = '50%'; lower it"),
        ("{shape = 'constant', hold_at = '1%'}", "phase.lr.hold_at: has no effect without over; set over or remove it"),
        ("{shape = 'linear', over = '0 steps'}", "phase.lr.over: found '0 steps'; allowed: more than 0"),
        ("{over = '1%'}",
         "phase.lr.shape: missing; required: 'constant', 'linear', 'cosine', 'quarter-cosine', '1-sqrt'"),
        ("3", "phase.lr: found 3 (a whole number); allowed: a table or a list of tables"),
        ("[3]", "phase.lr[0]: found 3 (a whole number); allowed: a table"),
    ],
)  # fmt: skip
def test_learning_rate_segments(tmp_path: Path, lr: str, error: str) -> None:
    path = write(tmp_path, "a.toml", BASE + PHASE + f"lr = {lr}")
    assert errors(path) == [f"a.toml:28: {error}"]


def test_constant_segment_keeps_its_start(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", BASE + PHASE + "lr = {shape = 'constant', from = 0.25}")
    assert load(path).config.phases[0].lr[0].to == 0.25


def test_hold_at_may_equal_the_end(tmp_path: Path) -> None:
    path = write(
        tmp_path, "a.toml", BASE + PHASE + "lr = {shape = '1-sqrt', to = 0, over = '100%', hold_at = '100 steps'}"
    )
    assert load(path).config.phases[0].lr[0].over == Duration(1, "share")


def test_unknown_sections_and_files_without_phase(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", BASE + "[optimiser]\neps = 1")
    assert errors(path) == [
        "a.toml:1: no phase here; write a [phase] table or curriculum = ['phase01.toml', …]",
        "a.toml:22: optimiser: unknown section; did you mean 'optimizer'?",
    ]


def test_what_is_no_override(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", BASE + PHASE)
    assert errors(path, "run.name=x", "--run.name", "--=3") == [
        "run.name=x: cannot read this; write --section.key=value",
        "--run.name: cannot read this; write --section.key=value",
        "--=3: cannot read this; write --section.key=value",
    ]


def test_amounts_need_no_length_and_whole_numbers_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", BASE + PHASE)
    loaded = load(path, ["--phase.length=none", "--phase.mix={code='1M', math='2.5M'}", "--optimizer.learning_rate=1"])
    assert loaded.config.phases[0].length is None
    assert loaded.config.phases[0].mix == {"code": Tokens(1e6), "math": Tokens(2.5e6)}
    assert type(loaded.config.optimizer.learning_rate) is float


def test_overrides_are_typed_and_win(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", BASE + PHASE + "[phase.batch]\nmicro_batch_size = 4")
    loaded = load(path, ["--run.name=2025", "--phase.mix.code=0.5", "--data.sources.code.path=x", "--phase.length=1M"])
    assert loaded.config.run.name == "2025"
    assert loaded.config.phases[0].mix == {"code": 0.5, "math": 1.0}
    assert loaded.config.data.sources["code"].path == "x"
    assert loaded.config.phases[0].length == Duration(1e6, "tokens")
    assert loaded.config.phases[0].batch.micro_batch_size == 4
    assert loaded.origins["phase.warmup.batch.micro_batch_size"] == "a.toml:29"
    assert loaded.origins["phase.warmup.mix.code"] == "--phase.mix.code"
    assert load(path, ["--batch.micro_batch_size=1"]).config.phases[0].batch.micro_batch_size == 1
    both = ["--phase.batch.micro_batch_size=8", "--batch.micro_batch_size=1"]
    assert load(path, both).config.phases[0].batch.micro_batch_size == 8


def test_a_file_of_nothing_lists_what_is_required(tmp_path: Path) -> None:
    assert errors(write(tmp_path, "a.toml", "[phase]\n")) == [
        f"a.toml:1: {line}"
        for line in (
            "run.name: missing; required: a string",
            f"model: missing; required: preset, one of 'yulan_mini_2b', 'llama3_8b', 'debug', {FAMILY}, or a shape",
            "tokenizer.path: missing; required: a string",
            "data.sources: missing; required: a table",
            "optimizer.learning_rate: missing; required: a number > 0",
            "phase.name: missing; required: a string",
            "phase.sequence_length: missing; required: a whole number >= 1",
            "phase.mix: missing; required: a table",
            "batch.global_batch_size: missing; required: a whole number >= 1 or an amount of tokens like '1.2B'",
            "batch.micro_batch_size: missing; required: a whole number >= 1",
        )
    ]


def test_a_section_that_is_no_table_is_one_error(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", "phase = 3\n" + BASE)
    assert errors(path) == ["a.toml:1: phase: found 3 (a whole number); allowed: a table"]
    path = write(tmp_path, "a.toml", BASE.replace("[batch]", "[[batch]]") + PHASE + "batch = {micro_batch_size = 1}")
    assert errors(path)[0].startswith("a.toml:19: batch: found [{'global_batch_size': 8")


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    assert load(write(tmp_path, "a.toml", "\ufeff" + BASE + PHASE)).config.run.name == "test"


def test_amounts_must_fill_a_batch(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", BASE + PHASE)
    flags = ["--phase.length=none", "--phase.mix={code='1000'}"]
    assert errors(path, *flags) == ["--phase.mix: '1K' is less than one global batch (1024 tokens); raise it"]
