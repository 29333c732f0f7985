"""`titan-yulan checkpoint export`: a checkpoint as a Hugging Face folder, a few tensors in memory at a time.

    model-00001-of-00003.safetensors ...    the tensors; model.safetensors where one file is enough
    model.safetensors.index.json            which file holds which tensor
    config.json, generation_config.json     the model, and where generation ends
    tokenizer.json, tokenizer_config.json   the tokenizer, with the ids of the training data

`llama` writes a stock Llama, every scale multiplied into a weight (`fold.py`); `yulan` YuLan-Mini's training format,
every tensor as it is. The folder is written beside its place as `NAME.partial`, verified there (`export_check.py`), and
renamed: what exists under the name that was asked for is whole.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from titan_yulan import config as configuration
from titan_yulan.checkpoint import fold
from titan_yulan.checkpoint.export_check import verify_llama, verify_tokenizer, verify_yulan
from titan_yulan.checkpoint.hugging_face import CONFIG, parameter_shapes
from titan_yulan.checkpoint.layout import CONFIG as RUN_CONFIG
from titan_yulan.checkpoint.layout import Checkpoint, find_damage, open_checkpoint, sync_folder
from titan_yulan.checkpoint.read_parts import read_parts, stored_shapes
from titan_yulan.checkpoint.safetensors_files import Layout, in_file_order, split_into_files, write_file, write_index
from titan_yulan.checkpoint.tokenizer_json import write_tokenizer
from titan_yulan.config.model import ModelConfig
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import RunError, UserError, explain_os_error
from titan_yulan.parallel.fsdp import is_replicated

FORMATS = ("llama", "yulan")
DTYPES = ("float32", "bfloat16", "float16")

# Tensors are cast in parts of so many values.
_CAST = 2**24
_UNITS = {"KB": 1000, "MB": 1000**2, "GB": 1000**3}


@dataclass(frozen=True)
class Source:
    """A sound checkpoint and what belongs to it; `model` has the rotary base of the checkpoint's phase."""

    checkpoint: Checkpoint
    model: ModelConfig
    tokenizer: Tokenizer
    tokenizer_path: Path


def export(
    path: Path,
    output: Path,
    form: str,
    *,
    dtype: str = "float32",
    shard_size: str = "5GB",
    verify: bool = True,
    report: Callable[[str], None] = print,
) -> None:
    """Write the newest checkpoint of a run, or a checkpoint, as a Hugging Face folder.

    Args:
        path: run folder or checkpoint folder.
        output: the folder to make.
        form: one of `FORMATS`.
        dtype: one of `DTYPES`; `yulan` keeps scalars and norm weights in float32 whatever it is.
        shard_size: largest size of one file, such as "5GB"; a tensor that is larger has a file of its own.
        verify: compare what was written with the checkpoint, which takes the memory of one whole model in float32.
        report: gets lines about what is done.

    Raises:
        UserError: the model has no such format, the place is taken, or the tokenizer is not the run's.
        RunError: the checkpoint is damaged, the disk full, or what was written is not the model.
    """
    largest = parse_size(shard_size)
    partial = output.with_name(output.name + ".partial")
    for place in (output, partial):
        if place.exists():
            raise UserError(f"--output: {place} exists; delete it or choose another place")
    source = open_source(path)
    targets = make_targets(source, form)
    report(f"{source.checkpoint.path}: {len(targets)} tensors as {form} in {dtype}")
    try:
        partial.mkdir(parents=True)
        _write_weights(source, targets, _layouts(targets, form, dtype), partial, largest, report)
        _write_descriptions(source, form, dtype, partial)
        report(_verify(source, form, dtype, partial) if verify else "NOT VERIFIED: left out by --no-verify")
        sync_folder(partial)
        partial.rename(output)
        sync_folder(output.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunError(f"--output: {explain_os_error(error, output)}") from error
        raise
    report(f"{output}: written")


def open_source(path: Path) -> Source:
    """The checkpoint at `path`, every byte of it verified, and its tokenizer.

    Raises:
        RunError: it is damaged or holds other tensors than its configuration says; each file or tensor is named.
        UserError: the tokenizer has changed since.
    """
    checkpoint = open_checkpoint(path)
    if damage := find_damage(checkpoint):
        raise RunError(f"{checkpoint.path} is damaged: {'; '.join(damage)}; name an older step folder (--checkpoint)")
    config, state = configuration.load(checkpoint.path / RUN_CONFIG).config, checkpoint.state()
    phase = next(phase for phase in config.phases if phase.name == state.phase)
    model = replace(
        config.model,
        rope_theta=phase.rope_theta or config.model.rope_theta,
        max_position_embeddings=max(config.model.max_position_embeddings, phase.sequence_length),
    )
    _check_tensors(checkpoint, model)
    tokenizer = Tokenizer.load(config.tokenizer.path)
    if tokenizer.fingerprint != state.tokenizer:
        raise UserError(
            f"{config.tokenizer.path} is not the tokenizer that {checkpoint.path} was trained with; bring that file "
            "back, so that the export can come with it"
        )
    return Source(checkpoint, model, tokenizer, Path(config.tokenizer.path))


def _check_tensors(checkpoint: Checkpoint, model: ModelConfig) -> None:
    stored = stored_shapes(checkpoint)
    for name, shape in parameter_shapes(model).items():
        if stored.get(name) != shape:
            what = f"has the shape {tuple(stored[name])} instead of {shape}" if name in stored else "is missing"
            raise RunError(f"{checkpoint.path} does not hold the model of its {RUN_CONFIG}: {name} {what}")


def make_targets(source: Source, form: str) -> dict[str, fold.Target]:
    """What to write, by name.

    Raises:
        UserError: the model has no such format.
    """
    if form == "yulan":
        source.model.to_published()  # refuses what that format cannot say
        return fold.yulan_targets(source.model)
    names = fold.scalar_names(source.model)
    scalars = {name: float(tensor) for name, tensor in read_parts(source.checkpoint, names)}
    return fold.llama_targets(source.model, scalars)


def _layouts(targets: Mapping[str, fold.Target], form: str, dtype: str) -> dict[str, Layout]:
    """Scalars and norm weights keep float32 where they have names of their own, as they do in a training step."""
    return {
        name: Layout(target.shape, torch.float32 if form == "yulan" and is_replicated(name) else getattr(torch, dtype))
        for name, target in targets.items()
    }


def _write_weights(
    source: Source,
    targets: Mapping[str, fold.Target],
    layouts: Mapping[str, Layout],
    folder: Path,
    shard_size: int,
    report: Callable[[str], None],
) -> None:
    needed, free = sum(layout.size for layout in layouts.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"--output: {folder.parent} has {free:,} bytes free and the weights take {needed:,}")
    files = split_into_files(layouts, shard_size)
    for file, members in files.items():
        names = in_file_order(members, layouts)
        values = _values(source.checkpoint, {name: targets[name] for name in names}, layouts)
        write_file(folder / file, {name: layouts[name] for name in names}, values)
        report(f"{file}: {len(names)} tensors, {(folder / file).stat().st_size / 1e6:,.1f} MB")
    write_index(folder, files, layouts)


def _values(
    checkpoint: Checkpoint, targets: Mapping[str, fold.Target], layouts: Mapping[str, Layout]
) -> Iterator[Tensor]:
    """The values of the targets in their order, cast, in parts."""
    read = read_parts(checkpoint, [target.source for target in targets.values() if target.source])
    for name, target in targets.items():
        dtype = layouts[name].dtype
        if target.source is None:
            yield torch.zeros(target.shape, dtype=dtype)
            continue
        stored = next(read)[1].view(-1)
        for begin in range(0, len(stored), _CAST):
            part = stored[begin : begin + _CAST]
            if target.factor != 1.0 or target.offset != 0.0:
                part = (part.double() + target.offset) * target.factor
            cast = part.to(dtype)
            if not torch.equal(cast.isfinite(), part.isfinite()):
                raise UserError(f"--dtype: {name} has values beyond the range of {dtype}; choose bfloat16 or float32")
            yield cast


def _write_descriptions(source: Source, form: str, dtype: str, folder: Path) -> None:
    if form == "llama":
        values = fold.llama_config(source.model)
    else:
        values = source.model.to_published()
    ends = {"bos_token_id": None, "eos_token_id": source.tokenizer.eos_id}
    _write_json(folder / CONFIG, values | ends | {"torch_dtype": dtype})
    _write_json(folder / "generation_config.json", ends)
    write_tokenizer(source.tokenizer, source.tokenizer_path, folder, source.model.max_position_embeddings)


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _verify(source: Source, form: str, dtype: str, folder: Path) -> str:
    verify_tokenizer(source.tokenizer, folder)
    if form == "llama":
        return verify_llama(source.checkpoint, source.model, source.tokenizer, folder, dtype)
    return verify_yulan(source.checkpoint, source.model, folder, dtype)


def parse_size(text: str) -> int:
    """Bytes of "5GB", "200MB" or "64KB", powers of 1000.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(KB|MB|GB)", text)
    if match is None or float(match[1]) == 0:
        raise UserError(f"--shard-size {text!r} is no size; write it like 5GB or 200MB")
    return int(float(match[1]) * _UNITS[match[2]])
