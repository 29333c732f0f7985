"""From chats to the loss with the objective of train_configs/sft.toml: answers alone are targets, chats are apart."""

from __future__ import annotations

import json
import random
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.curriculum.making import configuration, phase
from tests.data.making import EOS, make
from titan_yulan.config import load
from titan_yulan.config.model import ModelConfig
from titan_yulan.curriculum.plan import Plan
from titan_yulan.data import corpus
from titan_yulan.data.documents import Document, find_inputs, read_documents
from titan_yulan.data.loader import Batch, read_rows
from titan_yulan.data.source import Source
from titan_yulan.data.tape import Tape
from titan_yulan.model import Decoder
from titan_yulan.objective.next_token import NextToken
from titan_yulan.objective.objective import Inputs

CONFIGS = Path(__file__).resolve().parents[2] / "train_configs"
LENGTH = 96
SMALL = ModelConfig(
    vocab_size=EOS + 1,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=128,
    initializer_range=0.5,
)


def write_chats(path: Path) -> int:
    """Chats whose answers are digits, which are nowhere else; returns the number of answers that are not the last."""
    generator, inner = random.Random(0), 0
    with path.open("w") as file:
        for _ in range(60):
            turns = generator.randint(1, 3)
            inner += turns - 1
            messages = [{"role": "system", "content": "be brief"}] * generator.randint(0, 1)
            for _ in range(turns):
                messages.append({"role": "user", "content": "word " * generator.randint(1, 9)})
                answer = "".join(generator.choices("0123456789", k=generator.randint(1, 30)))
                messages.append({"role": "assistant", "content": answer})
            file.write(json.dumps({"messages": messages}) + "\n")
    return inner


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Batch, Inputs, int]:
    """All rows that fit into one epoch, as a batch and as inputs, and the number of answers before others."""
    folder = tmp_path_factory.mktemp("chats")
    inner = write_chats(folder / "chats.jsonl")
    make(str(folder / "chats.jsonl"), folder / "source")
    source = Source.open(folder / "source")
    rows = (source.tokens - 1) // LENGTH
    plan = Plan(configuration(phase("a", "1 steps", {"x": 1.0}, sequence_length=LENGTH, batch=rows))).phases[0]
    batch = read_rows(plan, [Tape(source, 0)], np.arange(rows), rows)
    return batch, NextToken(load(CONFIGS / "sft.toml").config.objective, 1).inputs(batch), inner


def test_no_token_of_a_prompt_is_a_target(prepared: tuple[Batch, Inputs, int]) -> None:
    _, inputs, inner = prepared
    targets, trained = inputs.targets.flatten(), inputs.weights.flatten() == 1
    answer = ((targets >= ord("0")) & (targets <= ord("9"))) | (targets == EOS)
    assert answer.sum() > 500 and trained[answer].all()
    others = targets[trained & ~answer]
    # what ends an answer that is not the last: its blank line (the rest of the epoch may hold some of them)
    assert set(others.tolist()) == {ord("\n")}
    assert 2 * inner - 12 <= len(others) <= 2 * inner
    assert inputs.denominator == trained.sum() and not trained.all()


def test_a_chat_in_a_row_is_computed_as_if_it_were_alone(prepared: tuple[Batch, Inputs, int]) -> None:
    _, inputs, _ = prepared
    assert inputs.document_ids is not None and inputs.position_ids is not None
    torch.manual_seed(0)
    decoder = Decoder(SMALL).double()
    with torch.no_grad():
        packed = decoder(inputs.input_ids[:4], inputs.position_ids[:4], inputs.document_ids[:4])
        chats = 0
        for row in range(4):
            edges = [0, *begins(inputs.document_ids[row]), LENGTH]
            for start, end in pairwise(edges):
                alone = decoder(inputs.input_ids[row : row + 1, start:end])
                torch.testing.assert_close(packed[row, start:end], alone[0], rtol=1e-10, atol=1e-10)
                chats += 1
        assert chats > 6
        together = decoder(inputs.input_ids[:4])
    assert (packed - together).abs().max() > 0.01


def begins(documents: Tensor) -> list[int]:
    """Places where another document begins, of a row's (S,) ids."""
    return (1 + (documents[1:] != documents[:-1]).nonzero().flatten()).tolist()


def test_questions_are_about_public_names() -> None:
    long = "Words of an answer, more than forty characters of them."
    source = f'''"""{long}"""
class Reader:
    """{long} 1"""
    def read(self):
        """{long} 2"""
        def inner():
            """{long} no"""
    def _hidden(self):
        """{long} no"""
    def __init__(self):
        """{long} no"""
class _Private:
    def read(self):
        """{long} no"""
async def fetch():
    """{long} 3"""
def brief():
    """Short."""
def tedious():
    """{"word " * 300}"""
'''
    chats = list(corpus.read_chats("stdlib/net/__init__.py", source))
    assert all([message["role"] for message in chat] == ["user", "assistant"] for chat in chats)
    assert [tuple(message["content"] for message in chat) for chat in chats] == [
        ("What is the module net?", long),
        ("What is the class net.Reader?", f"{long} 1"),
        ("What does net.Reader.read do?", f"{long} 2"),
        ("What does net.fetch do?", f"{long} 3"),
    ]
    assert list(corpus.read_chats("stdlib/net/_wire.py", source)) == []
    assert list(corpus.read_chats("stdlib/net.py", "def broken(:")) == []


def test_built_in_chats_are_chats_about_files_of_code() -> None:
    files = find_inputs(["builtin:chat"])
    assert {(file.name, file.path) for file in files} == set(corpus.builtin_files("code"))
    documents = [document for file in files[::20] for document in read_documents(file)]
    assert len(documents) > 50
    for document in documents:
        assert isinstance(document, Document)
        (prompt, asked), (answer, answered) = document.parts
        assert re.fullmatch(r"### User\n\nWhat .*\?\n\n### Assistant\n\n", prompt) and not asked
        assert answered and len(answer) in range(40, 1001)


def test_the_configuration_goes_on_from_the_debug_run() -> None:
    tuning, debug = load(CONFIGS / "sft.toml").config, load(CONFIGS / "debug.toml").config
    assert (tuning.model, tuning.run.seed, tuning.tokenizer.path) == (debug.model, debug.run.seed, debug.tokenizer.path)
    first, last = tuning.phases[0], debug.phases[-1]
    assert Path(first.start_from) == Path(debug.run.output_dir, debug.run.name)
    assert (first.rope_theta, first.sequence_length) == (last.rope_theta, last.sequence_length)
    assert tuning.objective.document_mask and tuning.objective.restart_positions
    shares = {source.validation_share for config in (tuning, debug) for source in config.data.sources.values()}
    assert len(shares) == 1  # else a chat of a held-out file would be about a file that was trained on
