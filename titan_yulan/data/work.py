"""Unfinished work beside an output, and its end: the sources renamed into place.

OUTPUT.partial/recipe.json    whose work it is
OUTPUT.partial/units/         tokenised groups of files
OUTPUT.partial/places.bin     which document goes where
OUTPUT.partial/training/      the source, or one folder for each value of the split-by column
OUTPUT/                       appears in one rename
VALIDATION_OUTPUT.partial/validation/, VALIDATION_OUTPUT/    likewise
"""

from __future__ import annotations

import functools
import itertools
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from titan_yulan.data.arrange import Arrangement, Destination, Units, arrange
from titan_yulan.data.assemble import AssembleJob, ShardJob, write_bucket
from titan_yulan.data.report import LeftOut, Progress, Say
from titan_yulan.data.request import Recipe, read_recipe, save_recipe
from titan_yulan.data.source import DESCRIPTION, Shard, Source, write_description
from titan_yulan.data.workers import ordered_map
from titan_yulan.errors import UserError


@dataclass(frozen=True)
class Work:
    """One request and where its result goes."""

    recipe: Recipe
    outputs: dict[str, Path]  # "training" and perhaps "validation"
    workers: int
    say: Say

    def partial(self, side: str) -> Path:
        """Folder of the unfinished work for one output: beside it, so that the last rename stays on one disk."""
        return self.outputs[side].with_name(self.outputs[side].name + ".partial")

    def finished(self, side: str) -> list[Source]:
        """The sources that are at an output already, if they are those asked for; none when nothing is there.

        Raises:
            UserError: something else is there.
        """
        path = self.outputs[side]
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return []
        folders = sorted(path.iterdir()) if self.recipe.split_by and path.is_dir() else [path]
        if not all((folder / DESCRIPTION).exists() for folder in folders):
            raise UserError(
                f"{path} is in the way (not empty, and not what this request makes): delete it, or choose another "
                "output"
            )
        sources = [Source.open(folder) for folder in folders]
        for source in sources:
            if source.made_from.get("request_fingerprint") != self.recipe.fingerprint:
                raise UserError(
                    f"{source.path} holds a source made from other inputs, options or tokenizer (name {source.name!r}, "
                    f"inputs {source.made_from.get('inputs')}): delete the folder {path} to make it anew, or choose "
                    "another output"
                )
        return sources

    def resume_or_reset(self) -> None:
        """Keep unfinished work of the same request, remove that of another."""
        state = self.partial("training") / "recipe.json"
        there = read_recipe(state)
        if there and there[0].fingerprint == self.recipe.fingerprint:
            self.say(f"source {self.recipe.name}: going on with the work in {state.parent}")
            return
        if state.parent.exists():
            self.say(f"source {self.recipe.name}: removing {state.parent}, the unfinished work of another request")
        self.remove_partial()
        save_recipe(state, self.recipe)

    def remove_partial(self) -> None:
        for side in reversed(self.outputs):  # whose work it is stands in the folder of the training part: last
            if self.partial(side).exists():
                shutil.rmtree(self.partial(side))

    def finish(self, units: Units, done: dict[str, list[Source]]) -> dict[str, list[Source]]:
        """Second half of preparing: shards from all units, and the sources in place.

        Args:
            units: the whole tokenised input.
            done: what is in place already.

        Raises:
            UserError: a side gets no document.
        """
        arrangement = arrange(units, self.partial("training") / "places.bin")
        units = replace(units, counts=units.counts[: arrangement.units])
        left_out = LeftOut.count(units.counts, arrangement.duplicates)
        self._warn_of_limits(arrangement)
        for side in self.outputs:
            if not any(destination.validation == (side == "validation") for destination in arrangement.destinations):
                raise UserError(_nothing_left(self.recipe, side, left_out))
        missing = {side for side, sources in done.items() if not sources}
        sources = {**done, **self._write(units, arrangement, left_out, missing)}
        for side in missing:
            (self.partial(side) / side).rename(self.outputs[side])
        self.remove_partial()
        return sources

    def _warn_of_limits(self, arrangement: Arrangement) -> None:
        training = [destination for destination in arrangement.destinations if not destination.validation]
        documents, tokens = sum(some.documents for some in training), sum(some.tokens for some in training)
        limits = {
            "max_documents": (self.recipe.max_documents, documents),
            "max_tokens": (self.recipe.max_tokens, tokens),
        }
        given = {key: (limit, there) for key, (limit, there) in limits.items() if limit is not None}
        if given and all(there < limit for limit, there in given.values()):
            for key, (limit, there) in given.items():
                self.say(
                    f"WARNING: source {self.recipe.name}: the whole input has {there:,}, fewer than {key} {limit:,}"
                )

    def _write(
        self, units: Units, arrangement: Arrangement, left_out: LeftOut, sides: set[str]
    ) -> dict[str, list[Source]]:
        wanted = [destination for destination in arrangement.destinations if _side(destination) in sides]
        folders = [self.partial(_side(item)) / _side(item) / item.value for item in wanted]
        shards = [
            ShardJob(folder, number, *shard)
            for destination, folder in zip(wanted, folders, strict=True)
            for number, shard in enumerate(destination.shards)
        ]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        masked = any(counts.has_loss_mask for counts in units.counts)
        job = AssembleJob(units, self.partial("training") / "places.bin", masked)
        progress = Progress(self.say, f"source {self.recipe.name}: wrote {{}} shards", 0, len(shards))
        written = []
        for shard in ordered_map(functools.partial(write_bucket, job), shards, self.workers):
            written.append(shard)
            progress.add(sum(file.size for file in shard.files.values()), shard.tokens)
        sources: dict[str, list[Source]] = {side: [] for side in sides}
        rest = iter(written)
        for destination, folder in zip(wanted, folders, strict=True):
            own = tuple(itertools.islice(rest, len(destination.shards)))
            made_from = _made_from(self.recipe, destination, left_out)
            source = _source(self.recipe, destination, folder, own, masked, made_from)
            write_description(source)
            sources[_side(destination)].append(source)
        return sources


def _side(destination: Destination) -> str:
    return "validation" if destination.validation else "training"


def _source(
    recipe: Recipe, destination: Destination, folder: Path, shards: tuple[Shard, ...], masked: bool, made_from: Any
) -> Source:
    return Source(
        path=folder,
        name=f"{recipe.name}/{destination.value}" if destination.value else recipe.name,
        dtype=recipe.dtype,
        tokenizer_fingerprint=recipe.tokenizer_fingerprint,
        vocab_size=recipe.vocab_size,
        eos_id=recipe.eos_id,
        ordered=recipe.ordered,
        has_loss_mask=masked,
        text_bytes=destination.text_bytes,
        shards=shards,
        made_from=made_from,
    )


def _made_from(recipe: Recipe, destination: Destination, left_out: LeftOut) -> dict[str, Any]:
    return {
        "request_fingerprint": recipe.fingerprint,
        "inputs": list(recipe.inputs),
        "input_files": recipe.input_files,
        "part": _side(destination),
        "held_out_by": recipe.held_out_by,
        "validation_share": recipe.validation_share,
        "order": recipe.order,
        "split_by": recipe.split_by,
        "value": destination.value,
        "minimum_tokens": recipe.minimum_tokens,
        "deduplicate": recipe.deduplicate,
        "max_documents": recipe.max_documents,
        "max_tokens": recipe.max_tokens,
        "seed": recipe.seed,
        **asdict(left_out),
    }


def _nothing_left(recipe: Recipe, side: str, left_out: LeftOut) -> str:
    reason = f"; {left_out.bad_files[0]}" if left_out.bad_files else ""
    skipped = f" ({left_out} skipped{reason})" if side == "training" and str(left_out) else ""
    remedy = "raise validation_share, or give more documents" if side == "validation" else "give other inputs"
    if side == "training" and left_out.short_documents:
        remedy += f", or lower minimum_tokens (now {recipe.minimum_tokens})"
    return f"source {recipe.name}: no document for the {side} part{skipped}: {remedy}"
