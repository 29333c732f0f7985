"""Prove the resume guarantees on the default job at its full size (about 11 minutes on 2 cores):

    python -m tests.end_to_end.prove OUTPUT_DIR

An undisturbed run on 2 ranks is compared with: a run of which one worker is killed with signal 9; runs on 1 and on 3
ranks; a run that is stopped in phase 2, goes on with 3 ranks, is stopped again and ends with 1. The short form of all
this is part of the test suite (`test_runs.py`).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.end_to_end.harness import column, kill_worker, metrics, stop, train, validations


def main(output: Path) -> int:
    """Run everything; returns 0 if every guarantee held."""
    held = True

    def start(name: str, processes: int, expected: int = 0, **options) -> Path:
        begin = time.perf_counter()
        result = train("debug.toml", processes, f"--run.output_dir={output / name}", **options)
        if result.code != expected:
            print(result.output)
            raise SystemExit(f"{name}: exit code {result.code} instead of {expected}")
        print(f"{name}: {processes} rank(s), exit code {result.code}, {time.perf_counter() - begin:.0f} s", flush=True)
        return output / name / "debug"

    def check(what: str, truth: bool) -> None:
        nonlocal held
        held = held and truth
        print(f"  {'yes' if truth else 'NO '}  {what}", flush=True)

    reference = start("undisturbed", 2)
    expected, last = metrics(reference), validations(reference)[-1]["validation_loss"]
    first = validations(reference)[0]["validation_loss"]
    drops = {name: round(first[name] - last[name], 4) for name in last}
    check(f"validation loss of every source at least 1.0 nat lower: {drops}", min(drops.values()) >= 1.0)

    killed = start("killed", 2, at_line="step 130/", action=kill_worker)
    check("every line of metrics.jsonl equal, bit for bit", metrics(killed) == expected)
    check("every validation loss equal, bit for bit", validations(killed) == validations(reference))

    for processes in (1, 3):
        run = start(f"on_{processes}", processes)
        lines = metrics(run)
        prints = column(lines, "batch_fingerprint") == column(expected, "batch_fingerprint")
        check(f"batch_fingerprint of all {len(expected)} steps equal", prints and len(lines) == len(expected))
        pairs = list(zip(lines[:20], expected[:20], strict=True))
        worst = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs)
        check(f"losses of the first 20 steps equal to {worst:.1e} relative (allowed 1e-5)", worst <= 1e-5)
        difference = max(abs(validations(run)[-1]["validation_loss"][name] - last[name]) for name in last)
        check(f"last validation losses within {difference:.4f} nat (allowed 0.02)", difference <= 0.02)

    start("moved", 2, expected=75, at_line="step 130/", action=stop)
    stopped = metrics(output / "moved" / "debug")[-1]["step"]
    start("moved", 3, expected=75, at_line=f"step {10 * (stopped // 10 + 2)}/", action=stop)
    stopped_again = metrics(output / "moved" / "debug")[-1]["step"]
    moved = metrics(start("moved", 1))
    phase = next(line["phase"] for line in expected if line["step"] == stopped)
    prints = column(moved, "batch_fingerprint") == column(expected, "batch_fingerprint")
    check(f"stopped at {stopped} (phase {phase!r}) and {stopped_again}: all fingerprints equal", prints)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
