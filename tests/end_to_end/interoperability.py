"""Everything that other tools must accept, in one go:

    python -m tests.end_to_end.interoperability DIR [--run RUN] [--lm-eval PYTHON]

trains `./run_train.sh --config debug.toml` in DIR (or takes the run folder RUN of that configuration), exports it, and
compares the export with the run: keys, logits and greedy continuations in transformers, three task files in
lm-evaluation-harness, the way back into a checkpoint. Then the round trips of other models, DeepSpeed's states and all
refusals, by their tests; memory of an export of 3.6 GB, and speed of evaluation, by their benchmarks. A run that is
there in DIR is used again. PYTHON is an interpreter that has the extra `eval` (default: this one, if it has it). Ends
with 0 if everything was shown and held.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.end_to_end import harness
from tests.end_to_end.miniature import Proof
from titan_yulan import config as configuration
from titan_yulan.checkpoint.export import export
from titan_yulan.checkpoint.importing import import_checkpoint
from titan_yulan.checkpoint.layout import find_checkpoints
from titan_yulan.checkpoint.read_parts import read_parts, stored_shapes
from titan_yulan.data.source import Source
from titan_yulan.eval.evaluation import Settings, evaluate
from titan_yulan.eval.generate import continue_ids
from titan_yulan.eval.open_model import TrainedModel, open_model
from titan_yulan.eval.sampling import Sampling

CONFIG = "debug.toml"
CONTEXT = 256
PROMPTS, NEW_TOKENS = 10, 64
# The largest difference of a logit that is taken, as a share of the largest logit: that of an export in float32.
LOGITS = 1e-4
AGREEMENT = 1e-4
INSTALL = "pip install 'titan-yulan[eval]', or name an interpreter that has it: --lm-eval PYTHON"

# For each task file: as lm-eval wants it described, and its names for metrics of ours.
TASKS: dict[str, tuple[str, dict[str, str]]] = {
    "choices": (
        "output_type: multiple_choice\ndoc_to_text: '{{context}}'\ntarget_delimiter: ' '\ndoc_to_target: gold\n"
        "doc_to_choice: \"{{choices | map('trim') | list}}\"\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
        {"acc": "accuracy", "acc_norm": "accuracy_per_character"},
    ),
    "cloze": (
        "output_type: loglikelihood\ndoc_to_text: '{{context}}'\ntarget_delimiter: ''\n"
        "doc_to_target: '{{continuation}}'\nmetric_list: [{metric: perplexity}, {metric: acc}]\n",
        {"acc": "accuracy", "perplexity": "perplexity"},
    ),
    "texts": (
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n",
        {"bits_per_byte": "bits_per_byte"},
    ),
}

# What tests show: the line to print, the files, and the words that choose among their tests (of `pytest -k`).
SHOWN_BY_TESTS = {
    "HF Llama to ours to HF Llama, to the bit: grouped queries, tied and untied, with and without biases of q, k, v": (
        ["tests/checkpoint/test_export.py"],
        "test_a_llama_comes_back_to_the_bit",
    ),
    "YuLan-Mini's format and back, to the bit, tied, untied and normalised": (
        ["tests/checkpoint/test_export.py"],
        "test_yulan_comes_back_to_the_bit",
    ),
    "the next update after an export with the optimizer is the same to the bit": (
        ["tests/checkpoint/test_export.py"],
        "the_next_update_after_an_export",
    ),
    "DeepSpeed's folder: the next update is that of the original state to 1e-6, on two ranks, after an import too": (
        ["tests/distributed/test_published_starts.py"],
        "",
    ),
    "step, tokens, phase and Adam's step come along; phases before count as trained": (
        ["tests/checkpoint/test_universal.py", "tests/checkpoint/test_importing.py"],
        "plan_begins or counters or taken_exactly or phases or deepspeed",
    ),
    "refused by name: shards cut off, missing or of a wrong shape, another vocabulary, pickles that call something": (
        [f"tests/checkpoint/test_{name}.py" for name in ("hugging_face", "universal", "pickled", "export")],
        "refused or listed or named or told or wrong",
    ),
}


def say_nothing(*_: object) -> None:
    pass


def train(folder: Path, proof: Proof) -> Path:
    run = folder / "runs" / "debug"
    if not run.exists():
        command = ["./run_train.sh", "--config", CONFIG, f"--run.output_dir={run.parent}"]
        with open(folder / "train.txt", "w", encoding="utf-8") as output:
            code = subprocess.run(command, cwd=harness.ROOT, stdout=output, stderr=subprocess.STDOUT).returncode
        proof.check(f"./run_train.sh --config {CONFIG}: exit code {code}", code == 0)
    return run


def pieces(run: Path, model: TrainedModel) -> list[list[str]]:
    """Words of held-out documents of the run, line breaks left out: at least 120 of each document."""
    config = configuration.load(run / "config.toml").config
    found = []
    for section in config.data.sources.values():
        source = Source.open(harness.ROOT / section.validation_path)
        for shard in range(len(source.shards)):
            tokens, offsets = source.shard_tokens(shard), source.shard_offsets(shard).tolist()
            for start, end in itertools.pairwise(offsets):  # without the end of text at its end
                ids = np.asarray(tokens[start : min(end - 1, start + 600)])
                words = model.tokenizer.decode(ids.tolist()).split()
                found += [words] if len(words) >= 120 else []
    return found


# --- transformers ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def compare_with_transformers(folder: Path, model: TrainedModel, documents: list[list[str]], proof: Proof) -> None:
    llama: Any = transformers.LlamaForCausalLM
    peer, found = llama.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, local_files_only=True)
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    proof.check(
        f"transformers {transformers.__version__}: missing {missing} unexpected {unexpected}",
        not missing and not unexpected,
    )
    ids = [model.tokenizer.encode(" ".join(words)) for words in documents[:PROMPTS]]
    width = min(CONTEXT, *map(len, ids))
    rows = torch.tensor([row[:width] for row in ids])
    ours, theirs = model.decoder(rows), peer(rows).logits
    difference, largest = float((ours - theirs).abs().max()), float(ours.abs().max())
    proof.check(
        f"largest difference of {ours.numel():,} logits in float32 {difference:.3g} (largest logit {largest:.3g}; "
        f"allowed {LOGITS:g} of it)",
        difference <= LOGITS * largest,
    )
    prompts = [row[: 8 + 4 * i] for i, row in enumerate(ids)]
    texts = continue_ids(
        model.decoder,
        prompts,
        Sampling(temperature=0.0),
        new_tokens=NEW_TOKENS,
        context=CONTEXT,
        eos_id=model.tokenizer.eos_id,
        vocab_size=model.tokenizer.vocab_size,
    )
    same = written = 0
    for prompt, text in zip(prompts, texts, strict=True):
        row = torch.tensor([prompt])
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        expected = peer.generate(row, attention_mask=torch.ones_like(row), **options)[0].tolist()[len(prompt) :]
        same += text.ids == [token for token in expected if token != model.tokenizer.eos_id]
        written += len(text.ids)
    proof.check(
        f"greedy continuations by up to {NEW_TOKENS} tokens ({written} in all): {same} of {len(prompts)} identical",
        same == len(prompts),
    )


# --- lm-evaluation-harness -------------------------------------------------------------------------------------------


def write_tasks(folder: Path, documents: list[list[str]]) -> None:
    """Each task twice: as a file of our requests, and as lm-eval's description of it."""
    generator = random.Random(1)

    def words(least: int, most: int) -> list[str]:
        document = generator.choice(documents)
        start = generator.randrange(len(document) - most)
        return document[start : start + generator.randint(least, most)]

    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TASKS}
    for number in range(40):
        true = words(30, 50)
        choices = [" " + " ".join(words(3, 8)) for _ in range(4)]
        choices[number % 4] = " " + " ".join(true[-5:])
        rows["choices"].append({"context": " ".join(true[:-5]), "choices": choices, "gold": number % 4})
        *context, last = words(20, 60)
        rows["cloze"].append({"context": " ".join(context), "continuation": f" {last}"})
        rows["texts"].append({"text": " ".join(words(50, 110))})
    folder.mkdir(exist_ok=True)
    for name, items in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
        data = f"dataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}\n{TASKS[name][0]}", encoding="utf-8")


def lm_eval(python: str, exported: Path, tasks: Path) -> dict[str, dict[str, float]]:
    """Metrics by task, of `lm_eval --model hf`."""
    model = f"pretrained={exported},dtype=float32,max_length={CONTEXT}"
    command = [python, "-m", "lm_eval", "--model", "hf", "--model_args", model, "--device", "cpu", "--batch_size", "8"]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(tasks), "--output_path", str(tasks / "found.json")]
    environment = os.environ | {"HF_HOME": str(tasks / "cache"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    files = sorted(tasks.glob("found*.json"))
    if result.returncode or not files:
        print(result.stderr[-2000:])
        return {name: {} for name in TASKS}
    return json.loads(files[-1].read_text())["results"]


def compare_with_lm_eval(python: str | None, run: Path, exported: Path, tasks: Path, proof: Proof) -> None:
    if python is None:
        how = "pip install 'titan-yulan[eval]', or name an interpreter that has it: --lm-eval PYTHON"
        proof.check(
            f"not shown, lm-eval is not installed: lm_eval --model hf on the export and eval agree ({how})", False
        )
        return
    for old in tasks.glob("found*.json"):
        old.unlink()
    theirs = lm_eval(python, exported, tasks)
    settings = Settings(tasks=tuple(str(tasks / f"{name}.jsonl") for name in TASKS), context=CONTEXT)
    ours = {result.task: result for result in evaluate(run, settings, say=say_nothing).results}
    for name, (_, metrics) in TASKS.items():
        for metric, own in metrics.items():
            found, expected = ours[name].metrics[own], theirs[name].get(f"{metric},none", float("nan"))
            proof.check(
                f"{name}, {ours[name].items} items, {own}: titan-yulan eval on the run {found:.6f}, lm_eval --model hf "
                f"on the export {expected:.6f}",
                abs(found - expected) <= AGREEMENT * max(1.0, abs(expected)),
            )


# --- there and back --------------------------------------------------------------------------------------------------


def check_way_back(run: Path, folder: Path, proof: Proof) -> None:
    """The run's checkpoint as YuLan-Mini's format with moments, imported again."""
    (checkpoint,) = find_checkpoints(run / "checkpoints")[-1:]
    export(run, folder / "yulan", "yulan", with_optimizer=True, report=say_nothing)
    config = configuration.load(checkpoint.path / "config.toml").config
    phase = next(phase for phase in config.phases if phase.name == checkpoint.state().phase)
    begin = replace(config, phases=(phase,))
    back = import_checkpoint(folder / "yulan", begin, folder / "again", report=say_nothing)
    for section in ("model", "optimizer"):
        names = stored_shapes(checkpoint, section)
        parts = zip(read_parts(checkpoint, names, section), read_parts(back, names, section), strict=True)
        different = [name for (name, a), (_, b) in parts if not torch.equal(a.view(torch.int32), b.view(torch.int32))]
        proof.check(f"the run to yulan to a checkpoint: {len(names)} tensors of {section} bit-exact", not different)
    state, again = checkpoint.state(), back.state()
    proof.check(
        f"its step {again.step} and tokens {again.token:,} come along",
        (again.step, again.token) == (state.step, state.token),
    )


# --- by tests and benchmarks -----------------------------------------------------------------------------------------


def check_by_tests(files: Sequence[str], words: str, line: str, proof: Proof, folder: Path) -> None:
    report = folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", *files, "-k", words, f"--junitxml={report}"]
    result = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True)
    suite = ElementTree.parse(report).getroot()[0].attrib
    ran, skipped = int(suite["tests"]), int(suite["skipped"])
    proof.check(f"{line} ({ran} tests, {skipped} skipped)", result.returncode == 0 and ran > 0 == skipped)
    if result.returncode:
        print(result.stdout[-2000:])


def check_memory(folder: Path, proof: Proof) -> None:
    command = [sys.executable, "benchmarks/export_memory.py", "--folder", str(folder)]
    output = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True).stdout
    print(re.sub("^", "       ", output.strip(), flags=re.MULTILINE))
    sizes = [int(size.replace(",", "")) for size in re.findall(r"(?:checkpoint|weights) ([\d,]+) MB", output)]
    rows = {
        tuple(cells[:2]): [float(cell.replace(",", "").split()[0]) for cell in cells[2:4]]
        for line in output.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("| ").split("|")]) >= 4 and "MB" in cells[2]
    }
    if len(sizes) != 2 or len(rows) != 5:
        proof.check("benchmarks/export_memory.py", False)
        return
    (whole, weights), alone = sizes, rows["imports alone", ""][1]
    for form in ("llama", "yulan"):
        own = {verified: rows[form, verified][1] - alone for verified in ("no", "yes")}
        proof.check(
            f"{form} of a checkpoint of {whole:,} MB with weights of {weights:,} MB: writing takes {own['no']:,.0f} MB "
            f"beyond the imports, verifying {own['yes']:,.0f} MB; the weights never more than once and a third",
            whole >= 1000 and own["no"] < weights / 2 and own["yes"] < weights * 4 / 3,
        )


def check_speed(python: str | None, proof: Proof) -> None:
    if python is None:
        proof.check(f"NOT SHOWN: speed of evaluation against lm-eval on the same items ({INSTALL})", False)
        return
    command = [python, "benchmarks/evaluation.py", "--questions", "20", "--times", "1"]
    result = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True)
    print(re.sub("^", "       ", result.stdout.strip(), flags=re.MULTILINE))
    ratios = [float(ratio) for ratio in re.findall(r"ratio of requests/processor s: ([\d.]+)", result.stdout)]
    proof.check(
        f"the same likelihoods as lm-eval's hf model, {' and '.join(map(str, ratios))} times as many a second of "
        "processor time",
        result.returncode == 0 and len(ratios) == 2 and min(ratios) > 1,
    )
    if result.returncode:
        print(result.stderr[-2000:])


def has_lm_eval(python: str) -> bool:
    return subprocess.run([python, "-c", "import lm_eval, accelerate"], capture_output=True).returncode == 0


def main(folder: Path, run: Path | None, python: str) -> int:
    """Show everything; returns 0 if everything held."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(harness.ROOT)  # where the run's own paths begin
    transformers.logging.disable_progress_bar()
    proof = Proof()
    run = run.resolve() if run else train(folder, proof)
    work = folder / "exported"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    export(run, work / "llama", "llama", dtype="float32", report=lambda line: print(f"       {line}"))
    proof.check(f"titan-yulan checkpoint export --run {run.name} --format llama --dtype float32", True)
    model = open_model(run)
    documents = pieces(run, model)
    compare_with_transformers(work / "llama", model, documents, proof)
    write_tasks(work / "tasks", documents)
    interpreter = python if has_lm_eval(python) else None
    compare_with_lm_eval(interpreter, run, work / "llama", work / "tasks", proof)
    check_way_back(run, work, proof)
    for line, (files, words) in SHOWN_BY_TESTS.items():
        check_by_tests(files, words, line, proof, work)
    check_memory(work, proof)
    check_speed(interpreter, proof)
    print("everything held" if proof.held else "NOT everything held")
    return int(not proof.held)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--run", type=Path, help="a run folder of debug.toml")
    parser.add_argument("--lm-eval", default=sys.executable, metavar="PYTHON", help="with the extra eval")
    options = parser.parse_args()
    sys.exit(main(options.folder, options.run, options.lm_eval))
