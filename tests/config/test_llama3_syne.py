"""The files of Llama3-SynE: published volumes and learning rate, who writes them, and what is adjusted."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.config.generators import load_generator
from titan_yulan import cli, config
from titan_yulan.config.adaptive import adaptive_groups
from titan_yulan.config.model import ModelConfig, count_parameters
from titan_yulan.config.sections import RunConfig
from titan_yulan.curriculum.plan import Plan

FOLDER = Path(__file__).resolve().parents[2] / "train_configs" / "llama3_syne"

# Billions of tokens of both stages by kind of text, as published; they are rounded so that they sum to 100.
VOLUMES = {
    "web": 45.18,
    "encyclopedia": 4.92,
    "books": 15.74,
    "qa": 4.92,
    "papers": 7.93,
    "math": 7.93,
    "code": 11.88,
    "synthetic": 1.50,
}


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_generator(FOLDER)


@pytest.fixture(scope="module")
def curriculum() -> RunConfig:
    return config.load(FOLDER / "curriculum.toml").config


@pytest.fixture(scope="module")
def plan(curriculum: RunConfig) -> Plan:
    return Plan(curriculum)


def volumes(plan: Plan, phase: int, part: int) -> dict[str, float]:
    """Planned billions of tokens of a stage by one word of the sources' domain, such as `Chinese web`."""
    section = plan.phases[phase]
    tokens = np.subtract(section.tapes(section.rows_total), section.tape_start)
    by_word: dict[str, float] = defaultdict(float)
    for name, count in zip(plan.sources, tokens.tolist(), strict=True):
        by_word[plan.config.data.sources[name].domain.split()[part]] += count / 1e9
    return by_word


def test_nobody_edited_what_the_script_writes(generator: ModuleType) -> None:
    written = generator.files()
    assert {name for name, text in written.items() if (FOLDER / name).read_text(encoding="utf-8") != text} == set()


def test_planned_volumes_are_the_published_ones(plan: Plan, generator: ModuleType) -> None:
    batch = 512 * 8192 / 1e9
    planned = {kind: volumes(plan, 0, -1)[kind] + volumes(plan, 1, -1)[kind] for kind in VOLUMES}
    assert sum(planned.values()) == pytest.approx(100, abs=2 * batch) and sum(VOLUMES.values()) == pytest.approx(100)
    assert {kind: amount for kind, amount in planned.items() if abs(amount - VOLUMES[kind]) >= 0.01} == {}
    mixes = [generator.stage1_mix(), generator.stage2_mix()]
    assert [sum(mix.values()) for mix in mixes] == [Fraction("92.5"), Fraction("7.5")]
    exact: dict[str, Fraction] = defaultdict(Fraction)
    for source, amount in (item for mix in mixes for item in mix.items()):
        exact[generator.domain(source).split()[-1]] += amount
    # two decimals, of which some were rounded down
    assert {kind for kind, amount in exact.items() if not -0.005 <= VOLUMES[kind] - amount <= 0.0050001} == {"code"}
    assert exact["code"] == Fraction("11.8875")


def test_languages_have_the_published_shares(plan: Plan) -> None:
    assert [phase.steps for phase in plan.phases] == [22_053, 1_788]
    for phase, length, shares in (
        (0, 92.5, {"Chinese": 2, "English": 8}),
        (1, 7.5, {"Chinese": 1, "English": 7, "synthetic": 2}),
    ):
        planned = {language: amount for language, amount in volumes(plan, phase, 0).items() if amount}
        assert planned.keys() == shares.keys()
        assert sum(planned.values()) == pytest.approx(length, abs=512 * 8192 / 1e9)
        for language, share in shares.items():
            assert planned[language] / sum(planned.values()) == pytest.approx(share / 10, abs=1e-5)


def test_each_language_has_eleven_topics_that_begin_alike_and_are_adjusted_alone(curriculum: RunConfig) -> None:
    first, second = curriculum.phases
    groups = adaptive_groups(first.adaptive, first.mix)
    assert {name: len(members) for name, members in groups.items()} == {"english": 11, "chinese": 11}
    assert all(member.startswith("en-web-") for member in groups["english"])
    for members in groups.values():
        assert len({first.mix[member] for member in members}) == 1
        assert all(curriculum.data.sources[member].validation_path for member in members)
        assert sum(member.endswith("-others") for member in members) == 1
    assert first.adaptive.every is not None and second.adaptive.every is None


def test_stage_2_draws_at_random_from_documents_of_its_own(curriculum: RunConfig) -> None:
    first, second = curriculum.phases
    sources = curriculum.data.sources
    assert not set(first.mix) & set(second.mix) and set(first.mix) | set(second.mix) == set(sources)
    assert {sources[name].order for name in first.mix} == {"perplexity"}
    assert {sources[name].order for name in second.mix} == {"shuffle"}
    folders = [source.path for source in sources.values()]
    assert len(set(folders)) == len(folders)


def test_learning_rate_warms_up_and_stays(plan: Plan) -> None:
    assert plan.learning_rate(0) == pytest.approx(1e-7)
    warm = 10e9 / (512 * 8192)
    assert plan.learning_rate(1192) == pytest.approx(1e-7 + (1e-5 - 1e-7) * 1192 / warm)
    assert plan.learning_rate(int(warm)) < 1e-5
    for step in (int(warm) + 1, 22_052, 22_053, 23_840):
        assert plan.learning_rate(step) == pytest.approx(1e-5, rel=1e-12)


def test_model_and_optimizer_are_the_published_ones(curriculum: RunConfig) -> None:
    model, optimizer = curriculum.model, curriculum.optimizer
    assert count_parameters(model) == 8_030_261_248
    assert (model.hidden_size, model.intermediate_size, model.num_hidden_layers) == (4096, 14_336, 32)
    assert (model.num_attention_heads, model.num_key_value_heads, model.vocab_size) == (32, 8, 128_256)
    assert (model.rope_theta, model.rms_norm_eps, model.tie_word_embeddings) == (500_000, 1e-5, False)
    assert (model.wesar, model.attention_bias, model.embedding_scale) == (False, False, 1)
    assert (model.residual_factor, model.logits_divisor, optimizer.base_width) == (1, 1, 0)
    assert (optimizer.betas, optimizer.weight_decay, optimizer.max_gradient_norm) == ((0.9, 0.95), 0, 1)
    assert {phase.sequence_length for phase in curriculum.phases} == {8192}
    assert curriculum.phases[0].start_from and curriculum.objective.z_loss == 0


def test_only_chinese_in_order_is_one_key() -> None:
    shuffled = config.load(FOLDER / "curriculum.toml", ['--data.shuffle=["en-*"]']).config
    [pattern] = shuffled.data.shuffle
    ordered = {name for name in shuffled.phases[0].mix if not fnmatch.fnmatchcase(name, pattern)}
    assert len(ordered) == 14 and all(name.startswith("zh-") for name in ordered)


def test_bare_names_are_found() -> None:
    for name in ("syne_stage1.toml", "syne_stage2.toml", "syne_mini.toml"):
        assert config.find(name, FOLDER.parents[1]).resolve() == FOLDER / name
    last = config.load(FOLDER / "syne_stage2.toml").config
    assert last.first_phase == 1 and config.diff(last, config.load(FOLDER / "curriculum.toml").config) == []


def test_the_small_run_has_a_topic_with_hardly_any_rows() -> None:
    small = config.load(FOLDER / "syne_mini.toml").config
    start, adapt = small.phases
    assert start.mix["code"] == 0.9 and adapt.mix["code"] == 0.02 and adapt.adaptive.every is not None
    assert all(source.validation_path for source in small.data.sources.values())


def test_the_preset_is_the_model_of_the_published_config_json(curriculum: RunConfig) -> None:
    published = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
    }
    assert ModelConfig.from_published(published) == curriculum.model


def test_the_plan_needs_neither_data_nor_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(FOLDER / "curriculum.toml"), "--gpus", "64"]) == 0
    out = capsys.readouterr().out
    for part in (
        "stage1 (its mix follows perplexities every",
        "planned from step 0",
        "512 x 8,192",
        "0 of them prepared",
    ):
        assert part in out
