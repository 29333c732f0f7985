"""`[adaptive]`: what is refused before a run, and which sources a group holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.config_texts import BASE, PHASE, write
from titan_yulan.config import load
from titan_yulan.config.adaptive import adaptive_groups
from titan_yulan.config.sections import AdaptiveSection
from titan_yulan.errors import UserError

HELD_OUT = BASE.replace('path = "data/', 'validation_path = "held/out"\npath = "data/')


def refusal(folder: Path, adaptive: str, base: str = HELD_OUT) -> str:
    path = write(folder, "run.toml", base + PHASE + "[phase.adaptive]\n" + adaptive)
    with pytest.raises(UserError) as error:
        load(path)
    return str(error.value)


@pytest.mark.parametrize(
    ("adaptive", "message"),
    [
        ('every = "10%"', "phase.adaptive.every: found '10%'; a share belongs to a phase"),
        ('every = "0 steps"', "phase.adaptive.every: found '0 steps'; allowed: more than 0"),
        ('every = "9 steps"\nalpha = 1.0', "phase.adaptive.alpha: found 1.0 (a number); allowed: a number > 0 and < 1"),
        ('every = "9 steps"\nweights = { cod = 1 }', "no table [data.sources] has this name; did you mean 'code'?"),
        (
            'every = "9 steps"\nalpha = 0.5\nweights = { code = 2 }',
            "weights.code: 2.0 with alpha = 0.5 could bring a share to 0; lower it below 1 / alpha",
        ),
        ('every = "9 steps"\ngroups = { one = ["code"] }', "no group holds two sources of this mix"),
        (
            'every = "9 steps"\ngroups = { a = ["c*", "math"], b = ["math", "code"] }',
            "groups.b: 'code' is in the group 'a' too; a source has one group",
        ),
        (
            'every = "9 steps"\ngroups = { a = ["co*", "mat"] }',
            "groups.a: 'mat' matches no table of [data.sources]; did",
        ),
        ('every = "9 steps"\n[data]\nshuffle = ["c*", "books"]', "data.shuffle: 'books' matches no table of [data"),
        ('every = "9 steps"\nfloor = 0.4', "floor: 0.4 is above the share that 'math' begins with, 0.333 of its group"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, adaptive: str, message: str) -> None:
    assert message in refusal(tmp_path, adaptive)


def test_a_topic_must_have_a_held_out_part(tmp_path: Path) -> None:
    text = refusal(tmp_path, 'every = "9 steps"', BASE)
    assert "'code' has no held-out part to measure; set data.sources.code.validation_path" in text


def test_one_table_serves_all_phases_and_one_may_differ(tmp_path: Path) -> None:
    write(tmp_path, "one.toml", HELD_OUT + PHASE.replace("warmup", "one"))
    two = PHASE.replace("warmup", "two") + '[phase.adaptive]\nalpha = 0.25\n[adaptive]\nevery = "9 steps"\n'
    path = write(tmp_path, "two.toml", 'extends = "one.toml"\n' + two)
    phase = load(path).config.phases[0]
    assert (str(phase.adaptive.every), phase.adaptive.alpha, phase.name) == ("9 steps", 0.25, "two")


def test_groups_hold_what_is_mixed() -> None:
    groups: dict[str, tuple[str, ...]] = {"en": ("en-*",), "zh": ("zh-1", "zh-2"), "none": ("x",)}
    mixed = ["en-2", "en-1", "zh-1", "code"]
    assert adaptive_groups(AdaptiveSection(groups=groups), mixed) == {"en": ("en-2", "en-1")}
    assert adaptive_groups(AdaptiveSection(), mixed) == {"all": tuple(mixed)}
