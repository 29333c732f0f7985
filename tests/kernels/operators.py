"""Probes that the tests of the operators share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.kernels.accuracy import results_of


def assert_same_compiled(function: Callable[..., Any], inputs: Sequence[Tensor], backend: str, **options: Any) -> None:
    """Outputs and gradients of `function` in one graph, without a break, are those of `function`."""
    gradients = [torch.ones_like(inputs[0])] * (2 if isinstance(function(*inputs), tuple) else 1)
    compiled = torch.compile(function, backend=backend, fullgraph=True, **options)
    torch.testing.assert_close(results_of(compiled, inputs, gradients), results_of(function, inputs, gradients))


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts by name how often this project's operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "titan_yulan":
            self.count[func._opname] = self.count.get(func._opname, 0) + 1
        return func(*args, **(kwargs or {}))


def forward_runs(function: Callable[..., Tensor], inputs: Sequence[Tensor], operator: Any, keep: bool) -> int:
    """How often `operator` runs in forward and backward of `function` under activation checkpointing.

    `keep`: the policy names the operator as one whose results are kept. The gradients must not notice.
    """

    def policy(context: object, called: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        kept = keep and called == operator
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def recomputed(*leaves: Tensor) -> Tensor:
        context = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(function, *leaves, use_reentrant=False, context_fn=context)

    plain = results_of(function, inputs, [torch.ones_like(function(*inputs))])
    with Calls() as calls:
        again = results_of(recomputed, inputs, [torch.ones_like(plain[0])])
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    return calls.count[operator._opname]
