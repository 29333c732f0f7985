"""What two ranks do for test_published_starts.py: take up a state of DeepSpeed in two layouts, and train from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.checkpoint.universal_folders import MODEL, OPTIMIZER, UPDATES, gradient
from tests.distributed.bodies import full
from titan_yulan.checkpoint.universal import UniversalFolder, open_universal
from titan_yulan.checkpoint.universal_state import load_universal
from titan_yulan.config.sections import ActivationCheckpointSection, CompileSection, ParallelSection, RunConfig
from titan_yulan.errors import RunError
from titan_yulan.model.sharding import local
from titan_yulan.optimizer.adamw import build_adamw, optimizer_state, set_learning_rate
from titan_yulan.parallel.degrees import resolve_degrees
from titan_yulan.parallel.mesh import build_mesh
from titan_yulan.parallel.parallelize import build_decoder, part_of
from titan_yulan.parallel.process import World
from titan_yulan.train import train

WORLD = 2
LAYOUTS: dict[str, dict[str, Any]] = {"FSDP 2, offloaded": {"cpu_offload": True}, "TP 2": {"tensor": 2}}


def universal(world: World, path: Path, runs: Mapping[str, RunConfig]) -> dict[str, Any]:
    return {
        "next": {name: next_step(world, path, degrees) for name, degrees in LAYOUTS.items()},
        "failure": fail(world, path),
        "outcomes": {name: train(config) for name, config in runs.items()},
    }


def next_step(world: World, path: Path, degrees: dict[str, Any]) -> dict[str, Tensor]:
    """Whole weights, moments and steps after the update that follows."""
    decoder, optimizer = build(world, degrees)
    load_universal(
        open_universal(path), dict(decoder.named_parameters()), optimizer_state(decoder, optimizer), world.host
    )
    for name, parameter in decoder.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
        local(parameter.grad).copy_(part_of(gradient(name, tuple(parameter.shape), UPDATES), parameter))
    set_learning_rate(optimizer, OPTIMIZER.learning_rate)
    optimizer.step()
    state = full(optimizer_state(decoder, optimizer))
    return state | {f"{n}.fp32": t for n, t in full(dict(decoder.named_parameters())).items()}


def build(world: World, degrees: dict[str, Any]) -> Any:
    section = ParallelSection(compute_dtype="float32", **degrees)
    mesh = build_mesh(resolve_degrees(section, world.size, MODEL, 12), "cpu")
    plain = ActivationCheckpointSection(), CompileSection()
    decoder = build_decoder(MODEL, section, mesh, 1, world.device, *plain)
    return decoder, build_adamw(decoder, MODEL, OPTIMIZER)


def fail(world: World, path: Path) -> str:
    """What every rank says when one of them cannot read a moment."""
    folder = open_universal(path)
    if world.rank == 1:
        moment = folder.moments["exp_avg"]
        lost = {name: replace(tensor, file=path / "lost") for name, tensor in moment.tensors.items()}
        moments = {**folder.moments, "exp_avg": replace(moment, tensors=lost)}
        folder = UniversalFolder(path, folder.weights, moments, folder.steps, folder.progress)
    decoder, optimizer = build(world, {})
    try:
        load_universal(folder, dict(decoder.named_parameters()), optimizer_state(decoder, optimizer), world.host)
    except RunError as error:
        return str(error)
    return "nothing"
