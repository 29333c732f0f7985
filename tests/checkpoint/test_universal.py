"""Folders in DeepSpeed's universal layout: how far they are, what they hold, and every reason to refuse one. Training
on from them, on ranks: tests/distributed/test_published_starts.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoint.hugging_face_folders import run_config
from tests.checkpoint.test_pickled import Touch
from tests.checkpoint.universal_folders import (
    GLOBAL_STEP,
    MODEL,
    OPTIMIZER,
    UPDATES,
    flat,
    in_dictionary,
    make_peer,
    write_universal,
)
from tests.curriculum.making import phase, segment
from titan_yulan.checkpoint.published import check_published, open_published, plan_from
from titan_yulan.checkpoint.resume import check_start, make_plan
from titan_yulan.checkpoint.universal import check_universal, is_universal, open_universal, read_progress
from titan_yulan.checkpoint.universal_state import load_universal, read_step
from titan_yulan.config import load as load_configuration
from titan_yulan.config.sections import RunConfig
from titan_yulan.curriculum.position import Position
from titan_yulan.errors import RunError, UserError
from titan_yulan.model import Decoder
from titan_yulan.optimizer.adamw import build_adamw, optimizer_state

State = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def state() -> State:
    return make_peer().state()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, state: State) -> Path:
    path = tmp_path_factory.mktemp("universal") / "states"
    write_universal(path, state)
    return path


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "states"))


def begin_from(path: Path, **changes: Any) -> RunConfig:
    config = run_config(replace(MODEL, **changes))
    return replace(config, phases=(replace(config.phases[0], start_from=str(path)),))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def bare(name: str, key: str, tensor: Tensor) -> Tensor:
    return tensor


@pytest.mark.parametrize("form", [in_dictionary, flat, bare])
@pytest.mark.parametrize("steps", [True, False], ids=["with steps", "without"])
def test_weights_moments_and_steps_are_taken_exactly(form: Any, steps: bool, tmp_path: Path, state: State) -> None:
    states = write_universal(tmp_path / "states", state, form=form, steps=steps)
    for path in (tmp_path / "states", states):
        assert is_universal(path)
        folder = open_universal(path)
        check_universal(run_config(MODEL), folder)
        decoder = Decoder(MODEL)
        optimizer = build_adamw(decoder, MODEL, OPTIMIZER)
        load_universal(folder, dict(decoder.named_parameters()), optimizer_state(decoder, optimizer))
        found = optimizer_state(decoder, optimizer)
        for name, parameter in decoder.named_parameters():
            assert torch.equal(parameter, state[name]["fp32"]), name
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(found[f"{name}.{key}"], state[name][key]), name
            assert float(found[f"{name}.step"]) == (UPDATES if steps else GLOBAL_STEP)


def test_a_step_may_be_a_tensor_and_must_be_a_number(folder: Path) -> None:
    file = open_universal(folder).steps["model.norm.weight"]
    decoder = Decoder(MODEL)
    found = optimizer_state(decoder, build_adamw(decoder, MODEL, OPTIMIZER))
    for content in (torch.tensor(9.0), {"param": torch.tensor([9])}):
        torch.save(content, file)
        load_universal(open_universal(folder), dict(decoder.named_parameters()), found)
        assert float(found["model.norm.weight.step"]) == 9
    torch.save({"step": "nine"}, file)
    with pytest.raises(RunError, match=r"cannot be loaded: .*step.pt holds no number of steps"):
        load_universal(open_universal(folder), dict(decoder.named_parameters()), found)


# --- how far it is ---------------------------------------------------------------------------------------------------


def test_a_plan_begins_at_the_step_of_the_state(folder: Path) -> None:
    config = begin_from(folder)  # 8 rows of 16 tokens a step
    plan = make_plan(config, None)
    assert plan.phases[0].start == Position(GLOBAL_STEP, GLOBAL_STEP * 8, GLOBAL_STEP * 8 * 16)
    assert plan.phases[0].tape_start == (0,) and plan.end.step == GLOBAL_STEP + 2
    (line,) = check_start(config)
    assert line.startswith(
        f"{folder} holds the state of an optimizer after 5 steps, epoch 1, 1 after its phase began. "
    )
    assert "at step 5, token 640 (in batches of this run's first phase)" in line
    edit(folder / "trainer_state.json", num_input_tokens_seen=1234)
    assert make_plan(config, None).phases[0].start == Position(5, 40, 1234)
    assert "token 1,234 (as its trainer counted)" in check_start(config)[0]


def test_counters_may_be_set_to_zero_and_adam_goes_on(tmp_path: Path, state: State) -> None:
    write_universal(tmp_path / "states", state, steps=False)
    edit(tmp_path / "states" / "trainer_state.json", global_step=0, epoch=0.0, num_input_tokens_seen=0)
    config = begin_from(tmp_path / "states")
    assert make_plan(config, None).phases[0].start == Position(0, 0, 0)
    lines = check_start(config)
    assert "after 5 steps, 1 after its phase began. " in lines[0] and "at step 0, token 0 (in batches" in lines[0]
    assert lines[1] == "note: trainer_state.json there says global_step 0; without that file, steps are counted on"
    assert read_step(open_universal(tmp_path / "states"), "model.norm.weight") == GLOBAL_STEP


def test_the_step_is_in_the_folder_s_name_too(folder: Path) -> None:
    (folder / "trainer_state.json").unlink()
    assert read_progress(folder).step == GLOBAL_STEP
    states = folder / f"global_step{GLOBAL_STEP}_universal"
    assert read_progress(states).step == GLOBAL_STEP
    states.rename(folder / "states")
    (folder / "latest_universal").write_text("states\n")
    with pytest.raises(
        UserError, match=r"trainer_state.json says global_step None, and the states are in .*states: tak"
    ):
        read_progress(folder)


def test_counters_of_another_step_are_refused(folder: Path) -> None:
    edit(folder / "trainer_state.json", global_step=6)
    with pytest.raises(UserError, match=r"says global_step 6, and the states are in .*_step5_universal: take f"):
        make_plan(begin_from(folder), None)


CONFIGS = Path(__file__).resolve().parents[2] / "train_configs"


def after_others(*lengths: int) -> RunConfig:
    """Phases of so many steps before one that goes on with their learning rate."""
    config = run_config(MODEL)
    rate = (segment("linear", 0.0, 1.0, "10 steps"),)
    before = [phase(f"phase {i}", f"{n} steps", {"x": 1.0}, lr=() if i else rate) for i, n in enumerate(lengths)]
    return replace(config, phases=(*before, *config.phases), first_phase=len(lengths))


def test_phases_before_it_count_as_trained(folder: Path) -> None:
    config = after_others(4, 1)
    plan = plan_from(config, folder, 2)
    first = plan.phases[2]
    assert first.start == Position(GLOBAL_STEP, 40, 640) and plan.phases[0].start == Position(0, 0, 0)
    assert first.tape_start == (640,) and plan.end.step == GLOBAL_STEP + 2
    # 1.0 is the peak: five of the ten steps of the warm-up lie behind
    assert [plan.learning_rate(step) for step in (5, 6)] == [0.5, pytest.approx(0.6)]
    line, note = check_published(config, open_published(folder), 2)
    assert line.endswith("begins with it at step 5, token 640 as if the 2 phases before 'anneal' had been trained here")
    assert note == "note: its trainer counted 1 epochs, and there are 2 phases here before phase 'anneal'"
    edit(folder / "trainer_state.json", epoch=1.99)
    assert len(check_published(config, open_published(folder), 2)) == 1
    _, note = check_published(after_others(3, 2), open_published(folder), 2)
    assert note.startswith("note: its trainer counted 4 steps before its last phase, and there are 3 here before ")


def test_tokens_of_other_phases_than_those_before_it_are_refused(folder: Path) -> None:
    config = after_others(4, 1)  # 640 tokens
    edit(folder / "trainer_state.json", epoch=9.0, num_input_tokens_seen=5)
    told = r"counted 5 tokens, and the phases before it have 640: more than 0.1% apart. .*--allow-change tokens if .*="
    with pytest.raises(UserError, match=told + "$"):
        check_published(config, open_published(folder), 2, ["model.rope_theta"])
    _, *notes = check_published(config, open_published(folder), 2, ["tokens"])
    assert notes == [
        "note: its trainer counted 9 epochs, and there are 2 phases here before phase 'anneal'",
        "note: its trainer counted 5 tokens, and there are 640 here before phase 'anneal'",
    ]
    begin = replace(config, phases=config.phases[2:], first_phase=0)  # alone, it counts on from there
    assert plan_from(begin, folder).phases[0].start == Position(GLOBAL_STEP, 40, 5)


def test_the_published_step_of_yulan_mini_ends_phase_25(tmp_path: Path) -> None:
    """Its counters and the tokens of its recipes are 0.05 % apart; more than a thousandth is another curriculum."""
    config = load_configuration(CONFIGS / "yulan_mini" / "phase26.toml").config
    (tmp_path / "global_step243198_universal" / "zero").mkdir(parents=True)
    (tmp_path / "latest_universal").write_text("global_step243198_universal")
    for tokens, fits in {
        1_004_108_120_064: True,
        243_307 * 4_128_768: True,
        int(0.9989 * 1_004_108_120_064): False,
    }.items():
        counters = {"global_step": 243_198, "epoch": 25.0, "num_input_tokens_seen": tokens}
        (tmp_path / "trainer_state.json").write_text(json.dumps(counters))
        with nullcontext() if fits else pytest.raises(UserError, match="phases before it have 1,004,108,120,064: more"):
            assert plan_from(config, tmp_path, 25).phases[25].start.token == 1_004_108_120_064


def test_a_state_that_does_not_end_the_phases_before_is_refused(folder: Path) -> None:
    for lengths, place in {(4,): "1 steps into phase 'anneal'", (4, 3): "1 steps into phase 'phase 1'"}.items():
        told = f"is at step 5, {place}, and phase 'anneal' begins at step {sum(lengths)}. Name .* --phase.after=$"
        with pytest.raises(UserError, match=told):
            check_published(after_others(*lengths), open_published(folder), len(lengths))
    edit(folder / "trainer_state.json", global_step=0)
    with pytest.raises(UserError, match=r"says global_step 0 in trainer_state.json, so it is not known to come after"):
        plan_from(after_others(4, 1), folder, 2)


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(config: RunConfig) -> str:
    with pytest.raises(UserError) as caught:
        check_start(config)
    assert str(caught.value).startswith("phase.start_from: ")
    return str(caught.value)


def tensor_file(folder: Path, name: str, state: str) -> Path:
    return folder / f"global_step{GLOBAL_STEP}_universal" / "zero" / name / f"{state}.pt"


def test_another_model_and_vocabulary_are_told_key_by_key(folder: Path) -> None:
    text = refusal(begin_from(folder, vocab_size=300, embedding_scale=9.0))
    assert text.splitlines()[1:-1] == ["  vocab_size = 259  # found 300", "  embedding_scale = 10.0  # found 9.0"]
    assert "config.json is of another model than [model]. Write there:" in text
    edit(folder / "config.json", rope_scaling={"type": "dynamic", "factor": 2.0})
    assert "published key 'rope_scaling'" in refusal(begin_from(folder))


def test_every_wrong_tensor_is_listed(folder: Path) -> None:
    zero = tensor_file(folder, "x", "fp32").parent.parent
    (zero / "model.norm.weight").rename(zero / "model.layers.0.extra.weight")
    torch.save({"param": torch.ones(31, 42)}, tensor_file(folder, "model.layers.1.mlp.up_proj.weight", "fp32"))
    text = refusal(begin_from(folder))
    assert f"the tensors of {folder} are not those of its config.json" in text
    assert text.splitlines()[1:-1] == [
        "  1 missing: model.norm.weight",
        "  1 that the model has not: model.layers.0.extra.weight",
        "  1 of another shape: model.layers.1.mlp.up_proj.weight (31, 42) instead of (42, 31)",
    ]


def test_a_moment_that_is_missing_or_of_another_shape_is_named(folder: Path) -> None:
    tensor_file(folder, "model.norm.weight", "exp_avg").unlink()
    text = refusal(begin_from(folder))
    assert "zero/*/exp_avg.pt are not those of its config.json:\n  1 missing: model.norm.weight" in text
    torch.save(torch.ones(31), tensor_file(folder, "model.norm.weight", "exp_avg"))
    torch.save(torch.ones(30), tensor_file(folder, "model.norm.weight", "exp_avg_sq"))
    text = refusal(begin_from(folder))
    assert "zero/*/exp_avg_sq.pt are not those" in text and "model.norm.weight (30,) instead of (31,)" in text


def test_biases_that_the_model_has_no_place_for_must_be_zero(folder: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.bias"
    for state in ("fp32", "exp_avg", "exp_avg_sq"):
        tensor_file(folder, name, state).parent.mkdir(exist_ok=True)
        torch.save({"param": torch.zeros(31)}, tensor_file(folder, name, state))
    check_start(begin_from(folder))
    torch.save({"param": torch.ones(31)}, tensor_file(folder, name, "fp32"))
    assert f"1 that the model has not: {name}" in refusal(begin_from(folder))


def cut_off(folder: Path) -> None:
    file = tensor_file(folder, "model.norm.weight", "exp_avg")
    file.write_bytes(file.read_bytes()[:-50])


def saved(state: str, content: Any) -> Callable[[Path], None]:
    return lambda folder: torch.save(content, tensor_file(folder, "model.norm.weight", state))


def latest(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "latest_universal").write_text(text)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (cut_off, "zero/model.norm.weight/exp_avg.pt is damaged, incomplete, or not of PyTorch 1.6"),
    "code": (saved("fp32", {"param": Touch(Path("never"))}), "fp32.pt is a pickle that calls posix.system"),
    "code as a step": (saved("step", Touch(Path("never"))), "step.pt is a pickle that calls posix.system"),
    "no tensor": (saved("fp32", {"weights": torch.ones(31)}), "fp32.pt holds neither a tensor nor a dictionary with"),
    "integers": (saved("exp_avg", torch.ones(31, dtype=torch.int64)), "holds tensors of type I64; F32, BF16, F16 can"),
    "states not there": (
        latest("global_step9_universal"),
        "names 'global_step9_universal', and .*zero is not there",
    ),
    "a path out": (latest("../states/x"), "latest_universal names '../states/x', and"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_cannot_be_read_is_refused_with_the_remedy(folder: Path, name: str) -> None:
    spoil, message = REFUSED[name]
    spoil(folder)
    with pytest.raises(UserError, match=message):
        check_start(begin_from(folder))
    assert not Path("never").exists()
