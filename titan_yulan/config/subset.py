"""Which part of its sources a phase reads: `[phase] unique_tokens`."""

from __future__ import annotations

from titan_yulan.config.sections import PhaseSection, RunConfig
from titan_yulan.config.values import Tokens, amount


def unique_amount(phase: PhaseSection) -> int | None:
    """`unique_tokens` of a phase as a number."""
    value = phase.unique_tokens
    return int(value.value) if isinstance(value, Tokens) else value


def shares_of_unique(phase: PhaseSection) -> dict[str, int]:
    """Tokens that a phase reads of each source of its mix, which add up to `unique_tokens`; empty if it reads all."""
    unique = unique_amount(phase)
    if unique is None:
        return {}
    total, before, found = sum(amount(share) for share in phase.mix.values()), 0.0, {}
    for name, share in phase.mix.items():
        after = before + amount(share)
        found[name] = round(unique * after / total) - round(unique * before / total)
        before = after
    return {name: tokens for name, tokens in found.items() if amount(phase.mix[name])}


def source_limit(config: RunConfig, name: str) -> int | None:
    """Tokens of a source that a run reads, the same in all its phases (config/check.py); None: all of them."""
    for phase in config.phases:
        if (limit := shares_of_unique(phase).get(name)) is not None:
            return limit
    return None
