"""From a command line to a finished run: preflight, torchrun, signals, exit code. What `./run_train.sh` runs.

The preflight needs neither torch nor a GPU: it reads and checks the configuration, compares it with the run folder,
prepares the data, and refuses in seconds what cannot work. torchrun's own exit code says little (it is 1 after any
signal), so the code of this process comes from the run's `status.json`:

    0 finished    75 stopped, the same command goes on    1 failed    2 the configuration or the files are wrong
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from titan_yulan import config as configuration
from titan_yulan.checkpoint import layout
from titan_yulan.checkpoint.layout import Checkpoint
from titan_yulan.checkpoint.resume import Resume, check_data, check_resume, check_start, make_plan, run_folder
from titan_yulan.config.model import count_parameters
from titan_yulan.config.sections import RecoverySection, RunConfig
from titan_yulan.curriculum.plan import PhasePlan, Plan
from titan_yulan.data.ensure import ensure_prepared
from titan_yulan.data.mask_token import mask_token
from titan_yulan.data.partition import micro_batches
from titan_yulan.data.report import say_now
from titan_yulan.data.source import Source
from titan_yulan.data.tape import open_tape
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import RunError, UserError
from titan_yulan.monitor.best import show_best
from titan_yulan.monitor.metrics import read_status, write_atomically, write_status
from titan_yulan.parallel.degrees import Degrees, resolve_degrees
from titan_yulan.parallel.launched import (
    STOP_FILE,
    Stopped,
    StopSignals,
    death_signal,
    only_start,
    prepare_torchrun,
    wait_for_workers,
    workers_lock,
)
from titan_yulan.plan.curriculum import repetitions, source_uses
from titan_yulan.plan.memory import (
    GIB,
    Machine,
    checkpoint_bytes,
    disk_forecast,
    estimate_memory,
    inspect_machine,
    ranks_that_fit,
)
from titan_yulan.plan.sources import check_sources_there
from titan_yulan.plan.start import Launch, shutdown_seconds, torchrun_command, worker_environment

ROOT = Path(__file__).resolve().parent.parent
_SHARES = 6  # sources of a phase that are shown


def launch(config_name: str, overrides: Sequence[str], allow_changes: Sequence[str], debug: bool) -> int:
    """Train a configuration file to its end; returns the exit code.

    Raises:
        UserError: before anything was started.
    """
    with StopSignals() as signals:
        try:
            return _launch(config_name, overrides, allow_changes, debug, signals)
        except Stopped:
            print("stopped before any process was started; the same command goes on")
            return 75


def _launch(
    config_name: str, overrides: Sequence[str], allow_changes: Sequence[str], debug: bool, signals: StopSignals
) -> int:
    check_packages()
    path = configuration.find(config_name, ROOT)
    config = configuration.load(path, overrides).config
    check_kill_switch(config)
    machine = inspect_machine()
    start = Launch.from_environment(machine)
    folder = run_folder(config)
    checkpoint = layout.newest_readable(folder / "checkpoints", print)
    if checkpoint is None:
        check_sources_there(config)
    plan = make_plan(config, checkpoint)
    resume = check_resume(config, plan, checkpoint, allow_changes)
    if checkpoint is None:
        for line in check_start(config, allow_changes):
            print(line)
    degrees = check_layout(plan, start, resume.step)
    _say_plan(path, config, plan, degrees, start, machine, resume, folder)
    if resume.complete:
        show_best(folder, config)
        print(f"the run in {folder} is complete: step {resume.step} of {plan.end.step}; nothing to do")
        return 0
    check_sources_there(config)
    if config.monitor.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("monitor.tensorboard: the package tensorboard is missing; install it or set the key to false")
    if config.monitor.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError("monitor.wandb_project: the package wandb is missing; pip install wandb, or remove the key")
    again = shlex.join(["./run_train.sh", "--config", config_name, *overrides])
    print(f"to go on after a stop or a crash, the same command: {again}")
    if machine.accelerators and start.processes > machine.accelerators:
        raise UserError(
            f"NPROC={start.processes}: this machine has {machine.accelerators} GPU(s), one for each process"
        )
    check_memory(_to_come(config, degrees), start, machine)
    check_disk(config, plan, folder)
    _prepare_data(config, signals)
    check_sources(config, plan, checkpoint, allow_changes)
    folder.mkdir(parents=True, exist_ok=True)
    with only_start(folder, start.node_rank, signals) as lock:
        before = read_status(folder)
        resolved = folder / "config.toml"
        if start.hosts:  # another node may join a run that is under way, and changes nothing in its folder
            (folder / STOP_FILE).unlink(missing_ok=True)
        signals.answer_in(folder)
        if start.hosts:
            write_atomically(resolved, configuration.to_toml(config))
            write_status(folder, "starting", 1)
        command = torchrun_command(start, config.run.name, resolved, folder, allow_changes, debug)
        code, stopped = _run(command, start, machine, config.recovery, folder, lock, signals)
    return exit_code(folder, code, stopped) if start.hosts else exit_code_elsewhere(folder, before, code, stopped)


def _prepare_data(config: RunConfig, signals: StopSignals) -> None:
    def say(line: str) -> None:
        say_now(line)
        signals.check()

    signals.check()
    try:
        ensure_prepared(config, say)
    except RunError:
        signals.check()  # Ctrl-C and Slurm's signals reach the processes of the preparation too, and end them
        raise
    signals.check()


def check_kill_switch(config: RunConfig) -> None:
    """The file that ends a run must not be there. The code is 2 and not 75: a job that is queued again on 75 would be
    started again and again.

    Raises:
        UserError: it is.
    """
    path = config.run.kill_switch
    if path and Path(path).exists():
        raise UserError(f"run.kill_switch: {path} is there, so nothing is started; remove it, then the same command")


def check_packages() -> None:
    """PyTorch must be there and new enough.

    Raises:
        UserError: it is not.
    """
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("PyTorch is not installed here; ./run_train.sh sets up an environment that has it") from None
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 11):
        raise UserError(f"PyTorch {version} is too old: 2.11 or newer is needed; ./run_train.sh can set it up")


def _say_plan(
    path: Path,
    config: RunConfig,
    plan: Plan,
    degrees: dict[str, Degrees],
    start: Launch,
    machine: Machine,
    resume: Resume,
    folder: Path,
) -> None:
    device = f"{machine.accelerators} x {machine.device}" if machine.accelerators else f"CPU, {machine.cores} cores"
    print(f"configuration  {path}")
    print(
        f"machine        {device}, {machine.memory / GIB:.1f} GiB; {start.processes} processes x {start.nodes} node(s)"
    )
    model = config.model
    print(
        f"model          {count_parameters(model):,} parameters: {model.num_hidden_layers} layers x "
        f"{model.hidden_size}, {model.num_attention_heads} heads, {model.num_key_value_heads} KV heads, "
        f"vocabulary {model.vocab_size}"
    )
    need = estimate_memory(_to_come(config, degrees), start.world)
    checkpoints, _ = disk_forecast(config, plan)
    on_host = f", {need.host / GIB:.2f} GiB of the host's" if need.host else ""
    print(f"memory         about {need.total / GIB:.2f} GiB a rank{on_host}")
    print(f"disk           at most {checkpoints} checkpoints of {checkpoint_bytes(config) / GIB:.2f} GiB at a time")
    for phase in plan.phases[config.first_phase :]:
        shares = _largest_shares(phase)
        line = f"phase          {phase.name}: steps {phase.start.step + 1}-{phase.end.step}, "
        if phase.name not in degrees:
            print(f"{line}finished")
            continue
        micro = phase.section.batch.micro_batch_size
        count = micro_batches(phase.batch_rows, degrees[phase.name].data, micro)
        print(
            f"{line}{phase.batch_rows} x {phase.sequence_length} tokens a step in {count} micro-batch(es) of {micro} a "
            f"rank, {shares}"
        )
    print(f"run folder     {folder}" + (f", goes on from step {resume.step}" if resume.step else ""))


def _largest_shares(phase: PhasePlan) -> str:
    shares = sorted(
        ((weight, name) for name, weight in zip(phase.sources, phase.weights, strict=True) if weight),
        key=lambda share: -share[0],
    )
    more = f" … {len(shares) - _SHARES} more" if len(shares) > _SHARES else ""
    return " ".join(f"{name} {weight:.0%}" for weight, name in shares[:_SHARES]) + more


def check_layout(plan: Plan, start: Launch, step: int) -> dict[str, Degrees]:
    """The degrees of every phase that ends after `step`, by its name, with the smallest number of nodes.

    Raises:
        UserError: [parallel] does not fit the number of ranks, or a batch has too few rows for its ranks, with any
            number of nodes that the group may have.
    """
    found: dict[int, dict[str, Degrees]] = {}
    wrong: dict[int, UserError] = {}
    for nodes in range(start.min_nodes, start.max_nodes + 1):
        try:
            found[nodes] = _degrees(plan, nodes * start.processes, step)
        except UserError as error:
            wrong[nodes] = error
    if wrong:
        nodes, error = next(iter(wrong.items()))
        if not start.elastic:
            raise error
        legal = f"legal are {', '.join(map(str, found))}" if found else "no number of nodes in between fits"
        raise UserError(f"NNODES={start.nodes} allows a group of {nodes} node(s), but: {error}. Of these {legal}")
    return found[start.min_nodes]


def _degrees(plan: Plan, world: int, step: int) -> dict[str, Degrees]:
    found = {}
    for phase in plan.phases[plan.config.first_phase :]:
        if phase.end.step <= step:
            continue
        section = phase.section
        degrees = resolve_degrees(section.parallel, world, plan.config.model, section.sequence_length)
        if phase.batch_rows < degrees.data:
            raise UserError(
                f"batch.global_batch_size of phase {phase.name!r} is {phase.batch_rows} rows, fewer than the "
                f"{degrees.data} ranks that share it; start at most {phase.batch_rows} (NPROC={phase.batch_rows}), "
                "enlarge the batch, or let ranks share rows (parallel.tensor, parallel.context)"
            )
        found[phase.name] = degrees
    return found


def _to_come(config: RunConfig, degrees: dict[str, Degrees]) -> RunConfig:
    """The configuration without its finished phases, whose layouts need not fit this number of ranks."""
    first = next((index for index, phase in enumerate(config.phases) if phase.name in degrees), config.first_phase)
    return dataclasses.replace(config, first_phase=first)


def check_memory(config: RunConfig, start: Launch, machine: Machine) -> None:
    """The model must fit, in every phase to come.

    Raises:
        UserError: with the estimate and a command that would work.
    """
    memory = estimate_memory(config, start.world)
    need = memory.total if machine.accelerators else memory.total + memory.host
    on_this_machine = need if machine.accelerators else need * start.processes
    if on_this_machine <= machine.memory:
        return
    if machine.accelerators:
        ranks = ranks_that_fit(config, machine.memory)
        remedy = f"{ranks} such GPUs are enough (NNODES, NPROC)" if ranks else "no number of such GPUs is enough"
    else:
        remedy = "it needs GPUs, or a machine with more memory"
    raise UserError(
        f"this model does not fit: {start.processes} rank(s) on this machine need about "
        f"{on_this_machine / GIB if not machine.accelerators else need / GIB:.1f} GiB"
        f"{' each' if machine.accelerators else ''}, {machine.memory / GIB:.1f} GiB are there "
        f"({count_parameters(config.model):,} parameters, 16 bytes each for weights, gradients and Adam, and the "
        f"activations of batch.micro_batch_size rows); {remedy}. What works here: ./run_train.sh --model.preset=debug, "
        "or a smaller batch.micro_batch_size or activation_checkpoint.mode = 'full' if the state alone fits"
    )


def check_disk(config: RunConfig, plan: Plan, folder: Path) -> None:
    """The kept checkpoints must fit on the disk.

    Raises:
        UserError: with the forecast.
    """
    existing = folder
    while not existing.exists():
        existing = existing.parent
    held = sum(f.stat().st_size for f in folder.glob("checkpoints/step-*/*")) if folder.exists() else 0
    free = shutil.disk_usage(existing).free + held
    count, size = disk_forecast(config, plan)
    if size > free:
        raise UserError(
            f"run.output_dir: {count} checkpoints of {size / count / GIB:.2f} GiB will be kept at a time, "
            f"{size / GIB:.1f} GiB in all, but {existing} has {free / GIB:.1f} GiB free; free some space, choose "
            "another run.output_dir, or lower checkpoint.keep"
        )


def check_sources(config: RunConfig, plan: Plan, checkpoint: Checkpoint | None, allow_changes: Sequence[str]) -> None:
    """The prepared sources must be long enough, and the ones that the checkpoint was trained on.

    Raises:
        UserError: naming the source.
    """
    sources = {name: open_tape(config, name) for name in config.sources_to_read}
    for phase in plan.phases[config.first_phase :]:
        for name in sources:
            if phase.section.mix.get(name) and sources[name].length < phase.sequence_length + 1:
                raise UserError(
                    f"data.sources.{name} holds {sources[name].length} tokens, fewer than one row of phase "
                    f"{phase.name!r} ({phase.sequence_length} + 1); shorten phase.sequence_length or add text"
                )
    for name in sources:
        path, length = config.data.sources[name].validation_path, config.phases[0].sequence_length
        if path and Source.open(Path(path)).tokens < length + 1:
            raise UserError(
                f"data.sources.{name}.validation_path: {path} holds fewer tokens than one row ({length} + 1); hold out "
                "more text (validation_share) or leave the key out"
            )
    tokenizer = Tokenizer.load(Path(config.tokenizer.path))
    mask_token(config, tokenizer.vocab_size)
    if checkpoint is not None:
        prints = {name: source.fingerprint for name, source in sources.items()}
        check_data(checkpoint, prints, tokenizer.fingerprint, allow_changes)
    ends = dict(zip(plan.sources, plan.phases[-1].tapes(plan.phases[-1].rows_total), strict=True))
    prepared = {name: source.length for name, source in sources.items()}
    for name, tokens in prepared.items():
        print(f"source         {name}: {tokens:,} tokens, read {ends[name] / tokens:.2f} times by the end")
    reached = checkpoint.step if checkpoint is not None else plan.phases[0].start.step
    for phase in plan.phases[config.first_phase :]:
        if phase.end.step > reached:
            for line in repetitions(phase, source_uses(phase, prepared)):
                print(f"note           {line}")


def _run(
    command: list[str],
    start: Launch,
    machine: Machine,
    recovery: RecoverySection,
    folder: Path,
    lock: int,
    signals: StopSignals,
) -> tuple[int, bool]:
    """Run torchrun to its end; returns its exit code and whether this process was asked to stop."""
    sys.stdout.flush()
    process = subprocess.Popen(
        command,
        env=worker_environment(start, machine, recovery, folder, os.environ),
        start_new_session=True,
        pass_fds=[lock],
        preexec_fn=partial(prepare_torchrun, death_signal(start.elastic and not start.hosts), os.getpid()),
    )
    signals.pass_on_to(process)
    code = process.wait()
    # torchrun may have been killed; its workers then save and end without it, and their result is not there yet
    path = workers_lock(folder, start.node_rank)
    wait_for_workers(path, shutdown_seconds(recovery), give_up=lambda: signals.requests > 2)
    return code, signals.requests > 0


def exit_code(folder: Path, torchrun_code: int, stopped: bool) -> int:
    """The exit code of the run, from its `status.json`; prints what failed.

    Args:
        stopped: whether this process was asked to stop (the workers may have been killed before they could answer).
    """
    status = read_status(folder)
    if status.get("state") in (None, "starting", "running"):
        if stopped:
            print("stopped before the first step could end; the same command goes on")
            return 75
        write_status(folder, "failed", 1, message=f"ended without a result (torchrun: {torchrun_code})")
        print(
            f"ERROR: the run ended without a result (torchrun: {torchrun_code}); the workers' output is in "
            f"{folder / 'logs'}. The same command goes on from the newest checkpoint",
            file=sys.stderr,
        )
        return 1
    if status["state"] == "failed":
        print(f"ERROR: {status.get('message', 'unknown')}", file=sys.stderr)
    return int(status["exit_code"])


def exit_code_elsewhere(folder: Path, before: dict[str, Any], torchrun_code: int, stopped: bool) -> int:
    """The exit code on a node that does not host the rendezvous: it may have left a run that goes on without it, and
    never speaks for the run.

    Args:
        before: `status.json` when this node began.
    """
    status = read_status(folder)
    if status.get("state") in ("finished", "stopped", "failed") and (torchrun_code == 0 or status != before):
        return exit_code(folder, torchrun_code, stopped)
    if stopped:
        return 75
    print(
        f"ERROR: this node left the run without a result (torchrun: {torchrun_code}); its output is in "
        f"{folder / 'logs'}. The same command joins again, or goes on if the run has ended",
        file=sys.stderr,
    )
    return 1
