"""torch.compile, one graph per kind of block, and a watch over what is compiled after the start.

Apply it after `apply_activation_checkpoint` and before `fully_shard`. Blocks share compiled code: PyTorch compiles once
for each set of guards (shapes, types, whether the block is recomputed, whether gradients are wanted), not once for each
block.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config
import torch._inductor.config
import torch._logging
from torch import nn
from torch._dynamo.utils import counters, get_compilation_metrics
from torch._guards import CompileContext

from titan_yulan.config.sections import CompileSection
from titan_yulan.errors import UserError, explain_os_error

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

# Graphs of one function before PyTorch gives up, which with fullgraph ends the run. PyTorch's own 8 is too few: blocks
# that keep and blocks that recompute, training and validation, and each phase's shapes multiply.
_RECOMPILE_LIMIT = 64

# part of a guard's text -> what to do about it; of several that fit, the first counts
_REMEDIES = {
    "size mismatch": "pad every micro-batch and validation batch to the same rows and sequence length",
    "requires_grad": "freeze or unfreeze parameters before the first step",
    "dtype mismatch": "keep the compute type constant",
    # last: after a validation every report names its graph too, whatever the cause
    "grad_mode": "run validation once before the first step",
}
_GUARD = re.compile(r"(?:- )?\S*\d+/\d+\S*: (.+?)(?:\s{2,}#.*|\. Guard failed on a parameter.*)?")
_OTHER_REMEDY = "keep this value constant after the first steps, or set compile.enabled = false"


def compile_layers(layers: nn.ModuleList, section: CompileSection) -> None:
    """Make the blocks compile themselves, each as one graph, at their first call with each new shape.

    Args:
        layers: the decoder's blocks, after activation checkpointing and before FSDP2, whose hooks then stay outside the
            compiled code.
        section: does nothing unless `enabled`.

    Raises:
        UserError: the folder for compiled code cannot be made.
    """
    if not section.enabled:
        return
    if section.backend == "inductor":  # the other generates no code
        use_cache(section)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_is_not_about_contexts)
    for block in layers:
        block.compile(fullgraph=True, dynamic=False, backend=section.backend)


def compile_loss(objective: Any, section: CompileSection) -> None:
    """Make an objective's `loss` compile itself as one graph, which the head's operator is a part of; in place."""
    if section.enabled:
        objective.loss = torch.compile(objective.loss, fullgraph=True, dynamic=False, backend=section.backend)


def use_cache(section: CompileSection) -> Path:
    """Keep compiled code between starts, and return the folder: `section.cache_dir` if it is set, else where
    `TORCHINDUCTOR_CACHE_DIR` points, else `titan_yulan/inductor` below the user's cache home. Call it before the first
    compilation.

    Raises:
        UserError: the folder cannot be made.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    chosen = section.cache_dir or os.environ.get(CACHE_VARIABLE) or home / "titan_yulan" / "inductor"
    folder = Path(chosen).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = explain_os_error(error, folder)
        raise UserError(f"compile.cache_dir: {why}; name a folder that can be written") from error
    os.environ[CACHE_VARIABLE] = str(folder)
    torch._inductor.config.fx_graph_cache = True
    return folder


def _is_not_about_contexts(record: logging.LogRecord) -> bool:
    # Printed by every rank with selective checkpointing, as advice for code with in-place operations; blocks have none.
    return "context_fn is passed to torch.utils.checkpoint" not in record.getMessage()


class CompileWatch:
    """Tells how long the start compiled, and then of every further compilation, which costs seconds to minutes.

    Make one before the first step; call `settle` when every kind of step was run once, and `recompiled` after every
    step from then on. Neither waits for the device.
    """

    def __init__(self) -> None:
        self._last = _last(get_compilation_metrics())
        self._cache = _cache_use()
        _guard_failures()

    def settle(self) -> str:
        """From now on compilations are unexpected. One line about those since the watch was made or last settled;
        empty if there were none."""
        metrics, hits = self._new(), _cache_use()
        found, missed = (now - before for now, before in zip(hits, self._cache, strict=True))
        self._cache = hits
        _guard_failures().clear()
        if not metrics:
            return ""
        graphs = sum(metric.is_forward is True for metric in metrics)
        line = f"torch.compile: {graphs} graphs in {_seconds(metrics):.1f} s"
        if found + missed:
            line += f"; {found} of {found + missed} parts came from the cache in {os.environ.get(CACHE_VARIABLE)}"
        return line

    def recompiled(self) -> list[str]:
        """One line for each compilation since the last call: function, time, guards that failed, and a remedy."""
        lines = []
        for metric in self._new():
            if metric.is_forward is not True:  # a backward pass, compiled late: its forward pass was reported
                continue
            what = f"{metric.co_name} ({metric.co_filename}:{metric.co_firstlineno})"
            first = (metric.recompile_reason or "its first call").splitlines()[0]
            why = "; ".join(_guard_failures().pop(metric.compile_id, None) or [first])
            remedy = next((text for part, text in _REMEDIES.items() if part in why), _OTHER_REMEDY)
            lines.append(f"torch.compile compiled {what} in {_seconds([metric]):.1f} s: {why}. Remedy: {remedy}.")
        return lines

    def _new(self) -> list[Any]:
        metrics, last = get_compilation_metrics(), self._last
        self._last = _last(metrics)
        # PyTorch keeps the newest 64; if the last one seen is gone, all are new.
        for index in reversed(range(len(metrics))):
            if metrics[index] is last:
                return metrics[index + 1 :]
        return metrics


def _last(metrics: list[Any]) -> Any:
    return metrics[-1] if metrics else None


def _seconds(metrics: list[Any]) -> float:
    return sum(metric.duration_us or 0 for metric in metrics) / 1e6


def _cache_use() -> tuple[int, int]:
    """(parts found in the cache of compiled code, parts not found); forward and backward pass are a part each."""
    counts = counters["inductor"]
    return counts["fxgraph_cache_hit"], counts["fxgraph_cache_miss"] + counts["fxgraph_cache_bypass"]


def _guard(line: str) -> str | None:
    """What failed, from one line of a report ("- 0/1: tensor 'x' size mismatch ..."); None for the lines between."""
    found = _GUARD.fullmatch(line.strip())
    return found[1] if found else None


@functools.cache
def _guard_failures() -> dict[str | None, list[str]]:
    """A dictionary that PyTorch's log fills with (id of a compilation, the guards that failed in each earlier graph).

    The metrics name only the graph used last, which may be that of validation: then the guard that matters is missing.
    """
    failures: dict[str | None, list[str]] = {}
    state = torch._logging._internal.log_state
    printed = state.is_artifact_enabled("recompiles")

    def record(entry: logging.LogRecord) -> bool:
        guards = [guard for line in entry.getMessage().splitlines() if (guard := _guard(line))]
        failures[str(CompileContext.current_compile_id())] = list(dict.fromkeys(guards))
        return printed

    state.enable_artifact("recompiles")
    torch._logging.getArtifactLogger("torch._dynamo.guards", "recompiles").addFilter(record)
    return failures
