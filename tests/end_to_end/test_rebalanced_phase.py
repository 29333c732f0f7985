"""A run that begins with YuLan-Mini's format and re-balances at its second phase.

The learning rate is zero, so that what the checkpoints hold is what was loaded, and what re-balancing made of it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoint.hugging_face_folders import write_yulan
from tests.end_to_end import harness
from tests.optimizer.rebalancing import factor_of, scales
from titan_yulan import config as configuration
from titan_yulan.checkpoint.layout import find_checkpoints
from titan_yulan.eval.load import load_decoder

RMS = 0.05
PHASES = f"""
[[curriculum]]
name = "first"
length = "1 steps"
sequence_length = 48
start_from = "{{weights}}"
mix = {{ code = 0.5, math = 0.5 }}
lr = {{ shape = "constant", from = 0.0, to = 0.0 }}
[[curriculum]]
name = "second"
length = "1 steps"
sequence_length = 96
rebalance_rms = {RMS}
mix = {{ math = 0.5, prose = 0.5 }}
"""


def test_a_run_begins_with_published_weights_and_rebalances(tmp_path: Path, small_data: Path) -> None:
    weights = tmp_path / "weights"
    phases = PHASES.replace("{weights}", str(weights))
    config = harness.write_small_config(tmp_path, small_data, tmp_path / "outputs", phases=phases)
    loaded = configuration.load(config).config
    published = write_yulan(weights, loaded.model)
    result = harness.train(config, 1)
    assert result.code == 0, result.output
    assert "re-balanced: every matrix with a scalar has the root mean square 0.05" in result.output
    run = tmp_path / "outputs" / "small"
    first, last = find_checkpoints(run / "checkpoints")
    decoder, _ = load_decoder(first.path)
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, published[name]), name
    decoder, _ = load_decoder(last.path)
    by_scalar = scales(published, RMS)
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter, published[name] * factor_of(name, by_scalar), rtol=3e-7, atol=0)
    before, *_, after = harness.validations(run)
    assert after["validation_loss"] == pytest.approx(before["validation_loss"], rel=1e-5)
