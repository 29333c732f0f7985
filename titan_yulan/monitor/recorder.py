"""Turns the values of finished steps into lines, files and curves; the only place where the host waits for the device.

Step values stay on the device until `flush`, which fetches all of them in one copy: every `log_every` steps, before a
validation and before a checkpoint commits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_yulan import config as configuration
from titan_yulan.config.sections import RunConfig
from titan_yulan.curriculum.adaptive import MIXTURE_LOG, Adjustment
from titan_yulan.curriculum.plan import PhasePlan, Plan
from titan_yulan.errors import explain_os_error
from titan_yulan.monitor.flops import FORMULA, device_peak, flops_per_token
from titan_yulan.monitor.metrics import Board, JsonLines, read_lines
from titan_yulan.monitor.recovery import Recovery
from titan_yulan.parallel.process import World


@dataclass(frozen=True)
class StepValues:
    """What one step left on the device; n is the number of sources.

    totals         (1 + 2n,) float32: objective, cross-entropy per source, tokens per source, summed over all ranks
    denominator    () float32: the global denominator of the loss
    gradient_norm  () float32, before clipping
    fingerprint    () int64: sum of the rows' fingerprints
    verdict        () float32: of `optimizer.guard`, or `recovery.LEFT_OUT`
    """

    phase: PhasePlan
    learning_rate: float
    totals: Tensor
    denominator: Tensor
    gradient_norm: Tensor
    fingerprint: Tensor
    verdict: Tensor


class Recorder:
    """Exists on every rank (all must see a bad step at the same time); only the main rank writes and prints."""

    def __init__(
        self, config: RunConfig, plan: Plan, folder: Path, step: int | None, world: World, recovery: Recovery
    ) -> None:
        """
        Args:
            step: of the checkpoint that the run goes on from; records of later steps are dropped. None: a fresh start.
            recovery: decides what follows from the steps' verdicts.
        """
        self._config, self._plan, self._folder, self._world = config, plan, folder, world
        self._recovery = recovery
        self._pending: list[tuple[int, StepValues]] = []
        self._main = world.is_main
        self._peak = device_peak(torch.cuda.get_device_name()) if world.device.type == "cuda" else None
        # since the last printed line: seconds of training, seconds of those spent waiting for data, tokens
        self._clock, self._active, self._waited, self._tokens = time.perf_counter(), 0.0, 0.0, 0
        self._first_losses: dict[str, float] = {}
        self.failure: str | None = None
        if not self._main:
            return
        step = -1 if step is None else step
        self._metrics = JsonLines(folder / "metrics.jsonl", step)
        self._validations = JsonLines(folder / "validation.jsonl", step)
        self._evaluations = JsonLines(folder / "evaluation.jsonl", step) if config.eval.tasks else None
        self._evaluated = {line["step"] for line in read_lines(folder / "evaluation.jsonl")}
        self._mixture = JsonLines(folder / MIXTURE_LOG, step) if self._adapts() else None
        if lines := read_lines(folder / "validation.jsonl"):
            self._first_losses = lines[0]["validation_loss"]
        self._validated = {line["step"] for line in lines}
        self._open_board(step)

    def _adapts(self) -> bool:
        """Whether a phase adjusts its mix."""
        return any(phase.adaptive.every is not None for phase in self._config.phases)

    def _open_board(self, step: int) -> None:
        self._board = Board(self._folder / "tensorboard", step) if self._config.monitor.tensorboard else None
        if self._board:
            self._board.text("config/toml", f"```toml\n{configuration.to_toml(self._config)}\n```")
            names = "|".join(self._plan.sources)
            self._board.layout(
                {
                    "losses": {
                        "training": ["Multiline", [r"loss/train.*"]],
                        "validation": ["Multiline", [rf"loss/val(_({names}))?$"]],
                    },
                    "curriculum": {
                        "mix": ["Multiline", [r"data/frac/.*"]],
                        "adjusted shares": ["Multiline", [r"mixture/share/.*"]],
                        "learning rate": ["Multiline", ["optim/lr"]],
                    },
                }
            )

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

    def phase_begins(self, phase: PhasePlan, step: int) -> None:
        """Announce a phase."""
        known = phase.shares((step - phase.start.step) * phase.batch_rows)
        shares = ", ".join(f"{name} {share:.1%}" for name, share in known.items() if share)
        self.say(
            f"phase {phase.name!r}: steps {step + 1}-{phase.end.step}, {phase.batch_rows} rows of "
            f"{phase.sequence_length} tokens a step, mix {shares}"
        )
        self._clock = time.perf_counter()

    def record(self, step: int, values: StepValues, waited: float) -> bool:
        """Take the values of a finished step; print and write when it is due, and return whether it was.

        Args:
            waited: seconds that the loader kept the trainer waiting for this step.

        Raises:
            RunError, GoBack: as `flush`.
        """
        self._pending.append((step, values))
        self._waited += waited
        due = step % self._config.monitor.log_every == 0 or step == values.phase.end.step
        if due and (line := self.flush()):
            self._print(line, values.phase)
        return due

    def flush(self) -> dict[str, Any] | None:
        """Fetch and write all pending steps; returns the last one's line.

        Raises:
            RunError: a step was bad and `[recovery]` ends the run (on every rank, at the same step).
            GoBack: a step was bad and the run is to go on from its newest checkpoint (likewise).
        """
        if not self._pending:
            return None
        steps = [step for step, _ in self._pending]
        values = [value for _, value in self._pending]
        self._pending = []
        rows = _fetch(values)
        now = time.perf_counter()
        self._active += now - self._clock
        self._clock = now
        lines = [self._line(*item) for item in zip(steps, values, rows, strict=True)]
        self._tokens += sum(v.phase.batch_rows * v.phase.sequence_length for v in values)
        lines, end = self._recovery.review(lines, [int(row[-1]) for row in rows])
        if self._main:
            with self._writing():
                self._metrics.write(lines)
                self._draw(lines)
        if end is not None:
            raise end
        return lines[-1]

    def rewind(self, step: int) -> None:
        """Go back to `step`: what is recorded of later ones is dropped and comes again."""
        self._pending = []
        if self._main:
            self._validated = {other for other in self._validated if other <= step}
            self._evaluated = {other for other in self._evaluated if other <= step}
            with self._writing():
                self._metrics.rewind(step)
                self._validations.rewind(step)
                for extra in (self._mixture, self._evaluations):
                    if extra:
                        extra.rewind(step)
                if self._board:
                    self._board.close()
                self._open_board(step)
        self._clock = time.perf_counter()

    def sync(self) -> None:
        """Flush, and make the lines durable: none may be missing behind a checkpoint.

        Raises:
            RunError: as `flush`.
        """
        self.flush()
        if self._main:
            with self._writing():
                self._metrics.sync()
                self._validations.sync()
                for extra in (self._mixture, self._evaluations):
                    if extra:
                        extra.sync()

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

    def _draw(self, lines: list[dict[str, Any]]) -> None:
        if not self._board:
            return
        for line in lines:
            total = sum(line["source_tokens"].values()) or 1
            self._board.scalars(
                line["step"],
                {
                    "loss/train": line["loss"],
                    "optim/lr": line["learning_rate"],
                    "optim/grad_norm": line["gradient_norm"],
                    "progress/tokens": line["tokens"],
                    **{f"loss/train_{name}": loss for name, loss in line["source_loss"].items()},
                    **{f"data/frac/{name}": count / total for name, count in line["source_tokens"].items()},
                },
            )

    def _print(self, line: dict[str, Any], phase: PhasePlan) -> None:
        step, end = line["step"], self._plan.end.step
        rate = self._tokens / max(self._active, 1e-9)
        seconds_left = (self._plan.end.token - line["tokens"]) / max(rate, 1e-9)
        mfu = None
        if self._peak:
            mfu = (
                100
                * rate
                * flops_per_token(self._config.model, phase.sequence_length)
                / (self._peak * self._world.size)
            )
        self.say(
            f"step {step}/{end}  loss {line['loss']:.4f}  gnorm {line['gradient_norm']:.3f}  "
            f"lr {line['learning_rate']:.3e}  {_short(rate)} tok/s  "
            f"mfu {'n/a' if mfu is None else f'{mfu:.1f}%'}  eta {_clock(seconds_left)}"
            + (f"  skipped: {line['skipped']}" if "skipped" in line else "")
        )
        if self._main and self._board:
            scalars = {"perf/tokens_per_s": rate, "data/wait_percent": 100 * self._waited / max(self._active, 1e-9)}
            if mfu is not None:
                scalars["perf/mfu_percent"] = mfu
            if self._world.device.type == "cuda":
                scalars["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            with self._writing():
                self._board.scalars(step, scalars)
        self._active, self._waited, self._tokens = 0.0, 0.0, 0

    def validation(self, step: int, sums: Tensor, tokens: Tensor) -> dict[str, float]:
        """Record validation losses from the global sums of `eval.validation`; returns them by source."""
        self.flush()
        losses = {
            name: loss / count
            for name, loss, count in zip(self._plan.sources, sums.tolist(), tokens.tolist(), strict=True)
            if count
        }
        first = self._first_losses or losses
        self._first_losses = first
        parts = [
            f"{name} {loss:.4f}" + (f" ({loss - first[name]:+.4f})" if first is not losses and name in first else "")
            for name, loss in losses.items()
        ]
        self.say(f"validation at step {step}: " + "  ".join(parts))
        if self._main:
            position = self._plan.position(step)
            with self._writing():
                if step not in self._validated:  # a start that measures for the mixture may do it again
                    self._validations.write([{"step": step, "tokens": position.token, "validation_loss": losses}])
                    self._validated.add(step)
                if self._board:
                    scalars = {f"loss/val_{name}": loss for name, loss in losses.items()}
                    if losses:
                        scalars["loss/val"] = float(sums.sum() / tokens.sum())
                    self._board.scalars(step, scalars)
                    self._board.flush()
        self._clock = time.perf_counter()
        return losses

    def mixture(self, adjustment: Adjustment, before: dict[str, float]) -> None:
        """Record a change of the mix; `before`: the shares until now."""
        parts = [
            f"{name} {before[name]:.2%} -> {share:.2%} (perplexity {adjustment.perplexity[name]:.3f})"
            for name, share in adjustment.shares.items()
            if name in adjustment.perplexity
        ]
        self.say(f"mixture at step {adjustment.step}: " + ", ".join(parts))
        if not self._main or not self._mixture:
            return
        with self._writing():
            self._mixture.rewind(adjustment.step - 1)  # a start that measures anew replaces what it finds
            self._mixture.write([adjustment.to_json()])
            if self._board:
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
        if self._main and self._evaluations:
            with self._writing():
                token = self._plan.position(step).token
                self._evaluations.write([{"step": step, "tokens": token, "tasks": metrics}])
                self._evaluated.add(step)
                if self._board:
                    scalars = {
                        f"task/{task}/{name}": v for task, values in metrics.items() for name, v in values.items()
                    }
                    self._board.scalars(step, scalars)
                    self._board.flush()
        self._clock = time.perf_counter()

    def has_evaluation(self, step: int) -> bool:
        """Whether the benchmarks after `step` are recorded; known to the main rank."""
        return self._main and step in self._evaluated

    def pause_ends(self) -> None:
        """Time spent on a checkpoint does not count as training time."""
        self._clock = time.perf_counter()

    def sample(self, step: int, prompt: str, continuation: str) -> None:
        """Show the sampled continuation of a finished run."""
        self.say(f"\nsample at the end, continuing {prompt!r}:\n{prompt}{continuation}\n")
        if self._main and self._board:
            self._board.text("sample", f"{prompt}{continuation}")

    def close(self, outcome: str) -> None:
        """Flush everything and say where the run lives."""
        self.flush()
        if not self._main:
            return
        self._metrics.close()
        self._validations.close()
        for extra in (self._mixture, self._evaluations):
            if extra:
                extra.close()
        if self._board:
            self._board.close()
        self.say(f"{outcome}: the run is in {self._folder} (MFU formula: {FORMULA})")
        if self._board:
            self.say(f"curves: python -m tensorboard.main --logdir {self._folder / 'tensorboard'}")
        if outcome == "stopped":
            self.say("to go on: the same command again")


def _fetch(values: list[StepValues]) -> list[list[float]]:
    """The numbers of all steps in one copy, the one synchronisation: per step totals, denominator, gradient norm, the
    lower and upper half of the fingerprint (a double holds 32 bits exactly, not 64), and the verdict."""
    prints = torch.stack([v.fingerprint for v in values])
    halves = torch.stack([prints & 0xFFFFFFFF, (prints >> 32) & 0xFFFFFFFF], dim=1)
    floats = torch.stack([torch.cat([v.totals, v.denominator[None], v.gradient_norm[None]]) for v in values])
    verdicts = torch.stack([v.verdict for v in values])[:, None]
    return torch.cat([floats.double(), halves.double(), verdicts.double()], dim=1).tolist()


def _short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
