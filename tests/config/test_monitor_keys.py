"""Mistakes in `[monitor]`, told with their remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from titan_yulan import config as configuration
from titan_yulan.errors import UserError

DEBUG = Path(__file__).resolve().parents[2] / "train_configs" / "debug.toml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("profile_steps=1-3", "monitor.profile_steps: cannot read '1-3' as steps; write FIRST-LAST"),
        ("memory_snapshot_steps=20", "monitor.memory_snapshot_steps: cannot read '20' as steps"),
        ("wandb_group=studies", "monitor.wandb_group: nothing is sent without monitor.wandb_project; set that"),
        ("wandb_name=hotter", "monitor.wandb_name: nothing is sent without monitor.wandb_project; set that"),
    ],
)
def test_a_mistake_names_the_key_and_the_remedy(override: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        configuration.load(DEBUG, [f"--monitor.{override}"])
    assert message in str(raised.value)


def test_what_goes_together_is_taken() -> None:
    overrides = ["--monitor.profile_steps=20-24", "--monitor.wandb_project=yulan", "--monitor.wandb_group=studies"]
    monitor = configuration.load(DEBUG, overrides).config.monitor
    assert (monitor.profile_steps, monitor.wandb_project, monitor.wandb_group) == ("20-24", "yulan", "studies")
