"""A decoder for the tests of recomputation and compilation, and what they measure of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titan_yulan.config.model import ModelConfig
from titan_yulan.model import Decoder

LAYERS = 4
VOCABULARY = 97
CONFIG = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=120,
    intermediate_size=300,
    num_hidden_layers=LAYERS,
    num_attention_heads=6,
    num_key_value_heads=2,
)


def make_decoder(dtype: torch.dtype = torch.float64, config: ModelConfig = CONFIG) -> Decoder:
    """A decoder whose every parameter is drawn at random, always the same."""
    decoder = Decoder(config).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_gain = name.endswith(("_alpha", "norm.weight"))
            parameter.copy_(1 + 0.1 * noise if is_gain else 0.1 * noise)
    return decoder


def make_ids(rows: int = 2, length: int = 32) -> Tensor:
    """(rows, length) token ids, always the same."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(7))


def gradients(decoder: Decoder, ids: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter, of a loss that is some function of the logits."""
    decoder.zero_grad()
    decoder(ids).square().mean().backward()
    return {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}


class Storages(TorchDispatchMode):
    """Notes the memory of every tensor that an operator makes, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.bytes[StorageWeakRef(storage)] = storage.nbytes()
        return made


def kept_bytes(decoder: Decoder, ids: Tensor) -> int:
    """Bytes of activations that are still alive between forward and backward of a decoder that is not compiled.

    What selective checkpointing keeps never passes `saved_tensors_hooks`, so the memory itself is watched.
    """
    with Storages() as storages:
        loss = decoder(ids).square().mean()
    weights = {StorageWeakRef(parameter.untyped_storage()) for parameter in decoder.parameters()}
    kept = sum(size for ref, size in storages.bytes.items() if not ref.expired() and ref not in weights)
    loss.backward()
    return kept


def compiled_kept_bytes(decoder: Decoder, ids: Tensor) -> int:
    """The same for a compiled decoder, whose graphs hand over all that they keep as saved tensors."""
    weights = {StorageWeakRef(parameter.untyped_storage()) for parameter in decoder.parameters()}
    kept: dict[StorageWeakRef, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[StorageWeakRef(storage)] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = decoder(ids).square().mean()
    loss.backward()
    return sum(size for ref, size in kept.items() if ref not in weights)
