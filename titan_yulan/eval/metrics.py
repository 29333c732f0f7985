"""Numbers of a task from the likelihoods or grades of its items.

With l the log-likelihood of a choice and the choice taken that has the largest of these:

    accuracy                l
    accuracy_per_token      l / its tokens
    accuracy_per_character  l / its characters without the blank before it (lm-evaluation-harness: acc_norm)
    accuracy_per_byte       l / its UTF-8 bytes without the blank before it
    accuracy_pmi            l - log-likelihood of the choice after a context that says nothing (arXiv 2104.08315)

    bits_per_byte           -l / (ln 2 * UTF-8 bytes), of all right answers (with their first blank) or texts together
    perplexity              exp(-l / tokens), of all together; for a cloze exp(-mean l), as LAMBADA reports it
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from titan_yulan.eval.likelihood import Likelihood
from titan_yulan.eval.requests import Choice, Cloze

# Raise it when the same likelihoods or texts get other numbers from here on, or from eval.answers, eval.formula or
# eval.sandbox: what was found before is then not mixed with what is found after.
SCORING = 1


@dataclass(frozen=True)
class Numbers:
    """Metrics by name, the standard errors of those that are means, and what is kept of each item."""

    metrics: dict[str, float]
    errors: dict[str, float]
    items: list[dict[str, Any]] = field(default_factory=list)


def choice_numbers(
    items: Sequence[Choice], found: Sequence[Sequence[Likelihood]], bare: Sequence[Sequence[Likelihood]] | None
) -> Numbers:
    """
    Args:
        found: of each item, the likelihoods of its choices.
        bare: the same after the unconditional context; None: not all items have one.
    """
    rows: list[dict[str, Any]] = []
    for place, (item, choices) in enumerate(zip(items, found, strict=True)):
        logprobs = [choice.logprob for choice in choices]
        texts = [choice.strip() or choice for choice in item.choices]
        scores = {
            "accuracy": logprobs,
            "accuracy_per_token": [choice.logprob / choice.tokens for choice in choices],
            "accuracy_per_character": [total / len(text) for total, text in zip(logprobs, texts, strict=True)],
            "accuracy_per_byte": [total / len(text.encode()) for total, text in zip(logprobs, texts, strict=True)],
        }
        if bare is not None:
            scores["accuracy_pmi"] = [total - b.logprob for total, b in zip(logprobs, bare[place], strict=True)]
        right = {name: float(max(range(len(s)), key=s.__getitem__) == item.gold) for name, s in scores.items()}
        rows.append({"id": item.id, "logprobs": logprobs, "gold": item.gold, **right})
    names = [name for name in rows[0] if name.startswith("accuracy")]
    numbers = means(rows, names)
    gold = [logprobs[item.gold].logprob for item, logprobs in zip(items, found, strict=True)]
    size = sum(len(item.choices[item.gold].encode()) for item in items)
    return Numbers({**numbers.metrics, "bits_per_byte": bits_per_byte(sum(gold), size)}, numbers.errors, rows)


def cloze_numbers(items: Sequence[Cloze], found: Sequence[Likelihood]) -> Numbers:
    """Accuracy (the answer is what greedy writing gives), perplexity per answer, bits per byte; a row for each item."""
    rows = [
        {"id": item.id, "logprob": value.logprob, "tokens": value.tokens, "accuracy": float(value.greedy is True)}
        for item, value in zip(items, found, strict=True)
    ]
    total = math.fsum(value.logprob for value in found)
    numbers = means(rows, ["accuracy"])
    metrics = {
        **numbers.metrics,
        "perplexity": exponential(-total / len(items)),
        "bits_per_byte": bits_per_byte(total, sum(len(item.continuation.encode()) for item in items)),
    }
    return Numbers(metrics, numbers.errors, rows)


def text_numbers(
    names: Sequence[str], logprobs: Sequence[float], tokens: Sequence[int], sizes: Sequence[int]
) -> Numbers:
    """
    Args:
        sizes: UTF-8 bytes of each text.
    """
    rows = [
        {"id": name, "logprob": logprob, "tokens": count, "bytes": size}
        for name, logprob, count, size in zip(names, logprobs, tokens, sizes, strict=True)
    ]
    total = math.fsum(logprobs)
    metrics = {
        "bits_per_byte": bits_per_byte(total, sum(sizes)),
        "perplexity": exponential(-total / sum(tokens)),
        "tokens": float(sum(tokens)),
    }
    return Numbers(metrics, {}, rows)


def means(rows: list[dict[str, Any]], names: Sequence[str]) -> Numbers:
    """Means over the rows, with standard errors (sample standard deviation / sqrt n) where there are two rows."""
    columns = {name: [float(row[name]) for row in rows] for name in names}
    errors = {name: statistics.stdev(c) / math.sqrt(len(c)) for name, c in columns.items() if len(c) > 1}
    return Numbers({name: statistics.fmean(column) for name, column in columns.items()}, errors, rows)


def bits_per_byte(logprob: float, size: int) -> float:
    """Of a natural logarithm and a number of bytes."""
    return -logprob / (math.log(2) * size)


def exponential(x: float) -> float:
    """exp(x), infinite where float64 ends."""
    return math.exp(x) if x < 709 else math.inf
