"""A folder in Hugging Face's format as the start of a run: what is in it, and whether it is the model of `[model]`.

    config.json                          the model, under the names that `config/published.py` knows
    model.safetensors                    its tensors, or
    model.safetensors.index.json         which of several .safetensors files holds which tensor
    pytorch_model.bin[.index.json]       the same in files of `torch.save`, where there are no .safetensors

Llama models and the training format of YuLan-Mini (github.com/RUC-GSAI/YuLan-Mini) are read; the tensors' names are the
decoder's own. No torch here: the launcher tells in a second what does not fit. `hugging_face_weights.py` reads tensors.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_yulan.checkpoint.pickled import PickledTensor, content_is_zero, read_pickle
from titan_yulan.config.model import ATTENTION_ALPHAS, BLOCK_NORM_ALPHAS, MLP_ALPHAS, ModelConfig
from titan_yulan.config.sections import RunConfig
from titan_yulan.config.show import toml_value
from titan_yulan.errors import UserError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLE = "pytorch_model.bin"
_PICKLE_INDEX = "pytorch_model.bin.index.json"
_TOKENIZER = "tokenizer.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

_MODEL_TYPES = ("llama", "yulanmini", "miniyulan")  # the last is what YuLan-Mini's stable phases were published as
_TYPES = ("F32", "BF16", "F16")
_SHOWN = 12  # names in one message

# What says how a model is initialised, trained or computed, not which function its weights are.
_NOT_COMPARED = frozenset(
    """
    max_position_embeddings embedding_gradient_scale scalar_precision kernels alpha_base_width initializer_range
    initialization initialization_base_width output_init_divisor lm_head_base_width embedding_initializer_range
    norm_alpha lm_head_alpha
    """.split()
).union(ATTENTION_ALPHAS, MLP_ALPHAS, BLOCK_NORM_ALPHAS)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies; `dtype` is one of safetensors' names, such as "BF16", `key` its name in the file (of
    `torch.save`: empty, if it is all that the file holds)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    key: str = ""


@dataclass(frozen=True)
class HuggingFaceFolder:
    """What a folder holds: the model of its config.json, and its tensors by name."""

    path: Path
    model: ModelConfig
    tensors: Mapping[str, StoredTensor]


def is_hugging_face(path: str | Path) -> bool:
    """Whether `[phase] start_from` names a folder of this format (our own checkpoints have no config.json)."""
    return path != "" and (Path(path) / CONFIG).is_file()


def open_hugging_face(path: str | Path) -> HuggingFaceFolder:
    """Read config.json and the headers of the weights' files.

    Raises:
        UserError: the format or the model is not supported, or a file is missing or damaged; with the remedy.
    """
    path = Path(path)
    return HuggingFaceFolder(path, read_model(path / CONFIG), _read_headers(path))


def read_model(file: Path) -> ModelConfig:
    """The model of a config.json.

    Raises:
        UserError: it cannot be read, or the model is not supported (rotary scaling, biases in the MLP, another type).
    """
    values = read_json(file)
    kind = values.get("model_type", "llama")
    if kind not in _MODEL_TYPES:
        raise UserError(f"{file} describes a model of type {kind!r}; {', '.join(_MODEL_TYPES)} can be read")
    try:
        return ModelConfig.from_published(values)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: the file cannot be read, or holds no JSON object.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no JSON object; download it again")
    return values


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """
    Raises:
        OSError: the disk is full, and the like.
    """
    file.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _read_headers(path: Path) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file, promised in _weight_files(path).items():
        found = _read_header(file)
        if absent := sorted(promised - found.keys()):
            raise UserError(f"{file} lacks {_listed(absent)}, which its index says it holds")
        # a file may hold more than the index takes from it
        tensors |= {name: tensor for name, tensor in found.items() if not promised or name in promised}
    check_types(path, tensors)
    return tensors


def check_types(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """
    Raises:
        UserError: a tensor is of a type that is not read.
    """
    if other := sorted({tensor.dtype for tensor in tensors.values()} - set(_TYPES)):
        raise UserError(
            f"{path} holds tensors of type {', '.join(other)}; {', '.join(_TYPES)} can be read: take "
            "weights that are not quantised"
        )


def _weight_files(path: Path) -> dict[Path, set[str]]:
    """The files of the weights, with the names that the index promises of each (empty without an index)."""
    for whole, index, parts in ((WEIGHTS, INDEX, "*.safetensors"), (_PICKLE, _PICKLE_INDEX, "pytorch_model*.bin")):
        if (path / index).is_file():
            return _indexed_files(path / index)
        if (path / whole).is_file():
            return {path / whole: set()}
        if any(path.glob(parts)):
            raise UserError(f"{path} has neither {whole} nor {index}; download it too")
    raise UserError(f"{path} has a {CONFIG} and no weights ({WEIGHTS} or {_PICKLE}); download them too")


def _indexed_files(index: Path) -> dict[Path, set[str]]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(_is_name(place) for place in places.values()):
        raise UserError(f"{index} has no table weight_map of files; download it again")
    files: dict[Path, set[str]] = {}
    for name, place in places.items():
        files.setdefault(index.parent / place, set()).add(name)
    if absent := sorted(file.name for file in files if not file.is_file()):
        raise UserError(f"{index.parent} lacks {_listed(absent)}, named in {index.name}; finish the download")
    return files


def _is_name(place: Any) -> bool:
    return isinstance(place, str) and bool(place) and Path(place).name == place


def _read_header(file: Path) -> dict[str, StoredTensor]:
    return _read_safetensors_header(file) if file.suffix == ".safetensors" else _read_pickle_header(file)


def _read_safetensors_header(file: Path) -> dict[str, StoredTensor]:
    try:
        from safetensors import SafetensorError, safe_open  # few runs need it, and not every environment has it
    except ImportError:
        raise UserError(f"the package safetensors is missing, which reads {file}; pip install safetensors") from None
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return {n: StoredTensor(file, tuple(s.get_shape()), str(s.get_dtype()), n) for n, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is damaged or incomplete ({error}); download or copy it again") from error


def _read_pickle_header(file: Path) -> dict[str, StoredTensor]:
    content = read_pickle(file)
    if not isinstance(content, dict) or not all(isinstance(value, PickledTensor) for value in content.values()):
        raise UserError(f"{file} holds something else than a table of tensors; it is no file of weights")
    return {str(name): StoredTensor(file, value.shape, value.dtype, str(name)) for name, value in content.items()}


def check_hugging_face(config: RunConfig, folder: HuggingFaceFolder, allow_changes: Collection[str] = ()) -> list[str]:
    """The folder must hold the very model of `[model]`, and every tensor of it.

    Args:
        allow_changes: keys such as `model.rms_norm_eps` that may differ.

    Returns:
        Lines to print: what may be a mistake and need not be one.

    Raises:
        UserError: listing every difference.
    """
    _check_model(config, folder, allow_changes)
    check_tensors(folder, config.model)
    tokenizer, own = folder.path / _TOKENIZER, Path(config.tokenizer.path)
    own = own / _TOKENIZER if own.is_dir() else own
    if not tokenizer.is_file() or (own.is_file() and own.read_bytes() == tokenizer.read_bytes()):
        return []
    return [
        f"WARNING: {folder.path} comes with {_TOKENIZER}, and tokenizer.path is {own}: unless both give every text "
        "the same ids, the model has learned other words than the sources are made of"
    ]


def _check_model(config: RunConfig, folder: HuggingFaceFolder, allow_changes: Collection[str]) -> None:
    theirs, ours = _function_of(folder.model), _function_of(config.model)
    # a phase that names its own base has decided the change
    decided = {"rope_theta"} if config.phases[config.first_phase].rope_theta else set()
    lines = [
        f"{key} = {toml_value(value)}  # found {toml_value(ours[key])}"
        for key, value in theirs.items()
        if key in ours and not _equal(value, ours[key]) and key not in decided and f"model.{key}" not in allow_changes
    ]
    if lines:
        listed = "\n  ".join(lines)
        raise UserError(
            f"{folder.path / CONFIG} is of another model than [model]. Write there:\n  {listed}\n"
            "or, for a key that is to differ, add --allow-change model.KEY"
        )


def _function_of(model: ModelConfig) -> dict[str, Any]:
    """The keys that decide which function the weights are, each in one of the ways in which it can be written."""
    values = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    width, hidden = model.attention_head_dim, model.hidden_size
    values |= {"head_dim": width, "residual_scale": model.residual_factor}
    values["attention_base_width"] = None if model.attention_base_width == width else model.attention_base_width
    values["logits_base_width"] = None if model.logits_base_width == hidden else model.logits_base_width
    unused = set() if model.wesar else {"norm_alphas"}
    if model.embedding_norm != "layer_norm" and not model.qk_layer_norm:
        unused.add("layer_norm_eps")
    return {key: value for key, value in values.items() if key not in _NOT_COMPARED | unused}


def _equal(a: Any, b: Any) -> bool:
    """Published numbers may have been rounded when they were written."""
    return math.isclose(a, b, rel_tol=1e-9) if isinstance(a, float) and isinstance(b, float) else a == b


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every parameter of the decoder."""
    hidden, ffn, width = model.hidden_size, model.intermediate_size, model.attention_head_dim
    heads = {"q": model.num_attention_heads, "k": model.num_key_value_heads, "v": model.num_key_value_heads}
    block: dict[str, tuple[int, ...]] = {
        f"self_attn.{part}_proj.weight": (count * width, hidden) for part, count in heads.items()
    }
    if model.attention_bias:
        block |= {f"self_attn.{part}_proj.bias": (count * width,) for part, count in heads.items()}
    if model.qk_layer_norm:
        block |= {
            f"self_attn.{part}_layernorm.norms.{head}.weight": (width,) for part in "qk" for head in range(heads[part])
        }
    block |= {
        "self_attn.o_proj.weight": (hidden, heads["q"] * width),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    shapes = {EMBEDDING: (model.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if model.embedding_norm != "none":
        shapes["model.embedding_layernorm.weight"] = (hidden,)
    if not model.tie_word_embeddings:
        shapes[HEAD] = (model.vocab_size, hidden)
    if model.wesar:
        norms = BLOCK_NORM_ALPHAS if model.norm_alphas else ()
        block |= {f"self_attn.{name}": (1,) for name in ATTENTION_ALPHAS} | {n: (1,) for n in (*MLP_ALPHAS, *norms)}
        shapes |= {name: (1,) for name in ("lm_head_alpha", *(["model.norm_alpha"] if model.norm_alphas else []))}
    layers = range(model.num_hidden_layers)
    return shapes | {f"model.layers.{i}.{name}": shape for i in layers for name, shape in block.items()}


def check_tensors(folder: HuggingFaceFolder, model: ModelConfig) -> None:
    """The folder must hold every tensor of `model`, and none besides that would change it.

    Raises:
        UserError: listing what is missing, left over, or of another shape.
    """
    expected, found = parameter_shapes(model), folder.tensors
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected and not _says_nothing(name, model, folder)]
    shapes = [
        f"{name} {found[name].shape} instead of {shape}"
        for name, shape in expected.items()
        # scalars are published with shape () and (1,)
        if name in found and (found[name].shape or (1,)) != shape
    ]
    problems = {"missing": missing, "that the model has not": unexpected, "of another shape": shapes}
    lines = [f"{len(names)} {what}: {_listed(names)}" for what, names in problems.items() if names]
    if lines:
        listed = "\n  ".join(lines)
        raise UserError(
            f"the tensors of {folder.path} are not those of its {CONFIG}:\n  {listed}\nTake files that belong together"
        )


def _says_nothing(name: str, model: ModelConfig, folder: HuggingFaceFolder) -> bool:
    """Tensors beyond the parameters that change no function: the head of a tied model, tables that older versions of
    transformers stored, and biases of o_proj, which its Llama has beside those of q, k and v, where they are zero."""
    if name == HEAD:
        return model.tie_word_embeddings  # whether it is the embedding is seen when it is read
    if name.endswith("rotary_emb.inv_freq"):
        return True
    return model.attention_bias and name.endswith("self_attn.o_proj.bias") and _is_zero(folder.tensors[name])


def _is_zero(tensor: StoredTensor) -> bool:
    """Whether all bytes of a small tensor are zero; bfloat16 is no type of numpy."""
    if tensor.file.suffix != ".safetensors":
        content = read_pickle(tensor.file)
        return content_is_zero(tensor.file, content[tensor.key] if tensor.key else content)
    with tensor.file.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[tensor.key]["data_offsets"]
        file.seek(8 + length + begin)
        return not any(file.read(end - begin))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
