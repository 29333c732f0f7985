"""Where a run's curves go: TensorBoard files, Weights & Biases, both or none, under the same tags."""

from __future__ import annotations

import errno
import importlib
import math
import re
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from titan_yulan.config.sections import RunConfig
from titan_yulan.errors import UserError
from titan_yulan.monitor.events import append_event

# In the run folder: the id of the run at Weights & Biases.
WANDB_FILE = "wandb_run"


class Board(Protocol):
    """What shows curves; a tag is the same in every one. Numbers that are not finite are left out."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def text(self, tag: str, text: str) -> None: ...
    def rewind(self, step: int) -> None:
        """What comes after `step` will come again."""
        ...

    def flush(self) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """TensorBoard files; what an earlier start wrote of steps after `step` is purged, so that curves do not double."""

    def __init__(self, folder: Path, step: int, sources: Sequence[str]) -> None:
        self._previous_hook, threading.excepthook = threading.excepthook, self._forget_full_disk
        self._folder = folder
        self._open(step)
        self._writer.add_custom_scalars(layout(sources))

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not everywhere installed

        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(tag, value, step)

    def text(self, tag: str, text: str) -> None:
        self._writer.add_text(tag, text)

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._previous_hook

    def _forget_full_disk(self, arguments: threading.ExceptHookArgs) -> None:
        """Its thread would print a traceback when the disk is full; its next call raises the same error."""
        error = arguments.exc_value
        if not (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
            self._previous_hook(arguments)


class WeightsAndBiases:
    """A run at Weights & Biases; every start on the same run folder goes on with the same one.

    What was sent there cannot be taken back: steps that are trained again after a crash or a bad step are there twice,
    at the same place of the axis `step`. When its service fails during the run, nothing more is sent; the run goes on.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """
        Raises:
            UserError: the package is missing, or refuses, as when there is no login.
        """
        section = config.monitor
        wandb = import_wandb()
        identity = folder / WANDB_FILE
        if not identity.exists():
            identity.write_text(secrets.token_hex(8), encoding="utf-8")
        try:
            self._run = wandb.init(
                project=section.wandb_project,
                group=section.wandb_group or None,
                name=section.wandb_name or config.run.name,
                id=identity.read_text(encoding="utf-8"),
                resume="allow",
                dir=str(folder),
            )
            # its own count of steps cannot go back
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except wandb.Error as error:
            raise UserError(
                f"monitor.wandb_project: {error}; log in (wandb login), keep the files here (WANDB_MODE=offline), or "
                "remove the key"
            ) from error
        self._folder, self._lost = folder, False

    @contextmanager
    def _sending(self) -> Iterator[None]:
        try:
            yield
        # whatever the package raises when its service dies or the network goes: the files of the run are complete
        except Exception as error:
            self._lost = True
            line = f"WARNING: Weights & Biases failed ({type(error).__name__}: {error}); no more curves go there"
            print(line, flush=True)
            with suppress(OSError):  # a full disk ends the run where something is written that must not be missing
                append_event(self._folder, "wandb failed", message=line)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if not self._lost:
            with self._sending():
                self._run.log({"step": step, **{tag: value for tag, value in values.items() if math.isfinite(value)}})

    def text(self, tag: str, text: str) -> None:
        if not self._lost:
            with self._sending():
                self._run.summary[tag] = text

    def rewind(self, step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None:
        if not self._lost:
            with self._sending():
                self._run.finish()


class Boards:
    """Several as one; none is fine."""

    def __init__(self, boards: Sequence[Board]) -> None:
        self._boards = boards

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for board in self._boards:
            board.scalars(step, values)

    def text(self, tag: str, text: str) -> None:
        for board in self._boards:
            board.text(tag, text)

    def rewind(self, step: int) -> None:
        for board in self._boards:
            board.rewind(step)

    def flush(self) -> None:
        for board in self._boards:
            board.flush()

    def close(self) -> None:
        for board in self._boards:
            board.close()


def open_boards(config: RunConfig, sources: Sequence[str], folder: Path, step: int) -> Boards:
    """The boards that `[monitor]` asks for.

    Args:
        sources: names of all sources of the plan.
        folder: the run folder.
        step: of the checkpoint that the run goes on from; -1: a fresh start.

    Raises:
        UserError: as `WeightsAndBiases`.
    """
    boards: list[Board] = []
    if config.monitor.tensorboard:
        boards.append(TensorBoard(folder / "tensorboard", step, sources))
    if config.monitor.wandb_project:
        boards.append(WeightsAndBiases(config, folder))
    return Boards(boards)


def import_wandb() -> Any:
    """The package.

    Raises:
        UserError: it is missing.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise UserError(
            "monitor.wandb_project: the package wandb is missing; pip install wandb, or remove the key"
        ) from None


def layout(sources: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Which curves share a chart on TensorBoard's page "Custom scalars": group, chart, tags as regular expressions."""
    names = "|".join(re.escape(name) for name in sources)

    def chart(*tags: str) -> list[Any]:
        return ["Multiline", list(tags)]

    return {
        "losses": {
            "training": chart(r"loss/train.*"),
            "validation": chart(rf"loss/val(_({names}))?$"),
            "validation perplexity": chart(r"loss/val_perplexity$"),
        },
        "curriculum": {
            "mix": chart(r"data/frac/.*"),
            "adjusted shares": chart(r"mixture/share/.*"),
            "learning rate": chart(r"optim/lr$"),
            "rows of a batch": chart(r"progress/batch_rows$"),
        },
        "stability": {
            "gradient norm": chart(r"optim/grad_norm$"),
            "gradient norm of layers": chart(r"gradient/.*"),
            "root mean square of the residual stream": chart(r"hidden/(embedding|mlp_residual/.*|final_norm)/rms$"),
            "variance of the residual stream": chart(r"hidden/(embedding|mlp_residual/.*|final_norm)/variance$"),
            "root mean square of attention's output": chart(r"hidden/attention_output/.*/rms$"),
            "root mean square of the MLP's output": chart(r"hidden/mlp_output/.*/rms$"),
            "variance behind the norm before attention": chart(r"hidden/input_norm/.*/variance$"),
            "log-sum-exp of attention": chart(r"attention/logsumexp/.*"),
            "root mean square of weights": chart(r"weight/.*/rms$"),
            "scalars of matrices": chart(r"scalar/.*"),
            "update over weight": chart(r"update/.*"),
        },
        "speed": {
            "tokens per second": chart(r"perf/tokens_per_s$"),
            "MFU, percent": chart(r"perf/mfu_percent$"),
            "shares of wall time, percent": chart(r"perf/share_.*"),
            "memory, GiB": chart(r"memory/.*"),
        },
    }
