"""Training on from a state of DeepSpeed, on two ranks: the next update, and whole runs, also after an import."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.checkpoint.hugging_face_folders import write_yulan
from tests.checkpoint.universal_folders import (
    GLOBAL_STEP,
    MODEL,
    OPTIMIZER,
    UPDATES,
    Peer,
    make_peer,
    write_universal,
)
from tests.curriculum.making import configuration, phase, segment
from tests.data.making import BYTES, make, write_files
from tests.distributed.published_starts import LAYOUTS, WORLD, universal
from tests.distributed.ranks import run_ranks
from titan_yulan.checkpoint import store
from titan_yulan.checkpoint.export import export
from titan_yulan.checkpoint.importing import import_checkpoint
from titan_yulan.checkpoint.layout import find_checkpoints
from titan_yulan.checkpoint.resume import make_plan, run_folder
from titan_yulan.config.sections import (
    EvalSection,
    MonitorSection,
    ObjectiveSection,
    RunConfig,
    RunSection,
    SourceSection,
    TokenizerSection,
)
from titan_yulan.data.tape import open_tape
from titan_yulan.data.tokenizer import save_ranks
from titan_yulan.monitor.metrics import read_lines

BATCH, LENGTH = 6, 24


@pytest.fixture(scope="module")
def peer() -> Peer:
    return make_peer()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, peer: Peer) -> dict[str, RunConfig]:
    """From DeepSpeed's and Hugging Face's folders, from what was imported from them, and from an export of that."""
    root = tmp_path_factory.mktemp("universal")
    save_ranks(root / "t.tiktoken", BYTES.ranks)
    make(write_files(root / "text", 4), root / "source")
    write_universal(root / "deepspeed", peer.state())
    write_yulan(root / "huggingface", MODEL)
    configs = {}
    for kind in ("deepspeed", "huggingface"):
        configs[kind] = config(root, kind, root / kind)
        import_checkpoint(root / kind, configs[kind], root / f"{kind}-imported", report=say_nothing)
        configs[f"{kind}, imported"] = config(root, f"{kind}-again", root / f"{kind}-imported")
    export(
        root / "deepspeed-imported", root / "exported", "yulan", with_optimizer=True, verify=False, report=say_nothing
    )
    configs["deepspeed, exported"] = config(root, "deepspeed-exported", root / "exported")
    # at last, for the others begin from the newest checkpoint there
    own = RunSection(name="deepspeed-imported", seed=7, output_dir=str(root))
    configs["deepspeed, going on there"] = replace(configs["deepspeed"], run=own)
    return configs


def say_nothing(line: str) -> None:
    pass


def config(root: Path, name: str, start_from: Path) -> RunConfig:
    section = phase(
        "anneal",
        "2 steps",
        {"x": 1.0},
        sequence_length=LENGTH,
        batch=BATCH,
        lr=(segment("linear", 1.0, 0.0, "4 steps"),),
        start_from=str(start_from),
    )
    made = configuration(
        section,
        sources={"x": SourceSection(path=str(root / "source"))},
        tokenizer=TokenizerSection(path=str(root / "t.tiktoken")),
        optimizer=OPTIMIZER,
        objective=ObjectiveSection(z_loss=0.0),
        monitor=MonitorSection(log_every=1, tensorboard=False),
        eval=EvalSection(prompt=""),
    )
    return replace(made, model=MODEL, run=RunSection(name=name, seed=7, output_dir=str(root / "outputs")))


@pytest.fixture(scope="module")
def found(runs: dict[str, RunConfig]) -> list[dict[str, Any]]:
    return run_ranks(universal, WORLD, Path(runs["deepspeed"].phases[0].start_from), runs)


def expected_next(peer: Peer) -> dict[str, Tensor]:
    other = make_peer()
    other.step(UPDATES)
    return {f"{name}.{key}": value for name, tensors in other.state().items() for key, value in tensors.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_next_update_is_that_of_the_original_state(layout: str, found: list[dict[str, Any]], peer: Peer) -> None:
    expected, before = expected_next(peer), peer.state()
    for rank in found:
        after = rank["next"][layout]
        assert after.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-7)
        assert {float(after[f"{name}.step"]) for name in before} == {UPDATES + 1}


def test_a_file_that_one_rank_cannot_read_ends_all_alike(found: list[dict[str, Any]]) -> None:
    assert len({rank["failure"] for rank in found}) == 1
    assert "deepspeed cannot be loaded: " in found[0]["failure"] and "lost" in found[0]["failure"]


def test_a_run_counts_on_from_the_state_s_step(
    runs: dict[str, RunConfig], found: list[dict[str, Any]], peer: Peer
) -> None:
    assert found[0]["outcomes"] == dict.fromkeys(runs, "finished")
    config = runs["deepspeed"]
    folder = run_folder(config)
    first, second = read_lines(folder / "metrics.jsonl")
    assert [first["step"], second["step"]] == [GLOBAL_STEP + 1, GLOBAL_STEP + 2]
    assert [first["learning_rate"], second["learning_rate"]] == [0.01, 0.0075]
    (checkpoint,) = find_checkpoints(folder / "checkpoints")
    state = checkpoint.state()
    rows = GLOBAL_STEP * BATCH
    assert state.origin == {"step": GLOBAL_STEP, "row": rows, "token": rows * LENGTH, "tapes": {"x": 0}}
    assert (state.step, state.row, state.token) == (7, 7 * BATCH, 7 * BATCH * LENGTH)
    assert asdict(make_plan(config, checkpoint).phases[0].start) == {
        key: value for key, value in state.origin.items() if key != "tapes"
    }
    steps = {f"{name}.step": torch.zeros(()) for name in peer.state()}
    store.read_tensors(checkpoint, {"optimizer": steps})
    assert set(map(float, steps.values())) == {UPDATES + 2}
    tape = open_tape(config, "x")
    places = make_plan(config, checkpoint).phases[0].rows(0, BATCH)[1]
    ids = torch.from_numpy(np.stack([tape.read(int(place), LENGTH + 1).tokens for place in places])).long()
    with torch.no_grad():
        logits = peer.decoder(ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert first["loss"] == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize(
    "name", ["deepspeed, imported", "deepspeed, going on there", "deepspeed, exported", "huggingface, imported"]
)
def test_a_run_from_an_imported_or_exported_checkpoint_is_the_same(
    name: str, runs: dict[str, RunConfig], found: list[dict[str, Any]]
) -> None:
    direct, imported = (read_lines(run_folder(runs[key]) / "metrics.jsonl") for key in (name.split(",")[0], name))
    assert len(direct) == 2 and direct == imported
