"""The forecast of memory, time and traffic on devices: its arithmetic, its limits, and what it suggests."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.curriculum.making import configuration, phase
from titan_yulan import cli
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.presets import PRESETS
from titan_yulan.config.sections import (
    ActivationCheckpointSection,
    BatchSection,
    ObjectiveSection,
    ParallelSection,
    RunConfig,
)
from titan_yulan.curriculum.plan import Plan
from titan_yulan.errors import UserError
from titan_yulan.monitor.flops import FORMULAS, device_peak
from titan_yulan.parallel.degrees import Degrees
from titan_yulan.plan.device_picture import device_lines, stages
from titan_yulan.plan.devices import DEVICES, Assumptions, Device, choose
from titan_yulan.plan.memory import GIB, fills_ranks, phase_memory
from titan_yulan.plan.roofline import StepTime, step_time
from titan_yulan.plan.suggest import suggest, usable_bytes
from titan_yulan.plan.traffic import Exchange, exchanges

YULAN_MINI = PRESETS["yulan_mini_2b"]
H100, IDEAL = DEVICES["h100"], Assumptions(1.0, 1.0, 1.0, 1.0, 1e-9, 1.0)
BLOCK = 2 * 1920 * 1920 + 2 * 384 * 1920 + 3 * 4800 * 1920 + 1920 + 2 * 384
ROOT = 99_000 * 1920


def yulan_mini(rows: int = 1, length: int = 4096, batch: int = 1008, mode: str = "none", **layout: Any) -> RunConfig:
    section = replace(
        phase("a", "9 steps", {"code": 1.0}, sequence_length=length, batch=batch),
        parallel=ParallelSection(**layout),
        batch=BatchSection(global_batch_size=batch, micro_batch_size=rows),
        activation_checkpoint=ActivationCheckpointSection(mode=mode),
    )
    return replace(configuration(section), model=YULAN_MINI)


def timed(config: RunConfig, world: int, device: Device = H100, assumptions: Assumptions = IDEAL) -> StepTime:
    return step_time(config, config.phases[0], world, device, assumptions)


def test_arithmetic_is_that_of_the_causal_formula() -> None:
    """Forward and backward of all rows, and the scores that flash attention's backward makes again."""
    step = timed(yulan_mini(rows=2), 8)
    tokens = 1008 * 4096 // 8
    attention = 2 * YULAN_MINI.num_hidden_layers * 1920 * 4096  # a forward pass, the causal half
    flops = sum(category.work.flops for category in step.categories.values())
    assert flops == pytest.approx(tokens * (FORMULAS["causal"].per_token(YULAN_MINI, 4096) + 0.5 * attention))
    assert step.categories["attention"].work.flops == pytest.approx(tokens * 3.5 * attention)
    assert step.categories["head + loss"].work.flops == tokens * 6 * ROOT


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"context": 2}, {"tensor": 3, "context": 2}])
def test_ranks_that_share_rows_share_the_arithmetic(layout: dict[str, Any]) -> None:
    def flops(config: RunConfig) -> float:
        return sum(category.work.flops for category in timed(config, 24).categories.values())

    assert flops(yulan_mini(**layout)) == pytest.approx(flops(yulan_mini()), rel=1e-9)


def test_what_is_recomputed_counts() -> None:
    once, again = (timed(yulan_mini(mode=mode), 8).categories for mode in ("none", "full"))
    assert again["MLP"].work.flops == pytest.approx(once["MLP"].work.flops * 4 / 3)
    assert again["attention"].work.flops == pytest.approx(once["attention"].work.flops * 4.5 / 3.5)
    part = timed(yulan_mini(mode="selective"), 8).categories
    assert part["MLP"] == once["MLP"] and part["attention"] == once["attention"]
    assert part["norm and elementwise"].seconds == again["norm and elementwise"].seconds
    assert again["head + loss"] == once["head + loss"]


@pytest.mark.parametrize(
    ("objective", "square", "mask"),
    [
        ({"document_mask": True}, 2, True),
        ({"token_mask_share": 0.1}, 2, True),
        ({"kind": "masked_diffusion"}, 2, False),
        ({"orders": 3, "restart_positions": True}, 1, False),
    ],
)
@pytest.mark.parametrize("layout", [{}, {"context": 2}])
def test_a_mask_and_diffusion_cost_the_whole_square(
    objective: dict[str, Any], square: int, mask: bool, layout: dict[str, Any]
) -> None:
    config = yulan_mini(**layout)
    given = replace(config, objective=ObjectiveSection(**objective))
    other, plain = (timed(one, 8).categories["attention"].work for one in (given, config))
    assert other.flops == square * plain.flops
    # keys and values for 30 heads in the place of 6, and a number for each pair of tokens, read in both passes
    ranks = layout.get("context", 1)
    more = 2 * (1920 - 384) * ranks + 4096 if mask else 0
    tokens = 1008 * 4096 // 8
    assert other.bytes - plain.bytes == pytest.approx(56 * tokens * 2 * 3 * more, abs=1)


@pytest.mark.parametrize("kind", ["autoregressive", "masked_diffusion"])
def test_no_causal_utilisation_where_nothing_is_causal(kind: str) -> None:
    plan = Plan(replace(yulan_mini(), objective=ObjectiveSection(kind=kind)))
    text = "\n".join(device_lines(plan, stages(plan, 8, H100, IDEAL), 8, H100, IDEAL))
    assert "% published" in text and "% palm" in text and ("% causal" in text) == (kind == "autoregressive")


def test_a_category_takes_what_is_slower() -> None:
    step = timed(yulan_mini(rows=2), 8)
    assert step.categories["MLP"].seconds == step.categories["MLP"].work.flops / 989e12
    assert step.categories["optimizer"].seconds == step.categories["optimizer"].work.bytes / 3350e9
    slow = timed(yulan_mini(rows=2), 8, replace(H100, bandwidth=10.0))
    assert slow.categories["MLP"].bound == "memory"
    assert slow.categories["MLP"].seconds == slow.categories["MLP"].work.bytes / 10e9
    half = timed(yulan_mini(rows=2), 8, assumptions=replace(IDEAL, products=0.5))
    assert half.categories["MLP"].seconds == 2 * step.categories["MLP"].seconds
    assert half.categories["attention"] == step.categories["attention"]


def test_rows_that_do_not_count_cost_time() -> None:
    """144 rows over 56 ranks are 3 each: 168 are computed."""
    step = timed(yulan_mini(rows=3, length=28_672, batch=144), 56)
    assert step.micro_batches == 1 and step.idle == pytest.approx(1 - 144 / 168)
    full = timed(yulan_mini(rows=3, length=28_672, batch=168), 56)
    assert step.seconds == full.seconds and step.tokens_per_second * 168 == pytest.approx(full.tokens_per_second * 144)


def test_bytes_that_a_rank_receives() -> None:
    """The table of docs/parallelism.md: GB a micro-batch; 8 divides every size."""

    def received(world: int, tokens: int, **layout: Any) -> dict[str, float]:
        config = yulan_mini(rows=tokens // 4096, batch=1024, **layout)
        degrees = Degrees(
            layout.get("data_replicate", 1),
            world // (layout.get("data_replicate", 1) * layout.get("context", 1) * layout.get("tensor", 1)),
            layout.get("context", 1),
            layout.get("tensor", 1),
        )
        sums: dict[str, float] = {}
        for exchange in exchanges(config, config.phases[0], degrees, 1):
            kind = exchange.what.split(",")[-1].split()[0]
            sums[kind] = sums.get(kind, 0.0) + exchange.received / 1e9
        return sums

    sharded = received(8, 4096)
    assert sharded["weights"] == pytest.approx(2 * (2 * 56 * BLOCK + ROOT) * 7 / 8 / 1e9)
    assert (round(sharded["weights"], 2), round(sharded["gradients"], 2)) == (7.49, 7.82)
    assert round(received(1024, 4096, data_replicate=128)["replicas"], 2) == 2.22
    assert round(received(2, 8192, tensor=2)["sequence"], 2) == 7.11
    shared = received(2, 8192, context=2)
    assert round(shared["keys"] + shared["their"], 2) == 0.70


def test_time_of_a_ring_inside_and_between_nodes() -> None:
    one = Exchange("x", "all-gather", 8, 1, 3, 8 * 10**9, False)
    assert one.received == 3 * 7 * 10**9
    assert one.seconds(H100, IDEAL) == pytest.approx(7 / 450)
    assert one.nodes(H100) == 1
    # over two nodes, eight adapters of each carry the half that the other node lacks
    two = replace(one, ranks=16)
    assert two.nodes(H100) == 2 and two.seconds(H100, IDEAL) == pytest.approx(max(7.5 / 450, 4 / (8 * 50)))
    # neighbours that are a node apart have one adapter each
    apart = replace(one, ranks=16, stride=8)
    assert apart.nodes(H100) == 16 and apart.seconds(H100, IDEAL) == pytest.approx(7.5 / 50)
    assert replace(apart, collective="all-reduce").seconds(H100, IDEAL) == pytest.approx(15 / 50)
    hops = replace(IDEAL, hop=5.0, links=0.5)
    assert one.seconds(H100, hops) == pytest.approx(2 * 7 / 450 + 7 * 5e-6)


def test_what_hides_behind_computing_is_not_waited_for() -> None:
    config = yulan_mini(rows=4)
    fast, slow = (timed(config, 16, replace(H100, network=network)) for network in (1e6, 1.0))
    waited = {exchange.what: seconds for exchange, seconds in zip(fast.exchanges, fast.exposed, strict=True)}
    assert waited["gradients of blocks"] == 0.0 < waited["weights of embedding and head"]
    # a step never takes less than its links need, nor more than all of it one after the other
    for step, device in ((fast, replace(H100, network=1e6)), (slow, replace(H100, network=1.0))):
        links = sum(one.calls * one.seconds(device, IDEAL) for one in step.exchanges)
        assert max(step.computing, links) <= step.seconds * (1 + 1e-9)
        assert step.seconds <= (step.computing + links) * (1 + 1e-9)
    assert slow.computing == fast.computing and sum(slow.exposed) > sum(fast.exposed)


def test_the_published_formula_at_the_published_speed() -> None:
    """arXiv 2412.17743 reports 51 % of an A800 at 7,174 tokens/s; the forecast's own MFU is formed alike."""
    config = yulan_mini(rows=18, reshard_after_forward=False)
    step = timed(config, 56, DEVICES["a800"], Assumptions())
    share = step.mfu("published", YULAN_MINI, 4096, DEVICES["a800"])
    assert share * 7174.012855831038 * 56 / step.tokens_per_second == pytest.approx(0.5157738221374585, rel=1e-9)


def test_the_table_of_devices() -> None:
    for name, known in (("a100", "A100"), ("a800", "A800"), ("h100", "H100"), ("h200", "H200"), ("b200", "B200")):
        assert device_peak(f"NVIDIA {known}") == DEVICES[name].peak * 1e12
    assert device_peak("NVIDIA H100 PCIe") == DEVICES["h100-pcie"].peak * 1e12
    assert all(device.source and device.memory and device.network for device in DEVICES.values())


def test_own_numbers() -> None:
    device, assumptions = choose("H100", "25,10,4", ["memory=96", "attention=0.5"])
    assert (device.memory, device.link, device.network, device.node, device.peak) == (96, 25, 10, 4, 989)
    assert assumptions == Assumptions(attention=0.5)
    own, _ = choose("mine", "20,5", ["memory=32", "peak=100", "bandwidth=900"])
    assert (own.name, own.memory, own.node) == ("mine", 32, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mi300", "", ()), "choose one of a100-40, .*; missing: memory, peak, bandwidth, link, network"),
        (("h100", "fast", ()), "--interconnect fast: write LINK,NETWORK"),
        (("h100", "1,x", ()), "'x' is no number above 0"),
        (("h100", "", ("memory=-1",)), "'-1' is no number above 0"),
        (("h100", "", ("memroy=1",)), "the names are memory, peak"),
        (("h100", "", ("usable=1.5",)), "a share, at most 1"),
        (("h100", "", ("node=0.5",)), "--assume node=0.5: GPUs of a node, '0.5' is no whole number of at least 1"),
        (("h100", "450,50,0.5", ()), "--interconnect 450,50,0.5: GPUs of a node, '0.5' is no whole number"),
    ],
)
def test_mistakes_in_devices(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(*arguments)


WORDS = st.sampled_from(["", "x", "nan", "inf", "-inf", "0", "-1", "1e999", "0.5", "1.5", "8", "1e3"])


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["node", "link", "hop", "usable", "nodes", ""]),
    value=WORDS | st.floats(allow_nan=True).map(str),
    third=WORDS | st.floats(allow_nan=True).map(str),
)
def test_any_number_is_used_or_refused(name: str, value: str, third: str) -> None:
    """What `choose` lets through, a forecast can compute with."""
    for arguments in (("h100", "", [f"{name}={value}"]), ("h100", f"450,50,{third}", [])):
        try:
            device, assumptions = choose(*arguments)
        except UserError:
            continue
        assert device.node >= 1 and min(assumptions.usable, assumptions.hop, device.link) > 0
        assert timed(yulan_mini(context=2), 16, device, assumptions).seconds > 0


@settings(max_examples=10, deadline=None)
@given(
    heads=st.sampled_from([4, 8, 12, 30]),
    layers=st.integers(2, 60),
    inner=st.integers(2, 40).map(lambda n: 240 * n),
    rows=st.sampled_from([1, 2, 6, 18]),
    length=st.sampled_from([512, 4096, 28_672]),
    gpus=st.sampled_from([1, 2, 6, 8, 12, 64]),
    memory=st.sampled_from([8.0, 24.0, 80.0]),
    gathered=st.booleans(),
)
def test_what_is_suggested_fits(
    heads: int, layers: int, inner: int, rows: int, length: int, gpus: int, memory: float, gathered: bool
) -> None:
    model = ModelConfig(
        vocab_size=50_000,
        hidden_size=64 * heads,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
    )
    config = replace(yulan_mini(rows, length, batch=288, reshard_after_forward=gathered), model=model)
    device = replace(H100, memory=memory)
    found = suggest(config, config.phases[0], gpus, device, Assumptions())
    room = usable_bytes(device, Assumptions())
    if found is None:
        return
    assert found.gpus >= gpus
    assert phase_memory(config, found.phase, found.gpus).total <= room and fills_ranks(found.phase, found.gpus)
    if phase_memory(config, config.phases[0], gpus).total <= room and fills_ranks(config.phases[0], gpus):
        assert found.gpus == gpus
    # the keys alone, read as the command line's, make the suggested phase
    again = with_keys(config, found.keys)
    assert again.phases[0] == found.phase
    plan = Plan(again)
    lines = device_lines(plan, stages(plan, found.gpus, device, Assumptions()), found.gpus, device, Assumptions())
    assert not any(line.startswith("WARNING") for line in lines)


def with_keys(config: RunConfig, keys: tuple[tuple[str, str], ...]) -> RunConfig:
    section = config.phases[0]
    for key, text in keys:
        table, name = key.split(".")
        value: Any = {"true": True, "false": False}.get(text, int(text) if text.lstrip("-").isdigit() else text)
        section = replace(section, **{table: replace(getattr(section, table), **{name: value})})
    return replace(config, phases=(section,))


def test_nothing_fits_a_device_that_is_too_small() -> None:
    assert suggest(yulan_mini(), yulan_mini().phases[0], 8, replace(H100, memory=0.1), Assumptions()) is None


def test_the_command_warns_and_its_suggestion_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """As given on the command line, of a file whose phases differ in length."""
    arguments = ["plan", "debug.toml", "--device=rtx4090", "--model.preset=yulan_mini_2b"]
    assert cli.main([*arguments, "--gpus=2", "--phase=anneal", "--phase.sequence_length=4096"]) == 0
    text = capsys.readouterr().out
    assert "WARNING: anneal: does not fit" in text
    line = next(line for line in text.splitlines() if line.startswith("  fits: "))
    options = line.removeprefix("  fits: ").split()
    gpus = options.index("--gpus")
    given = [*options[:gpus], f"--gpus={options[gpus + 1]}", *options[gpus + 2 :]]
    assert cli.main([*arguments, *given, "--phase=anneal", "--phase.sequence_length=4096"]) == 0
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device=h100"], "--device h100 needs --gpus N"),
        (["--gpus=8", "--phase=stable"], "--phase needs --device NAME"),
        (["--gpus=8", "--device=h100", "--phase=x"], "there is no such phase; the phases are stable, mix, anneal"),
        (["--gpus=0", "--device=h100"], "--gpus 0: at least 1"),
    ],
)
def test_mistakes_of_the_command(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "debug.toml", *options]) == 2
    assert message in capsys.readouterr().err


def test_stages_join_phases_that_lie_alike(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "debug.toml", "--gpus=4", "--device=h200"]) == 0
    text = capsys.readouterr().out
    assert "stable to mix: 160 steps of 16 x 128 tokens" in text and "anneal: 60 steps of 8 x 256 tokens" in text
    assert "together: 450.6K tokens" in text and "WARNING" not in text


def test_no_torch_for_a_forecast() -> None:
    code = (
        "import sys; from titan_yulan import cli; "
        "assert cli.main(['plan', 'debug.toml', '--gpus=8', '--device=h100']) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).resolve().parents[2]
    )


def test_staging_is_a_copy_of_weights_and_moments() -> None:
    memory = phase_memory(yulan_mini(), yulan_mini().phases[0], 8)
    assert memory.staging == memory.state * 12 // 16
    assert sum(size for _, size in memory.kinds) == memory.activations
    assert max(size for _, size in memory.moments) == memory.working and memory.total > 4 * GIB
