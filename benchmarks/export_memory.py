"""How much memory `titan-yulan checkpoint export` takes, against the size of the checkpoint. One process, CPU.

    python benchmarks/export_memory.py                         300 M parameters, 3.6 GB with moments: a few minutes
    python benchmarks/export_memory.py --layers 4 --folder /mnt/disk

A checkpoint of random weights and moments is written as a run writes it: in shares, as four ranks would hold them. Then
it is exported in processes of their own, with and without verification. Of each, the largest resident set is taken
(ru_maxrss), and the largest part of it that is the process's own memory (RssAnon, read every 10 ms) and not a file that
is mapped, whose pages the system takes back when it needs them; and both of a process that only imports.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.import_memory import run_config
from titan_yulan import config as configuration
from titan_yulan.checkpoint import layout
from titan_yulan.checkpoint.export import export
from titan_yulan.checkpoint.files import HashingWriter
from titan_yulan.checkpoint.hugging_face import parameter_shapes
from titan_yulan.config.sections import RunConfig
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.parallel.fsdp import is_replicated

RANKS = 4
Way = tuple[Literal["llama", "yulan"], bool]  # format, verified
WAYS: tuple[Way, ...] = (("llama", False), ("yulan", False), ("llama", True), ("yulan", True))


def write_rank(rank: int, folder: Path, config: RunConfig) -> None:
    """This rank's part of every tensor; the first one commits."""
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    mesh = DeviceMesh("cpu", range(RANKS))
    generator = torch.Generator().manual_seed(1)
    sections: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for name, shape in parameter_shapes(config.model).items():
        for section, key in (("model", ""), ("optimizer", ".exp_avg"), ("optimizer", ".exp_avg_sq")):
            whole = torch.ones(shape) if is_replicated(name) else torch.randn(shape, generator=generator) * 0.02
            sections[section][name + key] = whole if is_replicated(name) else distribute_tensor(whole, mesh, [Shard(0)])
    path = layout.step_folder(folder / "run" / "checkpoints", 1)
    path.mkdir(parents=True, exist_ok=True)
    writer = HashingWriter(path)
    dcp.save(sections, storage_writer=writer)
    files: list[dict | None] = [None] * RANKS
    dist.all_gather_object(files, writer.hashing.files)
    if rank == 0:
        tokenizer = Tokenizer.load(config.tokenizer.path)
        origin = {"step": 0, "row": 0, "token": 0, "tapes": {}}
        state = layout.TrainerState(
            1, 1, 1, config.phases[0].name, False, {}, {}, tokenizer.fingerprint, {"torch": torch.__version__}, origin
        )
        written = {name: summary for part in files for name, summary in (part or {}).items()}
        layout.commit(path, written, state, configuration.to_toml(config))
    dist.barrier()
    dist.destroy_process_group()


def watch(peak: list[int], done: threading.Event) -> None:
    """Keep the largest RssAnon in `peak`, in bytes."""
    while not done.wait(0.01):
        status = Path("/proc/self/status").read_text()
        peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]) * 1024)


def measure(folder: Path, way: Way | None, queue: multiprocessing.Queue) -> None:
    """Largest resident set, largest own memory, both in bytes, and seconds; without a way: of the imports alone."""
    peak, done = [0], threading.Event()
    watcher = threading.Thread(target=watch, args=(peak, done))
    watcher.start()
    begin = time.perf_counter()
    if way is not None:
        export(folder / "run", folder / "exported", way[0], verify=way[1], report=lambda _: None)
    seconds = time.perf_counter() - begin
    time.sleep(0.1)
    done.set()
    watcher.join()
    queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, peak[0], seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, queue = Path(name), context.Queue()
        config = run_config(folder, options.layers)
        ranks = [context.Process(target=write_rank, args=(rank, folder, config)) for rank in range(RANKS)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        size = sum(file.stat().st_size for file in (folder / "run").rglob("*") if file.is_file())
        shapes = parameter_shapes(config.model)
        weights = sum(4 * torch.Size(shape).numel() for shape in shapes.values())
        largest = max(4 * torch.Size(shape).numel() for shape in shapes.values())
        print(f"torch {torch.__version__}; checkpoint {size / 1e6:,.0f} MB, of which weights {weights / 1e6:,.0f} MB,")
        print(f"largest tensor {largest / 1e6:,.0f} MB, in {RANKS} shares\n")
        print("| export | verified | largest resident set | own memory | seconds |")
        print("|---|---|---:|---:|---:|")
        for way in (None, *WAYS):
            child = context.Process(target=measure, args=(folder, way, queue))
            child.start()
            resident, own, seconds = queue.get()
            child.join()
            shutil.rmtree(folder / "exported", ignore_errors=True)
            label = "imports alone | " if way is None else f"{way[0]} | {'yes' if way[1] else 'no'}"
            print(f"| {label} | {resident / 1e6:,.0f} MB | {own / 1e6:,.0f} MB | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
