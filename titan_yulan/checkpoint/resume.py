"""Whether and where a run may go on: the configuration against what lies in the run folder. No torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from titan_yulan import config as configuration
from titan_yulan.checkpoint import layout
from titan_yulan.checkpoint.layout import Checkpoint
from titan_yulan.checkpoint.published import check_published, is_published, open_published, plan_from
from titan_yulan.config.paths import refuse_address
from titan_yulan.config.read import dotted
from titan_yulan.config.sections import RunConfig
from titan_yulan.curriculum.adaptive import MIXTURE_LOG, Adjustment
from titan_yulan.curriculum.controller import logged_history
from titan_yulan.curriculum.plan import PhasePlan, Plan
from titan_yulan.curriculum.position import Position
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import RunError, UserError

# Changes that cannot alter the stream, the model or the past: always allowed.
FREE = (
    "first_phase",
    "model.kernels",
    "run.name",
    "run.output_dir",
    "run.time_limit",
    "run.kill_switch",
    "tokenizer.path",
    "tokenizer.train_vocab_size",
    "data.prefetch",
    "data.sources.*.path",
    "data.sources.*.validation_path",
    "data.sources.*.text",
    "data.sources.*.validation_share",
    "data.sources.*.domain",
    "compile.*",
    "recovery.*",
    "checkpoint.*",
    "monitor.*",
    "eval.*",
    "phase.*.after",
    "phase.*.batch.micro_batch_size",
)
# Changes that alter the model or what rows come next: refused unless named by --allow-change.
_FROZEN = (
    "run.seed",
    "run.deterministic",
    "model.*",
    "objective.kind",
    "objective.mask_token_id",
    "data.sources.*",
    "data.shuffle",
)
# What --allow-change lets move the rows: then the plan cannot be compared with the checkpoint's place any more.
_MOVES_ROWS = ("run.seed", "data.", "phase.")
# Refused for the phase of the checkpoint's step, which can still be made longer; everything of a phase before it is
# frozen.
_FROZEN_CURRENT = ("mix", "mix.*", "sequence_length", "batch.global_batch_size", "rope_theta", "start_from")
# Tables of a phase that decide how it is computed, not what: a change is told, never refused.
LAYOUT = ("parallel", "activation_checkpoint")
_SHOWN = 4  # places in the data on which plan and checkpoint differ


@dataclass(frozen=True)
class Resume:
    """The decision: `complete` means that there is nothing left to do; `notices` are lines to print."""

    step: int
    complete: bool
    notices: list[str]


def run_folder(config: RunConfig) -> Path:
    """The folder of a run.

    Raises:
        UserError: it would lie in an object store.
    """
    if refusal := refuse_address(config.run.output_dir):
        raise UserError(f"run.output_dir: {refusal}")
    return Path(config.run.output_dir) / config.run.name


def make_plan(config: RunConfig, checkpoint: Checkpoint | None) -> Plan:
    """The plan of a run: from its own origin if it has a checkpoint, else from where the checkpoint of `start_from` was
    (a state of DeepSpeed or an exported one has a place too, with tapes unread; weights alone have none, nor has what
    is still to come), else from zero."""
    start_from = config.phases[0].start_from
    if checkpoint is not None:
        origin = checkpoint.state().origin
        plan = Plan(config, Position(origin["step"], origin["row"], origin["token"]), origin["tapes"])
    elif is_published(start_from):
        plan = plan_from(config, start_from)
    elif start_from and Path(start_from).exists():
        state = layout.open_checkpoint(Path(start_from)).state()
        plan = Plan(config, Position(state.step, state.row, state.token), state.tapes)
    else:
        plan = Plan(config)
    plan.adapt(mixture_history(plan, checkpoint))
    return plan


def mixture_history(plan: Plan, checkpoint: Checkpoint | None) -> list[Adjustment]:
    """The known changes of the mix inside phases: those behind the checkpoint as they were, and for the rows after it
    those of the files that `[phase] mixture_history` names.

    Raises:
        UserError: such a file cannot be read, or is of other sources.
        RunError: the checkpoint's history is damaged.
    """
    known: list[Adjustment] = []
    reached = plan.phases[plan.config.first_phase].start.row
    if checkpoint is not None:
        state = checkpoint.state()
        reached = state.row
        try:
            known = [Adjustment.from_json(entry) for entry in state.mixture_history]
        except ValueError as error:
            raise RunError(f"{checkpoint.path}: mixture_history: {error}") from error
    places = {(entry.phase, entry.row) for entry in known}
    for phase in plan.phases:
        if phase.section.mixture_history and phase.end.row > reached:
            known += [
                entry
                for entry in _replayed(phase, run_folder(plan.config))
                if entry.row >= reached - phase.start.row and (entry.phase, entry.row) not in places
            ]
    return known


def _replayed(phase: PhasePlan, folder: Path) -> list[Adjustment]:
    """What `[phase] mixture_history` says of a phase of the run in `folder`.

    Raises:
        UserError: it cannot be read, is of other sources, or is what the run itself writes.
    """
    log = Path(phase.section.mixture_history)
    if log.resolve() == (folder / MIXTURE_LOG).resolve():
        raise UserError(
            f"phase.mixture_history: {log} is the log of this very run, which drops what lies behind its checkpoint; "
            "name a copy of it, or leave the key out"
        )
    return logged_history(phase)


def check_resume(
    config: RunConfig, plan: Plan, checkpoint: Checkpoint | None, allow_changes: Collection[str] = ()
) -> Resume:
    """Decide whether `config` may continue from `checkpoint` (the newest good one; None: from the start).

    Raises:
        UserError: the phases before are not finished, or the configuration changed in a way that would break the
            stream; the message lists every such change.
    """
    first = config.phases[config.first_phase]
    if checkpoint is None:
        if config.first_phase > 0 and not first.start_from:
            before = config.phases[config.first_phase - 1]
            raise UserError(
                f"phase {first.name!r} comes after phase {before.name!r}, which is not finished: "
                f"{run_folder(config)} holds no checkpoint. Train the phases before it there first, or set "
                f"phase.start_from to a checkpoint to begin from"
            )
        return Resume(plan.phases[0].start.step, False, [])
    state = checkpoint.state()
    saved = configuration.load(checkpoint.path / layout.CONFIG).config
    notices = _check_changes(config, saved, state.phase, allow_changes, checkpoint)
    names = [phase.name for phase in config.phases]
    if state.phase in names:
        index = names.index(state.phase)
        reached = index + state.phase_finished
        if reached < config.first_phase:
            end = plan.phases[config.first_phase - 1].end.step
            raise UserError(
                f"phase {first.name!r} comes after phase {names[config.first_phase - 1]!r}, which is not finished: "
                f"{checkpoint.path} is at step {state.step} of {end}, in phase {state.phase!r}. Finish it first"
            )
    elif [phase.name for phase in saved.phases][: len(names)] == names:
        return Resume(plan.end.step, True, [*notices, f"the run folder is already past this, in phase {state.phase!r}"])
    else:
        raise UserError(
            f"{checkpoint.path} is in phase {state.phase!r}, which is not among the phases of this configuration "
            f"({', '.join(names)}); use another run.name, or name the file that holds that phase"
        )
    phase_end = plan.phases[index].end.step
    if state.step > phase_end:
        raise UserError(
            f"{checkpoint.path} is at step {state.step}, past the end of phase {state.phase!r} at step {phase_end}; "
            f"a phase cannot become shorter than what was trained: make phase {state.phase!r} longer"
        )
    if not any(key.startswith(_MOVES_ROWS) for key in allow_changes):
        _check_position(plan, checkpoint)
    return Resume(state.step, state.step == plan.end.step, notices)


def _check_position(plan: Plan, checkpoint: Checkpoint) -> None:
    """The plan must put the same rows before the checkpoint's step as the run did: it is the last line of defence."""
    state = checkpoint.state()
    position = plan.position(state.step)
    phase = next(phase for phase in plan.phases if phase.name == state.phase)
    tapes = dict(zip(plan.sources, phase.tapes(position.row - phase.start.row), strict=True))
    planned = {"rows": position.row, "tokens": position.token} | {f"tape of {name}": at for name, at in tapes.items()}
    # a source that is new in the configuration has not been read
    stands = {f"tape of {name}": state.tapes.get(name, 0) for name in plan.sources}
    found = {"rows": state.row, "tokens": state.token} | stands
    if wrong := [f"{what} {found[what]} -> {planned[what]}" for what in found if found[what] != planned[what]]:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(
            f"the configuration reads other rows up to step {state.step} than {checkpoint.path} has read: "
            f"{', '.join(wrong[:_SHOWN])}{more}. Bring back the configuration of that run (config.toml in the "
            "checkpoint), or use another run.name"
        )


def _check_changes(
    config: RunConfig, saved: RunConfig, phase: str, allowed: Collection[str], checkpoint: Checkpoint
) -> list[str]:
    saved_names = [section.name for section in saved.phases]
    done = set(saved_names[: saved_names.index(phase)])
    refused, notices = [], []
    for difference in configuration.diff(saved, config):
        line = str(difference)
        # a source that came or went has not been read: else the mix of a phase that read it would differ as well
        other_source = difference.key.startswith("data.sources.") and None in (difference.old, difference.new)
        past_layout = any(
            difference.key.startswith(f"{dotted(('phase', name, part))}.") for name in done for part in LAYOUT
        )
        if _matches(difference.key, FREE) or difference.key in allowed or other_source or past_layout:
            continue
        if _frozen(difference.key, done, phase, {section.name for section in config.phases}):
            refused.append(line)
        else:
            notices.append(f"changed since step {checkpoint.step}: {line}")
    if refused:
        changes = "\n  ".join(refused)
        raise UserError(
            f"the configuration differs from the one that {checkpoint.path} was trained with:\n  {changes}\n"
            "Going on would change what was already decided. Use another run.name for a new run, or add "
            "--allow-change KEY for each key above"
        )
    return notices


def _matches(key: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _frozen(key: str, done: set[str], current: str, present: set[str]) -> bool:
    if not key.startswith("phase."):
        return _matches(key, _FROZEN)
    start = {name: f"{dotted(('phase', name))}." for name in present}  # a name with a dot stands in quotes
    name = next((name for name in present if key.startswith(start[name])), None)
    if name is None:
        return False  # a phase file may name only the phases up to its own
    rest = key.removeprefix(start[name])
    if rest.partition(".")[0] in LAYOUT:
        return False  # may change the rounding, not the stream: noted
    if rest == "mixture_history":
        return False  # what it says of rows behind the checkpoint is in the checkpoint
    return name in done or (name == current and _matches(rest, _FROZEN_CURRENT))


def trained_tokenizer(checkpoint: Checkpoint, config: RunConfig) -> Tokenizer:
    """The tokenizer of the text that a checkpoint was trained on; `config` is its configuration.

    Raises:
        UserError: the file has changed since, or is gone.
    """
    tokenizer = Tokenizer.load(config.tokenizer.path)
    if tokenizer.fingerprint != checkpoint.state().tokenizer:
        raise UserError(
            f"{config.tokenizer.path} is not the tokenizer that {checkpoint.path} was trained with; bring it back"
        )
    return tokenizer


def check_start(config: RunConfig, allow_changes: Collection[str] = ()) -> list[str]:
    """What `[phase] start_from` names, if it does, must be there and of this model; returns lines to print.

    Raises:
        UserError: it is not; RunError among them where there is no complete checkpoint.
    """
    start_from = config.phases[0].start_from
    if refusal := refuse_address(start_from):
        raise UserError(f"phase.start_from: {refusal}")
    if start_from and not Path(start_from).exists():
        raise UserError(
            f"phase.start_from: there is no {start_from}; it names a checkpoint, a run folder or a folder of Hugging "
            "Face or DeepSpeed on this disk (hf download REPOSITORY --local-dir FOLDER)"
        )
    if is_published(start_from):
        try:
            return check_published(config, open_published(start_from), allow_changes=allow_changes)
        except UserError as error:
            raise UserError(f"phase.start_from: {error}") from error
    if start_from:
        check_model(config, layout.open_checkpoint(Path(start_from)), allow_changes)
    return []


def check_model(config: RunConfig, start: Checkpoint, allow_changes: Collection[str] = ()) -> None:
    """The checkpoint of `[phase] start_from` must be of this very model (a scale that differs changes no shape), and of
    this seed: its places on the tapes mean other rows on the tapes of another seed.

    Raises:
        UserError: listing what differs.
    """
    saved = configuration.load(start.path / layout.CONFIG).config
    differences = [
        difference
        for difference in configuration.diff(saved, config)
        if (difference.key.startswith("model.") or difference.key in ("run.seed", "data.shuffle"))
        and not _matches(difference.key, FREE)
        and difference.key not in allow_changes
    ]
    if differences:
        lines = "\n  ".join(str(difference) for difference in differences)
        raise UserError(
            f"phase.start_from: {start.path} is of another model or seed:\n  {lines}\nSet them as they were, or add "
            "--allow-change KEY for each key above"
        )


def _what_changed(before: str, now: str) -> str:
    """Of two fingerprints of a tape, which name the subset of `[phase] unique_tokens` behind a colon."""
    (content, _, subset), (content_now, _, subset_now) = before.partition(":"), now.partition(":")
    if content != content_now:
        return "the content of this source"
    return f"phase.unique_tokens reads {subset_now or 'all'} of its tokens, and read {subset or 'all'}"


def check_data(
    checkpoint: Checkpoint, sources: dict[str, str], tokenizer: str, allow_changes: Collection[str] = ()
) -> None:
    """The prepared data must be the data that the checkpoint's position refers to (compared by fingerprint).

    Raises:
        UserError: it is not.
    """
    state = checkpoint.state()
    changed = [
        f"data.sources.{name}: {_what_changed(fingerprint, sources[name])}"
        for name, fingerprint in state.sources.items()
        if name in sources and sources[name] != fingerprint
    ]
    if state.tokenizer != tokenizer:
        changed.append("tokenizer: the vocabulary")
    refused = [line for line in changed if line.split(":")[0] not in allow_changes]
    if refused:
        lines = "\n  ".join(refused)
        raise UserError(
            f"the data is not what {checkpoint.path} was trained on. Changed since then:\n  {lines}\n"
            "Bring the old data back, use another run.name, or add --allow-change KEY (the text before the colon)"
        )
