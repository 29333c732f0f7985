"""`titan-yulan checkpoint import`: what it writes, and what it refuses."""

from __future__ import annotations

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
from titan_yulan.checkpoint.importing import import_checkpoint
from titan_yulan.checkpoint.layout import find_checkpoints, find_damage
from titan_yulan.checkpoint.resume import Resume, check_resume, make_plan
from titan_yulan.cli import main
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import RunConfig, SourceSection, TokenizerSection
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
    alone = run_config(tmp_path, MODEL)
    before = phase("one", "4 steps", {"x": 1.0, "y": 1.0}), phase("two", "1 steps", {"y": 1.0})
    next_phase = replace(alone.phases[0], rope_theta=49000.0)
    sources = replace(alone.data, sources=alone.data.sources | {"y": SourceSection(path="data/y")})
    config = replace(alone, phases=(*before, next_phase), first_phase=2, data=sources)
    lines: list[str] = []
    checkpoint = import_checkpoint(tmp_path / "states", config, tmp_path / "run", report=lines.append)
    assert "token 640 as if the 2 phases before 'next' had been trained here" in lines[0]
    assert not any("rope_theta" in line for line in lines)  # the model is that of the phase before
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
    assert {name.split(".")[0] for name in store.read_index(checkpoint).state_dict_metadata} == {"model"}
    decoder, _ = load_decoder(tmp_path / "run")
    for name, parameter in decoder.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, weights[name].float()), name


def test_a_rotary_base_of_the_phase_is_told(tmp_path: Path) -> None:
    write_universal(tmp_path / "states", make_peer().state())
    config = run_config(tmp_path, MODEL)
    config = replace(config, phases=(replace(config.phases[0], rope_theta=49000.0),))
    lines: list[str] = []
    import_checkpoint(tmp_path / "states", config, tmp_path / "run", report=lines.append)
    (note,) = [line for line in lines if line.startswith("note: phase 'next' sets rope_theta = 49000, the folder has ")]
    assert f"has {MODEL.rope_theta:g}: eval, generate and export of this checkpoint use the phase's; leave" in note
    _, loaded = load_decoder(tmp_path / "run")
    assert loaded.phases[0].rope_theta == 49000.0


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
