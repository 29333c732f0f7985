"""Statistics over ranks are those of one process that sees all, and training does not notice them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.distributed.layout_cases import MODELS, TAPES
from tests.distributed.ranks import run_ranks
from tests.distributed.statistics_ranks import CASES, LAYERS, ROWS, body, statistics_config
from tests.monitor.expected_statistics import expected_hidden
from titan_yulan.curriculum.plan import Plan
from titan_yulan.data.loader import Batch, read_rows
from titan_yulan.model import Decoder
from titan_yulan.monitor.statistics import sampled_layers
from titan_yulan.objective.next_token import NextToken
from titan_yulan.optimizer.groups import assign, group_table

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found() -> Found:
    return run_ranks(body, 2)


def second_batch(case: str) -> Batch:
    config = statistics_config(*CASES[case])
    phase = Plan(config).phases[0]
    rows = phase.batch_rows
    return read_rows(phase, TAPES, np.arange(rows, 2 * rows), rows)


def double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in state.items()}


def check(
    found: dict[str, float], wanted: dict[str, float], prefixes: tuple[str, ...], rel: float = 0.0, abs: float = 0.0
) -> None:
    mine = {name: value for name, value in found.items() if name.startswith(prefixes)}
    assert sorted(mine) == sorted(wanted)
    for name, value in wanted.items():
        assert mine[name] == pytest.approx(value, rel=rel, abs=abs), name


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_and_only_steps_that_are_due_are_observed(case: str, found: Found) -> None:
    first, second = (rank[case] for rank in found)
    assert first["statistics"] == second["statistics"]
    assert first["first"] is None
    assert all(math.isfinite(value) for value in first["statistics"].values())


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_are_those_of_the_rows_of_all_ranks(case: str, found: Found) -> None:
    config = MODELS[CASES[case][0].model]
    batch = second_batch(case)
    # data-parallel ranks have 4 and 3 rows, others all the same first 4
    rows = 7 if case in ("FSDP 2", "replicas 2") else ROWS
    inputs = NextToken(statistics_config(*CASES[case]).objective, 2).inputs(batch)
    documents = None if inputs.document_ids is None else inputs.document_ids[:rows]
    positions = None if inputs.position_ids is None else inputs.position_ids[:rows]
    layers = sampled_layers(config.num_hidden_layers, LAYERS)
    state = double(found[0][case]["before"])
    wanted = expected_hidden(state, config, inputs.input_ids[:rows], layers, documents, positions)
    check(found[0][case]["statistics"], wanted, ("hidden/", "attention/"), rel=2e-5, abs=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_weights_and_scalars(case: str, found: Found) -> None:
    config, after = MODELS[CASES[case][0].model], double(found[0][case]["after"])
    wanted: dict[str, float] = {}
    for layer in sampled_layers(config.num_hidden_layers, LAYERS):
        block, tag = f"model.layers.{layer}.", f"layer_{layer:02d}"
        for kind in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"):
            weight, name = after[f"{block}{kind}_proj.weight"], f"weight/{kind.split('.')[1]}_proj/{tag}"
            rms = weight.square().mean().sqrt()
            wanted |= {f"{name}/variance": weight.var().item(), f"{name}/mean": weight.mean().item()}
            wanted[f"{name}/rms"] = rms.item()
        scalars = [name for name in after if name.startswith(block) and name.endswith("_alpha")]
        assert len(scalars) == 8
        wanted |= {f"scalar/{name.split('.')[-1]}/{tag}": after[name].item() for name in scalars}
    wanted |= {"scalar/norm_alpha": after["model.norm_alpha"].item()}
    wanted |= {"scalar/lm_head_alpha": after["lm_head_alpha"].item()}
    check(found[0][case]["statistics"], wanted, ("weight/", "scalar/"), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_updates_are_how_far_the_weights_have_moved(case: str, found: Found) -> None:
    before, after = double(found[0][case]["before"]), double(found[0][case]["after"])
    config = statistics_config(*CASES[case])
    groups = assign(after, group_table(config.model, config.optimizer))
    for layer in sampled_layers(config.model.num_hidden_layers, LAYERS):
        groups[f"layer_{layer:02d}"] = [name for name in after if f".layers.{layer}." in name]
    wanted = {}
    for group, names in groups.items():
        update = torch.cat([(after[name] - before[name]).flatten() for name in names])
        weight = torch.cat([after[name].flatten() for name in names])
        wanted[f"update/{group}"] = (update.norm() / weight.norm()).item()
    assert min(wanted.values()) > 1e-4
    check(found[0][case]["statistics"], wanted, ("update/",), rel=5e-5)
    check(found[0][case]["refused"], dict.fromkeys(wanted, 0.0), ("update/",))


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_whole_batch(case: str, found: Found) -> None:
    config, batch = statistics_config(*CASES[case]), second_batch(case)
    decoder = Decoder(config.model).double()
    decoder.load_state_dict(double(found[0][case]["before"]))
    inputs = NextToken(config.objective, 2).inputs(batch)
    logits = decoder(inputs.input_ids, inputs.position_ids, inputs.document_ids)
    sums = logits.logsumexp(-1)
    losses = sums - logits.gather(-1, inputs.targets[..., None])[..., 0] + config.objective.z_loss * sums**2
    ((losses * inputs.weights).sum() / inputs.weights.sum()).backward()
    squares: dict[str, float] = {}
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None
        part = f"layer_{int(name.split('.')[2]):02d}" if ".layers." in name else "outside_layers"
        squares[f"gradient/{part}"] = squares.get(f"gradient/{part}", 0.0) + float(parameter.grad.square().sum())
    wanted = {name: math.sqrt(square) for name, square in squares.items()}
    assert len(wanted) == config.model.num_hidden_layers + 1
    check(found[0][case]["statistics"], wanted, ("gradient/",), rel=1e-4)
    assert found[0][case]["norm"] == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-4)


def test_there_are_no_other_tags(found: Found) -> None:
    prefixes = ("hidden/", "attention/", "weight/", "scalar/", "update/", "gradient/")
    for case in CASES:
        assert all(name.startswith(prefixes) for name in found[0][case]["statistics"])


def test_compiled_training_is_the_same_to_the_bit_and_nothing_is_compiled_for_it(found: Found) -> None:
    for rank in found:
        losses, weights, late = rank["on"]
        plain_losses, plain_weights, plain_late = rank["off"]
        assert losses == plain_losses
        assert all(torch.equal(weights[name], tensor) for name, tensor in plain_weights.items())
        assert late == plain_late == []
