"""`titan-yulan report`: a run as one HTML page that needs nothing else, for people who would rather look than read."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from html import escape
from pathlib import Path
from typing import Any

from titan_yulan.errors import UserError
from titan_yulan.monitor.metrics import write_atomically
from titan_yulan.monitor.report_charts import Charts, bins_for, draw
from titan_yulan.monitor.report_events import read_history
from titan_yulan.monitor.report_series import Steps, count_lines, each_line, shorten_steps
from titan_yulan.monitor.report_tables import benchmark_table, head_items, ledger_table, planned_end, thinning

_HERE = Path(__file__).parent


def report(run: Path, output: Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        run: run folder.
        output: file to write. None: report.html in the run folder.

    Returns:
        the file.

    Raises:
        UserError: the folder has no steps yet, or the file's folder does not exist.
    """
    path = run / "metrics.jsonl"
    first = next(each_line(path), None)
    if first is None:
        raise UserError(f"{run} has no metrics.jsonl with a step in it; name the folder of a run that has begun")
    output = output or run / "report.html"
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}; make it first")
    steps = shorten_steps(each_line(path), count_lines(path), bins_for(2 * len(first["source_tokens"])))
    write_atomically(output, page(run, steps))
    return output


def page(run: Path, steps: Steps) -> str:
    """The text of the page."""
    history, charts = read_history(run, steps), draw(run, steps)
    name, planned = run.resolve().name, planned_end(run)
    problems = [planned["problem"]] if "problem" in planned else []
    data = {
        "tables": charts.tables,
        "charts": [chart.to_json() for chart in charts.charts],
        "phases": [vars(phase) for phase in steps.phases],
        "marks": history.to_json(),
    }
    script, style = (_HERE / "report.js").read_text("utf-8"), (_HERE / "report.css").read_text("utf-8")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            # even if a text of the run should get around the escaping: nothing is fetched, and only our script runs
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(name)}: report</title>\n<style>\n{style}</style>\n</head>\n<body>",
            f"<header>\n<h1>{escape(name)}</h1>",
            _description(head_items(run, steps, history, planned)),
            "</header>\n<main>",
            "<noscript><p>The curves are drawn by a script inside this page; it is switched off here.</p></noscript>",
            _chart_sections(charts),
            _table("Benchmarks", benchmark_table(run, steps)),
            _table("What was read of every source", ledger_table(run)),
            _configuration(run),
            _remarks([*thinning(steps, charts, history), *problems]),
            "</main>",
            f'<script type="application/json" id="data">{embed(data)}</script>',
            f"<script>{script}</script>\n</body>\n</html>\n",
        ]
    )


def embed(data: Any) -> str:
    """JSON that can stand inside a script element: no text in it can end the element or begin a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _description(items: list[tuple[str, str]]) -> str:
    cells = "\n".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in items)
    return f'<dl class="head">\n{cells}\n</dl>'


def _chart_sections(charts: Charts) -> str:
    """Empty places that the script fills, so that a page without it still has its headings."""
    sections = list(dict.fromkeys(chart.section for chart in charts.charts))
    parts = ['<div id="toolbar" role="toolbar" aria-label="All charts"></div>']
    parts.append('<section id="events"><h2>Events</h2><div id="timeline"></div></section>')
    for section in sections:
        parts.append(f'<section data-charts="{escape(section)}"><h2>{escape(section)}</h2><div class="grid"></div>')
        if any(chart.folded for chart in charts.charts if chart.section == section):
            parts.append('<details class="more"><summary>More curves</summary><div class="grid"></div></details>')
        parts.append("</section>")
    return "\n".join(parts)


def _table(title: str, rows: list[list[str]]) -> str:
    """The first row is the head, the first column names the others."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0])
    body = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows[1:]
    )
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    label = escape(title)
    return (
        f"<section><h2>{label}</h2>"
        f'<div class="wide" tabindex="0" role="region" aria-label="{label}">{table}</div></section>'
    )


def _configuration(run: Path) -> str:
    path = run / "config.toml"
    if not path.is_file():
        return ""
    text = escape(path.read_text(encoding="utf-8"))
    return (
        "<section><h2>Configuration</h2><details><summary>config.toml, resolved, of the last start</summary>"
        f"<pre>{text}</pre></details></section>"
    )


def _remarks(lines: list[str]) -> str:
    made = time.strftime("%Y-%m-%d %H:%M:%S %z")
    items = "".join(f"<li>{escape(line)}</li>" for line in [*lines, f"Made {made} by titan-yulan report."])
    return f"<section><h2>About this page</h2><ul>{items}</ul></section>"
