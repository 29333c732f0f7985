"""`[eval] tasks`: benchmarks inside a run, which is to the last bit the run without them."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest

from tests.end_to_end import harness
from titan_yulan.checkpoint.layout import find_checkpoints
from titan_yulan.errors import UserError
from titan_yulan.eval.evaluation import Settings, evaluate
from titan_yulan.eval.sandbox import check_sandbox
from titan_yulan.monitor.metrics import read_lines


def write_requests(folder: Path) -> None:
    folder.mkdir()
    choices = [
        {"context": f"def f{i}(x): " + "return " * (i % 5), "choices": [" x", " None", f" {i}"], "gold": i % 3}
        for i in range(13)
    ]
    (folder / "winogrande.jsonl").write_text("\n".join(map(json.dumps, choices)))
    words = [{"context": "import " * i, "continuation": " sys"} for i in range(1, 6)]
    (folder / "lambada.jsonl").write_text("\n".join(map(json.dumps, words)))
    # for two ranks unequally many, of which each is written for another time; the number tells which characters are in
    # the text
    keys = {"answer": list(dict.fromkeys(string.printable.lower())), "stop": ["\n\n"]}
    asked = [{"context": "x = " * i, "max_new_tokens": 2 + 3 * i, **keys} for i in range(7)]
    (folder / "ruler.jsonl").write_text("\n".join(map(json.dumps, asked)))
    programs = [
        {"context": "def f(", "prefix": "'''", "test": f"'''\nassert {i}", "stop": ["'"], "max_new_tokens": 4}
        for i in range(3)
    ]
    (folder / "humaneval.jsonl").write_text("\n".join(map(json.dumps, programs)))


def programs_that_can_run() -> tuple[str, ...]:
    try:
        check_sandbox()
    except UserError:
        return ()
    return ("humaneval",)


def test_a_run_with_tasks_is_the_run_without_them(tmp_path: Path, small_data: Path, reference: Path) -> None:
    requests = tmp_path / "requests"
    write_requests(requests)
    config = harness.write_small_config(tmp_path, small_data, tmp_path / "outputs")
    tasks = ("winogrande", "lambada", "ruler", *programs_that_can_run())
    keys = (f"--eval.tasks={json.dumps(tasks)}", '--eval.task_every="5 steps"', f"--eval.requests={requests}")
    keys += ("--eval.execute_programs=true", "--eval.task_new_tokens=12")
    result = harness.train(config, 2, *keys)
    assert result.code == 0, result.output
    run = tmp_path / "outputs" / "small"
    assert harness.same_in_every_bit(run, reference)
    lines = read_lines(run / "evaluation.jsonl")
    # at the start, every 5 steps of a phase, and where the phases of 16, 14 and 8 steps end
    assert [line["step"] for line in lines] == [0, 5, 10, 15, 16, 21, 26, 30, 35, 38]
    assert lines[0]["tasks"] != lines[-1]["tasks"]
    # what `titan-yulan eval` finds in the last checkpoint, with the context of the first phase
    settings = Settings(tasks, requests=requests, context=48, precision="float32", execute_code=True, max_new_tokens=12)
    report = evaluate(find_checkpoints(run / "checkpoints")[-1].path, settings, say=lambda line: None)
    for found in report.results:
        assert lines[-1]["tasks"][found.task] == pytest.approx(found.metrics, rel=1e-4), found.task
        assert found.task != "ruler" or 0 < found.metrics["exact_match"] < 1
        assert found.task != "humaneval" or found.metrics["pass@1"] == pytest.approx(2 / 3)
