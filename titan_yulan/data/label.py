"""A small text classifier that gives each document a topic: hashed n-grams and multinomial logistic regression.

A unit of text is a run of letters and digits, or one character of a script that writes no spaces between words
(Chinese, Japanese, Thai). Single units and pairs of neighbours are hashed into buckets; a document is the logarithms of
their counts, scaled to length 1. Probabilities are softmax(x W); W is trained by AdaGrad (Duchi, Hazan, Singer: JMLR
12, 2011) on the cross-entropy, in small batches whose order the seed decides: training twice gives the same bytes.
"""

from __future__ import annotations

import functools
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from titan_yulan.data import hashing
from titan_yulan.data.annotate import Counts, Job, annotate
from titan_yulan.data.documents import find_inputs, read_documents
from titan_yulan.data.report import Say, say_now
from titan_yulan.data.rows import BadRow, Document
from titan_yulan.data.storage import sha256_file, write_atomic
from titan_yulan.data.workers import default_workers
from titan_yulan.errors import UserError

OTHERS = "others"  # the topic of a document that the classifier is not sure of

_FORMAT = 1
_BUCKETS = 2**18  # the last one is every document's own: the bias
_CHARACTERS = 8192  # of a document that are looked at
_BATCH = 32  # documents
_RATE = 0.3
_SPACELESS = ((0x0E00, 0x0F00), (0x3040, 0x3100), (0x3400, 0xA000), (0xF900, 0xFB00), (0x20000, 0x32000))
_BASE = 0x9E3779B97F4A7C15  # odd, so that its powers have inverses modulo 2^64


@dataclass(frozen=True)
class Features:
    """Documents one after the other: `buckets` and `values` of document i are those from `starts[i]` on."""

    starts: np.ndarray  # (documents + 1,) int64
    buckets: np.ndarray  # (entries,) int32
    values: np.ndarray  # (entries,) float32

    @classmethod
    def of(cls, texts: Iterable[str]) -> Features:
        parts = [_features(text) for text in texts]
        starts = np.cumsum([0, *(len(buckets) for buckets, _ in parts)])
        return cls(starts, *(np.concatenate(column) for column in zip(*parts, strict=True)))

    def take(self, documents: np.ndarray) -> Features:
        """Some of the documents, in the given order."""
        lengths = self.starts[documents + 1] - self.starts[documents]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        entries = np.repeat(self.starts[documents] - starts[:-1], lengths) + np.arange(starts[-1])
        return Features(starts, self.buckets[entries], self.values[entries])


@dataclass(frozen=True)
class Classifier:
    """A trained model: `weights` is (buckets, topics) float32."""

    topics: tuple[str, ...]
    weights: np.ndarray

    def probabilities(self, features: Features) -> np.ndarray:
        """(documents, topics) float32; each row sums to 1."""
        scores = np.add.reduceat(self.weights[features.buckets] * features.values[:, None], features.starts[:-1])
        scores = np.exp(scores - scores.max(1, keepdims=True))
        return scores / scores.sum(1, keepdims=True)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {
            "format": np.array(_FORMAT),
            "topics": np.array(self.topics),
            "weights": self.weights,
        }
        write_atomic(path, lambda file: np.savez(file, **content))

    @classmethod
    def load(cls, path: Path) -> Classifier:
        """
        Raises:
            UserError: the file is missing, damaged or of another version.
        """
        try:
            with np.load(path, allow_pickle=False) as content:
                if int(content["format"]) != _FORMAT:
                    raise ValueError(f"its format is {int(content['format'])}, this version reads {_FORMAT}")
                return cls(tuple(content["topics"].tolist()), content["weights"])
        except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise UserError(
                f"cannot read the classifier {path} ({error}): make it with 'titan-yulan data label train --output "
                f"{path} FILES...'"
            ) from error


@dataclass(frozen=True)
class Labeller:
    """What `data label apply` computes of documents; see `annotate.Compute`."""

    classifier: Classifier
    minimum_probability: float

    def __call__(self, documents: Sequence[Document]) -> list[dict[str, Any] | str]:
        """`topic` and `topic_probability` of each document (that of its likeliest topic, also where it is `others`)."""
        probabilities = self.classifier.probabilities(Features.of(document.text for document in documents))
        best = probabilities.argmax(1)
        results: list[dict[str, Any] | str] = []
        for document, row, topic in zip(documents, probabilities.tolist(), best.tolist(), strict=True):
            if document.token_ids is not None:
                results.append("token ids hold no text to label: label the text, then tokenise it")
                continue
            sure = row[topic] >= self.minimum_probability
            results.append(
                {"topic": self.classifier.topics[topic] if sure else OTHERS, "topic_probability": row[topic]}
            )
        return results


def train(
    inputs: Sequence[str],
    output: Path,
    *,
    column: str = "topic",
    held_out_share: float = 0.1,
    epochs: int = 5,
    seed: int = 0,
    say: Say = say_now,
) -> Classifier:
    """Train on rows that have text and a topic, and write the model; says how well it does on rows held out.

    The hash of a document's text decides whether it is held out. All features are in memory: about 10 KB a document.

    Args:
        column: name of the column that holds the topic, a string.

    Raises:
        UserError: an input cannot be read, there are fewer than two topics, or no row for one of the two parts.
    """
    if not 0 < held_out_share < 1 or epochs < 1:
        raise UserError("--held-out-share must be between 0 and 1, --epochs at least 1")
    texts, topics, skipped = _read(inputs, column)
    names = tuple(sorted(set(topics)))
    held_out = np.array([hashing.key("held out", text) < held_out_share * 2.0**64 for text in texts], dtype=bool)
    if len(names) < 2 or held_out.all() or not held_out.any():
        raise UserError(
            f"{len(texts)} rows with {len(names)} topics in the column {column!r}, {int(held_out.sum())} of them held "
            "out: give rows of at least two topics, and enough for both parts"
        )
    target = np.searchsorted(np.array(names), np.array(topics))
    features = Features.of(texts)
    chosen = np.flatnonzero(~held_out)
    classifier = Classifier(names, fit(features.take(chosen), target[chosen], len(names), epochs, seed))
    classifier.save(output)
    say(f"{output}: {len(chosen):,} documents, {len(names)} topics{skipped}")
    kept = np.flatnonzero(held_out)
    for line in confusion_lines(names, target[kept], classifier.probabilities(features.take(kept)).argmax(1)):
        say(line)
    return classifier


def _read(inputs: Sequence[str], column: str) -> tuple[list[str], list[str], str]:
    """Texts, their topics, and what was skipped, in words."""
    texts: list[str] = []
    topics: list[str] = []
    bad: list[str] = []
    for file in find_inputs(inputs):
        for item in read_documents(file, columns=(column,)):
            if isinstance(item, BadRow):
                bad.append(str(item))
            elif not isinstance(item.columns[column], str) or not item.text:
                bad.append(f"{file.name}: a row without text, or whose {column!r} is no string")
            else:
                texts.append(item.text[:_CHARACTERS])
                topics.append(item.columns[column])
    return texts, topics, f"; skipped: {len(bad):,} bad rows, the first: {bad[0]}" if bad else ""


def fit(features: Features, target: np.ndarray, topics: int, epochs: int, seed: int) -> np.ndarray:
    """Weights (buckets, topics) float32 that make the targets likely.

    Args:
        target: (documents,) topic of each document, 0 to topics - 1.
    """
    weights = np.zeros((_BUCKETS, topics), dtype=np.float32)
    squares = np.full_like(weights, 1e-3)
    identity = np.eye(topics, dtype=np.float32)
    for epoch in range(epochs):
        order = hashing.permutation(hashing.key(seed, "label", epoch), len(target))
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            part = features.take(batch)
            error = Classifier((), weights).probabilities(part) - identity[target[batch]]
            by_entry = np.repeat(error, np.diff(part.starts), axis=0) * part.values[:, None]
            places = np.argsort(part.buckets, kind="stable")
            touched, first = np.unique(part.buckets[places], return_index=True)
            gradient = np.add.reduceat(by_entry[places], first)
            squares[touched] += gradient**2
            weights[touched] -= _RATE * gradient / np.sqrt(squares[touched])
    return weights


def confusion_lines(names: Sequence[str], target: np.ndarray, found: np.ndarray) -> list[str]:
    """How many documents of each topic were recognised, and what the others were taken for; one line a topic."""
    share = np.bincount(target).max() / len(target)
    lines = [
        f"held out: {len(target):,} documents, {np.mean(target == found):.1%} right "
        f"(always the most frequent topic: {share:.1%})"
    ]
    width = max(map(len, names))
    for topic, name in enumerate(names):
        taken = Counter(found[target == topic].tolist())
        count = sum(taken.values())
        others = [f"{names[other]} {times / count:.0%}" for other, times in taken.most_common(4) if other != topic]
        line = f"  {name:{width}} {count:7,} documents" + (f", {taken[topic] / count:6.1%} right" if count else "")
        lines.append(line + ("; taken for " + ", ".join(others[:3]) if others else ""))
    return lines


@functools.cache
def _classes() -> np.ndarray:
    """Class of each code point: 0 separates, 1 is part of a word, 2 is a unit of its own."""
    table = np.fromiter((chr(code).isalnum() for code in range(0x110000)), dtype=np.uint8, count=0x110000)
    for first, end in _SPACELESS:
        table[first:end] *= 2
    return table


@functools.cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """_BASE^i and its inverse modulo 2^64 for every place of a text."""
    # lower-casing may make a text a little longer: a few characters become two or three
    bases = np.full((2, 3 * _CHARACTERS), [[_BASE], [pow(_BASE, -1, 2**64)]], dtype=np.uint64)
    bases[:, 0] = 1
    powers = np.multiply.accumulate(bases, axis=1)
    return powers[0], powers[1]


def _features(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Buckets (int32, rising) and values (float32) of one text."""
    codes = np.frombuffer(text[:_CHARACTERS].lower().encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    kinds = np.concatenate([[0], _classes()[codes.astype(np.int64)], [0]])
    inside = kinds[1:-1]
    starts = np.flatnonzero((inside == 2) | ((inside == 1) & (kinds[:-2] != 1)))
    ends = np.flatnonzero((inside == 2) | ((inside == 1) & (kinds[2:] != 1))) + 1
    powers, inverses = _powers()
    sums = np.concatenate([[np.uint64(0)], np.cumsum(codes * powers[: len(codes)], dtype=np.uint64)])
    units = hashing.mix((sums[ends] - sums[starts]) * inverses[starts])
    pairs = hashing.mix(units[:-1] * np.uint64(_BASE) + units[1:])
    hashes = np.concatenate([units, pairs]) % np.uint64(_BUCKETS - 1)
    buckets, counts = np.unique(hashes.astype(np.int32), return_counts=True)
    values = np.log1p(counts).astype(np.float32)
    values /= max(float(np.linalg.norm(values)), 1e-12)
    return np.append(buckets, np.int32(_BUCKETS - 1)), np.append(values, np.float32(1))


def apply(
    model: Path,
    inputs: Sequence[str],
    output: Path,
    *,
    minimum_probability: float = 0.0,
    workers: int | None = None,
    on_bad_row: Literal["skip", "fail"] = "skip",
    say: Say = say_now,
) -> Counts:
    """Write every input file into `output`, with the columns `topic` and `topic_probability` (see `data.annotate`).

    Args:
        model: file that `train` wrote.
        minimum_probability: a document whose likeliest topic is less likely than this is `others`.
        workers: processes; None: all processors.

    Raises:
        UserError: the model or an input cannot be read, or the request is wrong.
        RunError: the disk is full, or a worker died.
    """
    if not 0 <= minimum_probability <= 1:
        raise UserError(f"--minimum-probability {minimum_probability}: from 0 to 1")
    labeller = Labeller(Classifier.load(model), minimum_probability)
    request = {"classifier": sha256_file(model), "minimum_probability": minimum_probability}
    job = Job(output, request, labeller, say, on_bad_row == "fail")
    return annotate(find_inputs(inputs), job, workers or default_workers())
