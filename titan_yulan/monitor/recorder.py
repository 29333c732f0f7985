"""Turns the values of finished steps into lines, files and curves; the only place where the host waits for the device.

Step values stay on the device until `flush`, which fetches all of them in one copy: every `log_every` steps, before a
validation and before a checkpoint commits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_yulan import config as configuration
from titan_yulan.config.sections import RunConfig
from titan_yulan.curriculum.adaptive import Adjustment
from titan_yulan.curriculum.plan import PhasePlan, Plan
from titan_yulan.errors import explain_os_error
from titan_yulan.monitor import console
from titan_yulan.monitor.board import open_boards
from titan_yulan.monitor.flops import FORMULA
from titan_yulan.monitor.intervals import Intervals, Kind, trained_flops
from titan_yulan.monitor.metrics import RunLines, read_lines
from titan_yulan.monitor.recovery import Recovery
from titan_yulan.monitor.statistics import Statistics
from titan_yulan.parallel.process import World


@dataclass(frozen=True)
class StepValues:
    """What one step left on the device; n is the number of sources.

    totals         (1 + 2n,) float32: objective, cross-entropy per source, tokens per source, summed over all ranks
    denominator    () float32: the global denominator of the loss
    gradient_norm  () float32, before clipping
    fingerprint    () int64: sum of the rows' fingerprints
    verdict        () float32: of `optimizer.guard`, or `recovery.LEFT_OUT`
    statistics     of the model's inside, in the steps that have them
    """

    phase: PhasePlan
    learning_rate: float
    totals: Tensor
    denominator: Tensor
    gradient_norm: Tensor
    fingerprint: Tensor
    verdict: Tensor
    statistics: Statistics | None = None


class Recorder:
    """Exists on every rank (all must see a bad step at the same time); only the main rank writes and prints."""

    def __init__(
        self, config: RunConfig, plan: Plan, folder: Path, step: int | None, world: World, recovery: Recovery
    ) -> None:
        """
        Args:
            step: of the checkpoint that the run goes on from; records of later steps are dropped. None: a fresh start.
            recovery: decides what follows from the steps' verdicts.

        Raises:
            UserError: a board that was asked for cannot be opened.
        """
        self._config, self._plan, self._folder = config, plan, folder
        self._recovery = recovery
        self._pending: list[tuple[int, StepValues]] = []
        self._main = world.is_main
        self._intervals = Intervals(config.model, world)
        self._first_losses: dict[str, float | None] | None = None
        self._last: tuple[int, int] | None = None  # step and tokens of the last line
        self.failure: str | None = None
        if not self._main:
            return
        begun, every = plan.phases[0].start.step if step is None else step, config.monitor.statistics_every
        if every and begun < plan.end.step and begun // every == plan.end.step // every:
            steps = f"{begun + 1}-{plan.end.step}"
            self.say(f"note: monitor.statistics_every = {every}: none of the steps {steps} is due, so there are none")
        step = -1 if step is None else step
        self._lines = RunLines(folder, step, self._kept(folder))
        if lines := read_lines(folder / "validation.jsonl"):
            self._first_losses = lines[0]["validation_loss"]
        self._validated = {line["step"] for line in lines}
        self._evaluated = {line["step"] for line in read_lines(folder / "evaluation.jsonl")}
        self._board = open_boards(config, plan.sources, folder, step)
        self._board.text("config/toml", f"```toml\n{configuration.to_toml(config)}\n```")

    def _kept(self, folder: Path) -> list[str]:
        """Names of the files of lines; those of an earlier start too, for they go back with the others."""
        wanted = {
            "metrics": True,
            "validation": True,
            "intervals": True,
            "evaluation": bool(self._config.eval.tasks),
            "mixture": any(phase.adaptive.every is not None for phase in self._config.phases),
            "statistics": self._config.monitor.statistics_every > 0,
        }
        return [name for name, due in wanted.items() if due or (folder / f"{name}.jsonl").exists()]

    def say(self, line: str) -> None:
        if self._main:
            print(line, flush=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Keeps a failure to write (a full disk) for the trainer, which ends the run on all ranks together."""
        try:
            yield
        except OSError as error:
            self.failure = self.failure or explain_os_error(error, self._folder)

    def spending(self, kind: Kind) -> AbstractContextManager[None]:
        """Within `with`, the time is not that of steps."""
        return self._intervals.spending(kind)

    def phase_begins(self, phase: PhasePlan, step: int) -> None:
        """Announce a phase."""
        self.say(console.phase_line(phase, step))

    def record(self, step: int, values: StepValues, waited: float) -> bool:
        """Take the values of a finished step; print and write when it is due, and return whether it was.

        Args:
            waited: seconds that the loader kept the trainer waiting for this step.

        Raises:
            RunError, GoBack: as `flush`.
        """
        self._pending.append((step, values))
        self._intervals.step(values.phase, waited)
        due = step % self._config.monitor.log_every == 0 or step == values.phase.end.step
        if due and (line := self.flush()):
            self._end_interval(line)
        return due

    def flush(self) -> dict[str, Any] | None:
        """Fetch and write all pending steps; returns the last one's line.

        Raises:
            RunError: a step was bad and `[recovery]` ends the run (on every rank, at the same step).
            GoBack: a step was bad and the run is to go on from its newest checkpoint (likewise).
        """
        if not self._pending:
            return None
        pending, self._pending = self._pending, []
        rows, statistics = _fetch([values for _, values in pending])
        lines = [self._line(*item, row) for item, row in zip(pending, rows, strict=True)]
        lines, end = self._recovery.review(lines, [int(row[-1]) for row in rows])
        if self._main:
            with self._writing():
                self._lines["metrics"].write(lines)
                for (_, values), line, inside in zip(pending, lines, statistics, strict=False):
                    self._draw(line, values.phase, inside)
        if end is not None:
            raise end
        self._last = lines[-1]["step"], lines[-1]["tokens"]
        return lines[-1]

    def rewind(self, step: int) -> None:
        """Go back to `step`: what is recorded of later ones is dropped and comes again."""
        self._pending, self._last = [], None
        if self._main:
            self._validated = {other for other in self._validated if other <= step}
            self._evaluated = {other for other in self._evaluated if other <= step}
            with self._writing():
                self._lines.rewind(step)
                self._board.rewind(step)

    def sync(self) -> None:
        """Flush, and make the lines durable: none may be missing behind a checkpoint.

        Raises:
            RunError: as `flush`.
        """
        self.flush()
        if self._main:
            with self._writing():
                self._lines.sync()

    def _line(self, step: int, values: StepValues, row: list[float]) -> dict[str, Any]:
        n = len(self._plan.sources)
        objective, cross_entropy, tokens = row[0], row[1 : 1 + n], row[1 + n : 1 + 2 * n]
        denominator, gradient_norm, low, high, _ = row[-5:]
        by_source = zip(self._plan.sources, cross_entropy, tokens, strict=True)
        return {
            "step": step,
            "tokens": values.phase.position(step - values.phase.start.step).token,
            "phase": values.phase.name,
            "loss": objective / denominator if denominator else math.nan,  # a batch without any target
            "cross_entropy": sum(cross_entropy) / denominator if denominator else math.nan,
            "gradient_norm": gradient_norm,
            "learning_rate": values.learning_rate,
            "batch_fingerprint": f"{int(high):08x}{int(low):08x}",
            "source_loss": {name: loss / count for name, loss, count in by_source if count},
            "source_tokens": {name: int(count) for name, count in zip(self._plan.sources, tokens, strict=True)},
        }

    def _draw(self, line: Mapping[str, Any], phase: PhasePlan, statistics: dict[str, float]) -> None:
        """The curves of a step; statistics have a file of their own, for they come more seldom."""
        step, total = line["step"], sum(line["source_tokens"].values()) or 1
        if statistics:
            self._lines["statistics"].write([{"step": step, "tokens": line["tokens"], "values": statistics}])
        self._board.scalars(
            step,
            {
                "loss/train": line["loss"],
                "optim/lr": line["learning_rate"],
                "optim/grad_norm": line["gradient_norm"],
                "progress/tokens": line["tokens"],
                "progress/rows": phase.position(step - phase.start.step).row,
                "progress/batch_rows": phase.batch_rows,
                "progress/flops": trained_flops(self._config.model, self._plan, step),
                **{f"loss/train_{name}": loss for name, loss in line["source_loss"].items()},
                **{f"data/frac/{name}": count / total for name, count in line["source_tokens"].items()},
                **statistics,
            },
        )

    def _end_interval(self, line: Mapping[str, Any]) -> None:
        interval = self._intervals.close()
        step, rate = line["step"], interval.tokens_per_s or 0.0
        seconds_left = (self._plan.end.token - line["tokens"]) / max(rate, 1e-9)
        self.say(console.step_line(line, self._plan.end.step, rate, interval.mfu_percent, seconds_left))
        if self._main:
            with self._writing():
                self._lines["intervals"].write([interval.line(step, line["tokens"])])
                self._board.scalars(step, interval.scalars())

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """More curves, by tag."""
        if self._main:
            with self._writing():
                self._board.scalars(step, values)

    def validation(self, step: int, sums: Tensor, tokens: Tensor) -> dict[str, float]:
        """Record validation losses from the global sums of `eval.validation`; returns them by source."""
        self.flush()
        totals, counts = torch.stack([sums, tokens]).tolist()
        losses = {
            name: loss / count for name, loss, count in zip(self._plan.sources, totals, counts, strict=True) if count
        }
        self.say(console.validation_line(step, losses, self._first_losses))
        self._first_losses = self._first_losses or losses
        if self._main:
            with self._writing():
                whole = {"loss": sum(totals) / sum(counts)} if losses else {}
                if step not in self._validated:  # a start that measures for the mixture may do it again
                    token = self._plan.position(step).token
                    line = {"step": step, "tokens": token, **whole, "validation_loss": losses}
                    self._lines["validation"].write([line])
                    self._validated.add(step)
                scalars = {f"loss/val_{name}": loss for name, loss in losses.items()}
                if whole:
                    scalars |= {"loss/val": whole["loss"], "loss/val_perplexity": _perplexity(whole["loss"])}
                self._board.scalars(step, scalars)
                self._board.flush()
        return losses

    def mixture(self, adjustment: Adjustment, before: dict[str, float]) -> None:
        """Record a change of the mix; `before`: the shares until now."""
        self.say(console.mixture_line(adjustment, before))
        if not self._main:
            return
        with self._writing():
            self._lines["mixture"].rewind(adjustment.step - 1)  # a start that measures anew replaces what it finds
            self._lines["mixture"].write([adjustment.to_json()])
            values = {f"mixture/share/{name}": share for name, share in adjustment.shares.items()}
            values |= {f"mixture/perplexity/{name}": value for name, value in adjustment.perplexity.items()}
            self._board.scalars(adjustment.step, values)

    def has_validation(self, step: int) -> bool:
        """Whether the validation after `step` is recorded; known to the main rank."""
        return self._main and step in self._validated

    def evaluation(self, step: int, metrics: dict[str, dict[str, float]]) -> None:
        """Record the metrics of benchmarks, by task and name."""
        self.flush()
        for task, values in metrics.items():
            parts = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            self.say(f"{task} at step {step}: {parts}")
        if self._main:
            with self._writing():
                token = self._plan.position(step).token
                self._lines["evaluation"].write([{"step": step, "tokens": token, "tasks": metrics}])
                self._evaluated.add(step)
                scalars = {f"task/{task}/{name}": v for task, values in metrics.items() for name, v in values.items()}
                self._board.scalars(step, scalars)
                self._board.flush()

    def has_evaluation(self, step: int) -> bool:
        """Whether the benchmarks after `step` are recorded; known to the main rank."""
        return self._main and step in self._evaluated

    def sample(self, step: int, prompt: str, continuation: str) -> None:
        """Show the sampled continuation of a finished run."""
        self.say(f"\nsample at the end, continuing {prompt!r}:\n{prompt}{continuation}\n")
        if self._main:
            self._board.text("sample", f"{prompt}{continuation}")

    def close(self, outcome: str) -> None:
        """Flush everything and say where the run lives."""
        self.flush()
        if not self._main:
            return
        if self._last:  # what came behind the last printed line, such as a validation and a checkpoint
            self._lines["intervals"].write([self._intervals.close().line(*self._last)])
        self._lines.close()
        self._board.close()
        self.say(f"{outcome}: the run is in {self._folder} (MFU formula: {FORMULA})")
        if self._config.monitor.tensorboard:
            self.say(f"curves: python -m tensorboard.main --logdir {self._folder / 'tensorboard'}")
        if outcome == "stopped":
            self.say("to go on: the same command again")


def _fetch(values: list[StepValues]) -> tuple[list[list[float]], list[dict[str, float]]]:
    """The numbers of all steps in one copy, the one synchronisation.

    Returns:
        per step totals, denominator, gradient norm, the lower and upper half of the fingerprint (a double holds 32 bits
            exactly, not 64), and the verdict; per step its statistics by tag.
    """
    prints = torch.stack([v.fingerprint for v in values])
    halves = torch.stack([prints & 0xFFFFFFFF, (prints >> 32) & 0xFFFFFFFF], dim=1)
    floats = torch.stack([torch.cat([v.totals, v.denominator[None], v.gradient_norm[None]]) for v in values])
    verdicts = torch.stack([v.verdict for v in values])[:, None]
    always = torch.cat([floats.double(), halves.double(), verdicts.double()], dim=1)
    sometimes = [v.statistics.values.double() for v in values if v.statistics]
    fetched = iter(torch.cat([always.flatten(), *sometimes]).tolist())
    rows = [[next(fetched) for _ in range(always.shape[1])] for _ in values]
    return rows, [dict(zip(v.statistics.names, fetched, strict=False)) if v.statistics else {} for v in values]


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
