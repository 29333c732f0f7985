"""Where curves go: the same tags everywhere."""

from __future__ import annotations

import errno
import math
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from tests.curriculum.making import configuration, phase
from titan_yulan.config.sections import MonitorSection
from titan_yulan.errors import UserError
from titan_yulan.monitor.board import WANDB_FILE, TensorBoard, layout, open_boards
from titan_yulan.monitor.events import read_events

CONFIG = configuration(phase("a", "10 steps", {"code": 1.0}))
WANDB = MonitorSection(tensorboard=False, wandb_project="yulan", wandb_group="studies")


class Wandb:
    """Takes the place of the package and notes what is called; whether Weights & Biases likes it is not tested."""

    class Error(Exception):
        pass

    def __init__(self, refuses: str = "", dies: Exception | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._refuses, self._dies = refuses, dies
        self.run = SimpleNamespace(
            define_metric=lambda *names, **details: self.calls.append(("metric", *names, details)),
            log=lambda values: self._sent("log", values),
            summary={},
            finish=lambda: self._sent("finish"),
        )

    def _sent(self, *call: Any) -> None:
        self.calls.append(call)
        if self._dies:
            raise self._dies

    def init(self, **arguments: Any) -> Any:
        if self._refuses:
            raise Wandb.Error(self._refuses)
        self.calls.append(("init", arguments))
        return self.run


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_curves_of_both_boards_have_the_same_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = replace(CONFIG, monitor=replace(WANDB, tensorboard=True))
    boards = open_boards(config, ["code"], tmp_path, -1)
    boards.scalars(3, {"loss/train": 2.0, "optim/grad_norm": math.nan})
    boards.text("sample", "def")
    boards.flush()
    boards.close()
    assert scalars(tmp_path / "tensorboard", "loss/train") == [(3, 2.0)]
    assert ("log", {"step": 3, "loss/train": 2.0}) in wandb.calls
    assert wandb.run.summary == {"sample": "def"}
    assert wandb.calls[-1] == ("finish",)


def test_a_later_start_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []
    for name, step in (("", -1), ("hotter", 7)):
        wandb = Wandb()
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        monitor = replace(WANDB, wandb_name=name)
        open_boards(replace(CONFIG, monitor=monitor), ["code"], tmp_path, step).close()
        starts.append(wandb.calls[0][1])
        assert ("metric", "*", {"step_metric": "step"}) in wandb.calls
    first, second = starts
    assert first["id"] == second["id"] == (tmp_path / WANDB_FILE).read_text() and len(first["id"]) == 16
    assert {**first, "id": ""} == {
        "project": "yulan",
        "group": "studies",
        "name": CONFIG.run.name,
        "id": "",
        "resume": "allow",
        "dir": str(tmp_path),
    }
    assert second["name"] == "hotter"


def test_a_refusal_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Wandb(refuses="no API key configured"))
    with pytest.raises(UserError, match=r"^monitor.wandb_project: no API key configured; log in .*WANDB_MODE=offline"):
        open_boards(replace(CONFIG, monitor=WANDB), ["code"], tmp_path, -1)


@pytest.mark.parametrize("error", [Wandb.Error("the service is gone"), BrokenPipeError(32, "Broken pipe")])
@pytest.mark.parametrize("first", ["log", "finish"])
def test_a_service_that_dies_leaves_the_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, first: str
) -> None:
    wandb = Wandb(dies=error)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    boards = open_boards(replace(CONFIG, monitor=replace(WANDB, tensorboard=True)), ["code"], tmp_path, -1)
    for step in range(3 if first == "log" else 0):
        boards.scalars(step, {"loss/train": 2.0})
        boards.text("sample", "def")
    boards.close()
    assert [call[0] for call in wandb.calls[3:]] == [first] and wandb.run.summary == {}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("WARNING: Weights & Biases failed") and str(error) in line
    assert [(event["event"], event["message"]) for event in read_events(tmp_path)] == [("wandb failed", line)]
    if first == "log":
        assert scalars(tmp_path / "tensorboard", "loss/train") == [(step, 2.0) for step in range(3)]


def test_only_a_full_disk_is_kept_from_the_threads_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", before := lambda arguments: seen.append(arguments.exc_value))
    board = TensorBoard(tmp_path, -1, ["code"])
    for error in (OSError(errno.ENOSPC, "full"), full := ValueError("another")):
        threading.excepthook(threading.ExceptHookArgs((type(error), error, None, None)))
    assert seen == [full]
    board.close()
    assert threading.excepthook is before


def test_a_missing_package_is_a_mistake_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is missing; pip install wandb, or remove the key"):
        open_boards(replace(CONFIG, monitor=WANDB), ["code"], tmp_path, -1)


def test_no_board_is_fine(tmp_path: Path) -> None:
    boards = open_boards(replace(CONFIG, monitor=MonitorSection(tensorboard=False)), ["code"], tmp_path, -1)
    boards.scalars(1, {"loss/train": 1.0})
    boards.rewind(0)
    boards.close()
    assert list(tmp_path.iterdir()) == []


def test_going_back_takes_back_what_comes_again(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, -1, ["code"])
    for step, value in ((1, 1.0), (2, 1.0), (3, 1.0)):
        board.scalars(step, {"loss/train": value})
    board.rewind(1)
    board.scalars(2, {"loss/train": 5.0})
    board.close()
    assert scalars(tmp_path, "loss/train") == [(1, 1.0), (2, 5.0)]


def test_the_layout_is_in_the_file_and_finds_the_tags(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, -1, ["code", "c++"])
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (stored,) = events.Tensors("custom_scalars__config__")
    written = cast(Any, layout_pb2).Layout.FromString(stored.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for group in written.category for chart in group.chart}
    assert [group.title for group in written.category] == ["losses", "curriculum", "stability", "speed"]
    assert charts == {title: chart[1] for group in layout(["code", "c++"]).values() for title, chart in group.items()}

    def shown(title: str, tags: list[str]) -> list[str]:
        return [tag for tag in tags if any(re.match(pattern, tag) for pattern in charts[title])]

    losses = ["loss/train", "loss/train_code", "loss/val", "loss/val_c++", "loss/val_perplexity", "loss/value"]
    assert shown("training", losses) == ["loss/train", "loss/train_code"]
    assert shown("validation", losses) == ["loss/val", "loss/val_c++"]
    assert shown("validation perplexity", losses) == ["loss/val_perplexity"]
    hidden = ["hidden/embedding/rms", "hidden/mlp_residual/layer_00/rms", "hidden/mlp_residual/layer_00/mean"]
    hidden += ["hidden/mlp_output/layer_00/rms", "weight/q_proj/layer_00/rms"]
    assert shown("root mean square of the residual stream", hidden) == hidden[:2]
    assert shown("root mean square of the MLP's output", hidden) == hidden[3:4]
