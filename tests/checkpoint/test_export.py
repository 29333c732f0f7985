"""Checkpoints as Hugging Face folders: against transformers, bit for bit through our importer, and what is refused."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.checkpoint.exporting import YULAN, random_state, write_checkpoint, write_sharded, write_vocabulary
from tests.checkpoint.hugging_face_folders import LLAMA, write_llama
from tests.distributed.ranks import run_ranks
from titan_yulan.checkpoint import export as exporting
from titan_yulan.checkpoint import fold
from titan_yulan.checkpoint.export import export, parse_size
from titan_yulan.checkpoint.exported_state import has_state, open_exported_state
from titan_yulan.checkpoint.hugging_face import open_hugging_face, parameter_shapes
from titan_yulan.checkpoint.hugging_face_weights import load_hugging_face
from titan_yulan.checkpoint.universal_state import load_universal
from titan_yulan.cli import main
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import OptimizerSection
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import RunError, UserError
from titan_yulan.model import Decoder
from titan_yulan.optimizer.adamw import build_adamw, optimizer_state

transformers = pytest.importorskip("transformers")

UNTIED = replace(YULAN, tie_word_embeddings=False, embedding_scale=1.0)
MINICPM = replace(
    YULAN,
    wesar=False,
    attention_bias=False,
    embedding_scale=12.0,
    norm_scale=1.3,
    attention_base_width=1,
    logits_base_width=8,
    residual_scale=0.4,
)
GEMMA = replace(YULAN, rms_norm_style="gemma", norm_alphas=False, embedding_scale=1.0)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "words.tiktoken"
    write_vocabulary(path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, vocabulary: Path) -> Path:
    folder = tmp_path_factory.mktemp("run") / "mine"
    write_checkpoint(folder, YULAN, random_state(YULAN), vocabulary, rope_theta=49000.0)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


# --- a Llama ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [YULAN, UNTIED, MINICPM, GEMMA], ids=["yulan", "untied", "minicpm", "gemma"])
def test_every_scale_is_folded_into_a_llama(tmp_path: Path, vocabulary: Path, model: ModelConfig) -> None:
    state = random_state(model)
    lines: list[str] = []
    path = write_checkpoint(tmp_path / "run", model, state, vocabulary, rope_theta=49000.0)
    export(path, tmp_path / "llama", "llama", report=lines.append)
    assert lines[-3].startswith("verified: tokenizer.json gives the same ids")
    assert lines[-2].startswith("verified: transformers") and lines[-1] == f"{tmp_path / 'llama'}: written"
    assert not (tmp_path / "llama.partial").exists()
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float64).eval()
    decoder = Decoder(model).double()
    decoder.load_state_dict(state)
    decoder.set_rope_theta(49000.0)
    rows = torch.randint(model.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = decoder(rows)
        difference = (peer(rows).logits - expected).abs().max() / expected.abs().max()
    assert difference < 1e-6  # transformers computes norms and softmax in float32 whatever the model's type


def test_what_the_files_say_of_the_model(tmp_path: Path, run: Path, vocabulary: Path) -> None:
    export(run, tmp_path / "llama", "llama", dtype="bfloat16")
    tokenizer = Tokenizer.load(vocabulary)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "llama")
    assert (config.model_type, config.architectures, config.dtype) == ("llama", ["LlamaForCausalLM"], torch.bfloat16)
    assert config.rope_parameters == {"rope_theta": 49000.0, "rope_type": "default"}
    assert (config.attention_bias, config.mlp_bias, config.tie_word_embeddings) == (True, False, False)
    assert (config.eos_token_id, config.bos_token_id) == (tokenizer.eos_id, None)
    assert (config.head_dim, config.max_position_embeddings, config.rms_norm_eps) == (8, 64, 1e-6)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "llama")
    assert generation.eos_token_id == tokenizer.eos_id
    tensors = stored(tmp_path / "llama")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(not tensors[f"model.layers.{i}.self_attn.o_proj.bias"].any() for i in range(2))
    assert torch.equal(tensors["lm_head.weight"], random_state(YULAN)["model.embed_tokens.weight"].bfloat16())
    with safe_open(tmp_path / "llama" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("shard_size", ["2KB", "20KB"])
def test_files_are_no_larger_than_asked_for(tmp_path: Path, run: Path, shard_size: str) -> None:
    export(run, tmp_path / "llama", "llama", shard_size=shard_size)
    index = json.loads((tmp_path / "llama" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "llama").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    total = 0
    for file in files:
        tensors = load_file(tmp_path / "llama" / file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= parse_size(shard_size) or len(tensors) == 1
        assert {index["weight_map"][name] for name in tensors} == {file}
        total += size
    assert index["metadata"] == {"total_size": total}


@pytest.mark.parametrize("bias", [False, True], ids=["no biases", "biases"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_llama_comes_back_to_the_bit(tmp_path: Path, vocabulary: Path, tied: bool, bias: bool) -> None:
    model = replace(LLAMA, vocab_size=330, attention_bias=bias, tie_word_embeddings=tied)
    write_llama(tmp_path / "theirs", model)
    parameters = {name: torch.empty(shape) for name, shape in parameter_shapes(model).items()}
    load_hugging_face(open_hugging_face(tmp_path / "theirs"), parameters)
    write_checkpoint(tmp_path / "run", model, parameters, vocabulary)
    export(tmp_path / "run", tmp_path / "back", "llama", shard_size="30KB")
    theirs, back = stored(tmp_path / "theirs"), stored(tmp_path / "back")
    assert theirs.keys() == back.keys() and ("lm_head.weight" in back) != tied
    assert all(torch.equal(theirs[name].view(torch.int32), back[name].view(torch.int32)) for name in theirs)
    configs = [transformers.AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("theirs", "back")]
    own = {"_name_or_path", "bos_token_id", "eos_token_id", "initializer_range", "max_position_embeddings"}
    assert {key for key in configs[0] if configs[0][key] != configs[1][key]} <= own


# --- YuLan-Mini's own format -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [YULAN, UNTIED, replace(YULAN, qk_layer_norm=True, embedding_norm="rms_norm")])
def test_yulan_comes_back_to_the_bit(tmp_path: Path, vocabulary: Path, model: ModelConfig) -> None:
    state = random_state(model)
    write_checkpoint(tmp_path / "run", model, state, vocabulary, rope_theta=49000.0)
    lines: list[str] = []
    export(tmp_path / "run", tmp_path / "yulan", "yulan", shard_size="20KB", report=lines.append)
    assert lines[-2] == f"verified: {len(state)} tensors, read again, are the checkpoint's to the bit"
    opened = open_hugging_face(tmp_path / "yulan")
    assert opened.model.rope_theta == 49000.0
    parameters = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    load_hugging_face(opened, parameters)
    assert all(torch.equal(parameters[name].view(torch.int32), state[name].view(torch.int32)) for name in state)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored(tmp_path / "yulan").items()}
    assert shapes["model.layers.1.self_attn.q_proj_alpha"] == (1,)
    assert {shapes[name] for name in ("model.layers.0.gate_up_proj_alpha", "model.norm_alpha", "lm_head_alpha")} == {()}


def test_scalars_and_norms_keep_float32(tmp_path: Path, run: Path) -> None:
    export(run, tmp_path / "yulan", "yulan", dtype="float16")
    for name, tensor in stored(tmp_path / "yulan").items():
        assert tensor.dtype == (torch.float32 if "norm" in name or "alpha" in name else torch.float16), name


def test_a_checkpoint_of_two_ranks_with_uneven_shares(tmp_path: Path, vocabulary: Path) -> None:
    model = replace(YULAN, vocab_size=331)
    run_ranks(write_sharded, 2, tmp_path / "run", model, vocabulary)
    assert len(list(tmp_path.rglob("*.distcp"))) == 2
    export(tmp_path / "run", tmp_path / "yulan", "yulan")
    written, state = stored(tmp_path / "yulan"), random_state(model)
    assert all(torch.equal(written[name].view(-1), tensor.view(-1)) for name, tensor in state.items())
    assert written.keys() == state.keys()


def step(decoder: Decoder, optimizer: torch.optim.AdamW, seed: int) -> None:
    """One update on random rows."""
    rows = torch.randint(330, (2, 12), generator=torch.Generator().manual_seed(seed))
    torch.nn.functional.cross_entropy(decoder(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def trainable(state: dict[str, torch.Tensor]) -> tuple[Decoder, torch.optim.AdamW]:
    decoder = Decoder(YULAN)
    decoder.load_state_dict(state)
    return decoder, build_adamw(decoder, YULAN, OptimizerSection(learning_rate=0.01))


def test_the_next_update_after_an_export_with_the_optimizer_is_the_same(tmp_path: Path, vocabulary: Path) -> None:
    decoder, optimizer = trainable(random_state(YULAN))
    for seed in range(3):
        step(decoder, optimizer, seed)
    state = optimizer_state(decoder, optimizer)
    write_checkpoint(tmp_path / "run", YULAN, dict(decoder.state_dict()), vocabulary, state)
    lines: list[str] = []
    export(tmp_path / "run", tmp_path / "a", "yulan", with_optimizer=True, shard_size="20KB", report=lines.append)
    assert lines[-2] == "verified: the moments too, after 3 updates"
    assert has_state(tmp_path / "a") and not has_state(tmp_path / "run")
    folder = open_exported_state(tmp_path / "a")
    assert (folder.progress.step, folder.progress.tokens, folder.progress.trained) == (3, 3 * 128, 3)
    other, others = trainable(random_state(YULAN, seed=7))
    load_universal(folder, dict(other.named_parameters()), optimizer_state(other, others))
    step(decoder, optimizer, 3)
    step(other, others, 3)
    for (name, parameter), expected in zip(other.named_parameters(), decoder.parameters(), strict=True):
        assert torch.equal(parameter, expected), name
    for name, tensor in optimizer_state(other, others).items():
        assert torch.equal(tensor, optimizer_state(decoder, optimizer)[name]), name


def test_an_optimizer_that_cannot_be_exported_is_told(tmp_path: Path, run: Path, vocabulary: Path) -> None:
    with pytest.raises(UserError, match="--with-optimizer goes with --format yulan --dtype float32"):
        export(run, tmp_path / "a", "llama", with_optimizer=True)
    with pytest.raises(UserError, match="--with-optimizer goes with --format yulan --dtype float32"):
        export(run, tmp_path / "a", "yulan", dtype="bfloat16", with_optimizer=True)
    with pytest.raises(UserError, match=r"--with-optimizer: .* has no model.embed_tokens.weight.exp_avg of the right"):
        export(run, tmp_path / "a", "yulan", with_optimizer=True)
    state = optimizer_state(*trainable(random_state(YULAN)))
    state["model.norm.weight.step"].fill_(2)
    write_checkpoint(tmp_path / "run", YULAN, random_state(YULAN), vocabulary, state)
    with pytest.raises(RunError, match=r"Adam has updated its parameters \[0, 2\] times, not alike"):
        export(tmp_path / "run", tmp_path / "a", "yulan", with_optimizer=True)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


# --- what is not written ---------------------------------------------------------------------------------------------


def damage(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (damage("__0_0.distcp", lambda b: b[:-9]), r"__0_0.distcp has \d+ bytes instead of \d+"),
    "flipped": (damage("__0_0.distcp", lambda b: b[:-1] + bytes([b[-1] ^ 1])), "__0_0.distcp is damaged"),
    "missing": (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, vocabulary: Path, name: str) -> None:
    path = write_checkpoint(tmp_path / "run", YULAN, random_state(YULAN), vocabulary)
    spoil, message = DAMAGED[name]
    spoil(path)
    with pytest.raises(RunError, match=f"{re.escape(str(path))} is damaged: .*{message}.*name an older step folder"):
        export(path, tmp_path / "llama", "llama")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"model.norm.weight": torch.ones(23)}), r"model.norm.weight has the shape \(23,\) instead"),
        (lambda t: t.pop("lm_head_alpha"), "lm_head_alpha is missing"),
    ],
)
def test_a_tensor_of_another_model_is_named(
    tmp_path: Path, vocabulary: Path, change: Callable[[dict], Any], message: str
) -> None:
    tensors = random_state(YULAN)
    change(tensors)
    path = write_checkpoint(tmp_path / "run", YULAN, tensors, vocabulary)
    with pytest.raises(RunError, match=f"does not hold the model of its config.toml: {message}"):
        export(path, tmp_path / "llama", "llama")


def test_what_no_llama_can_say_is_refused_with_the_reason(tmp_path: Path, vocabulary: Path) -> None:
    model = replace(YULAN, qk_layer_norm=True, embedding_norm="layer_norm")
    path = write_checkpoint(tmp_path / "run", model, random_state(model), vocabulary)
    with pytest.raises(UserError) as caught:
        export(path, tmp_path / "llama", "llama")
    for part in ("model.qk_layer_norm = true", "model.embedding_norm = 'layer_norm'", "Use --format yulan"):
        assert part in str(caught.value)
    model = replace(YULAN, rms_norm_style="hugging_face")
    path = write_checkpoint(tmp_path / "llama run", model, random_state(model), vocabulary)
    with pytest.raises(UserError, match=r"model.rms_norm_style = 'hugging_face' has no value"):
        export(path, tmp_path / "yulan", "yulan")
    assert {file.name for file in tmp_path.iterdir()} == {"run", "llama run"}


def test_values_beyond_float16_are_named(tmp_path: Path, vocabulary: Path) -> None:
    state = random_state(YULAN)
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    write_checkpoint(tmp_path / "run", YULAN, state, vocabulary)
    with pytest.raises(UserError, match=r"--dtype: model.layers.1.mlp.up_proj.weight has values beyond the range of"):
        export(tmp_path / "run", tmp_path / "llama", "llama", dtype="float16")
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_a_place_that_is_taken_is_left_alone(tmp_path: Path, run: Path) -> None:
    for name in ("llama", "other.partial"):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=f"--output: .*{name} exists; delete it or choose another"):
            export(run, tmp_path / name.removesuffix(".partial"), "llama")
        assert list((tmp_path / name).iterdir()) == []


def test_a_disk_that_is_too_small_is_told_and_left_clean(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"^--output: .*s3://"):
        export(run, Path("s3://bucket/llama"), "llama")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "write_tokenizer", full)
        with pytest.raises(RunError, match=r"--output: .*llama was not written: .* No space left on device"):
            export(run, tmp_path / "llama", "llama")
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=f"--output: the disk of {tmp_path} has 1,000 bytes free, and the tensors take"):
        export(run, tmp_path / "new" / "llama", "llama")
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_than_the_run_s_is_refused(tmp_path: Path) -> None:
    words = tmp_path / "words.tiktoken"
    write_vocabulary(words)
    write_checkpoint(tmp_path / "run", YULAN, random_state(YULAN), words)
    write_vocabulary(words, 300)
    with pytest.raises(UserError, match=r"words.tiktoken is not the tokenizer that .*step-00000003 was trained with"):
        export(tmp_path / "run", tmp_path / "llama", "llama")


def test_an_export_that_is_not_the_model_is_not_kept(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = fold.llama_targets

    def forgetful(model: ModelConfig, scalars: Any) -> dict[str, fold.Target]:
        return genuine(model, scalars | {"model.layers.1.down_proj_alpha": 1.0})

    monkeypatch.setattr(exporting.fold, "llama_targets", forgetful)
    with pytest.raises(RunError, match=r"the export is not the model: transformers .* is taken for float32$"):
        export(run, tmp_path / "llama", "llama")
    monkeypatch.setattr(
        exporting.fold, "llama_targets", lambda *a: {n: t for n, t in genuine(*a).items() if n != "model.norm.weight"}
    )
    with pytest.raises(RunError, match=r"transformers does not load the export .*missing_keys.*model.norm.weight"):
        export(run, tmp_path / "llama", "llama")
    assert list(tmp_path.iterdir()) == []


def test_without_the_packages_it_says_so(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tokenizers" else find(name))
    lines: list[str] = []
    export(run, tmp_path / "llama", "llama", report=lines.append)
    assert lines[-3].startswith("NOT VERIFIED: the package tokenizers") and "pip install" in lines[-3]
    assert lines[-2].startswith("NOT VERIFIED: the package transformers") and "pip install" in lines[-2]
    assert (tmp_path / "llama" / "model.safetensors").is_file()


def test_the_command(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = str(run / "checkpoints" / "step-00000003")
    arguments = ["checkpoint", "export", "--checkpoint", step, "--format", "llama", "--output", str(tmp_path / "a")]
    assert main([*arguments, "--dtype", "bfloat16", "--no-verify"]) == 0
    assert "NOT VERIFIED: left out by --no-verify" in capsys.readouterr().out
    assert main(arguments) == 2
    assert f"ERROR: --output: {tmp_path / 'a'} exists" in capsys.readouterr().err
    assert main([*arguments[:-1], str(tmp_path / "b"), "--shard-size", "5"]) == 2
    assert "--shard-size '5' is no size; write it like 5GB" in capsys.readouterr().err
