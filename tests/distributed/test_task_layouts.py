"""Log-likelihoods and writing under a decoder that ranks share are those of the whole one, and leave it as it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.data.making import BYTES
from tests.distributed.layout_cases import VOCABULARY, Case, make_learner
from tests.distributed.ranks import run_ranks
from tests.eval.small_models import MODEL
from tests.eval.test_generate_cache import random_decoder
from titan_yulan.data import hashing
from titan_yulan.eval.evaluate import Evaluator
from titan_yulan.eval.find_work import Work
from titan_yulan.eval.likelihood import Likelihood, Likelihoods, Span
from titan_yulan.eval.requests import Answer, Choice, Cloze, Generation, Item, Text
from titan_yulan.eval.share import Share
from titan_yulan.eval.tasks import METRICS, Task
from titan_yulan.eval.write import Writer, Written
from titan_yulan.model import Decoder
from titan_yulan.parallel.fsdp import reshard
from titan_yulan.parallel.process import World

_TENSOR = Case(4, "FSDP 2 x TP 2", {"tensor": 2}, model="grouped")
CASES = (
    Case(4, "FSDP 4", compute_dtype="float32"),
    Case(4, "HSDP 2 x 2", {"data_replicate": 2}),
    replace(_TENSOR, checkpointing="selective", backend="aot_eager"),
    Case(4, "CP 2 x TP 2", {"context": 2, "tensor": 2}, model="norms"),
)


def spans() -> list[Span]:
    tokens = (hashing.bits(1, np.arange(400)) % np.uint64(VOCABULARY)).astype(int).tolist()
    sizes = [(1, 1), (9, 2), (30, 4), (2, 11), (5, 1), (17, 3), (12, 12)]
    found = [Span(tokens[i : i + a], tokens[i + a : i + a + b]) for i, (a, b) in enumerate(sizes)]
    return [*found, Span(found[1].context, [3]), Span(found[1].context, [4])]


def requests() -> list[Generation]:
    """More and less than a batch for each rank, of which each writes for another time."""
    texts = ["one", "another context, longer", "x", "the same length as", "some more text", "a b", "seven", "0" * 30]
    return [Generation(str(i), text, ("\x07",), 1 + 2 * (i % 3)) for i, text in enumerate(texts)]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def works() -> list[Work]:
    """Some of every kind but programs, unequally many for four ranks."""
    words = "alpha beta gamma delta epsilon zeta eta".split()
    items: dict[str, list[Item]] = {
        "choice": [Choice(str(i), (f"q{i} " + "x" * i,) * 3, (" A", " B", " longer"), i % 3, "A:") for i in range(7)],
        "cloze": [Cloze(word, f"a text {word} that", " goes" + " on" * i) for i, word in enumerate(words)],
        "text": [Text(word, f"some text {word} " * (i + 1)) for i, word in enumerate(words)],
        "answer": [Answer(word, f"{word} is", ("\n",), 5 + i, ("2",)) for i, word in enumerate(words)],
    }
    return [Work(Task(kind, kind, METRICS[kind], ""), part, "") for kind, part in items.items()]


def share_the_work(world: World) -> list[bool]:
    """Whether this rank's results, with the others' help and a whole model, are to the bit those of one alone."""
    decoder, share = random_decoder(MODEL), Share(world.rank, world.size, world.host)
    same = []
    for work in works():
        together = Evaluator(decoder, BYTES, 48, batch_tokens=100, share=share)(work)
        alone = Evaluator(decoder, BYTES, 48, batch_tokens=100)(work)
        same.append(replace(together, seconds=0.0) == replace(alone, seconds=0.0))
    return same


Found = list[Likelihood] | list[Written]


def compare(world: World) -> list[tuple[str, list[Found], list[Found], bool]]:
    """For each case its name, what the ranks found together and what one did, and whether the weights stayed."""
    found = []
    for case in CASES:
        torch.compiler.reset()
        learner = make_learner(case, world)
        weights = {name: whole(parameter).clone() for name, parameter in learner.decoder.named_parameters()}
        share = Share(learner.mesh.data_rank, learner.mesh.data_size, world.host, together=True)
        together = [
            Likelihoods(learner.decoder, 24, 60, share, world.device)(spans()),
            Writer(learner.decoder, BYTES, 24, 60, share, world.device)(requests()),
        ]
        reshard(learner.decoder)
        alone = Decoder(learner.config.model)
        alone.load_state_dict(weights)
        same = all(torch.equal(whole(p), weights[name]) for name, p in learner.decoder.named_parameters())
        expected = [Likelihoods(alone, 24, 60)(spans()), Writer(alone, BYTES, 24, 60)(requests())]
        found.append((case.name, together, expected, same))
    return found


def compare_all(world: World) -> tuple[list[bool], list[tuple[str, list[Found], list[Found], bool]]]:
    return share_the_work(world), compare(world)


def test_every_layout_gives_the_likelihoods_and_texts_of_one_process() -> None:
    shared, ranks = zip(*run_ranks(compare_all, 4, limit=200), strict=True)
    assert shared == ([True] * 4,) * 4
    for name, together, alone, same in ranks[0]:
        assert same, name
        assert together[1] == alone[1] and len({written.text for written in alone[1]}) > 4, name
        for left, right in zip(together[0], alone[0], strict=True):
            assert abs(left.logprob - right.logprob) < 1e-4 * max(1.0, abs(right.logprob)), name
            assert (left.tokens, left.greedy, left.cut) == (right.tokens, right.greedy, right.cut), name
    assert all(rank == ranks[0] for rank in ranks)
