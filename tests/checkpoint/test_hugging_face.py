"""Folders of Hugging Face's format: what is read, and every reason to refuse one. On ranks: test_continuity.py."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoint.hugging_face_folders import LLAMA, YULAN, run_config, write_llama, write_yulan
from titan_yulan.checkpoint.hugging_face import (
    HuggingFaceFolder,
    check_hugging_face,
    is_hugging_face,
    open_hugging_face,
    parameter_shapes,
)
from titan_yulan.checkpoint.hugging_face_weights import load_hugging_face
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.presets import PRESETS
from titan_yulan.errors import RunError, UserError
from titan_yulan.model import Decoder

IDS = torch.randint(37, (2, 11), generator=torch.Generator().manual_seed(4))


def loaded(folder: HuggingFaceFolder, model: ModelConfig) -> Decoder:
    assert check_hugging_face(run_config(model), folder) == []
    decoder = Decoder(model)
    load_hugging_face(folder, dict(decoder.named_parameters()))
    return decoder


@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["one file", "an index"])
def test_a_llama_gives_the_logits_of_transformers(tmp_path: Path, shard: str) -> None:
    peer = write_llama(tmp_path, LLAMA, shard=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    assert is_hugging_face(tmp_path)
    decoder = loaded(open_hugging_face(tmp_path), LLAMA)
    with torch.no_grad():
        expected = peer(IDS).logits
        difference = (decoder(IDS) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_16_bits_are_widened_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    model = replace(LLAMA, attention_bias=True, tie_word_embeddings=True)
    peer = write_llama(tmp_path, model, dtype)
    decoder = loaded(open_hugging_face(tmp_path), model)  # with biases of o_proj, all zero, and without a head
    state = peer.state_dict()
    for name, parameter in decoder.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, state[name]), name


@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": False, "embedding_scale": 1.0}], ids=["tied", "untied"])
def test_yulan_mini_keeps_its_scalars(tmp_path: Path, change: dict[str, Any]) -> None:
    model = replace(YULAN, **change)
    state = write_yulan(tmp_path / "weights", model)
    decoder = loaded(open_hugging_face(tmp_path / "weights"), model)
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, state[name]), name
    assert {tuple(state[name].shape) for name in state if name.endswith("_alpha")} == {(1,)}


@pytest.mark.parametrize(
    "model",
    [
        *PRESETS.values(),
        replace(LLAMA, attention_bias=True, tie_word_embeddings=True),
        replace(YULAN, qk_layer_norm=True, embedding_norm="layer_norm", norm_alphas=False),
    ],
)
def test_the_table_of_parameters_is_the_decoder(model: ModelConfig) -> None:
    with torch.device("meta"):
        decoder = Decoder(replace(model, num_hidden_layers=2))
    expected = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    assert parameter_shapes(replace(model, num_hidden_layers=2)) == expected


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "weights"
    write_llama(path, LLAMA)
    return path


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "weights"))


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_every_difference_of_the_model_is_listed_as_it_is_to_be_written(folder: Path) -> None:
    ours = replace(
        LLAMA,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        attention_bias=True,
        head_dim=None,
        num_attention_heads=2,
        residual_scale=None,
        # how it is trained and computed is no difference
        initializer_range=0.5,
        scalar_precision="compute",
        kernels="reference",
        max_position_embeddings=9,
    )
    with pytest.raises(UserError) as caught:
        check_hugging_face(run_config(ours), open_hugging_face(folder))
    assert str(caught.value).splitlines()[1:-1] == [
        "  num_attention_heads = 6  # found 2",
        "  head_dim = 6  # found 15",
        "  rms_norm_eps = 1e-05  # found 1e-06",
        "  rope_theta = 500000.0  # found 10000.0",
        "  attention_bias = false  # found true",
        f"  residual_scale = 1.0  # found {1.4 / 3**0.5}",
    ]
    assert "config.json is of another model than [model]" in str(caught.value)
    assert "--allow-change model.KEY" in str(caught.value)


def test_widths_that_change_the_scale_of_scores_and_logits_are_told(tmp_path: Path) -> None:
    write_yulan(tmp_path / "weights", replace(YULAN, attention_base_width=1, logits_base_width=7))
    with pytest.raises(UserError) as caught:
        check_hugging_face(run_config(YULAN), open_hugging_face(tmp_path / "weights"))
    lines = ["  attention_base_width = 1  # found 'none'", "  logits_base_width = 7  # found 'none'"]
    assert str(caught.value).replace('"', "'").splitlines()[1:-1] == lines


def test_a_difference_that_was_decided_passes(folder: Path) -> None:
    opened = open_hugging_face(folder)
    other = replace(LLAMA, rms_norm_eps=1e-6)
    assert check_hugging_face(run_config(other), opened, ["model.rms_norm_eps"]) == []
    longer = replace(LLAMA, rope_theta=10000.0)
    assert check_hugging_face(run_config(longer, rope_theta=2e6), opened) == []


def test_every_wrong_tensor_is_listed(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.extra.weight"] = tensors.pop("model.norm.weight")
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].T.contiguous()
        tensors["model.layers.2.self_attn.rotary_emb.inv_freq"] = torch.ones(3)  # of an older version: says nothing

    edit_tensors(folder, spoil)
    with pytest.raises(UserError) as caught:
        check_hugging_face(run_config(LLAMA), open_hugging_face(folder))
    assert str(caught.value).splitlines()[1:-1] == [
        "  1 missing: model.norm.weight",
        "  1 that the model has not: model.layers.0.extra.weight",
        "  1 of another shape: model.layers.1.mlp.up_proj.weight (30, 42) instead of (42, 30)",
    ]


def test_a_bias_of_o_proj_that_is_not_zero_is_refused(tmp_path: Path) -> None:
    model = replace(LLAMA, attention_bias=True)
    write_llama(tmp_path, model, torch.bfloat16)
    name = "model.layers.1.self_attn.o_proj.bias"
    edit_tensors(tmp_path, lambda tensors: tensors[name][3:4].fill_(0.5))
    with pytest.raises(UserError, match=f"1 that the model has not: {name}"):
        check_hugging_face(run_config(model), open_hugging_face(tmp_path))


def remove(*names: str) -> Callable[[Path], Any]:
    return lambda folder: [(folder / name).unlink() for name in names]


def rename(old: str, new: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / old).rename(folder / new)


def write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def index(places: dict[str, str]) -> Callable[[Path], Any]:
    return write("model.safetensors.index.json", json.dumps({"weight_map": places}))


def eight_bits(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = torch.ones(37, 30, dtype=torch.int8)

    edit_tensors(folder, change)


LLAMA_31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "broken config": (write("config.json", "{"), "config.json cannot be read .* download it again"),
    "list as config": (write("config.json", "[]"), "config.json holds no JSON object"),
    "another type": (
        lambda f: edit_config(f, model_type="qwen2"),
        "type 'qwen2'; llama, yulanmini, miniyulan can",
    ),
    "Llama 3.1": (lambda f: edit_config(f, rope_scaling=LLAMA_31), "config.json: published key 'rope_scaling'"),
    "Llama 3.1, transformers 5": (
        lambda f: edit_config(f, rope_parameters=LLAMA_31 | {"rope_theta": 5e5}),
        "config.json: published key 'rope_parameters' .*: only rope_type 'default' is supported",
    ),
    "biases in the MLP": (lambda f: edit_config(f, mlp_bias=True), "published key 'mlp_bias' = True is not supported"),
    "a pickle that is none": (rename("model.safetensors", "pytorch_model.bin"), "pytorch_model.bin is damaged"),
    "no weights": (remove("model.safetensors"), "has a config.json and no weights"),
    "no index": (rename("model.safetensors", "model-00001-of-00002.safetensors"), "has neither model.safetensors nor"),
    "a file too few": (index({"a": "model.safetensors", "b": "c.safetensors"}), "lacks c.safetensors, named in model"),
    "a tensor elsewhere": (index({"a": "model.safetensors"}), "model.safetensors lacks a, which its index says"),
    "a path out": (index({"a": "../model.safetensors"}), "index.json has no table weight_map of files"),
    "truncated": (truncate, "model.safetensors is damaged or incomplete .*; download or copy it again"),
    "quantised": (eight_bits, "holds tensors of type I8; F32, BF16, F16 can be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_cannot_be_read_is_refused_with_the_remedy(folder: Path, name: str) -> None:
    spoil, message = REFUSED[name]
    spoil(folder)
    assert is_hugging_face(folder)
    with pytest.raises(UserError, match=message):
        open_hugging_face(folder)


def test_a_tied_model_may_come_with_its_head_and_with_no_other(tmp_path: Path) -> None:
    model = replace(LLAMA, tie_word_embeddings=True)
    write_llama(tmp_path, model)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    loaded(open_hugging_face(tmp_path), model)
    edit_tensors(tmp_path, lambda t: t["lm_head.weight"][36, 29:].fill_(9.0))
    with pytest.raises(
        RunError, match=r"cannot be loaded: model.tie_word_embeddings is true, and its lm_head.weight is"
    ):
        loaded(open_hugging_face(tmp_path), model)


def test_a_file_that_is_lost_while_loading_is_named(folder: Path) -> None:
    opened = open_hugging_face(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"weights cannot be loaded: .*model.safetensors"):
        load_hugging_face(opened, dict(Decoder(LLAMA).named_parameters()))


def test_another_vocabulary_than_the_folder_s_is_told(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    config = run_config(LLAMA)
    lines = check_hugging_face(config, open_hugging_face(folder))
    assert len(lines) == 1 and lines[0].startswith(f"WARNING: {folder} comes with tokenizer.json")
    same = tmp_path / "tokenizer.json"
    same.write_text("{}")
    for path in (same, folder):  # a folder stands for the file in it
        config = replace(config, tokenizer=replace(config.tokenizer, path=str(path)))
        assert check_hugging_face(config, open_hugging_face(folder)) == []


def test_our_own_checkpoints_are_no_such_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_hugging_face(folder.parent)
    assert not is_hugging_face(folder / "nothing there")
    monkeypatch.chdir(folder)
    assert is_hugging_face(".") and not is_hugging_face("")  # a key that is not set


def test_an_environment_without_safetensors_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"^the package safetensors is missing, .* pip install"):
        open_hugging_face(folder)
