"""The benchmark's results as CSV (row by row, as they come), Markdown and, with matplotlib, plots."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import importlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Row:
    """One measurement. What was not measured is None; `status` says why ("measured" if nothing is missing)."""

    operation: str
    implementation: str
    mode: str
    size: str
    tokens: int
    dtype: str
    status: str
    ms: float | None = None  # median on the device, without the launch
    ms_p20: float | None = None
    ms_p80: float | None = None
    call_ms: float | None = None  # wall time of a call, launches included
    samples: int | None = None
    gigabytes_per_s: float | None = None  # least traffic over time
    share_of_copy: float | None = None
    tflops: float | None = None
    share_of_matrix: float | None = None
    target: float | None = None  # of the share that the operation is bound by
    peak_mib: float | None = None
    error: float | None = None  # largest of outputs and gradients: norm of the difference to float64 / norm
    accumulated_error: float | None = None  # of a weight's gradient in float32, before its cast to the weight's type
    errors: str = ""  # of each output, then of each gradient
    registers: int | None = None  # most of the operation's kernels
    spills: int | None = None


@dataclass(frozen=True)
class Machine:
    """What the rows were measured on; the rates are what a row's shares refer to."""

    device: str
    copy_gigabytes_per_s: float
    matrix_tflops: float
    torch: str
    triton: str
    liger: str
    driver: str
    python: str
    mix_order_reduction: str  # setting of torch.compile that changes how it computes norms' gradients
    commit: str
    time: str


def describe_machine(device: torch.device, copy_rate: float, matrix_rate: float) -> Machine:
    """The machine, the versions and the commit; the rates in bytes and floating-point operations per second."""
    cuda = device.type == "cuda"
    return Machine(
        device=torch.cuda.get_device_name(device) if cuda else f"CPU ({torch.get_num_threads()} threads)",
        copy_gigabytes_per_s=round(copy_rate / 1e9, 1),
        matrix_tflops=round(matrix_rate / 1e12, 3),
        torch=torch.__version__,
        triton=_version("triton"),
        liger=_version("liger-kernel"),
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else "none",
        python=platform.python_version(),
        mix_order_reduction=_mix_order_reduction(),
        commit=_output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _mix_order_reduction() -> str:
    import torch._inductor.config as settings

    return str(getattr(settings.triton, "mix_order_reduction", "unknown to this version"))


def _output(*command: str) -> str:
    try:
        run = subprocess.run(command, cwd=Path(__file__).resolve().parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip() or "unknown"


class Report:
    """Writes `kernels.csv` as rows come, and `kernels.md` and plots at the end, into one folder."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.machine, self.rows = folder, machine, list[Row]()
        names = [field.name for kind in (Row, Machine) for field in dataclasses.fields(kind)]
        self._file = open(folder / "kernels.csv", "w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, names)
        self._writer.writeheader()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        values = {k: _number(v) if isinstance(v, float) else v for k, v in dataclasses.asdict(row).items()}
        self._writer.writerow(values | dataclasses.asdict(self.machine))
        self._file.flush()

    def close(self, plot: bool) -> list[Path]:
        """The files written. Plots only if asked for and if matplotlib is there."""
        self._file.close()
        page = self.folder / "kernels.md"
        page.write_text(markdown(self.machine, self.rows), encoding="utf-8")
        files = [self.folder / "kernels.csv", page]
        return [*files, *plots(self.folder, self.machine, self.rows)] if plot else files


def _number(value: float) -> str:
    return f"{value:.4g}"


def markdown(machine: Machine, rows: Sequence[Row]) -> str:
    """One table per operation and mode, the machine first."""
    lines = ["# Kernel benchmark", ""]
    lines += [f"- {name.replace('_', ' ')}: {value}" for name, value in dataclasses.asdict(machine).items()]
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.operation, row.mode, row.size, row.dtype), []).append(row)
    for (operation, mode, size, dtype), group in groups.items():
        bound = "matrix rate" if any(row.tflops for row in group) else "copy rate"
        lines += ["", f"## {operation}, {mode}, {size}, {dtype}", ""]
        lines.append(
            f"| tokens | implementation | ms (20–80 %) | call ms | GB/s | share of {bound} | target | TFLOP/s "
            "| peak MiB | error | registers | spills |"
        )
        lines.append("|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
        for row in sorted(group, key=lambda r: (r.tokens, r.ms is None, r.ms)):
            lines.append("| " + " | ".join(_cells(row)) + " |")
    return "\n".join([*lines, *_targets(rows), *_layer(rows), ""])


def _targets(rows: Sequence[Row]) -> list[str]:
    """Our kernels against their targets and against the fastest peer of the same shape and run."""
    ours = [row for row in rows if row.implementation == "triton" and row.ms is not None]
    if not ours:
        return []
    lines = ["", "## Against the targets", "", "A peer's time over ours has the target 0.97.", ""]
    lines += ["| operation | mode | tokens | share | target | fastest peer | its time over ours |"]
    lines += ["|---|---|---:|---:|---:|---|---:|"]
    for row in ours:
        place = (row.operation, row.mode, row.tokens)
        peers = [r for r in rows if r.implementation in ("liger", "compile") and r.ms is not None]
        same = [r for r in peers if (r.operation, r.mode, r.tokens) == place]
        peer = min(same, key=lambda r: r.ms or 0.0, default=None)
        share = (row.share_of_matrix if row.tflops else row.share_of_copy) or 0.0
        cells = [*map(str, place), f"{share:.3f}", "" if row.target is None else f"{row.target:.2f}"]
        cells += [peer.implementation, f"{(peer.ms or 0.0) / (row.ms or 1.0):.3f}"] if peer else ["none measured", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _layer(rows: Sequence[Row]) -> list[str]:
    """Milliseconds of one decoder layer's elementwise work: two residual adds with norm and one SwiGLU, both ways."""
    norm, activation = "add_rms_norm", "swiglu_packed"
    parts = {(norm, "fwd"): 2, (norm, "bwd"): 2, (activation, "fwd"): 1, (activation, "bwd"): 1}
    found: dict[tuple[int, str], float] = {}
    for place in dict.fromkeys((row.tokens, row.implementation) for row in rows):
        mine = [row for row in rows if (row.tokens, row.implementation) == place]
        times = {(row.operation, row.mode): row.ms for row in mine if row.ms is not None}
        if times.keys() >= parts.keys():
            found[place] = sum(times[part] * count for part, count in parts.items())
    if not found:
        return []
    lines = ["", "## Sum over a layer", "", f"Two {norm} and one {activation}, forward and backward.", ""]
    lines += ["| tokens | implementation | ms | over ours |", "|---:|---|---:|---:|"]
    for (tokens, name), total in sorted(found.items()):
        ours = found.get((tokens, "triton"))
        lines.append(f"| {tokens} | {name} | {_number(total)} | {'' if ours is None else f'{total / ours:.3f}'} |")
    return lines


def _cells(row: Row) -> list[str]:
    if row.ms is None:
        return [str(row.tokens), row.implementation, row.status, *[""] * 9]
    share = row.share_of_matrix if row.tflops else row.share_of_copy
    numbers = [row.call_ms, row.gigabytes_per_s, share, row.target, row.tflops, row.peak_mib, row.error]
    return [
        str(row.tokens),
        row.implementation,
        f"{_number(row.ms)} ({_number(row.ms_p20 or 0)}–{_number(row.ms_p80 or 0)})",
        *("" if value is None else f"{value:.3g}" for value in numbers),
        *("" if value is None else str(value) for value in (row.registers, row.spills)),
    ]


def plots(folder: Path, machine: Machine, rows: Sequence[Row]) -> list[Path]:
    """A PNG per operation: the share of the device's rate, bar by bar. None without matplotlib, which is said."""
    try:
        canvas = importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg
        figures = importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        print("no plots: matplotlib is not installed")
        return []
    files = []
    for operation in dict.fromkeys(row.operation for row in rows if row.ms is not None):
        mine = [row for row in rows if row.operation == operation and row.ms is not None]
        places = list(dict.fromkeys((row.mode, row.tokens) for row in mine))
        names = list(dict.fromkeys(row.implementation for row in mine))
        figure = figures(figsize=(max(5.0, 1.6 * len(places)), 4))
        axes = figure.add_subplot()
        for i, name in enumerate(names):
            bars = {
                places.index((r.mode, r.tokens)): (r.share_of_matrix if r.tflops else r.share_of_copy) or 0.0
                for r in mine
                if r.implementation == name
            }
            axes.bar([x + 0.8 * i / len(names) for x in bars], list(bars.values()), 0.8 / len(names), label=name)
        axes.set_xticks(range(len(places)), [f"{mode}\n{tokens} tokens" for mode, tokens in places])
        axes.set_ylabel("share of the device's rate")
        axes.set_title(f"{operation}, {machine.device}")
        axes.legend()
        figure.tight_layout()
        files.append(folder / f"{operation}.png")
        canvas(figure).print_png(str(files[-1]))
    return files
