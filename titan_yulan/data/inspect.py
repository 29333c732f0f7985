"""What is in a prepared source, as text for the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from titan_yulan.data.report import LeftOut
from titan_yulan.data.source import Source
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import UserError

_SHOWN_TOKENS = 64


def inspect_source(
    path: Path | str, *, tokenizer: Tokenizer | None = None, documents: int = 3, verify: bool = True
) -> list[str]:
    """Counts, fingerprints, lengths and first documents of a source.

    Args:
        path: the source's folder.
        tokenizer: decodes the documents; without it they are shown as ids.
        documents: how many documents of the first shard to show (their first 64 tokens).
        verify: read all files and compare their hashes.

    Raises:
        UserError: not a source, or another tokenizer.
        RunError: a file is damaged.
    """
    source = Source.open(path)
    if tokenizer and tokenizer.fingerprint != source.tokenizer_fingerprint:
        raise UserError(f"{path} was made with another tokenizer: give that one, or none to see the ids")
    if verify:
        source.verify()
    offsets = [source.shard_offsets(shard) for shard in range(len(source.shards))]
    lengths = np.concatenate([np.diff(shard_offsets) for shard_offsets in offsets])
    lines = [
        f"source       {source.name} ({source.path})",
        f"fingerprint  {source.fingerprint}",
        f"tokenizer    {source.tokenizer_fingerprint}, {source.vocab_size:,} entries, end of text {source.eos_id}",
        f"made from    {_inputs(source)}",
        f"tokens       {source.tokens:,} as {source.dtype.name} in {len(source.shards)} shards"
        + _order(source)
        + (", with a loss mask" if source.has_loss_mask else ""),
        f"documents    {source.documents:,}, of {int(lengths.min())} to {int(lengths.max()):,} tokens, "
        f"median {int(np.median(lengths))}, mean {source.tokens / source.documents:.0f}",
    ]
    if left_out := str(LeftOut.read(source.made_from)):
        lines.append(f"skipped      {left_out}, on both sides together")
    if source.text_bytes:
        lines.append(f"text         {source.text_bytes:,} bytes, {source.text_bytes / source.tokens:.2f} a token")
    lines.append(f"files        {'all hashes are right' if verify else 'sizes are right, hashes not checked'}")
    for document in range(min(documents, len(offsets[0]) - 1)):
        lines += _show_document(source, document, offsets[0], tokenizer)
    return lines


def _inputs(source: Source) -> str:
    made_from = source.made_from
    if "request_fingerprint" not in made_from:
        return "something else than data prepare"
    return f"{', '.join(made_from['inputs'])} ({made_from['input_files']:,} files, {made_from['part']} part)"


def _order(source: Source) -> str:
    if not source.ordered:
        return ", shuffled"
    order = source.made_from.get("order", "keep")
    if order == "keep":
        return ", kept in order"
    return f", ordered by {order.removeprefix('-')} from {'high to low' if order.startswith('-') else 'low to high'}"


def _show_document(source: Source, document: int, offsets: np.ndarray, tokenizer: Tokenizer | None) -> list[str]:
    start, end = int(offsets[document]), int(offsets[document + 1])
    ids = source.shard_tokens(0)[start : min(end, start + _SHOWN_TOKENS)].tolist()
    text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))
    more = " ..." if end - start > _SHOWN_TOKENS else ""
    return [f"--- document {document} of shard 0, {end - start:,} tokens", text + more]
