"""Text that is shown while its tokens are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from titan_yulan.data.tokenizer import Tokenizer

_KEPT = 16  # tokens that are decoded again with the next one; no rule of a tokenizer looks further back
_BROKEN = "\ufffd"


class TextStream:
    """Turns tokens into text, whole characters only: one that is spread over tokens is shown with its last.

    A token's text can depend on those before it (a blank at the beginning of a text, a run of single bytes), so the
    last ones of the prompt are decoded with it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], write: Callable[[str], None]) -> None:
        self._decode, self._write = tokenizer.decode, write
        self._ids = list(prompt[-_KEPT:])
        self._shown = len(self._decode(self._ids))

    def add(self, token: int) -> None:
        """Write what the token completes."""
        self._ids.append(token)
        text = self._decode(self._ids)
        self._show(text.rstrip(_BROKEN))
        if len(self._ids) >= 4 * _KEPT and not text.endswith(_BROKEN):
            self._ids = self._ids[-_KEPT:]
            self._shown = len(self._decode(self._ids))

    def close(self) -> None:
        """Write the rest: bytes that became no character show as U+FFFD."""
        self._show(self._decode(self._ids))

    def _show(self, text: str) -> None:
        if len(text) > self._shown:
            self._write(text[self._shown :])
            self._shown = len(text)


class InOrder:
    """Passes on the pieces of texts that grow side by side as if they grew one behind the other."""

    def __init__(self, heads: Sequence[str], write: Callable[[str], None]) -> None:
        """`heads`: the beginning of each text."""
        self._write = write
        self._held = list(heads)
        self._done = [False] * len(heads)
        self._current = 0
        self._flush()

    def add(self, number: int, piece: str) -> None:
        """More of a text."""
        self._held[number] += piece
        self._flush()

    def close(self, number: int, piece: str = "\n") -> None:
        """The end of a text."""
        self._held[number] += piece
        self._done[number] = True
        self._flush()

    def _flush(self) -> None:
        while self._current < len(self._held):
            if self._held[self._current]:
                self._write(self._held[self._current])
                self._held[self._current] = ""
            if not self._done[self._current]:
                return
            self._current += 1
