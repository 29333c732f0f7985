"""Compiled blocks: the same numbers, shared code, a cache between starts, and a word about every recompilation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.parallel.small_decoder import LAYERS, gradients, make_decoder, make_ids
from titan_yulan.config.sections import ActivationCheckpointSection, CompileSection
from titan_yulan.errors import UserError
from titan_yulan.model import Decoder
from titan_yulan.parallel.activation_checkpoint import apply_activation_checkpoint
from titan_yulan.parallel.compile import CACHE_VARIABLE, CompileWatch, compile_layers, use_cache

TRACED = CompileSection(enabled=True, backend="aot_eager")
ROOT = Path(__file__).resolve().parents[2]

# Trains one block for a step in a process of its own, and says what was compiled.
START = """
import json, sys, torch
from tests.parallel.small_decoder import gradients, make_decoder, make_ids
from titan_yulan.config.sections import CompileSection
from titan_yulan.parallel.compile import CompileWatch, compile_layers

plain, decoder = make_decoder(torch.float32), make_decoder(torch.float32)
for model in (plain, decoder):
    del model.model.layers[1:]
compile_layers(decoder.model.layers, CompileSection(enabled=True, cache_dir=sys.argv[1]))
watch = CompileWatch()
wanted, found = gradients(plain, make_ids()), gradients(decoder, make_ids())
error = max(float((found[n] - g).abs().max() / g.abs().max()) for n, g in wanted.items())
print(json.dumps([error, watch.settle()]))
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No compiled code of other tests, and no cache in the user's home."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "from the environment"))
    torch._dynamo.reset()
    counters.clear()


class Doubled(nn.Module):
    """The smallest block."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x


def compiled(mode: str = "none") -> Decoder:
    decoder = make_decoder()
    apply_activation_checkpoint(decoder.model.layers, ActivationCheckpointSection(mode=mode, every=2))
    compile_layers(decoder.model.layers, TRACED)
    return decoder


@pytest.mark.parametrize(("mode", "graphs"), [("none", 2), ("selective", 2), ("every", 2), ("full", 1)])
def test_the_same_gradients_from_few_graphs(mode: str, graphs: int) -> None:
    watch, decoder = CompileWatch(), compiled(mode)
    wanted, found = gradients(make_decoder(), make_ids()), gradients(decoder, make_ids())
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-13, msg=name)
    # The first block may have one of its own: nothing was handed on to it yet.
    assert counters["stats"]["unique_graphs"] == graphs < LAYERS
    assert watch.settle().startswith(f"torch.compile: {graphs} graphs in ")


def test_only_what_is_new_is_compiled_and_reported() -> None:
    watch, decoder = CompileWatch(), compiled("full")
    for _ in range(2):
        gradients(decoder, make_ids())
    with torch.no_grad():
        decoder.eval()(make_ids(rows=4))
    decoder.train()
    assert watch.settle() != ""
    assert watch.settle() == "" and watch.recompiled() == []

    # the same shapes: more micro-batches, other rows, another rotary base, validation, and no gradients yet or some
    decoder.zero_grad(set_to_none=True)
    for _ in range(3):
        decoder(make_ids()).square().mean().backward()
    decoder.set_rope_theta(490000.0)
    gradients(decoder, make_ids().flip(0))
    with torch.no_grad():
        decoder.eval()(make_ids(rows=4))
    decoder.train()
    assert watch.recompiled() == []

    gradients(decoder, make_ids(rows=3))
    (line,) = watch.recompiled()
    assert "_full_forward (" in line and "activation_checkpoint.py:" in line
    # Not only the graph used last, which was made for validation.
    assert "size mismatch at index 0. expected 2, actual 3" in line
    assert line.endswith("Remedy: pad every micro-batch and validation batch to the same rows and sequence length.")
    assert "\n" not in line and watch.recompiled() == []


def test_each_watch_hears_of_guards() -> None:
    CompileWatch()
    watch, decoder = CompileWatch(), compiled("full")
    gradients(decoder, make_ids())
    watch.settle()
    with torch.no_grad():
        decoder(make_ids())
    (line,) = watch.recompiled()
    assert "grad_mode" in line and line.endswith("Remedy: run validation once before the first step.")


def test_more_shapes_than_pytorch_tolerates_do_not_end_the_run() -> None:
    watch, layers = CompileWatch(), nn.ModuleList([Doubled()])
    compile_layers(layers, TRACED)
    for length in range(2, 12):  # PyTorch refuses the ninth by default
        layers[0](torch.ones(length))
    assert len(watch.recompiled()) == 10


def test_nothing_happens_unless_enabled() -> None:
    watch, decoder = CompileWatch(), make_decoder()
    compile_layers(decoder.model.layers, CompileSection())
    gradients(decoder, make_ids())
    assert watch.settle() == "" and watch.recompiled() == [] and not counters["stats"]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    named = CompileSection(cache_dir=str(tmp_path / "named"))
    assert use_cache(CompileSection()) == tmp_path / "from the environment"
    assert use_cache(named) == tmp_path / "named"
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert use_cache(CompileSection()) == tmp_path / "titan_yulan" / "inductor"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert use_cache(CompileSection(cache_dir="~/x")) == tmp_path / "home" / "x"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"compile\.cache_dir: .*/file/x cannot be written"):
        use_cache(CompileSection(cache_dir=str(tmp_path / "file" / "x")))


def test_a_second_start_takes_its_code_from_the_cache(tmp_path: Path) -> None:
    lines = []
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no pool of processes for two small graphs
    for _ in range(2):
        command = [sys.executable, "-c", START, str(tmp_path / "cache")]
        answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200)
        assert answer.returncode == 0, answer.stderr
        error, line = json.loads(answer.stdout.splitlines()[-1])
        assert error < 1e-5
        lines.append(line)
    assert any(path.is_file() for path in (tmp_path / "cache").rglob("*"))
    assert f"; 0 of 2 parts came from the cache in {tmp_path / 'cache'}" in lines[0]
    assert "; 2 of 2 parts came from the cache in " in lines[1]
