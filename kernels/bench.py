"""Time the operations of this folder beside Liger, torch.compile and plain PyTorch, in one process.

    python kernels/bench.py                                       everything, at the sizes of YuLan-Mini (on a GPU)
    python kernels/bench.py rms_norm swiglu --tokens 4096,16384 --impl triton,compile --mode fwd,bwd --out DIR --plot

First the device's own copy and matrix-product rates; then, per operation, each implementation is checked against
float64 and timed only if it is right. docs/kernels.md says how, and what the columns mean.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

if not __package__:  # run as a script: the folder of the script, not that of the checkout, is first on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from titan_yulan.kernels import compile_ahead
from titan_yulan.kernels.bench_measure import (
    Case,
    Timing,
    WrongResult,
    accumulated_error,
    copy_rate,
    errors,
    matrix_rate,
    peak_memory,
    timing,
)
from titan_yulan.kernels.bench_operations import KEYS, OPERATIONS, Function, Operation, Shape, implementation
from titan_yulan.kernels.bench_report import Report, Row, describe_machine

IMPLEMENTATIONS = (
    "triton",
    "reference",
    "liger",
    "liger_float32",
    "torch",
    "compile",
)  # compile last: it takes most of the time
MODES = ("fwd", "bwd", "fwd_bwd")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Request:
    """What to measure, from the command line."""

    operations: tuple[str, ...]
    implementations: tuple[str, ...]
    tokens: tuple[int, ...]
    modes: tuple[str, ...]
    size: str
    dtype: str
    budget: float  # seconds
    device: torch.device


class Bench:
    """Measures a request and gives the rows to a report."""

    def __init__(self, request: Request, rates: tuple[float, float], start: float) -> None:
        self._request, self._rates = request, rates
        self._end = start + request.budget
        self._used: dict[str, dict[str, dict[str, int]]] = {}

    def rows(self) -> Iterator[Row]:
        """All rows; those of torch.compile come last, so that a budget that ends early costs only the peer."""
        request = self._request
        for names in ([n for n in request.implementations if n != "compile"], ["compile"]):
            for operation in (OPERATIONS[name] for name in request.operations):
                for tokens in request.tokens:
                    yield from self._place(operation, tokens, [n for n in names if n in request.implementations])

    def _place(self, operation: Operation, tokens: int, names: Sequence[str]) -> Iterator[Row]:
        request = self._request
        shape = Shape(tokens, *compile_ahead.SIZES[request.size], KEYS[request.size], DTYPES[request.dtype])
        case: Case | None = None
        for name in names:
            if name in ("liger", "liger_float32") and getattr(operation, name) is None:
                continue
            rows = [
                Row(operation.name, name, mode, request.size, tokens, request.dtype, "measured")
                for mode in request.modes
                if mode in operation.traffic
            ]
            try:
                if time.monotonic() > self._end:
                    raise Unmeasured(f"not measured: the budget of {request.budget:.0f} s was spent")
                function = self._function(operation, name)
                case = case or Case(operation, shape, request.device)
                found, accumulated = self._check(case, function, name)
                while rows:
                    yield self._measured(rows[0], case, function, found, accumulated)
                    rows.pop(0)
            except Exception as problem:  # a peer that fails must not end the run; what failed stands in the table
                yield from (replace(row, status=_reason(problem)) for row in rows)
            if request.device.type == "cuda":
                torch.cuda.empty_cache()

    def _function(self, operation: Operation, name: str) -> Function:
        if name in ("triton", "liger", "liger_float32") and self._request.device.type != "cuda":
            raise Unmeasured("not measured: needs a GPU")
        return implementation(operation, name)

    def _check(self, case: Case, function: Function, name: str) -> tuple[list[float], float | None]:
        """Errors of outputs and gradients, and of the sum behind our weight gradient if the operation has one."""
        found, operation = errors(case, function), case.operation
        if operation.accumulated is None or name not in ("triton", "reference"):
            return found, None
        return found, accumulated_error(case, operation.accumulated(name))

    def _measured(self, row: Row, case: Case, function: Function, found: list[float], accumulated: float | None) -> Row:
        peak = peak_memory(case, function, row.mode)
        row = replace(
            self._timed(row, case, timing(case, function, row.mode)),
            error=max(found),
            errors=" ".join(f"{error:.2e}" for error in found),
            accumulated_error=accumulated,
            peak_mib=None if peak is None else peak / 2**20,
        )
        return self._with_resources(row) if row.implementation == "triton" else row

    def _timed(self, row: Row, case: Case, timed: Timing) -> Row:
        operation, seconds = case.operation, timed.median / 1e3
        copy, matrix = self._rates
        rate = operation.traffic[row.mode](case.shape) / seconds
        work = operation.work[row.mode](case.shape) / seconds if operation.work else None
        return replace(
            row,
            ms=timed.median,
            ms_p20=timed.low,
            ms_p80=timed.high,
            call_ms=timed.call,
            samples=timed.samples,
            gigabytes_per_s=rate / 1e9,
            share_of_copy=rate / copy,
            tflops=None if work is None else work / 1e12,
            share_of_matrix=None if work is None else work / matrix,
            target=operation.targets.get(row.mode) if row.implementation == "triton" else None,
        )

    def _with_resources(self, row: Row) -> Row:
        """With registers and spills of the operation's kernels, if the GPU is one they are compiled ahead for."""
        target = "sm_{}{}".format(*torch.cuda.get_device_capability(self._request.device))
        module = OPERATIONS[row.operation].module
        if target not in compile_ahead.SHARED_LIMIT or row.dtype != "bf16":
            return row
        if module not in self._used:
            self._used[module] = compile_ahead.table(target, [row.size], [module])[row.size]
        kernels = self._used[module].values()
        registers, spills = (max(kernel[name] for kernel in kernels) for name in ("registers", "spills"))
        return replace(row, registers=registers, spills=spills)


class Unmeasured(Exception):
    """Why an implementation is not measured."""


def _reason(problem: Exception) -> str:
    if isinstance(problem, Unmeasured):
        return str(problem)
    if isinstance(problem, WrongResult):
        return f"refused, its result is wrong: {problem}"
    if isinstance(problem, ImportError):
        return f"not measured: {problem}"
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    message = re.sub(r"[|\s]+", " ", str(problem))[:200]
    return f"failed: {type(problem).__name__}: {message}"


def read_arguments(arguments: Sequence[str] | None = None) -> tuple[Request, argparse.Namespace]:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", metavar="OP", help=f"of {', '.join(OPERATIONS)}; default: all")
    default = "triton,liger,liger_float32,torch,compile" if cuda else "reference,torch"
    parser.add_argument("--impl", default=default, help=f"of {','.join(IMPLEMENTATIONS)} (default here: {default})")
    default = "4096,16384" if cuda else "256"
    parser.add_argument("--tokens", default=default, help=f"rows, separated by commas (default here: {default})")
    parser.add_argument("--mode", default=",".join(MODES), help="default: %(default)s; losses have no bwd of their own")
    default = "yulan_mini_2b" if cuda else "debug"
    parser.add_argument("--size", choices=list(compile_ahead.SIZES), default=default, help="default here: %(default)s")
    default = "bf16" if cuda else "fp32"
    parser.add_argument("--dtype", choices=list(DTYPES), default=default, help="default here: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    parser.add_argument("--plot", action="store_true", help="also a PNG per operation (needs matplotlib)")
    parser.add_argument("--budget-s", type=float, default=3600.0, help="start nothing after this long (default: 3600)")
    options = parser.parse_args(arguments)

    def words(name: str, allowed: Sequence[str], given: Sequence[str]) -> tuple[str, ...]:
        if unknown := [word for word in given if word not in allowed]:
            parser.error(f"{name}: {', '.join(unknown)} is none of {', '.join(allowed)}")
        return tuple(word for word in allowed if word in given)

    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", options.tokens):
        parser.error(f"--tokens {options.tokens}: give positive whole numbers separated by commas")
    request = Request(
        operations=words("OP", list(OPERATIONS), options.operations or list(OPERATIONS)),
        implementations=words("--impl", IMPLEMENTATIONS, options.impl.split(",")),
        tokens=tuple(int(word) for word in options.tokens.split(",")),
        modes=words("--mode", MODES, options.mode.split(",")),
        size=options.size,
        dtype=options.dtype,
        budget=options.budget_s,
        device=torch.device("cuda" if cuda else "cpu"),
    )
    return request, options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 1 if one of our own implementations failed or was wrong."""
    start = time.monotonic()
    request, options = read_arguments(arguments)
    rates = copy_rate(request.device), matrix_rate(request.device)
    machine = describe_machine(request.device, *rates)
    print(f"{machine.device}: copy {rates[0] / 1e9:.1f} GB/s, matrix product {rates[1] / 1e12:.3f} TFLOP/s", flush=True)
    report = Report(options.out, machine)
    for row in Bench(request, rates, start).rows():
        report.add(row)
        rate, share = ("matrix", row.share_of_matrix) if row.tflops else ("copy", row.share_of_copy)
        said = row.status if row.ms is None else f"{row.ms:.4f} ms, {100 * (share or 0):.1f} % of the {rate} rate"
        print(f"{row.operation:22} {row.implementation:10} {row.mode:8} {row.tokens:6} {said}", flush=True)
    for path in report.close(options.plot):
        print(f"wrote {path}")
    ours = [row for row in report.rows if row.implementation in ("triton", "reference")]
    return int(any(row.status.startswith(("refused", "failed")) for row in ours))


if __name__ == "__main__":
    sys.exit(main())
