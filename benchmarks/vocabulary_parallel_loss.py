"""Memory and traffic of the vocabulary-parallel head and loss beside those of gathering the logits, on gloo ranks.

    python benchmarks/vocabulary_parallel_loss.py                       2 ranks, 2,048 tokens: about a minute
    python benchmarks/vocabulary_parallel_loss.py --ranks 3 --tokens 1024

Each rank of the group has all tokens and an equal part of the head's rows, and makes one step: objective, backward, and
the sum of the hidden states' gradient over the ranks. Two ways:

- vocabulary-parallel: `linear_cross_entropy` with `group`, in 4 chunks;
- gathered: each rank's logits, an all-gather of them along the vocabulary, `cross_entropy` on the whole.

Memory is the largest resident set during the step (VmHWM of /proc/self/status, reset before it: Linux) less the one
before it, when inputs exist and every library has run once; the largest of all ranks. It is in float32 and of the
reference's arithmetic, which on a CPU takes temporaries that a GPU's kernel does not; the second table is calculated
for bfloat16 on a GPU. Traffic is what one rank receives: of a gathered tensor the others' parts; of an all-reduce,
2 (ranks - 1) / ranks times the tensor (ring), that is what a reduce-scatter and an all-gather take.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_yulan.kernels.cross_entropy import cross_entropy
from titan_yulan.kernels.linear_cross_entropy import linear_cross_entropy

Z_WEIGHT = 1e-4
CHUNKS = 4
GPU_TOKENS, GPU_CHUNK_ROWS, GPU_ALIGNMENT = 16_384, 4096, 64
WAYS = ("vocabulary-parallel", "gathered logits")


class Traffic:
    """Runs collectives and counts what this rank receives through them."""

    def __init__(self) -> None:
        self.calls = 0
        self.gathered = 0
        self.reduced = 0
        self._all_gather: Callable[..., Any] = dist.all_gather

    def all_gather(self, parts: list[Tensor], own: Tensor, **options: Any) -> Any:
        self.calls += 1
        self.gathered += sum(part.nbytes for part in parts) - own.nbytes
        return self._all_gather(parts, own, **options)

    def all_reduce(self, tensor: Tensor) -> None:
        ranks = dist.get_world_size()
        self.reduced += 2 * (ranks - 1) * tensor.nbytes // ranks
        dist.all_reduce(tensor)


class GatherColumns(torch.autograd.Function):
    """(tokens, part) -> (tokens, vocabulary). Every rank goes on alike, so backward is this rank's columns."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        ctx.columns = part.shape[1]
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        start = dist.get_rank() * ctx.columns
        return gradients[0][:, start : start + ctx.columns].contiguous()


def loss(way: str, hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
    if way == "gathered logits":
        return cross_entropy(GatherColumns.apply(hidden @ weight.t()), targets, token_weights, Z_WEIGHT)[0]
    size = weight.shape[0] * dist.get_world_size()
    chunk_rows = max(1, len(hidden) // CHUNKS)
    options: dict[str, Any] = {"group": dist.group.WORLD, "vocabulary_size": size, "chunk_rows": chunk_rows}
    return linear_cross_entropy(hidden, weight, targets, token_weights, Z_WEIGHT, **options)[0]


def step(way: str, tokens: int, hidden_size: int, vocabulary: int, measure: bool) -> dict[str, float]:
    """One step on this rank: what it received, how far its memory grew, and its results in short."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    part = vocabulary // dist.get_world_size()
    weight = torch.randn(part, hidden_size, generator=generator.manual_seed(1 + dist.get_rank())).mul_(0.02)
    traffic = Traffic()
    before = reset_peak() if measure else 0
    with mock.patch.object(dist, "all_gather", traffic.all_gather):
        objective = loss(way, hidden.requires_grad_(), weight.requires_grad_(), targets, torch.ones(tokens))
        objective.backward()
    assert hidden.grad is not None and weight.grad is not None
    traffic.all_reduce(hidden.grad)
    return {
        "memory": kilobytes("VmHWM") * 1024 - before if measure else 0,
        "gathers": traffic.calls,
        "gathered": traffic.gathered,
        "reduced": traffic.reduced,
        "objective": objective.item() / tokens,
        "grad_hidden": hidden.grad.norm().item(),
    }


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return kilobytes("VmRSS") * 1024


def kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def on_rank(rank: int, ranks: int, folder: str, way: str, sizes: tuple[int, int, int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    step(way, 8, 16, 8 * ranks, measure=False)
    Path(folder, str(rank)).write_text(json.dumps(step(way, *sizes, measure=True)))
    dist.destroy_process_group()


def measured(way: str, ranks: int, sizes: tuple[int, int, int]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(on_rank, (ranks, folder, way, sizes), nprocs=ranks)
        found = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(ranks)]
    return found[0] | {"memory": max(result["memory"] for result in found)}


def calculated(way: str, ranks: int, hidden_size: int, vocabulary: int) -> dict[str, int]:
    """Bytes on a GPU in bfloat16: what exists at once beyond the inputs at the peak, and what a rank receives."""
    part = -(-vocabulary // ranks)
    if way == "gathered logits":
        # All logits and their gradient, and of either this rank's own once more, for the gather and for the products.
        memory = 2 * GPU_TOKENS * (2 * vocabulary + part)
        return {"memory": memory, "gathered": 2 * GPU_TOKENS * part * (ranks - 1)}
    # A chunk's logits and the float32 sum of the head's gradient; in backward that sum and its copy in bfloat16.
    stride = -(-part // GPU_ALIGNMENT) * GPU_ALIGNMENT
    memory = 4 * part * hidden_size + 2 * max(GPU_CHUNK_ROWS * stride, part * hidden_size)
    return {"memory": memory, "gathered": 3 * 4 * GPU_TOKENS * (ranks - 1)}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mib(size: float) -> str:
    return f"{size / 2**20:,.3f} MiB" if size < 2**20 * 100 else f"{size / 2**20:,.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 2), ("tokens", 2048), ("hidden-size", 1920), ("vocabulary", 99_000)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    options = parser.parse_args()
    ranks, sizes = options.ranks, (options.tokens, options.hidden_size, options.vocabulary)
    if options.vocabulary % ranks:
        parser.error(f"gloo gathers equal parts only: --ranks {ranks} must divide --vocabulary {options.vocabulary}")
    results = [measured(way, ranks, sizes) for way in WAYS]
    for key in ("objective", "grad_hidden"):
        torch.testing.assert_close(results[0][key], results[1][key], rtol=1e-5, atol=0)

    arguments = [f"--{name.replace('_', '-')} {value}" for name, value in vars(options).items()]
    print(
        f"`python benchmarks/vocabulary_parallel_loss.py {' '.join(arguments)}` (torch {torch.__version__}, float32)\n"
    )
    rows = [["memory beyond the inputs at the peak", *(mib(result["memory"]) for result in results)]]
    grad_weight = options.vocabulary // ranks * options.hidden_size * 4
    rows += [["of which the head's gradient (and its sum over chunks)", mib(2 * grad_weight), mib(grad_weight)]]
    rows += [["all-gathers, received", *(f"{int(r['gathers'])}, {mib(r['gathered'])}" for r in results)]]
    rows += [["sum of the hidden states' gradient, received", *(mib(r["reduced"]) for r in results)]]
    rows += [["objective a token", *(f"{r['objective']:.6f}" for r in results)]]
    print(table(["per rank and step", *WAYS], rows))

    print(f"\nCalculated: {GPU_TOKENS:,} tokens in bfloat16 on GPUs, {GPU_CHUNK_ROWS:,} tokens in a chunk\n")
    rows = []
    for n in (2, 3, 6):
        values = [calculated(way, n, *sizes[1:]) for way in WAYS]
        rows.append([str(n), *(mib(value[key]) for key in ("memory", "gathered") for value in values)])
    header = ["ranks", *(f"{what}, {way}" for what in ("peak", "received") for way in WAYS)]
    print(table(header, rows))


if __name__ == "__main__":
    main()
