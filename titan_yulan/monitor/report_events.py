"""What happened to a run, placed at its steps: events, checkpoints, measurements, changes of the mix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from titan_yulan.checkpoint.layout import find_checkpoints
from titan_yulan.curriculum.adaptive import MIXTURE_LOG
from titan_yulan.monitor.events import read_events
from titan_yulan.monitor.report_series import Steps, each_line

_MOST_OF_A_KIND = 500
_STEP = re.compile(r"step-(\d+)")
_KINDS = {"went back": "rollback", "group": "start"}
_UNTOLD = ("time", "event", "step")


@dataclass(frozen=True)
class Mark:
    """An event at a step.

    kind      the row of the timeline
    step      steps that the run had behind it
    text      what to show, in words
    time      as in events.jsonl, or ""
    exact     whether the event itself names the step; otherwise it lies after the last step named before it
    """

    kind: str
    step: int
    text: str
    time: str = ""
    exact: bool = True


@dataclass(frozen=True)
class History:
    """All marks in the order of their steps; `left_out` counts those of each kind that are too many to draw."""

    marks: list[Mark]
    left_out: dict[str, int]
    starts: int
    restarts: int
    failures: int
    first_time: str
    last_time: str

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(mark) for mark in self.marks]


def read_history(run: Path, steps: Steps) -> History:
    """Everything that a run folder says about when something happened."""
    events = read_events(run)
    marks = [*_marks(events), *_checkpoints(run, events), *_remarks(steps, events), *_measurements(run)]
    marks.sort(key=lambda mark: (mark.step, mark.time))
    kept, left_out = _limit(marks)
    groups = [event for event in events if event.get("event") == "group"]
    times = [event["time"] for event in events if isinstance(event.get("time"), str)]
    return History(
        kept,
        left_out,
        starts=sum(not event.get("restarts") for event in groups),
        restarts=sum(bool(event.get("restarts")) for event in groups),
        failures=sum(event.get("event") == "failure" for event in events),
        first_time=min(times, default=""),
        last_time=max(times, default=""),
    )


def _step_of(event: Mapping[str, Any]) -> int | None:
    if isinstance(event.get("step"), int):
        return event["step"]
    found = _STEP.search(str(event.get("message", "")))
    return int(found.group(1)) if found else None


def _marks(events: Sequence[Mapping[str, Any]]) -> Iterable[Mark]:
    """A start lies where the checkpoint that it resumed is; any other event without a step after the last one named."""
    last = 0
    for index, event in enumerate(events):
        kind, step = str(event.get("event")), _step_of(event)
        if kind == "checkpoint":
            last = step if step is not None else last
            continue
        exact = step is not None
        if kind == "group":
            following = next(
                (e for e in events[index + 1 :] if e.get("event") in ("resume", "group", "checkpoint")), {}
            )
            resumed = following.get("event") == "resume"
            step = _step_of(following) if resumed else (last if event.get("restarts") else 0)
            exact = resumed or not event.get("restarts")
        step = last if step is None else step
        last = step
        label = "restart" if kind == "group" and event.get("restarts") else _KINDS.get(kind, kind)
        yield Mark(label, step, f"{kind}: {_told(event)}", str(event.get("time", "")), exact)


def _told(event: Mapping[str, Any]) -> str:
    if "message" in event:
        return str(event["message"])
    if event.get("event") == "failure" and isinstance(event.get("workers"), list):
        reasons = [f"rank {worker.get('rank')}: {worker.get('reason')}" for worker in event["workers"]]
        return "; ".join([*reasons, f"restarts left: {event.get('restarts_left')}"])
    return ", ".join(f"{key} {value}" for key, value in event.items() if key not in _UNTOLD)


def _checkpoints(run: Path, events: Sequence[Mapping[str, Any]]) -> Iterable[Mark]:
    there = {checkpoint.step for checkpoint in find_checkpoints(run / "checkpoints")}
    saved = {step: event for event in events if event.get("event") == "checkpoint" and (step := _step_of(event))}
    for step in sorted(there | saved.keys()):
        state = "in the run folder" if step in there else "removed since"
        yield Mark("checkpoint", step, f"checkpoint: {state}", str(saved.get(step, {}).get("time", "")))


def _remarks(steps: Steps, events: Sequence[Mapping[str, Any]]) -> Iterable[Mark]:
    told = {event.get("step") for event in events if event.get("event") == "bad step"}
    return [Mark("bad step", step, f"step: {remark}") for step, _, remark in steps.flagged if step not in told]


def _measurements(run: Path) -> Iterable[Mark]:
    for line in each_line(run / "validation.jsonl"):
        yield Mark("validation", line["step"], "validation")
    for line in each_line(run / "evaluation.jsonl"):
        yield Mark("benchmarks", line["step"], f"benchmarks: {', '.join(line['tasks'])}")
    for line in each_line(run / MIXTURE_LOG):
        yield Mark("mixture", line["step"], "the mix was adjusted")


def _limit(marks: Sequence[Mark]) -> tuple[list[Mark], dict[str, int]]:
    """The newest of each kind."""
    seen: dict[str, int] = {}
    kept = []
    for mark in reversed(marks):
        seen[mark.kind] = seen.get(mark.kind, 0) + 1
        if seen[mark.kind] <= _MOST_OF_A_KIND:
            kept.append(mark)
    return kept[::-1], {kind: n - _MOST_OF_A_KIND for kind, n in seen.items() if n > _MOST_OF_A_KIND}
