"""The benchmark end to end on a CPU, and that it does not time what is wrong."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from titan_yulan.config.presets import PRESETS
from titan_yulan.kernels import bench, bench_measure
from titan_yulan.kernels.bench_measure import Case, WrongResult, accumulated_error, errors, timing
from titan_yulan.kernels.bench_operations import KEYS, OPERATIONS, Shape, implementation
from titan_yulan.kernels.bench_report import Machine, Row, markdown

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPE = Shape(tokens=11, hidden=24, intermediate=40, vocab=56, keys=8, dtype=torch.float32)
CPU = torch.device("cpu")


def test_runs_as_a_script_and_writes_its_tables(tmp_path: Path) -> None:
    """From another folder, as in a checkout: the folder of the script must not shadow anything."""
    command = [sys.executable, ROOT / "kernels/bench.py", "swiglu", "rms_norm", "--tokens", "8,16", "--plot"]
    command += ["--impl", "reference,torch,triton", "--mode", "fwd,bwd", "--out", tmp_path / "out"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    with open(tmp_path / "out/kernels.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3 * 2
    for row in rows:
        if row["implementation"] != "triton":
            assert row["status"] == "measured" and float(row["ms"]) > 0 and float(row["share_of_copy"]) > 0
            assert float(row["error"]) < 1e-6 and row["torch"] == torch.__version__ and row["commit"]
        elif not torch.cuda.is_available():
            assert row["status"] == "not measured: needs a GPU" and row["ms"] == ""
    page = (tmp_path / "out/kernels.md").read_text(encoding="utf-8")
    assert "## swiglu, bwd, " in page and "| 16 | reference | " in page


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_right_and_can_be_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_measure, "_ORACLE_ROWS", 4)  # 11 tokens: three chunks, the last one short
    operation = OPERATIONS[name]
    case = Case(operation, SHAPE, CPU)
    for kind in ("reference", "torch"):
        function = implementation(operation, kind)
        assert max(errors(case, function)) < 1e-6
        for mode in operation.traffic:
            assert timing(case, function, mode).median > 0
    if operation.accumulated is not None:
        assert accumulated_error(case, operation.accumulated("reference")) < 1e-6


def test_columns_of_the_keys_are_those_of_the_presets() -> None:
    for name, columns in KEYS.items():
        assert columns == PRESETS[name].num_key_value_heads * PRESETS[name].attention_head_dim


def test_traffic_and_work_of_the_projections() -> None:
    qkv, gate_up = (OPERATIONS[name] for name in ("packed_linear_qkv", "packed_linear_gate_up"))
    assert [qkv.traffic[mode](SHAPE) for mode in ("fwd", "bwd")] == [
        4 * (11 * 24 + 40 * 24 + 11 * 40),
        4 * (2 * (11 * 24 + 40 * 24) + 11 * 40),
    ]
    assert gate_up.traffic["fwd_bwd"](SHAPE) == 4 * (3 * (11 * 24 + 80 * 24) + 2 * 11 * 40)
    assert [gate_up.work[mode](SHAPE) for mode in ("fwd", "bwd", "fwd_bwd")] == [
        2 * 11 * 24 * 80 * n for n in (1, 2, 3)
    ]


def test_a_peer_without_the_operation_has_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["packed_linear_qkv", "--tokens", "4", "--mode", "fwd", "--size", "debug", "--dtype", "fp32"]
    rows = measured([*arguments, "--impl", "torch,liger,liger_float32"], monkeypatch, spoilt=False)
    assert [(row.implementation, row.status) for row in rows] == [("torch", "measured")]


@pytest.mark.parametrize("name", ["add_rms_norm", "linear_cross_entropy"])
def test_the_float64_result_does_not_depend_on_its_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Case(OPERATIONS[name], SHAPE, CPU).expected
    monkeypatch.setattr(bench_measure, "_ORACLE_ROWS", 3)
    torch.testing.assert_close(Case(OPERATIONS[name], SHAPE, CPU).expected, whole, rtol=1e-12, atol=1e-12)


def wrong_value(y: Tensor) -> Tensor:
    return y + torch.nn.functional.pad(
        0.5 * y.detach().abs().max().reshape(1, 1), (0, y.shape[1] - 1, 0, y.shape[0] - 1)
    )


def wrong_gradient(y: Tensor) -> Tensor:
    return y.detach() + 1.01 * (y - y.detach())


def not_written(y: Tensor) -> Tensor:
    return y.masked_fill(torch.arange(y.shape[1]) == 7, torch.nan)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_value, "of one element"),
        (wrong_gradient, "relative error 1.0e-02"),
        (not_written, "were not written"),
        (lambda y: y[:-1], "shape"),
    ],
)
def test_a_wrong_result_is_refused(spoil: Callable[[Tensor], Tensor], message: str) -> None:
    case = Case(OPERATIONS["swiglu"], SHAPE, CPU)
    with pytest.raises(WrongResult, match=message):
        errors(case, lambda *inputs: tuple(spoil(y) for y in OPERATIONS["swiglu"].mathematics(*inputs)))


def test_inputs_that_an_implementation_overwrites_are_restored() -> None:
    case = Case(OPERATIONS["swiglu"], SHAPE, CPU)
    copy = case.copy()
    for t in copy.inputs + copy.gradients:
        t.detach().zero_()
    copy.restore()
    for mine, original in zip(copy.inputs + copy.gradients, case.inputs + case.gradients, strict=True):
        assert torch.equal(mine, original)


def measured(arguments: list[str], monkeypatch: pytest.MonkeyPatch, spoilt: bool) -> list[Row]:
    request, _ = bench.read_arguments(arguments)
    request = replace(request, device=CPU)
    if spoilt:
        operation = OPERATIONS["rms_norm"]
        spoilt_operation = replace(
            operation, ours=lambda _: lambda x, weight: (2 * operation.mathematics(x, weight)[0],)
        )
        monkeypatch.setitem(OPERATIONS, "rms_norm", spoilt_operation)
    return list(bench.Bench(request, (1e9, 1e9), start=bench.time.monotonic()).rows())


def test_what_is_wrong_is_not_timed_and_the_rest_is(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["rms_norm", "--tokens", "4", "--size", "debug", "--dtype", "fp32", "--impl", "reference,torch"]
    rows = measured(arguments, monkeypatch, spoilt=True)
    status = {(row.implementation, row.mode): row for row in rows}
    assert len(status) == 6
    for (name, _), row in status.items():
        refused = row.status.startswith("refused, its result is wrong: relative error 1.0e+00") and row.ms is None
        assert refused if name == "reference" else row.status == "measured"


def test_a_spent_budget_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured(["rms_norm", "--tokens", "4", "--budget-s", "0"], monkeypatch, spoilt=False)
    assert rows and all(row.status == "not measured: the budget of 0 s was spent" for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rms_nrom"], "OP: rms_nrom is none of rms_norm, add_rms_norm"),
        (["--impl", "triton,magic"], "--impl: magic is none of"),
        (["--mode", "forward"], "--mode: forward is none of fwd, bwd, fwd_bwd"),
        (["--tokens", "16,0"], "--tokens 16,0: give positive whole numbers"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        bench.read_arguments(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_the_page_compares_with_targets_peers_and_sums_a_layer() -> None:
    machine = Machine("GPU", 3000.0, 700.0, *8 * ["x"])
    norm, activation = "add_rms_norm", "swiglu_packed"
    times = {(norm, "fwd"): 1.0, (norm, "bwd"): 2.0, (activation, "fwd"): 4.0, (activation, "bwd"): 8.0}
    rows = []
    for name, factor in (("triton", 1.0), ("liger", 1.5), ("compile", 1.25)):
        target = 0.92 if name == "triton" else None
        for (operation, mode), ms in times.items():
            row = Row(operation, name, mode, "yulan_mini_2b", 4096, "bf16", "measured", ms=factor * ms)
            rows.append(replace(row, share_of_copy=0.9 / factor, target=target))
    page = markdown(machine, rows)
    assert "| swiglu_packed | bwd | 4096 | 0.900 | 0.92 | compile | 1.250 |" in page
    assert "| 4096 | triton | 18 | 1.000 |" in page and "| 4096 | liger | 27 | 1.500 |" in page
