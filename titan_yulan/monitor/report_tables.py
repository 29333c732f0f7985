"""What the report page says in words and tables: the head, benchmarks, the ledger, what was made short."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from titan_yulan import config
from titan_yulan.checkpoint.layout import newest_readable
from titan_yulan.checkpoint.resume import make_plan
from titan_yulan.config.model import count_parameters
from titan_yulan.errors import RunError, UserError
from titan_yulan.monitor.flops import FORMULA
from titan_yulan.monitor.metrics import read_status
from titan_yulan.monitor.report_charts import Charts
from titan_yulan.monitor.report_events import History
from titan_yulan.monitor.report_series import Steps, each_line, validation_mean

_UNKNOWN = "not known"


def head_items(run: Path, steps: Steps, history: History, planned: Mapping[str, str]) -> list[tuple[str, str]]:
    """The facts at the top of the page, as (name, value); `planned`: of `planned_end`."""
    last, status = steps.kept[-1], read_status(run)
    state = str(status.get("state", _UNKNOWN))
    items = [("Status", state + (f": {status['message']}" if status.get("message") else ""))]
    items.append(("Phase", steps.phases[-1].name))
    items.append(("Step", _of(last["step"], planned["end_step"])))
    items.append(("Tokens", _of(last["tokens"], planned["end_tokens"])))
    items.append(("Parameters", planned["parameters"]))
    items.append(("Wall clock", _wall(history)))
    items += _speed(run)
    items.append(("Last loss", f"{_number(last['loss'])} nat per token (smoothed {_number(last['smooth'])})"))
    if validation := _last_validation(run):
        items.append(("Last validation", validation))
    items.append(("Starts, restarts, failures", f"{history.starts}, {history.restarts}, {history.failures}"))
    if steps.flagged:
        items.append(("Steps skipped or warned of", f"{len(steps.flagged):,}"))
    return items


def _of(done: int, planned: str) -> str:
    return f"{done:,} of {planned}" if planned != _UNKNOWN else f"{done:,} (how many are planned is {_UNKNOWN})"


def planned_end(run: Path) -> dict[str, str]:
    """What the configuration says of the whole run: end_step, end_tokens, parameters; and `problem`, where this version
    cannot read it (or there is none), so that an old run still has its page."""
    try:
        loaded = config.load(run / "config.toml").config
        plan = make_plan(loaded, newest_readable(run / "checkpoints", lambda line: None))
    except (UserError, RunError, OSError) as error:
        unknown = dict.fromkeys(("end_step", "end_tokens", "parameters"), _UNKNOWN)
        return unknown | {"problem": f"What config.toml plans is not known: {str(error).splitlines()[0]}"}
    return {
        "end_step": f"{plan.end.step:,}",
        "end_tokens": f"{plan.end.token:,}",
        "parameters": f"{count_parameters(loaded.model):,}",
    }


def _wall(history: History) -> str:
    try:
        first, last = datetime.fromisoformat(history.first_time), datetime.fromisoformat(history.last_time)
    except ValueError:
        return f"{_UNKNOWN} (no events)"
    seconds = int((last - first).total_seconds())
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} from the first to the last event"


def _speed(run: Path) -> list[tuple[str, str]]:
    """Means over the intervals that count as training (without validation and checkpoints)."""
    spent, rate_seconds, rate_tokens, mfu_seconds, mfu = 0.0, 0.0, 0.0, 0.0, 0.0
    for line in each_line(run / "intervals.jsonl"):
        seconds = line["seconds"]
        training = seconds.get("compute", 0.0) + seconds.get("data_wait", 0.0)
        spent += sum(seconds.values())
        if line.get("tokens_per_s") is not None:
            rate_tokens += line["tokens_per_s"] * training
            rate_seconds += training
        if line.get("mfu_percent") is not None:
            mfu += line["mfu_percent"] * training
            mfu_seconds += training
    if not rate_seconds:
        return [("Throughput", f"{_UNKNOWN} (no intervals.jsonl)"), ("MFU", "n/a")]
    known = f"{mfu / mfu_seconds:.1f}%" if mfu_seconds else "n/a (the device's peak is not known)"
    return [
        ("Time in intervals", f"{spent:,.0f} s, {rate_seconds / spent:.1%} of it in steps"),
        ("Throughput", f"{rate_tokens / rate_seconds:,.0f} tokens/s, without validation and checkpoints"),
        ("MFU", f"{known}; formula: {FORMULA}"),
    ]


def _last_validation(run: Path) -> str:
    last: dict[str, Any] | None = None
    for line in each_line(run / "validation.jsonl"):
        last = line
    if not last or (mean := validation_mean(last)) is None:
        return ""
    return f"{_number(mean)} nat per token at step {last['step']:,} (all sources)"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def benchmark_table(run: Path, steps: Steps) -> list[list[str]]:
    """A row for each task and metric, a column for the last measurement of each phase, with the change from the column
    before."""
    columns: dict[str, Mapping[str, Any]] = {}
    for line in each_line(run / "evaluation.jsonl"):
        phase = next((span.name for span in steps.phases if span.first_step < line["step"] <= span.last_step), "start")
        columns[phase] = line
    if not columns:
        return []
    rows = [["task", *(f"{phase} (step {line['step']:,})" for phase, line in columns.items())]]
    keys = {(task, metric) for line in columns.values() for task, values in line["tasks"].items() for metric in values}
    for task, metric in sorted(keys):
        row, before = [f"{task} {metric}"], None
        for line in columns.values():
            value = line["tasks"].get(task, {}).get(metric)
            if value is None:
                row.append("")
                continue
            row.append(f"{value:,.4g}" + ("" if before is None else f" ({value - before:+,.3g})"))
            before = value
        rows.append(row)
    return rows


def ledger_table(run: Path) -> list[list[str]]:
    """From the newest sound checkpoint: what the run has read of every source."""
    checkpoint = newest_readable(run / "checkpoints", lambda line: None)
    if checkpoint is None or not checkpoint.state().ledger:
        return []
    state = checkpoint.state()
    rows = [["source", "rows", "tokens", "epochs", f"rows in {state.phase}", f"tokens in {state.phase}"]]
    for name, entry in sorted(state.ledger.items(), key=lambda item: (-item[1]["tokens"], item[0])):
        epochs = _UNKNOWN if entry["epochs"] is None else f"{entry['epochs']:.3f}"
        numbers = [f"{entry[key]:,}" for key in ("phase_rows", "phase_tokens")]
        rows.append([name, f"{entry['rows']:,}", f"{entry['tokens']:,}", epochs, *numbers])
    return rows


def thinning(steps: Steps, charts: Charts, history: History) -> list[str]:
    """What the page does not hold in full."""
    kept = len(steps.kept)
    lines = ["Numbers are rounded to seven digits."]
    if kept < steps.total:
        lines.append(
            f"Of {steps.total:,} steps {kept:,} are drawn one by one: the least and greatest loss and gradient norm of "
            f"neighbouring steps, both ends of every phase, and steps with a remark."
        )
    else:
        lines.append(f"All {steps.total:,} steps are drawn.")
    lines.append(f"The smoothed loss is an exponential mean over all steps, half-life {steps.half_life} steps.")
    notes: dict[str, list[str]] = {}
    for chart in charts.charts:
        if "Means of" in chart.note:
            notes.setdefault(chart.note[chart.note.index("Means of") :], []).append(chart.title)
    for note, titles in notes.items():
        lines.append(f"{', '.join(titles[:4])}{f' and {len(titles) - 4} more' if len(titles) > 4 else ''}: {note}")
    lines += [f"Of events '{kind}' the oldest {count:,} are left out." for kind, count in history.left_out.items()]
    return lines
