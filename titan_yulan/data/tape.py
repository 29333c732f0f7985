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
from titan_yulan.data import hashing
from titan_yulan.data.source import Source

_CACHED_SHARDS = 4


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

    def __init__(self, source: Source, seed: int, shuffle: bool = False) -> None:
        """
        Args:
            source: what is on the tape; it has at least one token.
            seed: seed of the orders.
            shuffle: also the documents of an ordered source.
        """
        self.source = source
        self._ordered = source.ordered and not shuffle
        self.seed = seed
        self.length = source.tokens  # tokens of one epoch
        self._shard_tokens = np.array([shard.tokens for shard in source.shards], np.int64)
        self._shard_documents = np.array([shard.documents for shard in source.shards], np.int64)
        self._epochs: OrderedDict[int, _EpochLayout] = OrderedDict()
        self._shards: OrderedDict[tuple[int, int], _ShardLayout] = OrderedDict()
        self._lock = threading.Lock()
        self._fingerprint = source.fingerprint
        self._verified: set[int] = set()

    def read(self, start: int, count: int) -> TapeSlice:
        """The tokens [start, start + count) of the tape, through documents, shards and epochs.

        Raises:
            ValueError: start or count is negative.
            RunError: a file of the source cannot be read, or its content is not what was prepared.
        """
        if start < 0 or count < 0:
            raise ValueError(f"cannot read {count} tokens from {start}")
        tokens = np.empty(count, np.int32)
        document_ids = np.empty(count, np.int64)
        loss_mask = np.empty(count, bool) if self.source.has_loss_mask else None
        done = 0
        while done < count:
            epoch, place = divmod(start + done, self.length)
            with self._lock:
                layout = self._epoch_layout(epoch)
                slot = int(np.searchsorted(layout.token_starts, place, side="right")) - 1
                shard = self._shard_layout(epoch, int(layout.shards[slot]))
            first = place - int(layout.token_starts[slot])
            last = min(first + count - done, int(shard.starts[-1]))
            end = done + last - first
            stored, documents = _gather_places(shard, first, last)
            tokens[done:end] = shard.tokens[stored]
            document_ids[done:end] = documents + (epoch * self.source.documents + int(layout.document_starts[slot]))
            if loss_mask is not None and shard.loss_mask is not None:
                loss_mask[done:end] = shard.loss_mask[stored]
            done = end
        return TapeSlice(tokens, document_ids, loss_mask, start // self.length)

    def _epoch_layout(self, epoch: int) -> _EpochLayout:
        layout = self._epochs.get(epoch)
        if layout is None:
            count = len(self.source.shards)
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
            offsets = np.array(self.source.shard_offsets(shard))
            count = len(offsets) - 1
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
        UserError: it is not prepared.
        RunError: it is damaged.
    """
    shuffle = any(fnmatch.fnmatchcase(name, pattern) for pattern in config.data.shuffle)
    return Tape(Source.open(Path(config.data.sources[name].path)), config.run.seed, shuffle)


def _gather_places(shard: _ShardLayout, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Stored places (last - first,) of tokens [first, last) of the epoch's order, and their documents' ordinals."""
    document = int(np.searchsorted(shard.starts, first, side="right")) - 1
    end_document = int(np.searchsorted(shard.starts, last, side="left"))
    # Within a document, stored place and place in the order differ by a constant.
    lengths = np.minimum(shard.starts[document + 1 : end_document + 1], last)
    lengths[1:] -= shard.starts[document + 1 : end_document]
    lengths[0] -= first
    shifts = shard.stored_starts[document:end_document] - shard.starts[document:end_document]
    stored = np.repeat(shifts, lengths) + np.arange(first, last)
    return stored, np.repeat(np.arange(document, end_document), lengths)


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
