"""Checks across keys and sections. They run on whatever could be bound, so each looks only at sound values."""

from __future__ import annotations

import fnmatch
import re
from typing import Any

from titan_yulan.config.adaptive import NO_GROUP, adaptive_groups
from titan_yulan.config.bind import INVALID, Binder, nearest
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.paths import refuse_address
from titan_yulan.config.read import KeyPath, toml_string
from titan_yulan.config.sections import BatchSection, LearningRateSegment, PhaseSection, RunConfig
from titan_yulan.config.subset import shares_of_unique, unique_amount
from titan_yulan.config.values import Duration, Tokens, amount, parse_steps

_FOLDER_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9._+=@-]{0,199}$")

# key -> the value that says nothing
_KEYS_OF_OBJECTIVES = {
    "autoregressive": {
        ("objective", "token_mask_share"): 0.0,
        ("objective", "orders"): 1,
        ("objective", "order_kind"): "random",
    },
    "masked_diffusion": {
        ("objective", "mask_token_id"): None,
        ("objective", "minimum_mask_ratio"): 1e-3,
        ("objective", "low_noise_rows"): 0,
        ("objective", "validation_samples"): 1,
        ("objective", "left_to_right_share"): 0.0,
        ("eval", "likelihood"): "left_to_right",
        ("eval", "likelihood_samples"): 32,
    },
}


def check(config: RunConfig, binder: Binder) -> None:
    """Note every combination of keys that does not go together; each note names the remedy."""
    _Check(config, binder).run()


def _sound(*values: Any) -> bool:
    return not any(value is INVALID for value in values)


class _Check:
    def __init__(self, config: RunConfig, binder: Binder) -> None:
        self.config, self.binder = config, binder
        self.limits: dict[str, tuple[int | None, KeyPath]] = {}  # source -> its subset, and the phase that says so

    def refuse(self, path: KeyPath, text: str) -> None:
        self.binder.problems.add(self.binder.at(path), text)

    def run(self) -> None:
        config = self.config
        self.folder_name(("run", "name"), config.run.name)
        self.folder_path(("run", "output_dir"), config.run.output_dir)
        self.folder_path(("run", "kill_switch"), config.run.kill_switch)
        self.model(config.model)
        if _sound(config.tokenizer.train_vocab_size, config.model.vocab_size):
            self.vocabulary(config.tokenizer.train_vocab_size, config.model.vocab_size)
        for section, key in (("checkpoint", "every"), ("eval", "every"), ("eval", "task_every")):
            every = getattr(getattr(config, section), key)
            if _sound(every) and every is not None:
                self.interval((section, key), every)
        if config.checkpoint.keep_best is True:
            self.best()
        if _sound(config.data) and _sound(config.data.sources, config.data.shuffle):
            self.patterns(("data", "shuffle"), config.data.shuffle, config.data.sources)
        for key in ("profile_steps", "memory_snapshot_steps"):
            self.steps(("monitor", key), getattr(config.monitor, key))
        for key in ("wandb_group", "wandb_name"):
            if getattr(config.monitor, key) and not config.monitor.wandb_project:
                self.refuse(("monitor", key), "nothing is sent without monitor.wandb_project; set that, or remove this")
        if _sound(config.objective):
            self.objective(config.objective.kind)
        self.phase_names()
        for index, phase in enumerate(config.phases):
            self.phase(phase, ("phases", index))

    def objective(self, kind: str) -> None:
        if not _sound(kind):
            return
        for needed, keys in _KEYS_OF_OBJECTIVES.items():
            for (section, key), unused in keys.items():
                value = getattr(getattr(self.config, section), key, INVALID)
                if kind != needed and _sound(value) and value != unused:
                    self.refuse((section, key), f"{value} has no effect with kind = {kind!r}; needs {needed!r}")

    def best(self) -> None:
        """A best checkpoint needs validations to choose by."""
        path, sources = ("checkpoint", "keep_best"), self.config.data.sources if _sound(self.config.data) else INVALID
        if self.config.eval.every is None:
            self.refuse(path, "nothing is validated before the end, whose checkpoint is kept anyway; set eval.every")
        if _sound(sources) and not any(source.validation_path for source in sources.values() if _sound(source)):
            self.refuse(path, "no source has a held-out part to validate on; set validation_path of one")

    def folder_name(self, path: KeyPath, name: str) -> None:
        if _sound(name) and not _FOLDER_NAME.match(name):
            self.refuse(
                path,
                f"found {name!r}; it names a folder; allowed: letters, digits and . _ - + = @, first a letter or digit",
            )

    def folder_path(self, path: KeyPath, value: str) -> None:
        if _sound(value) and (refusal := refuse_address(value)):
            self.refuse(path, refusal)

    def model(self, model: ModelConfig) -> None:
        if _sound(*vars(model).values()):
            for key, text in model.check():
                self.refuse(("model", key), text)

    def vocabulary(self, train: int, vocab: int) -> None:
        if train > vocab:
            self.refuse(("tokenizer", "train_vocab_size"), f"{train} exceeds model.vocab_size = {vocab}; lower it")

    def interval(self, path: KeyPath, every: Duration) -> None:
        if every.unit == "share":
            self.refuse(path, f"found '{every}'; a share belongs to a phase; write tokens, steps or rows")
        else:
            self.countable(path, every)

    def steps(self, path: KeyPath, value: str) -> None:
        if _sound(value):
            try:
                parse_steps(value)
            except ValueError as error:
                self.refuse(path, str(error))

    def countable(self, path: KeyPath, duration: Duration) -> bool:
        """Refuse a duration of nothing, and fractions of steps or rows."""
        if duration.value <= 0:
            self.refuse(path, f"found '{duration}'; allowed: more than 0")
        elif duration.unit in ("steps", "rows") and duration.value % 1:
            self.refuse(path, f"found '{duration}'; allowed: a whole number of {duration.unit}")
        else:
            return True
        return False

    def phase_names(self) -> None:
        first: dict[str, int] = {}
        for index, phase in enumerate(self.config.phases):
            path: KeyPath = ("phases", index, "name")
            if not _sound(phase.name):
                continue
            self.folder_name(path, phase.name)
            if phase.name in first:
                where = self.binder.at(("phases", first[phase.name], "name")).where
                self.refuse(path, f"{phase.name!r} is also the phase at {where}; rename one")
            first.setdefault(phase.name, index)

    def phase(self, phase: PhaseSection, path: KeyPath) -> None:
        self.mix(phase, path)
        self.batch(phase, path)
        if _sound(phase.parallel) and _sound(phase.parallel.pipeline) and phase.parallel.pipeline != 1:
            self.refuse(
                (*path, "parallel", "pipeline"),
                f"found {phase.parallel.pipeline}; there is no pipeline parallelism, because models of 1 to 8 billion "
                "parameters fit without its idle time; use data_shard, tensor and context",
            )
        self.compiled_layout(phase, path)
        self.held_out_rows(phase, path)
        if _sound(phase.adaptive, phase.mix, self.config.data) and _sound(*vars(phase.adaptive).values()):
            self.adaptive(phase, path)
        if _sound(phase.length) and phase.length is not None:
            self.length(phase, phase.length, (*path, "length"))
        elif _sound(phase.length, phase.mix) and phase.mix and all(isinstance(v, Tokens) for v in phase.mix.values()):
            total = sum(amount.value for amount in phase.mix.values() if isinstance(amount, Tokens))
            if total:
                self.length(phase, Duration(total, "tokens"), (*path, "mix"))
        self.folder_path((*path, "start_from"), phase.start_from)
        if _sound(phase.start_from) and phase.start_from and path[1] != 0:
            self.refuse((*path, "start_from"), "only the first phase of a curriculum may have it; remove it")
        if _sound(phase.rebalance_rms, self.config.model.wesar) and phase.rebalance_rms and not self.config.model.wesar:
            text = f"{phase.rebalance_rms} needs the scalars that model.wesar = true makes; remove it"
            self.refuse((*path, "rebalance_rms"), text)
        if _sound(phase.lr):
            for index, segment in enumerate(phase.lr):
                self.segment(segment, phase, index == len(phase.lr) - 1, (*path, "lr", index))
        longest = self.config.model.max_position_embeddings
        if _sound(phase.sequence_length, longest) and phase.sequence_length > longest:
            text = f"{phase.sequence_length} exceeds model.max_position_embeddings = {longest}; lower it or raise that"
            self.refuse((*path, "sequence_length"), text)

    def compiled_layout(self, phase: PhaseSection, path: KeyPath) -> None:
        """Refuse what PyTorch 2.13 fails at: it keeps a tensor-parallel block's DeviceMesh for backward as a tensor."""
        layout, recomputed, compiled = phase.parallel, phase.activation_checkpoint, self.config.compile
        if not (_sound(layout, recomputed, compiled) and _sound(layout.tensor, recomputed.mode, compiled.enabled)):
            return
        whole_blocks = recomputed.mode == "full" or (recomputed.mode == "every" and recomputed.every != 1)
        if layout.tensor > 1 and compiled.enabled and whole_blocks:
            self.refuse(
                (*path, "activation_checkpoint", "mode"),
                f"found {recomputed.mode!r}; PyTorch cannot compile whole recomputed blocks with parallel.tensor > 1; "
                "use 'selective', or compile.enabled = false",
            )

    def held_out_rows(self, phase: PhaseSection, path: KeyPath) -> None:
        """Held-out rows are as long as the first phase's, in every phase: their losses are to be compared."""
        sources, first = self.config.data.sources, self.config.phases[0]
        if not (_sound(sources, phase.parallel, first.sequence_length) and _sound(phase.parallel.context)):
            return
        held_out = any(source.validation_path is not INVALID and source.validation_path for source in sources.values())
        chunks = 2 * phase.parallel.context
        if held_out and chunks > 2 and first.sequence_length % chunks:
            self.refuse(
                (*path, "parallel", "context"),
                f"found {phase.parallel.context}; held-out rows are as long as the first phase's, "
                f"{first.sequence_length} tokens, which {chunks} does not divide; choose another context",
            )

    def mix(self, phase: PhaseSection, path: KeyPath) -> None:
        mix, sources = phase.mix, self.config.data.sources
        if not _sound(mix):
            return
        if _sound(sources):
            for name in mix:
                if name not in sources:
                    hint = nearest(name, sources) or f"; sources: {', '.join(sources) or 'none'}"
                    self.refuse((*path, "mix", name), f"no table [data.sources] has this name{hint}")
        if not _sound(*mix.values()):
            return
        amounts = [name for name, value in mix.items() if isinstance(value, Tokens)]
        weights = [name for name, value in mix.items() if not isinstance(value, Tokens)]
        if amounts and weights:
            text = f"{weights[0]} is a weight, {amounts[0]} an amount of tokens; write all as weights or all as amounts"
            self.refuse((*path, "mix"), text)
        elif not any(amount(share) for share in mix.values()):
            self.refuse((*path, "mix"), "nothing to read; allowed: at least one source above 0")
        elif weights and phase.length is None and phase.epochs is None:
            text = "missing; required unless every amount of the mix is in tokens, or epochs and unique_tokens are set"
            self.refuse((*path, "length"), text)
        self.unique(phase, path)

    def unique(self, phase: PhaseSection, path: KeyPath) -> None:
        """Subsets: in every phase the same of a source, because its tape goes on from phase to phase."""
        if not _sound(phase.unique_tokens, phase.epochs, phase.length):
            return
        if phase.epochs is not None and phase.unique_tokens is None:
            self.refuse((*path, "epochs"), f"{phase.epochs} of what? set unique_tokens, or write a length")
        elif phase.epochs is not None and phase.length is not None:
            self.refuse((*path, "epochs"), f"{phase.epochs} and length = '{phase.length}': remove one of them")
        elif phase.epochs is not None:
            length = Duration(phase.epochs * (unique_amount(phase) or 0), "tokens")
            self.length(phase, length, (*path, "epochs"))
        for name in (name for name, share in phase.mix.items() if amount(share)):
            limit = shares_of_unique(phase).get(name)
            if limit is not None and _sound(phase.sequence_length) and limit <= phase.sequence_length:
                self.refuse(
                    (*path, "unique_tokens"),
                    f"only {limit:,} of them come from {name!r}, less than a row; raise it, or drop the source",
                )
            first, place = self.limits.setdefault(name, (limit, path))
            if limit != first:
                self.refuse(
                    (*path, "unique_tokens"),
                    f"{_limited(limit)} of {name!r}, but {_limited(first)} in the phase at "
                    f"{self.binder.at((*place, 'name')).where}; a source has one subset in a run: give the other a "
                    "name of its own in [data.sources]",
                )

    def patterns(self, path: KeyPath, patterns: tuple[str, ...], sources: dict[str, Any]) -> None:
        """Refuse names and globs that match no source."""
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in sources):
                self.refuse(path, f"{pattern!r} matches no table of [data.sources]{nearest(pattern, sources)}")

    def adaptive(self, phase: PhaseSection, path: KeyPath) -> None:
        section, sources = phase.adaptive, self.config.data.sources
        if section.every is None or not _sound(sources, *phase.mix.values()):
            return
        path = (*path, "adaptive")
        self.interval((*path, "every"), section.every)
        for name, weight in section.weights.items():
            if name not in sources:
                self.refuse((*path, "weights", name), f"no table [data.sources] has this name{nearest(name, sources)}")
            elif section.alpha * weight >= 1:
                text = f"{weight} with alpha = {section.alpha} could bring a share to 0; lower it below 1 / alpha"
                self.refuse((*path, "weights", name), text)
        for group, patterns in section.groups.items():
            self.patterns((*path, "groups", group), patterns, sources)
        shares = {name: amount(share) for name, share in phase.mix.items() if amount(share)}
        groups = adaptive_groups(section, shares)
        if not groups:
            self.refuse((*path, "groups"), NO_GROUP)
        seen: dict[str, str] = {}
        for group, members in groups.items():
            where = (*path, "groups", group)
            for name in members:
                if name in seen:
                    self.refuse(where, f"{name!r} is in the group {seen[name]!r} too; a source has one group")
                seen[name] = group
                if name in sources and _sound(sources[name].validation_path) and not sources[name].validation_path:
                    self.refuse(
                        where, f"{name!r} has no held-out part to measure; set data.sources.{name}.validation_path"
                    )
            least = min(members, key=lambda name: shares[name])
            share = shares[least] / sum(shares[name] for name in members)
            if share < section.floor:
                text = f"{section.floor} is above the share that {least!r} begins with, {share:.3g} of its group; lower"
                self.refuse((*path, "floor"), f"{text} it")

    def batch(self, phase: PhaseSection, path: KeyPath) -> None:
        size, length, micro = phase.batch.global_batch_size, phase.sequence_length, phase.batch.micro_batch_size
        if isinstance(size, Tokens) and _sound(length) and (size.value % length or size.value < length):
            below = int(size.value // length) * length
            choices = f"'{below}' or '{below + length}'" if below else f"'{length}'"
            text = f"{size} tokens are no whole rows of sequence_length = {length}; write {choices}"
            self.refuse((*path, "batch", "global_batch_size"), text)
            return
        rows = _rows(phase.batch, length)
        if rows is not None and _sound(micro) and micro > rows:
            text = f"{micro} exceeds the global batch of {rows} rows; lower it"
            self.refuse((*path, "batch", "micro_batch_size"), text)

    def length(self, phase: PhaseSection, length: Duration, path: KeyPath) -> None:
        if length.unit == "share":
            self.refuse(path, f"found '{length}'; a share of the phase itself; write tokens, steps or rows")
            return
        tokens, batch = _tokens(length, phase), _tokens(Duration(1, "steps"), phase)
        if self.countable(path, length) and tokens is not None and batch is not None and tokens < batch:
            self.refuse(path, f"'{length}' is less than one global batch ({batch:.0f} tokens); raise it")

    def segment(self, segment: LearningRateSegment, phase: PhaseSection, last: bool, path: KeyPath) -> None:
        over, hold, shape = segment.over, segment.hold_at, segment.shape
        if _sound(over) and over is None:
            if not last:
                self.refuse((*path, "over"), "missing; required in every segment but the last")
            elif _sound(shape) and shape != "constant":
                self.refuse((*path, "over"), f"missing; required with shape {toml_string(shape)}")
        if _sound(over) and over is not None:
            self.countable((*path, "over"), over)
        if _sound(shape, segment.from_, segment.to) and shape == "constant" and segment.from_ != segment.to:
            text = f"{segment.to} differs from from = {segment.from_}; a constant segment has one value"
            self.refuse((*path, "to"), text)
        if not _sound(over, hold) or hold is None:
            return
        if over is None:
            self.refuse((*path, "hold_at"), "has no effect without over; set over or remove it")
            return
        same = over.unit == hold.unit
        end, point = (over.value, hold.value) if same else (_tokens(over, phase), _tokens(hold, phase))
        if end is not None and point is not None and point > end:
            self.refuse((*path, "hold_at"), f"'{hold}' is past the end of the segment, over = '{over}'; lower it")


def _limited(limit: int | None) -> str:
    return "all tokens" if limit is None else f"{limit:,} tokens"


def _rows(batch: BatchSection, sequence_length: int) -> int | None:
    """Rows of one global batch, if they can be told."""
    return batch.rows(sequence_length) if _sound(batch.global_batch_size, sequence_length) else None


def _tokens(duration: Duration, phase: PhaseSection) -> float | None:
    """A duration in tokens, if it can be told."""
    rows = _rows(phase.batch, phase.sequence_length)
    if duration.unit == "tokens":
        return duration.value
    if duration.unit == "share":
        length = _length(phase)
        known = _sound(length) and length is not None and length.unit != "share"
        whole = _tokens(length, phase) if known and length is not None else None
        return None if whole is None else duration.value * whole
    if not _sound(phase.sequence_length) or (duration.unit == "steps" and rows is None):
        return None
    return duration.value * phase.sequence_length * ((rows or 0) if duration.unit == "steps" else 1)


def _length(phase: PhaseSection) -> Duration | None:
    if _sound(phase.epochs, phase.unique_tokens) and phase.epochs is not None and phase.unique_tokens is not None:
        return Duration(phase.epochs * (unique_amount(phase) or 0), "tokens")
    return phase.length
