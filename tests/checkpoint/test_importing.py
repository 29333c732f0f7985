"""`titan-yulan checkpoint import`: what it writes, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.hugging_face_folders import LLAMA, write_llama, write_yulan
from tests.checkpoint.universal_folders import GLOBAL_STEP, MODEL, UPDATES, make_peer, write_universal
from tests.curriculum.making import configuration, phase
from tests.data.making import BYTES
from titan_yulan import config as configuration_package
from titan_yulan.checkpoint import importing, store
from titan_yulan.checkpoint.export import open_source
from titan_yulan.checkpoint.importing import import_checkpoint
from titan_yulan.checkpoint.layout import find_checkpoints, find_damage
from titan_yulan.checkpoint.resume import Resume, check_resume, make_plan
from titan_yulan.cli import main
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import AdaptiveSection, RunConfig, SourceSection, TokenizerSection
from titan_yulan.config.values import Duration
from titan_yulan.curriculum.adaptive import Adjustment
from titan_yulan.curriculum.plan import Plan
from titan_yulan.data.tokenizer import save_ranks
from titan_yulan.errors import RunError, UserError
from titan_yulan.eval.load import load_decoder

ZERO = {"x": 0, "y": 0}


def run_config(root: Path, model: ModelConfig) -> RunConfig:
    save_ranks(root / "t.tiktoken", BYTES.ranks)
    tokenizer = TokenizerSection(path=str(root / "t.tiktoken"))
    return replace(configuration(phase("next", "2 steps", {"x": 1.0}), tokenizer=tokenizer), model=model)


def test_states_of_deepspeed_are_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "_FILE_BYTES", 10_000)
    expected = make_peer().state()
    write_universal(tmp_path / "states", expected)
    (tmp_path / "run.toml").write_text(configuration_package.to_toml(run_config(tmp_path, MODEL)))
    output = tmp_path / "imported" / "run"
    arguments = ["checkpoint", "import", "--from", str(tmp_path / "states"), "--output", str(output)]
    assert main([*arguments, "--config", str(tmp_path / "run.toml")]) == 0
    (checkpoint,) = find_checkpoints(output / "checkpoints")
    assert find_damage(checkpoint) == [] and checkpoint.path.name == f"step-{GLOBAL_STEP:08d}"
    assert len(list(checkpoint.path.glob("*.distcp"))) > 10
    state = checkpoint.state()
    assert (state.step, state.row, state.token) == (GLOBAL_STEP, GLOBAL_STEP * 8, GLOBAL_STEP * 8 * 16)
    assert (state.phase, state.phase_finished, state.tapes, state.sources) == ("next", False, {"x": 0}, {})
    assert state.origin == {"step": state.step, "row": state.row, "token": state.token, "tapes": {"x": 0}}
    assert state.tokenizer == BYTES.fingerprint
    found = {f"{n}.{key}": torch.empty_like(t) for n, tensors in expected.items() for key, t in tensors.items()}
    store.load(checkpoint, {"optimizer": {name: t for name, t in found.items() if not name.endswith(".fp32")}})
    decoder, config = load_decoder(output)
    assert (config.run.name, config.run.output_dir) == ("run", str(tmp_path / "imported"))
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, expected[name]["fp32"]), name
        assert float(found[f"{name}.step"]) == UPDATES
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(found[f"{name}.{key}"], expected[name][key]), name


def test_a_state_may_come_after_phases_that_others_trained(tmp_path: Path) -> None:
    write_universal(tmp_path / "states", make_peer().state())
    alone = run_config(tmp_path, replace(MODEL, rope_theta=77.0))
    before = phase("one", "4 steps", {"x": 1.0, "y": 1.0}), phase("two", "1 steps", {"y": 1.0})
    next_phase = replace(alone.phases[0], rope_theta=49000.0)
    sources = replace(alone.data, sources=alone.data.sources | {"y": SourceSection(path="data/y")})
    config = replace(alone, phases=(*before, next_phase), first_phase=2, data=sources)
    lines: list[str] = []
    checkpoint = import_checkpoint(tmp_path / "states", config, tmp_path / "run", report=lines.append)
    assert "token 640 as if the 2 phases before 'next' had been trained here" in lines[0]
    # the next phase's own base decides what is trained, not what was
    (note,) = [line for line in lines if "rope_theta" in line]
    assert "and model.rope_theta is 77: " in note and load_decoder(tmp_path / "run")[0].model.rope_theta == 77.0
    state, plan = checkpoint.state(), Plan(config)
    assert (state.phase, state.phase_finished, state.step) == ("two", True, GLOBAL_STEP)
    # 4 steps of 8 rows of 16 tokens, half and half; then one of "y" alone
    assert state.tapes == {"x": 256, "y": 384} and state.origin == {"step": 0, "row": 0, "token": 0, "tapes": ZERO}
    run = configuration_package.load(checkpoint.path / "config.toml").config
    found = make_plan(run, checkpoint)
    assert check_resume(run, found, checkpoint) == Resume(GLOBAL_STEP, False, [])
    assert [phase.start for phase in found.phases] == [phase.start for phase in plan.phases]
    # a phase behind it goes on too, a phase that is not the next one does not
    more = replace(run, phases=(*run.phases, phase("last", "1 steps", {"x": 1.0})))
    assert check_resume(more, make_plan(more, checkpoint), checkpoint).step == GLOBAL_STEP
    skipping = replace(more, first_phase=3)
    with pytest.raises(UserError, match="'last' comes after phase 'next', which is not finished"):
        check_resume(skipping, make_plan(skipping, checkpoint), checkpoint)


def test_a_llama_in_pickles_is_imported_with_its_weights_alone(tmp_path: Path) -> None:
    model = replace(LLAMA, vocab_size=259)
    write_llama(tmp_path / "llama", model, torch.bfloat16)
    weights = load_file(tmp_path / "llama" / "model.safetensors")
    (tmp_path / "llama" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "llama" / "pytorch_model.bin")
    lines: list[str] = []
    checkpoint = import_checkpoint(
        tmp_path / "llama", run_config(tmp_path, model), tmp_path / "run", report=lines.append
    )
    assert lines[-1].endswith(
        f"{len(weights)} tensors, weights alone: moments begin at zero, at step 0 of phase 'next'"
    )
    assert not any("rope_theta" in line for line in lines)
    assert {name.split(".")[0] for name in store.read_index(checkpoint).state_dict_metadata} == {"model"}
    decoder, _ = load_decoder(tmp_path / "run")
    for name, parameter in decoder.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, weights[name].float()), name


def theta_lines(states: Path, config: RunConfig, output: Path, *allow_changes: str) -> list[str]:
    lines: list[str] = []
    import_checkpoint(states, config, output, allow_changes=allow_changes, report=lines.append)
    return [line for line in lines if "rope_theta" in line]


def test_a_rotary_base_of_the_phase_is_told(tmp_path: Path) -> None:
    write_universal(tmp_path / "states", make_peer().state())
    config = run_config(tmp_path, MODEL)
    config = replace(config, phases=(replace(config.phases[0], rope_theta=49000.0),))
    (note,) = theta_lines(tmp_path / "states", config, tmp_path / "run")
    assert f"config.json has rope_theta = {MODEL.rope_theta:g}, and rope_theta of phase 'next' is 49000: eval" in note
    decoder, loaded = load_decoder(tmp_path / "run")
    assert loaded.phases[0].rope_theta == decoder.model.rope_theta == 49000.0


def test_another_rotary_base_in_model_is_refused_or_told_and_computed_with(tmp_path: Path) -> None:
    write_universal(tmp_path / "states", make_peer().state())
    config = run_config(tmp_path, replace(MODEL, rope_theta=77.0))
    with pytest.raises(UserError, match=rf"rope_theta = {MODEL.rope_theta}  # found 77.0\n.*--allow-change model.KEY"):
        theta_lines(tmp_path / "states", config, tmp_path / "run")
    (note,) = theta_lines(tmp_path / "states", config, tmp_path / "run", "model.rope_theta")
    assert f"has rope_theta = {MODEL.rope_theta:g}, and model.rope_theta is 77: eval, generate and export" in note
    assert note.endswith(f"To have that model, set model.rope_theta to {MODEL.rope_theta:g} and import again")
    decoder, loaded = load_decoder(tmp_path / "run")
    assert loaded.model.rope_theta == decoder.model.rope_theta == 77.0
    assert open_source(tmp_path / "run").model.rope_theta == 77.0  # what an export says


def test_a_phase_before_with_an_adaptive_mix_needs_its_log(tmp_path: Path) -> None:
    write_universal(tmp_path / "states", make_peer().state())
    alone = run_config(tmp_path, MODEL)
    adaptive = AdaptiveSection(every=Duration.parse("2 steps"))
    before = phase("before", "5 steps", {"x": 0.5, "y": 0.5}, adaptive=adaptive)
    sources = replace(
        alone.data, sources={name: SourceSection(path=f"data/{name}", validation_path=name) for name in "xy"}
    )
    config = replace(alone, phases=(before, *alone.phases), first_phase=1, data=sources)

    def with_log(*shares: dict[str, float]) -> RunConfig:
        entries = [Adjustment("before", 2 * i, 16 * i, share, {"x": 1.0}) for i, share in enumerate(shares)]
        text = "".join(json.dumps(entry.to_json()) + "\n" for entry in entries)
        (tmp_path / "mixture.jsonl").write_text(text)
        logged = replace(before, mixture_history=str(tmp_path / "mixture.jsonl"))
        return replace(config, phases=(logged, *alone.phases))

    refused = {
        r"'before' comes before phase 'next' and has \[phase.adaptive\].*Set its phase.mixture_history to": config,
        "mixture.jsonl has a share of 'z', which the mix of phase 'before' does not read": with_log({"z": 1.0}),
    }
    for message, wrong in refused.items():
        with pytest.raises(UserError, match=message):
            import_checkpoint(tmp_path / "states", wrong, tmp_path / "run", report=lambda line: None)
    run = with_log({"x": 0.5, "y": 0.5}, {"x": 0.75, "y": 0.25})
    checkpoint = import_checkpoint(tmp_path / "states", run, tmp_path / "run", report=lambda line: None)
    # 16 rows of 16 tokens half and half, then 24 rows by three quarters
    assert checkpoint.state().tapes == {"x": (8 + 18) * 16, "y": (8 + 6) * 16}
    (tmp_path / "mixture.jsonl").unlink()  # the checkpoint knows it now
    run = configuration_package.load(checkpoint.path / "config.toml").config
    plan = make_plan(run, checkpoint)
    assert plan.phases[1].tape_start == (416, 224)
    assert check_resume(run, plan, checkpoint) == Resume(GLOBAL_STEP, False, [])


def test_what_does_not_fit_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_yulan(tmp_path / "yulan", MODEL)
    config, output = run_config(tmp_path, MODEL), tmp_path / "run"

    def refused(config: RunConfig, source: Path = tmp_path / "yulan") -> str:
        with pytest.raises(UserError) as caught:
            import_checkpoint(source, config, output, report=lambda line: None)
        assert not list(output.glob("checkpoints/*"))
        return str(caught.value)

    assert "--from: " in refused(config, tmp_path) and "is no folder of Hugging Face" in refused(config, tmp_path)
    assert "config.json is of another model than [model]" in refused(replace(config, model=LLAMA))
    later = replace(config, phases=(phase("before", "2 steps", {"x": 1.0}), *config.phases), first_phase=1)
    assert "yulan holds weights alone, so it is not known to come after phase 'before'" in refused(later)
    small = replace(MODEL, vocab_size=200)
    write_yulan(tmp_path / "small", small)
    assert "t.tiktoken has 257 entries and the model 200" in refused(replace(config, model=small), tmp_path / "small")
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(importing.layout, "commit", full)
        with pytest.raises(RunError, match=r"was not written: the disk that holds .* is full"):
            import_checkpoint(tmp_path / "yulan", config, output, report=lambda line: None)
        assert not list(output.glob("checkpoints/*"))
    (output / "checkpoints" / "step-00000000").mkdir()  # of one that was killed
    import_checkpoint(tmp_path / "yulan", config, output, report=lambda line: None)
    with pytest.raises(UserError, match=r"run has checkpoints already; name a new run folder"):
        import_checkpoint(tmp_path / "yulan", config, output)
