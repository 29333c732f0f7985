"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# A busy machine is no failure: nothing here is a test of speed.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
