"""The tasks of `[eval] tasks`, evaluated while a model is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from titan_yulan.config.sections import EvalSection, ObjectiveSection
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import UserError
from titan_yulan.eval.check import check_works
from titan_yulan.eval.diffusion import Diffusion
from titan_yulan.eval.evaluate import Evaluator, Result
from titan_yulan.eval.find_work import find_work
from titan_yulan.eval.share import Share
from titan_yulan.eval.tasks import HELD_OUT
from titan_yulan.model import Decoder
from titan_yulan.parallel.mesh import Mesh
from titan_yulan.parallel.process import World


class TaskEvaluation:
    """The requests, read once. No random state is touched, and the model is only read."""

    def __init__(
        self,
        section: EvalSection,
        tokenizer: Tokenizer,
        context: int,
        objective: ObjectiveSection | None = None,
        mask_token_id: int | None = None,
    ) -> None:
        """
        Args:
            context: tokens of a row, at most, in all phases alike, so that their numbers can be compared.
            objective, mask_token_id: of masked diffusion; None: the next token is predicted.

        Raises:
            UserError: a task is unknown, has no requests, or cannot be run (`check_works`).
        """
        if HELD_OUT in section.tasks:
            raise UserError(f"eval.tasks: {HELD_OUT} is measured by [eval] every already; leave it out")
        folder = Path(section.requests) if section.requests else None
        self._works = find_work(section.tasks, Path(), folder, section.task_limit)
        check_works(self._works, tokenizer, context, section.task_new_tokens, section.execute_programs)
        self._section, self._tokenizer, self._context = section, tokenizer, context
        self._diffusion = None
        if objective is not None and mask_token_id is not None:
            self._diffusion = Diffusion(objective, mask_token_id, section.likelihood, section.likelihood_samples)

    @torch.no_grad()
    def __call__(
        self, decoder: Decoder, mesh: Mesh, world: World, batch_tokens: int, between: Callable[[str], None]
    ) -> list[Result]:
        """The results of the model as it is; all ranks together.

        Args:
            batch_tokens: tokens of a batch of one rank.
            between: called after every batch, and now and then while one is written, on all ranks alike; may raise to
                end the evaluation.
        """
        evaluator = Evaluator(
            decoder,
            self._tokenizer,
            self._context,
            batch_tokens,
            Share(mesh.data_rank, mesh.data_size, world.host, together=True),
            progress=lambda task, done, total: between(task),
            max_new_tokens=self._section.task_new_tokens,
            execute_code=self._section.execute_programs,
            device=world.device,
            diffusion=self._diffusion,
        )
        return [evaluator(work) for work in self._works]
