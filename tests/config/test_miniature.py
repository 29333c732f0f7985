"""`[miniature]`: any curriculum made smaller, on other sources, with nothing left of what it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.config_texts import BASE, write
from titan_yulan.config import Duration, RunConfig, Tokens, diff, load, show, to_toml
from titan_yulan.config.miniature import MINIMUM_ROWS
from titan_yulan.curriculum.plan import Plan
from titan_yulan.errors import UserError

# BASE has the sources code and math, without domains; these are the ones of the curriculum
SOURCES = """
[data.sources.web]
path = "data/web"
domain = "English"

[data.sources.books]
path = "data/books"
domain = "English"

[data.sources.python]
path = "data/python"
domain = "programs"
"""
PHASES = """
[[curriculum]]
name = "first"
sequence_length = 4096
length = "9_728_000 rows"
mix = { web = 0.1, books = 0.2, python = 0.7 }
lr = [
    { shape = "linear", from = 0.0, to = 1.0, over = "2500 steps" },
    { shape = "constant" },
]
activation_checkpoint = { mode = "full" }
parallel = { tensor = 2 }

[[curriculum]]
name = "long"
sequence_length = 28672
batch = { global_batch_size = 144, micro_batch_size = 1 }
mix = { python = "10B", books = "30B" }
lr = { shape = "1-sqrt", from = 1.0, to = 0.0, over = "19000 steps", hold_at = "99%" }
"""
MINIATURE = """
extends = "large.toml"

[miniature]
sequence_length_divisor = 32
batch_divisor = 36
steps_divisor = 100

[miniature.domains]
English = "math"
programs = "code"

[batch]
micro_batch_size = 7
"""


def small(folder: Path, changes: tuple[str, str] = ("", ""), arguments: tuple[str, ...] = ()) -> RunConfig:
    """The miniature, its text changed in one place."""
    base = BASE.replace("global_batch_size = 8\n", "global_batch_size = 1008\n")
    write(folder, "large.toml", base.replace("micro_batch_size = 2", "micro_batch_size = 18") + SOURCES + PHASES)
    assert changes[0] in MINIATURE
    return load(write(folder, "small.toml", MINIATURE.replace(*changes)), arguments).config


def refusal(folder: Path, changes: tuple[str, str], arguments: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(UserError) as raised:
        small(folder, changes, arguments)
    return str(raised.value).split("\n")


def test_lengths_batches_and_rates_shrink_together(tmp_path: Path) -> None:
    config = small(tmp_path)
    first, long = config.phases
    assert (first.sequence_length, long.sequence_length) == (128, 896)  # 1 : 7, as 4,096 to 28,672
    assert (first.batch.global_batch_size, long.batch.global_batch_size) == (28, 4)
    plan = Plan(config)
    # 9,728,000 rows are 9,650.8 steps; 40 billion tokens are 9,688.1
    assert first.length == Duration(2702.0, "rows") and [phase.steps for phase in plan.phases] == [96, 96]
    rates = [plan.learning_rate(step) / 1e-2 for step in (0, 5, 25, 95, 96, 144, 191)]
    assert rates[:5] == pytest.approx([0, 0.2, 1, 1, 1])
    # hold_at is 99% of the phase: its step 95.04
    assert rates[5:] == pytest.approx([1 - (48 / 190) ** 0.5, 1 - (95 / 190) ** 0.5])


def test_mixes_are_summed_by_domain_and_other_sources_vanish(tmp_path: Path) -> None:
    config = small(tmp_path)
    assert config.phases[0].mix == {"math": 0.3, "code": 0.7}
    scale = 32 * 36 * 100
    assert config.phases[1].mix == {"code": Tokens(round(10e9 / scale)), "math": Tokens(round(30e9 / scale))}
    assert set(config.data.sources) == {"code", "math"}


def test_batches_and_lengths_in_tokens(tmp_path: Path) -> None:
    phases = """
    [[curriculum]]
    name = "only"
    sequence_length = 4096
    batch = { global_batch_size = "4_128_768" }
    mix = { web = "30B", python = "10B" }
    [batch]"""
    (phase,) = small(tmp_path, ("[batch]", phases)).phases
    assert (phase.batch.global_batch_size, phase.batch.micro_batch_size) == (Tokens(3584), 7)
    assert phase.length is None and phase.mix == {"math": Tokens(260417), "code": Tokens(86806)}
    (line,) = refusal(tmp_path, ("[batch]", phases.replace('"30B"', '"1B"').replace('"10B"', '"1B"')))
    assert line.endswith("miniature.steps_divisor: leaves fewer than 200 rows to only (112); lower it to about 56")
    (line,) = refusal(tmp_path, ("[batch]", phases.replace('"30B"', "3.0")))
    assert line.endswith("mix: holds weights and amounts of tokens; write all as weights or all as amounts")


def test_the_layout_is_the_one_of_the_miniature(tmp_path: Path) -> None:
    config = small(tmp_path)
    assert {phase.parallel.tensor for phase in config.phases} == {1}
    assert {phase.activation_checkpoint.mode for phase in config.phases} == {"none"}
    # a micro-batch has as many tokens in both
    assert [phase.batch.micro_batch_size for phase in config.phases] == [7, 1]


def test_nothing_of_it_is_left(tmp_path: Path) -> None:
    config = small(tmp_path)
    text = to_toml(config)
    assert "miniature" not in text and "web" not in text
    again = load(write(tmp_path, "again.toml", text)).config
    assert again == config and diff(again, config) == []


def test_it_is_shown_where_a_value_was_made_smaller(tmp_path: Path) -> None:
    small(tmp_path)
    text = show(load(tmp_path / "small.toml"))
    assert 'length = "2.702K rows"  # large.toml:38, made smaller by small.toml:4' in text
    assert "math = 0.3  # small.toml:10" in text
    assert 'name = "first"  # large.toml:36' in text


def test_its_keys_can_be_overridden(tmp_path: Path) -> None:
    config = small(tmp_path, arguments=("--miniature.steps_divisor=50", "--miniature.domains.English=code"))
    assert Plan(config).phases[0].steps == 193 and config.phases[0].mix == {"code": 1.0}
    assert refusal(tmp_path, ("", ""), ("--miniature.step_divisor=50",)) == [
        "--miniature.step_divisor: unknown key; did you mean '--miniature.steps_divisor'?"
    ]


def test_groups_and_weights_of_an_adaptive_phase_follow_the_sources(tmp_path: Path) -> None:
    adaptive = """
    [adaptive]
    every = "4000 steps"
    weights = { python = 2.0 }
    groups = { all = ["web", "books", "p*"] }
    [data.sources.code]
    path = "c"
    validation_path = "cv"
    [data.sources.math]
    path = "m"
    validation_path = "mv"
    [batch]"""
    config = small(tmp_path, ("[batch]", adaptive))
    assert config.phases[0].adaptive.every == Duration(40.0, "steps")
    assert config.phases[0].adaptive.weights == {"math": 1.0, "code": 2.0}
    assert config.phases[0].adaptive.groups == {"all": ("math", "code")}
    (line,) = refusal(tmp_path, ("[batch]", adaptive.replace("python = 2.0", "books = 2.0")))
    assert line.startswith(
        "small.toml:16: adaptive.weights: 2.0 for books, but 1.0 for another that 'math' stands for;"
    )
    # groups that adjust nothing do not become one of all sources
    (line,) = refusal(tmp_path, ("[batch]", adaptive.replace('"web", "books", "p*"', '"web"')))
    assert line.startswith("small.toml:17: adaptive.groups: no group holds two sources")


def test_every_mistake_in_domains_is_told_at_once(tmp_path: Path) -> None:
    changed = 'Englisch = "math"\nprograms = "cod"'
    assert refusal(tmp_path, ('English = "math"\nprograms = "code"', changed)) == [
        "small.toml:9: miniature.domains.English: missing; it is the domain of web, books; write a source for it",
        "small.toml:10: miniature.domains.Englisch: no source has this domain; did you mean 'English'?; remove it",
        "small.toml:11: miniature.domains.programs: no table [data.sources] has the name 'cod'; did you mean 'code'?",
    ]


def test_a_source_without_a_domain_or_a_table(tmp_path: Path) -> None:
    element = '[[curriculum]]\nname = "x"\nlength = "9000 steps"\nsequence_length = 4096\nmix = {code = 1, wep = 1}\n'
    assert refusal(tmp_path, ("[batch]", element + "[batch]")) == [
        "large.toml:10: data.sources.code.domain: missing; required by [miniature]",
        "small.toml:17: curriculum[0].mix.wep: no table [data.sources] has this name; did you mean 'web'?",
    ]


def test_divisors_that_leave_no_whole_rows(tmp_path: Path) -> None:
    assert refusal(tmp_path, ("= 32\nbatch_divisor = 36", "= 3\nbatch_divisor = 28")) == [
        "small.toml:5: miniature.sequence_length_divisor: 3 does not divide sequence_length, 4096 of first, 28672 of "
        "long; choose a divisor of 4096",
        "small.toml:6: miniature.batch_divisor: 28 does not divide the global batch in rows, 144 of long; choose a "
        "divisor of 144",
    ]


def test_a_phase_that_would_be_too_short_is_named(tmp_path: Path) -> None:
    (line,) = refusal(tmp_path, ("steps_divisor = 100", "steps_divisor = 200"))
    assert line == (
        "small.toml:7: miniature.steps_divisor: leaves fewer than 200 rows to long (192); lower it to about 192"
    )
    plan = Plan(small(tmp_path, ("steps_divisor = 100", "steps_divisor = 192")))
    assert min(phase.rows_total for phase in plan.phases) >= MINIMUM_ROWS


def test_what_is_no_table_or_no_number(tmp_path: Path) -> None:
    assert refusal(tmp_path, ("= 36", '= "many"'))[0].startswith(
        "small.toml:6: miniature.batch_divisor: found 'many' (a string); allowed: a whole number >= 1"
    )
    write(tmp_path, "none.toml", 'extends = "large.toml"\nminiature = 3\n')
    with pytest.raises(UserError, match=r"none\.toml:2: miniature: found 3 \(a whole number\); allowed: a table"):
        load(tmp_path / "none.toml")
