"""Compiled runs on two ranks: silent after the second step, and clear about what is compiled later."""

from __future__ import annotations

import re
from pathlib import Path

from tests.end_to_end import harness
from tests.end_to_end.harness import column, metrics, train

# both are the first phase's shape; only the number of micro-batches changes, from 2 to 4 a rank
PHASES = """
[[curriculum]]
name = "one"
length = "4 steps"
sequence_length = 48
mix = { code = 0.5, math = 0.5 }
batch = { global_batch_size = 8, micro_batch_size = 4 }
lr = { shape = "constant" }
[[curriculum]]
name = "two"
length = "4 steps"
sequence_length = 48
mix = { code = 0.5, prose = 0.5 }
batch = { global_batch_size = 16, micro_batch_size = 4 }
[parallel]
tensor = 2
[activation_checkpoint]
mode = "selective"
[compile]
enabled = true
backend = "aot_eager"
"""
REPORT = re.compile(r"torch\.compile: (\d+) graphs in \d+\.\d s")
FREEZING = Path(__file__).parent / "freezing"


def start(folder: Path, data: Path, **environment: str) -> tuple[harness.Result, list[dict]]:
    config = harness.write_small_config(folder, data, folder / "outputs", phases=PHASES)
    result = train(config, 2, environment=environment)
    assert result.code == 0, result.output
    return result, metrics(folder / "outputs" / "small")


def test_more_micro_batches_compile_nothing(tmp_path: Path, small_data: Path) -> None:
    result, lines = start(tmp_path, small_data)
    assert column(lines, "phase") == 4 * ["one"] + 4 * ["two"]
    assert [line["tokens"] for line in lines][3:5] == [4 * 8 * 48, 4 * 8 * 48 + 16 * 48]
    (report,) = REPORT.findall(result.output)
    assert int(report) > 0
    assert "WARNING" not in result.output


def test_a_graph_that_no_longer_fits_is_reported_with_its_reason(tmp_path: Path, small_data: Path) -> None:
    result, lines = start(tmp_path, small_data, PYTHONPATH=str(FREEZING), TEST_FREEZE_AT="6")
    assert len(lines) == 8
    assert len(REPORT.findall(result.output)) == 1
    (line,) = (line for line in result.output.splitlines() if "WARNING" in line)  # the others write to their own logs
    assert "WARNING: step 6, rank 0: torch.compile compiled _selective_forward (" in line
    assert "requires_grad mismatch. expected requires_grad=1" in line and line.endswith(
        "Remedy: freeze or unfreeze parameters before the first step."
    )
