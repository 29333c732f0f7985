"""`titan-yulan eval` from the command line to the reports, over phases, and on several ranks."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import warnings
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.checkpoint.making import make_state
from tests.data.making import BYTES, make, write_files
from tests.eval.small_models import CONFIG, write_model
from titan_yulan import cli, config
from titan_yulan.checkpoint import layout
from titan_yulan.checkpoint.files import HashingWriter
from titan_yulan.data.source import Source
from titan_yulan.data.tokenizer import save_ranks
from titan_yulan.errors import UserError
from titan_yulan.eval import evaluation
from titan_yulan.eval.evaluate import Evaluator
from titan_yulan.eval.evaluation import Settings
from titan_yulan.eval.find_work import Work, documents, find_work
from titan_yulan.eval.load import load_decoder
from titan_yulan.eval.requests import Answer, read_requests
from titan_yulan.eval.sandbox import check_sandbox
from titan_yulan.eval.tasks import Task
from titan_yulan.model import Decoder

REQUESTS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [
        {
            "context": f"question {i} " + "x" * i,
            "choices": [" A", " B", " longer"],
            "gold": i % 3,
            "unconditional": "A:",
        }
        for i in range(7)
    ],
    "lambada": [{"context": f"a text {i} that", "continuation": " goes" + " on" * i} for i in range(5)],
    "texts": [{"text": f"some text {i} " * (i + 1)} for i in range(5)],
    "gsm8k": [
        {"context": "1 + 1 = " + "2" * i, "answer": "2", "stop": ["\n"], "max_new_tokens": 5 + i} for i in range(5)
    ],
    "humaneval": [
        {"context": "x", "prefix": "'''", "test": f"'''\nassert {i} < 2", "max_new_tokens": 1} for i in range(4)
    ],
}


def save(folder: Path, step: int, phase: str, seed: int, more: str = "") -> None:
    """A checkpoint of the end of a phase, of random weights and scalars; `more`: of its configuration."""
    path = layout.step_folder(folder / "checkpoints", step)
    path.mkdir(parents=True)
    text = CONFIG.format(folder=folder, length=48, held_out=f'validation_path = "{folder}/held_out"').replace(
        'name = "a"', f'name = "{phase}"'
    )
    text += more
    (folder / "config.toml").write_text(text)
    decoder = Decoder(config.load(folder / "config.toml").config.model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    writer = HashingWriter(path)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
    dcp.save({"model": dict(decoder.named_parameters())}, storage_writer=writer, no_dist=True)
    state = replace(make_state(step, tokenizer=BYTES.fingerprint), phase=phase, phase_finished=True)
    layout.commit(path, writer.hashing.files, state, text)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two phases with a held-out part, and a folder of requests beside its checkpoints."""
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    folder.mkdir()
    save_ranks(folder / "bytes.tiktoken", BYTES.ranks)
    make(write_files(folder / "input", files=2, rows=5), folder / "held_out")
    save(folder, 4, "a", seed=1)
    save(folder, 8, "b", seed=2)
    (folder / "requests").mkdir()
    for name, rows in REQUESTS.items():
        (folder / "requests" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def works(folder: Path, names: list[str]) -> list[Work]:
    own = {"texts": Task("texts", "text", "bits_per_byte", "")}
    return [
        Work(own["texts"], read_requests(folder / "requests" / "texts.jsonl"), "")
        if name in own
        else find_work([name], folder, folder / "requests")[0]
        for name in names
    ]


def evaluate(run: Path, *options: str) -> int:
    return cli.main(["eval", *options, "--requests", str(run / "requests"), "--output", str(run / "report")])


def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report" / "evaluation.json").read_text())


def test_a_run_is_evaluated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = run / "requests" / "texts.jsonl"
    assert evaluate(run, "--run", str(run), "--tasks", f"arc_easy,lambada,gsm8k,held_out,{texts}") == 0
    (model,) = report(run)["models"]
    assert model["tokenizer"] == BYTES.fingerprint and model["context"] == 48 and model["precision"] == "float32"
    tasks = model["tasks"]
    assert list(tasks) == ["arc_easy", "lambada", "gsm8k", "held_out/text", "texts"]
    assert [tasks[name]["items"] for name in tasks] == [7, 5, 5, 10, 5]
    assert tasks["held_out/text"]["data"] == Source.open(run / "held_out").fingerprint
    printed = capsys.readouterr().out
    assert (run / "report" / "evaluation.md").read_text().strip() in printed
    for name, task in tasks.items():
        assert f"| {name} " in printed and f"{task['metrics'][task['metric']]:.4f}" in printed
    rows = [json.loads(line) for line in (run / "report" / "items.jsonl").read_text().splitlines()]
    assert len(rows) == 32
    accuracy = [row["accuracy"] for row in rows if row["task"] == "lambada"]
    assert sum(accuracy) / 5 == tasks["lambada"]["metrics"]["accuracy"]


def test_perplexity_of_held_out_text_is_that_of_its_definition(run: Path) -> None:
    assert evaluate(run, "--checkpoint", str(run / "checkpoints" / "step-00000004"), "--tasks", "held_out") == 0
    metrics = report(run)["models"][0]["tasks"]["held_out/text"]["metrics"]
    decoder = load_decoder(run / "checkpoints" / "step-00000004")[0].double()
    source = Source.open(run / "held_out")
    total, tokens = 0.0, 0
    for shard in range(len(source.shards)):
        ids, offsets = source.shard_tokens(shard).astype("int64"), source.shard_offsets(shard).tolist()
        for start, end in pairwise(offsets):
            document = ids[start : end - 1]
            with torch.no_grad():
                logits = decoder(torch.tensor([[BYTES.eos_id, *document[:-1]]]))[0].log_softmax(-1)
            total += float(logits[range(len(document)), document].sum())
            tokens += len(document)
    assert metrics["tokens"] == tokens
    assert metrics["perplexity"] == pytest.approx(math.exp(-total / tokens), rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(-total / tokens / math.log(2), rel=1e-5)  # a token is a byte


def test_phases_side_by_side(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(run, "--series", str(run), "--tasks", "arc_easy,held_out") == 0
    first, second = report(run)["models"]
    assert [first["title"], second["title"]] == ["a", "b"] and first["fingerprint"] != second["fingerprint"]
    bits = [model["tasks"]["held_out/text"]["metrics"]["bits_per_byte"] for model in (first, second)]
    printed = capsys.readouterr().out
    assert f"{bits[0]:.4f} " in printed and f"{bits[1]:.4f} ({bits[0] - bits[1]:+.4f})" in printed
    base = str(run / "checkpoints" / "step-00000008")
    assert evaluate(run, "--series", str(run), "--against", base, "--tasks", "held_out") == 0
    printed = capsys.readouterr().out
    assert f"{bits[0]:.4f} ({bits[1] - bits[0]:+.4f})" in printed and f"{bits[1]:.4f} (+0.0000)" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", "humaneval"), "allow it with --execute-code"),
        (("--tasks", "gsm8k", "--context", "5"), "may write 5 tokens, and the model reads 5: lower --max-new-tokens"),
        (("--tasks", "arc_easy", "--context", "65"), "--context 65: the model of"),
        (("--tasks", "arc_easy", "--limit", "0"), "--limit 0: give at least 1"),
        (("--tasks", ","), "--tasks names no task"),
        (("--tasks", "arc_easy", "--against", "x"), "--against goes with --series"),
        (("--tasks", "csqa"), "there are no requests of csqa"),
    ],
)
def test_mistakes_are_named(
    run: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("titan_yulan.eval.find_work.package_folder", lambda: None)
    assert evaluate(run, "--run", str(run), *options) == 2
    assert message in capsys.readouterr().err


def test_pmi_needs_the_choices_own_probability(run: Path) -> None:
    decoder = load_decoder(run)[0]
    work = works(run, ["arc_easy"])[0]
    bare = [replace(item, unconditional=None) for item in work.items]  # type: ignore[type-var]
    task = replace(work.task, metric="accuracy_pmi")
    assert Evaluator(decoder, BYTES, 48)(replace(work, task=task)).metrics["accuracy_pmi"] >= 0
    with pytest.raises(UserError, match="its requests need the key 'unconditional'"):
        Evaluator(decoder, BYTES, 48).check([replace(work, task=task, items=bare)])


def test_what_cannot_be_run_is_seen_before_the_first_task(run: Path) -> None:
    evaluator = Evaluator(load_decoder(run)[0], BYTES, 48)
    (held_out,) = works(run, ["held_out"])
    evaluator.check([held_out])
    with pytest.raises(UserError, match="holds ids of another tokenizer than this model's: name the text files"):
        evaluator.check([replace(held_out, tokenizer="another")])
    (asked,) = works(run, ["gsm8k"])
    with pytest.raises(UserError, match=r"may write .* tokens, and the model reads 48: lower --max-new-tokens"):
        evaluator.check([replace(asked, items=[Answer("0", "?", (), 48, answers=("1",))])])


def test_programs_are_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        check_sandbox()
    except UserError as error:
        pytest.skip(str(error))
    assert evaluate(run, "--run", str(run), "--tasks", "humaneval", "--execute-code") == 0
    assert report(run)["models"][0]["tasks"]["humaneval"]["metrics"] == {"pass@1": 0.5}


def killed_at(line: str, run: Path, settings: Settings) -> None:
    """Evaluate in a process that is killed where it would say `line`."""

    def say(said: str) -> None:
        if said == line:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            evaluation.evaluate(run, settings, say)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_killed_evaluation_goes_on_where_it_was(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("arc_easy", "lambada", "gsm8k")
    settings = Settings(names, requests=run / "requests", output=tmp_path / "report")
    killed_at("gsm8k: 5 requests", run, settings)
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["finished.jsonl"]
    with (tmp_path / "report" / "finished.jsonl").open("a") as file:
        file.write('{"of": {"mod')  # cut off
    done: list[str] = []
    call = Evaluator.__call__
    monkeypatch.setattr(Evaluator, "__call__", lambda self, work: done.append(work.task.name) or call(self, work))
    other = evaluation.evaluate(run, replace(settings, context=40), lambda line: None)  # asks for something else
    assert done == [*names] and other.facts["context"] == 40
    killed_at("gsm8k: 5 requests", run, settings)
    done.clear()
    found = evaluation.evaluate(run, settings, lambda line: None)
    assert done == ["gsm8k"] and not (tmp_path / "report" / "finished.jsonl").exists()
    whole = evaluation.evaluate(run, replace(settings, output=None), lambda line: None)
    assert done == ["gsm8k", *names]
    for mine, other_result in zip(found.results, whole.results, strict=True):
        assert json.dumps(asdict(replace(mine, seconds=0.0))) == json.dumps(asdict(replace(other_result, seconds=0.0)))


def test_a_number_is_not_taken_from_another_tokenizer_metric_or_scoring(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, finished = tmp_path / "model", tmp_path / "report" / "finished.jsonl"
    write_model(model)
    settings = Settings(("lambada", "gsm8k"), requests=run / "requests", output=tmp_path / "report", context=48)

    def found() -> list[float]:
        """The likelihoods in the file after one more evaluation that was killed behind its first task."""
        killed_at("gsm8k: 5 requests", model, settings)
        lines = map(json.loads, finished.read_text().splitlines())
        return [line["result"]["metrics"]["bits_per_byte"] for line in lines]

    assert len(found()) == len(found()) == 1
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words["a"], words["o"] = words["o"], words["a"]
    path.write_text(json.dumps(content))
    first, second = found()
    assert first != second
    monkeypatch.setattr(evaluation, "SCORING", evaluation.SCORING + 1)
    assert len(found()) == 3

    def by_another_metric(*arguments: Any) -> list[Work]:
        return [
            replace(work, task=replace(work.task, metric="perplexity")) if work.task.name == "lambada" else work
            for work in find_work(*arguments)
        ]

    monkeypatch.setattr(evaluation, "find_work", by_another_metric)
    assert len(found()) == 4


def test_of_chats_only_the_answers_count(run: Path, tmp_path: Path) -> None:
    chat = [("user", "1 + 1?"), ("assistant", "two"), ("user", "and 2 + 2?"), ("assistant", "four")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]}, {"text": "plain"}]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    make([str(tmp_path / "chats.jsonl")], tmp_path / "chats", minimum_tokens=0)
    source = Source.open(tmp_path / "chats")
    items = documents(source, None)
    parts = sorted(
        tuple(BYTES.decode(item.ids[first:end]) for first, end in item.parts)  # type: ignore[index,union-attr]
        for item in items
    )
    assert parts == [("plain",), ("two\n\n", "four")]
    decoder = load_decoder(run)[0]
    result = Evaluator(decoder, BYTES, 256)(Work(Task("chats", "text", "perplexity", ""), items, ""))
    expected = []
    for item in items:
        ids = [BYTES.eos_id, *item.ids]  # type: ignore[union-attr]
        for first, end in item.parts:  # type: ignore[union-attr]
            with torch.no_grad():
                logits = decoder(torch.tensor([ids[: end + 1]]))[0].log_softmax(-1)
            expected += [float(logits[place, ids[place + 1]]) for place in range(first, end)]
    assert result.metrics["tokens"] == len("two\n\nfourplain") == len(expected)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-5)
