"""Start real runs through the launcher and torchrun, watch their output, kill or stop them, compare their records."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from titan_yulan.checkpoint.layout import find_checkpoints
from titan_yulan.monitor.metrics import read_lines, write_atomically

ROOT = Path(__file__).resolve().parents[2]

# The default job made small: the same three phases, three sources and model shape.
SMALL = """
extends = "{debug}"
[run]
name = "small"
output_dir = "{output}"
[model]
hidden_size = 48
intermediate_size = 96
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 12
vocab_size = 1024
[optimizer]
base_width = 16
learning_rate = 0.01
[tokenizer]
path = "{data}/tokenizer.tiktoken"
train_vocab_size = 1024
{sources}
[checkpoint]
every = "7 steps"
keep = 2
[monitor]
log_every = 1
[eval]
rows = 6
new_tokens = 8
[batch]
global_batch_size = 7
micro_batch_size = 2
{phases}
"""
_SOURCE = """
[data.sources.{name}]
path = "{data}/{name}/train"
validation_path = "{data}/{name}/validation"
text = ["{text}"]
validation_share = 0.2
"""
PHASES = """
[[curriculum]]
name = "stable"
length = "16 steps"
sequence_length = 48
mix = { code = 0.5, math = 0.3, prose = 0.2 }
lr = [{ shape = "linear", from = 0.05, to = 1.0, over = "20 steps" }, { shape = "constant" }]
[[curriculum]]
name = "mix"
length = "14 steps"
sequence_length = 48
mix = { code = 0.3, math = 0.5, prose = 0.2 }
[[curriculum]]
name = "anneal"
length = "8 steps"
sequence_length = 96
rope_theta = 49000
rebalance_rms = 0.02
batch = { global_batch_size = 4, micro_batch_size = 1 }
mix = { code = 0.4, math = 0.4, prose = 0.2 }
lr = { shape = "1-sqrt", from = 1.0, to = 0.0, over = "8 steps" }
"""
# real text that every machine has: some modules of the standard library for each source
_TEXT = {
    "code": ("argparse.py", "ast.py", "calendar.py", "configparser.py", "csv.py", "dataclasses.py"),
    "math": ("_pydecimal.py", "fractions.py", "random.py", "statistics.py", "numbers.py", "colorsys.py"),
    "prose": ("pydoc_data/topics.py", "doctest.py", "inspect.py", "typing.py", "optparse.py", "imaplib.py"),
}


def write_small_config(folder: Path, data: Path, output: Path, extra: str = "", phases: str = PHASES) -> Path:
    """A configuration for tests; `data` is shared between runs, `output` holds their run folders."""
    write_text(data)
    sources = "".join(_SOURCE.format(name=name, data=data, text=data / f"{name}.txt") for name in _TEXT)
    path = folder / "small.toml"
    path.write_text(
        SMALL.format(
            debug=ROOT / "train_configs" / "debug.toml", output=output, data=data, sources=sources, phases=phases
        )
        + extra
    )
    return path


def write_text(data: Path) -> None:
    """The text of the sources, a file each; written once, alike by whoever comes first."""
    data.mkdir(parents=True, exist_ok=True)
    for name, modules in _TEXT.items():
        if not (data / f"{name}.txt").exists():
            parts = [(Path(os.__file__).parent / module).read_text(encoding="utf-8") for module in modules]
            write_atomically(data / f"{name}.txt", "\n".join(parts))


@dataclass
class Result:
    """What a start of the launcher ended with."""

    code: int
    output: str


def launch(
    config: Path | str, processes: int, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start the launcher; its output and the run's come together."""
    return subprocess.Popen(
        [sys.executable, "-m", "titan_yulan.cli", "train", "--config", str(config), *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "NPROC": str(processes),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **(environment or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def train(
    config: Path | str,
    processes: int,
    *arguments: str,
    at_line: str | None = None,
    action: Callable[[int], None] = lambda pid: None,
    environment: dict[str, str] | None = None,
) -> Result:
    """Run the launcher to its end. When a line of output contains `at_line`, call `action(launcher's pid)` once."""
    process = launch(config, processes, *arguments, environment=environment)
    lines = []
    try:
        for line in process.stdout or ():
            lines.append(line)
            if at_line is not None and at_line in line:
                at_line = None
                action(process.pid)
        return Result(process.wait(), "".join(lines))
    finally:
        process.kill()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_all(pid: int) -> None:
    """Kill -9 a process and all below it."""
    with suppress(OSError):
        below = children(pid)
        os.kill(pid, signal.SIGKILL)
        for child in below:
            kill_all(child)


def stop(launcher: int) -> None:
    """What a scheduler does: SIGTERM to the launcher."""
    os.kill(launcher, signal.SIGTERM)


def kill_worker(launcher: int, local_rank: int = 1) -> None:
    """Kill -9 one worker of torchrun."""
    (torchrun,) = children(launcher)
    os.kill(children(torchrun)[local_rank], signal.SIGKILL)


def metrics(run: Path) -> list[dict]:
    return read_lines(run / "metrics.jsonl")


def validations(run: Path) -> list[dict]:
    return read_lines(run / "validation.jsonl")


def tensors(run: Path) -> dict[str, dict]:
    """Size and hash of each file of weights and Adam's state in the newest checkpoint."""
    manifest = find_checkpoints(run / "checkpoints")[-1].manifest()
    return {name: entry for name, entry in manifest.items() if name.endswith(".distcp")}


def same_in_every_bit(run: Path, reference: Path) -> bool:
    """Whether two runs on the same number of ranks have the same lines, validation losses and last tensors."""
    records = metrics(run) == metrics(reference) and validations(run) == validations(reference)
    return records and tensors(run) == tensors(reference)


def column(lines: list[dict], key: str) -> list:
    return [line[key] for line in lines]
