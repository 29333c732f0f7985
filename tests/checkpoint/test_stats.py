"""`checkpoint stats` against float64 by hand, over two runs of one model, with a limit on what is read at a time."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoint.exporting import YULAN, random_state, write_checkpoint, write_vocabulary
from titan_yulan import cli
from titan_yulan.checkpoint import read_parts, stats
from titan_yulan.checkpoint.stats import TensorStats, find_series, measure
from titan_yulan.errors import RunError

BLOCK = "model.layers.1"
# Which scalar multiplies which matrix, from the published forward pass.
SCALARS = {
    f"{BLOCK}.self_attn.q_proj.weight": f"{BLOCK}.self_attn.q_proj_alpha",
    f"{BLOCK}.self_attn.o_proj.weight": f"{BLOCK}.self_attn.o_proj_alpha",
    f"{BLOCK}.mlp.gate_proj.weight": f"{BLOCK}.gate_up_proj_alpha",
    f"{BLOCK}.mlp.up_proj.weight": f"{BLOCK}.gate_up_proj_alpha",
    f"{BLOCK}.mlp.down_proj.weight": f"{BLOCK}.down_proj_alpha",
}
WITHOUT = ("model.embed_tokens.weight", "model.norm.weight", f"{BLOCK}.self_attn.q_proj.bias", "model.norm_alpha")


@pytest.fixture(scope="module")
def states() -> list[dict[str, Tensor]]:
    """Two states of the model. The first has a bias of zero, as at initialisation, the second a negative scalar."""
    first, second = random_state(YULAN, 1), random_state(YULAN, 2)
    first[f"{BLOCK}.self_attn.k_proj.bias"].zero_()
    second[f"{BLOCK}.down_proj_alpha"].fill_(-0.5)
    return [first, second]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, states: list[dict[str, Tensor]]) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    write_vocabulary(folder / "words.tiktoken")
    for name, tensors in zip("ab", states, strict=True):
        write_checkpoint(folder / name, YULAN, tensors, folder / "words.tiktoken")
    return [folder / "a", folder / "b"]


def rms(values: list[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))


def by_tensor(runs: list[Path]) -> dict[tuple[int, str], TensorStats]:
    return {(line.place, line.tensor): line for line in measure(find_series(runs))}


@pytest.mark.parametrize(("group", "piece"), [(2**27, 2**22), (1000, 7)], ids=["whole", "pieces"])
def test_every_number_is_that_of_the_definition(
    runs: list[Path], states: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch, group: int, piece: int
) -> None:
    monkeypatch.setattr(read_parts, "_GROUP", group)
    monkeypatch.setattr(stats, "_PIECE", piece)
    measured = by_tensor(runs)
    assert measured.keys() == {(place, name) for place in (1, 2) for name in states[0]}
    lists = [{name: tensor.flatten().tolist() for name, tensor in state.items()} for state in states]
    for (place, name), line in measured.items():
        values = lists[place - 1][name]
        assert (line.values, line.step, line.tokens) == (len(values), 3, 384)
        assert line.rms == pytest.approx(rms(values), rel=1e-12)
        assert line.norm == pytest.approx(rms(values) * math.sqrt(len(values)), rel=1e-12)
        if place == 1:
            assert line.distance is None and line.relative is None
            continue
        before = lists[0][name]
        distance = math.sqrt(math.fsum((new - old) ** 2 for new, old in zip(values, before, strict=True)))
        assert line.distance == pytest.approx(distance, rel=1e-12)
        if any(before):
            norm = math.sqrt(math.fsum(old * old for old in before))
            assert line.relative == pytest.approx(distance / norm, rel=1e-12)
        else:
            assert line.relative is None and name == f"{BLOCK}.self_attn.k_proj.bias"


def test_scalars_are_those_that_multiply_the_matrix(runs: list[Path], states: list[dict[str, Tensor]]) -> None:
    measured = by_tensor(runs)
    for place, state in enumerate(states, start=1):
        for matrix, scalar in SCALARS.items():
            line, value = measured[place, matrix], float(state[scalar])
            assert line.scalar == value
            assert line.product_rms == pytest.approx(rms((value * state[matrix].double()).flatten().tolist()), rel=1e-6)
        assert all(measured[place, name].scalar is measured[place, name].product_rms is None for name in WITHOUT)
    with_scalar = {name for _, name in measured if measured[1, name].scalar is not None}
    assert with_scalar == {name for name in states[0] if re.search(r"_proj\.weight$", name)}


def test_a_tensor_of_another_shape_has_no_distance(runs: list[Path], tmp_path: Path) -> None:
    other = random_state(YULAN, 3)
    other["model.embed_tokens.weight"] = torch.ones(8, 24)
    del other["model.norm.weight"]
    write_checkpoint(tmp_path / "c", YULAN, other, runs[0].parent / "words.tiktoken")
    measured = by_tensor([runs[0], tmp_path / "c", runs[1]])
    without = [(place, name) for (place, name), line in measured.items() if place > 1 and line.distance is None]
    embedding = "model.embed_tokens.weight"
    assert sorted(without) == [(2, embedding), (3, embedding), (3, "model.norm.weight")]
    assert measured[2, embedding].norm == pytest.approx(math.sqrt(8 * 24), rel=1e-15)


def test_command_writes_table_csv_and_picture(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    table, picture = tmp_path / "stats.csv", tmp_path / "stats.svg"
    arguments = ["checkpoint", "stats", *map(str, runs), "--csv", str(table), "--plot", str(picture)]
    assert cli.main(arguments) == 0
    measured = by_tensor(runs)
    with table.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(measured)
    for line in written:
        expected = measured[int(line["place"]), line["tensor"]]
        for key in ("norm", "rms", "scalar", "product_rms", "distance", "relative", "layer"):
            value = getattr(expected, key)
            assert line[key] == ("" if value is None else repr(value))
    said = capsys.readouterr().out.splitlines()
    assert said[1] == f"  2  {runs[1]}/checkpoints/step-00000003: step 3, 384 tokens"
    place = next(number for number, line in enumerate(said) if line.startswith("mlp.down_proj.weight"))
    layers = [measured[2, f"model.layers.{layer}.mlp.down_proj.weight"].rms for layer in (0, 1)]
    assert said[place].split()[1:3] == ["2", "1"]
    assert said[place + 1].split()[:5] == [
        "2", f"{sum(layers) / 2:.4g}", f"({min(layers):.4g}", "to", f"{max(layers):.4g})",
    ]  # fmt: skip
    drawn = picture.read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("mlp.down_proj.weight", "RMS of the product", "checkpoint"))


def test_damage_and_a_wrong_suffix_are_named(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["checkpoint", "stats", str(runs[0]), "--plot", str(tmp_path / "stats.txt")]) == 2
    assert "--plot" in (said := capsys.readouterr().err) and "png" in said
    with pytest.raises(RunError, match="holds no complete checkpoint"):
        find_series([runs[0], tmp_path])
    write_checkpoint(tmp_path / "d", YULAN, random_state(YULAN, 4), runs[0].parent / "words.tiktoken")
    (index,) = (tmp_path / "d").glob("checkpoints/*/.metadata")
    index.write_bytes(bytes(index.stat().st_size))
    with pytest.raises(RunError, match=r"\.metadata is damaged"):
        find_series([tmp_path / "d"])
