"""Chains of phase files and curricula."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.config_texts import BASE, phase, write
from titan_yulan.config import RunConfig, load
from titan_yulan.errors import UserError


def names(config: RunConfig) -> list[str]:
    return [p.name for p in config.phases]


def chain(folder: Path, count: int = 3) -> Path:
    """base.toml and phase files p1, p2, ... linked by `after`; the last one."""
    write(folder, "base.toml", BASE)
    for i in range(1, count + 1):
        after = f'after = "p{i - 1}.toml"\n' if i > 1 else ""
        write(folder, f"p{i}.toml", 'extends = "base.toml"\n' + phase(f"phase{i}", after))
    return folder / f"p{count}.toml"


def test_a_phase_file_brings_the_phases_before_it(tmp_path: Path) -> None:
    config = load(chain(tmp_path)).config
    assert names(config) == ["phase1", "phase2", "phase3"]
    assert config.first_phase == 2
    assert {p.after for p in config.phases} == {""}


def test_overrides_of_a_phase_mean_the_target_and_others_mean_all(tmp_path: Path) -> None:
    config = load(chain(tmp_path), ["--phase.length=7 steps", "--batch.micro_batch_size=1", "--run.seed=5"]).config
    assert [str(p.length) for p in config.phases] == ["100 steps", "100 steps", "7 steps"]
    assert [p.batch.micro_batch_size for p in config.phases] == [1, 1, 1]
    assert config.run.seed == 5


def test_an_empty_after_cuts_the_chain(tmp_path: Path) -> None:
    config = load(chain(tmp_path), ["--phase.after=", "--phase.start_from=ckpt"]).config
    assert (names(config), config.first_phase, config.phases[0].start_from) == (["phase3"], 0, "ckpt")
    with pytest.raises(UserError) as raised:
        load(tmp_path / "p3.toml", ["--phase.start_from=ckpt"])
    assert str(raised.value).split("\n")[0] == (
        "--phase.start_from: after is set too; allowed: only one of after and start_from"
    )


def test_after_in_a_cycle_or_of_a_missing_or_wrong_file(tmp_path: Path) -> None:
    last = chain(tmp_path)
    write(tmp_path, "p1.toml", 'extends = "base.toml"\n' + phase("phase1", 'after = "p3.toml"'))
    with pytest.raises(
        UserError, match=r"^p1\.toml:8: phase\.after: cycle p3\.toml -> p2\.toml -> p1\.toml -> p3\.toml; rem"
    ):
        load(last)
    write(tmp_path, "p1.toml", 'extends = "base.toml"\n' + phase("phase1", 'after = "p0.toml"'))
    with pytest.raises(UserError, match=r"^p1\.toml:8: phase\.after: p0\.toml does not exist"):
        load(last)
    with pytest.raises(
        UserError, match=r"^p2\.toml:8: phase\.after: base\.toml is no phase file; name a file with one"
    ):
        load(write(tmp_path, "p2.toml", 'extends = "base.toml"\n' + phase("phase2", 'after = "base.toml"')))


def test_phase_files_must_agree_on_the_run(tmp_path: Path) -> None:
    last = chain(tmp_path, 2)
    write(tmp_path, "p1.toml", 'extends = "base.toml"\n[optimizer]\neps = 1e-6\n[run]\nseed = 3\n' + phase("phase1"))
    write(tmp_path, "base2.toml", BASE.replace("1e-2", "2e-2") + "[run.x]\n".replace("[run.x]\n", ""))
    write(tmp_path, "p2.toml", 'extends = "base2.toml"\n[run]\nseed = 3\n' + phase("phase2", 'after = "p1.toml"'))
    with pytest.raises(UserError) as raised:
        load(last)
    assert str(raised.value).split("\n") == [
        "base2.toml:17: optimizer.learning_rate: 0.02 here, 0.01 in base.toml:17; a run has one value",
        "p1.toml:3: optimizer.eps: 1e-06 here, not set in base2.toml; a run has one value",
    ]
    write(tmp_path, "p2.toml", 'extends = "base2.toml"\n[optimizer]\nlearning_rate = 1\neps = 1\n[run]\nseed = 1\n'
          + phase("phase2", 'after = "p1.toml"'))  # fmt: skip
    config = load(last).config
    assert (config.optimizer.learning_rate, config.optimizer.eps, config.run.seed) == (1, 1, 1)


def test_a_batch_of_its_own_belongs_below_phase(tmp_path: Path) -> None:
    last = chain(tmp_path, 2)
    write(tmp_path, "base1.toml", BASE.replace("micro_batch_size = 2", "micro_batch_size = 4"))
    write(tmp_path, "p1.toml", 'extends = "base1.toml"\n' + phase("phase1"))
    with pytest.raises(
        UserError, match=r"batch\.micro_batch_size: 2 here, 4 in base1\.toml:21; write it in \[phase\.batch\]"
    ):
        load(last)
    more = "[phase.batch]\nmicro_batch_size = 4\n[phase.parallel]\nreduce_dtype = 'bfloat16'"
    write(tmp_path, "p1.toml", 'extends = "base.toml"\n' + phase("phase1", more))
    config = load(last).config
    assert [p.batch.micro_batch_size for p in config.phases] == [4, 2]
    assert [p.batch.global_batch_size for p in config.phases] == [8, 8]
    assert [p.parallel.reduce_dtype for p in config.phases] == ["bfloat16", "float32"]


def test_a_curriculum_of_files(tmp_path: Path) -> None:
    chain(tmp_path)
    top = write(tmp_path, "all.toml", 'curriculum = ["p1.toml", "p2.toml", "p3.toml"]\n[run]\nname = "all"')
    loaded = load(top, ["--phase.rope_theta=5e5"])
    assert names(loaded.config) == ["phase1", "phase2", "phase3"]
    assert loaded.config.first_phase == 0
    assert loaded.config.run.name == "all"
    assert {p.rope_theta for p in loaded.config.phases} == {5e5}
    assert loaded.origins["phase.phase2.name"] == "p2.toml:4"
    assert loaded.origins["run.name"] == "all.toml:3"


def test_a_curriculum_continues_the_chain_of_its_first_phase(tmp_path: Path) -> None:
    chain(tmp_path, 4)
    config = load(write(tmp_path, "tail.toml", 'curriculum = ["p3.toml", "p4.toml"]')).config
    assert (names(config), config.first_phase) == (["phase1", "phase2", "phase3", "phase4"], 2)


def test_the_order_of_a_curriculum_must_not_contradict_after(tmp_path: Path) -> None:
    chain(tmp_path)
    with pytest.raises(UserError) as raised:
        load(write(tmp_path, "all.toml", 'curriculum = ["p1.toml", "p3.toml"]'))
    assert str(raised.value) == "p3.toml:8: phase.after: 'p2.toml' is not the phase before it here; remove it"


def test_inline_tables_and_common_keys(tmp_path: Path) -> None:
    text = (
        BASE
        + """
[phase]
sequence_length = 128
mix = {code = 1, math = 1}
length = "10 steps"

[[curriculum]]
name = "one"

[[curriculum]]
name = "two"
sequence_length = 256
mix = {code = 1}
batch = {micro_batch_size = 1}
"""
    )
    loaded = load(write(tmp_path, "a.toml", text))
    one, two = loaded.config.phases
    assert (one.sequence_length, two.sequence_length) == (128, 256)
    assert (one.mix, two.mix) == ({"code": 1.0, "math": 1.0}, {"code": 1.0})
    assert (one.batch.micro_batch_size, two.batch.micro_batch_size) == (2, 1)
    assert loaded.origins["phase.one.sequence_length"] == "a.toml:24"
    with pytest.raises(UserError) as raised:
        load(tmp_path / "a.toml", ["--phase.sequence_length=8.5"])
    assert str(raised.value).count("\n") == 0  # met by both phases, said once


def test_files_and_tables_in_one_list(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", BASE)
    write(tmp_path, "bare.toml", phase("bare"))  # a phase and nothing else: the curriculum brings the rest
    top = write(tmp_path, "all.toml", """\
        extends = "base.toml"
        curriculum = ["bare.toml", {name = "inline", length = "1 steps", sequence_length = 64, mix = {code = 1}}]
        """)  # fmt: skip
    assert names(load(top).config) == ["bare", "inline"]
    other = write(tmp_path, "bare.toml", phase("bare") + "[optimizer]\nlearning_rate = 1\n")
    with pytest.raises(UserError) as raised:
        load(top)
    assert str(raised.value) == (
        f"{other.name}:8: optimizer.learning_rate: 1 here, 0.01 in base.toml:17; a run has one value"
    )


def test_names_and_starts_in_a_curriculum(tmp_path: Path) -> None:
    text = BASE + "".join(
        phase(name, start).replace("[phase]", "[[curriculum]]")
        for name, start in (("one", 'start_from = "a"'), ("one", 'start_from = "b"'))
    )
    with pytest.raises(UserError) as raised:
        load(write(tmp_path, "a.toml", text))
    assert str(raised.value).split("\n") == [
        "a.toml:30: curriculum[1].name: 'one' is also the phase at a.toml:24; rename one",
        "a.toml:34: curriculum[1].start_from: only the first phase of a curriculum may have it; remove it",
    ]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("curriculum = 3", "a.toml:1: curriculum: allowed: a list of at least one phase file or [[curriculum]] table"),
        ("curriculum = []", "a.toml:1: curriculum: allowed: a list of at least one phase file or [[curriculum]] table"),
        ("curriculum = [3]", "a.toml:1: curriculum[0]: found 3 (a whole number); allowed: a phase file or a table"),
        ("first_phase = 1\n[phase]\nname='x'",
         "a.toml:1: first_phase: only a file with its whole curriculum may set it; remove it"),
        ("first_phase = 1\ncurriculum = [{name='x'}]",
         "a.toml:1: first_phase: found 1 (a whole number); allowed: a whole number from 0 to 0"),
        ("first_phase = true\ncurriculum = [{name='x'}]",
         "a.toml:1: first_phase: found true; allowed: a whole number from 0 to 0"),
        ("phase = 3", "a.toml:1: phase: found 3 (a whole number); allowed: a table"),
        ("[phase]\nafter = 3", "a.toml:2: phase.after: found 3 (a whole number); allowed: a string"),
    ],
)  # fmt: skip
def test_what_is_no_curriculum(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(UserError) as raised:
        load(write(tmp_path, "a.toml", text))
    assert error in str(raised.value).split("\n")
