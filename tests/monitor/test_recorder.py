"""What the recorder makes of the values of finished steps."""

from __future__ import annotations

import errno
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.curriculum.making import configuration, phase
from titan_yulan.config.sections import MonitorSection, RecoverySection
from titan_yulan.curriculum.plan import Plan
from titan_yulan.errors import RunError
from titan_yulan.monitor.metrics import read_lines
from titan_yulan.monitor.recorder import Recorder, StepValues
from titan_yulan.monitor.recovery import Recovery
from titan_yulan.monitor.statistics import Statistics
from titan_yulan.optimizer.guard import FINE, NOT_FINITE
from titan_yulan.parallel.process import World

MONITOR = MonitorSection(log_every=4, tensorboard=False)
CONFIG = configuration(phase("a", "10 steps", {"code": 0.5, "math": 0.5}), monitor=MONITOR)
PLAN = Plan(CONFIG)


def make(folder: Path, rank: int = 0, step: int | None = None) -> Recorder:
    world = World(rank, 2, torch.device("cpu"), cast(Any, None))
    return Recorder(CONFIG, PLAN, folder, step, world, Recovery(RecoverySection(), PLAN, folder, rank == 0))


def values(scale: float = 1.0, norm: float = 0.5, tokens: tuple[float, float] = (96, 32)) -> StepValues:
    totals = torch.tensor([scale * 300.0, 192.0, 96.0, *tokens])
    denominator = torch.tensor(sum(tokens), dtype=torch.float32)
    verdict = float(NOT_FINITE if not math.isfinite(scale + norm) else FINE)
    return StepValues(
        PLAN.phases[0], 0.01, totals, denominator, torch.tensor(norm), torch.tensor(-1), torch.tensor(verdict)
    )


def test_a_line_holds_the_means_over_the_global_batch(tmp_path: Path) -> None:
    recorder = make(tmp_path)
    recorder.record(3, values(), 0.0)
    line = recorder.flush()
    assert line == {
        "step": 3,
        "tokens": 3 * 128,
        "phase": "a",
        "loss": 300 / 128,
        "cross_entropy": 288 / 128,
        "gradient_norm": 0.5,
        "learning_rate": 0.01,
        "batch_fingerprint": "f" * 16,
        "source_loss": {"code": 2.0, "math": 3.0},
        "source_tokens": {"code": 96, "math": 32},
    }
    assert read_lines(tmp_path / "metrics.jsonl") == [line]


def test_a_source_without_tokens_has_no_loss(tmp_path: Path) -> None:
    recorder = make(tmp_path)
    recorder.record(1, values(tokens=(128, 0)), 0.0)
    line = recorder.flush()
    assert line is not None and line["source_loss"] == {"code": 1.5}
    assert line["source_tokens"] == {"code": 128, "math": 0}


def test_lines_are_written_when_due_and_at_the_end_of_the_phase(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = make(tmp_path)
    written = []
    for step in range(1, 11):
        recorder.record(step, values(), 0.0)
        written.append(len(read_lines(tmp_path / "metrics.jsonl")))
    assert written == [0, 0, 0, 4, 4, 4, 4, 8, 8, 10]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in printed] == [["step", f"{step}/10", "loss", "2.3438"] for step in (4, 8, 10)]
    assert "mfu n/a" in printed[0] and "lr 1.000e-02" in printed[0]


@pytest.mark.parametrize("bad", [{"scale": math.nan}, {"scale": math.inf}, {"norm": math.nan}, {"norm": math.inf}])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_not_finite_ends_the_run_on_every_rank(tmp_path: Path, bad: dict[str, Any], rank: int) -> None:
    recorder = make(tmp_path, rank)
    recorder.record(1, values(), 0.0)
    recorder.record(2, values(**bad), 0.0)
    recorder.record(3, values(**bad), 0.0)
    with pytest.raises(RunError, match=r"step 2: loss .* are not finite.*--step 2"):
        recorder.record(4, values(), 0.0)
    if rank == 0:  # what came after is worth nothing
        assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_batch_without_any_target_ends_the_run_with_a_message(tmp_path: Path) -> None:
    recorder = make(tmp_path)
    recorder.record(1, values(scale=0, norm=math.nan, tokens=(0, 0)), 0.0)
    with pytest.raises(RunError, match="step 1: loss nan"):
        recorder.flush()


def test_other_ranks_write_and_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = make(tmp_path, rank=1)
    recorder.phase_begins(PLAN.phases[0], 0)
    for step in range(1, 5):
        recorder.record(step, values(), 0.0)
    recorder.validation(4, torch.tensor([3.0, 4.0]), torch.tensor([2.0, 2.0]))
    recorder.close("finished")
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_validation_losses_come_with_their_change_since_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = make(tmp_path)
    recorder.validation(0, torch.tensor([8.0, 4.0]), torch.tensor([2.0, 2.0]))
    recorder.validation(5, torch.tensor([6.0, 5.0]), torch.tensor([2.0, 2.0]))
    first, second = capsys.readouterr().out.splitlines()
    assert first == "validation at step 0: code 4.0000  math 2.0000"
    assert second == "validation at step 5: code 3.0000 (-1.0000)  math 2.5000 (+0.5000)"
    lines = read_lines(tmp_path / "validation.jsonl")
    assert lines[1] == {"step": 5, "tokens": 640, "loss": 2.75, "validation_loss": {"code": 3.0, "math": 2.5}}
    recorder.validation(6, torch.tensor([6.0, 10.0]), torch.tensor([2.0, 8.0]))  # weighted by tokens
    recorder.validation(7, torch.zeros(2), torch.zeros(2))
    third, fourth = read_lines(tmp_path / "validation.jsonl")[2:]
    assert third["loss"] == 1.6 and fourth == {"step": 7, "tokens": 896, "validation_loss": {}}


def test_a_source_that_was_added_since_has_no_change_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "validation.jsonl").write_text('{"step": 0, "tokens": 0, "validation_loss": {"code": 4.0}}\n')
    recorder = make(tmp_path, step=3)
    recorder.validation(5, torch.tensor([6.0, 5.0]), torch.tensor([2.0, 2.0]))
    assert capsys.readouterr().out == "validation at step 5: code 3.0000 (-1.0000)  math 2.5000\n"


def test_a_resumed_run_drops_the_lines_that_come_again(tmp_path: Path) -> None:
    recorder = make(tmp_path)
    for step in range(1, 9):
        recorder.record(step, values(), 0.0)
    recorder.validation(8, torch.tensor([8.0, 4.0]), torch.tensor([2.0, 2.0]))
    resumed = make(tmp_path, step=6)
    resumed.record(7, values(), 0.0)
    resumed.flush()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    assert read_lines(tmp_path / "validation.jsonl") == []


def test_going_back_drops_what_comes_again(tmp_path: Path) -> None:
    recorder = make(tmp_path)
    for step in range(1, 8):
        recorder.record(step, values(), 0.0)
        if step in (3, 6):
            recorder.validation(step, torch.tensor([8.0, 4.0]), torch.tensor([2.0, 2.0]))
    recorder.rewind(5)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [recorder.has_validation(step) for step in (3, 6)] == [True, False]
    recorder.record(6, values(2.0), 0.0)
    recorder.flush()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and lines[-1]["loss"] == 600 / 128


def test_statistics_have_lines_of_their_own_that_go_back(tmp_path: Path) -> None:
    config = replace(CONFIG, monitor=replace(MONITOR, statistics_every=2))
    world, recovery = (
        World(0, 2, torch.device("cpu"), cast(Any, None)),
        Recovery(RecoverySection(), PLAN, tmp_path, True),
    )
    recorder = Recorder(config, PLAN, tmp_path, None, world, recovery)
    for step in range(1, 9):
        inside = Statistics(("hidden/stream/rms", "update/norms"), torch.tensor([step, math.inf if step == 4 else 0.5]))
        recorder.record(step, replace(values(), statistics=inside if step % 2 == 0 else None), 0.0)
    lines = read_lines(tmp_path / "statistics.jsonl")
    assert [(line["step"], line["tokens"]) for line in lines] == [(2, 256), (4, 512), (6, 768), (8, 1024)]
    assert lines[0]["values"] == {"hidden/stream/rms": 2.0, "update/norms": 0.5}
    assert lines[1]["values"] == {"hidden/stream/rms": 4.0, "update/norms": None}
    assert [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")] == [300 / 128] * 8
    recorder.rewind(5)
    assert read_lines(tmp_path / "statistics.jsonl") == lines[:2]
    assert [line["step"] for line in read_lines(tmp_path / "intervals.jsonl")] == [4]
    make(tmp_path, step=3)  # a start that measures no statistics takes back those that come no more
    assert read_lines(tmp_path / "statistics.jsonl") == lines[:1]


@pytest.mark.parametrize(
    ("every", "step", "told"),
    [(11, None, "steps 1-10"), (10, None, ""), (4, 8, "steps 9-10"), (4, 7, ""), (0, None, ""), (20, 10, "")],
)
def test_statistics_that_are_never_due_are_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], every: int, step: int | None, told: str
) -> None:
    config = replace(CONFIG, monitor=replace(MONITOR, statistics_every=every))
    world, section = World(0, 2, torch.device("cpu"), cast(Any, None)), RecoverySection()
    Recorder(config, PLAN, tmp_path, step, world, Recovery(section, PLAN, tmp_path, True))
    expected = f"note: monitor.statistics_every = {every}: none of the {told} is due, so there are none\n"
    assert capsys.readouterr().out == (expected if told else "")


def test_the_end_accounts_for_what_came_behind_the_last_printed_line(tmp_path: Path) -> None:
    recorder = make(tmp_path)
    for step in range(1, 7):
        recorder.record(step, values(), 0.0)
    recorder.close("stopped")
    lines = read_lines(tmp_path / "intervals.jsonl")
    assert [(line["step"], line["steps"], line["tokens"]) for line in lines] == [(4, 4, 512), (6, 2, 768)]


def test_a_full_disk_is_kept_for_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = make(tmp_path)

    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(recorder._lines["metrics"], "write", full)
    recorder.record(1, values(), 0.0)
    assert recorder.flush() is not None
    assert recorder.failure is not None and "full" in recorder.failure


def test_the_end_says_where_the_run_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = make(tmp_path)
    recorder.record(1, values(), 0.0)
    recorder.close("stopped")
    printed = capsys.readouterr().out
    assert printed.startswith(f"stopped: the run is in {tmp_path}") and "the same command again" in printed
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1]
