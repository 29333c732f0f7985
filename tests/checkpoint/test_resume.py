"""Where a run goes on, what it refuses, and what it allows to change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.making import make_checkpoint, make_state
from tests.curriculum.making import configuration, phase, segment
from tests.data.making import BYTES
from titan_yulan import config as configuration_package
from titan_yulan.checkpoint.layout import Checkpoint
from titan_yulan.checkpoint.resume import (
    Resume,
    check_data,
    check_resume,
    check_start,
    make_plan,
    run_folder,
    trained_tokenizer,
)
from titan_yulan.config.presets import PRESETS
from titan_yulan.config.sections import (
    AdaptiveSection,
    BatchSection,
    CheckpointSection,
    ParallelSection,
    RunConfig,
    RunSection,
    SourceSection,
    TokenizerSection,
)
from titan_yulan.config.values import Duration
from titan_yulan.curriculum.adaptive import Adjustment
from titan_yulan.curriculum.plan import Plan
from titan_yulan.curriculum.position import Position
from titan_yulan.data.tokenizer import save_ranks
from titan_yulan.errors import RunError, UserError

MIX = {"code": 0.6, "math": 0.4}
LR = (segment("constant"),)
PHASES = [phase(name, "10 steps", MIX, lr=LR) for name in ("a", "b", "c")]


def three_phases(**changes: Any) -> RunConfig:
    return configuration(*PHASES, **changes)


def changed(index: int, **changes: Any) -> RunConfig:
    """The three phases, with one of them changed."""
    phases = [replace(section, **changes) if i == index else section for i, section in enumerate(PHASES)]
    return configuration(*phases)


def stopped(folder: Path, step: int, config: RunConfig | None = None, **more: Any) -> Checkpoint:
    """What a run of `config` (by default the three phases) leaves after `step` steps."""
    config = config or three_phases()
    plan = Plan(config)
    planned = plan.phase_at(step - 1)
    position = plan.position(step)
    tapes = dict(zip(plan.sources, planned.tapes((step - planned.start.step) * planned.batch_rows), strict=True))
    state = make_state(
        step,
        row=position.row,
        token=position.token,
        phase=planned.name,
        phase_finished=step == planned.end.step,
        tapes=tapes,
        sources=dict.fromkeys(plan.sources, "x"),
        origin={"step": 0, "row": 0, "token": 0, "tapes": {}},
        **more,
    )
    return make_checkpoint(folder / "checkpoints", step, configuration_package.to_toml(config), state)


def resume(config: RunConfig, checkpoint: Checkpoint | None, *allowed: str) -> Resume:
    return check_resume(config, make_plan(config, checkpoint), checkpoint, allowed)


def test_a_run_without_checkpoint_starts_at_its_start() -> None:
    assert resume(three_phases(), None) == Resume(0, False, [])


@pytest.mark.parametrize("step", [1, 9, 10, 11, 20, 29])
def test_a_run_goes_on_where_it_stopped(tmp_path: Path, step: int) -> None:
    assert resume(three_phases(), stopped(tmp_path, step)) == Resume(step, False, [])


def test_a_finished_run_is_complete(tmp_path: Path) -> None:
    assert resume(three_phases(), stopped(tmp_path, 30)) == Resume(30, True, [])


def test_a_later_phase_needs_the_phases_before(tmp_path: Path) -> None:
    config = replace(three_phases(), first_phase=1)
    with pytest.raises(UserError, match="'b' comes after phase 'a', which is not finished: outputs/test holds no"):
        resume(config, None)
    with pytest.raises(UserError, match=r"which is not finished: .*step-00000007 is at step 7 of 10, in phase 'a'"):
        resume(config, stopped(tmp_path, 7))


@pytest.mark.parametrize("step", [10, 11, 20, 21])
def test_a_later_phase_goes_on_from_the_finished_phase_before(tmp_path: Path, step: int) -> None:
    assert resume(replace(three_phases(), first_phase=1), stopped(tmp_path, step)).step == step


def test_a_phase_file_of_an_earlier_phase_is_done(tmp_path: Path) -> None:
    """The file names only the phases up to its own."""
    done = resume(configuration(*PHASES[:2]), stopped(tmp_path, 25))
    assert done.complete and done.step == 20
    assert done.notices[-1] == "the run folder is already past this, in phase 'c'"


def test_an_unknown_phase_is_refused(tmp_path: Path) -> None:
    config = configuration(*PHASES[:2], replace(PHASES[2], name="other"))
    with pytest.raises(UserError, match=r"is in phase 'c', which is not among the phases .*\(a, b, other\)"):
        resume(config, stopped(tmp_path, 25))


def test_a_finished_phase_cannot_be_taken_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows|past the end"):
        resume(configuration(PHASES[0], PHASES[2]), stopped(tmp_path, 25))


def test_a_phase_that_follows_may_be_added(tmp_path: Path) -> None:
    config = configuration(*PHASES, phase("d", "5 steps", MIX))
    found = resume(config, stopped(tmp_path, 30))
    assert (found.step, found.complete) == (30, False)


@pytest.mark.parametrize(
    "config",
    [
        three_phases(run=RunSection(name="test", seed=7, output_dir="elsewhere")),
        three_phases(checkpoint=CheckpointSection(keep=9)),
        three_phases(sources={n: SourceSection(path=f"moved/{n}", validation_share=0.3) for n in MIX}),
        changed(0, parallel=ParallelSection(reshard_after_forward=False)),
        changed(1, batch=BatchSection(global_batch_size=8, micro_batch_size=4)),
        changed(0, batch=BatchSection(global_batch_size=8, micro_batch_size=2)),
    ],
    ids=["output_dir", "checkpoint", "paths", "layout of a past phase", "micro batch", "past micro batch"],
)
def test_changes_that_alter_nothing_are_silent(tmp_path: Path, config: RunConfig) -> None:
    assert resume(config, stopped(tmp_path, 15)) == Resume(15, False, [])


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (changed(2, mix={"code": 1.0}), "phase.c.mix.code: 0.6 -> 1.0"),
        (changed(1, lr=(segment("constant", 0.5, 0.5),)), "phase.b.lr: "),
        (three_phases(optimizer=replace(three_phases().optimizer, learning_rate=0.5)), "optimizer.learning_rate"),
        (changed(1, length=Duration(12, "steps")), 'phase.b.length: "10 steps" -> "12 steps"'),
        (changed(1, parallel=ParallelSection(compute_dtype="bfloat16")), "phase.b.parallel.compute_dtype: "),
    ],
    ids=["mix of a later phase", "lr", "learning rate", "length", "precision"],
)
def test_changes_of_what_comes_are_told(tmp_path: Path, config: RunConfig, line: str) -> None:
    found = resume(config, stopped(tmp_path, 15))
    assert found.step == 15 and not found.complete
    assert any(notice.startswith(f"changed since step 15: {line}") for notice in found.notices)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (three_phases(run=RunSection(name="test", seed=8)), "run.seed: 7 -> 8"),
        (three_phases(run=RunSection(name="test", seed=7, deterministic=True)), "run.deterministic: false -> true"),
        (replace(three_phases(), model=replace(PRESETS["debug"], hidden_size=96)), "model.hidden_size: 192 -> 96"),
        (
            three_phases(
                sources={**three_phases().data.sources, "code": SourceSection(path="data/code", order="keep")}
            ),
            'data.sources.code.order: "shuffle" -> "keep"',
        ),
        (changed(1, mix={"code": 0.7, "math": 0.4}), "phase.b.mix.code: 0.6 -> 0.7"),
        (changed(1, mix={"code": 0.6}), "phase.b.mix.math: 0.4 -> (not set)"),
        (changed(1, sequence_length=32), "phase.b.sequence_length: 16 -> 32"),
        (changed(1, rope_theta=49e4), 'phase.b.rope_theta: "none" -> 490000.0'),
        (
            changed(1, batch=BatchSection(global_batch_size=16, micro_batch_size=1)),
            "phase.b.batch.global_batch_size: 8 -> 16",
        ),
        (changed(0, mix={"code": 1.0, "math": 0.4}), "phase.a.mix.code: 0.6 -> 1.0"),
        (changed(0, lr=(segment("constant", 0.5, 0.5),)), "phase.a.lr: "),
        (changed(0, length=Duration(12, "steps")), 'phase.a.length: "10 steps" -> "12 steps"'),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_changes_of_what_was_decided_are_refused_by_key(tmp_path: Path, config: RunConfig, line: str) -> None:
    checkpoint = stopped(tmp_path, 15)
    with pytest.raises(UserError) as error:
        resume(config, checkpoint)
    message = str(error.value)
    assert f"\n  {line}" in message and str(checkpoint.path) in message
    assert "--allow-change" in message and error.value.exit_code == 2
    key = line.split(":")[0]
    assert resume(config, checkpoint, key).step == 15


def test_a_phase_whose_name_has_a_dot_is_frozen_as_well(tmp_path: Path) -> None:
    phases = [replace(PHASES[0], name="v1.5"), replace(PHASES[1], name="v1.6")]
    checkpoint = stopped(tmp_path, 15, configuration(*phases))
    with pytest.raises(UserError, match=r'phase\."v1\.6"\.rope_theta'):
        resume(configuration(phases[0], replace(phases[1], rope_theta=5.0)), checkpoint)
    with pytest.raises(UserError, match=r'phase\."v1\.5"\.lr'):
        resume(configuration(replace(phases[0], lr=()), phases[1]), checkpoint)
    past_layout = replace(phases[0], parallel=ParallelSection(reshard_after_forward=False))
    assert resume(configuration(past_layout, phases[1]), checkpoint).notices == []


def test_all_refused_changes_are_told_at_once(tmp_path: Path) -> None:
    config = replace(changed(0, mix={"code": 1.0, "math": 0.4}), run=RunSection(name="test", seed=8))
    with pytest.raises(UserError) as error:
        resume(config, stopped(tmp_path, 15), "phase.b.mix.code")
    assert "run.seed" in str(error.value) and "phase.a.mix.code" in str(error.value)


def test_allowing_one_change_does_not_allow_another(tmp_path: Path) -> None:
    config = replace(changed(0, mix={"code": 1.0, "math": 0.4}), run=RunSection(name="test", seed=8))
    with pytest.raises(UserError) as error:
        resume(config, stopped(tmp_path, 15), "run.seed")
    assert "run.seed" not in str(error.value) and "phase.a.mix.code" in str(error.value)


def test_a_source_for_a_later_phase_may_be_added(tmp_path: Path) -> None:
    """It changes nothing of what was read."""
    config = configuration(*PHASES[:2], replace(PHASES[2], mix={"code": 0.5, "web": 0.5}), sources=sources("web"))
    assert resume(config, stopped(tmp_path, 15)).step == 15


def sources(*more: str) -> dict[str, SourceSection]:
    return {name: SourceSection(path=f"data/{name}") for name in (*MIX, *more)}


def test_a_source_that_no_phase_reads_may_be_removed(tmp_path: Path) -> None:
    with_it = configuration(*PHASES, sources=sources("web"))
    assert resume(three_phases(), stopped(tmp_path, 15, with_it)).step == 15


def test_the_last_phase_cannot_become_shorter_than_what_was_trained(tmp_path: Path) -> None:
    length = Duration(3, "steps")
    with pytest.raises(UserError, match=r"at step 25, past the end .* make phase 'c' longer"):
        resume(changed(2, length=length), stopped(tmp_path, 25))


def test_no_phase_can_become_shorter_than_what_was_trained(tmp_path: Path) -> None:
    """The rows that phase b read beyond its new end would be read by phase c once more."""
    length = Duration(3, "steps")
    with pytest.raises(UserError, match=r"cannot become shorter than what was trained: make phase 'b' longer"):
        resume(changed(1, length=length), stopped(tmp_path, 15))


def test_a_phase_under_way_may_become_shorter_up_to_what_was_trained(tmp_path: Path) -> None:
    length = Duration(5, "steps")
    assert resume(changed(1, length=length), stopped(tmp_path, 15)).step == 15


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"row": 1}, r"rows 1 -> 40\. Bring back"),
        ({"token": 1}, r"tokens 1 -> 640\. Bring back"),
        ({"tapes": {"code": 0, "math": 16}}, r"has read: tape of code 0 -> \d+, tape of math 16 -> \d+\. Bring back"),
    ],
)
def test_a_plan_that_disagrees_with_the_checkpoint_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    checkpoint = stopped(tmp_path, 5)
    state = replace(checkpoint.state(), **change)
    other = make_checkpoint(tmp_path / "other", 5, (checkpoint.path / "config.toml").read_text(), state)
    with pytest.raises(UserError, match=f"reads other rows up to step 5 than .*{words}"):
        resume(three_phases(), other)


def test_a_run_that_begins_from_a_checkpoint_of_another(tmp_path: Path) -> None:
    before = stopped(tmp_path, 10)
    config = configuration(replace(PHASES[1], start_from=str(before.path)))
    plan = make_plan(config, None)
    state = before.state()
    assert plan.phases[0].start == Position(10, 80, 1280)
    assert dict(zip(plan.sources, plan.phases[0].tape_start, strict=True)) == state.tapes
    assert check_resume(config, plan, None) == Resume(10, False, [])


def test_a_run_goes_on_from_its_own_origin(tmp_path: Path) -> None:
    """Not from `start_from`, which may be gone by then."""
    origin = {"step": 10, "row": 80, "token": 1280, "tapes": {"code": 768}}
    state = replace(stopped(tmp_path, 5).state(), origin=origin)
    config = configuration(replace(PHASES[0], start_from="gone"))
    checkpoint = make_checkpoint(tmp_path / "own", 15, configuration_package.to_toml(config), state)
    plan = make_plan(config, checkpoint)
    assert plan.phases[0].start == Position(10, 80, 1280) and plan.phases[0].tape_start == (768, 0)


def test_the_run_folder_is_the_name_in_the_output_folder() -> None:
    assert run_folder(three_phases()) == Path("outputs/test")


@pytest.mark.parametrize("path", ["s3://bucket/runs", "gs://bucket", "hdfs://host:9000/runs"])
def test_a_run_in_an_object_store_is_refused_by_the_key(path: str) -> None:
    config = three_phases()
    with pytest.raises(UserError, match=r"run\.output_dir: .*:// addresses are not supported"):
        run_folder(replace(config, run=replace(config.run, output_dir=path)))
    config = configuration(replace(PHASES[0], start_from=path))
    with pytest.raises(UserError, match=r"phase\.start_from: .*:// addresses are not supported"):
        check_start(config)


def test_a_start_that_is_not_there_can_be_planned_but_not_begun() -> None:
    config = configuration(replace(PHASES[0], start_from="gone"))
    assert make_plan(config, None).phases[0].start == Position(0, 0, 0)
    with pytest.raises(UserError, match=r"phase\.start_from: there is no gone; it names a checkpoint, a run folder or"):
        check_start(config)
    assert check_start(configuration(PHASES[0])) == []


PRINTS = {"code": "fingerprint of code", "math": "fingerprint of math"}


def test_the_same_data_is_accepted_and_sources_may_come_and_go(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 1)
    for prints in (PRINTS, {**PRINTS, "new": "x"}, {"code": PRINTS["code"]}):
        check_data(checkpoint, prints, "fingerprint of the tokenizer")


def test_other_data_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 1)
    with pytest.raises(UserError) as error:
        check_data(checkpoint, {**PRINTS, "math": "other"}, "another")
    message = str(error.value)
    assert "data.sources.math: the content" in message and "tokenizer: the vocabulary" in message
    assert "data.sources.code" not in message
    with pytest.raises(UserError, match=r"Changed since then:\n  tokenizer: the vocabulary\n"):
        check_data(checkpoint, {**PRINTS, "math": "other"}, "another", ["data.sources.math"])
    check_data(checkpoint, {**PRINTS, "math": "other"}, "another", ["data.sources.math", "tokenizer"])


def test_shares_behind_the_checkpoint_stay_and_those_after_it_come_from_the_log(tmp_path: Path) -> None:
    def entry(row: int, code: float, name: str = "b") -> Adjustment:
        return Adjustment(name, 10 + row // 8, row, {"code": code, "math": 1 - code}, {"code": 2.0, "math": 3.0})

    log = tmp_path / "mixture.jsonl"
    log.write_text("\n".join(json.dumps(e.to_json()) for e in (entry(0, 0.6), entry(16, 0.7), entry(56, 0.8))))
    config = changed(1, mixture_history=str(log))
    assert make_plan(config, None).history == (entry(0, 0.6), entry(16, 0.7), entry(56, 0.8))
    trained = [entry(0, 0.6), entry(16, 0.1)]
    checkpoint = stopped(tmp_path, 15, config, mixture_history=[e.to_json() for e in trained])
    plan = make_plan(config, checkpoint)  # 5 steps, 40 rows into phase b
    assert plan.history == (*trained, entry(56, 0.8))
    assert plan.phases[1].shares(55)["code"] == 0.1 and plan.phases[1].shares(56)["code"] == 0.8
    assert make_plan(config, stopped(tmp_path, 25, config)).history == ()  # phase b is over
    log.write_text(json.dumps(replace(entry(0, 0.6), shares={"other": 1.0}).to_json()))
    with pytest.raises(UserError, match="has a share of 'other', which the mix of phase 'b' does not read"):
        make_plan(config, None)
    own = run_folder(config) / "mixture.jsonl"
    with pytest.raises(UserError, match=r"phase.mixture_history: .* is the log of this very run"):
        make_plan(changed(1, mixture_history=str(own)), None)
    damaged = stopped(tmp_path / "damaged", 15, mixture_history=[{"row": 3}])
    with pytest.raises(RunError, match="step-00000015: mixture_history: not an adjustment"):
        make_plan(three_phases(), damaged)


def test_a_change_of_the_adaptive_mixture_is_told_and_the_log_of_a_finished_phase_is_free(tmp_path: Path) -> None:
    checkpoint = stopped(tmp_path, 15)
    config = changed(1, adaptive=AdaptiveSection(alpha=0.5))
    (notice,) = resume(config, checkpoint).notices
    assert "phase.b.adaptive.alpha: 0.1 -> 0.5" in notice
    with pytest.raises(UserError, match=r"phase\.a\.adaptive\.alpha: 0\.1 -> 0\.5"):
        resume(changed(0, adaptive=AdaptiveSection(alpha=0.5)), checkpoint)
    assert resume(changed(0, mixture_history="gone.jsonl"), checkpoint).step == 15
    with pytest.raises(UserError, match=r"data\.shuffle: \[\] -> \[\"code\"\]"):
        resume(replace(config, data=replace(config.data, shuffle=("code",))), checkpoint)


def test_another_vocabulary_at_the_same_path_is_refused(tmp_path: Path) -> None:
    save_ranks(tmp_path / "t.tiktoken", BYTES.ranks)
    config = three_phases(tokenizer=TokenizerSection(path=str(tmp_path / "t.tiktoken")))
    same = stopped(tmp_path, 5, tokenizer=BYTES.fingerprint)
    assert trained_tokenizer(same, config).fingerprint == BYTES.fingerprint
    with pytest.raises(UserError, match=r"t\.tiktoken is not the tokenizer that .* was trained with; bring it back"):
        trained_tokenizer(stopped(tmp_path / "other", 5), config)
