"""Checkpoints with tensors and a tokenizer, as a run leaves them, for the tests of what is written from them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from tests.checkpoint.making import make_state
from tests.curriculum.making import configuration, phase
from titan_yulan.checkpoint import layout, store
from titan_yulan.checkpoint.export_check import TEXT
from titan_yulan.checkpoint.files import HashingWriter
from titan_yulan.checkpoint.layout import TrainerState
from titan_yulan.config import to_toml
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import TokenizerSection
from titan_yulan.data import bpe
from titan_yulan.data.tokenizer import Tokenizer, save_ranks
from titan_yulan.model import Decoder
from titan_yulan.parallel.degrees import Degrees
from titan_yulan.parallel.fsdp import is_replicated
from titan_yulan.parallel.mesh import build_mesh
from titan_yulan.parallel.process import World

# As in the published model: WeSaR, muP, grouped queries, biases of q, k and v, one embedding for both ends.
YULAN = ModelConfig(
    vocab_size=330,
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)

STEP = 3


def write_vocabulary(path: Path, size: int = 320) -> Tokenizer:
    """A small tiktoken file, trained on a Python file and on text in many scripts."""
    save_ranks(path, bpe.train_bpe([Path(bpe.__file__).read_text(), TEXT], size))
    return Tokenizer.load(path)


def random_state(model: ModelConfig, seed: int = 6) -> dict[str, Tensor]:
    """Values for every parameter, scalars and norm weights around 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (1.0 if is_replicated(name) and model.rms_norm_style != "gemma" else 0.0)
        + 0.3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in Decoder(model).state_dict().items()
    }


def describe(model: ModelConfig, tokenizer: Path, **phase_options: Any) -> tuple[str, TrainerState]:
    """config.toml and state of a checkpoint in the second phase, whose rotary base is its own."""
    phases = phase("first", "2 steps", {"x": 1.0}), phase("second", "4 steps", {"x": 1.0}, **phase_options)
    config = replace(configuration(*phases, tokenizer=TokenizerSection(path=str(tokenizer))), model=model)
    return to_toml(config), make_state(STEP, phase="second", tokenizer=Tokenizer.load(tokenizer).fingerprint)


def write_checkpoint(
    folder: Path,
    model: ModelConfig,
    tensors: dict[str, Tensor],
    tokenizer: Path,
    optimizer: dict[str, Tensor] | None = None,
    **phase_options: Any,
) -> Path:
    """A checkpoint of one process, below the run folder `folder`."""
    toml, state = describe(model, tokenizer, **phase_options)
    path = layout.step_folder(folder / "checkpoints", STEP)
    path.mkdir(parents=True)
    writer = HashingWriter(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save({"model": tensors, "optimizer": optimizer or {}}, storage_writer=writer, no_dist=True)
    layout.commit(path, writer.hashing.files, state, toml)
    return path


def write_sharded(world: World, folder: Path, model: ModelConfig, tokenizer: Path) -> None:
    """The checkpoint of `random_state`, each rank with its part of every matrix. For `run_ranks`."""
    mesh = build_mesh(Degrees(1, world.size, 1, 1), "cpu").fsdp
    tensors = {
        name: tensor if is_replicated(name) else distribute_tensor(tensor, mesh, [Shard(0)])
        for name, tensor in random_state(model).items()
    }
    toml, state = describe(model, tokenizer)
    store.save(folder / "checkpoints", {"model": tensors}, state, toml, world, keep=1)
