"""Who is shown what a decoder computes inside its forward pass.

The decoder says at every point of interest what it has there; by default nobody looks, and in a compiled block nothing
is left of the calls. `monitor/hidden_states.py` has one who looks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from titan_yulan.model.scale import Alpha

if TYPE_CHECKING:
    from titan_yulan.model.attend import AttentionContext


class Observer:
    """Looks away.

    The points outside the blocks are "embedding", "embedding_gradient_scale", "embedding_norm" and "final_norm"; in a
    block "stream" (the residual stream before the block: the embedding and all that blocks before have added; after
    the last block it is shown once more), "input_norm", "attention_output", "attention_residual", "post_norm" and
    "mlp_output".
    """

    def enter(self, layer: int) -> None:
        """What is shown from now on belongs to block `layer`; the number of blocks itself stands for what follows."""

    def see(self, point: str, x: Tensor, *factors: Alpha) -> None:
        """x: (batch, this rank's part of seq, hidden), the value at `point` times the factors."""

    def see_attention(self, query: Tensor, key: Tensor, scale: float, context: AttentionContext) -> None:
        """(batch, seq, this rank's heads or key-value heads, head_dim) as they are attended with; under context
        parallelism this rank's part of seq. `scale` multiplies the scores."""
