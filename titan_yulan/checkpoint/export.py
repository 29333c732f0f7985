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

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from titan_yulan import config as configuration
from titan_yulan.checkpoint import fold
from titan_yulan.checkpoint.export_check import verify_llama, verify_moments, verify_tokenizer, verify_yulan
from titan_yulan.checkpoint.export_weights import TensorFiles
from titan_yulan.checkpoint.exported_state import FOLDER, STATE, UPDATES, has_state
from titan_yulan.checkpoint.hugging_face import CONFIG, parameter_shapes, write_json
from titan_yulan.checkpoint.layout import CONFIG as RUN_CONFIG
from titan_yulan.checkpoint.layout import Checkpoint, find_damage, open_checkpoint, sync_folder
from titan_yulan.checkpoint.read_parts import read_parts, stored_shapes
from titan_yulan.checkpoint.resume import trained_tokenizer
from titan_yulan.checkpoint.safetensors_files import Layout
from titan_yulan.checkpoint.tokenizer_json import write_tokenizer
from titan_yulan.checkpoint.universal import MOMENTS
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.paths import refuse_address
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import RunError, UserError
from titan_yulan.parallel.fsdp import is_replicated

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
    form: Literal["llama", "yulan"],
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    shard_size: str = "5GB",
    with_optimizer: bool = False,
    verify: bool = True,
    report: Callable[[str], None] = print,
) -> None:
    """Write the newest checkpoint of a run, or a checkpoint, as a Hugging Face folder.

    Args:
        path: run folder or checkpoint folder.
        output: the folder to make.
        form: the format.
        dtype: of the weights; `yulan` keeps scalars and norm weights in float32 whatever it is.
        shard_size: largest size of one file, such as "5GB"; a tensor that is larger has a file of its own.
        with_optimizer: of `yulan` in float32: Adam's moments too (`exported_state.py`), to train on from.
        verify: compare what was written with the checkpoint, which takes the memory of one whole model in float32.
        report: gets lines about what is done.

    Raises:
        UserError: the model has no such format, the place is taken, or the tokenizer is not the run's.
        RunError: the checkpoint is damaged, the disk full, or what was written is not the model.
    """
    if with_optimizer and (form, dtype) != ("yulan", "float32"):
        raise UserError(
            "--with-optimizer goes with --format yulan --dtype float32: only those weights can be trained on"
        )
    largest, partial = parse_size(shard_size), output.with_name(output.name + ".partial")
    _check_place(output, partial)
    source = open_source(path)
    files = [_files(source, form, dtype, partial, largest)]
    if with_optimizer:
        files += _moment_files(source, partial, largest)
    _check_space(output, files)
    report(f"{source.checkpoint.path}: {sum(len(part.targets) for part in files)} tensors as {form} in {dtype}")
    partial.mkdir(parents=True)
    try:
        for part in files:
            part.write(report)
        _write_descriptions(source, form, dtype, partial)
        if with_optimizer:
            _write_state(source, partial)
        for line in _verify(source, form, dtype, partial) if verify else ["NOT VERIFIED: left out by --no-verify"]:
            report(line)
        for written in (*partial.rglob("*"), partial):
            sync_folder(written)  # files too
        partial.rename(output)
        sync_folder(output.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunError(f"--output: {output} was not written: {error}") from error
        raise
    report(f"{output}: written")


def _check_place(*places: Path) -> None:
    for place in places:
        if refusal := refuse_address(place):
            raise UserError(f"--output: {refusal}")
        if place.exists():
            raise UserError(f"--output: {place} exists; delete it or choose another place")


def open_source(path: Path) -> Source:
    """The checkpoint at `path`, every byte of it verified, and its tokenizer.

    Raises:
        RunError: it is damaged or holds other tensors than its configuration says; each file or tensor is named.
        UserError: the tokenizer has changed since, or the model is one of masked diffusion.
    """
    checkpoint = open_checkpoint(path)
    if damage := find_damage(checkpoint):
        raise RunError(f"{checkpoint.path} is damaged: {'; '.join(damage)}; name an older step folder (--checkpoint)")
    config, state = configuration.load(checkpoint.path / RUN_CONFIG).config, checkpoint.state()
    if config.objective.kind == "masked_diffusion":
        raise UserError(
            f"{checkpoint.path} was trained with objective.kind = 'masked_diffusion', in which tokens also see those "
            "behind them; neither format can say so, and whatever opens the folder would compute from left to right: "
            "use the checkpoint itself (titan-yulan generate, eval, phase.start_from)"
        )
    phase = next(phase for phase in config.phases if phase.name == state.phase)
    model = replace(
        config.model,
        rope_theta=phase.rope_theta or config.model.rope_theta,
        max_position_embeddings=max(config.model.max_position_embeddings, phase.sequence_length),
    )
    _check_tensors(checkpoint, model)
    tokenizer = trained_tokenizer(checkpoint, config)
    return Source(checkpoint, model, tokenizer, Path(config.tokenizer.path))


def _check_tensors(checkpoint: Checkpoint, model: ModelConfig) -> None:
    stored = stored_shapes(checkpoint)
    for name, shape in parameter_shapes(model).items():
        if stored.get(name) != shape:
            what = f"has the shape {tuple(stored[name])} instead of {shape}" if name in stored else "is missing"
            raise RunError(
                f"{checkpoint.path} does not hold the model of its {RUN_CONFIG}: {name} {what}; name another step "
                "folder (--checkpoint)"
            )


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


def _files(source: Source, form: str, dtype: str, folder: Path, shard_size: int) -> TensorFiles:
    """The weights to write. Scalars and norm weights keep float32 where they have names of their own, as they do in a
    training step."""
    targets = make_targets(source, form)
    layouts = {
        name: Layout(target.shape, torch.float32 if form == "yulan" and is_replicated(name) else getattr(torch, dtype))
        for name, target in targets.items()
    }
    return TensorFiles(source.checkpoint, "model", targets, layouts, folder, shard_size)


def _moment_files(source: Source, folder: Path, shard_size: int) -> list[TensorFiles]:
    shapes, stored = parameter_shapes(source.model), stored_shapes(source.checkpoint, "optimizer")
    files = []
    for kind in MOMENTS:
        targets = {name: fold.Target(f"{name}.{kind}", shape) for name, shape in shapes.items()}
        for target in targets.values():
            if stored.get(str(target.source)) != target.shape:
                raise UserError(
                    f"--with-optimizer: {source.checkpoint.path} has no {target.source} of the right shape, as "
                    "after an import of weights alone; leave the option out"
                )
        layouts = {name: Layout(shape, torch.float32) for name, shape in shapes.items()}
        files.append(TensorFiles(source.checkpoint, "optimizer", targets, layouts, folder / FOLDER / kind, shard_size))
    return files


def _write_state(source: Source, folder: Path) -> None:
    """`exported_state.py`: what says whose moments they are, and where they were."""
    names = [f"{name}.step" for name in parameter_shapes(source.model)]
    updates = {int(tensor) for _, tensor in read_parts(source.checkpoint, names, "optimizer")}
    if len(updates) != 1:
        raise RunError(
            f"{source.checkpoint.path}: Adam has updated its parameters {sorted(updates)} times, not alike, which this "
            "format cannot say; leave --with-optimizer out"
        )
    for kind in MOMENTS:
        shutil.copyfile(folder / CONFIG, folder / FOLDER / kind / CONFIG)
    write_json(folder / FOLDER / STATE, asdict(source.checkpoint.state()) | {UPDATES: updates.pop()})


def _check_space(output: Path, files: list[TensorFiles]) -> None:
    parent = next(folder for folder in output.absolute().parents if folder.is_dir())
    needed, free = sum(part.size for part in files), shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(
            f"--output: the disk of {parent} has {free:,} bytes free, and the tensors take {needed:,}; make room there "
            "or choose another place"
        )


def _write_descriptions(source: Source, form: str, dtype: str, folder: Path) -> None:
    if form == "llama":
        values = fold.llama_config(source.model)
    else:
        values = source.model.to_published()
    ends = {"bos_token_id": None, "eos_token_id": source.tokenizer.eos_id}
    write_json(folder / CONFIG, values | ends | {"torch_dtype": dtype})
    write_json(folder / "generation_config.json", ends)
    write_tokenizer(source.tokenizer, source.tokenizer_path, folder, source.model.max_position_embeddings)


def _verify(source: Source, form: str, dtype: str, folder: Path) -> Iterator[str]:
    yield verify_tokenizer(source.tokenizer, folder)
    if form == "llama":
        yield verify_llama(source.checkpoint, source.model, source.tokenizer, folder, dtype)
        return
    yield verify_yulan(source.checkpoint, source.model, folder, dtype)
    if has_state(folder):
        yield verify_moments(source.checkpoint, source.model, folder)


def parse_size(text: str) -> int:
    """Bytes of "5GB", "200MB" or "64KB", powers of 1000.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(KB|MB|GB)", text)
    if match is None or float(match[1]) == 0:
        raise UserError(f"--shard-size {text!r} is no size; write it like 5GB or 200MB")
    return int(float(match[1]) * _UNITS[match[2]])
