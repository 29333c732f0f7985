"""`data score`: perplexities against a direct computation in float64, and what becomes of the files."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.checkpoint.making import make_state
from tests.data.making import BYTES, EOS
from titan_yulan import cli
from titan_yulan.checkpoint import layout
from titan_yulan.checkpoint.files import HashingWriter
from titan_yulan.data.documents import find_inputs, read_documents
from titan_yulan.data.rows import Document
from titan_yulan.data.tokenizer import save_ranks
from titan_yulan.errors import RunError, UserError
from titan_yulan.eval.load import load_decoder
from titan_yulan.eval.score import Scorer, score
from titan_yulan.model import Decoder

CONTEXT = 16
CONFIG = """
[run]
name = "scores"
[model]
preset = "debug"
hidden_size = 24
intermediate_size = 40
num_hidden_layers = 2
num_attention_heads = 3
num_key_value_heads = 1
head_dim = 8
vocab_size = 264
alpha_base_width = 8
max_position_embeddings = 64
[tokenizer]
path = "{folder}/bytes.tiktoken"
[data.sources.text]
path = "{folder}/text"
[batch]
global_batch_size = 2
micro_batch_size = 1
[optimizer]
learning_rate = 0.01
[parallel]
compute_dtype = "float32"
[phase]
name = "a"
length = "4 steps"
sequence_length = 16
mix = {{ text = 1 }}
"""
TEXTS = ["one short text", "x", "a text that is longer than one window of sixteen tokens" * 2, "汉字也可以", "y" * 16, "z" * 17]


def make_run(folder: Path, seed: int) -> Path:
    """A run folder with one checkpoint of a small model with random weights and scalars."""
    torch.manual_seed(seed)
    save_ranks(folder / "bytes.tiktoken", BYTES.ranks)
    path = layout.step_folder(folder / "checkpoints", 4)
    path.mkdir(parents=True)
    text = CONFIG.format(folder=folder)
    (folder / "config.toml").write_text(text)
    decoder = Decoder(cli._load(cli._parser().parse_args(["config", "show"]), str(folder / "config.toml")).config.model) if False else None
    return path
