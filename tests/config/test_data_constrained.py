"""The files of the data-constrained study: published schedules, subsets and compute; and all of them load."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest

from tests.config.generators import load_generator
from titan_yulan import cli, config
from titan_yulan.config.family import FAMILY, formula_parameters
from titan_yulan.config.model import count_parameters
from titan_yulan.config.read import tomllib
from titan_yulan.curriculum.plan import Plan
from titan_yulan.optimizer.groups import group_table
from titan_yulan.sweep.expand import expand
from titan_yulan.sweep.runs import SweepRun, load_runs

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "train_configs" / "data_constrained"
FILES = {path.name: tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.toml"))}

# Arxiv 2507.15857: tokens of the subsets of the first K documents of C4, and K by the mean length of a document.
UNIQUE = {25: 24_743_247, 50: 49_874_872, 100: 99_952_399, 200: 199_836_911, 500: 499_791_318}
DOCUMENT_TOKENS = 478.625835
BEST = {"ar_100m_best.toml": (9_532, 4.34e18), "mdm_100m_best.toml": (95_322, 1.25e20)}
# Billions of fresh tokens at each level for the best size of the two objectives.
ISOFLOP = {("1e19", 217): 7.66, ("1e19", 117): 13.49, ("3e19", 425): 11.99, ("3e19", 217): 22.99}
ISOFLOP |= {("1e20", 724): 23.80, ("1e20", 425): 39.98}


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_generator(FOLDER)


def runs_of(name: str, *only: str) -> list[SweepRun]:
    return load_runs(expand(FOLDER / name, ROOT, ["--run.output_dir=nowhere"]), only)


@pytest.mark.parametrize("name", BEST)
def test_the_best_runs_have_the_published_steps_compute_and_learning_rates(name: str) -> None:
    steps, flops = BEST[name]
    plan = Plan(config.load(FOLDER / name).config)
    assert (plan.end.step, plan.phases[0].batch_rows * 2048) == (steps, 524_288)
    assert 6 * count_parameters(plan.config.model) * plan.end.token == pytest.approx(flops, rel=3e-3)
    warm = 0.01 * steps
    for step in (0, 1, round(warm / 2), math.floor(warm), math.ceil(warm), steps // 2, steps - 1, steps):
        if step <= warm:
            expected = 2e-4 * step / warm
        else:
            expected = 2e-5 + (2e-4 - 2e-5) * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
        assert plan.learning_rate(step) == pytest.approx(expected, rel=1e-9, abs=1e-18)
    assert [plan.learning_rate(step) for step in (0, steps)] == [0.0, pytest.approx(2e-5)]
    assert plan.learning_rate(round(warm)) == pytest.approx(2e-4, rel=0.01)


def test_both_objectives_differ_in_one_key() -> None:
    base = config.load(FOLDER / "base.toml").config
    other = config.load(FOLDER / "base.toml", ["--objective.kind=masked_diffusion"]).config
    assert [difference.key for difference in config.diff(base, other)] == ["objective.kind"]
    optimizer = base.optimizer
    assert (optimizer.learning_rate, optimizer.betas, optimizer.eps) == (2e-4, (0.9, 0.95), 1e-8)
    decays = {group.name: group.weight_decay for group in group_table(base.model, optimizer)}
    assert decays == {"matrices": 0.1, "embedding": 0.1, "norms": 0.0}
    assert (optimizer.max_gradient_norm, base.objective.z_loss, optimizer.base_width) == (1.0, 0.0, 0)
    assert (base.model.attention_dropout, base.model.hidden_dropout, base.model.vocab_size) == (0.1, 0.1, 50_304)
    assert {str(every) for every in (base.checkpoint.every, base.eval.every)} == {"1K steps"}
    assert base.data.sources["c4"].max_documents == math.ceil(500e6 / DOCUMENT_TOKENS)
    assert round(100e6 / DOCUMENT_TOKENS) == 208_931  # the published number for 100 million tokens


@pytest.mark.parametrize("name", [name for name, table in FILES.items() if "grid" not in table])
def test_the_plan_needs_no_data(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(FOLDER / name), "--gpus", "8"]) == 0
    assert "train" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name, table in FILES.items() if "grid" in table])
def test_runs_of_every_sweep_load(name: str) -> None:
    """Of each sweep the runs that bring a new value; `titan-yulan sweep` loads all."""
    sweep = expand(FOLDER / name, ROOT)
    seen: set[str] = set()
    some = [run for run, settings in sweep.runs.items() if not seen.issuperset(settings) and not seen.update(settings)]
    assert [run.name for run in load_runs(sweep, some)] == some


def test_epochs_of_the_published_subsets() -> None:
    runs = runs_of("sweep_epochs.toml", "*-140m-50")
    names = {name.rpartition("-")[2] for name in expand(FOLDER / "sweep_epochs.toml", ROOT).runs}
    assert {"1", "2", "4", "10", "20", "50", "100", "800"} <= names
    found = {(run.name.split("-")[1], run.config.phases[0].unique_tokens) for run in runs}
    assert found == {(f"{millions}m", tokens) for millions, tokens in UNIQUE.items()}
    assert {run.config.objective.kind for run in runs} == {"autoregressive", "masked_diffusion"}
    [best] = [run for run in runs if run.name == "ar-100m-140m-50"]
    assert config.diff(best.config, config.load(FOLDER / "ar_100m_best.toml", best.arguments[-2:]).config) == [
        config.Difference("checkpoint.keep", "1", "3")
    ]


def test_levels_of_compute(generator: ModuleType) -> None:
    assert (FOLDER / "sweep_isoflop.toml").read_text(encoding="utf-8") == generator.text()
    for (level, size), billions in ISOFLOP.items():
        assert size in generator.LEVELS[level]
        assert generator.tokens(level, size) / 1e9 == pytest.approx(billions, abs=0.006)
    for run in runs_of("sweep_isoflop.toml", "ar-*"):
        _, level, size = run.name.split("-")
        compute = 6 * formula_parameters(FAMILY[f"data_constrained_{size}"]) * run.tokens
        assert compute == pytest.approx(float(level), rel=1e-3) and run.epochs == pytest.approx(1, rel=1e-3)


def test_the_perturbation_study_has_its_baselines_and_every_perturbation() -> None:
    runs = {run.name: run.config for run in runs_of("sweep_perturbations.toml", "*-50")}
    plain = config.load(FOLDER / "base.toml", ["--phase.epochs=50"]).config
    changed = {
        name: {d.key: d.new for d in config.diff(plain, run) if not d.key.startswith(("run.", "checkpoint."))}
        for name, run in runs.items()
    }
    assert changed["ar-50"] == {} and changed["mdm-50"] == {"objective.kind": '"masked_diffusion"'}
    for orders in ("2", "4", "16"):
        assert changed[f"ar-orders-{orders}-50"] == {"objective.orders": orders}
    keys = {key for keys in changed.values() for key in keys}
    assert keys == {
        "objective.kind",
        "objective.orders",
        "objective.order_kind",
        "objective.token_mask_share",
        "objective.left_to_right_share",
        "model.attention_dropout",
    }
