"""lm-evaluation-harness, where installed: its hf model, our model in it and our evaluator agree on every item."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.eval.small_models import write_model
from titan_yulan.errors import UserError
from titan_yulan.eval.evaluate import Evaluator, Result
from titan_yulan.eval.find_work import find_work
from titan_yulan.eval.open_model import open_model

lm_eval: Any = pytest.importorskip("lm_eval.tasks") and pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

WORDS = "alpha beta gamma delta epsilon zeta eta theta".split()
TASKS = {
    "letters": "output_type: multiple_choice\ntarget_delimiter: ' '\ndoc_to_target: gold\n"
    "doc_to_choice: \"{{choices | map('trim') | list}}\"\n"
    "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "lambada": "output_type: loglikelihood\ntarget_delimiter: ''\ndoc_to_target: '{{continuation}}'\n"
    "metric_list: [{metric: perplexity}, {metric: acc}]\n",
    "texts": "output_type: loglikelihood_rolling\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]\n",
    "written": "output_type: generate_until\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs: {until: ['e'], max_gen_toks: 8, do_sample: false}\n"
    "metric_list: [{metric: exact_match}]\n",
}


def write_tasks(folder: Path) -> None:
    """Each task twice: as lm-eval's YAML and as a file of our requests."""
    generator = random.Random(1)

    def words(count: int) -> str:
        return " ".join(generator.choices(WORDS, k=count))

    rows: dict[str, list[dict[str, Any]]] = {
        "letters": [
            {"context": words(6), "choices": [f" {words(1 + j)}" for j in range(3)], "gold": i % 3} for i in range(20)
        ],
        "lambada": [{"context": words(1 + i), "continuation": f" {words(2)}"} for i in range(12)],
        "texts": [{"text": words(3 * (i + 1))} for i in range(8)],
        "written": [
            {"context": words(1 + i), "answer": words(1), "stop": ["e"], "max_new_tokens": 8} for i in range(6)
        ],
    }
    for name, items in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
        text = "''" if name == "texts" else "'{{context}}'"
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\ndoc_to_text: {text}\n"
            f"dataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}\n{TASKS[name]}"
        )


def harness(model: Any, folder: Path, **options: Any) -> tuple[dict[str, dict[str, float]], dict[str, list[Any]]]:
    """Metrics by task, and the answers of the model to each item."""
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )
    metrics = {
        task: {key.removesuffix(",none"): value for key, value in result.items() if isinstance(value, float)}
        for task, result in found["results"].items()
    }
    samples = {
        task: [sample["resps"] for sample in sorted(rows, key=lambda row: row["doc_id"])]
        for task, rows in found["samples"].items()
    }
    return metrics, samples


def flat(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, list | tuple) else [value]


def test_three_ways_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    from titan_yulan.eval.lm_eval_adapter import TitanYulan

    folder, tasks = tmp_path / "model", tmp_path / "tasks"
    tasks.mkdir()
    write_model(folder, rows=257)  # else transformers may write ids that no token has
    write_tasks(tasks)
    theirs, their_samples = harness(
        "hf", tasks, model_args=f"pretrained={folder},dtype=float32,max_length=128", device="cpu", batch_size=4
    )
    ours, our_samples = harness(TitanYulan(folder, context=128), tasks)
    for task in TASKS:
        assert ours[task] == pytest.approx(theirs[task], rel=1e-5), task
        for mine, other in zip(flat(our_samples[task]), flat(their_samples[task]), strict=True):
            assert mine == (pytest.approx(other, rel=1e-4, abs=1e-4) if isinstance(mine, float) else other), task
    model = open_model(folder)
    evaluator = Evaluator(model.decoder, model.tokenizer, 128)
    names = [str(tasks / f"{name}.jsonl") for name in TASKS]
    direct: dict[str, Result] = {work.task.name: evaluator(work) for work in find_work(names, folder)}
    letters, lambada, texts = (direct[name].metrics for name in ("letters", "lambada", "texts"))
    assert letters["accuracy"] == theirs["letters"]["acc"]
    assert letters["accuracy_per_character"] == theirs["letters"]["acc_norm"]
    assert lambada["accuracy"] == theirs["lambada"]["acc"]
    assert lambada["perplexity"] == pytest.approx(theirs["lambada"]["perplexity"], rel=1e-4)
    assert texts["bits_per_byte"] == pytest.approx(theirs["texts"]["bits_per_byte"], rel=1e-5)
    written = [row["written"] for row in direct["written"].rows]
    assert written == flat(their_samples["written"])


def test_a_text_without_a_token_is_as_likely_as_the_hf_model_finds_it(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance  # pyrefly: ignore[missing-import]
    from lm_eval.models.huggingface import HFLM  # pyrefly: ignore[missing-import]

    from titan_yulan.eval.lm_eval_adapter import TitanYulan

    write_model(tmp_path, rows=257)
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(["", "alpha beta", ""])]
    theirs = HFLM(pretrained=str(tmp_path), dtype="float32", max_length=128, device="cpu").loglikelihood_rolling(
        requests
    )
    ours = TitanYulan(tmp_path, context=128).loglikelihood_rolling(requests)
    assert ours == pytest.approx(theirs, rel=1e-5) and theirs[0] == theirs[2] == 0 > theirs[1]


def test_long_answers_are_refused_and_cut_contexts_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from lm_eval.api.instance import Instance  # pyrefly: ignore[missing-import]

    from titan_yulan.eval.lm_eval_adapter import TitanYulan

    write_model(tmp_path, rows=257)
    model = TitanYulan(tmp_path, context=16)

    def write(tokens: int, context: str) -> list[str]:
        return model.generate_until([Instance("generate_until", {}, (context, {"max_gen_toks": tokens}), 0)])

    with pytest.raises(UserError, match=r"may write 16 tokens, and the model reads 16: lower max_gen_toks"):
        write(16, "alpha")
    whole = write(6, "beta alpha")
    assert caplog.messages == []
    assert write(6, "alpha beta alpha") == whole
    assert "generate_until: 1 of 1 contexts are longer" in caplog.messages[-1]
    model.loglikelihood([Instance("loglikelihood", {}, ("alpha beta alpha", " x"), 0)])
    assert "loglikelihood: 1 of 1 contexts are longer" in caplog.messages[-1]
