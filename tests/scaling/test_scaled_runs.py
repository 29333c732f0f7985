"""Runs from tables and run folders, the verbs on them, and their refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.checkpoint.making import make_checkpoint
from tests.config.config_texts import BASE, PHASE
from tests.scaling.making import LAW, PLANTED, make_runs
from titan_yulan.cli import main
from titan_yulan.errors import UserError
from titan_yulan.scaling.answers import ranges_won
from titan_yulan.scaling.forms import Law
from titan_yulan.scaling.runs import read_run, read_runs, read_table


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
        ("parameters,tokens,loss\n1,2,\n", r"bad.csv:2: loss: '' is no positive number"),
        ("parameters,tokens,loss\n,2,3\n", r"bad.csv:2: parameters: '' is no positive number"),
        ("parameters,tokens,unique_tokens,loss\n1,,2,3\n", r"bad.csv:2: tokens: '' is no positive number"),
        ("parameters,tokens,loss\n1,2\n", r"bad.csv:2: loss: None is no positive number"),
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
    (tmp_path / "run" / "validation.jsonl").write_text('{"step": 9, "tokens": 99, "validation_loss": {"a": 9.0}}\n')
    with pytest.raises(UserError, match="run has no checkpoint"):
        read_runs([tmp_path / "run"])
    with pytest.raises(UserError, match="no run is left"):
        read_runs([tmp_path])


def run_folder(
    folder: Path, step: int, losses: Sequence[float | None], kind: str = "autoregressive", origin: int = 0
) -> Path:
    """A run of 100 steps of 1,024 tokens that has come to `step`, validated every 10."""
    first = {"step": origin, "row": 8 * origin, "token": 1024 * origin, "tapes": {}}
    ledger = {"code": {"tokens": 1024 * (step - origin), "epochs": 4.0}}
    text = BASE + PHASE + f'[objective]\nkind = "{kind}"\n'
    make_checkpoint(folder / "checkpoints", step, text, origin=first, ledger=ledger)
    lines = [
        {"step": origin + 10 * i, "tokens": 1024 * (origin + 10 * i), "validation_loss": {"code": loss}}
        for i, loss in enumerate(losses)
    ]
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_run_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    falling = [9.0 - i / 2 for i in range(11)]
    done = run_folder(tmp_path / "ar-done", 100, falling)
    half = run_folder(tmp_path / "ar-half", 50, falling[:6])
    run_folder(tmp_path / "mdm", 100, falling, "masked_diffusion")
    late = run_folder(tmp_path / "later", 150, falling, origin=100)

    found = read_run(done)
    assert (found.tokens, found.unique_tokens, found.loss) == (102400, 25600, 4.0)
    assert (found.objective, found.epochs) == ("autoregressive", 4.0)
    with pytest.raises(UserError, match=r"ar-half is at step 50 of 100.*let it finish, or take --best"):
        read_runs([half])
    with pytest.raises(UserError, match="later is at step 150 of 200"):
        read_runs([late])
    assert capsys.readouterr().out == ""
    assert {run.name for run in read_runs([tmp_path])} == {"ar-done", "mdm"}
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(" is at")[0] for line in told] == [f"left out: {half}", f"left out: {late}"]

    assert [run.name for run in read_runs([tmp_path], best=True)] == ["ar-done", "ar-half", "later", "mdm"]
    assert f"note: {half} is at step 50 of 100: its schedule was not finished" in capsys.readouterr().out
    assert [run.name for run in read_runs([tmp_path], objective="masked_diffusion")] == ["mdm"]
    with pytest.raises(UserError, match="--objective masked_diffusion: ar-done is autoregressive"):
        read_runs([done], objective="masked_diffusion")


def test_validations_that_are_not_finite_or_too_early(tmp_path: Path):
    with pytest.raises(UserError, match="no finite validation loss after its first step"):
        read_run(run_folder(tmp_path / "one", 100, [9.0]))
    diverged = run_folder(tmp_path / "diverged", 100, [9.0, 5.0, 4.0, None])
    with pytest.raises(UserError, match="the last validation loss is not finite"):
        read_run(diverged)
    assert (read_run(diverged, best=True).loss, read_run(diverged, best=True).tokens) == (4.0, 20480)
    assert read_run(run_folder(tmp_path / "recovered", 100, [9.0, None, 4.0])).loss == 4.0
    started = run_folder(tmp_path / "started", 200, [1.0, 5.0, 4.0], origin=100)  # 1.0 is of the run before
    assert read_run(started, best=True).loss == 4.0
    with pytest.raises(UserError, match="no finite validation loss"):
        read_run(run_folder(tmp_path / "never", 100, [9.0, None]), best=True)


def test_objectives_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = ["parameters,tokens,loss,objective", "1M,2M,3,masked diffusion", "1M,2M,4,autoregressive", "1M,2M,5,"]
    (tmp_path / "runs.csv").write_text("\n".join(lines))
    assert [run.objective for run in read_table(tmp_path / "runs.csv")] == ["masked_diffusion", "autoregressive", ""]
    assert [run.loss for run in read_runs([tmp_path / "runs.csv"], objective="masked_diffusion")] == [3.0, 5.0]
    assert main(["scaling", "fit", str(tmp_path / "runs.csv"), "--form", "chinchilla"]) == 2
    assert "--objective autoregressive" in capsys.readouterr().err


def stored(path: Path, factor: float, **coefficients: float) -> Path:
    """A fit with three resampled laws, to runs of at most 1e9 parameters, 6.4e9 tokens and 64 epochs."""
    law = {**PLANTED, **coefficients}
    samples = [
        [value * (scale if name == "B" else 1) for name, value in law.items()] for scale in (1 / factor, 1, factor)
    ]
    runs = [asdict(run) for run in make_runs() if run.unique_tokens == 1e8 and run.parameters <= 1e9]
    content = {"form": "data_constrained", "coefficients": law, "samples": samples, "runs": runs}
    path.write_text(json.dumps(content))
    return path


def test_what_lies_beyond_the_runs_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fit = stored(tmp_path / "ar.json", 1.02)
    predict = ["scaling", "predict", "--fit", str(fit), "--unique-tokens=100M"]
    for parameters, tokens, marked in (("1B", "6.4B", False), ("1.01B", "6.4B", True), ("1B", "6.5B", True)):
        assert main([*predict, "--parameters", parameters, "--tokens", tokens]) == 0
        printed = capsys.readouterr().out
        assert ("]*\n* beyond the runs" in printed) == marked == ("*" in printed)
    other = stored(tmp_path / "mdm.json", 1.02, B=2400.0, R_D=500.0, R_N=50.0)
    plan = ["scaling", "plan", "--fit", str(fit), "--against", str(other), "--unique-tokens=100M"]
    assert main([*plan, "--flops", "1e17", "1e21"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("]*") for line in lines[2:6]] == [False, True, False, True]
    assert all(line.count("[") == 1 for line in lines[2:6])
    assert "worth 50% of a fresh one up to epoch 11.4" in lines[6] and "up to epoch 347.6*" in lines[7]
    [first] = ranges_won(
        LAW, Law("data_constrained", {**PLANTED, "B": 2400.0, "R_D": 500.0, "R_N": 50.0}), 1e8, (6e15, 1e21)
    )
    assert lines[8].startswith(f"mdm has the lower loss from {first[0]:.4g}")
    assert lines[8].endswith("to 1e+21* FLOPs (looked for from 6e+15 to 1e+21 FLOPs)")
    low, high = (float(end) for end in lines[9].partition(": ")[2].split(" to "))
    assert low < first[0] < high
    assert lines[-1].startswith("* beyond the runs")


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
        (
            ["plan", "--fit=datablations", "--against=datablations", "--unique-tokens=1M", "--flops=1e9"],
            "give a second amount of compute",
        ),
        (["fit", "absent.csv"], "cannot read absent.csv"),
    ],
)
def test_verbs_refuse(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["scaling", *arguments]) == 2
    assert message in capsys.readouterr().err
