"""The loop of a run, and what happens between its steps. `train.train` makes a `Trainer` and sees to its end.

What a step computes is in `learner`. Learning rate, rows and phase are functions of the number of finished steps alone
(`curriculum.plan`); besides that number the loop keeps only the list of skipped steps.

Two exceptions leave the loop: `GoBack` (a bad step; training goes on from the newest checkpoint) and `StopRequest`.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from titan_yulan import config as configuration
from titan_yulan.checkpoint import store
from titan_yulan.checkpoint.layout import Checkpoint, open_checkpoint, step_folder
from titan_yulan.checkpoint.resume import (
    check_resume,
    check_start,
    is_published,
    make_plan,
    mixture_history,
    open_published,
    run_folder,
)
from titan_yulan.checkpoint.saver import Saver
from titan_yulan.config.sections import RunConfig
from titan_yulan.config.values import Duration
from titan_yulan.curriculum.controller import MixtureController
from titan_yulan.curriculum.ledger import ledger, ledger_lines
from titan_yulan.curriculum.plan import PhasePlan
from titan_yulan.errors import RunError, UserError
from titan_yulan.eval.sample import continue_prompt
from titan_yulan.inputs import RunInputs
from titan_yulan.kernels.runtime import Kernels, choose
from titan_yulan.learner import Learner
from titan_yulan.monitor.best import KeepBest
from titan_yulan.monitor.events import append_event
from titan_yulan.monitor.garbage import GarbageCollection
from titan_yulan.monitor.metrics import write_status
from titan_yulan.monitor.profile import Profile, communication_share
from titan_yulan.monitor.recorder import Recorder
from titan_yulan.monitor.recovery import GoBack, Recovery
from titan_yulan.monitor.run_folder import enter_run_folder
from titan_yulan.monitor.settling import Settling
from titan_yulan.monitor.watchdog import Watchdog
from titan_yulan.parallel.nodes import StepTimes, check_nodes
from titan_yulan.parallel.process import World
from titan_yulan.parallel.stopping import StopRequests
from titan_yulan.plan.curriculum import repetitions, source_uses

# Printed lines between two comparisons of the ranks' speed.
_COMPARE_EVERY = 10


class StopRequest(Exception):
    """All ranks have agreed to save and end; says why."""


class Trainer:
    """One process's part of a run. Public methods in the order in which `train` calls them."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        stop: StopRequests,
        watchdog: Watchdog,
        allow_changes: Collection[str] = (),
    ) -> None:
        """Read the data's descriptions, choose the checkpoint, build the model and load it.

        Raises:
            UserError: the run folder, the data and the configuration do not fit together.
        """
        self.config, self.world, self.allow_changes = config, world, allow_changes
        self.folder = run_folder(config)
        self.say = print if world.is_main else lambda *_: None
        self.stop, self.watchdog = stop, watchdog
        if config.run.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if world.is_main:
            enter_run_folder(self.folder, self.say)
        self.profile = Profile(config, self.folder, world, partial(self._tell, "trace"))
        dist.barrier(group=world.host)  # nothing on the devices before they were looked at
        check_nodes(world, self.say)
        self.saver = Saver(self.folder / "checkpoints", world, config.checkpoint, partial(self._tell, "checkpoint"))
        checkpoint = self._newest_checkpoint()
        self.plan = make_plan(config, checkpoint)
        self.best = KeepBest(config, self.folder, world, self.plan.phases[0].start.step)
        self.controller = MixtureController(self.plan)
        self.inputs = RunInputs(config, self.plan)
        self.resume = check_resume(config, self.plan, checkpoint, allow_changes)
        for notice in self.resume.notices:
            self.say(notice)
        self.step = self.resume.step
        self.recovery = Recovery(config.recovery, self.plan, self.folder, world.is_main)
        self.recovery.recall(world)
        self.step_times, self.garbage = StepTimes(world), GarbageCollection()
        self.settling = Settling(watchdog, self.garbage, world.rank, self.say)
        self.learner = Learner(config, self.plan, world, self._choose_kernels(), self.say, self.inputs.mask_token_id)
        self._build(self.plan.phase_at(self.step))
        if checkpoint is not None:
            self.inputs.carry_on(checkpoint, allow_changes)
        elif start_from := config.phases[0].start_from:
            for notice in check_start(config, allow_changes):
                self.say(notice)
            if not is_published(start_from):
                start = open_checkpoint(Path(start_from))
                if damage := store.find_damage_together(start, world, config.checkpoint.verify):
                    raise RunError(f"phase.start_from: {start.path} is damaged: {'; '.join(damage)}")
                self.inputs.carry_on(start, allow_changes)
        self._restore(checkpoint)
        if checkpoint is not None:
            line = f"resumed from {checkpoint.path}: step {self.step} of {self.plan.end.step}"
            self._tell("resume", line, step=self.step, ranks=world.size)
        elif config.phases[0].start_from:
            self.say(f"started from {config.phases[0].start_from}")

    def _tell(self, event: str, line: str, **details: Any) -> None:
        """Print a line and keep it in the log of events."""
        self.say(line)
        if self.world.is_main:
            with suppress(OSError):  # a full disk ends the run where something is written that must not be missing
                append_event(self.folder, event, message=line, **details)

    def _newest_checkpoint(self) -> Checkpoint | None:
        self.watchdog.beat("comparing checkpoints with their manifests")
        report = partial(self._tell, "damaged checkpoint")
        return store.newest_good(self.folder / "checkpoints", self.world, report, self.config.checkpoint.verify)

    def _choose_kernels(self) -> Kernels:
        kernels = cast(Kernels, self.config.model.kernels)
        try:
            triton = choose(kernels, self.world.device)
        except ValueError as error:
            raise UserError(f"model.kernels: {error}") from error
        self.say(f"kernels: {'Triton' if triton else 'plain PyTorch'} on {self.world.device.type}")
        return kernels

    def _build(self, phase: PhasePlan) -> None:
        self.watchdog.beat("building the model")
        self.settling.built()
        self.learner.build(phase)

    def _restore(self, checkpoint: Checkpoint | None) -> None:
        """Put step, weights, moments and window where a checkpoint has them; None: where the run began."""
        self.watchdog.beat("loading a checkpoint")
        start = self.config.phases[0].start_from
        if checkpoint is not None:
            self.learner.load(checkpoint)
            self.recovery.resume(checkpoint.state().skipped)
        else:
            self.recovery.resume(())
            if is_published(start):
                self.learner.load_pretrained(open_published(start))
            elif start:
                self.learner.load(open_checkpoint(Path(start)))
        self.step = self.plan.phases[0].start.step if checkpoint is None else checkpoint.step
        self.saved_step = self.step

    # --- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> str:
        """Train what is left; returns "finished" or "stopped"."""
        resumed = self.step if self.step > self.plan.phases[0].start.step else None
        self.recorder = Recorder(self.config, self.plan, self.folder, resumed, self.world, self.recovery)
        self.profile.limit(self.step, self.plan.end.step)
        try:
            with self.garbage:
                return self._train_all()
        except (UserError, OSError):
            self._join_saver()  # what was sound when it was saved is kept
            raise
        except torch.OutOfMemoryError:
            self.profile.out_of_memory()
            raise
        finally:
            self.profile.drop()

    def _train_all(self) -> str:
        try:
            with self.recorder.spending("setup"):
                self.learner.rehearse(self.step)
            self._poll("after the dry run")
            self._validate_if_due()
            self._evaluate_if_due()
            self._profile()
            while self.step < self.plan.end.step:
                try:
                    self._train_phase()
                except GoBack:
                    self._go_back()
            self._join_saver()
        except StopRequest as request:
            self._stop(str(request))
            return "stopped"
        return "finished"

    def _train_phase(self) -> None:
        """Train to the end of the phase that the run stands in."""
        phase = self.plan.phase_at(self.step)
        self._enter(phase)
        if self.controller.due(self.step):
            self._adjust_mixture()
        while self.step < phase.end.step:
            self._train_steps(phase, self.controller.constant_until(self.step))

    def _train_steps(self, phase: PhasePlan, until: int) -> None:
        """Train up to step `until`, through rows that are known."""
        with self.learner.loader(self.step, self.inputs.tapes, until) as loader:
            for batches in loader:
                if self.recovery.leaves_out(self.step + 1):
                    values = self.learner.leave_out(self.step, batches)
                else:
                    with self.settling.step():
                        values = self.learner.train_step(self.step, batches, between=self._poll)
                self.step += 1
                self.step_times.add(loader.waited)
                printed = self.recorder.record(self.step, values, loader.waited)
                if printed:
                    self._check_records()
                    self._compare_ranks()
                self.settling.after(self.step, printed)
                if self.step < phase.end.step and self.controller.due(self.step):
                    self._adjust_mixture()
                self._validate_if_due()
                self._evaluate_if_due()
                if self.step == phase.end.step or self._due(self.config.checkpoint.every) or self.best.due(self.step):
                    self.save()
                self._profile()
                self._poll(f"after step {self.step}")

    # --- pieces of the loop ------------------------------------------------------------------------------------

    def _enter(self, phase: PhasePlan) -> None:
        """Make the model what this phase needs, and say where the run is."""
        if not self.learner.fits(phase):
            self._join_saver()  # the boundary's checkpoint carries the weights over to the new layout
            with self.watchdog.patient("changing the layout"), self.recorder.spending("setup"):
                self._build(phase)
                self.learner.rehearse(self.step)
                self.learner.load(Checkpoint(step_folder(self.folder / "checkpoints", self.step), self.step))
        self.learner.set_rope_theta(phase)
        self.recorder.phase_begins(phase, self.step)
        for line in repetitions(phase, source_uses(phase, self.inputs.sizes)):
            self.say(f"note: {line}")
        if (rms := phase.section.rebalance_rms) is not None and self.step == phase.start.step:
            self.learner.rebalance(rms)  # again after a restart from this very step, whose checkpoint is of before
            self.say(f"re-balanced: every matrix with a scalar has the root mean square {rms:g}")

    def _poll(self, what: str) -> None:
        """Tell the watchdog that the run goes on, and ask all ranks whether one was asked to stop. At the run's end
        there is nothing to stop: its last validation and checkpoint are made.

        Raises:
            StopRequest: on every rank.
        """
        self.watchdog.beat(what)
        if self.step < self.plan.end.step and (reason := self.stop.agreed(self.world)):
            raise StopRequest(reason)

    def _stop(self, reason: str) -> None:
        """Save and say goodbye. A step or validation that was begun is dropped; the next start does it again."""
        self.learner.drop_step()
        try:
            if self.step != self.saved_step:
                self.save()
        except GoBack:
            self.step = self.saved_step  # the next start goes back, and decides again about the bad step
        self._join_saver()
        line = f"stopped at step {self.step} on request ({reason}); the same command goes on from there"
        self._tell("stop", line, step=self.step, reason=reason)

    def _go_back(self) -> None:
        """Go on from the newest good checkpoint, or, if there is none yet, from where the run began."""
        self._join_saver()
        with self.watchdog.patient("going back to a checkpoint"), self.recorder.spending("setup"):
            checkpoint = self._newest_checkpoint()
            if checkpoint is None:
                self._build(self.plan.phases[0])
            self.plan.adapt(mixture_history(self.plan, checkpoint))
            check_resume(self.config, self.plan, checkpoint, self.allow_changes)  # it may lie in a finished phase
            self._restore(checkpoint)
        self.recorder.rewind(self.step)
        self.profile.drop()
        self._profile()
        self._tell("went back", f"went back to step {self.step}", step=self.step)

    def _check_records(self) -> None:
        """End the run on all ranks if the main rank cannot write its records.

        Raises:
            RunError: on every rank.
        """
        if self.world.agree(int(self.recorder.failure is not None)):
            reason = [self.recorder.failure]  # the same words on all ranks, whichever writes them down last
            dist.broadcast_object_list(reason, src=0, group=self.world.host)
            raise RunError(str(reason[0]))

    def _compare_ranks(self) -> None:
        """Name ranks that are slower than the others, now and then."""
        if self.step % (_COMPARE_EVERY * self.config.monitor.log_every) == 0 and (line := self.step_times.report()):
            self._tell("slow rank", f"WARNING: step {self.step}: {line}", step=self.step)

    def _due(self, every: Duration | None) -> bool:
        """Whether something that happens `every` so often happens after the last step."""
        phase = self._last_phase()
        return every is not None and (self.step - phase.start.step) % phase.steps_in(every) == 0

    def _last_phase(self) -> PhasePlan:
        """The phase of the last step."""
        return self.plan.phase_at(max(self.step - 1, self.plan.phases[0].start.step))

    def _validate_if_due(self) -> None:
        """Also when a request to stop has cut off the validation before this start."""
        first, last = self.plan.phases[0].start.step, self.plan.end.step
        due = self.step in (first, last) or self._due(self.config.eval.every)
        if not due or not self.inputs.held_out.batch_rows:
            return
        self.recorder.flush()
        if self.world.agree(int(self.recorder.has_validation(self.step))):
            return
        self.learner.set_rope_theta(self._last_phase())  # also where this start has gone on to the next one
        self._validate()

    def _validate(self) -> dict[str, float]:
        """Measure and record the losses of the held-out parts, by source."""
        self.recorder.flush()  # what the device still has to do belongs to the steps
        with self.watchdog.patient("validation"), self.recorder.spending("validation"):
            sums, tokens = self.learner.validate(self.inputs.held_out, self.inputs.held_out_tapes, between=self._poll)
            losses = self.recorder.validation(self.step, sums, tokens)
        self.settling.measured()
        self.best.validated(self.step)
        return losses

    def _evaluate_if_due(self) -> None:
        """Benchmarks; also when a request to stop has cut them off before this start."""
        tasks, first = self.inputs.tasks, self.plan.phases[0]
        ends = {first.start.step, *(phase.end.step for phase in self.plan.phases)}
        if tasks is None or not (self.step in ends or self._due(self.config.eval.task_every)):
            return
        self.recorder.flush()  # what the device still has to do belongs to the steps
        if self.world.agree(int(self.recorder.has_evaluation(self.step))):
            return
        self.learner.set_rope_theta(self._last_phase())
        with self.watchdog.patient("benchmarks"), self.recorder.spending("validation"):
            results = self.learner.evaluate(tasks, between=self._poll)
            self.recorder.evaluation(self.step, {result.task: result.metrics for result in results})
            for result in results:
                if result.cut:
                    self.say(f"WARNING: {result.task}: {result.cut} contexts lost their first tokens")
        self.settling.measured()

    def _adjust_mixture(self) -> None:
        """Measure perplexities and let the rows to come follow them, on all ranks alike."""
        losses = [self._validate()]
        dist.broadcast_object_list(losses, src=0, group=self.world.host)  # to the last bit, or ranks read other rows
        self.recorder.mixture(*self.controller.adjust(self.step, losses[0]))

    def _profile(self) -> None:
        """Begin or end the trace that is due before the next step."""
        if not self.profile.due(self.step + 1):
            return
        if self.profile.begins(self.step + 1) or self.profile.ends(self.step + 1):
            self.recorder.flush()  # to wait for the device takes time of the steps, not of the trace
        with self.watchdog.patient("a trace"), self.recorder.spending("setup"):
            found = self.profile.next_step(self.step + 1, self._last_phase())
        if found is not None:
            self.recorder.scalars(self.step, {"perf/share_communication_percent": communication_share(found)})

    def save(self) -> None:
        """Write what is recorded, check that it is sound, then write a checkpoint (or begin to)."""
        self.recorder.sync()
        self._check_records()  # a line that could not be written must not lie behind a checkpoint
        phase = self._last_phase()
        state = self.inputs.state_after(phase, self.step, self.recovery.skipped)
        with self.watchdog.patient(f"saving step {self.step}"), self.recorder.spending("checkpoint"):
            self.saver.save(self.learner.tensors(), state, configuration.to_toml(self.config), self.best.losses())
        self.saved_step = self.step
        if state.phase_finished:
            for line in ledger_lines(phase, ledger(self.plan, self.step, self.inputs.sizes)):
                self.say(line)

    def _join_saver(self) -> None:
        with self.watchdog.patient("writing a checkpoint"), self.recorder.spending("checkpoint"):
            self.saver.join()

    def close(self, outcome: str) -> None:
        """The sampled continuation of a finished run, the last words, and the record's end."""
        if outcome == "finished" and self.config.eval.prompt:
            with self.watchdog.patient("the sample at the end"), self.recorder.spending("validation"):
                text = continue_prompt(self.learner.decoder, self.inputs.tokenizer, self.config, self.world.device)
            self.recorder.sample(self.step, self.config.eval.prompt, text)
        self.recorder.close(outcome)
        if self.world.is_main:
            write_status(self.folder, outcome, 0 if outcome == "finished" else 75, step=self.step)
