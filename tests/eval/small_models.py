"""Small random models with a tokenizer whose tokens are bytes, for the tests of evaluating."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.hugging_face_folders import LLAMA, write_llama

# one id more than bytes, and more rows in the model than ids in the tokenizer
MODEL = replace(LLAMA, vocab_size=264, max_position_embeddings=2048)


def write_model(folder: Path) -> Any:
    """A Hugging Face folder; returns the model of transformers in float32."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    peer = write_llama(folder, MODEL)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(["<end>"])
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    return peer
