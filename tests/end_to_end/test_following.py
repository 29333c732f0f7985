"""What the miniature's script looks for in the stream is found when it is there."""

from __future__ import annotations

import numpy as np
import pytest

from tests.end_to_end.miniature import follow

END = 9
TEXTS = [[1, 2, END], [3, END], [4, 5, 6, END], [3, END]]  # two are equal
DOCUMENTS = [np.array(text, np.int32).tobytes() for text in TEXTS]


@pytest.mark.parametrize(
    ("order", "again"),
    [
        ((0, 1, 2, 3), 0),
        ((3, 2, 1, 0, 1, 0, 3, 2), 0),  # two epochs
        ((1, 3, 0, 2, 1, 3, 1), 1),  # three times the text that is there twice
        ((0, 1, 0, 2), 1),
        ((2, 2), 1),
    ],
)
def test_a_document_that_comes_again_is_counted(order: tuple[int, ...], again: int) -> None:
    stream = np.array([token for document in order for token in TEXTS[document]] + [4, 5], np.int32)
    reading = follow(stream, DOCUMENTS, END)
    assert (reading.documents, reading.again) == (len(order), again)
    assert reading.epochs == pytest.approx(len(stream) / 11)


def test_tokens_that_are_no_document_are_counted() -> None:
    assert follow(np.array([1, END, 3, END], np.int32), DOCUMENTS, END).again == 1
