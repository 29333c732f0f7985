"""How long training waits for a checkpoint: written at once, and written in the background. On gloo ranks, CPU.

    python benchmarks/checkpoint_blocking.py                      2 ranks, about 270 MiB of state: a minute or two
    python benchmarks/checkpoint_blocking.py --saves 9 --folder /mnt/disk

A small model is trained with AdamW under FSDP2. In turn it is saved with `[checkpoint] asynchronous = false` and with
`true`, after one save of each that is not counted (it makes the folders and the memory of the copies). Blocked is the
time that `Saver.save` takes to return, of the slowest rank, all ranks having begun together; the save before is
finished then. After a save in the background the model is trained until the checkpoint exists on every rank, and each
of these steps is timed; so is a step before, with nothing in the background. Every checkpoint is hashed, synced and
committed as in a run, and the older one deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_yulan.checkpoint.layout import TrainerState
from titan_yulan.checkpoint.saver import Saver
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import (
    ActivationCheckpointSection,
    CheckpointSection,
    CompileSection,
    OptimizerSection,
    ParallelSection,
)
from titan_yulan.optimizer.adamw import build_adamw, optimizer_state
from titan_yulan.parallel import process
from titan_yulan.parallel.degrees import Degrees
from titan_yulan.parallel.fsdp import sum_replicated_gradients
from titan_yulan.parallel.mesh import build_mesh
from titan_yulan.parallel.parallelize import build_decoder
from titan_yulan.parallel.process import World

MODEL = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
)
TOKENS = 64
WAYS = ("waited for", "background")


class Run:
    """A model and its optimizer on this rank, and a saver for each way."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.saved = world, 0
        section = ParallelSection(compute_dtype="float32")
        mesh = build_mesh(Degrees(1, world.size, 1, 1), "cpu")
        plain = ActivationCheckpointSection(), CompileSection()
        self.decoder = build_decoder(MODEL, section, mesh, 0, world.device, *plain)
        self.optimizer = build_adamw(self.decoder, MODEL, OptimizerSection(learning_rate=1e-3))
        self.savers = {
            way: Saver(folder / way, world, CheckpointSection(asynchronous=way == "background", keep=1), lambda _: None)
            for way in WAYS
        }

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        state = optimizer_state(self.decoder, self.optimizer)
        return {"model": dict(self.decoder.named_parameters()), "optimizer": state}

    def step(self) -> None:
        tokens = torch.arange(TOKENS)[None]
        loss = self.decoder(tokens, head=lambda hidden, weight: (hidden @ weight.T).logsumexp(-1).sum())
        loss.backward()
        sum_replicated_gradients(self.decoder)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, way: str) -> None:
        self.saved += 1
        state = TrainerState(self.saved, 0, 0, "a", False, {}, {}, "", {}, {})
        self.savers[way].save(self.tensors(), state, "")


def seconds(action: Callable[[], None]) -> float:
    dist.barrier()
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def on_rank(rank: int, ranks: int, folder: str, saves: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    world = process.start()
    run = Run(world, Path(folder))
    found: dict[str, list[float]] = {name: [] for name in (*WAYS, "until written", "step", "step during")}
    for count in range(saves + 1):
        run.step()
        found["step"].append(seconds(run.step))
        found["waited for"].append(seconds(lambda: run.save("waited for")))
        begin = time.perf_counter()
        found["background"].append(seconds(lambda: run.save("background")))
        during = []
        while world.agree(int(run.savers["background"].in_flight)):
            during.append(seconds(run.step))
        found["until written"].append(time.perf_counter() - begin)
        run.savers["background"].join()
        if count:
            found["step during"] += during
    mine = sum(t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes for t in _flat(run))
    Path(folder, f"{rank}.json").write_text(json.dumps({"found": found, "bytes": mine}))
    process.leave()
    process.exit_process(0)


def _flat(run: Run) -> list[Tensor]:
    return [tensor for part in run.tensors().values() for tensor in part.values()]


def line(name: str, values: list[float]) -> str:
    cells = [f"{value:.3f} s" for value in (statistics.median(values), min(values), max(values))]
    return f"| {name} | {len(values)} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="default: 2")
    parser.add_argument("--saves", type=int, default=7, help="saves of each way; default: 7")
    parser.add_argument("--folder", help="where to write; default: the system's folder of temporary files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        torch.multiprocessing.spawn(on_rank, (options.ranks, folder, options.saves), nprocs=options.ranks)
        parts = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(options.ranks)]
    slowest = {
        name: [max(values) for values in zip(*(part["found"][name] for part in parts), strict=True)]
        for name in parts[0]["found"]
    }
    counted = {name: values if name == "step during" else values[1:] for name, values in slowest.items()}
    size = sum(part["bytes"] for part in parts) / 2**20
    print(
        f"`python benchmarks/checkpoint_blocking.py --ranks {options.ranks} --saves {options.saves}` "
        f"({size:,.0f} MiB of weights and AdamW's state over {options.ranks} ranks, torch {torch.__version__}, "
        f"{os.cpu_count()} CPU cores)\n"
    )
    print("| | number | median | least | most |\n|---|---:|---:|---:|---:|")
    print(line("training waits, `asynchronous = false`", counted["waited for"]))
    print(line("training waits, `asynchronous = true`", counted["background"]))
    print(line("the first one, which makes the memory of the copies", slowest["background"][:1]))
    print(line("until the checkpoint in the background exists", counted["until written"]))
    print(line("a step, nothing in the background", counted["step"]))
    print(line("a step while a checkpoint is written", counted["step during"]))
    shares = [100 * mine / other for mine, other in zip(counted["background"], counted["waited for"], strict=True)]
    print(
        f"\nTraining waits {statistics.median(shares):.1f} % (from {min(shares):.1f} to {max(shares):.1f} %) as long "
        "as for a checkpoint that is not written in the background, save by save."
    )


if __name__ == "__main__":
    main()
