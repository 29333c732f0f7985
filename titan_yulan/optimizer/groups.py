"""Which parameter learns at which rate and decays by how much: one table, checked to cover every parameter once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import OptimizerSection


@dataclass(frozen=True)
class Group:
    """Parameters whose full name matches `pattern` (searched), with their learning-rate multiplier and weight decay."""

    name: str
    pattern: str
    learning_rate: float
    weight_decay: float


def group_table(model: ModelConfig, section: OptimizerSection) -> list[Group]:
    """The muP groups of YuLan-Mini (arXiv 2412.17743, table 3): matrices learn at eta / (hidden_size / base_width),
    everything else (embedding, tied head, biases, norms, WeSaR scalars) at eta. Decay applies to all by default."""
    matrices = section.base_width / model.hidden_size if section.base_width else 1.0

    def decay(own: float | None) -> float:
        return section.weight_decay if own is None else own

    head = "" if model.tie_word_embeddings else r"|^lm_head\.weight$"
    table = [
        Group("matrices", rf"_proj\.weight${head}", matrices, decay(None)),
        Group("embedding", r"embed_tokens\.weight$", 1.0, decay(None)),
        Group("norms", r"norm(s\.\d+)?\.weight$", 1.0, decay(section.weight_decay_norms)),
    ]
    if model.attention_bias:
        table.append(Group("biases", r"\.bias$", 1.0, decay(section.weight_decay_biases)))
    if model.wesar:
        table.append(Group("scalars", r"_alpha$", 1.0, decay(section.weight_decay_scalars)))
    return table


def assign(names: Iterable[str], table: list[Group]) -> dict[str, list[str]]:
    """Names of each group, in the given order.

    Raises:
        ValueError: a parameter is in no group or in two, or a group is empty. This is a mistake in the table, not a
            user's.
    """
    assigned: dict[str, list[str]] = {group.name: [] for group in table}
    for name in names:
        found = [group.name for group in table if re.search(group.pattern, name)]
        if len(found) != 1:
            raise ValueError(f"parameter {name!r} must be in exactly one optimizer group, but is in {found or 'none'}")
        assigned[found[0]].append(name)
    for group in table:
        if not assigned[group.name]:
            raise ValueError(f"optimizer group {group.name!r}: its pattern {group.pattern!r} matches no parameter")
    return assigned
