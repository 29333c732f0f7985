"""Folders in DeepSpeed's universal layout for tests: a decoder of ours with Adam's moments, as they are published."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.checkpoint.hugging_face_folders import YULAN
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import OptimizerSection
from titan_yulan.model import Decoder

# Besides what tensor parallelism must cut evenly, no size divides by 2.
MODEL = replace(YULAN, vocab_size=259, hidden_size=31)
OPTIMIZER = OptimizerSection(learning_rate=0.01, base_width=16, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
# Another one than the number of updates that Adam has made, and another than the phase's first.
GLOBAL_STEP, UPDATES, PHASE_BEGAN = 5, 3, 4


@dataclass
class Peer:
    """What trained before: plain torch, with muP's groups written out."""

    decoder: Decoder
    optimizer: torch.optim.AdamW

    def step(self, seed: int) -> None:
        for name, parameter in self.decoder.named_parameters():
            parameter.grad = gradient(name, tuple(parameter.shape), seed)
        self.optimizer.step()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """{parameter: {"fp32", "exp_avg", "exp_avg_sq", "step"}}, copies."""
        return {
            name: {"fp32": parameter.detach().clone()}
            | {key: value.clone() for key, value in self.optimizer.state[parameter].items()}
            for name, parameter in self.decoder.named_parameters()
        }


def gradient(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random, of other sizes for every parameter, the same wherever it is computed."""
    generator = torch.Generator().manual_seed(seed * 1000 + sum(map(ord, name)))
    return torch.randn(shape, generator=generator) * 10.0 ** (-(len(name) % 4))


def make_peer(model: ModelConfig = MODEL) -> Peer:
    """A decoder that has made `UPDATES` updates."""
    torch.manual_seed(8)
    decoder = Decoder(model)
    matrices = [p for n, p in decoder.named_parameters() if n.endswith("_proj.weight")]
    others = [p for n, p in decoder.named_parameters() if not n.endswith("_proj.weight")]
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    slow = {"params": matrices, "lr": OPTIMIZER.learning_rate * OPTIMIZER.base_width / model.hidden_size}
    groups: list[dict[str, Any]] = [slow, {"params": others, "lr": OPTIMIZER.learning_rate}]
    options = {"betas": OPTIMIZER.betas, "eps": OPTIMIZER.eps, "weight_decay": OPTIMIZER.weight_decay}
    peer = Peer(decoder, torch.optim.AdamW(groups, **options))
    for seed in range(UPDATES):
        peer.step(seed)
    return peer


def in_dictionary(name: str, state: str, tensor: Tensor) -> Any:
    """As ZeRO-1 and 2 are converted."""
    return {"param": tensor, "cat_dim": 0}


def flat(name: str, state: str, tensor: Tensor) -> Any:
    """As ZeRO-3 is converted."""
    return tensor.flatten()


def write_universal(
    path: Path,
    state: Mapping[str, Mapping[str, Tensor]],
    model: ModelConfig = MODEL,
    form: Callable[[str, str, Tensor], Any] = in_dictionary,
    steps: bool = True,
) -> Path:
    """The published layout; returns the folder of the states."""
    states = path / f"global_step{GLOBAL_STEP}_universal"
    for name, tensors in state.items():
        (states / "zero" / name).mkdir(parents=True)
        for key, tensor in tensors.items():
            file = states / "zero" / name / f"{key}.pt"
            if key != "step":
                # scalars that YuLan-Mini's trainer has with shape ()
                scalar = name.endswith("_alpha") and "self_attn" not in name
                torch.save(form(name, key, tensor.reshape(()) if scalar else tensor), file)
            elif steps:
                torch.save(int(tensor), file)
    torch.save({"param_groups": [{"lr": 0.01}]}, states / "zero" / "optimizer_state.pt")
    (path / "latest_universal").write_text(states.name)
    published = model.to_published() | {"num_steps_trained_before_this_epoch": PHASE_BEGAN}
    (path / "config.json").write_text(json.dumps(published))
    (path / "trainer_state.json").write_text(json.dumps({"global_step": GLOBAL_STEP, "epoch": 1.0, "log_history": []}))
    return states
