"""`max_documents` and `max_tokens`: the first documents of the input, in its order and after all filters.

Both count the training part; the document that reaches a limit is the last one taken, whole. What stands behind it is
not there at all: not held out, and not among the duplicates. Source of the rule: the subsets of arXiv 2305.16264 and
2507.15857 are the first documents of their corpus.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from titan_yulan.data.request import Recipe
from titan_yulan.data.unit import UnitCounts

if TYPE_CHECKING:
    from titan_yulan.data.arrange import Units


def reached(recipe: Recipe, counts: Iterable[UnitCounts]) -> bool:
    """Whether these units, the first of the input, are surely enough: with duplicates only all of them are."""
    if not recipe.limited or recipe.deduplicate:
        return False
    documents = tokens = 0
    for unit in counts:
        documents, tokens = documents + unit.documents[0], tokens + unit.tokens[0]
    return bool(_at_limit(recipe, np.array([documents]), np.array([tokens]))[0])


def documents_within(units: Units, kept: np.ndarray | None) -> tuple[int, int]:
    """How far the limits reach into the input.

    Args:
        units: the input, or as much of its start as is enough.
        kept: (documents,) bool, false for duplicates; None: there are none.

    Returns:
        documents of the input, held-out ones and duplicates among them, up to the last one taken; and the units that
        they stand in. All of them where no limit is reached.
    """
    first = documents = tokens = 0
    for unit in range(len(units.counts)):
        records = units.records(unit)
        taken = ~records["held_out"]
        if kept is not None:
            taken &= kept[first : first + len(records)]
        all_documents = documents + np.cumsum(taken)
        all_tokens = tokens + np.cumsum(np.where(taken, records["length"], 0))
        found = np.flatnonzero(_at_limit(units.recipe, all_documents, all_tokens))
        if len(found):
            return first + int(found[0]) + 1, unit + 1
        if len(records):
            documents, tokens = int(all_documents[-1]), int(all_tokens[-1])
        first += len(records)
    return first, len(units.counts)


def _at_limit(recipe: Recipe, documents: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Whether so many documents and tokens reach a limit."""
    found = np.zeros(len(documents), bool)
    if recipe.max_documents is not None:
        found |= documents >= recipe.max_documents
    if recipe.max_tokens is not None:
        found |= tokens >= recipe.max_tokens
    return found
