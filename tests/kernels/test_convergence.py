"""A small model learns alike through the operators and through plain PyTorch: 30 steps of AdamW on real text.

Only on a GPU does this run the kernels. On a CPU the operators compute the reference's arithmetic, and what is compared
is everything around it: which operator the model calls with what, and the backward formulas against autograd. The
kernels themselves train for a few steps in `interpreted/test_training.py`.
"""

from __future__ import annotations

import torch

from tests.kernels.training import train


def test_thirty_steps_through_the_operators_and_without() -> None:
    (on, gradients), (off, expected) = (train(kernels, 30, 4, 48, 64, 160) for kernels in ("auto", "reference"))
    assert off[-1] < off[0] - 1.0
    torch.testing.assert_close(on, off, rtol=1e-4, atol=0)
    assert gradients.keys() == expected.keys()
