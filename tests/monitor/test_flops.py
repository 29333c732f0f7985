"""FLOPs of a token against counts by hand and the published ones, and the peaks of devices."""

from __future__ import annotations

from dataclasses import replace

import pytest

from titan_yulan.config.model import count_parameters
from titan_yulan.config.presets import PRESETS
from titan_yulan.monitor.flops import FORMULAS, device_peak, flops_per_token, flops_utilization

YULAN_MINI = PRESETS["yulan_mini_2b"]
# YuLan-Mini's script: tokens of the stages over the GPU hours of 56 and of 48 A800s
PUBLISHED_RATE = 1e12 / (56 * 10 * 28 * 3600 + 48 * 15 * 32 * 3600)
PUBLISHED_ROWS, LENGTH, A800 = 1008, 4096, 312e12


def test_yulan_mini() -> None:
    """2.42e9 parameters, nearly all of them in matrices, the tied embedding as the head."""
    attention_matrices = 1920 * 1920 * 2 + 2 * 1920 * 384
    matrices = 56 * (attention_matrices + 3 * 1920 * 4800) + 99000 * 1920
    assert flops_per_token(YULAN_MINI, 4096) == 6 * matrices + 12 * 56 * 30 * 64 * 4096
    assert 0.999 < matrices / count_parameters(YULAN_MINI) < 1


def test_the_published_figures() -> None:
    """What YuLan-Mini's script prints: T, F of a step of 1,008 rows, and MFU on an A800, to the last bit."""
    per_token = FORMULAS["published"].per_token(YULAN_MINI, LENGTH)
    assert PUBLISHED_RATE == 7174.012855831038
    assert per_token * PUBLISHED_ROWS * LENGTH == 92613056932085760
    assert flops_utilization(per_token, PUBLISHED_RATE, A800) == 0.5157738221374585


@pytest.mark.parametrize(
    ("name", "share"), [("published_gqa", 0.470), ("palm", 0.430), ("causal", 0.369), ("6n", 0.308)]
)
def test_the_published_rate_by_other_formulas(name: str, share: float) -> None:
    per_token = FORMULAS[name].per_token(YULAN_MINI, LENGTH)
    assert flops_utilization(per_token, PUBLISHED_RATE, A800) == pytest.approx(share, abs=5e-4)


def test_with_as_many_key_heads_the_published_formulas_agree() -> None:
    config = replace(YULAN_MINI, num_key_value_heads=30)
    assert FORMULAS["published"].per_token(config, 512) == FORMULAS["published_gqa"].per_token(config, 512)


def test_the_target_of_one_h100() -> None:
    """28,700 tokens/s are 65 % by the published formula, and 47 % with causal attention counted once."""
    shares = {name: flops_utilization(f.per_token(YULAN_MINI, LENGTH), 28700, 989e12) for name, f in FORMULAS.items()}
    assert shares["published"] == pytest.approx(0.65, abs=5e-3)
    assert shares["causal"] == pytest.approx(0.47, abs=5e-3)


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
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA H20", None),
        ("NVIDIA GeForce GTX 970", None),
    ],
)
def test_peaks_of_the_data_sheets(name: str, peak: float | None) -> None:
    assert device_peak(name) == peak
