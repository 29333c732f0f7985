"""`titan-yulan checkpoint import`: a model of others as a checkpoint of ours, few tensors in memory at a time.

The checkpoint is the first of a new run folder: complete, committed, at the step where the model's trainer was (zero
for weights alone). What reads checkpoints reads it: `[phase] start_from`, a run of that name, generation, evaluation,
export.
"""

from __future__ import annotations

import math
import platform
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import SavePlan, SavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from titan_yulan import config as configuration
from titan_yulan.checkpoint import layout, store
from titan_yulan.checkpoint.files import HashingWriter
from titan_yulan.checkpoint.hugging_face import CONFIG, EMBEDDING, HuggingFaceFolder, StoredTensor, parameter_shapes
from titan_yulan.checkpoint.hugging_face_weights import load_hugging_face, opened
from titan_yulan.checkpoint.layout import Checkpoint, TrainerState
from titan_yulan.checkpoint.published import check_published, is_published, open_published, plan_from
from titan_yulan.checkpoint.universal import UniversalFolder
from titan_yulan.checkpoint.universal_state import read_step
from titan_yulan.config.paths import refuse_address
from titan_yulan.config.sections import RunConfig
from titan_yulan.curriculum.plan import Plan
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import RunError, UserError

# Bytes of the tensors in one file of the checkpoint; one that is larger has a file of its own.
_FILE_BYTES = 2**28

Shape = tuple[int, ...]
Reader = tuple[Shape, Callable[[], Tensor]]


def import_checkpoint(
    source: Path,
    config: RunConfig,
    output: Path,
    *,
    allow_changes: Collection[str] = (),
    report: Callable[[str], None] = print,
) -> Checkpoint:
    """Write the model in `source` as the first checkpoint of the run folder `output`.

    Args:
        source: a folder of Hugging Face or DeepSpeed, as for `[phase] start_from`.
        config: of the run; `[model]` must be this model, `[tokenizer]` its vocabulary, its phase the one that is to be
            trained from here (phases before it count as trained: `published.py`). `[run] name` and `output_dir` become
            those of `output`.
        allow_changes: keys such as `model.rms_norm_eps` that may differ; `tokens`: the count of the phases before.
        report: gets lines about what is done.

    Raises:
        UserError: the folder or its model is not what the configuration says, or the output is taken.
        RunError: a file cannot be read or written; what was begun is removed.
    """
    _check_output(output)
    if not is_published(source):
        raise UserError(
            f"--from: {source} is no folder of Hugging Face or DeepSpeed; name the one with config.json and the "
            "weights, or with latest_universal"
        )
    config = replace(config, run=replace(config.run, name=output.name, output_dir=str(output.parent)))
    published = open_published(source)
    for line in check_published(config, published, config.first_phase, allow_changes):
        report(line)
    weights = published.weights if isinstance(published, UniversalFolder) else published
    state = _state(config, plan_from(config, source, config.first_phase, allow_changes))
    for line in _theta_lines(config, state.phase, weights):
        report(line)
    if config.model.tie_word_embeddings:  # a head that is there as well must be the embedding
        load_hugging_face(weights, {EMBEDDING: torch.empty(weights.tensors[EMBEDDING].shape)})
    path = layout.step_folder(output / "checkpoints", state.step)
    layout.remove_leftovers(path.parent)  # of an import that was killed
    _write(path, _readers(published, parameter_shapes(config.model)), state, configuration.to_toml(config))
    moments = "with both moments" if isinstance(published, UniversalFolder) else "weights alone: moments begin at zero"
    report(f"{path}: {len(weights.tensors)} tensors, {moments}, at step {state.step:,} of phase {state.phase!r}")
    return Checkpoint(path, state.step)


def _check_output(output: Path) -> None:
    if refusal := refuse_address(str(output)):
        raise UserError(f"--output: {refusal}")
    if layout.find_checkpoints(output / "checkpoints"):
        raise UserError(f"--output: {output} has checkpoints already; name a new run folder")


def _state(config: RunConfig, plan: Plan) -> TrainerState:
    tokenizer = Tokenizer.load(Path(config.tokenizer.path))
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"tokenizer.path: {config.tokenizer.path} has {tokenizer.vocab_size} entries and the model "
            f"{config.model.vocab_size}: it was not trained with this vocabulary; name its own"
        )
    origin, start = plan.phases[0], plan.phases[config.first_phase]
    return TrainerState(
        **asdict(start.start),
        phase=plan.phases[max(start.index - 1, 0)].name,
        phase_finished=start.index > 0,
        tapes=dict(zip(plan.sources, start.tape_start, strict=True)),
        sources={},
        tokenizer=tokenizer.fingerprint,
        versions={"torch": torch.__version__, "python": platform.python_version()},
        origin={**asdict(origin.start), "tapes": dict(zip(plan.sources, origin.tape_start, strict=True))},
        mixture_history=[entry.to_json() for entry in plan.history],
    )


def _theta_lines(config: RunConfig, phase: str, folder: HuggingFaceFolder) -> list[str]:
    """A rotary base of the checkpoint that is not the folder's: no tensor shows it, and the model is another one."""
    own = next(section.rope_theta for section in config.phases if section.name == phase)
    theirs, ours = folder.model.rope_theta, own or config.model.rope_theta
    if math.isclose(theirs, ours, rel_tol=1e-9):  # published numbers may have been rounded
        return []
    key = f"rope_theta of phase {phase!r}" if own else "model.rope_theta"
    return [
        f"note: {folder.path / CONFIG} has rope_theta = {theirs:g}, and {key} is {ours:g}: eval, generate and export "
        f"of this checkpoint compute with {ours:g}, which gives other numbers than the model in that folder. To have "
        f"that model, set {key} to {theirs:g} and import again"
    ]


def _readers(published: HuggingFaceFolder | UniversalFolder, shapes: Mapping[str, Shape]) -> dict[str, Reader]:
    """Shape and reader of each tensor of the checkpoint, by `SECTION.NAME` (`Learner.tensors`)."""
    if isinstance(published, HuggingFaceFolder):
        return {f"model.{n}": (shape, partial(_read, published.tensors[n], shape)) for n, shape in shapes.items()}
    readers = _readers(published.weights, shapes)
    for name, shape in shapes.items():
        for kind, moment in published.moments.items():
            readers[f"optimizer.{name}.{kind}"] = shape, partial(_read, moment.tensors[name], shape)
        readers[f"optimizer.{name}.step"] = (), partial(_step, published, name)
    return readers


def _read(stored: StoredTensor, shape: Shape) -> Tensor:
    with opened(stored.file) as read:
        return read(stored, torch.empty(shape, device="meta")).float()


def _step(folder: UniversalFolder, name: str) -> Tensor:
    return torch.tensor(read_step(folder, name))


def _write(path: Path, readers: Mapping[str, Reader], state: TrainerState, config_toml: str) -> None:
    sections: dict[str, dict[str, Tensor]] = {}
    for name, (shape, _) in readers.items():
        section, _, rest = name.partition(".")
        sections.setdefault(section, {})[rest] = torch.empty(shape, device="meta")
    path.mkdir(parents=True)
    writer = _BunchWriter(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
            dcp.save(sections, storage_writer=writer, planner=_ReadingPlanner(readers), no_dist=True)
        layout.commit(path, writer.hashing.files, state, config_toml)
    except BaseException as error:  # CheckpointException among them
        layout.remove(path)
        if isinstance(error, (Exception, CheckpointException)):
            raise RunError(
                f"{path} was not written: {store.explain((writer.hashing.errors or [error])[0], path)}"
            ) from error
        raise


class _ReadingPlanner(DefaultSavePlanner):
    """Reads a tensor when its turn to be written has come; what is saved stands for it, without any memory."""

    def __init__(self, readers: Mapping[str, Reader]) -> None:
        super().__init__()
        self._readers = readers

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._readers[write_item.index.fqn][1]()


class _BunchWriter(HashingWriter):
    """Writes several files: torch.distributed.checkpoint keeps every tensor of a file in memory until it is closed."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, items in enumerate(_bunches(plan.items)):
            prefix = replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            part = replace(plan, items=items, storage_data=prefix)
            results += super().write_data(part, planner).wait()
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written


def _bunches(items: Sequence[WriteItem]) -> Iterator[list[WriteItem]]:
    """Items in order, so many together as fill a file."""
    bunch: list[WriteItem] = []
    filled = 0
    for item in items:
        size = item.tensor_storage_size() or 0
        if bunch and filled + size > _FILE_BYTES:
            yield bunch
            bunch, filled = [], 0
        bunch.append(item)
        filled += size
    if bunch:
        yield bunch
