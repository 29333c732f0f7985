"""What a run does about steps whose loss or gradient is not finite or far too large: the policies of `[recovery]`.

The verdict was made on the device (`optimizer.guard`), and a refused step has changed no weight. Here it has reached
the host, some steps later and at the same step on all ranks, and the run is ended, goes on, or goes back.

    stop      the run ends
    retry     back to the newest checkpoint; the same rows come again, at most `max_retries` times for one step
    skip      nothing more: the rows were read, the update was left out; at most `max_skips` in 1,000 steps
    rollback  back to the newest checkpoint; when the step comes again its rows are read and left out; counts as skipped
    warn      nothing more: the update was made
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from titan_yulan.config.sections import RecoverySection
from titan_yulan.curriculum.plan import Plan
from titan_yulan.errors import RunError
from titan_yulan.monitor.events import append_event
from titan_yulan.monitor.metrics import write_atomically
from titan_yulan.optimizer.guard import FINE, NOT_FINITE, SPIKE
from titan_yulan.parallel.process import World

# Beside the guard's verdicts: the step was not judged, its rows were left out on purpose.
LEFT_OUT = 3
_REASONS = {SPIKE: "spike", NOT_FINITE: "not finite", LEFT_OUT: "rollback"}

# In the run folder: the steps that a rollback has decided to leave out.
LEFT_OUT_FILE = "left_out.json"

_MEMORY = 1000  # steps within which `max_skips` counts


class GoBack(Exception):
    """The run is to go on from its newest checkpoint; raised on all ranks at the same step."""


class Recovery:
    """Exists on every rank and decides alike on each; only the main rank writes and prints."""

    def __init__(self, section: RecoverySection, plan: Plan, folder: Path, is_main: bool) -> None:
        self._section, self._plan, self._folder, self._main = section, plan, folder, is_main
        self._tries: Counter[int] = Counter()
        self._left_out: set[int] = set()
        self._skipped: set[int] = set()

    def recall(self, world: World) -> None:
        """Take over what an earlier start on this run folder has decided to leave out; all ranks together."""
        file = self._folder / LEFT_OUT_FILE
        decided = [json.loads(file.read_text(encoding="utf-8")) if world.is_main and file.exists() else []]
        dist.broadcast_object_list(decided, src=0, group=world.host)
        self._left_out = set(decided[0])

    @property
    def skipped(self) -> list[int]:
        """Steps whose rows were read but not trained on, and those still to come that will be left out, in order."""
        return sorted(self._skipped)

    def resume(self, skipped: Iterable[int]) -> None:
        """Go on from a checkpoint with this list; what was decided since about steps to come still holds."""
        self._skipped = set(skipped) | self._left_out

    def leaves_out(self, step: int) -> bool:
        """Whether a step that is about to come is to be read and left out."""
        return step in self._skipped

    def review(self, lines: list[dict[str, Any]], verdicts: list[int]) -> tuple[list[dict[str, Any]], Exception | None]:
        """React to finished steps, oldest first.

        Args:
            lines: of `metrics.jsonl`, one per step. A step without an update gets "skipped", a spike that was kept
                "warning", with the reason in words.
            verdicts: the guard's, or LEFT_OUT.

        Returns:
            the lines up to the step that ends this stretch of training, and why it ends: a `RunError` or `GoBack` to
            raise; all lines and None if training goes on.
        """
        for index, (line, verdict) in enumerate(zip(lines, verdicts, strict=True)):
            if verdict == FINE:
                continue
            kept = verdict == SPIKE and self._section.spike == "warn"
            line["warning" if kept else "skipped"] = _REASONS[verdict]
            if verdict != LEFT_OUT and (end := self._react(line, verdict)):
                return lines[: index + 1], end
        return lines, None

    def _react(self, line: dict[str, Any], verdict: int) -> Exception | None:
        step = line["step"]
        policy = self._section.non_finite if verdict == NOT_FINITE else self._section.spike
        what = f"step {step}: loss {line['loss']}, gradient norm {line['gradient_norm']}"
        what += " are not finite" if verdict == NOT_FINITE else " are far above those of the steps before"
        self._report(line, _REASONS[verdict], policy, what)
        if policy == "stop":
            return self._give_up(what, step)
        if policy == "retry":
            self._tries[step] += 1
            if self._tries[step] > self._section.max_retries:
                return self._give_up(f"{what}, also after {self._section.max_retries} retries", step)
            return GoBack()
        if policy == "warn":
            return None
        self._skipped.add(step)
        recent = sum(step - _MEMORY < other <= step for other in self._skipped)
        if recent > self._section.max_skips:
            return self._give_up(
                f"{what}, and with it {recent} of the last {_MEMORY} steps are left out, more than recovery.max_skips",
                step,
            )
        if policy == "skip":
            return None
        self._left_out.add(step)
        if self._main:
            # before anything is trained again: the decision must outlive this start, not only the next checkpoint
            write_atomically(self._folder / LEFT_OUT_FILE, json.dumps(sorted(self._left_out)))
        return GoBack()

    def _report(self, line: dict[str, Any], reason: str, policy: str, what: str) -> None:
        if not self._main:
            return
        print(f"WARNING: {what}; recovery: {policy}", flush=True)
        step = line["step"]
        numbers = {key: line[key] if math.isfinite(line[key]) else str(line[key]) for key in ("loss", "gradient_norm")}
        rows = {"first_row": self._plan.position(step - 1).row, "last_row": self._plan.position(step).row - 1}
        with suppress(OSError):  # a full disk ends the run where something is written that must not be missing
            append_event(self._folder, "bad step", step=step, **rows, reason=reason, policy=policy, **numbers)

    def _give_up(self, what: str, step: int) -> RunError:
        return RunError(
            f"{what}. Nothing after the last checkpoint in {self._folder / 'checkpoints'} was saved; the same command "
            "goes on from there. Lower optimizer.learning_rate, choose another policy in [recovery], or look at the "
            f"rows: titan-yulan data show --config {self._folder / 'config.toml'} --step {step}"
        )
