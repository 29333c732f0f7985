"""When Python looks for garbage: where the trainer says, on all ranks at the same step.

Python itself does so after so many allocations, on every rank at another moment, and then all ranks wait for one.
Almost everything is freed without it; what it finds are objects that refer to one another in a circle.
"""

from __future__ import annotations

import gc


class GarbageCollection:
    """Python's own collection, switched off while it is held; behind `with` it is not."""

    def __init__(self) -> None:
        self._held = False

    def __enter__(self) -> GarbageCollection:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def hold(self) -> None:
        """Collect only on request, and never look again at what is alive now: model, optimizer, compiled code."""
        if not self._held and gc.isenabled():
            self._held = True
            gc.collect()
            gc.freeze()
            gc.disable()

    def release(self) -> None:
        """Leave it to Python again, as while a model is built anew and the one before is to be freed."""
        if self._held:
            self._held = False
            gc.unfreeze()
            gc.enable()

    def collect(self) -> None:
        """Free what has become garbage since it is held."""
        if self._held:
            gc.collect()
