"""One process of a run: `train(config)` is the Python entry behind `./run_train.sh`; `main` runs it under torchrun."""

from __future__ import annotations

import argparse
import errno
import os
import traceback
from collections.abc import Collection
from pathlib import Path

from titan_yulan.parallel import launched

if __name__ == "__main__":  # before torch, whose import takes seconds in which torchrun may die
    launched.join_launch()

import torch.distributed as dist

from titan_yulan import config as configuration
from titan_yulan.checkpoint.resume import run_folder
from titan_yulan.config.sections import RunConfig
from titan_yulan.errors import RunError, UserError, explain_os_error
from titan_yulan.monitor.metrics import read_status, write_status
from titan_yulan.monitor.watchdog import Watchdog
from titan_yulan.parallel import process
from titan_yulan.parallel.launched import DEVICE_VARIABLE
from titan_yulan.parallel.stopping import StopRequests
from titan_yulan.trainer import Trainer


def train(config: RunConfig, allow_changes: Collection[str] = ()) -> str:
    """Train `config` in this process (one rank of those that torchrun started, or alone).

    Returns:
        "finished" or "stopped"; `status.json` in the run folder says the same.

    Raises:
        UserError: (RunError among them) with one clear message.
    """
    alone = not dist.is_initialized()
    world = process.start()
    folder = run_folder(config)
    watchdog = Watchdog(folder, world.rank, config.recovery.first_step_timeout, config.recovery.step_timeout)
    # one rank looks, and all agree
    kill_switch = Path(config.run.kill_switch) if config.run.kill_switch and world.is_main else None
    with StopRequests(folder, config.run.time_limit, kill_switch=kill_switch) as stop:
        watchdog.start()
        try:
            trainer = Trainer(config, world, stop, watchdog, allow_changes)
            outcome = trainer.run()
            trainer.close(outcome)
        finally:
            watchdog.stop()
    if alone:
        process.leave()
    return outcome


def _explain(error: OSError, folder: Path) -> RunError:
    """A full or closed disk as a failure of the run; any other error of the system is a crash, and raised again."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        raise error
    return RunError(explain_os_error(error, folder))


def main() -> None:
    """One rank under torchrun. A failure that a restart cannot mend ends with 0 and is told through `status.json`
    (torchrun would restart a worker that ends otherwise); anything else crashes and is restarted."""
    parser = argparse.ArgumentParser(prog="titan_yulan.train")
    parser.add_argument("--config", required=True, type=Path, help="resolved configuration file")
    parser.add_argument("--allow-change", action="append", default=[])
    parser.add_argument("--debug", action="store_true")
    arguments = parser.parse_args()
    config = configuration.load(arguments.config).config
    if (
        DEVICE_VARIABLE in os.environ  # the launcher has written "starting"
        and read_status(run_folder(config)).get("state") == "failed"
    ):
        process.exit_process(0)  # one rank has failed for good; the others were ended, and are not to try again
    try:
        train(config, arguments.allow_change)
    except (UserError, OSError) as raised:
        error = raised if isinstance(raised, UserError) else _explain(raised, run_folder(config))
        if arguments.debug:
            traceback.print_exc()
        folder = run_folder(config)
        if int(os.environ.get("RANK", "0")) == 0 or read_status(folder).get("state") != "failed":
            write_status(folder, "failed", error.exit_code, message=str(error))
        # if only this rank failed the others wait for it: torchrun must end them
        process.exit_process(0 if process.all_arrive() else 1)
    process.exit_process(0)


if __name__ == "__main__":
    main()
