"""Where WeSaR's trained scalars are cheapest: on the weights at use, or on the outputs of the projections.

    python benchmarks/scalar_placement.py [--tokens 2048] [--seeds 5]

For the q, k and v projections and for an output projection followed by add + RMSNorm, at YuLan-Mini's sizes in
bfloat16, prints what autograd keeps for backward beyond parameters and inputs (bytes a token) and the error of the
scalars' gradients against float64, relative to the gradient. Needs no GPU; memory and rounding are the same there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_yulan.kernels.add_rms_norm import add_rms_norm
from titan_yulan.kernels.packed_linear import packed_linear

HIDDEN, KEYS, INTERMEDIATE = 1920, 384, 4800
Function = Callable[..., tuple[Tensor, ...]]


def scaled_weights(x: Tensor, scales: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return packed_linear(x, weights, scales).split([weight.shape[0] for weight in weights], dim=-1)


def scaled_outputs(x: Tensor, scales: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    parts = zip(weights, scales.split(1), strict=True)
    return tuple((linear(x, weight) * scale).to(x.dtype) for weight, scale in parts)


def added_weights(x: Tensor, scales: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    output = packed_linear(x, weights, scales)
    return add_rms_norm(output, torch.ones_like(output), torch.ones(HIDDEN), 1e-6)


def added_outputs(x: Tensor, scales: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    output = linear(x, weights[0])
    return add_rms_norm(output, torch.ones_like(output), torch.ones(HIDDEN), 1e-6, None, scales)


CASES: dict[str, tuple[tuple[int, ...], int, Function, Function]] = {
    "q, k, v": ((HIDDEN, KEYS, KEYS), HIDDEN, scaled_weights, scaled_outputs),
    "o, then add + RMSNorm": ((HIDDEN,), HIDDEN, added_weights, added_outputs),
    "down, then add + RMSNorm": ((HIDDEN,), INTERMEDIATE, added_weights, added_outputs),
}


def kept_bytes(function: Function, x: Tensor, scales: Tensor, weights: Sequence[Tensor]) -> int:
    """Bytes of the storages that forward keeps for backward, without those of parameters and of x."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, scales, *weights)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        results = function(x, scales, weights)  # alive while counting, so that no address is used twice
    del results
    return sum(kept.values())


def scale_gradients(function: Function, x: Tensor, scales: Tensor, weights: Sequence[Tensor], seed: int) -> Tensor:
    results = function(x, scales, weights)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64).bfloat16().to(y) for y in results]
    return torch.autograd.grad(results, scales, upstream)[0].double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, bfloat16, {options.tokens} tokens, {options.seeds} seeds\n")
    print("| projections | scalars on | kept, bytes a token | median error of a scalar's gradient | largest |")
    print("|---|---|---|---|---|")
    for name, (sizes, width, *functions) in CASES.items():
        errors: list[list[float]] = [[], []]
        kept = [0, 0]
        for seed in range(options.seeds):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(options.tokens, width, generator=generator).bfloat16().requires_grad_()
            weights = [(torch.randn(n, width, generator=generator) / width**0.5).bfloat16() for n in sizes]
            weights = [weight.requires_grad_() for weight in weights]
            scales = torch.linspace(0.37, 0.61, len(sizes)).requires_grad_()
            wide = [weight.detach().double() for weight in weights]
            exact = scale_gradients(
                functions[1], x.detach().double(), scales.detach().double().requires_grad_(), wide, seed
            )
            for i, function in enumerate(functions):
                kept[i] = kept_bytes(function, x, scales, weights)
                found = scale_gradients(function, x, scales, weights, seed)
                errors[i] += ((found - exact).abs() / exact.abs()).tolist()
        for i, place in enumerate(("weights", "outputs")):
            median = torch.tensor(errors[i]).median()
            print(f"| {name} | {place} | {kept[i] / options.tokens:,.0f} | {median:.1e} | {max(errors[i]):.1e} |")


if __name__ == "__main__":
    main()
