"""Saving, loading and resharding a checkpoint: ours against plain torch.distributed.checkpoint and plain torch.save.

    python benchmarks/checkpoint_rates.py                          288 MB, on 1 and on 2 gloo ranks: about a minute
    python benchmarks/checkpoint_rates.py --folder /mnt/disk       where runs keep theirs

The state is as a model's with Adam's two moments: float32 matrices of 4 MB, on two ranks cut in halves (FSDP2's
layout). Ours hashes (SHA-256) what it writes, syncs it, writes a manifest and commits; before it loads, it hashes every
file and compares ("with verification", as every start of a run does; `[checkpoint] verify`). The others know no hashes.
torch.distributed.checkpoint syncs its files too; `torch.save` does not, so a line beside it adds that. Files were just
written, so reading comes from the system's memory: a disk adds the same to all. Sides take turns; each rate is the
whole state over the median of the slowest rank's time; all loaded values are checked.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import Timing, head, in_turn, median, table
from titan_yulan.checkpoint import store
from titan_yulan.checkpoint.layout import Checkpoint, TrainerState
from titan_yulan.parallel import process
from titan_yulan.parallel.process import World

MATRIX = (1024, 1024)
MOMENTS = ("exp_avg", "exp_avg_sq")
OURS, OURS_VERIFIED = "ours", "ours, with verification"
PLAIN, SAVE, SAVE_SYNCED = "torch.distributed.checkpoint", "torch.save / torch.load", "torch.save and fsync"
State = dict[str, dict[str, Tensor]]


class Ranks:
    """This rank's state, and every side's way to save and to load it below `folder`."""

    def __init__(self, world: World, folder: Path, matrices: int) -> None:
        self.world, self.folder, self.matrices, self.saved = world, folder, matrices, 0
        self.mesh = init_device_mesh("cpu", (world.size,))
        self.tensors = self.state(filled=True)

    def state(self, filled: bool) -> State:
        rows = MATRIX[0] // self.world.size

        def matrix(number: int) -> Tensor:
            local = torch.full((rows, MATRIX[1]), number + 0.5 if filled else 0.0)
            return DTensor.from_local(local, self.mesh, [Shard(0)])

        names = [f"layers.{number}.weight" for number in range(self.matrices)]
        model = {name: matrix(number) for number, name in enumerate(names)}
        moments = {f"{name}.{moment}": matrix(number) for number, name in enumerate(names) for moment in MOMENTS}
        return {"model": model, "optimizer": moments}

    def check(self, state: State) -> None:
        """The values are those that were saved."""
        for section, content in self.tensors.items():
            for name, tensor in content.items():
                if not torch.equal(local(state[section][name]), local(tensor)):
                    sys.exit(f"{section}.{name} was not loaded as it was saved")

    def together(self, action: Callable[[], object]) -> Callable[[], None]:
        """Until the slowest rank is done."""

        def run() -> None:
            action()
            dist.barrier(group=self.world.host)

        return run

    def ours(self, ranks: int) -> Path:
        return self.folder / f"ours-{ranks}"

    def save_ours(self) -> None:
        self.saved += 1
        state = TrainerState(self.saved, 0, 0, "a", False, {}, {}, "", {}, {})
        store.save(self.ours(self.world.size), self.tensors, state, "", self.world, keep=1)

    def load_ours(self, ranks: int, verify: bool) -> None:
        steps = sorted(self.ours(ranks).glob("step-*"))
        checkpoint = Checkpoint(steps[-1], int(steps[-1].name.removeprefix("step-")))
        if verify and store.find_damage_together(checkpoint, self.world):
            sys.exit(f"{checkpoint.path} is damaged")
        state = self.state(filled=False)
        store.load(checkpoint, state, self.world.host)
        self.check(state)

    def save_plain(self) -> None:
        path = self.folder / f"plain-{self.world.size}"
        if self.world.is_main:
            shutil.rmtree(path, ignore_errors=True)  # as ours deletes the older one
        dist.barrier(group=self.world.host)
        dcp.save(self.tensors, checkpoint_id=path, process_group=self.world.host)

    def load_plain(self, ranks: int) -> None:
        state = self.state(filled=False)
        dcp.load(state, checkpoint_id=self.folder / f"plain-{ranks}", process_group=self.world.host)
        self.check(state)

    def save_torch(self, sync: bool) -> None:
        path = self.folder / f"torch-{self.world.rank}.pt"
        path.unlink(missing_ok=True)
        plain = {section: {n: local(t) for n, t in content.items()} for section, content in self.tensors.items()}
        with path.open("wb") as file:
            torch.save(plain, file)
            if sync:
                file.flush()
                os.fsync(file.fileno())

    def load_torch(self) -> None:
        state = self.state(filled=False)
        loaded = torch.load(self.folder / f"torch-{self.world.rank}.pt", weights_only=True)
        for section, content in state.items():
            for name, tensor in content.items():
                local(tensor).copy_(loaded[section][name])
        self.check(state)

    def measure(self, rounds: int, others: bool) -> dict[str, dict[str, list[Timing]]]:
        """Timings by kind of work and side; `others`: also load what another number of ranks has saved."""
        ranks, other = self.world.size, 3 - self.world.size
        whose = "one file" if ranks == 1 else "a file for each rank"
        saves = {
            OURS: self.save_ours,
            PLAIN: self.save_plain,
            f"{SAVE}, {whose}": lambda: self.save_torch(sync=False),
            f"{SAVE_SYNCED}, {whose}": lambda: self.save_torch(sync=True),
        }
        loads = {
            OURS: lambda: self.load_ours(ranks, verify=False),
            OURS_VERIFIED: lambda: self.load_ours(ranks, verify=True),
            PLAIN: lambda: self.load_plain(ranks),
            f"{SAVE}, {whose}": self.load_torch,
        }
        reshards = {
            OURS: lambda: self.load_ours(other, verify=False),
            OURS_VERIFIED: lambda: self.load_ours(other, verify=True),
            PLAIN: lambda: self.load_plain(other),
        }
        kinds = {f"save, {ranks} rank(s)": saves, f"load, {ranks} rank(s)": loads}
        if others:
            kinds = {f"reshard, saved by {other}, loaded by {ranks}": reshards}
        found = {}
        for kind, sides in kinds.items():
            actions = {name: self.together(action) for name, action in sides.items()}
            found[kind] = {name: timings[1:] for name, timings in in_turn(actions, rounds + 1).items()}
        return found


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def on_rank(rank: int, ranks: int, folder: str, matrices: int, rounds: int, others: bool) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    group = dist.FileStore(f"{folder}/store-{ranks}-{others}", ranks)
    dist.init_process_group("gloo", store=group, rank=rank, world_size=ranks)
    found = Ranks(process.start(), Path(folder), matrices).measure(rounds, others)
    as_lists = {
        kind: {side: [[t.seconds, t.processor] for t in timings] for side, timings in sides.items()}
        for kind, sides in found.items()
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(as_lists))
    process.leave()
    process.exit_process(0)


def measure(folder: str, ranks: int, matrices: int, rounds: int, others: bool) -> dict[str, dict[str, list[Timing]]]:
    """Timings of the ranks together: the slowest one's seconds, the processor seconds of all."""
    torch.multiprocessing.spawn(on_rank, (ranks, folder, matrices, rounds, others), nprocs=ranks)
    parts = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]

    def together(kind: str, side: str) -> list[Timing]:
        steps = zip(*(part[kind][side] for part in parts), strict=True)
        return [Timing(max(t[0] for t in step), sum(t[1] for t in step)) for step in steps]

    return {kind: {side: together(kind, side) for side in sides} for kind, sides in parts[0].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--matrices", type=int, default=24, help="of the model, 12 MB each with its moments (default 24)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted ones of each side (default 5)")
    parser.add_argument("--folder", help="where to write; default: the system's folder of temporary files")
    parser.add_argument("--csv", type=Path, help="append the table to this file")
    options = parser.parse_args()
    print(head("torch"))
    megabytes = options.matrices * 3 * MATRIX[0] * MATRIX[1] * 4 / 1e6
    found: dict[str, dict[str, list[Timing]]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for ranks, others in ((1, False), (2, False), (2, True), (1, True)):
            found |= measure(folder, ranks, options.matrices, options.rounds, others)
    rows = []
    for kind, sides in found.items():
        reference = median(sides[OURS])
        for side, timings in sides.items():
            middle = median(timings)
            rows.append(
                [
                    kind,
                    side,
                    f"{megabytes / middle.seconds:,.0f}",
                    f"{megabytes / min(t.seconds for t in timings):,.0f}",
                    f"{megabytes / middle.processor:,.0f}",
                    f"{middle.seconds / reference.seconds:.2f}",
                    f"{middle.processor / reference.processor:.2f}",
                ]
            )
    columns = [
        f"{megabytes:,.0f} MB",
        "side",
        "MB/s",
        "MB/s, best",
        "MB per processor second",
        "time / ours",
        "processor / ours",
    ]
    print(table(columns, rows, options.csv))


if __name__ == "__main__":
    main()
