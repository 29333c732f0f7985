"""Runs from tables, the verbs on them, and their refusals. Run folders: tests/end_to_end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scaling.making import LAW, PLANTED, make_runs
from titan_yulan.cli import main
from titan_yulan.errors import UserError
from titan_yulan.scaling.runs import read_runs, read_table


def table(path: Path) -> Path:
    lines = [f"{r.name},{r.tokens!r},{r.parameters!r},{r.unique_tokens!r},{r.loss!r}" for r in make_runs(noise=0.002)]
    path.write_text("\n".join(["name,tokens,parameters,unique_tokens,loss", *lines]) + "\n")
    return path


def test_read_table(tmp_path: Path):
    assert read_table(table(tmp_path / "runs.csv")) == make_runs(noise=0.002)
    (tmp_path / "short.csv").write_text("parameters,tokens,loss\n124M,1.2B,3.5\n")
    (run,) = read_runs([tmp_path / "short.csv"])
    assert (run.parameters, run.tokens, run.unique_tokens, run.loss, run.epochs) == (124e6, 1.2e9, 1.2e9, 3.5, 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parameters,tokens\n1,2\n", r"lacks the column\(s\) loss"),
        ("parameters,tokens,loss\n1,2,3\n1,2,nan\n", r"bad.csv:3: loss: 'nan' is no positive number"),
        ("parameters,tokens,loss\n-1,2,3\n", r"bad.csv:2: parameters: '-1' is no positive number"),
        ("", "lacks the column"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, message: str):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / "bad.csv")


def test_bad_inputs(tmp_path: Path):
    with pytest.raises(UserError, match="no run folder, no folder of run folders"):
        read_runs([tmp_path])
    with pytest.raises(UserError, match="cannot read"):
        read_runs([tmp_path / "absent.csv"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "validation.jsonl").write_text('{"step": 0, "tokens": 0, "validation_loss": {"a": 9.0}}\n')
    with pytest.raises(UserError, match="no validation loss after its first step"):
        read_runs([tmp_path])
    (tmp_path / "run" / "validation.jsonl").write_text('{"step": 9, "tokens": 99, "validation_loss": {"a": null}}\n')
    with pytest.raises(UserError, match="the last validation loss is not finite"):
        read_runs([tmp_path])


def test_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs, fit, picture = table(tmp_path / "runs.csv"), tmp_path / "fit.json", tmp_path / "fit.png"
    verb = ["scaling", "fit", str(runs), "--resamples", "40", "--output", str(fit)]
    assert main([*verb, "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "fitted to 72 runs, 95% intervals from 40 resamples" in printed
    assert all(f"  {name} " in printed for name in PLANTED)
    assert picture.read_bytes().startswith(b"\x89PNG")

    question = ["--parameters", "500M", "--tokens", "10B", "--unique-tokens", "1B"]
    assert main(["scaling", "predict", "--fit", str(fit), *question]) == 0
    loss, low, high = capsys.readouterr().out.replace("[", "").replace("]", "").replace(",", "").split()[1:]
    assert float(low) <= float(loss) <= float(high)
    assert float(loss) == pytest.approx(LAW.loss(5e8, 1e10, 1e9), rel=2e-3)

    assert main(["scaling", "predict", "--fit", "datablations", "--parameters=6.34B", "--tokens=242B",
                 "--unique-tokens=25B"]) == 0  # fmt: skip
    assert capsys.readouterr().out == "loss 2.225644089\n"
    plan = ["scaling", "plan", "--fit", str(fit), "--against", "datablations", "--unique-tokens", "100M"]
    assert main([*plan, "--flops", "1e18", "1e20", "--plot", str(tmp_path / "plan.svg")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("datablations   ") == 2
    assert "up to epoch" in printed
    assert "datablations has the lower loss" in printed
    assert "from 4.724e+19 FLOPs on, as published" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "--fit", "nothing.json", "--parameters=1", "--tokens=1"], "nothing.json is no fit"),
        (["predict", "--fit", "datablations", "--parameters=0", "--tokens=1"], "--parameters 0: a positive number"),
        (["plan", "--fit", "datablations", "--unique-tokens=1M", "--worth=2"], "--worth 2: between 0 and 1"),
        (["plan", "--fit", "datablations", "--unique-tokens=1M", "--plot=a.doc"], "the suffix says the format"),
        (["fit", "absent.csv"], "cannot read absent.csv"),
    ],
)
def test_verbs_refuse(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["scaling", *arguments]) == 2
    assert message in capsys.readouterr().err
