"""How many ways the ranks are divided, checked against the model and the sequence; without torch, so that the launcher
and `config check` can ask before any process starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import ParallelSection
from titan_yulan.errors import UserError


@dataclass(frozen=True)
class Degrees:
    """The sizes of the mesh: ranks are numbered with `tensor` fastest, then `context`, `shard`, `replicate`."""

    replicate: int
    shard: int
    context: int
    tensor: int

    @property
    def data(self) -> int:
        """Parts that a global batch is cut into."""
        return self.replicate * self.shard

    @property
    def ranks(self) -> int:
        return self.data * self.context * self.tensor

    def describe(self) -> str:
        """One line for the log, such as `mesh: 8 ranks = 2 replicas x 2 shards x 1 context x 2 tensor`."""
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        replicas = "1 replica" if self.replicate == 1 else f"{self.replicate} replicas"
        shards = "1 shard" if self.shard == 1 else f"{self.shard} shards"
        return f"mesh: {ranks} = {replicas} x {shards} x {self.context} context x {self.tensor} tensor"


def resolve_degrees(section: ParallelSection, world_size: int, model: ModelConfig, sequence_length: int) -> Degrees:
    """The degrees of `[parallel]` with data_shard = -1 replaced by what the other degrees leave of the ranks.

    A vocabulary that `tensor` does not divide is allowed: the last ranks hold less of it.

    Args:
        world_size: ranks of the run.
        model: its heads, key-value heads and intermediate_size must be divisible by `tensor`.
        sequence_length: tokens of one row; 2 * context must divide it (each context rank holds two of 2 * context
            chunks, see `parallel/context.py`).

    Raises:
        UserError: a degree does not fit; the message names the key and the legal values.
    """
    _check_tensor(section.tensor, world_size, model)
    _check_context(section.context, section.tensor, world_size, sequence_length)
    shard = section.data_shard
    rest = world_size // (section.context * section.tensor)
    if shard == -1 and rest % section.data_replicate == 0:
        shard = rest // section.data_replicate
    if shard < 1 or section.data_replicate * shard != rest:
        raise UserError(
            f"parallel.data_replicate = {section.data_replicate}, parallel.data_shard = {section.data_shard}: "
            f"{world_size} ranks with context = {section.context} and tensor = {section.tensor} leave {rest} for "
            f"data_replicate x data_shard; legal: {', '.join(f'{r} x {rest // r}' for r in _divisors(rest))} "
            "(data_shard = -1 takes what is left)"
        )
    return Degrees(section.data_replicate, shard, section.context, section.tensor)


def _check_tensor(tensor: int, world_size: int, model: ModelConfig) -> None:
    legal = _legal_tensor(model)
    if tensor not in legal:
        raise UserError(
            f"parallel.tensor = {tensor} must divide model.num_attention_heads = {model.num_attention_heads}, "
            f"model.num_key_value_heads = {model.num_key_value_heads} and model.intermediate_size = "
            f"{model.intermediate_size}; legal for this model: {_list(legal)}"
        )
    if world_size % tensor:
        fitting = [degree for degree in legal if world_size % degree == 0]
        raise UserError(
            f"parallel.tensor = {tensor} does not divide the {world_size} ranks; legal for {world_size} ranks and this "
            f"model: {_list(fitting)}"
        )


def _check_context(context: int, tensor: int, world_size: int, sequence_length: int) -> None:
    rest = world_size // tensor
    legal = [degree for degree in _divisors(rest) if _chunks_fit(sequence_length, degree)]
    if context in legal:
        return
    why = (
        f"does not divide the {rest} ranks that tensor = {tensor} leaves of {world_size}"
        if rest % context
        else f"needs a phase.sequence_length that {2 * context} divides, not {sequence_length}"
    )
    raise UserError(
        f"parallel.context = {context} {why}; legal for {world_size} ranks, tensor = {tensor} and this length: "
        f"{_list(legal)}"
    )


def _legal_tensor(model: ModelConfig) -> list[int]:
    return _divisors(math.gcd(model.num_attention_heads, model.num_key_value_heads, model.intermediate_size))


def _chunks_fit(sequence_length: int, context: int) -> bool:
    return context == 1 or sequence_length % (2 * context) == 0


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _list(degrees: list[int]) -> str:
    return ", ".join(str(degree) for degree in degrees)
