"""The trainer: build, loop, close. `train(config)` is the Python entry behind `./run_train.sh`.

A step reads this rank's micro-batches of one global batch, divides their summed losses by one global denominator,
adds the gradients up over all ranks, clips, and updates. Learning rate, rows and phase are functions of the number of
finished steps alone (`curriculum.plan`), so the loop below keeps no other state.
"""

from __future__ import annotations

import argparse
import errno
import os
import platform
import signal
import time
import traceback
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

from titan_yulan import config as configuration
from titan_yulan.checkpoint import store
from titan_yulan.checkpoint.layout import Checkpoint, TrainerState, open_checkpoint, remove_leftovers, step_folder
from titan_yulan.checkpoint.resume import check_data, check_model, check_resume, make_plan, run_folder
from titan_yulan.config.sections import RunConfig
from titan_yulan.config.values import Duration
from titan_yulan.curriculum.plan import PhasePlan
from titan_yulan.data.loader import Batch, Loader, fingerprint
from titan_yulan.data.source import Source
from titan_yulan.data.tape import Tape
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import RunError, UserError, explain_os_error
from titan_yulan.eval.generate import generate
from titan_yulan.eval.validation import HeldOutRows, validation_loss
from titan_yulan.kernels.runtime import Kernels, choose
from titan_yulan.monitor.metrics import STOP_FILE, read_status, write_status
from titan_yulan.monitor.recorder import Recorder, StepValues
from titan_yulan.objective.forward import forward
from titan_yulan.objective.next_token import NextToken
from titan_yulan.optimizer.adamw import build_adamw, clip_gradients, optimizer_state, set_learning_rate
from titan_yulan.parallel import process
from titan_yulan.parallel.compile import CompileWatch, compile_loss
from titan_yulan.parallel.degrees import resolve_degrees
from titan_yulan.parallel.fsdp import reshard, sum_replicated_gradients, synchronize_next_backward
from titan_yulan.parallel.launched import DEVICE_VARIABLE, end_with_parent
from titan_yulan.parallel.mesh import build_mesh
from titan_yulan.parallel.parallelize import build_decoder
from titan_yulan.parallel.process import World

# After the model is built anew, compiling is no surprise for so many steps.
_COMPILING_STEPS = 2


class Trainer:
    """One process's part of a run. Public methods in the order in which `train` calls them."""

    def __init__(self, config: RunConfig, world: World, stop: StopSignals, allow_changes: Collection[str] = ()) -> None:
        """Read the data's descriptions, choose the checkpoint, build the model and load it.

        Raises:
            UserError: the run folder, the data and the configuration do not fit together.
        """
        self.config, self.world, self.allow_changes = config, world, allow_changes
        self.folder = run_folder(config)
        self.say = print if world.is_main else _silent
        self.stop = stop
        if config.run.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if world.is_main:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            if DEVICE_VARIABLE not in os.environ:
                (self.folder / STOP_FILE).unlink(missing_ok=True)  # the launcher has done that before it could be asked
            write_status(self.folder, "running", 1)
            for leftover in remove_leftovers(self.folder / "checkpoints"):
                self.say(f"removed {leftover}: a save that did not finish")
        dist.barrier()
        self.tokenizer = Tokenizer.load(Path(config.tokenizer.path))
        checkpoint = store.newest_good(self.folder / "checkpoints", world, self.say)
        self.plan = make_plan(config, checkpoint)
        self.sources = [Source.open(Path(config.data.sources[name].path)) for name in self.plan.sources]
        self.tapes = [Tape(source, config.run.seed) for source in self.sources]
        self.resume = check_resume(config, self.plan, checkpoint, allow_changes)
        for notice in self.resume.notices:
            self.say(notice)
        self.step = self.resume.step
        self._open_held_out()
        self.kernels = self._choose_kernels()
        self.compilations = CompileWatch()
        self._build_model(self.plan.phase_at(self.step))
        if checkpoint is not None:
            check_data(checkpoint, self._source_fingerprints(), self.tokenizer.fingerprint, allow_changes)
            self._load(checkpoint)
            self.say(f"resumed from {checkpoint.path}: step {self.step} of {self.plan.end.step}")
        elif config.phases[0].start_from:
            start = open_checkpoint(Path(config.phases[0].start_from))
            if damage := store.find_damage_together(start, world):
                raise RunError(f"phase.start_from: {start.path} is damaged: {'; '.join(damage)}")
            check_model(config, start, allow_changes)
            check_data(start, self._source_fingerprints(), self.tokenizer.fingerprint, allow_changes)
            self._load(start)
            self.say(f"started from {start.path}")

    def _choose_kernels(self) -> Kernels:
        kernels = cast(Kernels, self.config.model.kernels)
        try:
            triton = choose(kernels, self.world.device)
        except ValueError as error:
            raise UserError(f"model.kernels: {error}") from error
        self.say(f"kernels: {'Triton' if triton else 'plain PyTorch'} on {self.world.device.type}")
        return kernels

    def _open_held_out(self) -> None:
        paths = {i: self.config.data.sources[name].validation_path for i, name in enumerate(self.plan.sources)}
        held_out = {i: Tape(Source.open(Path(path)), seed=0) for i, path in paths.items() if path}
        # one length for the whole run, so that the losses of all phases can be compared
        length = self.config.phases[0].sequence_length
        self.held_out = HeldOutRows(held_out, self.config.eval.rows, length)
        self.held_out_tapes = [held_out.get(i, tape) for i, tape in enumerate(self.tapes)]

    def _build_model(self, phase: PhasePlan) -> None:
        config, section = self.config, phase.section
        self.layout = (section.parallel, section.activation_checkpoint)
        degrees = resolve_degrees(section.parallel, self.world.size, config.model, section.sequence_length)
        self.mesh = build_mesh(degrees, self.world.device.type)
        self.say(degrees.describe())
        self.decoder = build_decoder(
            config.model,
            section.parallel,
            self.mesh,
            config.run.seed,
            self.world.device,
            section.activation_checkpoint,
            config.compile,
        )
        self.objective = NextToken(
            config.objective,
            len(self.plan.sources),
            self.kernels,
            group=self.mesh.tensor_group,
            vocabulary_size=config.model.vocab_size,
        )
        compile_loss(self.objective, config.compile)
        self.unsettled_steps = _COMPILING_STEPS
        self.optimizer = build_adamw(self.decoder, config.model, config.optimizer)
        self._set_rope_theta(phase)

    def _set_rope_theta(self, phase: PhasePlan) -> None:
        self.decoder.set_rope_theta(phase.section.rope_theta or self.config.model.rope_theta)

    def _tensors(self) -> dict[str, dict]:
        return {
            "model": dict(self.decoder.named_parameters()),
            "optimizer": optimizer_state(self.decoder, self.optimizer),
        }

    @torch.no_grad()
    def _load(self, checkpoint: Checkpoint) -> None:
        store.load(checkpoint, self._tensors(), self.world.host)

    # --- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> str:
        """Train what is left; returns "finished" or "stopped"."""
        resumed = self.step if self.step > self.plan.phases[0].start.step else None
        self.recorder = Recorder(self.config, self.plan, self.folder, resumed, self.world)
        self._dry_run()
        if self.step == self.plan.phases[0].start.step:
            self._validate()
        while self.step < self.plan.end.step:
            phase = self.plan.phase_at(self.step)
            self._enter(phase)
            with self._loader(phase) as loader:
                for batches in loader:
                    values = self._train_step(phase, batches)
                    self.step += 1
                    self.recorder.record(self.step, values, loader.waited)
                    self._watch_compilations()
                    at_end = self.step == phase.end.step
                    if self._due(self.config.eval.every, phase) or self.step == self.plan.end.step:
                        self._validate()
                    stopping = self._agree_to_stop()
                    if at_end or stopping or self._due(self.config.checkpoint.every, phase):
                        self.save(phase)
                    if stopping and self.step < self.plan.end.step:
                        self.say(f"stopped at step {self.step} on request; the same command goes on from there")
                        return "stopped"
        return "finished"

    def _train_step(self, phase: PhasePlan, batches: list[Batch]) -> StepValues:
        """Forward, backward and update for one global batch; nothing here waits for the device."""
        mesh = self.mesh
        batches = [batch.to(self.world.device) for batch in batches]
        inputs = [self.objective.inputs(batch) for batch in batches]
        # context ranks read the same rows: the first of them speaks for all
        denominator = torch.stack([part.denominator for part in inputs]).sum() * (mesh.context_rank == 0)
        dist.all_reduce(denominator, group=mesh.loss_group)
        divisor = torch.where(denominator == 0, 1.0, denominator)  # a batch without any target has no gradient
        totals = torch.zeros(1 + 2 * len(self.plan.sources), device=self.world.device)
        for index, part in enumerate(inputs):
            synchronize_next_backward(self.decoder, phase.section.parallel, last=index == len(inputs) - 1)
            sums = forward(self.decoder, self.objective, part, divisor)
            sums.objective.backward()
            objective = sums.objective.detach() * divisor
            totals += torch.cat([objective[None], sums.cross_entropy, sums.tokens])
        sum_replicated_gradients(self.decoder)
        gradient_norm = clip_gradients(self.decoder.parameters(), self.config.optimizer.max_gradient_norm)
        learning_rate = self.plan.learning_rate(self.step)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        dist.all_reduce(totals, group=mesh.loss_group)
        prints = torch.stack([_batch_fingerprint(batch) for batch in batches]).sum() * (mesh.context_rank == 0)
        dist.all_reduce(prints, group=mesh.loss_group)
        return StepValues(phase, learning_rate, totals, denominator, gradient_norm, prints)

    # --- pieces of the loop ------------------------------------------------------------------------------------

    def _enter(self, phase: PhasePlan) -> None:
        """Make the model what this phase needs, and say where the run is."""
        if (phase.section.parallel, phase.section.activation_checkpoint) != self.layout:
            # the boundary's checkpoint carries the weights over to the new layout; the old ones go first, so that
            # there is never room needed for both
            del self.decoder, self.optimizer
            self._build_model(phase)
            self._load(Checkpoint(step_folder(self.folder / "checkpoints", self.step), self.step))
        self._set_rope_theta(phase)
        self.recorder.phase_begins(phase, self.step)

    def _loader(self, phase: PhasePlan) -> Loader:
        return Loader(
            phase,
            self.tapes,
            first_step=self.step - phase.start.step,
            rank=self.mesh.data_rank,
            world=self.mesh.data_size,
            micro_batch_size=phase.section.batch.micro_batch_size,
            prefetch=self.config.data.prefetch,
            pin_memory=self.world.device.type == "cuda",
        )

    def _agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop; ends the run on all ranks if the main rank cannot write its records.

        Raises:
            RunError: on every rank.
        """
        stop = self.stop.requested or (self.world.is_main and (self.folder / STOP_FILE).exists())
        asked = self.world.agree(2 if self.recorder.failure else int(stop))
        if asked == 2:
            reason = [self.recorder.failure]  # the same words on all ranks, whichever writes them down last
            dist.broadcast_object_list(reason, src=0, group=self.world.host)
            raise RunError(str(reason[0]))
        return asked == 1

    def _due(self, every: Duration | None, phase: PhasePlan) -> bool:
        return every is not None and (self.step - phase.start.step) % phase.steps_in(every) == 0

    def _dry_run(self) -> None:
        """Forward and backward on made-up rows in the shape of every phase to come, so that an error of memory or
        shape comes now and not in the middle of the run."""
        shapes = {
            (phase.section.batch.micro_batch_size, phase.sequence_length)
            for phase in self.plan.phases
            if phase.end.step > self.step
        }
        begin = time.perf_counter()
        for rows, length in sorted(shapes):
            part = self.objective.inputs(_made_up_batch(rows, length, self.world.device))
            try:
                forward(self.decoder, self.objective, part, part.denominator).objective.backward()
            except torch.OutOfMemoryError as error:
                raise RunError(
                    f"batch.micro_batch_size: {rows} rows of {length} tokens do not fit into the memory of "
                    f"{self.world.device}; lower it (it changes speed, not results)"
                ) from error
            self.optimizer.zero_grad()
        self.say(f"dry run of {len(shapes)} batch shape(s): {time.perf_counter() - begin:.1f} s")

    def _validate(self) -> None:
        if self.held_out.batch_rows:
            micro_batch_size = self.plan.phases[0].section.batch.micro_batch_size
            sums, tokens = validation_loss(
                self.decoder,
                self.objective,
                self.held_out,
                self.held_out_tapes,
                micro_batch_size,
                self.mesh,
                self.world.device,
            )
            reshard(self.decoder)
            self.recorder.validation(self.step, sums, tokens)
            self.unsettled_steps = max(self.unsettled_steps, 1)  # a forward pass alone is compiled at its first use

    def _watch_compilations(self) -> None:
        """Say what was compiled when it was to be expected, and complain when it was not."""
        if self.unsettled_steps:
            self.unsettled_steps -= 1
            if not self.unsettled_steps and (line := self.compilations.settle()):
                self.say(line)
            return
        for line in self.compilations.recompiled():
            print(f"WARNING: step {self.step}, rank {self.world.rank}: {line}")

    def save(self, phase: PhasePlan) -> None:
        """Write what is recorded, check that it is sound, then write a checkpoint."""
        self.recorder.sync()
        self._agree_to_stop()  # a line that could not be written must not lie behind a checkpoint
        position = self.plan.position(self.step)
        tapes = phase.tapes(position.row - phase.start.row)
        first = self.plan.phases[0]
        state = TrainerState(
            step=self.step,
            row=position.row,
            token=position.token,
            phase=phase.name,
            phase_finished=self.step == phase.end.step,
            tapes=dict(zip(self.plan.sources, tapes, strict=True)),
            sources=self._source_fingerprints(),
            tokenizer=self.tokenizer.fingerprint,
            versions={"torch": torch.__version__, "python": platform.python_version()},
            origin={**asdict(first.start), "tapes": dict(zip(self.plan.sources, first.tape_start, strict=True))},
        )
        text = configuration.to_toml(self.config)
        folder = self.folder / "checkpoints"
        store.save(folder, self._tensors(), state, text, self.world, self.config.checkpoint.keep)
        self.recorder.pause_ends()

    def _source_fingerprints(self) -> dict[str, str]:
        return {name: source.fingerprint for name, source in zip(self.plan.sources, self.sources, strict=True)}

    def close(self, outcome: str) -> None:
        """The sampled continuation of a finished run, the last words, and the record's end."""
        if outcome == "finished" and self.config.eval.prompt:
            ids = generate(
                self.decoder,
                self.tokenizer.encode(self.config.eval.prompt),
                new_tokens=self.config.eval.new_tokens,
                eos_id=self.tokenizer.eos_id,
                vocab_size=self.tokenizer.vocab_size,
                context=self.plan.phases[-1].sequence_length,
                seed=self.config.run.seed,
                device=self.world.device,
            )
            self.recorder.sample(self.step, self.config.eval.prompt, self.tokenizer.decode(ids))
        self.recorder.close(outcome)
        if self.world.is_main:
            write_status(self.folder, outcome, 0 if outcome == "finished" else 75, step=self.step)


def train(config: RunConfig, allow_changes: Collection[str] = ()) -> str:
    """Train `config` in this process (one rank of those that torchrun started, or alone).

    Returns:
        "finished" or "stopped"; `status.json` in the run folder says the same.

    Raises:
        UserError: (RunError among them) with one clear message.
    """
    alone = not dist.is_initialized()
    world = process.start()
    with StopSignals() as stop:
        trainer = Trainer(config, world, stop, allow_changes)
        outcome = trainer.run()
        trainer.close(outcome)
    if alone:
        process.leave()
    return outcome


class StopSignals:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a request that the loop reads at the next step boundary."""

    def __init__(self) -> None:
        self.requested = 0

    def __enter__(self) -> StopSignals:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        self.requested = 1


def _batch_fingerprint(batch: Batch) -> torch.Tensor:
    """() int64: sum of the fingerprints of the real rows, mod 2^64, from the tokens as the model is fed them."""
    return (fingerprint(batch.tokens) * (batch.weight > 0)).sum()


def _made_up_batch(rows: int, length: int, device: torch.device) -> Batch:
    size = (rows, length + 1)
    return Batch(
        tokens=torch.zeros(size, dtype=torch.int64),
        document_ids=torch.zeros(size, dtype=torch.int64),
        loss_mask=torch.ones(size, dtype=torch.bool),
        source=torch.zeros(rows, dtype=torch.int64),
        position=torch.zeros(rows, dtype=torch.int64),
        weight=torch.ones(rows),
    ).to(device)


def _silent(*_: object) -> None:
    pass


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
    end_with_parent()
    if (
        int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
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
