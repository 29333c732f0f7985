"""Training a byte-level byte-pair encoding, in plain Python.

Text is cut into pre-tokens by `PATTERN`; merges never cross a pre-token, so training only needs how often each
distinct pre-token occurs. Then, as in Sennrich, Haddow, Birch (Neural machine translation of rare words with subword
units, 2016), the most frequent pair of neighbours becomes a new token, again and again. A heap holds the candidate
pairs; an entry whose count has gone down since it was pushed is corrected when it is popped.

    "low low lower"  ->  {"low": 1, " low": 1, " lower": 1}  ->  l o w | ␣ l o w | ␣ l o w e r  ->  lo, low, ␣low, ...

The result depends on the counts alone: ties go to the pair with the smaller ids.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping

from titan_yulan.errors import UserError

# The pre-token pattern of the cl100k and Llama 3 vocabularies: contractions, words with one leading mark or space,
# numbers of up to three digits, punctuation with its line ends, line ends, blanks.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Pair = tuple[int, int]


def count_pre_tokens(texts: Iterable[str]) -> Counter[str]:
    """How often each pre-token of `PATTERN` occurs in the texts."""
    import regex

    pattern = regex.compile(PATTERN)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(pattern.findall(text))
    return counts


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Train on texts; see `train_from_counts`."""
    return train_from_counts(count_pre_tokens(texts), vocab_size)


def train_from_counts(counts: Mapping[str, int], vocab_size: int) -> dict[bytes, int]:
    """Train on the counts of pre-tokens.

    Args:
        counts: pre-token -> occurrences.
        vocab_size: size of the vocabulary including the end-of-text token, which gets no rank: 8192 gives 8191 ranks.

    Returns:
        token -> rank; ranks 0..255 are the single bytes, rank order is merge order.

    Raises:
        UserError: vocab_size is below 257, or the text has too few different pairs to reach it.
    """
    if vocab_size < 257:
        raise UserError(f"a vocabulary of {vocab_size} is too small: 256 bytes and end of text make at least 257")
    words = [list(word.encode("utf-8", "replace")) for word in counts]
    frequencies = list(counts.values())
    pair_counts, places = _count_pairs(words, frequencies)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    tokens = [bytes([value]) for value in range(256)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    while len(ranks) < vocab_size - 1:
        pair = _pop_most_frequent(heap, pair_counts)
        if pair is None:
            raise UserError(
                f"the text is too small for a vocabulary of {vocab_size}: it gives {len(ranks) + 1} entries; "
                "add text or choose a smaller size"
            )
        # Two merges can spell the same bytes (a+bc, ab+c); the file format knows a token by its bytes alone.
        merged = tokens[pair[0]] + tokens[pair[1]]
        rank = ranks.setdefault(merged, len(tokens))
        if rank == len(tokens):
            tokens.append(merged)
        _merge_everywhere(pair, rank, words, frequencies, pair_counts, places, heap)
    return ranks


def _count_pairs(words: list[list[int]], frequencies: list[int]) -> tuple[dict[Pair, int], dict[Pair, set[int]]]:
    """Occurrences of each pair of neighbours, and the words that hold it."""
    pair_counts: dict[Pair, int] = {}
    places: dict[Pair, set[int]] = {}
    for index, word in enumerate(words):
        for pair in itertools.pairwise(word):
            pair_counts[pair] = pair_counts.get(pair, 0) + frequencies[index]
            places.setdefault(pair, set()).add(index)
    return pair_counts, places


def _pop_most_frequent(heap: list[tuple[int, Pair]], pair_counts: dict[Pair, int]) -> Pair | None:
    while heap:
        negative, pair = heapq.heappop(heap)
        count = pair_counts.get(pair, 0)
        if count == -negative and count > 0:
            return pair
        if 0 < count < -negative:
            heapq.heappush(heap, (-count, pair))
    return None


def _merge_everywhere(
    pair: Pair,
    rank: int,
    words: list[list[int]],
    frequencies: list[int],
    pair_counts: dict[Pair, int],
    places: dict[Pair, set[int]],
    heap: list[tuple[int, Pair]],
) -> None:
    """Replace the pair by `rank` in every word that holds it, and keep counts, places and heap true."""
    grown: set[Pair] = set()
    for index in places.pop(pair):
        word, frequency = words[index], frequencies[index]
        merged = _merge(word, pair, rank)
        for old in itertools.pairwise(word):
            pair_counts[old] -= frequency
        for new in itertools.pairwise(merged):
            pair_counts[new] = pair_counts.get(new, 0) + frequency
            if rank in new:
                places.setdefault(new, set()).add(index)
                grown.add(new)
        words[index] = merged
    pair_counts.pop(pair, None)
    for new in grown:
        heapq.heappush(heap, (-pair_counts[new], new))


def _merge(word: list[int], pair: Pair, rank: int) -> list[int]:
    first, second = pair
    merged: list[int] = []
    place, last = 0, len(word) - 1
    while place <= last:
        if word[place] == first and place < last and word[place + 1] == second:
            merged.append(rank)
            place += 2
        else:
            merged.append(word[place])
            place += 1
    return merged
