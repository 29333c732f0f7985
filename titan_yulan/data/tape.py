"""The endless tape of a source's tokens, readable at any place.

    epoch 0                          epoch 1
    shard 2 | shard 0 | shard 1      shard 0 | shard 1 | shard 2      ...
      its documents in a new order in every epoch

Epoch e permutes the shards, and the documents inside each shard, by permutations that are pure functions of (seed,
content of the source, epoch, shard). What stands at a place of the tape therefore does not depend on what was read
before, and a position is one number. An ordered source is the same in every epoch, unless `[data] shuffle` names it.
"""

from __future__ import annotations

import fnmatch
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from titan_yulan.config.sections import RunConfig
from titan_yulan.config.subset import source_limit
from titan_yulan.data import hashing
from titan_yulan.data.source import Source
from titan_yulan.errors import UserError

_CACHED_SHARDS = 4
_LONG_STRETCH = 150  # tokens in the mean, from which on a copy for each is faster than an index for every token


@dataclass(frozen=True)
class TapeSlice:
    """A stretch of the tape.

    Attributes:
        tokens: (count,) int32 (torch takes it without a copy; every vocabulary fits).
        document_ids: (count,) int64, epoch * documents + place of the document in the order of its epoch: unique
            along the whole tape and never decreasing.
        loss_mask: (count,) bool, is the token a target; None when all are.
        epoch: the epoch of the first token.
    """

    tokens: np.ndarray
    document_ids: np.ndarray
    loss_mask: np.ndarray | None
    epoch: int


@dataclass(frozen=True)
class _EpochLayout:
    shards: np.ndarray  # (shards,) the shard at each place of the epoch
    token_starts: np.ndarray  # (shards + 1,) token of the epoch at which each place starts
    document_starts: np.ndarray  # (shards + 1,) the same in documents


@dataclass(frozen=True)
class _ShardLayout:
    tokens: np.ndarray  # (tokens,) as stored
    loss_mask: np.ndarray | None
    stored_starts: np.ndarray  # (documents,) stored start of each document, in the order of the epoch
    starts: np.ndarray  # (documents + 1,) where it starts in the order of the epoch


class Tape:
    """See the head of the file. One thread may read while another does."""

    def __init__(self, source: Source, seed: int, shuffle: bool = False, limit: int | None = None) -> None:
        """
        Args:
            source: what is on the tape; it has at least one token.
            seed: seed of the orders.
            shuffle: also the documents of an ordered source.
            limit: only so many tokens are on the tape, from the first documents as they are stored, of which the last
                is cut; None: all.
        """
        self.source = source
        self._ordered = source.ordered and not shuffle
        self.seed = seed
        self.length = source.tokens if limit is None else min(limit, source.tokens)  # tokens of one epoch
        tokens = np.array([shard.tokens for shard in source.shards], np.int64)
        documents = np.array([shard.documents for shard in source.shards], np.int64)
        if self.length < source.tokens:
            ends = np.cumsum(tokens)
            last = int(np.searchsorted(ends, self.length))  # the shard that the limit falls into
            tokens[last] -= ends[last] - self.length
            documents[last] = np.searchsorted(source.shard_offsets(last)[:-1], tokens[last])
            tokens, documents = tokens[: last + 1], documents[: last + 1]
        self._shard_tokens, self._shard_documents = tokens, documents
        self._documents = int(documents.sum())
        self._epochs: OrderedDict[int, _EpochLayout] = OrderedDict()
        self._shards: OrderedDict[tuple[int, int], _ShardLayout] = OrderedDict()
        self._lock = threading.Lock()
        self._fingerprint = source.fingerprint
        self._verified: set[int] = set()

    @property
    def fingerprint(self) -> str:
        """Of what is on the tape."""
        whole = self.length == self.source.tokens
        return self.source.fingerprint if whole else f"{self.source.fingerprint}:{self.length}"

    def read(self, start: int, count: int) -> TapeSlice:
        """The tokens [start, start + count) of the tape, through documents, shards and epochs.

        Raises:
            ValueError: start or count is negative.
            RunError: a file of the source cannot be read, or its content is not what was prepared.
        """
        if start < 0 or count < 0:
            raise ValueError(f"cannot read {count} tokens from {start}")
        masked = self.source.has_loss_mask
        if not count:
            empty = np.empty(0, bool) if masked else None
            return TapeSlice(np.empty(0, np.int32), np.empty(0, np.int64), empty, start // self.length)
        tokens, document_ids, loss_masks = [], [], []
        done = 0
        while done < count:
            epoch, place = divmod(start + done, self.length)
            with self._lock:
                layout = self._epoch_layout(epoch)
                slot = int(np.searchsorted(layout.token_starts, place, side="right")) - 1
                shard = self._shard_layout(epoch, int(layout.shards[slot]))
            first = place - int(layout.token_starts[slot])
            last = min(first + count - done, int(shard.starts[-1]))
            document, begins, lengths = _documents_between(shard, first, last)
            tokens.append(_as_int32(_collect(shard.tokens, begins, lengths)))
            document += epoch * self._documents + int(layout.document_starts[slot])
            document_ids.append(np.repeat(np.arange(document, document + len(lengths)), lengths))
            if shard.loss_mask is not None:
                loss_masks.append(_collect(shard.loss_mask, begins, lengths))
            done += last - first
        loss_mask = _joined(loss_masks) if masked else None
        return TapeSlice(_joined(tokens), _joined(document_ids), loss_mask, start // self.length)

    def _epoch_layout(self, epoch: int) -> _EpochLayout:
        layout = self._epochs.get(epoch)
        if layout is None:
            count = len(self._shard_tokens)
            shards = np.arange(count) if self._ordered else hashing.permutation(self._key(epoch, "shards"), count)
            layout = _EpochLayout(shards, _starts(self._shard_tokens[shards]), _starts(self._shard_documents[shards]))
        _remember(self._epochs, epoch, layout)
        return layout

    def _shard_layout(self, epoch: int, shard: int) -> _ShardLayout:
        layout = self._shards.get((epoch, shard))
        if layout is None:
            if shard not in self._verified:
                # once, when first touched: hashing 20 MB takes some 20 ms, and flipped bytes would train silently
                self.source.verify_shard(shard)
                self._verified.add(shard)
            count = int(self._shard_documents[shard])
            offsets = np.minimum(self.source.shard_offsets(shard)[: count + 1], self._shard_tokens[shard])
            order = np.arange(count) if self._ordered else hashing.permutation(self._key(epoch, shard), count)
            layout = _ShardLayout(
                tokens=self.source.shard_tokens(shard),
                loss_mask=self.source.shard_loss_mask(shard),
                stored_starts=offsets[order],
                starts=_starts(np.diff(offsets)[order]),
            )
        _remember(self._shards, (epoch, shard), layout)
        return layout

    def _key(self, epoch: int, what: int | str) -> int:
        return hashing.key(self.seed, "tape", self._fingerprint, epoch, what)


def open_tape(config: RunConfig, name: str) -> Tape:
    """The tape of a run's source.

    Raises:
        UserError: it is not prepared, or has fewer tokens than `[phase] unique_tokens` wants of it.
        RunError: it is damaged.
    """
    shuffle = any(fnmatch.fnmatchcase(name, pattern) for pattern in config.data.shuffle)
    source, limit = Source.open(Path(config.data.sources[name].path)), source_limit(config, name)
    if limit is not None and limit > source.tokens:
        raise UserError(
            f"phase.unique_tokens: {limit:,} of them are to come from {name!r}, which holds {source.tokens:,}; lower "
            "it, or prepare more text"
        )
    return Tape(source, config.run.seed, shuffle, limit)


def _documents_between(shard: _ShardLayout, first: int, last: int) -> tuple[int, np.ndarray, np.ndarray]:
    """The documents that hold tokens [first, last) of the epoch's order: number of the first one, and of the part of
    each where it is stored and how long it is."""
    document = int(np.searchsorted(shard.starts, first, side="right")) - 1
    end_document = int(np.searchsorted(shard.starts, last, side="left"))
    begins = shard.stored_starts[document:end_document].copy()
    lengths = np.minimum(shard.starts[document + 1 : end_document + 1], last)
    lengths[1:] -= shard.starts[document + 1 : end_document]
    lengths[0] -= first
    begins[0] += first - shard.starts[document]
    return document, begins, lengths


def _collect(stored: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Stretches of an array, one behind the other; long ones are copied each, short ones through an index of all."""
    total = int(lengths.sum())
    if total >= _LONG_STRETCH * len(lengths):
        ends = begins + lengths
        return np.concatenate([stored[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)])
    places = np.repeat(begins - np.cumsum(lengths) + lengths, lengths)
    places += np.arange(total)
    return stored.take(places)  # faster than brackets


def _as_int32(tokens: np.ndarray) -> np.ndarray:
    """Stored ids, uint16 or uint32, as int32; no id has the highest bit."""
    return tokens.view(np.int32) if tokens.itemsize == 4 else tokens.astype(np.int32)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _starts(lengths: np.ndarray) -> np.ndarray:
    """(n,) lengths -> (n + 1,) starts, the last being the total."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def _remember(cache: OrderedDict, key: object, value: object) -> None:
    """Make `key` the newest entry of a small cache, and drop the oldest."""
    cache[key] = value
    cache.move_to_end(key)
    if len(cache) > _CACHED_SHARDS:
        cache.popitem(last=False)
