"""What a run opens: the sources of the phases to come; and what it goes on saying of those before."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.checkpoint.making import make_checkpoint
from tests.curriculum.making import configuration, phase
from tests.data.making import BYTES, make, write_files
from titan_yulan.config.sections import SourceSection, TokenizerSection
from titan_yulan.curriculum.plan import Plan
from titan_yulan.data.ensure import ensure_prepared
from titan_yulan.data.tokenizer import save_ranks
from titan_yulan.errors import UserError
from titan_yulan.inputs import RunInputs


def test_sources_that_only_finished_phases_mixed_may_be_gone(tmp_path: Path) -> None:
    save_ranks(tmp_path / "t.tiktoken", BYTES.ranks)
    for name in ("a", "b"):
        make(write_files(tmp_path / f"{name}.text", 4), tmp_path / name)
        make(write_files(tmp_path / f"{name}.held", 2), tmp_path / f"{name}.out")
    sources = {n: SourceSection(path=f"{tmp_path}/{n}", validation_path=f"{tmp_path}/{n}.out") for n in ("a", "b")}
    config = configuration(
        phase("first", "3 steps", {"a": 1.0}),
        phase("second", "3 steps", {"a": 0.0, "b": 1.0}),
        sources=sources,
        tokenizer=TokenizerSection(path=str(tmp_path / "t.tiktoken")),
    )
    plan = Plan(config)
    both = RunInputs(config, plan)
    state = both.state_after(plan.phases[0], 3, [2])
    assert state.phase_finished and state.sources == both.fingerprints and both.fingerprints.keys() == {"a", "b"}
    assert state.ledger["a"]["rows"] == 24 and state.ledger["a"]["epochs"] == 24 * 16 / both.sizes["a"]
    assert state.tapes == {"a": 24 * 16, "b": 0} and state.skipped == [2] and "b" not in state.ledger
    for folder in ("a", "a.out"):
        shutil.rmtree(tmp_path / folder)
    second = replace(config, first_phase=1)
    ensure_prepared(second, lambda line: None)
    inputs = RunInputs(second, plan)
    assert list(inputs.tapes) == list(inputs.held_out_tapes) == [1] and inputs.sizes.keys() == {"b"}
    inputs.carry_on(make_checkpoint(tmp_path, 3, state=state), ())
    later = inputs.state_after(plan.phases[1], 5, [])
    assert later.sources == state.sources and later.tapes == {"a": 24 * 16, "b": 16 * 16}
    with pytest.raises(UserError, match=r"there is no prepared source at .*a, and data.sources.a.text does not"):
        ensure_prepared(config, lambda line: None)
    with pytest.raises(UserError, match="is not a prepared source"):
        RunInputs(config, plan)
