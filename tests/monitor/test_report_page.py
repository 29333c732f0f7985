"""The report page: what it holds equals the run's files, nothing of the run can break out, nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from titan_yulan import cli, config
from titan_yulan.config import load
from titan_yulan.errors import UserError
from titan_yulan.monitor import report as report_module
from titan_yulan.monitor.report import report
from titan_yulan.monitor.report_charts import group_of

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = ["<script>alert(1)</script>", '</script><img src="http://x/y" onerror=alert(2)>', "a&b'\"<!--"]
PHASES = {"warm-up": 20, "<b>stable</b>": 40, "anneal": 60}


def phase_of(step: int) -> str:
    return next(name for name, end in PHASES.items() if step <= end)


def metrics_line(step: int) -> dict[str, Any]:
    counts = {HOSTILE[0]: 64, HOSTILE[1]: 32 if step % 2 else 0, HOSTILE[2]: 32, "never": 0}
    loss = None if step == 30 else 5 - step / 20 + (40 if step == 45 else 0)
    line = {
        "step": step,
        "tokens": 128 * step,
        "phase": phase_of(step),
        "loss": loss,
        "cross_entropy": loss,
        "gradient_norm": 0.1 + step / 7,
        "learning_rate": 1e-3 / step,
        "batch_fingerprint": f"{step:016x}",
        "source_loss": {name: 4 - step / 30 for name, count in counts.items() if count},
        "source_tokens": counts,
    }
    return line | ({"skipped": "not finite"} if step == 30 else {}) | ({"warning": "spike"} if step == 45 else {})


def write(run: Path, name: str, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return lines


EVENTS = [
    {"time": "2026-01-01T00:00:00+0000", "host": "<i>h</i>", "event": "group", "world": 2, "restarts": 0},
    {"time": "2026-01-01T00:01:00+0000", "host": "h", "event": "checkpoint", "message": "saved x/step-00000020: 1 s"},
    {"time": "2026-01-01T00:01:30+0000", "host": "h", "event": "bad step", "step": 30, "reason": "not finite"},
    {
        "time": "2026-01-01T00:02:00+0000", "host": "h", "event": "failure", "restarts_left": 2,
        "workers": [{"rank": 1, "pid": 7, "reason": "signal <SIGKILL>"}],
    },
    {"time": "2026-01-01T00:02:05+0000", "host": "h", "event": "group", "world": 2, "restarts": 1},
    {"time": "2026-01-01T00:02:10+0000", "host": "h", "event": "resume", "step": 20, "ranks": 2, "message": "resumed"},
    {"time": "2026-01-01T01:02:03+0000", "host": "h", "event": "went back", "step": 20, "message": "went back to 20"},
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "<u>run"
    folder.mkdir()
    write(folder, "metrics.jsonl", [metrics_line(step) for step in range(1, 61)])
    losses = {name: 3.5 for name in HOSTILE}
    measured: list[dict[str, Any]] = [{"step": s, "tokens": 128 * s, "validation_loss": losses} for s in (0, 20, 60)]
    measured[1]["loss"] = 3.25  # over tokens; an earlier version wrote the other lines
    write(folder, "validation.jsonl", measured)
    write(folder, "evaluation.jsonl", [
        {"step": 0, "tokens": 0, "tasks": {"<em>task</em>": {"accuracy": 0.25}}},
        {"step": 20, "tokens": 2560, "tasks": {"<em>task</em>": {"accuracy": 0.5}}},
        {"step": 60, "tokens": 7680, "tasks": {"<em>task</em>": {"accuracy": 0.375}, "late": {"perplexity": 9.0}}},
    ])  # fmt: skip
    tags = [
        "hidden/mlp_output/layer_00/rms",
        "hidden/mlp_output/layer_03/rms",
        "hidden/mlp_output/layer_03/mean",
        "hidden/mlp_residual/layer_03/variance",
        "hidden/mlp_output/layer_03/variance",
        "update/<a>",
    ]
    values = {tag: 0.5 + index for index, tag in enumerate(tags)}
    write(folder, "statistics.jsonl", [{"step": s, "tokens": 128 * s, "values": values} for s in (10, 20, 30)])
    write(folder, "intervals.jsonl", [
        {"step": s, "tokens": 128 * s, "steps": 30, "seconds": {"compute": 6.0, "data_wait": 2.0, "validation": 2.0},
         "tokens_per_s": rate, "memory": {"host_gib": 1.5}} for s, rate in ((30, 480.0), (60, 960.0))
    ])  # fmt: skip
    write(folder, "mixture.jsonl", [
        {"phase": "anneal", "step": s, "row": 0, "shares": {HOSTILE[0]: 1.0}, "perplexity": {HOSTILE[0]: 20.0 - s}}
        for s in (40, 50)
    ])  # fmt: skip
    write(folder, "events.jsonl", EVENTS)
    (folder / "status.json").write_text('{"state": "stopped", "exit_code": 75, "message": "</dd><h1>x"}')
    return folder


class Page(HTMLParser):
    """Elements, texts by the element around them, and whether all that was opened was closed."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.stack[-1], data))

    def of(self, tag: str) -> list[str]:
        return [text for around, text in self.texts if around == tag]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.of("script")[0])

    def head(self) -> dict[str, str]:
        return dict(zip(self.of("dt"), self.of("dd"), strict=True))


def make(run: Path) -> Page:
    return Page(report(run).read_text(encoding="utf-8"))


def chart(data: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [entry for entry in data["charts"] if entry["id"] == name]
    return found


def test_the_page_is_whole_and_alone(run: Path) -> None:
    page = make(run)
    assert page.stack == []
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and not {"link", "img", "iframe", "object", "b", "i", "u", "em"} & set(tags)
    for tag, attributes in page.elements:
        assert not {"src", "href", "action", "data"} & attributes.keys(), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    script, style = (page.of("script")[1], page.of("style")[0])
    assert "url(" not in style and "@import" not in style
    (policy,) = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_texts_of_the_run_stay_texts(run: Path) -> None:
    page = make(run)
    assert page.of("h1") == ["<u>run"] and page.of("title") == ["<u>run: report"]
    assert page.head()["Status"] == "stopped: </dd><h1>x"
    assert {s["name"] for s in chart(page.data, "mixture")["series"]} == set(HOSTILE)
    assert "<em>task</em> accuracy" in page.of("th")
    assert any("rank 1: signal <SIGKILL>" in mark["text"] for mark in page.data["marks"])


def test_steps_are_those_of_the_file(run: Path) -> None:
    data = make(run).data
    lines = [metrics_line(step) for step in range(1, 61)]
    table = data["tables"]["steps"]
    assert table == {"step": [line["step"] for line in lines], "tokens": [line["tokens"] for line in lines]}
    raw, smooth, validation = chart(data, "loss")["series"]
    assert raw["y"] == [line["loss"] and pytest.approx(line["loss"], rel=1e-6) for line in lines]
    # the recurrence that is stated, beside the code's: weights 2^(-age / half-life) over finite steps
    finite = [(line["step"], line["loss"]) for line in lines if line["loss"] is not None]
    ages = {step: len(finite) - 1 - index for index, (step, _) in enumerate(finite)}
    weights = {step: 0.5 ** (ages[step] / 5) for step, _ in finite}
    expected = sum(weights[step] * loss for step, loss in finite) / sum(weights.values())
    assert smooth["y"][-1] == pytest.approx(expected, rel=1e-6)
    assert validation["y"] == [3.5, 3.25, 3.5] and data["tables"]["validation_mean"]["step"] == [0, 20, 60]
    assert data["tables"]["validation"]["step"] == [0, 20, 60]
    (norm,) = chart(data, "gradient_norm")["series"]
    assert norm["y"] == [pytest.approx(line["gradient_norm"], rel=1e-6) for line in lines]
    assert [(p["name"], p["first_step"], p["last_step"]) for p in data["phases"]] == [
        ("warm-up", 0, 20), ("<b>stable</b>", 20, 40), ("anneal", 40, 60),
    ]  # fmt: skip


def test_sources_and_mixture(run: Path) -> None:
    data = make(run).data
    areas = chart(data, "mixture")["series"]
    assert [area["name"] for area in areas] == [HOSTILE[0], HOSTILE[2], HOSTILE[1]]  # by tokens; 'never' is none
    rows = list(zip(*(area["y"] for area in areas), strict=True))
    assert rows[:2] == [(0.5, 0.25, 0.25), (pytest.approx(2 / 3), pytest.approx(1 / 3), 0)]
    curves = chart(data, "source_loss")["series"]
    (line,) = [c for c in curves if c["name"] == HOSTILE[1] and c["mark"] == "line"]
    assert line["y"][:3] == [pytest.approx(4 - 1 / 30), None, pytest.approx(4 - 3 / 30)]
    assert all(len(c["y"]) == len(data["tables"][c["table"]]["step"]) for c in curves)


def test_an_adaptive_mixture_is_drawn_where_it_changed(run: Path) -> None:
    data = make(run).data
    (curve,) = chart(data, "adaptive_perplexity")["series"]
    assert curve["y"] == [-20.0, -30.0]
    assert data["tables"][curve["table"]] == {"step": [40, 50], "tokens": [128 * 40, 128 * 50]}


def test_statistics_intervals_and_benchmarks(run: Path) -> None:
    page = make(run)
    central = chart(page.data, "statistics/hidden/mlp_output/rms")
    assert [(s["name"], s["y"][0], s["layer"]) for s in central["series"]] == [
        ("layer 0", 0.5, [0, 2]), ("layer 3", 1.5, [1, 2]),
    ]  # fmt: skip
    assert not central["folded"] and chart(page.data, "statistics/hidden/mlp_output/mean")["folded"]
    assert not chart(page.data, "statistics/hidden/mlp_residual/variance")["folded"]
    assert chart(page.data, "statistics/hidden/mlp_output/variance")["folded"]
    assert page.data["tables"]["statistics"]["step"] == [10, 20, 30]
    shares = {s["name"]: s["y"] for s in chart(page.data, "intervals/shares")["series"]}
    assert shares == {"compute": [0.6, 0.6], "data wait": [0.2, 0.2], "validation": [0.2, 0.2]}
    assert page.head()["Throughput"].startswith("720 tokens/s")
    assert page.head()["MFU"].startswith("n/a")
    cells = page.of("td")
    assert "0.5 (+0.25)" in cells and "0.375 (-0.125)" in cells and "9" in cells


def test_events_lie_at_their_steps(run: Path) -> None:
    data = make(run).data
    found = [(mark["kind"], mark["step"], mark["exact"]) for mark in data["marks"] if mark["kind"] != "validation"]
    for expected in [
        ("start", 0, True), ("checkpoint", 20, True), ("bad step", 30, True), ("failure", 30, False),
        ("restart", 20, True), ("resume", 20, True),
        ("rollback", 20, True), ("bad step", 45, True), ("benchmarks", 60, True),
    ]:  # fmt: skip
        assert found.count(expected) == 1, expected
    head = make(run).head()
    assert head["Starts, restarts, failures"] == "1, 1, 1" and head["Wall clock"].startswith("1:02:03")


def test_what_the_configuration_says(run: Path) -> None:
    assert make(run).head()["Parameters"].startswith("not known")
    loaded = load(ROOT / "train_configs" / "debug.toml").config
    (run / "config.toml").write_text(config.to_toml(loaded), encoding="utf-8")
    page = make(run)
    assert page.head()["Step"] == "60 of 220" and page.head()["Tokens"] == "7,680 of 450,560"
    assert page.of("pre") == [config.to_toml(loaded)]


def test_only_the_steps_are_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "metrics.jsonl", [metrics_line(1)])
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 2, "tok')  # cut off by a kill
    target = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path), "--output", str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    page = Page(target.read_text(encoding="utf-8"))
    assert page.data["tables"]["steps"]["step"] == [1]
    assert {entry["section"] for entry in page.data["charts"]} == {"Training", "Sources"}


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl with a step"):
        report(tmp_path)
    write(tmp_path, "metrics.jsonl", [metrics_line(1)])
    with pytest.raises(UserError, match=r"--output .*make it first"):
        report(tmp_path, tmp_path / "missing" / "page.html")


def test_a_long_run_with_many_sources_stays_small(tmp_path: Path) -> None:
    """The numbers of points do not grow beyond these with the steps, so neither does the page."""
    names = [f"source_with_a_long_name_{index:03d}" for index in range(100)]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 701):
            present = {names[(step + k) % 100]: 1.2345678 + step / 701 for k in range(12)}
            line = metrics_line(1) | {"step": step, "tokens": 100 * step, "loss": math.sin(step) + 3, "phase": "one"}
            tokens = dict.fromkeys(names, 0) | dict.fromkeys(present, 8)
            file.write(json.dumps(line | {"source_loss": present, "source_tokens": tokens}) + "\n")
    tags = [f"hidden/point_{p}/layer_{n:02d}/{s}" for p in range(6) for n in range(10) for s in ("rms", "mean")]
    rows = [
        {"step": s, "tokens": s, "values": {tag: 1 / (s + i) for i, tag in enumerate(tags)}} for s in range(1, 1001)
    ]
    write(tmp_path, "statistics.jsonl", rows)
    text = report(tmp_path).read_text(encoding="utf-8")
    assert len(text) < 4.5e6
    data = Page(text).data
    assert len(chart(data, "source_loss")["series"]) == 100 and len(data["tables"]["sources"]["step"]) <= 300


def test_tags_are_grouped_by_what_is_compared() -> None:
    assert group_of("hidden/mlp_output/layer_07/rms") == ("hidden/mlp_output/rms", "layer 7", 7)
    assert group_of("attention/logsumexp/layer_12") == ("attention/logsumexp", "layer 12", 12)
    assert group_of("update/matrices") == ("update", "matrices", None)
    assert group_of("lonely") == ("lonely", "lonely", None)


def test_torch_is_not_imported(run: Path) -> None:
    code = f"import sys; from titan_yulan import cli; cli.main(['report', {str(run)!r}]); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert said.stdout.splitlines()[-1] == "False"


_CHECKS = """
const r = require(process.argv[1]);
const same = (a, b) => { if (JSON.stringify(a) !== JSON.stringify(b)) throw Error(JSON.stringify([a, b])); };
same(r.niceTicks(0, 1, 5), [0, 0.2, 0.4, 0.6, 0.8, 1]);
same(r.niceTicks(2.5, 7.7, 5), [3, 4, 5, 6, 7]);
same(r.niceTicks(5, 5, 5), [5]);
same(r.logTicks(0.001, 1000, 4), [0.001, 0.1, 10, 1000]);
same(r.logTicks(0.9, 20, 5), [1, 2, 3, 5, 7, 10, 20]);
same(r.logTicks(0.002, 0.6, 5), [0.003, 0.01, 0.03, 0.1, 0.3]);
same(r.logTicks(2.1, 2.9, 4), [2.2, 2.4, 2.6, 2.8]);
same([1, 4.9, 5.1, 99, -3].map((x) => r.nearest([1, 3, 7, 20], x)), [0, 1, 2, 3, 0]);
same([1, 2, 3, 4].map((x) => r.interpolate([2, 4], [20, 60], x)), [10, 20, 40, 60]);
same(r.interpolate([0, 10], [0, 50], 20), 100);
same([0, 999, 1500, 2e6, 3.2e12, 0.00012, 0.000012].map(r.short),
     ["0", "999", "1.5k", "2M", "3.2T", "0.00012", "1.2e-5"]);
same([1234567, 0.1234567, null].map(r.exact), ["1,234,567", "0.1234567", "\\u2013"]);
same(r.total([[1, null, 2], [3, 4, 5]], 3), [4, 4, 7]);
console.log("all the same");
"""


def test_the_pure_parts_of_the_script() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node to run the script with")
    script = Path(report_module.__file__).parent / "report.js"
    said = subprocess.run([node, "-e", _CHECKS, "--", str(script)], capture_output=True, text=True)
    assert said.stdout.strip() == "all the same", said.stderr
