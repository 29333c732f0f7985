"""Preparing a source: input files in, a folder that `Source.open` accepts out.

    inputs -> units (tokens of each group of files)  -> shards (shuffled, or in order)  -> renamed into place
              OUTPUT.partial/units/                     OUTPUT.partial/training/           OUTPUT/

Everything that decides the result (files, tokenizer, division, order, filters) goes into one fingerprint. It is stored
with the unfinished work and with the source: the same request goes on where it stopped or finds its work done, another
request for the same folder is refused. The result depends neither on the number of workers, nor on interruptions, nor
on the number of machines that shared the first half.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from titan_yulan.data.arrange import Units
from titan_yulan.data.documents import find_inputs
from titan_yulan.data.limit import reached
from titan_yulan.data.parts import begin_part, open_parts, own_units, parts_folder
from titan_yulan.data.report import LeftOut, Progress, Report, Say, report_part, report_sources, say_now
from titan_yulan.data.request import SHUFFLE, make_recipe
from titan_yulan.data.source import DESCRIPTION, Source
from titan_yulan.data.storage import explain_full_disk, locked
from titan_yulan.data.tokenise import TokeniseJob, Unit, group_files, tokenise_unit
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.data.unit import UnitCounts, finished_counts
from titan_yulan.data.work import Work
from titan_yulan.data.workers import default_workers, ordered_map
from titan_yulan.errors import UserError


def prepare(
    name: str,
    inputs: Sequence[str],
    output: Path | str,
    tokenizer: Tokenizer,
    *,
    validation_output: Path | str | None = None,
    validation_share: float = 0.0,
    order: str = SHUFFLE,
    split_by: str = "",
    minimum_tokens: int = 20,
    deduplicate: bool = False,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    part: tuple[int, int] | None = None,
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
        output: folder of the source, or of one source for each value of `split_by`.
        tokenizer: turns text into ids; for inputs with `input_ids` it gives the vocabulary size and end of text.
        validation_output: folder of the held-out part; goes with a validation_share above 0.
        validation_share: share of the files (or documents; see `holdout`) held out.
        order: "shuffle"; "keep": as in the input; COLUMN: from low to high by this column of the input, "-COLUMN":
            from high to low. All but "shuffle" is kept forever, in training too.
        split_by: column of the input; empty: one source.
        minimum_tokens: shorter documents are left out; end of text does not count.
        deduplicate: keep only the first of documents with the same tokens.
        max_documents: of the training part, only the first so many in the order of the input, after all filters; what
            stands behind the last of them is neither trained on nor held out. None: all.
        max_tokens: the same up to and with the document that reaches so many tokens, end of text counted.
        part: (i, n): only tokenise the i-th of n parts of the input (i from 1), for `merge`.
        workers: processes; None: all processors.
        on_bad_row: count and skip bad rows and damaged files, or stop at the first.
        seed: seed of the shuffle across shards.
        shard_tokens: tokens of a shard, about.
        say: gets progress lines.

    Raises:
        UserError: the request is wrong, or `output` holds something else.
        RunError: the disk is full, or a worker died.
    """
    if (validation_output is None) != (validation_share == 0):
        raise UserError(f"source {name}: a held-out part needs both a folder and a share above 0; give both or neither")
    outputs = _outputs(name, output, validation_output)
    if part is not None and not 1 <= part[0] <= part[1]:
        raise UserError(f"part {part[0]}/{part[1]}: there are only parts 1/n to n/n")
    workers = _processes(workers)
    files = find_inputs(inputs)
    units = group_files(files)
    options = {"order": order, "split_by": split_by, "minimum_tokens": minimum_tokens, "deduplicate": deduplicate}
    options |= {"seed": seed, "shard_tokens": shard_tokens, "max_documents": max_documents, "max_tokens": max_tokens}
    recipe = make_recipe(name, inputs, files, len(units), tokenizer, validation_share, **options)
    work = Work(recipe, outputs, workers, say)
    job = functools.partial(TokeniseJob, recipe=recipe, tokenizer=tokenizer, fail_on_bad_row=on_bad_row == "fail")
    start = time.perf_counter()
    _make_parents(outputs)
    if part is not None:
        return _prepare_part(work, job, units, part, start)
    with _exclusively(outputs["training"], say):
        if reused := _reused(work, start):
            if on_bad_row == "fail":
                _refuse_skipped(reused, output)
            work.remove_partial()
            return reused
        work.resume_or_reset()
        folder = work.partial("training") / "units"
        counts = _tokenise(work, job(folder=folder), units, enough=functools.partial(reached, recipe))
        return _finish(work, Units(recipe, (folder,), counts), start)


def merge(output: Path | str, *, workers: int | None = None, say: Say = say_now) -> Report:
    """Assemble the parts that `prepare` made with `part`: the same bytes as without parts. Goes on like `prepare`.

    Args:
        output: the output given to all parts.
        workers: processes; None: all processors.
        say: gets progress lines.

    Raises:
        UserError: a part is missing or unfinished, they do not belong together, or `output` holds something else.
        RunError: the disk is full, or a worker died.
    """
    output = _replaceable(output)
    start = time.perf_counter()
    if merged := _merged_before(output, say):
        name = merged[0].name.removesuffix(f"/{merged[0].made_from.get('value')}")
        return report_sources(name, {"training": merged}, [], time.perf_counter() - start, reused=True)
    parts = open_parts(output)
    outputs = _outputs(parts.recipe.name, output, parts.validation_output)
    work = Work(parts.recipe, outputs, _processes(workers), say)
    _make_parents(outputs)
    with _exclusively(output, say):
        report = _reused(work, start)
        if not report:
            units = parts.whole()
            work.resume_or_reset()
            report = _finish(work, units, start)
        if parts.folder.exists():  # another merge, which this one waited for, has removed them
            work.partial("training").mkdir(exist_ok=True)
            parts.folder.rename(work.partial("training") / "parts")  # at once, then at leisure
        work.remove_partial()
        return report


def _outputs(name: str, output: Path | str, validation_output: Path | str | None) -> dict[str, Path]:
    """The folders to make, by side.

    Raises:
        UserError: one of them is in the other, or is the other.
    """
    given = {"training": output} | ({"validation": validation_output} if validation_output is not None else {})
    outputs = {side: _replaceable(folder) for side, folder in given.items()}
    training, *validation = (folder.resolve() for folder in outputs.values())
    if validation and (training.is_relative_to(validation[0]) or validation[0].is_relative_to(training)):
        raise UserError(
            f"source {name}: the folders of the training part ({output}) and the held-out part ({validation_output}) "
            "must be apart: choose one beside the other"
        )
    return outputs


def _make_parents(outputs: Mapping[str, Path]) -> None:
    for folder in outputs.values():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {folder}: {error.strerror} ({error.filename}); choose another") from error


def _replaceable(folder: Path | str) -> Path:
    """The folder under a name that a rename can give to it: not of a link to it, nor '.'."""
    folder = Path(folder)
    return folder.resolve() if folder.is_symlink() or folder.name in ("", "..") else folder


def _processes(workers: int | None) -> int:
    if workers is not None and workers < 1:
        raise UserError(f"workers {workers}: at least 1")
    return workers or default_workers()


@contextlib.contextmanager
def _exclusively(output: Path, say: Say) -> Iterator[None]:
    with explain_full_disk(output.parent), locked(output.with_name(f".{output.name}.lock"), say):
        yield


def _reused(work: Work, start: float) -> Report | None:
    """The report on the request's sources, if they are all in place."""
    done = {side: work.finished(side) for side in work.outputs}
    if not all(done.values()):
        return None
    return report_sources(work.recipe.name, done, [], time.perf_counter() - start, reused=True)


def _merged_before(output: Path, say: Say) -> list[Source]:
    """What an earlier merge made, if it is finished and its parts are gone."""
    if parts_folder(output).exists() or not output.is_dir():
        return []
    folders = [folder for folder in (output, *sorted(output.iterdir())) if (folder / DESCRIPTION).exists()]
    if folders:
        with _exclusively(output, say):  # the parts, on their way out
            shutil.rmtree(output.with_name(output.name + ".partial"), ignore_errors=True)
    return [Source.open(folder) for folder in folders]


def _prepare_part(
    work: Work, job: Callable[..., TokeniseJob], units: list[Unit], part: tuple[int, int], start: float
) -> Report:
    if reused := _reused(work, start):
        return reused
    output = work.outputs["training"]
    with explain_full_disk(output.parent):
        folder = begin_part(output, part, work.recipe, work.outputs.get("validation"))
        with locked(folder / ".lock", work.say):
            own = [units[unit] for unit in own_units(part, len(units))]
            counts = _tokenise(work, job(folder=folder / "units"), own)
    return report_part(work.recipe.name, part, counts, time.perf_counter() - start)


def _tokenise(
    work: Work,
    job: TokeniseJob,
    units: Sequence[Unit],
    enough: Callable[[Iterable[UnitCounts]], bool] = lambda _: False,
) -> list[UnitCounts]:
    """First half of preparing: these units in order, all of them or up to the one with which there are enough."""
    job.folder.mkdir(parents=True, exist_ok=True)
    counts = {unit.index: finished_counts(job.folder, unit.index) for unit in units}
    if job.fail_on_bad_row:
        _refuse_skipped(LeftOut.count([done for done in counts.values() if done], 0), job.folder.parent)
    rest = [unit for unit in units if counts[unit.index] is None]
    progress = Progress(
        work.say, f"source {work.recipe.name}: tokenised {{}} groups of files", len(units) - len(rest), len(units)
    )
    with contextlib.closing(ordered_map(functools.partial(tokenise_unit, job), rest, work.workers)) as results:
        for unit in rest:
            if enough(_leading(counts.values())):
                break
            counts[unit.index] = done = next(results)
            progress.add(unit.size, sum(done.tokens))
    return list(_leading(counts.values()))


def _leading(counts: Iterable[UnitCounts | None]) -> Iterator[UnitCounts]:
    """The counts before the first unit that is not done."""
    for done in counts:
        if done is None:
            return
        yield done


def _refuse_skipped(left_out: LeftOut, folder: Path | str) -> None:
    if left_out.bad_rows or left_out.bad_files:
        raise UserError(
            f"{folder} was made with --on-bad-row skip, which left out {left_out.bad_rows:,} bad rows and "
            f"{len(left_out.bad_files):,} bad files: delete it to find them with fail, or give skip again"
        )


def _finish(work: Work, units: Units, start: float) -> Report:
    sources = work.finish(units, {side: work.finished(side) for side in work.outputs})
    return report_sources(work.recipe.name, sources, units.counts, time.perf_counter() - start, reused=False)
