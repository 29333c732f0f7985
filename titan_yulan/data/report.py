"""What preparing did, in numbers and as lines for people; and how far it is."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from titan_yulan.data.source import Source
from titan_yulan.data.unit import UnitCounts

Say = Callable[[str], None]
say_now: Say = functools.partial(print, flush=True)

_SAY_EVERY = 5.0  # seconds between progress lines
_SHOWN = 5  # bad rows
_SHOWN_FILES = 20


@dataclass(frozen=True)
class LeftOut:
    """What was left out of the whole input, or changed."""

    bad_rows: int
    bad_files: tuple[str, ...]  # name and reason of each
    empty_documents: int
    short_documents: int
    duplicate_documents: int
    ideographic_spaces: int  # documents that had some, now plain spaces

    @classmethod
    def count(cls, counts: Sequence[UnitCounts], duplicates: int) -> LeftOut:
        return cls(
            bad_rows=sum(unit.bad_rows for unit in counts),
            bad_files=tuple(file for unit in counts for file in unit.bad_files),
            empty_documents=sum(unit.empty for unit in counts),
            short_documents=sum(unit.short for unit in counts),
            duplicate_documents=duplicates,
            ideographic_spaces=sum(unit.ideographic_spaces for unit in counts),
        )

    @classmethod
    def read(cls, made_from: Mapping[str, Any]) -> LeftOut:
        """From a source's `made_from`; what another program left out of it counts as nothing."""
        counts = {key: made_from.get(key, 0) for key in cls.__dataclass_fields__ if key != "bad_files"}
        return cls(**counts, bad_files=tuple(made_from.get("bad_files", ())))

    def __str__(self) -> str:
        counts = {
            "bad rows": self.bad_rows,
            "bad files": len(self.bad_files),
            "empty documents": self.empty_documents,
            "short documents": self.short_documents,
            "duplicates": self.duplicate_documents,
        }
        return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


@dataclass(frozen=True)
class PartCounts:
    """Of one source: a side, or one value of a split."""

    documents: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.documents:,} documents, {self.tokens:,} tokens"


@dataclass(frozen=True)
class Report(LeftOut):
    """What preparing did. Documents, tokens and bytes are of the training part; validation_* of the held-out part."""

    name: str
    documents: int
    tokens: int
    text_bytes: int  # UTF-8; 0 when the input was token ids
    validation_documents: int
    validation_tokens: int
    values: Mapping[str, tuple[PartCounts, PartCounts]]  # of the split-by column: training and held-out part
    shown_bad_rows: tuple[str, ...]
    seconds: float
    reused: bool
    part: str = ""  # "2/4": documents are those of this part, duplicates still among them

    def lines(self) -> list[str]:
        """The report as text."""
        counts = str(PartCounts(self.documents, self.tokens))
        if self.reused:
            return [f"source {self.name}: already prepared, {counts}"]
        part = f" part {self.part}" if self.part else ""
        ratio = f", {self.text_bytes / self.tokens:.2f} bytes a token" if self.text_bytes and self.tokens else ""
        lines = [f"source {self.name}{part}: {counts}{ratio}, {self.seconds:.1f} s"]
        if self.validation_tokens:
            lines.append(f"  held out: {PartCounts(self.validation_documents, self.validation_tokens)}")
        for value, (training, validation) in self.values.items():
            held_out = f"; held out: {validation}" if self.validation_tokens else ""
            lines.append(f"  {value}: {training}{held_out}")
        if left_out := LeftOut.__str__(self):
            lines.append(f"  skipped: {left_out}")
        lines += [f"    {file}" for file in self.bad_files[:_SHOWN_FILES]]
        if len(self.bad_files) > _SHOWN_FILES:
            lines.append(f"    and {len(self.bad_files) - _SHOWN_FILES} more bad files (see made_from in source.json)")
        lines += [f"    {row}" for row in self.shown_bad_rows]
        if self.ideographic_spaces:
            lines.append(f"  ideographic spaces (U+3000) made plain in {self.ideographic_spaces:,} documents")
        return lines


def report_sources(
    name: str, sources: Mapping[str, Sequence[Source]], counts: Sequence[UnitCounts], seconds: float, *, reused: bool
) -> Report:
    """The report on finished sources.

    Args:
        name: of the request.
        sources: "training" and perhaps "validation": the one source, or those of a split.
        counts: of all units; none when nothing was done.
        seconds: what it took.
        reused: was all there before.
    """
    training, validation = sources["training"], sources.get("validation", ())
    return Report(
        **asdict(LeftOut.read(training[0].made_from)),
        name=name,
        documents=sum(source.documents for source in training),
        tokens=sum(source.tokens for source in training),
        text_bytes=sum(source.text_bytes for source in training),
        validation_documents=sum(source.documents for source in validation),
        validation_tokens=sum(source.tokens for source in validation),
        values=_by_value(training, validation),
        shown_bad_rows=shown_bad_rows(counts),
        seconds=seconds,
        reused=reused,
    )


def report_part(name: str, part: tuple[int, int], counts: Sequence[UnitCounts], seconds: float) -> Report:
    """The report on one part of a divided request."""
    return Report(
        **asdict(LeftOut.count(counts, 0)),
        name=name,
        documents=sum(unit.documents[0] for unit in counts),
        tokens=sum(unit.tokens[0] for unit in counts),
        text_bytes=sum(unit.text_bytes[0] for unit in counts),
        validation_documents=sum(unit.documents[1] for unit in counts),
        validation_tokens=sum(unit.tokens[1] for unit in counts),
        values={},
        shown_bad_rows=shown_bad_rows(counts),
        seconds=seconds,
        reused=False,
        part=f"{part[0]}/{part[1]}",
    )


def shown_bad_rows(counts: Sequence[UnitCounts]) -> tuple[str, ...]:
    """The first bad rows of all units, a few, as a report shows them."""
    return tuple([row for unit in counts for row in unit.shown_bad_rows][:_SHOWN])


def _by_value(training: Sequence[Source], validation: Sequence[Source]) -> dict[str, tuple[PartCounts, PartCounts]]:
    sides: list[dict[Any, PartCounts]] = [
        {source.made_from["value"]: PartCounts(source.documents, source.tokens) for source in side}
        for side in (training, validation)
    ]
    nothing = PartCounts(0, 0)
    values = sorted({value for side in sides for value in side} - {""})
    return {value: (sides[0].get(value, nothing), sides[1].get(value, nothing)) for value in values}


class Progress:
    """Says now and then how far a long piece of work is, and how fast since it was started or taken up again."""

    def __init__(self, say: Say, what: str, done: int, total: int) -> None:
        """
        Args:
            say: gets the lines.
            what: a line with "{}", such as "tokenised {} files".
            done: how many were there before.
            total: how many there are in all.
        """
        self._say, self._what = say, what
        self._done, self._total = done, total
        self._bytes = self._tokens = 0
        self._start = self._said = time.perf_counter()

    def add(self, size: int, tokens: int) -> None:
        """One more is done; it has `size` bytes."""
        self._done += 1
        self._bytes += size
        self._tokens += tokens
        now = time.perf_counter()
        if now - self._said > _SAY_EVERY:
            self._said = now
            seconds, megabytes = now - self._start, self._bytes / 1e6
            self._say(
                f"{self._what.format(f'{self._done:,} of {self._total:,}')}, {megabytes:,.0f} MB at "
                f"{megabytes / seconds:,.1f} MB/s, {self._tokens:,} tokens at {self._tokens / seconds:,.0f} tokens/s"
            )
