"""`titan-yulan checkpoint stats`: how large every tensor of a series of checkpoints is, and how far it moved.

Of a tensor W with n values, in a series of checkpoints with V before it:

    norm                |W|, the root of the sum of squares
    RMS                 |W| / sqrt(n)
    scalar              alpha, for a matrix that enters the model as alpha * W (WeSaR, arXiv 2410.05052)
    RMS of the product  |alpha| RMS(W): what the model sees, where alpha and W trade magnitude between themselves
    distance            |W - V|, and relative to |V|

Sums are taken in float64. Two checkpoints are open at a time, and of each a group of tensors (`read_parts`).
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch import Size, Tensor

from titan_yulan.checkpoint.layout import Checkpoint, TrainerState, find_damage, hashed_files
from titan_yulan.checkpoint.read_parts import read_parts, stored_shapes
from titan_yulan.checkpoint.report import checkpoints_of
from titan_yulan.errors import RunError

COLUMNS = {  # of the table and the picture
    "rms": "RMS",
    "scalar": "scalar",
    "product_rms": "RMS of the product",
    "relative": "relative distance",
}
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_HEAD = re.compile(r"\.norms\.\d+\.")
_PIECE = 2**22  # values that are widened to float64 at a time


@dataclass(frozen=True)
class TensorStats:
    """One tensor of one checkpoint; a line of the CSV.

    place          of the checkpoint in the series, from 1
    layer          index of its block; None outside of the blocks
    kind           its name without the block (and the head, for a norm of each head), the same for all layers
    scalar         WeSaR's, and product_rms with it: of matrices that have one
    distance       to the checkpoint before; None for the first one, and where that has no such tensor of this shape
    relative       distance / norm before; None where that is 0
    """

    place: int
    checkpoint: str
    step: int
    tokens: int
    tensor: str
    layer: int | None
    kind: str
    values: int
    norm: float
    rms: float
    scalar: float | None
    product_rms: float | None
    distance: float | None
    relative: float | None


def find_series(paths: Sequence[Path]) -> list[Checkpoint]:
    """The checkpoints that paths name, in this order; a run folder stands for all of its own, oldest first.

    Raises:
        RunError: a path holds none, or one of them is damaged: the sizes of all files are compared, and the content of
            those that say what the others hold.
    """
    series = [checkpoint for path in paths for checkpoint in checkpoints_of(path)]
    for checkpoint in series:
        if damage := find_damage(checkpoint, hashed=hashed_files(checkpoint, "size")):
            raise RunError(f"{checkpoint.path} is damaged: {'; '.join(damage)}")
    return series


def measure(series: Sequence[Checkpoint]) -> Iterator[TensorStats]:
    """Every tensor of every checkpoint in turn, in the order of the layers.

    Raises:
        RunError: a file cannot be read.
    """
    before: Checkpoint | None = None
    shapes_before: dict[str, Size] = {}
    for place, checkpoint in enumerate(series, start=1):
        shapes, state = stored_shapes(checkpoint), checkpoint.state()
        names = sorted(shapes, key=lambda name: (_layer(name) is not None, _layer(name) or 0, name))
        scalars = {name: float(value) for name, value in read_parts(checkpoint, _scalars(shapes))}
        shared = [name for name in names if before is not None and shapes_before.get(name) == shapes[name]]
        others = read_parts(before, shared) if before is not None else iter(())
        for name, tensor in read_parts(checkpoint, names):
            old = next(others)[1] if shapes_before.get(name) == shapes[name] else None
            yield _measure_one(place, checkpoint, state, name, tensor, old, scalars)
        before, shapes_before = checkpoint, shapes


def _measure_one(
    place: int,
    checkpoint: Checkpoint,
    state: TrainerState,
    name: str,
    tensor: Tensor,
    old: Tensor | None,
    scalars: Mapping[str, float],
) -> TensorStats:
    norm = _norm(tensor)
    rms = norm / math.sqrt(tensor.numel())
    scalar = scalars.get(_scalar_name(name)) if tensor.dim() == 2 else None
    distance = relative = None
    if old is not None:
        distance, size = _norm(tensor, old), _norm(old)
        relative = distance / size if size else None
    return TensorStats(
        place=place,
        checkpoint=str(checkpoint.path),
        step=state.step,
        tokens=state.token,
        tensor=name,
        layer=_layer(name),
        kind=_HEAD.sub(".norms.", _LAYER.sub("", name)),
        values=tensor.numel(),
        norm=norm,
        rms=rms,
        scalar=scalar,
        product_rms=None if scalar is None else abs(scalar) * rms,
        distance=distance,
        relative=relative,
    )


def _norm(tensor: Tensor, subtracted: Tensor | None = None) -> float:
    """Euclidean norm of a tensor, or of a difference, in float64."""
    total = 0.0
    parts = tensor.flatten().split(_PIECE)
    others = [None] * len(parts) if subtracted is None else subtracted.flatten().split(_PIECE)
    for part, other in zip(parts, others, strict=True):
        values = part.double() if other is None else part.double() - other.double()
        total += float(values.square_().sum())
    return math.sqrt(total)


def _layer(name: str) -> int | None:
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def _scalars(shapes: Mapping[str, Size]) -> list[str]:
    return [name for name in shapes if name.endswith("_alpha")]


def _scalar_name(name: str) -> str:
    """Of the scalar of a matrix, if it has one: gate and up share theirs, which like that of down is the block's."""
    stem = name.rpartition(".")[0]
    return re.sub(r"\.mlp\.(gate|up)_proj$", ".gate_up_proj", stem).replace(".mlp.down_proj", ".down_proj") + "_alpha"


def write_csv(path: Path, measured: Sequence[TensorStats]) -> None:
    """One line a tensor and checkpoint, every number in full; what there is none of is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(TensorStats)])
        writer.writeheader()
        writer.writerows(asdict(line) for line in measured)


def by_kind(measured: Sequence[TensorStats]) -> dict[str, dict[int, list[TensorStats]]]:
    """`{kind: {place: its layers}}`: matrices first, then the other tensors, then the scalars."""
    grouped: dict[str, dict[int, list[TensorStats]]] = {}
    for line in measured:
        grouped.setdefault(line.kind, {}).setdefault(line.place, []).append(line)
    return dict(sorted(grouped.items(), key=lambda item: (item[0].endswith("_alpha"), "norm" in item[0])))


def table(measured: Sequence[TensorStats]) -> Iterator[str]:
    """Lines to print: the series, then a line for each kind of tensor and checkpoint, with the mean (least to greatest)
    of its layers."""
    for place, line in {line.place: line for line in measured}.items():
        yield f"{place:>3}  {line.checkpoint}: step {line.step}, {line.tokens:,} tokens"
    width = max(len(line.kind) for line in measured)
    rows = [[f"{'tensor':<{width}} {'tensors':>7} {'':>3}", *COLUMNS.values()]]
    for kind, places in by_kind(measured).items():
        for number, (place, lines) in enumerate(places.items()):
            head = f"{kind:<{width}} {len(lines):>7}" if number == 0 else " " * (width + 8)
            cells = [_spread([getattr(line, key) for line in lines]) for key in COLUMNS]
            rows.append([f"{head} {place:>3}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield ""
    yield from ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def known(values: Iterable[float | None]) -> list[float]:
    """Those that there are."""
    return [value for value in values if value is not None]


def _spread(values: Sequence[float | None]) -> str:
    found = known(values)
    if not found:
        return ""
    mean = f"{sum(found) / len(found):.4g}"
    return mean if len(found) == 1 else f"{mean} ({min(found):.4g} to {max(found):.4g})"
