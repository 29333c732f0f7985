"""Python's collector, held by a run."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from titan_yulan.monitor.garbage import GarbageCollection


class Circle:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_circle_is_freed_when_asked(restored: None) -> None:
    with GarbageCollection() as garbage:
        garbage.hold()
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        lost = weakref.ref(Circle())
        assert lost() is not None
        garbage.collect()
        assert lost() is None


def test_what_was_alive_is_looked_at_again_after_release() -> None:
    with GarbageCollection() as garbage:
        old = Circle()  # such as a model, before it is built anew
        lost = weakref.ref(old)
        garbage.hold()
        del old
        garbage.collect()
        assert lost() is not None
        garbage.release()
        gc.collect()
        assert lost() is None


def test_a_collector_that_is_switched_off_stays_off() -> None:
    gc.disable()
    try:
        with GarbageCollection() as garbage:
            garbage.hold()
            garbage.release()
        assert not gc.isenabled() and gc.get_freeze_count() == 0
    finally:
        gc.enable()
