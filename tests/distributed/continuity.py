"""What four ranks do for test_continuity.py: begin from Hugging Face folders, and re-balance what they have trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.checkpoint.hugging_face_folders import LLAMA, YULAN, run_config
from tests.distributed.bodies import everything
from tests.distributed.layout_cases import TAPES, Case, make_learner
from titan_yulan.checkpoint.hugging_face import HuggingFaceFolder, check_hugging_face, open_hugging_face
from titan_yulan.checkpoint.hugging_face_weights import load_hugging_face
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import ActivationCheckpointSection, CompileSection, ParallelSection
from titan_yulan.errors import RunError
from titan_yulan.model.sharding import local
from titan_yulan.optimizer.rebalance import rebalance
from titan_yulan.parallel.degrees import resolve_degrees
from titan_yulan.parallel.fsdp import ShardedDecoder, reshard
from titan_yulan.parallel.mesh import build_mesh
from titan_yulan.parallel.parallelize import build_decoder, part_of
from titan_yulan.parallel.process import World

WORLD = 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "FSDP 4, offloaded": {"cpu_offload": True},
    "FSDP 2 x TP 2": {"tensor": 2},
    "HSDP 2 x 2": {"data_replicate": 2},
}
IDS = torch.randint(37, (2, 11), generator=torch.Generator().manual_seed(4))
RMS = 0.02


def continuity(world: World, llama: Path, yulan: Path) -> dict[str, Any]:
    return {
        "llama": {name: load(world, llama, LLAMA, degrees) for name, degrees in LAYOUTS.items()},
        "yulan": {name: load(world, yulan, YULAN, degrees) for name, degrees in LAYOUTS.items()},
        "failure": fail(world, llama),
        "rebalanced": {name: rebalance_trained(world, degrees) for name, degrees in LAYOUTS.items()},
    }


def make_decoder(world: World, model: ModelConfig, degrees: dict[str, Any]) -> ShardedDecoder:
    section = ParallelSection(compute_dtype="float32", **degrees)
    mesh = build_mesh(resolve_degrees(section, world.size, model, 12), "cpu")
    plain = ActivationCheckpointSection(), CompileSection()
    return build_decoder(model, section, mesh, 1, world.device, *plain)


def load(world: World, path: Path, model: ModelConfig, degrees: dict[str, Any]) -> dict[str, Any]:
    """The logits of all ranks together, and the tensors of which this rank has another part than it should."""
    decoder, folder = make_decoder(world, model, degrees), open_hugging_face(path)
    check_hugging_face(run_config(model), folder)
    load_hugging_face(folder, dict(decoder.named_parameters()), world.host)
    wholes: dict[str, Tensor] = {}
    for file in path.glob("*.safetensors"):
        wholes |= load_file(file)
    differs = [
        name
        for name, parameter in decoder.named_parameters()
        if not torch.equal(local(parameter), part_of(wholes[name].float().reshape(parameter.shape), parameter))
    ]
    return {"logits": logits(decoder, IDS), "differs": differs}


@torch.no_grad()
def logits(decoder: nn.Module, ids: Tensor) -> Tensor:
    found = decoder(ids).clone()
    reshard(decoder)
    return found


def fail(world: World, path: Path) -> str:
    """What every rank says when one of them cannot read a file."""
    decoder, folder = make_decoder(world, LLAMA, {}), open_hugging_face(path)
    if world.rank == 2:
        lost = {name: replace(tensor, file=path / "lost") for name, tensor in folder.tensors.items()}
        folder = HuggingFaceFolder(path, folder.model, lost)
    try:
        load_hugging_face(folder, dict(decoder.named_parameters()), world.host)
    except RunError as error:
        return str(error)
    return "nothing"


def rebalance_trained(world: World, degrees: dict[str, Any]) -> dict[str, Any]:
    """Whole tensors and logits before and after, after two steps; and what a step does to it then."""
    learner = make_learner(Case(WORLD, "", degrees, model="grouped"), world)
    with learner.loader(0, TAPES) as loader:
        batches = [next(loader) for _ in range(3)]
        for step in range(2):
            learner.train_step(step, batches[step])
        before, first = everything(learner), logits(learner.decoder, IDS)
        rebalance(learner.decoder, learner.optimizer, RMS)
        after, second = everything(learner), logits(learner.decoder, IDS)
        values = learner.train_step(2, batches[2])
    loss = float(values.totals[0] / values.denominator)
    return {"before": before, "after": after, "logits": (first, second), "loss": loss}
