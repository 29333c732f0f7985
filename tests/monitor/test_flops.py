"""FLOPs of a token against counts by hand, and the peaks of devices."""

from __future__ import annotations

from dataclasses import replace

import pytest

from titan_yulan.config.model import PRESETS, count_parameters
from titan_yulan.monitor.flops import device_peak, flops_per_token


def test_yulan_mini() -> None:
    """2.42e9 parameters, nearly all of them in matrices, the tied embedding as the head."""
    config = PRESETS["yulan_mini_2b"]
    attention_matrices = 1920 * 1920 * 2 + 2 * 1920 * 384
    matrices = 56 * (attention_matrices + 3 * 1920 * 4800) + 99000 * 1920
    assert flops_per_token(config, 4096) == 6 * matrices + 12 * 56 * 30 * 64 * 4096
    assert 0.999 < matrices / count_parameters(config) < 1


def test_llama3_8b() -> None:
    """The embedding is looked up, not multiplied: 8.03e9 parameters less 0.525e9."""
    config = PRESETS["llama3_8b"]
    per_token = flops_per_token(config, 8192)
    assert per_token == pytest.approx(6 * (8.03e9 - 0.525e9) + 12 * 32 * 4096 * 8192, rel=1e-3)


def test_the_head_counts_the_same_tied_or_not() -> None:
    config = PRESETS["debug"]
    untied = replace(config, tie_word_embeddings=False, embedding_scale=1.0)
    assert flops_per_token(config, 128) == flops_per_token(untied, 128)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA GeForce GTX 970", None),
    ],
)
def test_peaks_of_the_data_sheets(name: str, peak: float | None) -> None:
    assert device_peak(name) == peak
