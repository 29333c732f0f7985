"""A Hugging Face `tokenizer.json` from a tiktoken vocabulary, with the same ids.

Both cut a text into pre-tokens by one pattern, take a pre-token that is in the vocabulary whole, and else merge pairs
of neighbours. They differ in what a merge is: tiktoken merges the pair whose bytes together have the lowest rank, a
tokenizer.json lists pairs in order. So every way to split a token into two tokens is listed, all the ways of one token
before those of the next rank. The two could still part where two ways to make one token overlap (x, y, z with xy = yz
as bytes): tiktoken takes the left one, the list its first. No text is known that gets there, and
`export_check.py` compares.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_yulan.checkpoint.hugging_face import write_json
from titan_yulan.data.bpe import PATTERN
from titan_yulan.data.tokenizer import END_OF_TEXT, HuggingFaceTokenizer, Tokenizer

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
# What may lie beside a tokenizer.json and belongs to it.
_COMPANIONS = (CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def write_tokenizer(tokenizer: Tokenizer, source: Path, folder: Path, longest: int) -> None:
    """Write the tokenizer's files into a folder; those of a tokenizer.json are copied.

    Args:
        source: what `[tokenizer] path` names.
        longest: tokens that the model takes at most.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        write_json(folder / TOKENIZER, tokenizer_json(tokenizer.ranks, tokenizer.pattern))
        write_json(folder / CONFIG, _tokenizer_config(longest))
        return
    file = source / TOKENIZER if source.is_dir() else source
    (folder / TOKENIZER).write_text(tokenizer.content, encoding="utf-8")
    for name in _COMPANIONS:
        if file.with_name(name).is_file():
            shutil.copyfile(file.with_name(name), folder / name)


def tokenizer_json(ranks: Mapping[bytes, int], pattern: str = PATTERN) -> dict[str, Any]:
    """The content of a tokenizer.json: byte-level BPE, pre-tokens by `pattern`, end of text the one special token."""
    end_of_text = {
        "id": len(ranks),
        "content": END_OF_TEXT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    bytes_to_letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    letters = _letters()

    def spell(token: bytes) -> str:
        return "".join([letters[value] for value in token])

    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end_of_text],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_to_letters]},
        "post_processor": None,
        "decoder": bytes_to_letters,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a pre-token that is in the vocabulary is taken whole, as tiktoken does
            "vocab": {spell(token): rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])},
            "merges": [[spell(first), spell(second)] for first, second in merges(ranks)],
        },
    }


def merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that together are a token, in the order in which they are to be merged."""
    pairs = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs += [(first, second) for first, second in halves if first in ranks and second in ranks]
    return pairs


def _letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's table): the byte's own in Latin-1 where
    that can be seen, else the next one from U+0100 on."""
    seen = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [value for value in range(256) if value not in seen]
    return [chr(value) if value in seen else chr(0x100 + hidden.index(value)) for value in range(256)]


def _tokenizer_config(longest: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
    }
