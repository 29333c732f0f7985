"""How the benchmark measures: the device's own rates, the check against float64, times, and peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from titan_yulan.kernels.bench_operations import Function, Operation, Shape

_ORACLE_ROWS = 1024  # tokens at a time in float64: logits of 100,000 columns are 0.8 GB each time they are held
_SAMPLES, _SECONDS = 40, 0.4  # a measurement ends with so many samples, or after so long if it has 5

# Largest error of a result, relative to its norm, and largest error of one element, relative to the largest element.
# Several roundings in a 16-bit type stay far below, a wrong or forgotten element does not.
_LIMITS = {torch.bfloat16: (2e-2, 0.1), torch.float16: (4e-3, 0.05), torch.float32: (1e-4, 1e-2)}


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median and 20th and 80th percentile on the device, and wall time of a call with its launches."""

    median: float
    low: float
    high: float
    call: float
    samples: int


class WrongResult(Exception):
    """An implementation's result is too far from the float64 result."""


class Case:
    """Inputs of one operation at one shape, what float64 gives for them, and copies for implementations to work on."""

    def __init__(self, operation: Operation, shape: Shape, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int, mean: float = 0.0, deviation: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
            noise = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
            return noise.mul_(deviation).add_(mean).to(dtype or shape.dtype)

        self.operation, self.shape, self.device = operation, shape, device
        self.inputs = operation.inputs(shape, normal)
        first = tuple(t[:1] if row else t for t, row in zip(self.inputs, operation.rows, strict=True))
        outputs = operation.mathematics(*first)
        # A sum gets the gradient 1, as the end of a training step gives it.
        self.gradients = [
            normal(shape.tokens, *t.shape[1:]) if t.dim() else torch.ones((), device=device) for t in outputs
        ]
        self.expected = self._oracle()

    def _oracle(self) -> list[Tensor]:
        """Outputs, then gradients, in float64, chunk after chunk of the tokens."""
        n = self.operation.differentiable
        pieces: list[list[Tensor]] = []
        for start in range(0, self.shape.tokens, _ORACLE_ROWS):
            part = slice(start, start + _ORACLE_ROWS)
            inputs = [t[part] if row else t for t, row in zip(self.inputs, self.operation.rows, strict=True)]
            inputs = [t.double() if t.is_floating_point() else t for t in inputs]
            leaves = [t.detach().requires_grad_() for t in inputs[:n]]
            outputs = self.operation.mathematics(*leaves, *inputs[n:])
            gradients = [g.double()[part] if g.dim() else g.double() for g in self.gradients]
            pieces.append([t.detach() for t in (*outputs, *torch.autograd.grad(outputs, leaves, gradients))])
            if start:  # sums are added up at once: a weight's gradient is large
                for i, row in enumerate(self._rows()):
                    if not row:
                        pieces[0][i] += pieces[-1][i]
                        pieces[-1][i] = pieces[0][i]
        return [
            torch.cat([piece[i] for piece in pieces]) if row else pieces[0][i] for i, row in enumerate(self._rows())
        ]

    def _rows(self) -> list[bool]:
        """Which of the outputs and gradients have a row per token."""
        return [g.dim() > 0 for g in self.gradients] + list(self.operation.rows[: self.operation.differentiable])

    def copy(self) -> Copy:
        return Copy(self)


class Copy:
    """One set of inputs and output gradients that an implementation may overwrite (some do, in their backward pass)."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._outputs: tuple[Tensor, ...] = ()
        n = case.operation.differentiable
        self.inputs = [t.clone().requires_grad_(i < n) for i, t in enumerate(case.inputs)]
        self.gradients = [t.clone() for t in case.gradients]

    def restore(self) -> None:
        with torch.no_grad():
            originals = self._case.inputs + self._case.gradients
            for mine, original in zip(self.inputs + self.gradients, originals, strict=True):
                mine.copy_(original)
        self._outputs = ()

    def forward(self, function: Function) -> Sequence[Tensor]:
        with torch.no_grad():
            return function(*(t.detach() for t in self.inputs))

    def keep_forward(self, function: Function) -> None:
        """What `backward` goes back through."""
        self._outputs = function(*self.inputs)

    def backward(self) -> Sequence[Tensor]:
        leaves = self.inputs[: self._case.operation.differentiable]
        return torch.autograd.grad(self._outputs, leaves, self.gradients)

    def forward_backward(self, function: Function) -> Sequence[Tensor]:
        self.keep_forward(function)
        gradients = self.backward()
        return (*(t.detach() for t in self._outputs), *gradients)


def errors(case: Case, function: Function) -> list[float]:
    """Norm of the error over the norm of the result, per output and gradient.

    Runs on memory filled with NaN, so that an element that is never written cannot pass by luck.

    Raises:
        WrongResult: an error is too large, a result is not finite, or has another type or shape.
    """
    copy = case.copy()
    _poison(case)
    for result, expected in zip(copy.forward(function), case.expected, strict=False):  # without gradients
        _error(result, expected, case.shape.dtype)
    copy.restore()
    _poison(case)
    results = copy.forward_backward(function)
    return [_error(t, e, case.shape.dtype) for t, e in zip(results, case.expected, strict=True)]


def accumulated_error(case: Case, function: Function) -> float:
    """Error of what `Operation.accumulated` gives, against the gradient of the last differentiable input."""
    with torch.no_grad():
        (result,) = function(*case.inputs)
    return _error(result, case.expected[-1], case.shape.dtype)


def _poison(case: Case) -> None:
    """Leave NaN where the allocator will most likely put the results: in just freed blocks of their sizes."""
    blocks = [torch.full(t.shape, torch.nan, dtype=case.shape.dtype, device=case.device) for t in case.expected]
    del blocks


def _error(result: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    if result.shape != expected.shape:
        raise WrongResult(f"a result has shape {tuple(result.shape)} instead of {tuple(expected.shape)}")
    if not result.isfinite().all():
        raise WrongResult(f"{int((~result.isfinite()).sum())} elements of a result are not finite, or were not written")
    squares, largest = 0.0, 0.0
    parts = zip(result.reshape(-1).split(1 << 28), expected.reshape(-1).split(1 << 28), strict=True)  # 2 GB in float64
    for mine, theirs in parts:
        difference = mine.double() - theirs
        squares += float(difference.norm()) ** 2
        largest = max(largest, float(difference.abs_().max()))
    relative, largest = squares**0.5 / float(expected.norm()), largest / float(expected.abs().max())
    limit, element_limit = _LIMITS[dtype]
    if relative > limit or largest > element_limit:
        raise WrongResult(f"relative error {relative:.1e} (limit {limit:.0e}), of one element {largest:.1e}")
    return relative


# --- time -------------------------------------------------------------------------------------------------------------


def timing(case: Case, function: Function, mode: str) -> Timing:
    """Time of `mode` ("fwd", "bwd", "fwd_bwd") on copies of the inputs that together exceed the second-level cache."""
    copies = [case.copy() for _ in range(_copies(case))]

    def prepare() -> list[Callable[[], object]]:
        for copy in copies:
            copy.restore()
        if mode == "bwd":
            for copy in copies:
                copy.keep_forward(function)
            return [copy.backward for copy in copies]
        return [lambda c=c: (c.forward if mode == "fwd" else c.forward_backward)(function) for c in copies]

    measure = _batch_on_gpu if case.device.type == "cuda" else _batch_on_cpu
    for _ in range(2):
        host = _call_seconds(prepare(), case.device)
    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < 5 or (len(samples) < _SAMPLES and time.perf_counter() - start < _SECONDS):
        samples += measure(prepare(), host)
    call = min(_call_seconds(prepare(), case.device) for _ in range(3))
    low, *_, high = statistics.quantiles(samples, n=5)
    return Timing(statistics.median(samples), low, high, 1e3 * call, len(samples))


def _copies(case: Case) -> int:
    if case.device.type != "cuda":
        return 2
    size = sum(t.nbytes for t in case.inputs)
    return min(16, max(2, -(-3 * torch.cuda.get_device_properties(case.device).L2_cache_size // size)))


def _call_seconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Wall time of one call, from the launch to the result, when calls follow each other."""
    _synchronize(device)
    start = time.perf_counter()
    for call in calls:
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / len(calls)


def _batch_on_cpu(calls: Sequence[Callable[[], object]], host: float) -> list[float]:
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _batch_on_gpu(calls: Sequence[Callable[[], object]], host: float) -> list[float]:
    """The GPU first waits for as long as the calls take to be launched, so that it never waits for a launch later.

    Results are kept until the end: a block that is handed out again would still be in the cache.
    """
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
    torch.cuda.synchronize()
    torch.cuda._sleep(int(2e9 * min(0.05, 1.5 * host * len(calls))))
    kept = []
    for call, (start, end) in zip(calls, events, strict=True):
        start.record()
        kept.append(call())
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- memory and rates -------------------------------------------------------------------------------------------------


def peak_memory(case: Case, function: Function, mode: str) -> int | None:
    """Bytes that one call takes beyond its inputs at the worst moment; None on a CPU, which does not count them."""
    if case.device.type != "cuda":
        return None
    copy = case.copy()
    with _peak() as bytes_taken:
        if mode == "fwd":
            copy.forward(function)
        else:
            copy.forward_backward(function)
    return bytes_taken[0]


@contextmanager
def _peak() -> Iterator[list[int]]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = [0]
    yield result
    torch.cuda.synchronize()
    result[0] = torch.cuda.max_memory_allocated() - before


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy much larger than any cache: the best an operation can do."""
    size = 1 << (30 if device.type == "cuda" else 26)
    pairs = [(torch.rand(size // 4, device=device), torch.empty(size // 4, device=device)) for _ in range(2)]
    milliseconds = _median(device, [lambda p=p: p[1].copy_(p[0]) for p in pairs])
    return 2 * size / milliseconds * 1e3


def matrix_rate(device: torch.device) -> float:
    """Floating-point operations per second of a large bfloat16 matrix product (float32 on a CPU)."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / _median(device, [lambda: torch.mm(a, b)] * 2) * 1e3


def _median(device: torch.device, calls: Sequence[Callable[[], object]]) -> float:
    for _ in range(2):
        host = _call_seconds(calls, device)
    measure = _batch_on_gpu if device.type == "cuda" else _batch_on_cpu
    return statistics.median([t for _ in range(10) for t in measure(calls, host)])
