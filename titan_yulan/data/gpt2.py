"""GPT-2's vocabulary in its published files: `vocab.json` (token -> id) and `merges.txt` (pairs in order).

The files write bytes as printable letters. The ids of GPT-2 are the ranks of its merges, the 256 bytes first, which is
what tiktoken wants; other vocabularies of this format are taken if theirs are, too.
"""

from __future__ import annotations

import json
from pathlib import Path

from titan_yulan.errors import UserError

VOCABULARY, MERGES = "vocab.json", "merges.txt"
END_OF_TEXT = "<|endoftext|>"

# GPT-2's pre-tokens (Radford et al., 2019): contractions, and words, numbers or marks with one leading blank.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_letters() -> dict[str, int]:
    """The letter of each byte in the files: itself where it is printable, else the next letter from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + i): value for i, value in enumerate(others)}


def is_gpt2(path: Path) -> bool:
    """Whether a path names GPT-2's files: a folder that holds both and no tokenizer.json, or one of the two."""
    if path.is_dir():
        return (path / MERGES).is_file() and (path / VOCABULARY).is_file() and not (path / "tokenizer.json").is_file()
    return path.name in (VOCABULARY, MERGES)


def read_gpt2(path: Path) -> dict[bytes, int]:
    """Token -> rank from the two files.

    Args:
        path: the folder, or one of the files.

    Raises:
        UserError: a file is missing or damaged, or the ids are not the ranks of the merges.
    """
    folder = path if path.is_dir() else path.parent
    try:
        ids = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))
        merges = (folder / MERGES).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read GPT-2's {VOCABULARY} and {MERGES} in {folder}: {error}") from None
    letters = byte_letters()
    ranks: dict[bytes, int] = {bytes([value]): rank for rank, value in enumerate(letters.values())}
    for number, line in enumerate(merges, start=1):
        if not line.strip() or line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(letter in letters for letter in pair[0] + pair[1]):
            raise UserError(f"{folder / MERGES}, line {number} is no pair of tokens: {line!r}; the file is damaged")
        ranks.setdefault(bytes(letters[letter] for letter in pair[0] + pair[1]), len(ranks))
    _compare(folder, ids, ranks, letters)
    return ranks


def _compare(folder: Path, ids: object, ranks: dict[bytes, int], letters: dict[str, int]) -> None:
    names = {value: letter for letter, value in letters.items()}
    wanted = {"".join(names[value] for value in token): rank for token, rank in ranks.items()}
    wanted[END_OF_TEXT] = len(ranks)
    if ids != wanted:
        found = ids if isinstance(ids, dict) else {}
        wrong = next((token for token in (*wanted, *found) if found.get(token) != wanted.get(token)), "")
        raise UserError(
            f"{folder / VOCABULARY} is not that of {MERGES}: {wrong!r} is {found.get(wrong)}, by the merges it would "
            f"be {wanted.get(wrong)}; use the two files of one tokenizer, or its tokenizer.json"
        )
