"""What two ranks do for test_observed_runs.py: the same run twice, once plainly and once with everything that looks."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import torch

from tests.end_to_end.host_reads import HostReads, Read
from titan_yulan import config as configuration
from titan_yulan import learner
from titan_yulan.checkpoint.resume import run_folder
from titan_yulan.data.loader import fingerprint_on_device
from titan_yulan.monitor.garbage import GarbageCollection
from titan_yulan.monitor.watchdog import Watchdog
from titan_yulan.parallel.process import World
from titan_yulan.parallel.stopping import StopRequests
from titan_yulan.trainer import Trainer

LOG_EVERY, VALIDATE_EVERY, SAVE_EVERY, STATISTICS_EVERY = 4, 6, 9, 3
PHASES = """
[[curriculum]]
name = "stable"
length = "14 steps"
sequence_length = 48
mix = { code = 0.5, math = 0.3, prose = 0.2 }
[[curriculum]]
name = "anneal"
length = "5 steps"
sequence_length = 96
batch = { global_batch_size = 4, micro_batch_size = 1 }
mix = { code = 0.4, math = 0.4, prose = 0.2 }
lr = { shape = "1-sqrt", from = 1.0, to = 0.0, over = "5 steps" }
"""
PLAIN = (
    f"--monitor.log_every={LOG_EVERY}",
    f'--eval.every="{VALIDATE_EVERY} steps"',
    f'--checkpoint.every="{SAVE_EVERY} steps"',
)
LOOKING = ("--monitor.profile_steps=8-9", f"--monitor.statistics_every={STATISTICS_EVERY}")


def observe(world: World, file: Path) -> dict[str, Any]:
    # on a CPU `fingerprint` is numpy's; what runs on a GPU is looked at
    learner.fingerprint = fingerprint_on_device
    plain = run(world, file, *PLAIN, "--run.name=plain")
    looking = run(world, file, *PLAIN, *LOOKING, "--run.name=looking")
    return {"plain": plain, "looking": looking}


def run(world: World, file: Path, *overrides: str) -> dict[str, Any]:
    """A whole run; the reads of every step, the seconds that it took, tensors that only the collector would free."""
    config = configuration.load(file, overrides).config
    folder = run_folder(config)
    watchdog = Watchdog(folder, world.rank, 600, 600)
    with StopRequests(folder, None) as stop:
        watchdog.start()
        try:
            trainer = Trainer(config, world, stop, watchdog)
            trainer.garbage.collect = lambda: unreachable.extend(_collect(trainer.garbage))
            unreachable: list[str] = []
            begin = time.perf_counter()
            with HostReads(lambda: trainer.step) as reads:
                trainer.run()
            trainer.close("finished")
            seconds = time.perf_counter() - begin
        finally:
            watchdog.stop()
    found: list[Read] = reads.found
    return {
        "reads": [tuple(read) for read in found],
        "seconds": seconds,
        "unreachable": unreachable,
        "collects": gc.isenabled(),
    }


def _collect(garbage: GarbageCollection) -> list[str]:
    """Types and shapes of the tensors among what the collector finds; held back, it would keep memory of the device."""
    assert not gc.isenabled(), "Python collects when it likes"
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        GarbageCollection.collect(garbage)
        return [f"{type(item)} {item.shape}" for item in gc.garbage if isinstance(item, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.collect()
