"""`data label`: a small classifier that is trained, tells how good it is, and labels every file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_yulan import cli
from titan_yulan.data.label import Classifier, Features, confusion_lines, fit

WORDS = {
    "law-policy": "court judge statute appeal contract clause verdict plaintiff counsel treaty".split(),
    "medicine-health": "patient dose fever clinic vaccine nurse symptom therapy surgeon blood".split(),
    "数学": list("方程函数积分定理证明几何代数概率极限"),
    "法律": list("法院判决合同条款上诉律师被告原告刑罚"),
}
COMMON = "the of and to in a is that for it".split()


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Documents of which a fifth of the words tell the topic."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        topic = list(WORDS)[number % len(WORDS)]
        told = random.random(40) < 0.2
        words = [random.choice(WORDS[topic]) if tells else random.choice(COMMON) for tells in told]
        chinese = topic not in ("law-policy", "medicine-health")
        rows.append({"text": ("" if chinese else " ").join(words), "topic": topic})
    return rows


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def label(*arguments: str | Path) -> int:
    return cli.main(["data", "label", *map(str, arguments)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("label")
    assert label("train", "--output", folder / "model.npz", write(folder / "rows.jsonl", make_rows(400, 0))) == 0
    return folder / "model.npz"


def test_topics_of_new_documents_are_found_in_both_scripts(model: Path, tmp_path: Path) -> None:
    rows = make_rows(200, 1)
    truth = [row.pop("topic") for row in rows]
    files = [write(tmp_path / "a.jsonl", rows[:90]), write(tmp_path / "b.jsonl", rows[90:])]
    assert label("apply", "--model", model, "--output", tmp_path / "out", *files, "--workers", "2") == 0
    texts = [(tmp_path / "out" / name).read_text() for name in ("a.jsonl", "b.jsonl")]
    labelled = [json.loads(line) for line in "".join(texts).splitlines()]
    assert [row["text"] for row in labelled] == [row["text"] for row in rows]
    right = [row["topic"] == topic for row, topic in zip(labelled, truth, strict=True)]
    assert np.mean(right) > 0.97 and all(0.25 < row["topic_probability"] <= 1 for row in labelled)


def test_what_it_is_not_sure_of_is_others(model: Path, tmp_path: Path) -> None:
    rows = [{"text": "court verdict appeal statute"}, {"text": "nothing of the kind"}, {"input_ids": [1]}]
    arguments = ["--model", model, "--output", tmp_path / "out", "--minimum-probability", "0.8", "--workers", "1"]
    assert label("apply", *arguments, write(tmp_path / "new.jsonl", rows)) == 0
    labelled = [json.loads(line) for line in (tmp_path / "out" / "new.jsonl").read_text().splitlines()]
    assert [row["topic"] for row in labelled] == ["law-policy", "others"]  # token ids have no text
    assert labelled[0]["topic_probability"] > 0.8 > labelled[1]["topic_probability"]


def test_training_twice_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    rows = str(model.with_name("rows.jsonl"))
    assert label("train", "--output", tmp_path / "again.npz", rows) == 0
    assert (tmp_path / "again.npz").read_bytes() == model.read_bytes()
    assert label("train", "--output", tmp_path / "other.npz", rows, "--seed", "1") == 0
    assert (tmp_path / "other.npz").read_bytes() != model.read_bytes()


def test_training_says_how_good_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "subject": row.pop("topic")} for row in make_rows(300, 2)]
    rows += [{"text": "no topic"}, {"text": "", "subject": "empty"}]
    path = write(tmp_path / "rows.jsonl", rows)
    assert label("train", "--output", tmp_path / "m.npz", path, "--column", "subject", "--held-out-share", "0.3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "4 topics; skipped: 2 bad rows, the first: rows.jsonl:301" in lines[0]
    held_out = int(lines[1].split()[2])
    assert 60 < held_out < 120 and int(lines[0].split()[1]) == 300 - held_out
    assert float(lines[1].split(" documents, ")[1].split("%")[0]) > 90
    assert sorted(line.split()[0] for line in lines[2:]) == sorted(WORDS)
    assert sum(int(line.split()[1]) for line in lines[2:]) == held_out


def test_confusion_names_what_a_topic_was_taken_for() -> None:
    target, found = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 1, 2, 1, 1])
    assert confusion_lines(("law", "maths", "art"), target, found) == [
        "held out: 6 documents, 66.7% right (always the most frequent topic: 66.7%)",
        "  law         4 documents,  50.0% right; taken for maths 25%, art 25%",
        "  maths       2 documents, 100.0% right",
        "  art         0 documents",
    ]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([{"text": "a", "topic": "x"}] * 50, [], "50 rows with 1 topics"),
        ([{"text": "a"}], [], "0 rows with 0 topics"),
        ([], ["--held-out-share", "0"], "--held-out-share must be between 0 and 1"),
    ],
)
def test_rows_it_cannot_learn_from(
    tmp_path: Path, rows: list[dict], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", rows)
    assert label("train", "--output", tmp_path / "model.npz", path, *arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "model.npz").exists()


def test_a_damaged_model_is_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.npz"
    for content in (b"", b"text", model.read_bytes()[:100_000]):
        broken.write_bytes(content)
        assert label("apply", "--model", broken, "--output", tmp_path / "out", str(model.with_name("rows.jsonl"))) == 2
        assert f"cannot read the classifier {broken}" in capsys.readouterr().err


def buckets(text: str) -> set[int]:
    return set(Features.of([text]).buckets.tolist())


def test_a_word_is_a_unit_and_so_is_a_character_of_chinese() -> None:
    words = [buckets(word) for word in ("law", "court", "law court", "法", "院", "法院")]
    law, court, both, fa, yuan, fayuan = words
    assert len(law) == len(fa) == 2  # itself and the bias
    assert law | court < both and len(both) == 4  # and the pair
    assert fa | yuan < fayuan and len(fayuan) == 4
    assert buckets("Law, COURT!") == both
    assert len(buckets("lawcourt") & both) == 1
    assert buckets("法law") >= fa | law


@given(st.lists(st.text(max_size=60), min_size=1, max_size=5))
def test_features_of_a_document_do_not_depend_on_the_others(texts: list[str]) -> None:
    together = Features.of(texts)
    for number, text in enumerate(texts):
        alone, part = Features.of([text]), together.take(np.array([number]))
        assert np.array_equal(alone.buckets, part.buckets) and np.array_equal(alone.values, part.values)
    lengths = [np.linalg.norm(together.values[a : b - 1]) for a, b in pairwise(together.starts)]
    assert all(length == pytest.approx(1, abs=1e-5) or length == 0 for length in lengths)  # without the bias


def test_weights_reach_the_minimum_of_the_cross_entropy() -> None:
    """Two documents without common words, 3 : 1 in two topics: the probabilities become 0.75 and 0.25."""
    texts, target = ["alpha"] * 4 + ["beta"] * 4, np.array([0, 0, 0, 1, 1, 1, 1, 0])
    weights = fit(Features.of(texts), target, topics=2, epochs=400, seed=0)
    probabilities = Classifier(("a", "b"), weights).probabilities(Features.of(["alpha", "beta", "gamma"]))
    assert probabilities == pytest.approx(np.array([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]]), abs=0.01)
