"""Which documents are held out for validation: a pure function of names or content, never of order or seed.

by file       with many files: a file is held out when the hash of its name falls below the share. Sources that
              read the same files in different ways (built-in prose and math) thus hold out the same files.
by document   with few files: the hash of the document's content decides, so that two copies of a document never
              stand on both sides.
by tail       one plain-text file: its last share, from the start of a line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from titan_yulan.data import hashing
from titan_yulan.data.documents import InputFile
from titan_yulan.data.rows import Document

# By file only when several files are expected to be held out; else the share would be off by too much.
_MIN_HELD_OUT_FILES = 4


@dataclass(frozen=True)
class HoldOut:
    """How a source is divided; `by` is none, file, document or tail."""

    by: str
    share: float

    @classmethod
    def choose(cls, files: Sequence[InputFile], share: float) -> HoldOut:
        """The rule for these input files and this share of them (0 to 1)."""
        if share == 0:
            return cls("none", 0.0)
        if len(files) == 1 and files[0].kind == "text":
            return cls("tail", share)
        return cls("file" if len(files) * share >= _MIN_HELD_OUT_FILES else "document", share)

    def divide(self, file: InputFile, document: Document) -> Iterator[tuple[Document, bool]]:
        """The document with its side (True: held out); two documents when it is cut."""
        if self.by == "tail":
            text = document.text
            cut = int(len(text) * (1 - self.share))
            cut = text.rfind("\n", 0, cut) + 1 or cut
            yield Document(((text[:cut], True),)), False
            yield Document(((text[cut:], True),)), True
        elif self.by == "none":
            yield document, False
        else:
            subject = file.name if self.by == "file" else _content_hash(document)
            yield document, hashing.key("held out", subject) < self.share * 2.0**64


def _content_hash(document: Document) -> str:
    content = document.text.encode() if document.token_ids is None else document.token_ids.tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()
