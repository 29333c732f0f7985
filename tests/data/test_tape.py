"""The tape against a naive construction, for any partition into reads, with any shapes of shards."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_yulan.data import hashing, tape
from titan_yulan.data.source import Source, describe_shard, write_description, write_shard
from titan_yulan.data.tape import Tape


def make_source(folder: Path, shards: list[list[int]], *, ordered: bool = False, masked: bool = False) -> Source:
    """A source whose documents have the given lengths; every token is different."""
    folder.mkdir(exist_ok=True)
    token = 0
    for number, lengths in enumerate(shards):
        offsets = np.cumsum([0, *lengths]).astype(np.int64)
        tokens = np.arange(token, token + offsets[-1]).astype(np.uint16)
        arrays = {"tokens": tokens, "offsets": offsets} | ({"loss_mask": tokens % 3 == 0} if masked else {})
        write_shard(folder, number, arrays)
        token += int(offsets[-1])
    source = Source(
        path=folder,
        name="test",
        dtype=np.dtype(np.uint16),
        tokenizer_fingerprint="t",
        vocab_size=65536,
        eos_id=65535,
        ordered=ordered,
        has_loss_mask=masked,
        text_bytes=0,
        shards=tuple(describe_shard(folder, number, masked) for number in range(len(shards))),
        made_from={},
    )
    write_description(source)
    return Source.open(folder)


def naive_epoch(source: Source, seed: int, epoch: int) -> list[np.ndarray]:
    """The documents of an epoch in order, by the definition."""

    def order(what: int | str, count: int) -> list[int]:
        key = hashing.key(seed, "tape", source.fingerprint, epoch, what)
        return list(range(count)) if source.ordered else hashing.permutation(key, count).tolist()

    documents = []
    for shard in order("shards", len(source.shards)):
        offsets, tokens = source.shard_offsets(shard), source.shard_tokens(shard)
        documents += [tokens[offsets[d] : offsets[d + 1]] for d in order(shard, len(offsets) - 1)]
    return documents


@given(
    shards=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=6),
    ordered=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_any_reads_equal_the_naive_tape(shards, ordered, masked, seed, data) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = make_source(Path(folder), shards, ordered=ordered, masked=masked)
        epochs = 4
        documents = [document for epoch in range(epochs) for document in naive_epoch(source, seed, epoch)]
        tokens = np.concatenate(documents)
        document_ids = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
        cuts = sorted(data.draw(st.sets(st.integers(0, len(tokens)), min_size=2, max_size=8)))
        stretches = data.draw(st.permutations(list(pairwise(cuts))))
        reader = Tape(source, seed)
        assert reader.length * epochs == len(tokens)
        for start, end in stretches:
            piece = reader.read(start, end - start)
            np.testing.assert_array_equal(piece.tokens, tokens[start:end])
            np.testing.assert_array_equal(piece.document_ids, document_ids[start:end])
            assert piece.epoch == start // reader.length
            if masked:
                np.testing.assert_array_equal(piece.loss_mask, tokens[start:end] % 3 == 0)
            else:
                assert piece.loss_mask is None


def test_every_epoch_has_every_token_once_in_a_new_order(tmp_path: Path) -> None:
    reader = Tape(make_source(tmp_path / "s", [[3, 4, 5, 6], [2, 7, 1], [9, 9]]), seed=1)
    epochs = [reader.read(epoch * reader.length, reader.length).tokens.tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(reader.length)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_ordered_source_is_never_permuted(tmp_path: Path) -> None:
    reader = Tape(make_source(tmp_path / "s", [[3, 4], [2, 7, 1]], ordered=True), seed=1)
    assert reader.read(0, 34).tokens.tolist() == [*range(17), *range(17)]


def test_order_depends_on_seed_and_content_but_not_on_name_and_place(tmp_path: Path) -> None:
    lengths = [[1] * 40]
    first = Tape(make_source(tmp_path / "a", lengths), seed=1).read(0, 40).tokens
    same = Tape(make_source(tmp_path / "b", lengths), seed=1).read(0, 40).tokens
    other_seed = Tape(make_source(tmp_path / "a", lengths), seed=2).read(0, 40).tokens
    other_content = Tape(make_source(tmp_path / "c", lengths, ordered=False, masked=True), seed=1).read(0, 40).tokens
    assert first.tolist() == same.tolist()
    assert first.tolist() != other_seed.tolist()
    assert first.tolist() != other_content.tolist()


def test_a_row_through_many_epochs_of_a_tiny_source(tmp_path: Path) -> None:
    piece = Tape(make_source(tmp_path / "s", [[2, 3]]), seed=0).read(0, 1000)
    assert np.bincount(piece.tokens).tolist() == [200] * 5
    assert sorted(np.bincount(piece.document_ids)[:2].tolist()) == [2, 3]
    assert np.unique(piece.document_ids).tolist() == list(range(400))


def test_types_and_wrong_arguments(tmp_path: Path) -> None:
    reader = Tape(make_source(tmp_path / "s", [[2, 3]], masked=True), seed=0)
    piece = reader.read(0, 0)
    assert (piece.tokens.dtype, piece.document_ids.dtype) == (np.int32, np.int64)
    assert piece.loss_mask is not None and piece.loss_mask.dtype == bool and piece.tokens.shape == (0,)
    with pytest.raises(ValueError):
        reader.read(-1, 3)


def test_layouts_are_cached_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "s", [[1] * 10] * 8)
    opened: list[int] = []
    original = Source.shard_offsets
    monkeypatch.setattr(Source, "shard_offsets", lambda self, shard: opened.append(shard) or original(self, shard))
    reader = Tape(source, seed=0)
    for start in range(80):
        reader.read(start, 1)
    assert sorted(opened) == list(range(8))  # reading on touches every shard once
    assert len(reader._shards) <= tape._CACHED_SHARDS


@given(
    st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=5), min_size=1, max_size=4), st.integers(1, 60),
    st.integers(0, 3), st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_subset_is_the_first_documents_in_a_new_order_in_each_epoch(
    shards: list[list[int]], limit: int, seed: int, masked: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = make_source(Path(folder) / "s", shards, masked=masked)
        tape = Tape(source, seed, limit=limit)
        size = min(limit, source.tokens)
        assert tape.length == size
        ends = np.cumsum([length for shard in shards for length in shard])
        documents = int(np.searchsorted(ends, size)) + 1
        for epoch in range(3):
            read = tape.read(epoch * size, size)
            assert sorted(read.tokens.tolist()) == list(range(size))  # tokens are numbered as they are stored
            assert read.epoch == epoch
            assert set((read.document_ids - epoch * documents).tolist()) == set(range(documents))
            if read.loss_mask is not None:
                assert read.loss_mask.tolist() == [token % 3 == 0 for token in read.tokens.tolist()]
        assert tape.read(size // 2, 2 * size).tokens.tolist() == [
            *tape.read(size // 2, size - size // 2).tokens.tolist(),
            *tape.read(size, size + size // 2).tokens.tolist(),
        ]
        assert (tape.fingerprint == source.fingerprint) == (size == source.tokens)
