"""Magnitudes of weights, of their updates and of their gradients, from the parts that this rank has.

Nothing is gathered: sums over parts are added up over all ranks, and what several ranks hold alike counts once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from titan_yulan.model.sharding import copies, local
from titan_yulan.monitor.statistics import STATISTICS, Summands, layer_tag

# Elements of weights whose updates are made at once, in two temporary copies: 128 MiB in float32.
_ELEMENTS = 2**24

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_Tensors = tuple[Tensor, ...]
_MATRIX = re.compile(r"[a-z]+_proj\.weight$")


class Magnitudes:
    """Of a decoder's parameters in one layout; to be made anew with it."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Mapping[str, Sequence[str]],
        layers: Sequence[int],
        optimizer: torch.optim.AdamW,
        device: torch.device,
        ranks: int,
    ) -> None:
        """
        Args:
            parameters: all of the decoder's by full name, not gathered.
            groups: names of the parameters in each group of the table that the optimizer was built from.
            layers: blocks whose weights and updates are looked at; gradients are in all.
            optimizer: AdamW over these parameters, with the state of `build_adamw`.
            device: of the sums.
            ranks: of the process group.
        """
        self._optimizer, self._device = optimizer, device
        self._buckets = [(g, bucket) for g in optimizer.param_groups for bucket in _buckets(g["params"])]
        self._parameters: list[nn.Parameter] = [parameter for _, bucket in self._buckets for parameter in bucket]
        by_parameter = {id(parameter): name for name, parameter in parameters.items()}
        names = [by_parameter[id(parameter)] for parameter in self._parameters]
        self._once = _constant([1 / copies(parameter, ranks) for parameter in self._parameters], device)
        self._matrices = {n: p for n, p in parameters.items() if _MATRIX.search(n) and layer_of(n) in layers}
        self._sizes = _constant([matrix.numel() for matrix in self._matrices.values()], device)
        self._matrices_once = _constant([1 / copies(matrix, ranks) for matrix in self._matrices.values()], device)
        self._scalars = {n: p for n, p in parameters.items() if n.endswith("_alpha") and layer_of(n) in (None, *layers)}
        self._ranks = ranks
        inside = sorted({layer for name in names if (layer := layer_of(name)) is not None})
        blocks = {layer: [name for name in names if layer_of(name) == layer] for layer in inside}
        chosen = {layer_tag(layer): blocks[layer] for layer in layers}
        self._update_names = tuple(f"update/{name}" for name in (*groups, *chosen))
        self._update_members = _membership(names, [*groups.values(), *chosen.values()], device)
        outside = [name for name in names if layer_of(name) is None]
        self._gradient_names = (*(f"gradient/{layer_tag(layer)}" for layer in blocks), "gradient/outside_layers")
        self._gradient_members = _membership(names, [*blocks.values(), outside], device)

    @torch.no_grad()
    def gradients(self) -> list[Summands]:
        """The 2-norm of the gradient of every block, and of all parameters outside the blocks.

        To be called with the gradients reduced over the ranks (`parallel.fsdp.sum_replicated_gradients`) and not yet
        clipped. The squares of these norms add up to that of the global norm.
        """
        gradients = [torch.zeros_like(local(p)) if p.grad is None else local(p.grad) for p in self._parameters]
        sums = self._gradient_members @ (_squares(gradients, self._device) * self._once)
        return [Summands(self._gradient_names, sums, torch.sqrt)]

    @torch.no_grad()
    def weights(self) -> list[Summands]:
        """Variance (unbiased), mean and RMS over all elements of the matrices of the chosen blocks, without their
        scalars; and the WeSaR scalars of those blocks and of the model as they are."""
        weights = [local(matrix) for matrix in self._matrices.values()]
        totals = torch.stack([self._here(weight.sum(dtype=torch.float64)) for weight in weights])
        values = torch.stack([totals, _squares(weights, self._device)]) * self._matrices_once
        names = (f"weight/{_tag(name)}/{statistic}" for name in self._matrices for statistic in STATISTICS)
        found = [Summands(tuple(names), values, self._finish_weights)]
        if self._scalars:
            scalars = torch.cat([self._here(scalar.detach()) for scalar in self._scalars.values()])
            # every rank has them, and the sum over all is to be one
            names = (f"scalar/{_tag(name)}" for name in self._scalars)
            found.append(Summands(tuple(names), scalars.double() / self._ranks, torch.clone))
        return found

    def _finish_weights(self, sums: Tensor) -> Tensor:
        total, squares = sums
        variance = (squares - total.square() / self._sizes) / (self._sizes - 1)
        return torch.stack([variance, total / self._sizes, (squares / self._sizes).sqrt()], dim=1).flatten()

    @torch.no_grad()
    def updates(self, refused: Tensor) -> list[Summands]:
        """RMS(update) / RMS(weight) of each group of the optimizer and of each chosen block, after the step.

        With the moments m and v, the number of steps t and the weight w that the step has left, the learning rate l
        and the decay d of AdamW (arXiv 1711.05101),

            u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
            w = (1 - l d) w_before - l u,   therefore   update = w - w_before = -l (u + d w) / (1 - l d)

        so that no weight is copied. Both RMS are over the same elements: the ratio is one of sums of squares.

        Args:
            refused: () float32, 1 if the step was left out; its update is 0.
        """
        squares = torch.cat([self._here(self._update_squares(*bucket)) for bucket in self._buckets])
        sums = self._update_members @ (squares * self._once[:, None])
        sums[:, 0] = torch.where(refused > 0, 0.0, sums[:, 0])
        return [Summands(self._update_names, sums, _finish_updates)]

    def _update_squares(self, group: dict[str, Any], bucket: list[nn.Parameter]) -> Tensor:
        """(parameters of the bucket, 2) float64: sums of the squares of update and weight, of this rank's parts."""
        states = [self._optimizer.state[parameter] for parameter in bucket]
        triples = [
            [local(tensor.detach()).flatten() for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"])]
            for parameter, state in zip(bucket, states, strict=True)
        ]
        steps = states[0]["step"]
        if len(triples) > 1:
            return _adam_squares(group, steps, *zip(*triples, strict=True))
        pieces = zip(*(tensor.split(_ELEMENTS) for tensor in triples[0]), strict=True)
        return torch.stack([_adam_squares(group, steps, *((tensor,) for tensor in piece)) for piece in pieces]).sum(0)

    def _here(self, x: Tensor) -> Tensor:
        return x.to(self._device, non_blocking=True)


def _adam_squares(
    group: dict[str, Any], steps: Tensor, weights: _Tensors, firsts: _Tensors, seconds: _Tensors
) -> Tensor:
    """`_update_squares` of a list of parts and their moments, after `steps` steps, () on their device."""
    rate, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
    dtype = weights[0].dtype
    bias1, bias2 = ((1 - beta ** steps.double()).to(dtype) for beta in (beta1, beta2))
    denominators = torch._foreach_sqrt(seconds)
    torch._foreach_mul_(denominators, bias2.rsqrt())
    torch._foreach_add_(denominators, group["eps"])
    updates = torch._foreach_div(firsts, denominators)
    torch._foreach_mul_(updates, rate / bias1)
    torch._foreach_add_(updates, weights, alpha=rate * decay)
    norms = [torch.stack(torch._foreach_norm(x, 2, dtype=torch.float64)) for x in (updates, weights)]
    return torch.stack([norms[0] / (1 - rate * decay), norms[1]], dim=1).square()


def _finish_updates(sums: Tensor) -> Tensor:
    """(n, 2) -> (n,); no update is 0 also where the weights are."""
    update, weight = sums.unbind(1)
    return torch.where(update == 0, 0.0, (update / weight).sqrt())


def _buckets(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters in order, in lists whose local parts have no more than `_ELEMENTS` elements, or of one."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        size = local(parameter.detach()).numel()
        if not buckets or size > room:
            buckets.append([])
            room = _ELEMENTS
        buckets[-1].append(parameter)
        room -= size
    return buckets


def _squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """(n,) float64: the sum of squares of each. In double, as for clipping: float32 would depend on the shards."""
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float64)
    return torch.stack([norm.to(device, non_blocking=True) for norm in norms]).square()


def _membership(names: Sequence[str], groups: Sequence[Sequence[str]], device: torch.device) -> Tensor:
    """(groups, names) float64, 1 where a name is in a group."""
    return _constant([[float(name in members) for name in names] for members in map(set, groups)], device)


def _constant(values: list[Any], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(device)


def layer_of(name: str) -> int | None:
    """The number of the block that a parameter belongs to; None: to none."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def _tag(name: str) -> str:
    """ "model.layers.3.self_attn.q_proj.weight" -> "q_proj/layer_03", "model.norm_alpha" -> "norm_alpha"."""
    layer = layer_of(name)
    kind = name.removesuffix(".weight").rpartition(".")[2]
    return kind if layer is None else f"{kind}/{layer_tag(layer)}"
