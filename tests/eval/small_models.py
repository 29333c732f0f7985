"""Small random models with a tokenizer whose tokens are bytes, for the tests of evaluating."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.hugging_face_folders import LLAMA, write_llama

# A run of a model over bytes. `length`: of its rows; `held_out`: empty, or the line of its validation_path.
CONFIG = """
[run]
name = "small"
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
{held_out}
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
sequence_length = {length}
mix = {{ text = 1 }}
"""

# one id more than bytes, and more rows in the model than ids in the tokenizer
MODEL = replace(LLAMA, vocab_size=264, max_position_embeddings=2048)


def write_model(folder: Path, rows: int = MODEL.vocab_size) -> Any:
    """A Hugging Face folder of a model with so many rows; returns that of transformers in float32."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    peer = write_llama(folder, replace(MODEL, vocab_size=rows))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(["<end>"])
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    for name in ("config.json", "generation_config.json"):
        ids = {"eos_token_id": 256, "bos_token_id": 256}
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **ids}))
    return peer
