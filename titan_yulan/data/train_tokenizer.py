"""Training a tokenizer on input files: a deterministic sample of their text, counted in parallel.

The sample: every group of inputs (every source) gives an equal share of `SAMPLE_BYTES`. Files are taken in the order
of the hashes of their names until the share is full; one file gives at most a sixteenth of the share where there are
sixteen files or more, else its even part. Documents are taken whole from the start of a file.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from titan_yulan.data import hashing
from titan_yulan.data.bpe import count_pre_tokens, train_from_counts
from titan_yulan.data.documents import BadRow, InputFile, find_inputs, read_documents
from titan_yulan.data.report import Say, say_now
from titan_yulan.data.storage import explain_full_disk, locked
from titan_yulan.data.tokenizer import Tokenizer, save_ranks
from titan_yulan.data.workers import default_workers, ordered_map
from titan_yulan.errors import UserError

SAMPLE_BYTES = 20_000_000
_MOST_FILES_COUNTED_EVENLY = 16


def train_tokenizer(
    groups: Sequence[Sequence[str]],
    output: Path | str,
    vocab_size: int,
    *,
    workers: int | None = None,
    say: Say = say_now,
) -> Tokenizer:
    """Train a vocabulary and write it, unless the file exists by the time it is this process's turn.

    Args:
        groups: inputs (see `documents.find_inputs`), one group a source.
        output: the file to write.
        vocab_size: number of ids, end of text included.
        workers: processes; None: all processors.
        say: gets progress lines.

    Raises:
        UserError: an input is wrong, there is too little text for the size, or the file has another size.
    """
    output = Path(output)
    with explain_full_disk(output.parent), locked(output.with_name(f".{output.name}.lock"), say):
        if output.exists():
            return _existing(output, vocab_size, say)
        start = time.perf_counter()
        counts: Counter[str] = Counter()
        sampled = 0
        for inputs in groups:
            share = SAMPLE_BYTES // len(groups)
            sampled += _count_group(find_inputs(inputs), share, workers or default_workers(), counts)
        if not counts:
            raise UserError(f"the inputs hold no text to train the tokenizer {output} on")
        save_ranks(output, train_from_counts(counts, vocab_size))
        seconds = time.perf_counter() - start
        say(f"tokenizer {output}: {vocab_size:,} entries from {sampled / 1e6:.1f} MB of text, {seconds:.1f} s")
        return Tokenizer.load(output)


def _existing(output: Path, vocab_size: int, say: Say) -> Tokenizer:
    tokenizer = Tokenizer.load(output)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{output} exists and has {tokenizer.vocab_size} entries, not {vocab_size}: choose another output, or "
            "delete it (and the sources made with it)"
        )
    say(f"tokenizer {output}: already there, {vocab_size:,} entries")
    return tokenizer


def _count_group(files: list[InputFile], share: int, workers: int, counts: Counter[str]) -> int:
    """Add the pre-tokens of a group's sample to `counts`; gives the sampled bytes."""
    files = sorted(files, key=lambda file: hashing.key("tokenizer sample", file.name))
    limit = share // min(len(files), _MOST_FILES_COUNTED_EVENLY)
    sampled = 0
    for size, file_counts in ordered_map(functools.partial(_count_file, limit), files, workers):
        counts.update(file_counts)
        sampled += size
        if sampled >= share:
            break
    return sampled


def _count_file(limit: int, file: InputFile) -> tuple[int, Counter[str]]:
    size = 0

    def texts() -> Iterator[str]:
        nonlocal size
        for document in read_documents(file):
            if not isinstance(document, BadRow) and document.parts:
                size += len(document.text.encode())
                yield document.text
                if size >= limit:
                    return

    counts = count_pre_tokens(texts())
    return size, counts
