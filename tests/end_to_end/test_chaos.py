"""The short form of the chaos run (`chaos.py`): a step that is not finite, a killed worker, a flipped bit, and other
ranks or another layout at every start."""

from __future__ import annotations

import pytest

from tests.end_to_end.chaos import chaos


@pytest.mark.timeout(480)  # five starts, beside other tests
def test_a_disturbed_run_keeps_every_promise(tmp_path, small_data) -> None:
    text, kept = chaos(tmp_path / "chaos", seed=5, minutes=4, short=True, data=small_data)
    assert kept, text
    assert "Did not come to happen" not in text, text
