"""What a run reads (tokenizer, tapes of its sources, held-out rows), and what a checkpoint says about it."""

from __future__ import annotations

import platform
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

import torch

from titan_yulan.checkpoint.layout import Checkpoint, TrainerState
from titan_yulan.checkpoint.resume import check_data
from titan_yulan.config.sections import RunConfig
from titan_yulan.curriculum.ledger import ledger, ledger_json
from titan_yulan.curriculum.plan import PhasePlan, Plan
from titan_yulan.data.mask_token import mask_token
from titan_yulan.data.tape import open_tape
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.eval.in_training import TaskEvaluation
from titan_yulan.eval.validation import HeldOutRows, held_out_tape


class RunInputs:
    """Everything that is read; sources that only finished phases mixed need not be there.

    Attributes:
        tapes: by source id.
        held_out_tapes: of the sources that have a held-out part, by source id.
        sizes: source -> tokens.
        fingerprints: source -> fingerprint, of all that were ever read.
        tasks: those of [eval] tasks; None: there are none.
        mask_token_id: what stands for a hidden token; None: the objective hides none.
    """

    def __init__(self, config: RunConfig, plan: Plan) -> None:
        """
        Raises:
            UserError: something is not prepared.
            RunError: something is damaged.
        """
        self._plan = plan
        self.tokenizer = Tokenizer.load(Path(config.tokenizer.path))
        self.mask_token_id = mask_token(config, self.tokenizer.vocab_size)
        self.tapes = {plan.sources.index(name): open_tape(config, name) for name in config.sources_to_read}
        self.sizes = {plan.sources[i]: tape.length for i, tape in self.tapes.items()}
        self.fingerprints = {plan.sources[i]: tape.fingerprint for i, tape in self.tapes.items()}
        paths = {i: config.data.sources[plan.sources[i]].validation_path for i in self.tapes}
        self.held_out_tapes = {i: held_out_tape(path) for i, path in paths.items() if path}
        # one length for the whole run, so that the losses of all phases can be compared
        length = config.phases[0].sequence_length
        self.held_out = HeldOutRows(self.held_out_tapes, config.eval.rows, length)
        how = self.tokenizer, length, config.objective, self.mask_token_id
        self.tasks = TaskEvaluation(config.eval, *how) if config.eval.tasks else None

    def carry_on(self, checkpoint: Checkpoint, allow_changes: Collection[str]) -> None:
        """Take up where a checkpoint stands in the data.

        Raises:
            UserError: its position refers to other data.
        """
        check_data(checkpoint, self.fingerprints, self.tokenizer.fingerprint, allow_changes)
        self.fingerprints = {**checkpoint.state().sources, **self.fingerprints}

    def state_after(self, phase: PhasePlan, step: int, skipped: list[int]) -> TrainerState:
        """What a checkpoint of `step`, the last one of which was in `phase`, says of the run's position."""
        plan, first = self._plan, self._plan.phases[0]
        position = phase.position(step - phase.start.step)
        tapes = phase.tapes(position.row - phase.start.row)
        return TrainerState(
            step=step,
            row=position.row,
            token=position.token,
            phase=phase.name,
            phase_finished=step == phase.end.step,
            tapes=dict(zip(plan.sources, tapes, strict=True)),
            sources=self.fingerprints,
            tokenizer=self.tokenizer.fingerprint,
            versions={"torch": torch.__version__, "python": platform.python_version()},
            origin={**asdict(first.start), "tapes": dict(zip(plan.sources, first.tape_start, strict=True))},
            skipped=skipped,
            ledger=ledger_json(ledger(plan, step, self.sizes)),
            mixture_history=[entry.to_json() for entry in plan.history_until(phase, position.row)],
        )
