"""One start of a run for each kind of fault; `chaos.py` puts them in a row."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.end_to_end import harness
from titan_yulan.checkpoint.layout import Checkpoint, find_checkpoints, find_damage

FAULTS = Path(__file__).parent / "faults"
TIME_LIMIT = 150.0  # of one start, seconds
# ranks and layout of a start
WORLDS = ((1, ()), (2, ()), (3, ()), (2, ("--parallel.tensor=2",)), (2, ("--parallel.context=2",)))
SETTINGS = (
    "--optimizer.learning_rate=0.003",
    "--eval.every=12 steps",
    "--recovery.non_finite=retry",
    "--recovery.step_timeout=12",
    "--recovery.first_step_timeout=60",
    "--monitor.tensorboard=false",
)
STEP = r"step \d+/"
Trigger = tuple[str, Callable[[int], None]]


def nothing(_: int) -> None:
    """What is done at a line that is only waited for."""


@dataclass
class Run:
    """One run folder, what was done to it, and what went wrong with it."""

    folder: Path
    config: Path
    work: Path  # for marks and the history, not on the disk that is filled
    random: random.Random
    fixed: bool  # 2 ranks and one layout throughout
    stride: int  # steps between two faults, at most
    faults: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    starts: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    world: tuple[int, tuple[str, ...]] = (2, ())

    @property
    def history(self) -> Path:
        return self.work / f"{self.folder.parent.name}-history.jsonl"

    @property
    def step(self) -> int:
        """Where the next start will go on, as far as one can tell from outside."""
        sound = [checkpoint.step for checkpoint in self.sound_checkpoints()]
        return sound[-1] if sound else 0

    def sound_checkpoints(self) -> list[Checkpoint]:
        return [c for c in find_checkpoints(self.folder / "checkpoints") if not find_damage(c)]

    def _world(self) -> tuple[int, tuple[str, ...]]:
        """Ranks and layout of the next start: others than before, or always the same."""
        if not self.fixed:
            self.world = self.random.choice([world for world in WORLDS if world != self.world])
        return self.world

    def start(
        self,
        kind: str,
        codes: Sequence[int],
        triggers: Sequence[Trigger] = (),
        fault: dict[str, Any] | None = None,
        arguments: Sequence[str] = (),
        expect: str = "",
    ) -> None:
        """One start to its end. `triggers` are taken in their order, each at the first line that its pattern is in.

        Args:
            kind: the fault, for the count; "" for none.
            codes: exit codes that are as promised.
            fault: for `faults/sitecustomize.py`; it counts only if it came to happen.
            expect: what the output must contain.
        """
        ranks, layout = self._world()
        mark = self.work / f"{self.folder.parent.name}-{self.starts.total()}.mark"
        faults = [{**fault, "mark": str(mark)}] if fault else []
        environment = {"TEST_FAULTS": json.dumps(faults), "TEST_HISTORY": str(self.history), "PYTHONPATH": str(FAULTS)}
        begin, left = time.monotonic(), list(triggers)
        process = harness.launch(self.config, ranks, *SETTINGS, *layout, *arguments, environment=environment)
        limit = threading.Timer(TIME_LIMIT, harness.kill_all, (process.pid,))
        limit.daemon = True
        limit.start()
        lines: list[str] = []
        try:
            for line in process.stdout or ():
                lines.append(line)
                if left and re.search(left[0][0], line):
                    left.pop(0)[1](process.pid)
        except BaseException:
            harness.kill_all(process.pid)
            raise
        code, output = process.wait(), "".join(lines)
        happened = mark.exists() if fault else not triggers or len(left) < len(triggers)
        if kind:
            (self.faults if happened else self.missed)[kind] += 1
        problems = [] if limit.is_alive() else [f"not over after {TIME_LIMIT:.0f} s"]
        limit.cancel()
        if code not in codes:
            problems.append(f"exit code {code} instead of {' or '.join(map(str, codes))}")
        if happened and expect not in output:
            problems.append(f"no word of {expect!r}")
        # when a rank or the launcher is lost, others tell what that did to them
        if "Traceback" in output and code >= 0 and "failed: " not in output:
            problems.append("a traceback")
        name = f"{ranks} rank(s) {' '.join(layout)}".strip()
        self.starts[name] += 1
        what = f"{kind or 'no fault'}{'' if happened else ' (did not come)'}; {name}; exit code {code}"
        self._tell(f"{what}, {time.monotonic() - begin:.0f} s, now at step {self.step}", problems, output)

    def _tell(self, what: str, problems: list[str], output: str) -> None:
        """A line on the way, and what is needed to understand a broken promise."""
        line = "; BROKEN: ".join([f"{self.folder.parent.name}: {what}", *problems])
        print(line, file=sys.stderr, flush=True)
        if problems:
            self.broken.append(line)
            (self.work / f"broken-{len(list(self.work.glob('broken-*')))}.txt").write_text(output)

    def soon(self) -> int:
        """A step that the next start comes to; what is not exact about when a fault comes takes the run further."""
        return self.step + self.random.randint(max(3, self.stride * 3 // 10), max(4, self.stride))


# --- the faults; a run that comes to its end before one ends with 0 ---------------------------------------------------


def signal_to_launcher(run: Run) -> None:
    number = run.random.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    run.start("signal to the launcher", (75, 0), [(f"step {run.soon()}/", lambda pid: os.kill(pid, number))])


def signal_to_worker(run: Run) -> None:
    number = run.random.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    run.start("signal to one worker", (75, 0), [(f"step {run.soon()}/", to_worker(run, number))])


def kill_worker(run: Run) -> None:
    action = to_worker(run, signal.SIGKILL)
    triggers = [(f"step {run.soon()}/", action), ("dry run of", nothing), (STEP, harness.stop)]
    run.start("kill -9 of a worker", (75, 0), triggers, expect="killed from outside")


def kill_launcher(run: Run) -> None:
    def kill(launcher: int) -> None:
        os.kill(launcher, signal.SIGKILL)

    run.start("kill -9 of the launcher", (-signal.SIGKILL, 0), [(f"step {run.soon()}/", kill)])


def kill_agent(run: Run) -> None:
    """The launcher ends with its agent; the workers save and end by themselves, and hold the run folder's lock."""
    left: list[int] = []

    def kill(launcher: int) -> None:
        left.extend(workers(launcher))
        os.kill(harness.children(launcher)[0], signal.SIGKILL)

    run.start("kill -9 of torchrun's agent", (1, 75, 0), [(f"step {run.soon()}/", kill)])
    end = time.monotonic() + TIME_LIMIT
    while any(Path(f"/proc/{pid}").exists() for pid in left):
        if time.monotonic() > end:
            run.broken.append("workers that outlive their agent")
            break
        time.sleep(0.05)


def kill_in_save(run: Run) -> None:
    fault = {"step": run.soon(), "what": "kill save"}
    triggers = [("failed: ", nothing), ("dry run of", nothing), (STEP, harness.stop)]
    run.start("kill -9 in a save, before its commit", (75, 0), triggers, fault, expect="a save that did not finish")


def signal_in_save(run: Run) -> None:
    run.start("signal in a save", (75, 0), fault={"step": run.soon(), "what": "stop save"})


def signal_in_validation(run: Run) -> None:
    run.start("signal in a validation", (75, 0), fault={"step": run.soon(), "what": "stop validation"})


def signal_in_compilation(run: Run) -> None:
    compiled = ("--compile.enabled=true", "--compile.backend=aot_eager")
    run.start("signal in a compilation", (75,), (), {"step": 0, "what": "stop compile"}, compiled)
    run.start("", (75, 0), [(f"step {run.soon()}/", harness.stop)], arguments=compiled)


def not_a_number(run: Run) -> None:
    fault = {"step": run.soon(), "what": "nan"}
    triggers = [("went back to step", nothing), (STEP, harness.stop)]
    run.start("loss not finite once, `retry`", (75, 0), triggers, fault, expect="went back to step")


def hang(run: Run) -> None:
    triggers = [("failed: ", nothing), ("dry run of", nothing), (STEP, harness.stop)]
    run.start("a rank hangs", (75, 0), triggers, {"step": run.soon(), "what": "hang"}, expect="stacks of all ranks")


def full_disk(run: Run) -> None:
    filler = run.folder.parent / "filler"
    fault = {"step": run.soon(), "what": "full disk", "path": str(filler)}
    run.start("disk full in a save", (1,), fault=fault, expect="is full; free some space")
    filler.unlink(missing_ok=True)


def truncate(run: Run) -> None:
    def cut(file: Path) -> None:
        os.truncate(file, run.random.randrange(file.stat().st_size))

    damage(run, "a file of the newest checkpoint cut short", cut)


def flip_byte(run: Run) -> None:
    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[run.random.randrange(len(content))] ^= 1 << run.random.randrange(8)
        file.write_bytes(content)

    damage(run, "a bit of the newest checkpoint flipped", flip)


def damage(run: Run, kind: str, action: Callable[[Path], None]) -> None:
    """Damage one file of the newest checkpoint, if there is a sound one before it."""
    sound = run.sound_checkpoints()
    if len(sound) < 2:
        run.missed[kind] += 1
        return
    action(run.random.choice(sorted(sound[-1].path.iterdir())))
    run.start(kind, (75, 0), [(f"step {run.soon()}/", harness.stop)], expect="is damaged and passed over")


def workers(launcher: int) -> list[int]:
    (agent,) = harness.children(launcher)
    return harness.children(agent)


def to_worker(run: Run, number: int) -> Callable[[int], None]:
    """Sends a signal to one of the workers below a launcher."""
    which = run.random.randrange(6)  # drawn now, so that what is drawn later does not depend on whether it is sent

    def send(launcher: int) -> None:
        found = workers(launcher)
        os.kill(found[which % len(found)], number)

    return send


ALIKE = (
    signal_to_launcher,
    signal_to_worker,
    kill_worker,
    kill_launcher,
    kill_agent,
    kill_in_save,
    signal_in_save,
    signal_in_validation,
    not_a_number,
    hang,
    truncate,
    flip_byte,
)
SHORT = (not_a_number, kill_worker, flip_byte)
