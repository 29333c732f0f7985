"""The phase files of YuLan-Mini: published boundaries, learning rates and mixes, and who writes them."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from decimal import Decimal
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.config.generators import load_generator
from titan_yulan import config
from titan_yulan.config.model import count_parameters
from titan_yulan.config.read import tomllib
from titan_yulan.config.sections import RunConfig
from titan_yulan.curriculum.plan import Plan

FOLDER = Path(__file__).resolve().parents[2] / "train_configs" / "yulan_mini"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_generator(FOLDER)


@pytest.fixture(scope="module")
def curriculum() -> RunConfig:
    return config.load(FOLDER / "curriculum.toml").config


@pytest.fixture(scope="module")
def plan(curriculum: RunConfig) -> Plan:
    return Plan(curriculum)


@pytest.fixture(scope="module")
def published() -> dict[str, dict[str, str]]:
    """Recipe -> source -> billions of tokens."""
    mixes: dict[str, dict[str, str]] = defaultdict(dict)
    with open(FOLDER / "data_mix.csv", encoding="utf-8", newline="") as file:
        for phase, source, amount in list(csv.reader(file))[1:]:
            mixes[phase][source] = amount
    return dict(mixes)


def test_nobody_edited_what_the_script_writes(generator: ModuleType) -> None:
    written = generator.files()
    assert {name for name, text in written.items() if (FOLDER / name).read_text(encoding="utf-8") != text} == set()
    phases = {path.name for path in FOLDER.glob("phase*.toml")}
    assert phases == {name for name in written if name.startswith("phase")} and len(phases) == 28


def test_published_boundaries_hold_to_the_step(plan: Plan) -> None:
    end = {phase.name: phase.end.step for phase in plan.phases}
    published = {"phase20": 194_526, "phase22": 213_995, "phase25": 243_198, "phase26": 253_006, "phase27": 262_772}
    assert {name: end[name] for name in published} == published
    assert list(end) == [f"phase{number:02d}" for number in range(1, 28)]


def test_steps_follow_the_tokens_of_the_recipes(plan: Plan, published: dict[str, dict[str, str]]) -> None:
    # between two known boundaries a step stands for the same number of tokens, up to the rounding of two ends
    for first, last in ((1, 20), (21, 22), (23, 25)):
        phases = plan.phases[first - 1 : last]
        tokens = [float(sum(map(Decimal, published[phase.name[-2:]].values()))) for phase in phases]
        steps = sum(phase.steps for phase in phases)
        for phase, amount in zip(phases, tokens, strict=True):
            assert abs(phase.steps - steps * amount / sum(tokens)) <= 1, phase.name


def test_every_step_has_the_same_number_of_tokens(plan: Plan) -> None:
    assert {phase.batch_rows * phase.sequence_length for phase in plan.phases} == {4_128_768}
    assert {(phase.batch_rows, phase.sequence_length) for phase in plan.phases[:25]} == {(1008, 4096)}
    assert {(phase.batch_rows, phase.sequence_length) for phase in plan.phases[25:]} == {(144, 28_672)}


@pytest.mark.parametrize(
    ("step", "multiplier"),
    [
        (0, 0.0),
        (1211, 0.5),  # half of the 2,422 steps that are 10 billion tokens
        (2422, 1.0),
        (243_198, 1.0),
        (243_199, 0.99274524),
        (247_948, 0.5),
        (252_698, 0.29289322),
        (253_006, 0.28152208),
        (257_448, 0.1339746),
        (262_000, 0.00522417),
        (262_771, 0.00522417),
    ],
)
def test_learning_rate(plan: Plan, step: int, multiplier: float) -> None:
    assert plan.learning_rate(step) == pytest.approx(1e-2 * multiplier, rel=0, abs=5e-11)


def test_warm_up_is_10_billion_tokens_to_the_step(plan: Plan) -> None:
    assert plan.learning_rate(2421) < 1e-2 == plan.learning_rate(2422)
    assert abs(plan.position(2422).token - 10e9) < 4_128_768


@pytest.mark.parametrize("recipe", ["01", "10", "25", "26-28k", "27-28k", "26-4k"])
def test_mixes_are_the_published_figures_digit_by_digit(
    recipe: str, generator: ModuleType, published: dict[str, dict[str, str]]
) -> None:
    name = {"26-4k": "phase26_4k"}.get(recipe, f"phase{recipe[:2]}")
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    mix = tomllib.loads(text, parse_float=Decimal)["phase"]["mix"]
    assert sum(mix.values()) == sum(map(Decimal, published[recipe].values()))
    assert dict(re.findall(r"^([\w-]+) = (\S+)$", text.partition("[phase.mix]")[2], re.MULTILINE)) == {
        generator.key(source): amount for source, amount in published[recipe].items()
    }


def test_planned_rows_are_within_two_of_their_share(plan: Plan) -> None:
    branch = Plan(config.load(FOLDER / "phase26_4k.toml").config).phases[-1]
    for phase in (*plan.phases, branch):
        rows = np.subtract(phase.tapes(phase.rows_total), phase.tape_start) / phase.sequence_length
        assert rows.sum() == phase.rows_total
        assert np.abs(rows - phase.weights * phase.rows_total).max() < 2, phase.name


def test_names_of_sources_are_folders_and_bare_keys(
    generator: ModuleType, published: dict[str, dict[str, str]]
) -> None:
    sources = {source for mix in published.values() for source in mix}
    keys = {generator.key(source) for source in sources}
    assert len(keys) == len(sources) == 291  # no two sources share a folder
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", key) for key in keys)
    assert set(generator.read_domains()) == sources


def test_sources_say_their_domain(curriculum: RunConfig, generator: ModuleType) -> None:
    domains = {generator.key(source): domain for source, domain in generator.read_domains().items()}
    assert {name: section.domain for name, section in curriculum.data.sources.items()} == domains


def test_the_miniature_is_the_whole_curriculum(
    plan: Plan, generator: ModuleType, published: dict[str, dict[str, str]]
) -> None:
    small = Plan(config.load(FOLDER / "mini.toml").config)
    assert [phase.name for phase in small.phases] == [phase.name for phase in plan.phases]
    assert min(phase.rows_total for phase in small.phases) >= 200
    assert {phase.batch_rows * phase.sequence_length for phase in small.phases} == {4_128_768 / 32 / 36}
    assert {(phase.sequence_length, phase.section.rope_theta) for phase in small.phases} == {(128, None), (896, 490e3)}
    for one, other in zip(small.phases, plan.phases, strict=True):
        assert one.end.step / small.end.step == pytest.approx(other.end.step / plan.end.step, abs=1e-3)
        assert one.section.parallel == small.phases[0].section.parallel
    warm, end = 2422 / 190, small.phases[24].end.step
    steps = [0, round(warm) - 1, round(warm), end, end + 25, small.end.step - 1]
    rates = [0, 1 - 1 / round(warm), 1, 1, 1 - (25 / 100) ** 0.5, 1 - 0.99**0.5]
    assert [small.learning_rate(step) / 1e-2 for step in steps] == pytest.approx(rates)
    # every published token is in the mix of some source
    places = {"code": "code", "code synthetic": "synthetic_code", "code instruction": "synthetic_code", "math": "math"}
    places |= {"math synthetic": "synthetic_math", "math instruction": "synthetic_math"}
    places["Chinese"] = "in_place_of_chinese"
    domains = generator.read_domains()
    for phase in small.phases:
        sums: dict[str, Decimal] = defaultdict(Decimal)
        for source, amount in published[generator.PHASES[phase.name]].items():
            sums[places.get(domains[source], "english")] += Decimal(amount)
        assert phase.section.mix == pytest.approx({name: float(total) for name, total in sums.items()}, rel=1e-11)


def test_the_last_phase_file_is_the_whole_curriculum(curriculum: RunConfig) -> None:
    last = config.load(FOLDER / "phase27.toml").config
    assert last.first_phase == 26 and config.diff(last, curriculum) == []


def test_the_branch_begins_where_the_long_rows_begin(plan: Plan) -> None:
    branch = config.load(FOLDER / "phase26_4k.toml").config
    assert branch.phases[:25] == plan.config.phases[:25] and branch.first_phase == 25
    assert branch.run.name != plan.config.run.name  # one run folder holds one of the two
    assert branch.phases[25].lr == plan.config.phases[25].lr and branch.phases[25].rope_theta is None


def test_model_and_optimizer_are_the_published_ones(curriculum: RunConfig) -> None:
    optimizer, phases = curriculum.optimizer, curriculum.phases
    assert count_parameters(curriculum.model) == 2_234_188_098
    assert (optimizer.learning_rate, optimizer.betas, optimizer.eps) == (1e-2, (0.9, 0.95), 1e-15)
    assert (optimizer.weight_decay, optimizer.max_gradient_norm, optimizer.base_width) == (0.1, 1.0, 256)
    assert curriculum.objective.z_loss == 1e-4 and curriculum.model.rope_theta == 10_000
    assert {phase.rope_theta for phase in phases[:25]} == {None}
    assert {phase.rope_theta for phase in phases[25:]} == {490_000.0}
    every = {phase.name: phase.activation_checkpoint.every for phase in phases}
    assert {phase.activation_checkpoint.mode for phase in phases} == {"every"}
    published = {"phase01": 7, "phase21": 11, "phase23": 11, "phase25": 12, "phase26": 56, "phase27": 56}
    assert {name: every[name] for name in published} == published


def test_the_published_command_finds_its_file() -> None:
    assert config.find("phase25.toml", FOLDER.parents[1]).resolve() == FOLDER / "phase25.toml"


def test_the_page_shows_every_public_link() -> None:
    page = (FOLDER.parents[1] / "docs/curriculum.md").read_text(encoding="utf-8")
    with open(FOLDER / "links.csv", encoding="utf-8", newline="") as file:
        links = [(row["name"], row["link"]) for row in csv.DictReader(file)]
    assert len(links) == 91 and [pair for pair in links if "| {} | <{}> |".format(*pair) not in page] == []
