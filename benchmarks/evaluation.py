"""Log-likelihood requests a second: `titan-yulan eval` against lm-evaluation-harness's hf model on the same items.

    pip install lm-eval accelerate
    python benchmarks/evaluation.py                          a few minutes
    python benchmarks/evaluation.py --questions 20 --times 1 --layers 2

Both compute the same random Llama in float32 on the CPU, with as many threads as OMP_NUM_THREADS says. The items are
questions cut from the built-in corpus, in two forms: four continuations of some words each, and four letters after the
same question. Each side is given the same strings and does all of its own work: tokenising, sorting, batching,
computing, adding up. The harness runs with each of the batch sizes below, and its fastest counts. Runs alternate, the
best of `--times` counts, in seconds of the clock and of the processor; the latter say more where others use the machine
too. That both give the same likelihoods is checked.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from titan_yulan.data.documents import find_inputs, read_documents
from titan_yulan.data.rows import BadRow
from titan_yulan.eval.likelihood import Likelihoods, encode_pair
from titan_yulan.eval.open_model import open_model

BATCH_SIZES = (1, 4, 16, 64)
BATCH_TOKENS = 4096
VOCABULARY = 8192
CONTEXT = 512


@dataclass(frozen=True)
class Run:
    """Seconds of the clock and of the processor, and the log-likelihoods."""

    seconds: float
    processor: float
    logprobs: list[float]


def timed(work: Callable[[], list[float]]) -> Run:
    begin, processor = time.perf_counter(), time.process_time()
    logprobs = work()
    return Run(time.perf_counter() - begin, time.process_time() - processor, logprobs)


def words(least: int) -> list[str]:
    found: list[str] = []
    for file in find_inputs(["builtin:prose"]):
        for document in read_documents(file):
            if not isinstance(document, BadRow):
                found += document.text.split()
        if len(found) > least:
            break
    return found


def questions(count: int, letters: bool) -> list[tuple[str, str]]:
    """Contexts of 20 to 200 words, four continuations each."""
    generator = random.Random(0)
    source = words(200_000)
    pairs = []
    for _ in range(count):
        start, size = generator.randrange(len(source) - 400), generator.randrange(20, 200)
        context = "Question: " + " ".join(source[start : start + size]) + "\nAnswer:"
        for letter in "ABCD":
            place = generator.randrange(len(source) - 20)
            text = letter if letters else " ".join(source[place : place + generator.randrange(2, 12)])
            pairs.append((context, f" {text}"))
    return pairs


def write_model(folder: Path, hidden: int, layers: int) -> None:
    """A random Llama and a tokenizer trained on the corpus."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator([" ".join(words(200_000))], trainer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=CONTEXT,
        eos_token_id=0,
        bos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    core.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def ours(folder: Path, pairs: Sequence[tuple[str, str]]) -> Callable[[], list[float]]:
    model = open_model(folder)
    likelihoods = Likelihoods(model.decoder.eval(), CONTEXT, BATCH_TOKENS)
    return lambda: [value.logprob for value in likelihoods([encode_pair(model.tokenizer, *pair) for pair in pairs])]


def theirs(folder: Path, pairs: Sequence[tuple[str, str]], batch_size: int) -> Callable[[], list[float]]:
    from lm_eval.api.instance import Instance  # pyrefly: ignore[missing-import]
    from lm_eval.models.huggingface import HFLM  # pyrefly: ignore[missing-import]

    model = HFLM(str(folder), device="cpu", dtype="float32", batch_size=batch_size, max_length=CONTEXT)

    def work() -> list[float]:
        requests = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
        return [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]

    return work


def compare(folder: Path, pairs: Sequence[tuple[str, str]], times: int) -> dict[str, Any]:
    sides = {"ours": ours(folder, pairs)}
    sides |= {f"lm-eval, batch {size}": theirs(folder, pairs, size) for size in BATCH_SIZES}
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for _ in range(times):
        for name, work in sides.items():
            runs[name].append(timed(work))
    for name, found in runs.items():
        worst = max(abs(a - b) for a, b in zip(found[0].logprobs, runs["ours"][0].logprobs, strict=True))
        if worst > 1e-3:
            raise SystemExit(f"{name} differs from ours by {worst}")
    return {
        name: {
            "requests/s": len(pairs) / min(run.seconds for run in found),
            "requests/processor s": len(pairs) / min(run.processor for run in found),
        }
        for name, found in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        write_model(folder, options.hidden, options.layers)
        for letters in (False, True):
            pairs = questions(options.questions, letters)
            found = compare(folder, pairs, options.times)
            print(f"\n{options.questions} questions, 4 {'letters' if letters else 'continuations'} each")
            for side, numbers in found.items():
                print(f"  {side:20}", "  ".join(f"{value:8.1f} {unit}" for unit, value in numbers.items()))
            for unit in found["ours"]:
                best = max(numbers[unit] for side, numbers in found.items() if side != "ours")
                print(f"  ratio of {unit}: {found['ours'][unit] / best:.2f} (ours over the best of lm-eval)")


if __name__ == "__main__":
    main()
