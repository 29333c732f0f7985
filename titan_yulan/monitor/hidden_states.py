"""Statistics of hidden states and of attention, from a forward pass of their own.

The pass reads a few rows, keeps no gradients and runs the blocks eagerly, so that what training has compiled or
captured stays as it is. The decoder shows its values at the points of `model.observer`.

Of a hidden state x (a token's vector of n features):

    mean = sum(x) / n      variance = sum((x - mean)^2) / (n - 1)      rms = sqrt(sum(x^2) / n)

each averaged over the tokens of all ranks. Rows that only fill up a batch do not count, nor does the filling of a
sequence that tensor parallelism cuts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from titan_yulan.model import Decoder
from titan_yulan.model.attend import AttentionContext
from titan_yulan.model.observer import Observer
from titan_yulan.model.scale import Alpha, combine
from titan_yulan.monitor.statistics import STATISTICS, Summands, layer_tag
from titan_yulan.objective.objective import Inputs

# Attention scores that exist at once; they and two temporaries of their size take 192 MiB in float32.
_SCORES = 2**24


class HiddenStates(Observer):
    """Sums the statistics of chosen layers while a forward pass goes on."""

    def __init__(self, layers: Sequence[int], heads: int, tokens: Tensor, stream_tokens: Tensor) -> None:
        """
        Args:
            layers: which blocks; what lies outside the blocks is always looked at.
            heads: number of query heads of all ranks together.
            tokens: (rows, this context-parallel rank's part of seq) bool, which ones count.
            stream_tokens: (rows, this rank's part of seq) bool, the same between the projections.
        """
        self._layers, self._heads = layers, heads
        self._tokens, self._stream_tokens = tokens, stream_tokens
        self._layer: int | None = None
        self._moments: dict[str, Tensor] = {}
        self._attention: dict[str, Tensor] = {}

    def enter(self, layer: int) -> None:
        self._layer = layer

    def see(self, point: str, x: Tensor, *factors: Alpha) -> None:
        layer = self._layer
        if point == "stream":  # what the block before has left
            if layer is not None and layer - 1 in self._layers:
                self._add(f"mlp_residual/{layer_tag(layer - 1)}", x)
        elif layer is None or point == "final_norm":
            self._add(point, x, *factors)
        elif layer in self._layers:
            self._add(f"{point}/{layer_tag(layer)}", x, *factors)

    def _add(self, name: str, x: Tensor, *factors: Alpha) -> None:
        factor = combine(factors, None)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if isinstance(factor, Tensor) or factor != 1.0:
            wide = wide / factor
        self._moments[name] = moment_sums(wide, self._stream_tokens)

    def see_attention(self, query: Tensor, key: Tensor, scale: float, context: AttentionContext) -> None:
        if self._layer is None or self._layer not in self._layers:
            return
        tag, tokens = layer_tag(self._layer), self._tokens
        for point, x in (("query", query), ("key", key)):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            self._moments[f"{point}/{tag}"] = moment_sums(wide, tokens[..., None].expand(wide.shape[:-1]))
        sharding = context.sharding
        keys = sharding.join_context(key)
        places = sharding.slice_context(torch.arange(keys.shape[1], device=keys.device), dim=0)
        sums = logsumexp_sums(query, keys, scale, context.mask, places if context.causal else None, tokens)
        first = sharding.tensor_rank * query.shape[2]
        by_head = sums.new_zeros(2, self._heads)
        by_head[0, first : first + query.shape[2]] = sums
        by_head[1, first : first + query.shape[2]] = tokens.sum()
        self._attention[tag] = by_head

    def summands(self) -> list[Summands]:
        """What was seen since the observer was made."""
        found = [
            Summands(
                tuple(f"hidden/{name}/{statistic}" for name in self._moments for statistic in STATISTICS),
                torch.stack(list(self._moments.values())),
                lambda sums: (sums[:, :-1] / sums[:, -1:]).flatten(),
            )
        ]
        if self._attention:
            names = (f"attention/{name}/{tag}" for tag in self._attention for name in ("logsumexp", "logsumexp_max"))
            found.append(Summands(tuple(names), torch.stack(list(self._attention.values())), _finish_attention))
        return found


def _finish_attention(sums: Tensor) -> Tensor:
    """(layers, 2, heads), sums and counts -> for each layer the mean over its heads and the largest of them."""
    by_head = sums[:, 0] / sums[:, 1]
    return torch.stack([by_head.mean(1), by_head.amax(1)], dim=1).flatten()


def moment_sums(x: Tensor, tokens: Tensor) -> Tensor:
    """Sums over the tokens that count of variance, mean and RMS of their vectors, and how many they are.

    Args:
        x: (..., features).
        tokens: (...) bool.

    Returns:
        (4,) float64.
    """
    variance, mean = torch.var_mean(x, dim=-1)
    size = x.shape[-1]
    rms = (mean.square() + variance * ((size - 1) / size)).sqrt()
    values = torch.stack([variance, mean, rms, torch.ones_like(mean)])
    return torch.where(tokens, values, 0.0).flatten(1).sum(1, dtype=torch.float64)


def logsumexp_sums(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, places: Tensor | None, tokens: Tensor
) -> Tensor:
    """For each head the sum, over the queries that count, of log(sum over visible keys of exp(scale * query . key)).

    Goes through the queries in parts, so that no more than `_SCORES` scores exist at once (or one query's).

    Args:
        query: (rows, queries, heads, head_dim).
        key: (rows, keys, key-value heads, head_dim).
        scale: multiplier of the scores.
        mask: (rows, 1, queries, keys) bool, True where a query may see a key; None: no mask.
        places: without a mask, (queries,) places in the row: a query sees the keys up to its own; None: it sees all.
        tokens: (rows, queries) bool, the queries that count.

    Returns:
        (heads,) float64.
    """
    rows, keys, groups, _ = key.shape
    heads = query.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    transposed = key.to(wide).permute(0, 2, 3, 1)  # (rows, groups, head_dim, keys)
    at_once = max(1, _SCORES // (rows * heads * keys))
    total = torch.zeros(heads, dtype=torch.float64, device=query.device)
    for start in range(0, query.shape[1], at_once):
        part = slice(start, start + at_once)
        # the queries of a group's heads side by side, so that keys need not be repeated for each head
        queries = query[:, part].to(wide).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
        scores = torch.matmul(queries.flatten(2, 3), transposed).unflatten(2, queries.shape[2:4]).mul_(scale)
        if mask is not None:
            scores.masked_fill_(~mask[:, :, None, part], -torch.inf)
        elif places is not None:
            hidden = torch.arange(keys, device=key.device) > places[part, None]
            scores.masked_fill_(hidden, -torch.inf)
        found = scores.logsumexp(-1).flatten(1, 2)  # (rows, heads, queries)
        total += torch.where(tokens[:, None, part], found, 0.0).sum((0, 2), dtype=torch.float64)
    return total


@torch.no_grad()
def observe(decoder: Decoder, inputs: Inputs, real: Tensor, layers: Sequence[int], causal: bool) -> list[Summands]:
    """Run the decoder once over some rows; all ranks together.

    Leaves weights gathered, as every pass without backward does (`parallel.fsdp.reshard`).

    Args:
        inputs: whole rows, as for `objective.forward`.
        real: (rows,) bool; False for rows that only fill up a batch.
        layers: which blocks are looked at.
        causal: a token sees only itself and tokens before it.
    """
    transformer, sharding = decoder.model, decoder.model.sharding
    ids, positions = inputs.input_ids, inputs.position_ids
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)
    tokens = sharding.slice_context(real[:, None].expand(ids.shape))
    # of tensor-parallel ranks each gets its part; what fills the last part up is in no rank's sequence
    stream_tokens = sharding.reduce_scatter_sequence(tokens[..., None].float())[..., 0] > 0
    observer = HiddenStates(layers, decoder.config.num_attention_heads, tokens, stream_tokens)
    before, transformer.observer = transformer.observer, observer
    try:
        with torch.compiler.set_stance("force_eager"):
            decoder(
                sharding.slice_context(ids),
                position_ids=sharding.slice_context(positions, dim=positions.ndim - 1),
                document_ids=inputs.document_ids,
                visible=None if inputs.visible is None else sharding.slice_context(inputs.visible, dim=2),
                causal=causal,
                head=_no_head,
            )
    finally:
        transformer.observer = before
    return observer.summands()


def _no_head(hidden: Tensor, weight: Tensor) -> Tensor:
    """Instead of logits or a loss, which nobody looks at."""
    return hidden
