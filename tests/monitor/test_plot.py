"""The picture of a run: what is averaged, and what is drawn."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from titan_yulan import cli
from titan_yulan.errors import UserError
from titan_yulan.monitor.plot import gather, plot


def step(number: int, phase: str, code: int, math: int, loss: float | None = 2.0) -> dict[str, Any]:
    """A line of metrics.jsonl: `code` and `math` tokens; math always has loss 1."""
    return {
        "step": number,
        "tokens": 100 * number,
        "phase": phase,
        "learning_rate": 0.01 * number,
        "source_tokens": {"code": code, "math": math, "unread": 0},
        "source_loss": {name: value for name, value, count in (("code", loss, code), ("math", 1.0, math)) if count},
    }


def write(run: Path, name: str, lines: list[dict[str, Any]]) -> None:
    (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_neighbouring_steps_are_averaged_by_tokens() -> None:
    lines = [step(1, "a", 75, 25, 4.0), step(2, "a", 25, 75, 2.0), step(3, "b", 100, 0), step(4, "b", 0, 100)]
    one, two = gather(lines, points=2)
    assert (one.phase, one.tokens, one.learning_rate) == ("a", 200, 0.02)
    assert one.source_tokens == {"code": 100, "math": 100, "unread": 0}
    assert one.source_loss == {"code": pytest.approx((75 * 4 + 25 * 2) / 100), "math": 1.0}
    assert two.source_loss == {"code": 2.0, "math": 1.0}


def test_no_point_goes_over_the_end_of_a_phase_or_loses_tokens() -> None:
    lines = [step(n, "a" if n <= 5 else "b", 60, 40) for n in range(1, 12)]
    points = gather(lines, points=4)
    assert [(point.phase, point.tokens) for point in points] == [
        ("a", 200), ("a", 400), ("a", 500), ("b", 700), ("b", 900), ("b", 1100),
    ]  # fmt: skip
    assert sum(point.source_tokens["code"] for point in points) == 11 * 60


def test_a_loss_that_is_not_finite_is_left_out() -> None:
    (point,) = gather([step(1, "a", 50, 50, None), step(2, "a", 50, 50, 3.0)], points=1)
    assert point.source_loss == {"code": 3.0, "math": 1.0}
    (point,) = gather([step(1, "a", 50, 50, None)], points=1)
    assert point.source_loss == {"math": 1.0}


def test_the_picture_names_phases_and_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    write(tmp_path, "metrics.jsonl", [step(n, "stable" if n < 30 else "anneal", 60, 40) for n in range(1, 61)])
    write(tmp_path, "validation.jsonl", [{"step": 0, "tokens": 0, "validation_loss": {"code": 3.0, "math": 2.0}}])
    write(tmp_path, "mixture.jsonl", [{"step": 20}, {"step": 99}])
    assert cli.main(["plot", str(tmp_path), "--output", str(tmp_path / "run.svg")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run.svg'}\n"
    texts = set(re.findall(r"<!-- (.*?) -->", (tmp_path / "run.svg").read_text(encoding="utf-8")))
    assert {"stable", "anneal", "code", "math", "adjusted", "learning rate", "2K"} <= texts
    assert f"{tmp_path.name}: 60 steps, 6,000 tokens" in texts and "unread" not in texts
    assert plot(tmp_path) == tmp_path / "curves.png" and (tmp_path / "curves.png").stat().st_size > 10_000


def test_many_sources_share_an_area(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = [step(n, "a", 10, 10) for n in range(1, 5)]
    for line in lines:
        line["source_tokens"] |= {f"small{n:02d}": 40 - n for n in range(20)}
    write(tmp_path, "metrics.jsonl", lines)
    texts = plot(tmp_path, tmp_path / "run.svg").read_text(encoding="utf-8")
    assert "<!-- the rest -->" in texts and "<!-- small09 -->" in texts and "<!-- small10 -->" not in texts


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match=r"has no metrics\.jsonl with a step in it; name the folder"):
        plot(tmp_path)
    write(tmp_path, "metrics.jsonl", [step(1, "a", 1, 1)])
    with pytest.raises(UserError, match=r"--output curves\.doc: the suffix says the format; allowed: .*png.*svg"):
        plot(tmp_path, Path("curves.doc"))


def test_without_matplotlib_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'titan-yulan\[plot\]'"):
        plot(tmp_path)
