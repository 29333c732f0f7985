"""The resolved configuration: what is printed loads to an equal one; differences by key."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.config.config_texts import BASE, PHASE, phase, write
from titan_yulan.config import (
    PRESETS,
    BatchSection,
    CheckpointSection,
    DataSection,
    Difference,
    Duration,
    EvalSection,
    LearningRateSegment,
    Loaded,
    ModelConfig,
    OptimizerSection,
    ParallelSection,
    PhaseSection,
    RunConfig,
    RunSection,
    SourceSection,
    TokenizerSection,
    Tokens,
    diff,
    load,
    show,
    to_toml,
)

FOLDER_NAMES = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9._+=@-]{0,12}\Z")
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=12)
POSITIVE = st.floats(1e-12, 1e12)
# at least a step of every batch drawn below, whatever the unit
DURATIONS = st.builds(Duration, st.integers(10**7, 10**13).map(float), st.sampled_from(["tokens", "steps", "rows"]))
SHARES = st.integers(1, 99).map(lambda percent: Duration.parse(f"{percent}%"))


@st.composite
def segments(draw: Any) -> tuple[LearningRateSegment, ...]:
    moving = st.builds(
        LearningRateSegment,
        shape=st.sampled_from(["linear", "cosine", "quarter-cosine", "1-sqrt"]),
        from_=st.floats(0, 10),
        to=st.floats(0, 10),
        over=SHARES,
    )
    held = st.floats(0, 2).map(lambda value: LearningRateSegment(shape="constant", from_=value, to=value))
    return (*draw(st.lists(moving, max_size=2)), *draw(st.lists(held, max_size=1)))


@st.composite
def phases(draw: Any, name: str, sources: list[str]) -> PhaseSection:
    weight = st.floats(1e-3, 1e3) if draw(st.booleans()) else st.integers(1, 10**12).map(lambda n: Tokens(float(n)))
    sequence_length = draw(st.sampled_from([64, 100, 1024]))
    rows = draw(st.integers(1, 64))
    batch = rows if draw(st.booleans()) else Tokens(float(rows * sequence_length))
    return PhaseSection(
        name=name,
        sequence_length=sequence_length,
        mix=draw(st.dictionaries(st.sampled_from(sources), weight, min_size=1)),
        length=draw(DURATIONS),
        lr=draw(segments()),
        rope_theta=draw(st.none() | POSITIVE),
        batch=BatchSection(global_batch_size=batch, micro_batch_size=draw(st.integers(1, rows))),
        parallel=ParallelSection(compute_dtype=draw(st.sampled_from(["bfloat16", "float32"]))),
    )


@st.composite
def configs(draw: Any) -> RunConfig:
    sources = draw(st.lists(TEXTS.filter(bool), min_size=1, max_size=3, unique=True))
    names = draw(st.lists(FOLDER_NAMES, min_size=1, max_size=3, unique=True))
    source = st.builds(SourceSection, path=TEXTS, text=st.lists(TEXTS, max_size=2).map(tuple), order=TEXTS)
    model = dataclasses.replace(
        PRESETS["debug"],
        initializer_range=draw(POSITIVE),
        residual_scale=draw(st.none() | st.floats(0, 1)),
        o_proj_alpha=draw(st.none() | st.floats(-1, 1)),
    )
    return RunConfig(
        run=RunSection(
            name=draw(FOLDER_NAMES), seed=draw(st.integers(0, 2**63 - 1)), deterministic=draw(st.booleans())
        ),
        model=model,
        tokenizer=TokenizerSection(path=draw(TEXTS)),
        data=DataSection(sources={name: draw(source) for name in sources}),
        phases=tuple(draw(phases(name, sources)) for name in names),
        optimizer=OptimizerSection(learning_rate=draw(POSITIVE), weight_decay_norms=draw(st.none() | st.floats(0, 1))),
        checkpoint=CheckpointSection(every=draw(st.none() | DURATIONS)),
        eval=EvalSection(prompt=draw(TEXTS)),
        first_phase=draw(st.integers(0, len(names) - 1)),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configs())
def test_what_is_saved_loads_to_an_equal_configuration(config: RunConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resolved.toml"
        path.write_text(to_toml(config), encoding="utf-8")
        loaded = load(path)
        assert loaded.config == config
        assert diff(loaded.config, config) == []
        path.write_text(show(loaded), encoding="utf-8")
        assert load(path).config == config


def chain(folder: Path) -> Loaded:
    write(folder, "base.toml", BASE)
    write(folder, "one.toml", 'extends = "base.toml"\n' + phase("one"))
    more = 'after = "one.toml"\nlr = {shape = "linear", to = 0, over = "10%"}\n[phase.batch]\nmicro_batch_size = 4'
    return load(write(folder, "two.toml", 'extends = "base.toml"\n' + phase("two", more)), ["--run.seed=3"])


def test_a_chain_is_shown_with_the_origin_of_each_value(tmp_path: Path) -> None:
    text = show(chain(tmp_path))
    lines = text.split("\n")
    assert lines[0] == "first_phase = 1"
    assert 'name = "test"  # base.toml:2' in lines
    assert "seed = 3  # --run.seed" in lines
    assert "hidden_size = 192  # preset debug" in lines
    assert 'rope_theta = "none"  # default' in lines
    assert 'lr = [{shape = "linear", from = 1.0, to = 0.0, over = "10%", hold_at = "none"}]  # two.toml:9' in lines
    assert "micro_batch_size = 4  # two.toml:11" in lines
    assert lines.count("micro_batch_size = 2  # base.toml:21") == 1
    assert all("  # " in line for line in lines[1:] if "=" in line)
    again = load(write(tmp_path / "elsewhere", "shown.toml", text))
    assert again.config == chain(tmp_path).config


def test_every_leaf_has_an_origin(tmp_path: Path) -> None:
    origins = chain(tmp_path).origins
    assert {key.split(".")[0] for key in origins} >= {"run", "model", "data", "phase", "eval"}
    assert {f"model.{f.name}" for f in dataclasses.fields(ModelConfig)} <= set(origins)
    assert origins["phase.two.batch.micro_batch_size"] == "two.toml:11"
    assert origins["phase.two.batch.global_batch_size"] == "base.toml:20"


def test_differences_name_keys_of_phases_by_the_phase(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", BASE + PHASE)
    a = load(path).config
    assert diff(a, a) == []
    b = load(
        path, ["--phase.length=50 steps", "--phase.mix={code = 3}", "--optimizer.eps=1e-6", "--checkpoint.every=1M"]
    ).config
    assert diff(a, b) == [
        Difference("optimizer.eps", "1e-08", "1e-06"),
        Difference("checkpoint.every", '"none"', '"1M"'),
        Difference("phase.warmup.mix.code", "2.0", "3.0"),
        Difference("phase.warmup.mix.math", "1.0", None),
        Difference("phase.warmup.length", '"100 steps"', '"50 steps"'),
    ]
    assert str(diff(a, b)[3]) == "phase.warmup.mix.math: 1.0 -> (not set)"


def test_a_new_phase_and_another_order_are_differences(tmp_path: Path) -> None:
    both = chain(tmp_path).config
    one = dataclasses.replace(both, phases=both.phases[:1], first_phase=0)
    added = diff(one, both)
    assert Difference("phase.two.name", None, '"two"') in added
    assert Difference("curriculum", '["one"]', '["one", "two"]') in added
    assert all(d.key == "curriculum" or d.key.startswith("phase.two.") for d in added)
    assert [d.key for d in diff(both, dataclasses.replace(both, phases=both.phases[::-1]))] == ["curriculum"]
