"""A run that begins from somebody else's Llama, through the launcher and torchrun."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tests.checkpoint.hugging_face_folders import LLAMA, write_llama
from tests.end_to_end import harness
from tests.end_to_end.harness import metrics, train
from titan_yulan import config as configuration
from titan_yulan.checkpoint.layout import find_checkpoints
from titan_yulan.config.show import flatten
from titan_yulan.curriculum.plan import Plan
from titan_yulan.data.tape import open_tape

MODEL = replace(LLAMA, vocab_size=1024)
PHASE = """
[[curriculum]]
name = "continual"
length = "2 steps"
sequence_length = 48
start_from = "{folder}"
mix = {{ code = 0.5, math = 0.5 }}
lr = {{ shape = "linear", from = 0.0, to = 1.0, over = "2 steps" }}
"""


def test_the_first_step_has_the_loss_that_transformers_gives(tmp_path: Path, small_data: Path) -> None:
    peer = write_llama(tmp_path / "llama", MODEL)
    phases = PHASE.format(folder=tmp_path / "llama")
    path = harness.write_small_config(tmp_path, small_data, tmp_path / "outputs", phases=phases)
    refused = train(path, 2)
    assert refused.code == 2 and "is of another model than [model]. Write there:" in refused.output
    # as the message says, key by key; no key is left over
    lines = [line.split("#")[0] for line in refused.output.splitlines() if "# found" in line]
    keys = [line.replace(" ", "").replace('"', "") for line in lines]
    result = train(path, 2, *(f"--model.{key}" for key in keys), "--objective.z_loss=0", "--eval.rows=1")
    assert result.code == 0, result.output
    assert f"started from {tmp_path / 'llama'}" in result.output
    run = tmp_path / "outputs" / "small"
    config = configuration.load(run / "config.toml").config
    assert {key for key in flatten(config) if key.startswith("model.")} >= {f"model.{k.split('=')[0]}" for k in keys}
    plan = Plan(config)
    tapes = {name: open_tape(config, name) for name in ("code", "math")}
    places = zip(*plan.phases[0].rows(0, 7), strict=True)
    rows = np.stack([tapes[plan.sources[source]].read(int(start), 49).tokens for source, start in places])
    ids = torch.from_numpy(rows).long()
    with torch.no_grad():
        logits = peer(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), ids[:, 1:].flatten())
    first, second = metrics(run)
    assert abs(first["loss"] / float(loss) - 1) < 1e-6
    assert first["learning_rate"] == 0 and second["learning_rate"] == config.optimizer.learning_rate / 2
    assert find_checkpoints(run / "checkpoints")[-1].state().origin["step"] == 0
