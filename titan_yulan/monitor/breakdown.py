"""Where a training step's time goes, from a trace of `torch.profiler` (`export_chrome_trace`, with `record_shapes`).

    trace = read_trace(path)
    breakdown(trace, Sizes.of(config.model, tokens_of_a_micro_batch), "ProfilerStep")

On CUDA the kernels, copies and fills count, for as long as they run; each belongs to what the operator that launched it
does. Without any kernel in the trace the operators themselves count, for the time that they do not spend in others.

A matrix product belongs to projections, MLP or head by its sizes, whoever calls it, so that compiled code and other
people's models are told apart in the same way: of its three sizes one is the number of tokens, and the other two are
those of the weight. Everything else goes by names, of the kernel and of all operators around its launch. What has no
name of its own (norms, SwiGLU, rotation, embedding, residual sums, casts) is "norm and elementwise"; compiled code that
is not a product, attention or loss is there, too.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_yulan.config.model import ModelConfig

Event = Mapping[str, Any]

ATTENTION, PROJECTIONS, MLP, ELEMENTWISE = "attention", "projections", "MLP", "norm and elementwise"
HEAD, OPTIMIZER, COMMUNICATION, IDLE = "head + loss", "optimizer", "exposed communication", "idle"
CATEGORIES = (ATTENTION, PROJECTIONS, MLP, ELEMENTWISE, HEAD, OPTIMIZER, COMMUNICATION, IDLE)

_HOST_KINDS = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
_DEVICE_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")

# Tried from top to bottom on the names of the kernel and of everything around its launch.
_NAMES = (
    # collectives, and FSDP2's copies before and behind them
    (re.compile(r"nccl|gloo:|c10d|^fsdp::|^FSDP::", re.IGNORECASE), COMMUNICATION),
    (re.compile(r"^Optimizer\.|_fused_adam|::_foreach_"), OPTIMIZER),
    (re.compile(r"cross_entropy|nll_loss|log_softmax"), HEAD),
    (re.compile(r"attention|flash_(fwd|bwd)|fmha|sdpa|::_softmax|::b(add)?mm$", re.IGNORECASE), ATTENTION),
)
_GENERATED = re.compile(r"^triton_(poi|red|per)_")  # Inductor's fused loops are named after neighbours, too
_PRODUCT = re.compile(r"::(mm|addmm|linear|_linear_pointwise|_scaled_mm)$")
_PACKED = "::packed_linear"
_NONE = -1  # no event is tied to another by this number


@dataclass(frozen=True)
class Sizes:
    """What matrix products are recognised by, on one rank: tokens of a micro-batch, intermediate size, vocabulary."""

    tokens: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, config: ModelConfig, tokens: int, tensor: int = 1) -> Sizes:
        """Sizes on each of `tensor` ranks that share the products; `tokens`: rows x length of a micro-batch."""
        return cls(tokens, config.intermediate_size // tensor, -(-config.vocab_size // tensor))


@dataclass(frozen=True)
class Interval:
    """Something that ran from `start` to `end` (any one unit) and belongs to `category`."""

    start: float
    end: float
    category: str


@dataclass(frozen=True)
class Breakdown:
    """Seconds of a window. `seconds` has every category and adds up to the window; `communication` is the time in which
    any collective ran, also behind computation."""

    window: float
    seconds: dict[str, float]
    communication: float


def read_trace(path: Path) -> list[Event]:
    """The events of a trace that `torch.profiler` exported, as JSON or JSON in gzip."""
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")
    with opened as file:
        return json.load(file)["traceEvents"]


def breakdown(events: Sequence[Event], sizes: Sizes, annotation: str, aside: str | None = None) -> Breakdown:
    """Seconds by category in the time from the first to the last range whose name begins with `annotation`.

    Args:
        aside: beginning of the names of ranges whose time is left out, though it lies in between.

    Raises:
        ValueError: there is no range of that name in the trace.
    """
    ranges = _ranges(events, annotation)
    if not ranges:
        raise ValueError(f"the trace has no range {annotation!r}")
    found, end = intervals(events, sizes), max(end for _, end in ranges)
    parts, now = [], min(start for start, _ in ranges)
    for start, back in [*sorted(_ranges(events, aside) if aside else []), (end, end)]:
        if now < start:
            parts.append(share_out(found, (now, min(start, end)), unit=1e-6))
        now = min(max(now, back), end)
    seconds = {name: sum(part.seconds[name] for part in parts) for name in CATEGORIES}
    return Breakdown(sum(part.window for part in parts), seconds, sum(part.communication for part in parts))


def _ranges(events: Iterable[Event], name: str) -> list[tuple[float, float]]:
    return [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(name)
    ]


def share_out(found: Iterable[Interval], window: tuple[float, float], unit: float = 1.0) -> Breakdown:
    """Divide a window among what ran in it.

    Several intervals of computation at one time (streams, threads) share that time equally. Communication has the time
    in which nothing computed, and idle the time in which nothing ran.

    Args:
        found: in any order, overlapping or not.
        window: start and end, in the intervals' unit.
        unit: seconds of that unit.
    """
    first, last = window
    changes: list[tuple[float, int, str]] = []
    for interval in found:
        start, end = max(interval.start, first), min(interval.end, last)
        if start < end:
            changes += [(start, 1, interval.category), (end, -1, interval.category)]
    changes.sort(key=lambda change: change[0])
    seconds, running = dict.fromkeys(CATEGORIES, 0.0), dict.fromkeys(CATEGORIES, 0)
    communication, now = 0.0, first
    for time, change, changed in [*changes, (last, 0, IDLE)]:
        length, communicating = (time - now) * unit, running[COMMUNICATION] > 0
        computing = sum(running.values()) - running[COMMUNICATION]
        communication += length * communicating
        if computing:
            for name, count in running.items():
                if count and name != COMMUNICATION:
                    seconds[name] += length * count / computing
        else:
            seconds[COMMUNICATION if communicating else IDLE] += length
        running[changed] += change
        now = time
    return Breakdown((last - first) * unit, seconds, communication)


def intervals(events: Sequence[Event], sizes: Sizes) -> list[Interval]:
    """What ran, by category, in the trace's microseconds: kernels if there are any, else operators' own times."""
    on_device = [event for event in events if event.get("cat") in _DEVICE_KINDS]
    threads: dict[tuple[Any, Any], list[Event]] = {}
    for event in events:
        if event.get("cat") in _HOST_KINDS and "dur" in event:
            threads.setdefault((event["pid"], event["tid"]), []).append(event)
    if not on_device:
        return [found for thread in threads.values() for found in _own_times(thread, sizes)]
    begun = [around for thread in threads.values() for _, _, around in _segments(thread, starts=True)]
    launches = {_argument(around[-1], "correlation"): around[:-1] for around in begun}
    # for a launch on a thread that the trace cannot place: the operator that was under way
    operators = {_argument(around[-1], "External id"): around for around in begun if around[-1]["cat"] == "cpu_op"}
    for known in (launches, operators):
        known.pop(_NONE, None)
    found = []
    for event in on_device:
        around = launches.get(_argument(event, "correlation")) or operators.get(_argument(event, "External id"), ())
        found.append(Interval(event["ts"], event["ts"] + event["dur"], category(event["name"], around, sizes)))
    return found


def _argument(event: Event, name: str) -> int:
    """A number that ties events together."""
    return event.get("args", {}).get(name, _NONE)


def _own_times(thread: Sequence[Event], sizes: Sizes) -> Iterator[Interval]:
    known: dict[int, str] = {}
    for start, end, around in _segments(thread):
        innermost = around[-1]
        # a range is Python between operators; gloo reports its transfers as ranges on a thread of its own
        if innermost["cat"] == "cpu_op" or innermost["name"].startswith("gloo:"):
            if id(innermost) not in known:
                known[id(innermost)] = category("", around, sizes)
            yield Interval(start, end, known[id(innermost)])


def _segments(thread: Sequence[Event], starts: bool = False) -> Iterator[tuple[float, float, tuple[Event, ...]]]:
    """One thread's time, cut where an event begins or ends: (start, end, the events around it, innermost last).

    With `starts`, one piece for each event instead, of no length, where it begins.
    """
    stack: list[Event] = []
    now = 0.0
    for event in sorted(thread, key=lambda event: (event["ts"], -event["dur"])):
        while stack and (end := stack[-1]["ts"] + stack[-1]["dur"]) <= event["ts"]:
            if now < end and not starts:
                yield now, end, tuple(stack)
            now = max(now, end)
            stack.pop()
        if stack and now < event["ts"] and not starts:
            yield now, event["ts"], tuple(stack)
        now = max(now, event["ts"])
        stack.append(event)
        if starts:
            yield now, now, tuple(stack)
    while stack and not starts:
        end = stack[-1]["ts"] + stack[-1]["dur"]
        if now < end:
            yield now, end, tuple(stack)
            now = end
        stack.pop()


def category(kernel: str, around: Sequence[Event], sizes: Sizes) -> str:
    """What a kernel, or with an empty name the innermost operator itself, belongs to.

    Args:
        kernel: name of the kernel.
        around: operators and ranges around its launch, the outermost first.
    """
    names = [event["name"] for event in around]
    own = [] if _GENERATED.match(kernel) and not re.search("log_softmax|nll_loss", kernel) else [kernel]
    for pattern, found in _NAMES:
        if any(pattern.search(name) for name in (*own, *names)):
            return found
    for event in reversed(around):
        if _PRODUCT.search(event["name"]):
            return _product(event, sizes)
        if _PACKED in event["name"]:
            # what is done to the weights of one product: its activations' width or its weights' sizes tell which
            return MLP if sizes.intermediate in _features(_dimensions(event)) else PROJECTIONS
    for event in around:
        if "logsumexp" in event["name"]:  # of logits, or, in steps that take statistics, of attention's scores
            return HEAD if any(_width(d) == sizes.vocabulary for d in _dimensions(event)) else ATTENTION
    if around and "embedding" not in names[-1] and any(_width(d) == sizes.vocabulary for d in _dimensions(around[-1])):
        return HEAD
    return ELEMENTWISE


def _product(event: Event, sizes: Sizes) -> str:
    """By the sizes of the weight: of rows, inner size and columns those that are not the tokens."""
    operands = [dims for dims in _dimensions(event) if len(dims) > 1 and isinstance(dims[0], int)]
    if len(operands) < 2:
        return ELEMENTWISE
    if "linear" in event["name"]:
        weight = list(operands[1])
    else:
        weight = [*operands[0], operands[1][-1]]
        if sizes.tokens in weight:
            weight.remove(sizes.tokens)
    if sizes.vocabulary in weight:
        return HEAD
    return MLP if {sizes.intermediate, 2 * sizes.intermediate} & set(weight) else PROJECTIONS


def _dimensions(event: Event) -> list[Any]:
    return event.get("args", {}).get("Input Dims", [])


def _width(dims: Sequence[Any]) -> int:
    """The last size of a matrix or of something larger; 0 if it is none."""
    return dims[-1] if len(dims) > 1 and isinstance(dims[-1], int) else 0


def _features(dimensions: Sequence[Any]) -> set[int]:
    """Widths of tensors, and all sizes of those in lists, which are weights."""
    weights = [dims for several in dimensions for dims in several if isinstance(dims, list)]
    return {_width(dims) for dims in dimensions} | {size for dims in weights for size in dims}
