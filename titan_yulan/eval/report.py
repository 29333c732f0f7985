"""Reports of evaluations: a table for people, JSON for programs, a line for every item."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from titan_yulan.data.storage import write_atomic
from titan_yulan.eval.evaluate import Result
from titan_yulan.eval.metrics import SCORING

_LOWER_IS_BETTER = ("bits_per_byte", "perplexity")


@dataclass(frozen=True)
class Report:
    """The results of one model.

    fingerprint: of its weights; tokenizer: of its tokenizer.
    facts: how it was run.
    """

    title: str
    path: str
    fingerprint: str
    tokenizer: str
    facts: dict[str, Any]
    results: list[Result]

    def to_json(self) -> dict[str, Any]:
        """All but the items."""
        results = [{key: value for key, value in asdict(result).items() if key != "rows"} for result in self.results]
        return {
            "model": self.path,
            "title": self.title,
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer,
            **self.facts,
            "versions": {"torch": torch.__version__, "python": platform.python_version(), "scoring": SCORING},
            "tasks": {result["task"]: result for result in results},
        }


def write_reports(reports: Sequence[Report], output: Path | None, against: bool = False) -> Iterator[str]:
    """Lines to print; and with `output` the files evaluation.json, evaluation.md and items.jsonl in that folder.

    Args:
        against: whether the others are compared with the first report; else each with the one before it.
    """
    lines = table(reports[0]) if len(reports) == 1 else series_table(reports, against)
    yield from lines
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    content = [report.to_json() for report in reports]
    items = [
        json.dumps({"model": report.title, "task": result.task, **row}, ensure_ascii=False)
        for report in reports
        for result in report.results
        for row in result.rows
    ]
    _write(output / "evaluation.json", json.dumps({"format": 1, "models": content}, indent=2, ensure_ascii=False))
    _write(output / "evaluation.md", "\n".join(lines))
    _write(output / "items.jsonl", "\n".join(items))
    yield f"written: {output / 'evaluation.json'}, evaluation.md, items.jsonl"


def table(report: Report) -> list[str]:
    """One row for each task, in Markdown."""
    rows = [["task", "items", "metric", "value", "standard error", "others"]]
    for result in report.results:
        others = [f"{name} {_number(value)}" for name, value in result.metrics.items() if name != result.metric]
        if result.cut:
            others.append(f"{result.cut} contexts cut")
        error = result.errors.get(result.metric)
        rows.append(
            [
                result.task,
                f"{result.items:,}",
                result.metric,
                _number(result.metrics[result.metric]),
                "" if error is None else _number(error),
                ", ".join(others),
            ]
        )
    facts = ", ".join(f"{name} {value}" for name, value in report.facts.items() if value is not None)
    return [f"{report.path} ({facts})", "", *_markdown(rows)]


def series_table(reports: Sequence[Report], against: bool) -> list[str]:
    """One row for each model, a column for each task: its metric, and what was gained (a + is always better)."""
    heads = [f"{result.task}<br>{result.metric}" for result in reports[0].results]
    rows = [["phase", *heads]]
    for place, report in enumerate(reports):
        before = reports[0 if against else max(0, place - 1)]
        cells = []
        for result, old in zip(report.results, before.results, strict=True):
            value, then = result.metrics[result.metric], old.metrics[result.metric]
            gain = then - value if result.metric in _LOWER_IS_BETTER else value - then
            cut = f", {result.cut} cut" if result.cut else ""
            cells.append(_number(value) + (f" ({gain:+.4f})" if place else "") + cut)
        rows.append([report.title, *cells])
    than = f"than {reports[0].title}" if against else "than the phase before"
    return [f"In brackets: how much better {than}.", "", *_markdown(rows)]


def _markdown(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _number(value: float) -> str:
    if math.isfinite(value) and 1000 <= value < 1e15 and value == int(value):
        return f"{int(value):,}"
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def _write(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(f"{text}\n".encode()))
