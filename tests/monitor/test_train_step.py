"""The benchmark of the training step end to end on a CPU, its peers against each other, and its arithmetic."""

from __future__ import annotations

import csv
import dataclasses
import os
import subprocess
import sys
import zipfile
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import attention, train_step
from benchmarks.step import plain_llama, results
from benchmarks.step.ours import run_config, without_wesar
from titan_yulan.config.presets import PRESETS
from titan_yulan.monitor.breakdown import CATEGORIES, COMMUNICATION
from titan_yulan.monitor.flops import FORMULAS, flops_per_token

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = dataclasses.replace(PRESETS["debug"], vocab_size=120, num_hidden_layers=2)
ROW = results.Row("ours", 2, 64, 2, 3, "float32", "none", False, "measured")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the command itself, two depths, three implementations."""
    out = tmp_path_factory.mktemp("step")
    command = [sys.executable, "benchmarks/train_step.py", "--layers", "1,2", "--seq-len", "32", "--micro-batch", "2"]
    command += ["--steps", "2", "--rounds", "2", "--warmup", "1", "--profile-steps", "1", "--plot", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return out


def test_every_case_is_in_the_table(folder: Path) -> None:
    with open(folder / "step.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["implementation"], row["layers"], row["status"]) for row in rows] == [
        (name, layers, "measured") for layers in "12" for name in ("ours", "reference", "hf_liger")
    ]
    for row in rows:
        parts = {name: float(row[f"ms {name}"]) for name in CATEGORIES}
        assert sum(parts.values()) == pytest.approx(float(row["profiled_ms"]), rel=1e-2)
        assert [name for name, value in parts.items() if not value] in ([], [COMMUNICATION])
        assert float(row["ms_min"]) <= float(row["ms_p25"]) <= float(row["ms"]) <= float(row["ms_p75"])
        # a row's numbers agree: 64 tokens a step, and shares of one rate
        assert float(row["tokens_per_s"]) == pytest.approx(64e3 / float(row["ms"]), rel=2e-3)
        model = dataclasses.replace(PRESETS["debug"], num_hidden_layers=int(row["layers"]))
        ratio = FORMULAS["causal"].per_token(model, 32) / flops_per_token(model, 32)
        assert float(row["mfu_causal"]) == pytest.approx(ratio * float(row["mfu_palm"]), rel=2e-3)


def test_the_page_has_the_depth_and_the_formulas(folder: Path) -> None:
    page = (folder / "step.md").read_text(encoding="utf-8")
    assert "## 1 layers, 1 x 2 rows of 32, float32, activation checkpoint none" in page
    assert all(f"`{name}`: {formula.meaning}" in page for name, formula in FORMULAS.items())
    assert "without liger-kernel, whose kernels need a GPU" in page
    assert (folder / "step.png").read_bytes().startswith(b"\x89PNG")


def test_the_reference_is_the_llama_of_transformers() -> None:
    """The same weights, ids and targets: the same logits, and loss."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = plain_llama.Llama(TINY)
    other = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=TINY.vocab_size,
            hidden_size=TINY.hidden_size,
            intermediate_size=TINY.intermediate_size,
            num_hidden_layers=TINY.num_hidden_layers,
            num_attention_heads=TINY.num_attention_heads,
            num_key_value_heads=TINY.num_key_value_heads,
            head_dim=TINY.attention_head_dim,
            rms_norm_eps=TINY.rms_norm_eps,
            attention_bias=True,
            tie_word_embeddings=True,
        )
    )
    names = {"blocks": "model.layers", "attention": "self_attn", "attention_norm": "input_layernorm"}
    names |= {"mlp_norm": "post_attention_layernorm", "embedding": "model.embed_tokens", "norm": "model.norm"}
    names |= {name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    state = {".".join(names.get(part, part) for part in key.split(".")): v for key, v in model.state_dict().items()}
    state["lm_head.weight"] = state.pop("head.weight")
    missing = other.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all(key.endswith("o_proj.bias") for key in missing.missing_keys)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.self_attn.o_proj.bias.zero_()
        ids = torch.randint(TINY.vocab_size, (2, 17))
        torch.testing.assert_close(model(ids), other(ids).logits, rtol=1e-4, atol=1e-5)
        loss = plain_llama.cross_entropy(model(ids)[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
        torch.testing.assert_close(loss, other(ids, labels=ids).loss)


@pytest.mark.parametrize("selective", [False, True], ids=["full", "selective"])
def test_what_the_reference_recomputes_changes_no_gradient(selective: bool) -> None:
    def gradients(recompute: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = plain_llama.Llama(TINY)
        for block in model.blocks if recompute else ():
            plain_llama._recompute(block, selective)
        ids = torch.randint(TINY.vocab_size, (2, 9))
        plain_llama.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0, atol=0)


def test_without_wesar_is_a_configuration() -> None:
    plain = without_wesar(PRESETS["yulan_mini_2b"])
    assert plain.check() == [] and not plain.wesar
    config = run_config(plain, 4096, 2, 3, "bfloat16", "selective", True)
    assert config.phases[0].batch.rows(4096) == 6 and config.compile.enabled


def test_a_line_through_two_depths() -> None:
    assert results.extrapolate([(4, 30.0), (8, 50.0)], 56) == pytest.approx((5.0, 10.0, 290.0))
    assert results.extrapolate([(1, 3.0), (2, 5.0), (3, 7.0)], 4) == pytest.approx((2.0, 1.0, 9.0))
    assert results.extrapolate([(8, 50.0)], 56) is None


def test_the_whole_depth_is_extrapolated_where_it_was_not_measured() -> None:
    machine = results.Machine("a GPU", 1.0, 1.0, *[""] * 8)
    setting = results.Setting(PRESETS["yulan_mini_2b"], "yulan_mini_2b", 989e12, "data sheet", "", machine)

    def row(name: str, layers: int, ms: float) -> results.Row:
        return dataclasses.replace(
            ROW, implementation=name, layers=layers, sequence_length=4096, ms=ms, tokens_per_s=1.0
        )

    rows = [row("ours", 4, 100.0), row("ours", 8, 120.0), row("reference", 4, 100.0), row("reference", 8, 126.0)]
    page = results.markdown(setting, [*rows, row("hf_liger", 4, 9.0), row("hf_liger", 8, 8.0)])
    # 80 + 56 x 5 and 74 + 56 x 6.5 milliseconds for 3 x 2 rows of 4,096
    assert "| ours, eager, 3 x 2 rows of 4096, none | 4, 8 | 5 | 80 | 360 | 68267 | 1 | 154.8% |" in page
    assert "| reference, eager, 3 x 2 rows of 4096, none | 4, 8 | 6.5 | 74 | 438 | 56110 | 1.217 |" in page
    assert "| 4, 8 | not above 0: noise |" in page
    assert "Extrapolated" not in results.markdown(setting, [*rows[:2], row("ours", 56, 400.0)])


def test_a_ratio_is_that_of_turns_beside_each_other() -> None:
    """The machine gets slower by the half; who came late is not punished."""
    ours = dataclasses.replace(ROW, turns_ms=(10.0, 20.0, 20.0))
    peer = dataclasses.replace(ROW, implementation="reference", turns_ms=(12.0, 24.0))
    assert results.ratio(peer, [ours, peer]) == pytest.approx(1.2)
    compiled = dataclasses.replace(ROW, compiled=True, turns_ms=(6.0, 12.0))
    assert results.ratio(dataclasses.replace(peer, compiled=True), [ours, compiled]) == pytest.approx(2.0)
    assert results.ratio(peer, [peer]) is None


def test_packages_of_wheels_come_behind_those_that_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "made_up-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("made_up_peer.py", "ANSWER = 42\n")
        wheel.writestr("torch/__init__.py", "raise ImportError('not this one')\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "made_up_peer", raising=False)
    train_step.use_wheels(tmp_path, tmp_path / "unpacked")
    import made_up_peer  # type: ignore[import-not-found]

    assert made_up_peer.ANSWER == 42
    found = PathFinder.find_spec("torch", sys.path)
    assert found is not None and found.origin == torch.__file__


@pytest.mark.parametrize(
    "words", [["--impl", "theirs"], ["--layers", "4,0"], ["--compile", "maybe"], ["--activation-checkpoint", "some"]]
)
def test_mistakes_on_the_command_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_step.read_arguments(words)
    assert words[0] in capsys.readouterr().err


def test_attention_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ways that run agree with each other; one that needs a GPU is told and ends nothing."""
    words = ["--seq-len", "16,32", "--head-dim", "8", "--impl", "default,math,efficient", "--samples", "1"]
    assert attention.main([*words, "--out", str(tmp_path)]) == 0
    with open(tmp_path / "attention.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    status = {(row["sequence_length"], row["implementation"]): row["status"] for row in rows}
    assert all(status[length, name] == "measured" for length in ("16", "32") for name in ("default", "math"))
    assert all(status[length, "efficient"].startswith("failed: RuntimeError") for length in ("16", "32"))
    assert "| 32 | math |" in (tmp_path / "attention.md").read_text(encoding="utf-8")
