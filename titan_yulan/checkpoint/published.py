"""A folder in a format of others (Hugging Face, DeepSpeed, our export) as the start of a run: what it is, whether it is
the model of `[model]`, and where in the curriculum it stands. No torch.

A run begins with such a folder (`[phase] start_from`), or goes on with it: an import for a phase file that names the
phases before it (`[phase] after`) takes them as trained by whoever made the state. Its step must then be the one at
which they end, and its tokens theirs; learning rate, tokens and the places of all sources follow from them, as if they
had been trained here.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

from titan_yulan.checkpoint.exported_state import has_state, open_exported_state, read_exported_progress
from titan_yulan.checkpoint.hugging_face import (
    HuggingFaceFolder,
    check_hugging_face,
    is_hugging_face,
    open_hugging_face,
)
from titan_yulan.checkpoint.universal import (
    TRAINER,
    Progress,
    UniversalFolder,
    check_universal,
    is_universal,
    open_universal,
    read_progress,
)
from titan_yulan.config.sections import RunConfig
from titan_yulan.curriculum.adaptive import Adjustment
from titan_yulan.curriculum.controller import logged_history
from titan_yulan.curriculum.plan import PhasePlan, Plan
from titan_yulan.curriculum.position import Position
from titan_yulan.errors import UserError

# What a trainer may have counted otherwise than its phases: YuLan-Mini's own counters are 0.05 % below its tokens, lost
# where packed files end.
_TOKENS_TOLERANCE = 0.001
_ALLOW_TOKENS = "tokens"  # for --allow-change


def is_published(path: str | Path) -> bool:
    """Whether `[phase] start_from` names a folder in a format of others (told by what is in it), not of ours."""
    return is_universal(path) or is_hugging_face(path)


def open_published(path: str | Path) -> HuggingFaceFolder | UniversalFolder:
    """Such a folder, with what its files hold; moments are read where there are any.

    Raises:
        UserError: it cannot be read.
    """
    if is_universal(path):
        return open_universal(path)
    return open_exported_state(path) if has_state(path) else open_hugging_face(path)


def published_progress(path: str | Path) -> Progress | None:
    """How far the state in such a folder was trained; None: it holds weights alone.

    Raises:
        UserError: its counters cannot be read.
    """
    if is_universal(path):
        return read_progress(path)
    return read_exported_progress(path) if has_state(path) else None


def plan_from(config: RunConfig, path: str | Path, first_phase: int = 0, allow_changes: Collection[str] = ()) -> Plan:
    """The plan of a run whose phase `first_phase` begins from such a folder: where the state is, with all sources
    unread; or, where there are phases before it, behind them, with the mixes that their `mixture_history` names.

    Raises:
        UserError: the state is not at the end of those phases, or what they have read is not known.
    """
    progress = published_progress(path)
    if not first_phase:
        return Plan(config, progress.position(config) if progress else Position(0, 0, 0))
    plan = Plan(config)
    first = plan.phases[first_phase]
    _check_tokens(first, _check_place(first, plan, progress, path), path, allow_changes)
    plan.adapt([entry for phase in plan.phases[:first_phase] for entry in _mixtures(phase, first)])
    return plan


def _alone(first: PhasePlan) -> str:
    return f"or begin a run with phase {first.name!r} alone: --phase.after="


def _check_place(first: PhasePlan, plan: Plan, progress: Progress | None, path: str | Path) -> Progress:
    before = plan.phases[first.index - 1]
    if progress is None or progress.step == 0:
        why = "holds weights alone" if progress is None else f"says global_step 0 in {TRAINER}"
        raise UserError(
            f"{path} {why}, so it is not known to come after phase {before.name!r}. Take a state that says its step, "
            f"{_alone(first)}"
        )
    if progress.step != first.start.step:
        at = plan.phase_at(progress.step)
        inside = f"{progress.step - at.start.step:,} steps into"
        place = "at the end of" if progress.step == at.end.step else "behind" if progress.step > at.end.step else inside
        raise UserError(
            f"{path} is at step {progress.step:,}, {place} phase {at.name!r}, and phase {first.name!r} begins at step "
            f"{first.start.step:,}. Name the file of the phase that begins at the state's step, set the lengths of the "
            f"phases as they were, {_alone(first)}"
        )
    return progress


def _check_tokens(first: PhasePlan, progress: Progress, path: str | Path, allow_changes: Collection[str]) -> None:
    theirs, ours = progress.tokens, first.start.token
    if theirs is None or _ALLOW_TOKENS in allow_changes or abs(theirs - ours) <= _TOKENS_TOLERANCE * ours:
        return
    raise UserError(
        f"{path} is at the step at which phase {first.name!r} begins, but its trainer counted {theirs:,} tokens, and "
        f"the phases before it have {ours:,}: more than {_TOKENS_TOLERANCE:.1%} apart. Set their batches and sequence "
        f"lengths as they were, add --allow-change {_ALLOW_TOKENS} if they are, {_alone(first)}"
    )


def _mixtures(phase: PhasePlan, first: PhasePlan) -> list[Adjustment]:
    """How the mix of a phase that others trained has changed inside it."""
    log = phase.section.mixture_history
    if not log:
        if phase.section.adaptive.every is None:
            return []
        raise UserError(
            f"phase {phase.name!r} comes before phase {first.name!r} and has [phase.adaptive]: without the log of its "
            "shares it is not known what it has read of each source. Set its phase.mixture_history to the "
            f"mixture.jsonl of the run that trained it, {_alone(first)}"
        )
    return logged_history(phase)


def check_published(
    config: RunConfig,
    folder: HuggingFaceFolder | UniversalFolder,
    first_phase: int = 0,
    allow_changes: Collection[str] = (),
) -> list[str]:
    """What `open_published` found must be of the model of `[model]`, and stand where phase `first_phase` begins;
    returns lines to print.

    Raises:
        UserError: listing every difference.
    """
    if isinstance(folder, HuggingFaceFolder):
        notices = check_hugging_face(config, folder, allow_changes)
        plan_from(config, folder.path, first_phase, allow_changes)
        return notices
    notices = check_universal(config, folder, allow_changes)
    plan = plan_from(config, folder.path, first_phase, allow_changes)
    return [*_place_lines(plan, first_phase, folder), *notices]


def _place_lines(plan: Plan, first_phase: int, folder: UniversalFolder) -> list[str]:
    progress, first = folder.progress, plan.phases[first_phase]
    epoch = f", epoch {progress.epoch:g}" if progress.epoch else ""
    began = f", {progress.trained - progress.phase_began:,} after its phase began" if progress.phase_began else ""
    known = "in batches of this run's first phase" if progress.tokens is None else "as its trainer counted"
    where = f"({known}), with all sources unread"
    if first_phase:
        where = f"as if the {first_phase} phases before {first.name!r} had been trained here"
    lines = [
        f"{folder.path} holds the state of an optimizer after {progress.trained:,} steps{epoch}{began}. The run begins "
        f"with it at step {first.start.step:,}, token {first.start.token:,} {where}"
    ]
    if progress.step == 0 < progress.trained:
        lines += [f"note: {TRAINER} there says global_step 0; without that file, steps are counted on"]
    return lines + (_other_counts(first, plan.phases[first_phase - 1], progress) if first_phase else [])


def _other_counts(first: PhasePlan, before: PhasePlan, progress: Progress) -> list[str]:
    """What the state's trainer counted otherwise than the phases before this one: told, for its step fits, and its
    tokens do within the tolerance, or are allowed not to."""
    theirs_and_ours = {
        # YuLan-Mini's trainer counts a phase as an epoch
        "epochs, and there are {} phases": (None if progress.epoch is None else math.ceil(progress.epoch), first.index),
        "tokens, and there are {}": (progress.tokens, first.start.token),
        "steps before its last phase, and there are {}": (progress.phase_began, before.start.step),
    }
    return [
        f"note: its trainer counted {theirs:,} {what.format(f'{ours:,}')} here before phase {first.name!r}"
        for what, (theirs, ours) in theirs_and_ours.items()
        if theirs is not None and theirs != ours
    ]
