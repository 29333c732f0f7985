"""`titan-yulan eval`: a model, or the ends of a run's phases, on tasks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from titan_yulan import config as configuration
from titan_yulan.checkpoint.layout import CONFIG, Checkpoint, find_checkpoints
from titan_yulan.data.report import Say, say_now
from titan_yulan.errors import UserError
from titan_yulan.eval.diffusion import diffusion_of
from titan_yulan.eval.evaluate import Evaluator
from titan_yulan.eval.find_work import Work, find_work
from titan_yulan.eval.finished import Finished
from titan_yulan.eval.metrics import SCORING
from titan_yulan.eval.open_model import in_precision, open_device, open_model
from titan_yulan.eval.progress import Progress
from titan_yulan.eval.report import Report, write_reports
from titan_yulan.eval.share import Share
from titan_yulan.parallel import process


@dataclass(frozen=True)
class Settings:
    """What `titan-yulan eval` is asked for.

    tasks: names as in `eval.find_work.find_work`, of whose requests the first `limit` are taken.
    requests: folder of request files; output: folder for the reports; None: none.
    context: tokens of a row; None: as many as the model was trained with.
    batch_tokens, max_new_tokens, execute_code: as in `eval.evaluate.Evaluator`.
    precision: float32 or bfloat16; None: the model's own.
    likelihood, samples: of masked diffusion, as in `eval.diffusion.Diffusion`; None: the defaults.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    requests: Path | None = None
    output: Path | None = None
    context: int | None = None
    batch_tokens: int = 16384
    max_new_tokens: int | None = None
    execute_code: bool = False
    device: str | None = None
    precision: str | None = None
    likelihood: str | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "context", "batch_tokens", "max_new_tokens", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: give at least 1")
        if not self.tasks:
            raise UserError("--tasks names no task: give names of docs/evaluation.md or files, with commas")


def evaluate(run: Path, settings: Settings, say: Say = say_now) -> Report:
    """The numbers of one model. Under torchrun its ranks share the requests; each holds the whole model.

    Args:
        run: run folder (its newest checkpoint), checkpoint folder, or Hugging Face folder.

    Raises:
        UserError: the request is wrong, or the model or the requests cannot be read.
        RunError: the model is damaged, or gives numbers that are not finite.
    """
    with _Ranks(say) as ranks:
        works = find_work(settings.tasks, run, settings.requests, settings.limit)
        finished = Finished(settings.output, ranks.share)
        report = _evaluate(run, "", works, settings, ranks, finished)
        ranks.report([report], settings, finished)
        return report


def evaluate_series(run: Path, settings: Settings, against: Path | None = None, say: Say = say_now) -> list[Report]:
    """The numbers at the ends of a run's phases that its folder has kept, in order; before them those of `against`.

    Raises:
        UserError, RunError: as `evaluate`; or no phase of the run has ended.
    """
    ends = [checkpoint for checkpoint in find_checkpoints(run / "checkpoints") if checkpoint.state().phase_finished]
    if not ends:
        raise UserError(
            f"--series: {run} holds no checkpoint of the end of a phase: train to the end of one, or evaluate the "
            "newest checkpoint with --run"
        )
    models = [(checkpoint.path, checkpoint.state().phase) for checkpoint in ends]
    if against is not None:
        models.insert(0, (against, str(against)))
    if settings.context is None:  # the same for all: a longer context alone makes a model better
        lengths = [_sequence_length(checkpoint) for checkpoint in ends]
        settings = replace(settings, context=min(lengths))
    with _Ranks(say) as ranks:
        works = find_work(settings.tasks, ends[-1].path, settings.requests, settings.limit)
        finished = Finished(settings.output, ranks.share)
        reports = [_evaluate(path, phase, works, settings, ranks, finished) for path, phase in models]
        ranks.report(reports, settings, finished, against is not None)
        return reports


def _sequence_length(checkpoint: Checkpoint) -> int:
    """Of the phase that a checkpoint ends."""
    phases = configuration.load(checkpoint.path / CONFIG).config.phases
    return next(phase.sequence_length for phase in phases if phase.name == checkpoint.state().phase)


def _evaluate(
    run: Path, title: str, works: Sequence[Work], settings: Settings, ranks: _Ranks, finished: Finished
) -> Report:
    place = open_device(settings.device)
    model = open_model(run)
    diffusion = diffusion_of(model, settings.likelihood, settings.samples)
    context = model.context if settings.context is None else settings.context
    if context > model.longest:
        raise UserError(f"--context {context}: the model of {run} takes at most {model.longest} tokens; lower it")
    precision = settings.precision or model.precision
    decoder = in_precision(model.decoder, getattr(torch, precision), place)
    evaluator = Evaluator(
        decoder,
        model.tokenizer,
        context,
        settings.batch_tokens,
        ranks.share,
        ranks.progress,
        settings.max_new_tokens,
        settings.execute_code,
        diffusion=diffusion,
    )
    evaluator.check(works)
    facts = {"precision": precision, "context": context, "device": str(place), "limit": settings.limit}
    if diffusion is not None:
        facts |= {"likelihood": diffusion.likelihood, "samples": diffusion.samples}
    # the same on all ranks, whichever GPU is theirs
    how = {"device": place.type, "batch_tokens": settings.batch_tokens, "max_new_tokens": settings.max_new_tokens}
    whose = {"model": model.fingerprint, "tokenizer": model.tokenizer.fingerprint, "scoring": SCORING}
    results = []
    for work in works:
        of = {"task": work.task.name, "metric": work.task.metric, "data": work.data, **whose, **facts, **how}
        ranks.progress.begin(work.task.name)
        result = finished.find(of)
        if result is not None:
            ranks.progress.say(f"{work.task.name}: was finished before")
        else:
            ranks.progress.say(f"{work.task.name}: {len(work.items):,} requests")
            result = evaluator(work)
            finished.add(of, result)
            value = result.metrics[result.metric]
            ranks.progress.say(f"{work.task.name}: {result.metric} {value:.4f}, {result.seconds:,.1f} s")
        results.append(result)
    return Report(title or str(run), str(run), model.fingerprint, model.tokenizer.fingerprint, facts, results)


class _Ranks:
    """The ranks that torchrun started, or this process alone; a group while it is open."""

    def __init__(self, say: Say) -> None:
        self._rank, self._size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        here = self._rank == 0
        self.progress = Progress(
            say if here else lambda line: None, sys.stderr if here and sys.stderr.isatty() else None
        )

    def __enter__(self) -> _Ranks:
        self._began = self._size > 1 and not dist.is_initialized()
        if self._began:
            dist.init_process_group("gloo")
        self.share = Share(self._rank, self._size, dist.group.WORLD if self._size > 1 else None)
        return self

    def report(self, reports: Sequence[Report], settings: Settings, finished: Finished, against: bool = False) -> None:
        """Write and print what was found, once."""
        if self._rank == 0:
            for line in write_reports(reports, settings.output, against):
                self.progress.say(line)
            finished.remove()

    def __exit__(self, kind: object, *_: object) -> None:
        self.progress.clear()
        if self._began and kind is None:  # after an error others may wait in a collective
            process.leave()
