"""What an objective asks of attention, as far as memory and time depend on it. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from titan_yulan.config.sections import ObjectiveSection


@dataclass(frozen=True)
class Pattern:
    """Who sees whom in training."""

    objective: ObjectiveSection

    @property
    def causal(self) -> bool:
        """Whether a token sees only those up to itself."""
        return self.objective.kind != "masked_diffusion"

    @property
    def masked(self) -> bool:
        """Whether attention is given a mask: a kernel that takes one gets a number for every pair of tokens, and keys
        and values repeated for every head of the queries."""
        return self.objective.document_mask or self.drawn

    @property
    def drawn(self) -> bool:
        """Whether that mask is drawn, for the whole rows of a step before its first forward pass."""
        return self.objective.token_mask_share > 0

    @property
    def whole_square(self) -> bool:
        """Whether scores are computed for all pairs of tokens, not only for the half that causal attention needs."""
        return self.masked or not self.causal

    @property
    def own_positions(self) -> bool:
        """Whether every row has rotary positions of its own, and so tables of its own."""
        return self.objective.restart_positions or self.objective.orders > 1
