"""The first steps of a model are not like those to come: they compile. What changes when they are over."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from titan_yulan.monitor.garbage import GarbageCollection
from titan_yulan.monitor.watchdog import Watchdog
from titan_yulan.parallel.compile import CompileWatch

# After the model is built anew, compiling is no surprise for so many steps.
_STEPS = 2
# Steps between two collections, at most: what a step leaves for them is some thousand small objects, and no tensor.
_COLLECT_EVERY = 50


class Settling:
    """Until the steps have settled the watchdog is patient, Python collects garbage when it likes, and compilations are
    told in one line; afterwards each is a warning."""

    def __init__(self, watchdog: Watchdog, garbage: GarbageCollection, rank: int, say: Callable[[str], None]) -> None:
        self._watchdog, self._garbage, self._rank, self._say = watchdog, garbage, rank, say
        self._compilations = CompileWatch()
        self.built()

    def built(self) -> None:
        """The model is about to be built anew."""
        self._garbage.release()
        self._left = _STEPS

    def measured(self) -> None:
        """A validation was made: a forward pass alone is compiled at its first use."""
        self._left = max(self._left, 1)

    def step(self) -> AbstractContextManager[None]:
        """Goes around a step."""
        return self._watchdog.patient("a step that may compile") if self._left else nullcontext()

    def after(self, step: int, printed: bool) -> None:
        """Say what was compiled when it was to be expected, and complain when it was not; collect garbage now and then.

        Args:
            printed: whether a line was printed, which waits for the device anyway.
        """
        if self._left:
            self._left -= 1
            if not self._left:
                self._watchdog.settle()
                self._garbage.hold()
                if line := self._compilations.settle():
                    self._say(line)
            return
        if printed or step % _COLLECT_EVERY == 0:
            self._garbage.collect()
        for line in self._compilations.recompiled():
            print(f"WARNING: step {step}, rank {self._rank}: {line}")
