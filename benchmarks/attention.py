"""Time causal attention with few key heads in every way that PyTorch has: which one should the decoder take?

    python benchmarks/attention.py                                  YuLan-Mini's heads at 4,096 and 28,672 (on a GPU)
    python benchmarks/attention.py --seq-len 256 --impl default,math                          tiny (on a CPU)

Forward, and forward with backward, of batch x seq x heads x head size in bfloat16 (float32 on a CPU).

    default                     what scaled_dot_product_attention chooses
    flash, cudnn, efficient     one backend; `efficient` knows no grouped heads and gets its keys and values repeated
    math                        products and a softmax, for short rows
    flex                        torch.compile of FlexAttention with a causal block mask

Each is compared with the first that ran, output and gradients, and not timed if it differs by more than rounding.
TFLOP/s count the half that the mask leaves: 2 x batch x heads x seq^2 x head size forward, 2.5 times that backward.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_yulan.kernels.bench_report import describe_machine

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

IMPLEMENTATIONS = ("default", "flash", "cudnn", "efficient", "flex", "math")
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # norm of the difference over the norm
_BACKWARD = 2.5  # products of the backward pass over those of the forward pass, scores computed again


@dataclass(frozen=True)
class Row:
    """One way at one length; None where it was not measured, `status` says why."""

    implementation: str
    sequence_length: int
    status: str
    forward_ms: float | None = None
    both_ms: float | None = None
    forward_tflops: float | None = None
    both_tflops: float | None = None
    error: float | None = None  # largest difference to the first way, relative


def attention(name: str, length: int, device: torch.device) -> Attend:
    """The way called `name`, for (batch, heads, seq, head size) queries and fewer key heads."""
    if name == "flex":
        return _flex(length, device)
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    if name in _BACKENDS:
        context = lambda: sdpa_kernel([_BACKENDS[name]])  # noqa: E731  # a name for each call is what is wanted

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = name != "efficient"
        if not grouped:
            repeats = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        with context():
            return functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)

    return attend


def _flex(length: int, device: torch.device) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    mask = create_block_mask(causal, None, None, length, length, device=device.type)
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return lambda query, key, value: compiled(query, key, value, block_mask=mask, enable_gqa=True)


class Case:
    """Queries, keys, values and the output's gradient at one length."""

    def __init__(self, options: argparse.Namespace, length: int, device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)

        def normal(heads: int) -> Tensor:
            # laid out as a projection leaves it: the heads of a token lie side by side
            shape = options.batch, length, heads, options.head_dim
            return torch.randn(shape, generator=generator, device=device).to(dtype).transpose(1, 2)

        heads = options.heads, options.kv_heads, options.kv_heads
        self.inputs = [normal(n).requires_grad_() for n in heads]
        self.upstream = normal(options.heads)
        self.length, self.device, self.dtype = length, device, dtype
        self.work = 2 * options.batch * options.heads * length**2 * options.head_dim

    def both(self, attend: Attend) -> list[Tensor]:
        output = attend(*self.inputs)
        return [output.detach(), *torch.autograd.grad(output, self.inputs, self.upstream)]

    def forward(self, attend: Attend) -> list[Tensor]:
        with torch.no_grad():
            return [attend(*self.inputs)]


def milliseconds(call: Callable[[], object], device: torch.device, samples: int) -> float:
    """Median time of a call, after two that do not count."""
    times = []
    for count in range(samples + 2):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            taken = start.elapsed_time(end)
        else:
            begin = time.perf_counter()
            call()
            taken = 1e3 * (time.perf_counter() - begin)
        if count >= 2:
            times.append(taken)
    return statistics.median(times)


def measure(options: argparse.Namespace, device: torch.device, end: float) -> Iterator[Row]:
    """A row for each length and way."""
    for length in options.seq_len:
        case = Case(options, length, device)
        expected: list[Tensor] | None = None
        for name in options.impl:
            try:
                if time.monotonic() > end:
                    raise TimeoutError(f"not measured: the budget of {options.budget_s:.0f} s was spent")
                if name == "math" and length > 8192:
                    raise TimeoutError("not measured: the scores of long rows do not fit")
                attend = attention(name, length, device)
                found = case.both(attend)
                expected = expected or found
                error = max(_difference(a, b) for a, b in zip(found, expected, strict=True))
                if error > _LIMITS[case.dtype]:
                    raise ValueError(f"differs from {options.impl[0]} by {error:.1e}")
                del found
                forward = milliseconds(lambda a=attend, c=case: c.forward(a), device, options.samples)
                both = milliseconds(lambda a=attend, c=case: c.both(a), device, options.samples)
                rates = (case.work / forward / 1e9, (1 + _BACKWARD) * case.work / both / 1e9)
                yield Row(name, length, "measured", forward, both, *rates, error)
            except Exception as problem:  # a backend that refuses must not end the run; its reason is in the table
                yield Row(name, length, _reason(problem))


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _reason(problem: Exception) -> str:
    if isinstance(problem, TimeoutError):
        return str(problem)
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    return f"failed: {type(problem).__name__}: " + re.sub(r"[|\s]+", " ", str(problem))[:160]


def markdown(rows: Sequence[Row], title: str) -> str:
    head = ["length", "way", "forward ms", "both ms", "forward TFLOP/s", "both TFLOP/s", "difference"]
    lines = [f"# Causal attention, {title}", "", "| " + " | ".join(head) + " |", "|---:|---|" + "---:|" * 5]
    for row in rows:
        values = (row.forward_ms, row.both_ms, row.forward_tflops, row.both_tflops, row.error)
        cells = ["" if value is None else f"{value:.3g}" for value in values]
        cells[0] = cells[0] or row.status
        lines.append(f"| {row.sequence_length} | {row.implementation} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def write(rows: Sequence[Row], title: str, folder: Path) -> None:
    """What is measured so far, as attention.csv and attention.md; again after each row, so that a time limit that ends
    the process leaves the rows before it."""
    with open(folder / "attention.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [item.name for item in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    (folder / "attention.md").write_text(markdown(rows, title), encoding="utf-8")


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seq-len", default="4096,28672" if cuda else "256", help="separated by commas (default here: %(default)s)")
    add("--batch", type=int, default=1, help="rows (default: 1)")
    add("--heads", type=int, default=30 if cuda else 6, help="of queries (default here: %(default)s)")
    add("--kv-heads", type=int, default=6 if cuda else 2, help="of keys and values (default here: %(default)s)")
    add("--head-dim", type=int, default=64, help="default: 64")
    default = "default,flash,cudnn,efficient,flex" if cuda else "default,math"
    add("--impl", default=default, help=f"of {','.join(IMPLEMENTATIONS)} (default here: {default})")
    add("--samples", type=int, default=10, help="timed calls (default: 10)")
    add("--out", type=Path, default=Path("benchmarks/results/attention"), help="folder (default: %(default)s)")
    add("--budget-s", type=float, default=600.0, help="start nothing after this long (default: 600)")
    options = parser.parse_args(arguments)
    names = options.impl.split(",")
    if unknown := [name for name in names if name not in IMPLEMENTATIONS]:
        parser.error(f"--impl: {', '.join(unknown)} is none of {', '.join(IMPLEMENTATIONS)}")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", options.seq_len):
        parser.error(f"--seq-len {options.seq_len}: give positive whole numbers separated by commas")
    if options.kv_heads < 1 or options.heads % options.kv_heads:
        parser.error(f"--kv-heads {options.kv_heads} does not divide --heads {options.heads}")
    options.impl = [name for name in IMPLEMENTATIONS if name in names]
    options.seq_len = [int(word) for word in options.seq_len.split(",")]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 1 if nothing could be measured."""
    start = time.monotonic()
    options = read_arguments(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = describe_machine(device, 0.0, 0.0)
    title = (
        f"{options.batch} x length x {options.heads} heads of {options.head_dim}, {options.kv_heads} of keys; "
        f"{machine.device}, torch {machine.torch}, commit {machine.commit}, {machine.time}"
    )
    rows: list[Row] = []
    options.out.mkdir(parents=True, exist_ok=True)
    for row in measure(options, device, start + options.budget_s):
        rows.append(row)
        write(rows, title, options.out)
        said = row.status if row.both_ms is None else f"{row.forward_ms:.3f} ms, with backward {row.both_ms:.3f} ms"
        print(f"{row.sequence_length:6} {row.implementation:10} {said}", flush=True)
    print(f"wrote {options.out / 'attention.csv'} and {options.out / 'attention.md'}")
    return int(all(row.both_ms is None for row in rows))


if __name__ == "__main__":
    sys.exit(main())
