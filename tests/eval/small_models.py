"""Small random models with a tokenizer whose tokens are bytes, for the tests of evaluating."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.hugging_face_folders import LLAMA, write_llama

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
