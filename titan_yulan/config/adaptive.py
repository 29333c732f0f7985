"""Which sources of a mix `[adaptive]` adjusts: its groups, with their patterns resolved."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from titan_yulan.config.sections import AdaptiveSection

NO_GROUP = "no group holds two sources of this mix: there is nothing to adjust; put more into one, or remove every"


def adaptive_groups(section: AdaptiveSection, mixed: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Group name -> its sources among `mixed` (the sources of a mix with a share above 0), in their order.

    Groups of fewer than two sources have nothing to adjust and are left out. Without `groups`, all sources are one.
    """
    names = list(mixed)
    if not section.groups:
        groups = {"all": tuple(names)}
    else:
        groups = {
            group: tuple(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
            for group, patterns in section.groups.items()
        }
    return {group: members for group, members in groups.items() if len(members) > 1}
