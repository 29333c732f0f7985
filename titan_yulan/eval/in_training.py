"""The tasks of `[eval] tasks`, evaluated while a model is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from titan_yulan.config.sections import EvalSection
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import UserError
from titan_yulan.eval.evaluate import Evaluator, Result
from titan_yulan.eval.find_work import find_work
from titan_yulan.eval.share import Share
from titan_yulan.eval.tasks import HELD_OUT
from titan_yulan.model import Decoder
from titan_yulan.parallel.mesh import Mesh
from titan_yulan.parallel.process import World


class TaskEvaluation:
    """The requests, read once. Nothing random is drawn, and the model is only read."""

    def __init__(self, section: EvalSection, tokenizer: Tokenizer, context: int) -> None:
        """
        Args:
            context: tokens of a row, at most, in all phases alike, so that their numbers can be compared.

        Raises:
            UserError: a task is unknown, has no requests, or is none that can be evaluated in training.
        """
        if HELD_OUT in section.tasks:
            raise UserError(f"eval.tasks: {HELD_OUT} is measured by [eval] every already; leave it out")
        folder = Path(section.requests) if section.requests else None
        self._works = find_work(section.tasks, Path(), folder, section.task_limit)
        if writing := [work.task.name for work in self._works if work.task.generates]:
            raise UserError(
                f"eval.tasks: {writing[0]} lets the model write, which needs the whole model on every rank: evaluate "
                "it with 'titan-yulan eval'"
            )
        self._tokenizer, self._context = tokenizer, context

    @torch.no_grad()
    def __call__(
        self, decoder: Decoder, mesh: Mesh, world: World, batch_tokens: int, between: Callable[[str], None]
    ) -> list[Result]:
        """The results of the model as it is; all ranks together.

        Args:
            batch_tokens: tokens of a batch of one rank.
            between: called after every batch, on all ranks alike; may raise to end the evaluation.
        """
        share = Share(mesh.data_rank, mesh.data_size, world.host)
        evaluator = Evaluator(
            decoder, self._tokenizer, self._context, batch_tokens, share, device=world.device, between=between
        )
        evaluator.check(self._works)
        return [evaluator(work) for work in self._works]
