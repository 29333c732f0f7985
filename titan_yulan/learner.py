"""The model, its optimizer and all that one step needs, laid out over the ranks. It knows no files but a checkpoint's,
and nothing of the run around it: `trainer.Trainer` decides which rows come, when to save and when to stop.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from titan_yulan.checkpoint import store
from titan_yulan.checkpoint.hugging_face import HuggingFaceFolder
from titan_yulan.checkpoint.hugging_face_weights import load_hugging_face
from titan_yulan.checkpoint.layout import Checkpoint
from titan_yulan.checkpoint.universal import UniversalFolder
from titan_yulan.checkpoint.universal_state import load_universal
from titan_yulan.config.sections import RunConfig
from titan_yulan.curriculum.plan import PhasePlan, Plan
from titan_yulan.data import hashing
from titan_yulan.data.loader import Batch, Loader, Tapes, fingerprint
from titan_yulan.errors import RunError
from titan_yulan.eval.evaluate import Result
from titan_yulan.eval.in_training import TaskEvaluation
from titan_yulan.eval.validation import HeldOutRows, validation_loss
from titan_yulan.kernels.runtime import Kernels
from titan_yulan.monitor.observation import Observation
from titan_yulan.monitor.recorder import StepValues
from titan_yulan.monitor.recovery import LEFT_OUT
from titan_yulan.monitor.statistics import is_due
from titan_yulan.objective.build import build_objective
from titan_yulan.objective.forward import forward
from titan_yulan.optimizer.adamw import build_adamw, clip_gradients, optimizer_state, set_learning_rate, step_unless
from titan_yulan.optimizer.guard import Guard
from titan_yulan.optimizer.rebalance import rebalance
from titan_yulan.parallel import process
from titan_yulan.parallel.compile import compile_loss
from titan_yulan.parallel.degrees import resolve_degrees
from titan_yulan.parallel.fsdp import reshard, sum_replicated_gradients, synchronize_next_backward
from titan_yulan.parallel.mesh import build_mesh
from titan_yulan.parallel.parallelize import build_decoder
from titan_yulan.parallel.process import World

# Seconds that a collective may last longer than the watchdog waits, so that stacks are written first.
_TIMEOUT_MARGIN = 300.0


class Learner:
    """One rank's part of the model and what trains it; `build` comes first, and again when the layout changes."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        world: World,
        kernels: Kernels,
        say: Callable[[str], None],
        mask_token_id: int | None = None,
    ) -> None:
        """`mask_token_id`: see `data.mask_token`; for masked diffusion."""
        self.config, self.plan, self.world = config, plan, world
        self._kernels, self._say, self._mask_token_id = kernels, say, mask_token_id

    def build(self, phase: PhasePlan) -> None:
        """A fresh model, optimizer and guard in the layout of `phase`; all ranks together."""
        config, section = self.config, phase.section
        for name in ("decoder", "optimizer", "observation"):
            vars(self).pop(name, None)  # the old ones go first, so that there is never room needed for both
        gc.collect()  # FSDP2's modules refer to one another in circles
        self.layout = (section.parallel, section.activation_checkpoint)
        degrees = resolve_degrees(section.parallel, self.world.size, config.model, section.sequence_length)
        self.mesh = build_mesh(degrees, self.world.device.type)
        longest = max(config.recovery.first_step_timeout, config.recovery.step_timeout)
        process.set_timeout(self.world, longest + _TIMEOUT_MARGIN)
        self._say(degrees.describe())
        self.decoder = build_decoder(
            config.model,
            section.parallel,
            self.mesh,
            config.run.seed,
            self.world.device,
            section.activation_checkpoint,
            config.compile,
        )
        self.objective = build_objective(
            config, len(self.plan.sources), self._kernels, self._mask_token_id, self.mesh.tensor_group
        )
        compile_loss(self.objective, config.compile)
        self.optimizer = build_adamw(self.decoder, config.model, config.optimizer)
        self.guard = Guard(config.recovery, self.world.device)
        if config.monitor.statistics_every:
            self.observation = Observation(config, self.decoder, self.objective, self.optimizer, self.world.device)
        self.set_rope_theta(phase)

    def fits(self, phase: PhasePlan) -> bool:
        """Whether the model is laid out as `phase` wants it."""
        return (phase.section.parallel, phase.section.activation_checkpoint) == self.layout

    def set_rope_theta(self, phase: PhasePlan) -> None:
        self.decoder.set_rope_theta(phase.section.rope_theta or self.config.model.rope_theta)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint holds, by section and name; the very tensors, for saving and loading."""
        return {
            "model": dict(self.decoder.named_parameters()),
            "optimizer": optimizer_state(self.decoder, self.optimizer),
            "recovery": self.guard.tensors(),
        }

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Take all tensors from a checkpoint, whatever layout wrote it; all ranks together. The guard's window begins
        empty, and says so, if the checkpoint's has another length; so do moments that an import did not find.

        Raises:
            RunError: it is of another model.
        """
        tensors, stored = self.tensors(), store.read_index(checkpoint).state_dict_metadata
        if getattr(stored.get("recovery.window"), "size", None) != tensors["recovery"]["window"].shape:
            for tensor in tensors.pop("recovery").values():
                tensor.zero_()
            self._say(f"recovery.spike_window: {checkpoint.path} holds no window of this length; it begins empty")
        if not any(name.startswith("optimizer.") for name in stored):
            for tensor in tensors.pop("optimizer").values():
                tensor.zero_()
            self._say(f"{checkpoint.path} was imported from weights alone: Adam's moments begin at zero")
        store.load(checkpoint, tensors, self.world.host)

    @torch.no_grad()
    def load_pretrained(self, folder: HuggingFaceFolder | UniversalFolder) -> None:
        """Take the weights of a folder of others, and the moments if it has any (else they stay, zero after `build`);
        all ranks together.

        Raises:
            RunError: they cannot be read.
        """
        tensors = self.tensors()
        if isinstance(folder, UniversalFolder):
            load_universal(folder, tensors["model"], tensors["optimizer"], self.world.host)
        else:
            load_hugging_face(folder, tensors["model"], self.world.host)

    def rebalance(self, rms: float) -> None:
        """Give every matrix with a scalar one magnitude (`optimizer.rebalance`); all ranks together."""
        reshard(self.decoder)
        rebalance(self.decoder, self.optimizer, rms)

    def train_step(
        self, step: int, batches: list[Batch], between: Callable[[str], None] = lambda what: None
    ) -> StepValues:
        """Forward, backward and update for one global batch; nothing here waits for the device.

        Args:
            step: finished steps.
            batches: this rank's micro-batches.
            between: called between micro-batches, on all ranks alike; may raise to drop the step.
        """
        mesh, phase, model = self.mesh, self.plan.phase_at(step), self.config.model
        if model.attention_dropout or model.hidden_dropout:
            # dropout is no contract: a restart on as many ranks drops the same, other ranks drop as much
            torch.manual_seed(hashing.key(self.config.run.seed, "dropout", step, self.world.rank))
        batches = [batch.to(self.world.device) for batch in batches]
        inputs = [self.objective.inputs(batch) for batch in batches]
        # context ranks read the same rows: the first of them speaks for all
        denominator = torch.stack([part.denominator for part in inputs]).sum() * (mesh.context_rank == 0)
        dist.all_reduce(denominator, group=mesh.loss_group)
        divisor = torch.where(denominator == 0, 1.0, denominator)  # a batch without any target has no gradient
        totals = torch.zeros(1 + 2 * len(self.plan.sources), device=self.world.device)
        observed = is_due(step + 1, self.config.monitor.statistics_every)
        if observed:
            self.observation.before_forward(batches[0])
        for index, part in enumerate(inputs):
            if index:
                between(f"micro-batch {index + 1} of step {step + 1}")
            synchronize_next_backward(self.decoder, phase.section.parallel, last=index == len(inputs) - 1)
            sums = forward(self.decoder, self.objective, part, divisor)
            sums.objective.backward()
            objective = sums.objective.detach() * divisor
            totals += torch.cat([objective[None], sums.cross_entropy, sums.tokens])
        sum_replicated_gradients(self.decoder)
        if observed:
            self.observation.before_clipping()
        gradient_norm = clip_gradients(self.decoder.parameters(), self.config.optimizer.max_gradient_norm)
        dist.all_reduce(totals, group=mesh.loss_group)
        if step == phase.start.step:
            self.guard.forget()
        verdict, refused = self.guard.judge(totals[0] / divisor, gradient_norm)
        learning_rate = self.plan.learning_rate(step)
        set_learning_rate(self.optimizer, learning_rate)
        step_unless(self.optimizer, refused)
        statistics = self.observation.after_update(refused) if observed else None
        self.optimizer.zero_grad()
        prints = self._global_fingerprint(batches)
        return StepValues(phase, learning_rate, totals, denominator, gradient_norm, prints, verdict, statistics)

    def leave_out(self, step: int, batches: list[Batch]) -> StepValues:
        """A step of the skip list instead of `train_step`: its rows are read, and nothing is learned from them."""
        device = self.world.device
        prints = self._global_fingerprint([batch.to(device) for batch in batches])
        totals = torch.zeros(1 + 2 * len(self.plan.sources), device=device)
        return StepValues(
            self.plan.phase_at(step),
            self.plan.learning_rate(step),
            totals,
            denominator=torch.zeros((), device=device),
            gradient_norm=torch.full((), math.nan, device=device),
            fingerprint=prints,
            verdict=torch.full((), LEFT_OUT, dtype=torch.float32, device=device),
        )

    def _global_fingerprint(self, batches: list[Batch]) -> torch.Tensor:
        """() int64: sum of the fingerprints of all real rows of the global batch, mod 2^64, from the tokens as the
        model is fed them."""
        rows = [(fingerprint(batch.tokens) * (batch.weight > 0)).sum() for batch in batches]
        prints = torch.stack(rows).sum() * (self.mesh.context_rank == 0)
        dist.all_reduce(prints, group=self.mesh.loss_group)
        return prints

    @torch.no_grad()
    def validate(self, held_out: HeldOutRows, tapes: Tapes, between: Callable[[str], None]) -> tuple[Tensor, Tensor]:
        """`eval.validation.validation_loss` of the model as it is."""
        size = self.plan.phases[0].section.batch.micro_batch_size
        sums = validation_loss(
            self.decoder,
            self.objective,
            held_out,
            tapes,
            len(self.plan.sources),
            size,
            self.mesh,
            self.world.device,
            between,
        )
        reshard(self.decoder)
        return sums

    @torch.no_grad()
    def evaluate(self, tasks: TaskEvaluation, between: Callable[[str], None]) -> list[Result]:
        """The numbers of the model as it is on benchmarks, in batches as large as those of the first phase."""
        first = self.plan.phases[0]
        batch_tokens = first.sequence_length * first.section.batch.micro_batch_size
        results = tasks(self.decoder, self.mesh, self.world, batch_tokens, between)
        reshard(self.decoder)
        return results

    def drop_step(self) -> None:
        """Forget what a step or a validation that was broken off has left behind; only to save and end."""
        self.optimizer.zero_grad()
        reshard(self.decoder)

    def loader(self, step: int, tapes: Tapes, until: int | None = None) -> Loader:
        """This rank's micro-batches from `step` finished steps to `until`; None: to the end of its phase."""
        phase = self.plan.phase_at(step)
        return Loader(
            phase,
            tapes,
            first_step=step - phase.start.step,
            last_step=None if until is None else until - phase.start.step,
            rank=self.mesh.data_rank,
            world=self.mesh.data_size,
            micro_batch_size=phase.section.batch.micro_batch_size,
            prefetch=self.config.data.prefetch,
            pin_memory=self.world.device.type == "cuda",
        )

    def rehearse(self, step: int) -> None:
        """Forward and backward on made-up rows in the shape of every phase after `step` that has this layout, so that
        an error of memory or shape comes now and not in the middle of the run.

        Raises:
            RunError: there is too little memory.
        """
        shapes = {
            (phase.section.batch.micro_batch_size, phase.sequence_length)
            for phase in self.plan.phases
            if phase.end.step > step and self.fits(phase)
        }
        parallel = self.layout[0]
        # gradients that are not reduced at once are whole on every rank, which is when most memory is needed
        passes = (False, True) if parallel.synchronize == "last" else (True,)
        begin = time.perf_counter()
        for rows, length in sorted(shapes):
            part = self.objective.inputs(_made_up_batch(rows, length, self.world.device))
            try:
                for last in passes:
                    synchronize_next_backward(self.decoder, parallel, last)
                    forward(self.decoder, self.objective, part, part.denominator).objective.backward()
            except torch.OutOfMemoryError as error:
                raise RunError(
                    f"batch.micro_batch_size: {rows} rows of {length} tokens do not fit into the memory of "
                    f"{self.world.device}; lower it (it changes speed, not results)"
                ) from error
            self.optimizer.zero_grad()
        self._say(f"dry run of {len(shapes)} batch shape(s): {time.perf_counter() - begin:.1f} s")


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
