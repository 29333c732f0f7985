"""Preparing a source: input files in, a folder that `Source.open` accepts out.

    inputs -> units (tokens of each group of files)  -> shards (shuffled)       -> renamed into place
              OUTPUT.partial/units/                     OUTPUT.partial/training/    OUTPUT/

Everything that decides the result (files, tokenizer, division, order) goes into one fingerprint. It is stored with
the unfinished work and with the source: the same request goes on where it stopped or finds its work done, another
request for the same folder is refused. The result does not depend on the number of workers or on interruptions.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from titan_yulan.data.assemble import AssembleJob, filled_buckets, write_bucket
from titan_yulan.data.documents import InputFile, find_inputs
from titan_yulan.data.holdout import HoldOut
from titan_yulan.data.source import DESCRIPTION, FORMAT_VERSION, Source, token_dtype, write_description
from titan_yulan.data.storage import explain_full_disk, locked, write_atomic
from titan_yulan.data.tokenise import TokeniseJob, UnitCounts, group_files, tokenise_unit
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.data.workers import default_workers, ordered_map
from titan_yulan.errors import UserError

Say = Callable[[str], None]
say_now: Say = functools.partial(print, flush=True)

_SAY_EVERY = 5.0  # seconds between progress lines
_SAMPLE = 65536  # bytes


@dataclass(frozen=True)
class Report:
    """What preparing did. Documents, tokens and bytes are of the training part; validation_* of the held-out part."""

    name: str
    documents: int
    tokens: int
    text_bytes: int  # UTF-8; 0 when the input was token ids
    validation_documents: int
    validation_tokens: int
    bad_rows: int
    empty_documents: int
    shown_bad_rows: tuple[str, ...]
    seconds: float
    reused: bool

    def lines(self) -> list[str]:
        """The report as text."""
        counts = f"{self.documents:,} documents, {self.tokens:,} tokens"
        if self.reused:
            return [f"source {self.name}: already prepared, {counts}"]
        ratio = f", {self.text_bytes / self.tokens:.2f} bytes a token" if self.text_bytes else ""
        lines = [f"source {self.name}: {counts}{ratio}, {self.seconds:.1f} s"]
        if self.validation_tokens:
            lines.append(f"  held out: {self.validation_documents:,} documents, {self.validation_tokens:,} tokens")
        if self.bad_rows or self.empty_documents:
            lines.append(f"  skipped: {self.bad_rows:,} bad rows, {self.empty_documents:,} empty documents")
        return lines + [f"    {row}" for row in self.shown_bad_rows]


@dataclass(frozen=True)
class _Request:
    """One call of `prepare`, checked."""

    name: str
    inputs: tuple[str, ...]
    files: tuple[InputFile, ...]
    outputs: dict[str, Path]  # "training" and perhaps "validation"
    tokenizer: Tokenizer
    hold_out: HoldOut
    ordered: bool
    fail_on_bad_row: bool
    seed: int
    shard_tokens: int
    workers: int
    say: Say

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that decides the content of the outputs."""
        rule = [self.hold_out.by, self.hold_out.share, self.ordered, self.seed, self.shard_tokens]
        files = [[file.name, file.kind, *_file_fingerprint(file.path)] for file in self.files]
        content = [FORMAT_VERSION, self.tokenizer.fingerprint, rule, files]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def partial(self, side: str) -> Path:
        """Folder of the unfinished work for one output: beside it, so that the last rename stays on one disk."""
        return self.outputs[side].with_name(self.outputs[side].name + ".partial")


def prepare(
    name: str,
    inputs: Sequence[str],
    output: Path | str,
    tokenizer: Tokenizer,
    *,
    validation_output: Path | str | None = None,
    validation_share: float = 0.0,
    ordered: bool = False,
    workers: int | None = None,
    on_bad_row: Literal["skip", "fail"] = "skip",
    seed: int = 0,
    shard_tokens: int = 10_000_000,
    say: Say = say_now,
) -> Report:
    """Make a source from text or token ids; start it again after any interruption and it goes on.

    Args:
        name: name of the source, for people.
        inputs: paths, folders, globs, `builtin:DOMAIN`; see `documents.find_inputs`.
        output: folder of the source.
        tokenizer: turns text into ids; for inputs with `input_ids` it gives the vocabulary size and end of text.
        validation_output: folder of the held-out part; goes with a validation_share above 0.
        validation_share: share of the files (or documents; see `holdout`) held out.
        ordered: keep the order of the input, forever.
        workers: processes; None: all processors.
        on_bad_row: count and skip bad rows, or stop at the first.
        seed: seed of the shuffle across shards.
        shard_tokens: tokens of a shard, about.
        say: gets progress lines.

    Raises:
        UserError: the request is wrong, or `output` holds something else.
        RunError: the disk is full, or a worker died.
    """
    output = Path(output)
    if (validation_output is None) != (validation_share == 0):
        raise UserError(f"source {name}: a held-out part needs both a folder and a share above 0; give both or neither")
    if validation_output is not None and Path(validation_output).absolute() == output.absolute():
        raise UserError(f"source {name}: the held-out part cannot have the folder {output} of the training part")
    files = tuple(find_inputs(inputs))
    outputs = {"training": output}
    if validation_output is not None:
        outputs["validation"] = Path(validation_output)
    request = _Request(
        name=name,
        inputs=tuple(inputs),
        files=files,
        outputs=outputs,
        tokenizer=tokenizer,
        hold_out=HoldOut.choose(files, validation_share),
        ordered=ordered,
        fail_on_bad_row=on_bad_row == "fail",
        seed=seed,
        shard_tokens=shard_tokens,
        workers=workers or default_workers(),
        say=say,
    )
    with explain_full_disk(output.parent), locked(output.with_name(f".{output.name}.lock"), say):
        return _prepare_locked(request)


def _prepare_locked(request: _Request) -> Report:
    start = time.perf_counter()
    done = {side: _finished_source(path, request) for side, path in request.outputs.items()}
    if all(done.values()):
        return _report(request, done, [], time.perf_counter() - start, reused=True)
    _resume_or_reset(request)
    counts = _tokenise(request)
    sources = {side: _assemble(request, counts, side) for side in request.outputs}
    for side, path in request.outputs.items():
        if done[side] is None:
            (request.partial(side) / side).rename(path)
    _remove_partial(request)
    return _report(request, sources, counts, time.perf_counter() - start, reused=False)


def _finished_source(path: Path, request: _Request) -> Source | None:
    """The source that is at `path` already, if it is the one asked for.

    Raises:
        UserError: something else is there.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if not (path / DESCRIPTION).exists():
        raise UserError(f"{path} is in the way (no source, and not empty): delete it, or choose another output")
    source = Source.open(path)
    if source.made_from.get("request_fingerprint") != request.fingerprint:
        raise UserError(
            f"{path} holds a source made from other inputs, options or tokenizer (name {source.name!r}, inputs "
            f"{source.made_from.get('inputs')}): delete the folder to make it anew, or choose another output"
        )
    return source


def _resume_or_reset(request: _Request) -> None:
    """Keep unfinished work of the same request, remove that of another."""
    state = request.partial("training") / "request.json"
    if state.exists() and json.loads(state.read_bytes()) == request.fingerprint:
        request.say(f"source {request.name}: going on with the work in {state.parent}")
        return
    if state.parent.exists():
        request.say(f"source {request.name}: removing {state.parent}, the unfinished work of another request")
    _remove_partial(request)
    state.parent.mkdir(parents=True)
    write_atomic(state, lambda file: file.write(json.dumps(request.fingerprint).encode()))


def _remove_partial(request: _Request) -> None:
    for side in reversed(request.outputs):  # the state of the work is in the folder of the training part: last
        if request.partial(side).exists():
            shutil.rmtree(request.partial(side))


def _tokenise(request: _Request) -> list[UnitCounts]:
    units = group_files(request.files)
    job = TokeniseJob(
        folder=request.partial("training") / "units",
        tokenizer=request.tokenizer,
        dtype=token_dtype(request.tokenizer.vocab_size),
        hold_out=request.hold_out,
        fail_on_bad_row=request.fail_on_bad_row,
    )
    job.folder.mkdir(exist_ok=True)
    counts: list[UnitCounts] = []
    start = said = time.perf_counter()
    for unit_counts in ordered_map(functools.partial(tokenise_unit, job), units, request.workers):
        counts.append(unit_counts)
        if time.perf_counter() - said > _SAY_EVERY:
            said = time.perf_counter()
            tokens = sum(sum(unit.tokens) for unit in counts)
            request.say(
                f"source {request.name}: tokenised {len(counts)} of {len(units)} groups of files, "
                f"{tokens:,} tokens, {tokens / (said - start):,.0f} tokens/s"
            )
    return counts


def _assemble(request: _Request, counts: list[UnitCounts], side: str) -> Source:
    job = AssembleJob(
        units_folder=request.partial("training") / "units",
        counts=counts,
        folder=request.partial(side) / side,
        validation=side == "validation",
        dtype=token_dtype(request.tokenizer.vocab_size),
        ordered=request.ordered,
        seed=request.seed,
        shard_tokens=request.shard_tokens,
    )
    if not job.tokens:
        bad = f" ({sum(unit.bad_rows for unit in counts)} bad rows skipped)" if side == "training" else ""
        remedy = "give other inputs" if side == "training" else "raise validation_share, or give more documents"
        raise UserError(f"source {request.name}: no document for the {side} part{bad}: {remedy}")
    job.folder.mkdir(parents=True, exist_ok=True)
    numbered = list(enumerate(filled_buckets(job)))
    source = Source(
        path=job.folder,
        name=request.name,
        dtype=job.dtype,
        tokenizer_fingerprint=request.tokenizer.fingerprint,
        vocab_size=request.tokenizer.vocab_size,
        eos_id=request.tokenizer.eos_id,
        ordered=request.ordered,
        has_loss_mask=job.has_loss_mask,
        text_bytes=sum(unit.text_bytes[job.validation] for unit in counts),
        shards=tuple(ordered_map(functools.partial(_write_numbered, job), numbered, request.workers)),
        made_from=_made_from(request, side, counts),
    )
    write_description(source)
    return source


def _write_numbered(job: AssembleJob, shard_and_bucket: tuple[int, int]) -> Any:
    return write_bucket(job, *shard_and_bucket)


def _made_from(request: _Request, side: str, counts: list[UnitCounts]) -> dict[str, Any]:
    return {
        "request_fingerprint": request.fingerprint,
        "inputs": list(request.inputs),
        "input_files": len(request.files),
        "part": side,
        "held_out_by": request.hold_out.by,
        "validation_share": request.hold_out.share,
        "seed": request.seed,
        "bad_rows": sum(unit.bad_rows for unit in counts),
        "empty_documents": sum(unit.empty for unit in counts),
    }


def _report(
    request: _Request, sources: dict[str, Any], counts: list[UnitCounts], seconds: float, *, reused: bool
) -> Report:
    training, validation = sources["training"], sources.get("validation")
    return Report(
        name=request.name,
        documents=training.documents,
        tokens=training.tokens,
        text_bytes=training.text_bytes,
        validation_documents=validation.documents if validation else 0,
        validation_tokens=validation.tokens if validation else 0,
        bad_rows=training.made_from["bad_rows"],
        empty_documents=training.made_from["empty_documents"],
        shown_bad_rows=tuple([row for unit in counts for row in unit.shown_bad_rows][:5]),
        seconds=seconds,
        reused=reused,
    )


def _file_fingerprint(path: Path) -> tuple[int, str]:
    """Size and a hash: of all bytes up to 1 MiB, of 16 evenly spaced samples of a larger file.

    Reading terabytes only to find that nothing changed would cost more than it protects; time stamps would call a
    copied file another one.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= 16 * _SAMPLE:
            digest.update(file.read())
        else:
            for sample in range(16):
                file.seek(sample * (size - _SAMPLE) // 15)
                digest.update(file.read(_SAMPLE))
    return size, digest.hexdigest()
