"""From a command line to a finished run: preflight, torchrun, signals, exit code. What `./run_train.sh` runs.

The preflight needs neither torch nor a GPU: it reads and checks the configuration, compares it with the run folder,
prepares the data, and refuses in seconds what cannot work. torchrun's own exit code says little (it is 1 after any
signal), so the code of this process comes from the run's `status.json`:

    0 finished    75 stopped, the same command goes on    1 failed    2 the configuration or the files are wrong
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_yulan import config as configuration
from titan_yulan.checkpoint import layout
from titan_yulan.checkpoint.layout import Checkpoint
from titan_yulan.checkpoint.resume import Resume, check_data, check_model, check_resume, make_plan, run_folder
from titan_yulan.config.model import count_parameters
from titan_yulan.config.sections import RunConfig
from titan_yulan.curriculum.plan import Plan
from titan_yulan.data.ensure import ensure_prepared
from titan_yulan.data.partition import micro_batches
from titan_yulan.data.source import Source
from titan_yulan.errors import UserError
from titan_yulan.monitor.metrics import STOP_FILE, read_status, write_atomically, write_status
from titan_yulan.parallel.degrees import Degrees, resolve_degrees
from titan_yulan.parallel.launched import DEVICE_VARIABLE, end_with_parent
from titan_yulan.plan.memory import (
    GIB,
    Machine,
    checkpoint_bytes,
    disk_forecast,
    estimate_memory,
    inspect_machine,
    ranks_that_fit,
)

ROOT = Path(__file__).resolve().parent.parent
_SHUTDOWN_SECONDS = 120  # torchrun, when it is signalled, lets the workers finish their step and save


@dataclass(frozen=True)
class Launch:
    """How many processes on how many nodes; from the environment of `run_train.sh`."""

    processes: int
    nodes: str
    node_rank: int
    endpoint: str
    max_restarts: int
    log_rank: str

    @classmethod
    def from_environment(cls, machine: Machine) -> Launch:
        """NPROC (default: the GPUs, else 2), NNODES, NODE_RANK, RDZV_ENDPOINT, MAX_RESTARTS, LOG_RANK.

        Raises:
            UserError: a variable is not what it should be.
        """
        nodes = os.environ.get("NNODES", "1")
        endpoint = os.environ.get("RDZV_ENDPOINT", "")
        if nodes not in ("1", "1:1") and not endpoint:
            raise UserError(f"NNODES={nodes} needs RDZV_ENDPOINT=HOST:PORT, the same on every node")
        return cls(
            processes=_whole_number("NPROC", machine.accelerators or 2, 1),
            nodes=nodes,
            node_rank=_whole_number("NODE_RANK", 0, 0),
            endpoint=endpoint,
            max_restarts=_whole_number("MAX_RESTARTS", 3, 0),
            log_rank=os.environ.get("LOG_RANK", "0"),
        )

    @property
    def world(self) -> int:
        """Ranks at the start, with the smallest allowed number of nodes."""
        try:
            return self.processes * int(self.nodes.split(":")[0])
        except ValueError:
            raise UserError(f"NNODES={self.nodes}: write a number, or MIN:MAX for an elastic run") from None


def _whole_number(name: str, default: int, least: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit() or int(text) < least:
        raise UserError(f"{name}={text}: write a whole number, at least {least}")
    return int(text)


def launch(config_name: str, overrides: Sequence[str], allow_changes: Sequence[str], debug: bool) -> int:
    """Train a configuration file to its end; returns the exit code.

    Raises:
        UserError: before anything was started.
    """
    check_packages()
    path = configuration.find(config_name, ROOT)
    config = configuration.load(path, overrides).config
    machine = inspect_machine()
    start = Launch.from_environment(machine)
    folder = run_folder(config)
    checkpoint = layout.newest_readable(folder / "checkpoints", print)
    plan = make_plan(config, checkpoint)
    resume = check_resume(config, plan, checkpoint, allow_changes)
    if checkpoint is None and config.phases[0].start_from:
        check_model(config, layout.open_checkpoint(Path(config.phases[0].start_from)), allow_changes)
    degrees = check_layout(plan, start.world, resume.step)
    _say_plan(path, config, plan, degrees, start, machine, resume, folder)
    if resume.complete:
        write_status(folder, "finished", 0, step=resume.step)
        print(f"the run in {folder} is complete: step {resume.step} of {plan.end.step}; nothing to do")
        return 0
    if config.monitor.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("monitor.tensorboard: the package tensorboard is missing; install it or set the key to false")
    again = shlex.join(["./run_train.sh", "--config", config_name, *overrides])
    print(f"to go on after a stop or a crash, the same command: {again}")
    if machine.accelerators and start.processes > machine.accelerators:
        raise UserError(
            f"NPROC={start.processes}: this machine has {machine.accelerators} GPU(s), one for each process"
        )
    check_memory(config, start, machine)
    check_disk(config, plan, folder, resume)
    ensure_prepared(config)
    check_sources(config, plan, checkpoint, allow_changes)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_start(folder, start) as lock:
        (folder / STOP_FILE).unlink(missing_ok=True)
        resolved = folder / "config.toml"
        write_atomically(resolved, configuration.to_toml(config))
        write_status(folder, "starting", 1)
        command = torchrun_command(start, config.run.name, resolved, folder, allow_changes, debug)
        code, stopped = _run(command, start, machine, folder, lock)
    return exit_code(folder, code, stopped)


@contextlib.contextmanager
def _only_start(folder: Path, start: Launch) -> Iterator[int]:
    """Hold the run folder's lock, one on each node; torchrun inherits it, so that it lasts as long as the workers.

    Raises:
        UserError: another start holds it.
    """
    with open(folder / f".lock-{start.node_rank}", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another start is training in {folder}; wait for it, stop it, or use another run.name"
            ) from None
        yield file.fileno()


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
    need = estimate_memory(config, start.world)
    checkpoints, _ = disk_forecast(config, plan)
    print(f"memory         about {need.total / GIB:.2f} GiB a rank")
    print(f"disk           at most {checkpoints} checkpoints of {checkpoint_bytes(config) / GIB:.2f} GiB at a time")
    for phase in plan.phases[config.first_phase :]:
        shares = " ".join(f"{n} {w:.0%}" for n, w in zip(phase.sources, phase.weights, strict=True) if w)
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


def check_layout(plan: Plan, world: int, step: int) -> dict[str, Degrees]:
    """The degrees of every phase that ends after `step`, by its name.

    Raises:
        UserError: [parallel] does not fit the number of ranks, or a batch has too few rows for its ranks.
    """
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


def check_memory(config: RunConfig, start: Launch, machine: Machine) -> None:
    """The model must fit.

    Raises:
        UserError: with the estimate and a command that would work.
    """
    need = estimate_memory(config, start.world).total
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
        "or a smaller batch.micro_batch_size if the state alone fits"
    )


def check_disk(config: RunConfig, plan: Plan, folder: Path, resume: Resume) -> None:
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
    sources = {name: Source.open(Path(config.data.sources[name].path)) for name in plan.sources}
    for phase in plan.phases[config.first_phase :]:
        for name in phase.section.mix:
            if sources[name].tokens < phase.sequence_length + 1:
                raise UserError(
                    f"data.sources.{name} holds {sources[name].tokens} tokens, fewer than one row of phase "
                    f"{phase.name!r} ({phase.sequence_length} + 1); shorten phase.sequence_length or add text"
                )
    for name in plan.sources:
        path, length = config.data.sources[name].validation_path, config.phases[0].sequence_length
        if path and Source.open(Path(path)).tokens < length + 1:
            raise UserError(
                f"data.sources.{name}.validation_path: {path} holds fewer tokens than one row ({length} + 1); hold out "
                "more text (validation_share) or leave the key out"
            )
    if checkpoint is not None:
        from titan_yulan.data.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(Path(config.tokenizer.path))
        prints = {name: source.fingerprint for name, source in sources.items()}
        check_data(checkpoint, prints, tokenizer.fingerprint, allow_changes)
    for name, source in sources.items():
        end = dict(zip(plan.sources, plan.phases[-1].tapes(plan.phases[-1].rows_total), strict=True))[name]
        if end:
            print(f"source         {name}: {source.tokens:,} tokens, read {end / source.tokens:.2f} times by the end")


def torchrun_command(
    start: Launch, name: str, resolved: Path, folder: Path, allow_changes: Sequence[str], debug: bool
) -> list[str]:
    """The torchrun command line of one node."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={start.processes}"]
    if start.nodes in ("1", "1:1"):
        command += ["--standalone"]
    else:
        command += [
            f"--nnodes={start.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={start.endpoint}",
            f"--rdzv-id={name}",
            f"--rdzv-conf=is_host={'true' if start.node_rank == 0 else 'false'}",
        ]
    command += [
        f"--max-restarts={start.max_restarts}",
        "--monitor-interval=0.2",
        f"--log-dir={folder / 'logs'}",
        "--tee=3",
        f"--local-ranks-filter={start.log_rank}",
        "--module",
        "titan_yulan.train",
        f"--config={resolved}",
    ]
    command += [f"--allow-change={key}" for key in allow_changes]
    return command + (["--debug"] if debug else [])


def _run(command: list[str], start: Launch, machine: Machine, folder: Path, lock: int) -> tuple[int, bool]:
    """Run torchrun to its end; returns its exit code and whether this process was asked to stop.

    A signal becomes the run's stop file, which the workers look for at every step: torchrun, told itself, would report
    a failure although every worker ended well, and a worker that is still starting would die of the signal and be
    started again. A second signal goes to torchrun, which ends the workers."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, machine.cores // start.processes))),
        "PYTHONUNBUFFERED": "1",
        DEVICE_VARIABLE: "cuda" if machine.accelerators else "cpu",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_SECONDS),
        # every restart gets a fresh store: in a shared one, ranks find the addresses of the ranks before the restart
        # and hang when they connect (pytorch issue 135712)
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # an empty template would mean torchrun's own, longer one
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": " " if start.log_rank.isdigit() else "[rank ${rank}] ",
    }
    sys.stdout.flush()
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, pass_fds=[lock], preexec_fn=end_with_parent
    )
    signals: list[int] = []

    def stop(number: int, _: object) -> None:
        signals.append(number)
        if len(signals) == 1:
            (folder / STOP_FILE).touch()
        else:
            process.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, stop)
    code = process.wait()
    return code, bool(signals)


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
