"""A model trains alike with the Triton kernels and with plain PyTorch: norms, SwiGLU, projections, fused head."""

from __future__ import annotations

import torch

from tests.kernels.training import train


def test_three_steps_with_the_kernels_and_without() -> None:
    (on, gradients), (off, expected) = (train(kernels, 3, 1, 8, 16, 40) for kernels in ("triton", "reference"))
    torch.testing.assert_close(on, off, rtol=1e-5, atol=0)
    assert gradients.keys() == expected.keys() and len(expected) > 20
    for name, gradient in expected.items():
        error = (gradients[name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, (name, float(error))
