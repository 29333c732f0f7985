"""The whole curriculum in miniature, looked at from outside (about eight minutes on two idle cores):

    python -m tests.end_to_end.miniature DIR [--section.key=value ...]

runs `./run_train.sh --config mini.toml` from nothing and takes its time; reads the stream again and follows every
document of it; looks for the curves in TensorBoard; and lets a copy of the run, from the end of phase 25 on, be stopped
in the middle of phases 26 and 27 and go on with 3 ranks and with 1. A run that is there in DIR is used again. Keys make
it shorter: --miniature.sequence_length_divisor=256 takes a third of the time.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.end_to_end import harness
from titan_yulan import config
from titan_yulan.curriculum.plan import Plan
from titan_yulan.data import hashing
from titan_yulan.data.source import Source
from titan_yulan.data.tape import open_tape
from titan_yulan.monitor.events import read_events

NAME = "mini.toml"
SOURCES = ("code", "synthetic_code", "math", "synthetic_math", "english", "in_place_of_chinese")
MOST_SECONDS = 600


@dataclass(frozen=True)
class Reading:
    """How a source was read: complete documents, and those that came again while others had not come yet."""

    documents: int
    again: int
    epochs: float


def overrides(folder: Path, run: str) -> list[str]:
    """Everything below `folder`, the data too."""
    data = folder / "data"
    paths = [f"--tokenizer.path={data / 'tokenizer.tiktoken'}", f"--run.output_dir={folder / run}"]
    for name in SOURCES:
        paths.append(f"--data.sources.{name}.path={data / name / 'train'}")
        paths.append(f"--data.sources.{name}.validation_path={data / name / 'validation'}")
    return paths


def follow(stream: np.ndarray, documents: list[bytes], end_of_text: int) -> Reading:
    """Split a stream of tokens into documents, by their content alone, and compare with those of the source.

    Args:
        stream: (tokens,) what was read of one source, in order.
        documents: token ids of every document of the source, as bytes; equal documents occur as often as they do.
    """
    ends = np.flatnonzero(stream == end_of_text) + 1
    waiting, left, again, begin = Counter(documents), len(documents), 0, 0
    for end in ends:
        document = stream[begin:end].tobytes()
        begin = end
        if not left:
            waiting, left = Counter(documents), len(documents)
        if waiting[document]:
            waiting[document] -= 1
            left -= 1
        else:
            again += 1  # it, or something that is no document at all
    return Reading(len(ends), again, len(stream) * 4 / sum(map(len, documents)))


def documents_of(source: Source) -> Iterator[bytes]:
    """Every document, read from the shards without a tape."""
    for shard in range(len(source.shards)):
        tokens = np.asarray(source.shard_tokens(shard), dtype=np.int32)
        offsets = source.shard_offsets(shard).tolist()
        for start, end in itertools.pairwise(offsets):
            yield tokens[start:end].tobytes()


def read_stream(plan: Plan) -> tuple[list[str], dict[str, np.ndarray]]:
    """The fingerprint of every step, and the tokens of every source in the order in which they are read."""
    tapes = [open_tape(plan.config, name) for name in plan.sources]
    prints: list[str] = []
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in plan.sources}
    for phase in plan.phases:
        for first in range(0, phase.rows_total, phase.batch_rows):
            batch = []
            for source, position in zip(*phase.rows(first, first + phase.batch_rows), strict=True):
                row = np.asarray(tapes[source].read(int(position), phase.sequence_length + 1).tokens)
                pieces[plan.sources[source]].append(row[:-1])  # the last token is the next row's first
                batch.append(row)
            total = int(hashing.fingerprint(np.stack(batch)).sum(dtype=np.uint64))
            prints.append(f"{total:016x}")
    return prints, {name: np.concatenate(rows) for name, rows in pieces.items()}


class Proof:
    """Prints what is checked, and remembers whether all of it held."""

    def __init__(self) -> None:
        self.held = True

    def check(self, what: str, truth: bool) -> None:
        self.held = self.held and truth
        print(f"  {'yes' if truth else 'NO '}  {what}", flush=True)


def train_from_nothing(folder: Path, arguments: list[str], proof: Proof) -> None:
    begin = time.perf_counter()
    with open(folder / "output.txt", "w", encoding="utf-8") as output:
        code = subprocess.run(
            ["./run_train.sh", "--config", NAME, *arguments],
            cwd=harness.ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=output,
            stderr=subprocess.STDOUT,
        ).returncode
    seconds = time.perf_counter() - begin
    proof.check(f"./run_train.sh --config {NAME} from nothing: exit code {code}, {seconds:.0f} s", code == 0)
    proof.check(f"less than {MOST_SECONDS} s, data and vocabulary included", seconds < MOST_SECONDS)


def check_stream(plan: Plan, run: Path, proof: Proof) -> None:
    lines = harness.metrics(run)
    prints, streams = read_stream(plan)
    proof.check(
        f"fingerprints of all {len(prints):,} steps are those of the stream",
        harness.column(lines, "batch_fingerprint") == prints,
    )
    for name, stream in streams.items():
        source = Source.open(plan.config.data.sources[name].path)
        reading = follow(stream, list(documents_of(source)), source.eos_id)
        read = f"{name}: {reading.documents:,} documents read ({reading.epochs:.3f} epochs)"
        proof.check(f"{read}, {reading.again} of them again before the source ended", reading.again == 0)


def check_curves(plan: Plan, run: Path, proof: Proof) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    curves.Reload()
    steps = list(range(1, plan.end.step + 1))
    tags = ["optim/lr", *(f"{kind}{name}" for kind in ("data/frac/", "loss/train_") for name in plan.sources)]
    known = curves.scalars.Keys()
    found = {tag: [event.step for event in curves.Scalars(tag)] for tag in tags if tag in known}
    wrong = [tag for tag in tags if not tag.startswith("loss/") and found.get(tag) != steps]
    proof.check(f"TensorBoard has learning rate and mixture of every step{wrong or ''}", not wrong)
    wrong = []
    for i, name in enumerate(plan.sources):
        read = {phase.index for phase in plan.phases if phase.counts(phase.rows_total)[i]}
        drawn = {plan.phase_at(step - 1).index for step in found.get(f"loss/train_{name}", [])}
        wrong += [name] if drawn != read else []
    proof.check(f"and the loss of every source in all phases that read it{wrong or ''}", not wrong)


def move(folder: Path, plan: Plan, reference: Path, arguments: list[str], proof: Proof) -> None:
    """From the end of phase 25: 2 ranks, 3 from the middle of phase 26, 1 from the middle of phase 27."""
    long_rows, last = plan.phases[-2:]
    moved = folder / "moved" / reference.name
    shutil.rmtree(folder / "moved", ignore_errors=True)
    begin = f"step-{long_rows.start.step:08d}"
    shutil.copytree(reference / "checkpoints" / begin, moved / "checkpoints" / begin)
    middle = [phase.start.step + phase.steps // 2 for phase in (long_rows, last)]
    for ranks, stop_at in ((2, middle[0]), (3, middle[1]), (1, None)):
        at_line = f"step {stop_at // 10 * 10}/" if stop_at else None
        result = harness.train(NAME, ranks, *arguments, at_line=at_line, action=harness.stop)
        reached = harness.metrics(moved)[-1]["step"]
        proof.check(
            f"{ranks} rank(s): exit code {result.code} at step {reached}", result.code == (75 if at_line else 0)
        )
        if result.code not in (0, 75):
            print(result.output)
            return
        if stop_at:
            phase = plan.phase_at(reached)
            proof.check(f"that is inside {phase.name}", phase.start.step < reached < phase.end.step)
    expected = {line["step"]: line for line in harness.metrics(reference)}
    lines = harness.metrics(moved)
    steps = list(range(long_rows.start.step + 1, plan.end.step + 1))
    same = [line["batch_fingerprint"] == expected[line["step"]]["batch_fingerprint"] for line in lines]
    proof.check(
        f"batch_fingerprint of steps {steps[0]} to {steps[-1]} equal",
        harness.column(lines, "step") == steps and all(same),
    )
    worlds = [event["world"] for event in read_events(moved) if event["event"] == "group"]
    proof.check(f"ranks of the groups: {worlds}", worlds == [2, 3, 1])
    ours, theirs = (harness.validations(one)[-1]["validation_loss"] for one in (moved, reference))
    drift = max(abs(ours[name] - theirs[name]) for name in theirs)
    proof.check(f"last validation losses within {drift:.4f} nat (allowed 0.02)", drift <= 0.02)


def main(folder: Path, keys: list[str]) -> int:
    """Run everything; returns 0 if everything held."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    proof = Proof()
    arguments = [*keys, *overrides(folder, "undisturbed")]
    loaded = config.load(config.find(NAME, harness.ROOT), arguments).config
    plan, run = Plan(loaded), folder / "undisturbed" / loaded.run.name
    if not run.exists():
        train_from_nothing(folder, arguments, proof)
    check_stream(plan, run, proof)
    check_curves(plan, run, proof)
    move(folder, plan, run, [*keys, *overrides(folder, "moved")], proof)
    print("everything held" if proof.held else "NOT everything held")
    return int(not proof.held)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
