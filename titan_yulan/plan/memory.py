"""How much memory and disk a run will need, from the configuration alone, and what this machine has. No torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from titan_yulan.config.model import ModelConfig, count_parameters
from titan_yulan.config.sections import ActivationCheckpointSection, PhaseSection, RunConfig
from titan_yulan.curriculum.plan import Plan
from titan_yulan.data.partition import micro_batches
from titan_yulan.errors import UserError
from titan_yulan.parallel.degrees import Degrees, resolve_degrees
from titan_yulan.plan.pattern import Pattern

GIB = 2**30
_STATE_BYTES = 16  # float32 weight, gradient and Adam's two moments
_CHECKPOINT_BYTES = 12  # float32 weight and Adam's two moments
NUMBER_BYTES = {"bfloat16": 2, "float32": 4}
CHUNK_TOKENS = 4096  # of logits at a time, on a GPU (kernels/linear_cross_entropy.py)
MOST_RANKS = 4096  # that are tried


@dataclass(frozen=True)
class Machine:
    """What this machine offers to one start of a run."""

    accelerators: int
    device: str
    memory: int  # bytes that all ranks on this machine share (CPU) or that one rank has (GPU)
    cores: int


def inspect_machine() -> Machine:
    """Ask the driver's tool and the kernel, without importing torch."""
    cores = len(os.sched_getaffinity(0))
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        lines = [line.rsplit(",", 1) for line in answer.stdout.splitlines() if "," in line]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            lines = lines[: len([index for index in visible.split(",") if index.strip() not in ("", "-1")])]
        if answer.returncode == 0 and lines:
            return Machine(len(lines), lines[0][0].strip(), int(lines[0][1]) * 2**20, cores)
    pages = os.sysconf("SC_AVPHYS_PAGES") + _reclaimable_pages()
    return Machine(0, "CPU", pages * os.sysconf("SC_PAGE_SIZE"), cores)


def _reclaimable_pages() -> int:
    """Page cache that the kernel gives back on demand; 0 where it cannot be known."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
    return max(0, available // os.sysconf("SC_PAGE_SIZE") - os.sysconf("SC_AVPHYS_PAGES"))


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: on its device, except `host`.

    Attributes:
        state: float32 weights, gradients and Adam's two moments, this rank's shard.
        gathered: whole weights in the compute type, and whole gradients where they are kept.
        activations: what autograd keeps from forward until backward.
        working: what comes and goes beside it, at the worst moment.
        inputs: masks that the objective draws for all rows of a step; 0 where it draws none.
        host: the state, where it is offloaded.
        staging: of the host's memory, for the copies that an asynchronous checkpoint is written from.
        kinds: `activations` by what they are.
        moments: the worst of each of the moments that `working` is the worst of.
    """

    state: int
    gathered: int
    activations: int
    working: int
    inputs: int = 0
    host: int = 0
    staging: int = 0
    kinds: tuple[tuple[str, int], ...] = ()
    moments: tuple[tuple[str, int], ...] = ()

    @property
    def total(self) -> int:
        """On the device."""
        return self.state + self.gathered + self.activations + self.inputs + self.working


def estimate_memory(config: RunConfig, world: int) -> Memory:
    """Memory of one of `world` ranks, the first, in the phase that needs most of its device.

    A count of tensors: of the Triton kernels' for a GPU, without what the allocator cannot reuse (some 10 %), NCCL's
    buffers and the CUDA context (1 to 2 GiB). `[model] kernels = "reference"` and the gemma norms keep more.

    Raises:
        UserError: a phase's layout does not fit `world` ranks.
    """
    phases = config.phases[config.first_phase :]
    return max((phase_memory(config, phase, world) for phase in phases), key=lambda memory: memory.total)


def phase_memory(config: RunConfig, phase: PhaseSection, world: int, chunk_tokens: int = CHUNK_TOKENS) -> Memory:
    """Memory of the first of `world` ranks in one phase.

    Args:
        chunk_tokens: tokens whose logits are held at a time; the default is a GPU's.

    Raises:
        UserError: its layout does not fit `world` ranks.
    """
    model, layout = config.model, phase.parallel
    degrees = resolve_degrees(layout, world, model, phase.sequence_length)
    size, reduced = NUMBER_BYTES[layout.compute_dtype], NUMBER_BYTES[layout.reduce_dtype]
    weights = count_weights(model, degrees)
    blocks = weights.block * model.num_hidden_layers
    state = _STATE_BYTES * weights.shard
    # With the block that computes, the next one is gathered.
    gathered = size * (weights.root + (2 * weights.block if layout.reshard_after_forward else blocks))
    if layout.synchronize == "last":
        gathered += reduced * (weights.root + blocks)
    rows, pattern = phase.batch.micro_batch_size, Pattern(config.objective)
    shape = Activations(model, degrees, rows, phase.sequence_length, size, pattern)
    kept = shape.kept(phase.activation_checkpoint)
    moments = _working(weights, shape, phase.activation_checkpoint, kept, size, reduced, chunk_tokens)
    pairs = phase.sequence_length**2 if pattern.drawn else 0
    if pairs:
        # for a pair of tokens its number, and in each row three that are mixed; there are no activations yet
        moments["drawing masks"] = max(0, 8 * (1 + 3 * rows) * pairs - kept)
    replicated = _STATE_BYTES * weights.replicated
    copied = _CHECKPOINT_BYTES * (weights.shard + weights.replicated)
    return Memory(
        state=replicated if layout.cpu_offload else replicated + state,
        gathered=gathered,
        activations=kept,
        working=max(moments.values()),
        inputs=rows * pairs * micro_batches(phase.batch.rows(phase.sequence_length), degrees.data, rows),
        host=state if layout.cpu_offload else 0,
        staging=copied if config.checkpoint.asynchronous else 0,
        kinds=tuple(shape.kinds(phase.activation_checkpoint).items()),
        moments=tuple(moments.items()),
    )


def _working(
    weights: Weights,
    shape: Activations,
    section: ActivationCheckpointSection,
    kept: int,
    size: int,
    reduced: int,
    chunk_tokens: int,
) -> dict[str, int]:
    """What three moments need beyond gathered weights and kept activations; the worst one counts."""
    logits = size * min(shape.tokens, chunk_tokens) * weights.head // shape.model.hidden_size
    # The head's gradient is summed in float32 over chunks of logits, then cast.
    loss = 4 * weights.head + max(logits, size * weights.head)
    # The head's gradient waits for the embedding's, while a block's is made and reduced.
    block = size * weights.head + (size + reduced) * weights.block + shape.of_backward(section)
    # At the end of backward all activations are gone.
    root = (size + reduced) * weights.root
    return {"head and loss": loss, "a block's backward": block, "the last gradients": max(0, root - kept)}


@dataclass(frozen=True)
class Weights:
    """Numbers in the matrices (and biases) of a tensor-parallel rank: of one block, of the root (embedding and head),
    of the head, of the shards of a block and of the root that FSDP2 leaves the first rank, and of all its shards; and
    numbers that every rank has."""

    block: int
    root: int
    head: int
    block_shard: int
    root_shard: int
    shard: int
    replicated: int


@cache
def count_weights(model: ModelConfig, degrees: Degrees) -> Weights:
    """The numbers of the first rank."""
    layers, ways = model.num_hidden_layers, degrees.shard * degrees.context
    block, root = _matrices(model, degrees.tensor)
    whole_block, whole_root = (_numbers(shapes) for shapes in _matrices(model, 1))
    block_shard, root_shard = _numbers(block, ways), _numbers(root, ways)
    return Weights(
        block=_numbers(block),
        root=_numbers(root),
        head=_numbers(root[:1]),
        block_shard=block_shard,
        root_shard=root_shard,
        shard=layers * block_shard + root_shard,
        replicated=count_parameters(model) - layers * whole_block - whole_root,
    )


def _matrices(model: ModelConfig, tensor: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(rows, columns) of the weights of a block and of the root, as the first of `tensor` ranks has them."""
    hidden, inner = model.hidden_size, model.intermediate_size // tensor
    queries, keys = head_widths(model, tensor)
    block = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    block += [(inner, hidden), (inner, hidden), (hidden, inner)]
    if model.attention_bias:
        block += [(queries, 1), (keys, 1), (keys, 1)]
    vocabulary = (-(-model.vocab_size // tensor), hidden)
    return block, [vocabulary] * (1 if model.tie_word_embeddings else 2)


def head_widths(model: ModelConfig, tensor: int) -> tuple[int, int]:
    """Width of the queries, and of the keys, of one of `tensor` ranks."""
    width = model.attention_head_dim
    return model.num_attention_heads * width // tensor, model.num_key_value_heads * width // tensor


def _numbers(shapes: Iterable[tuple[int, int]], ways: int = 1) -> int:
    """Numbers in matrices whose rows are cut into equal parts, the last one padded."""
    return sum(-(-rows // ways) * columns for rows, columns in shapes)


@dataclass(frozen=True)
class Activations:
    """Bytes of the decoder's activations on one rank in one micro-batch.

    Counted as the blocks in `model/decoder.py` hold them, per token: the residual stream at both norms, each norm's
    output (gathered from the tensor-parallel ranks, as input of the projections), what attention takes and gives, gate,
    up and their product.

    Attributes:
        size: bytes of a number in the compute type.
        pattern: who sees whom.
    """

    model: ModelConfig
    degrees: Degrees
    rows: int
    sequence_length: int
    size: int
    pattern: Pattern

    @property
    def tokens(self) -> int:
        """Tokens of this rank's slices of the rows."""
        return self.rows * self.sequence_length // self.degrees.context

    def kept(self, section: ActivationCheckpointSection) -> int:
        """From forward until backward, with the final norm's and the loss's."""
        return sum(self.kinds(section).values())

    def kinds(self, section: ActivationCheckpointSection) -> dict[str, int]:
        """`kept`, by what they are; a selective block's are not told apart."""
        layers, recomputed = self.model.num_hidden_layers, self.recomputed(section)
        stream, head = self._stream(), self.size * self.tokens * self.model.hidden_size
        whole = {kind: (layers - recomputed) * size for kind, size in self._block_kinds().items()}
        remains = recomputed * (self._block_selective() if section.mode == "selective" else stream)
        # what a block is computed again with; a drawn mask is there already, whole
        made = self.pattern.masked and not (self.pattern.drawn and self.degrees.context == 1)
        mask = self.tokens * self.sequence_length if made and recomputed else 0
        tables = 4 * self.tokens * self.model.attention_head_dim if self.pattern.own_positions else 0
        again = {"blocks computed again in part" if section.mode == "selective" else "blocks computed again": remains}
        kinds = {**whole, **again, "attention mask": mask, "rotary tables": tables}
        kinds["dropout"] = whole["dropout"] + self._dropped()  # the embedding's
        kinds["final norm and head"] = stream + head
        return {kind: size for kind, size in kinds.items() if size}

    def recomputed(self, section: ActivationCheckpointSection) -> int:
        """Blocks that backward computes again, or some of their operators."""
        layers = self.model.num_hidden_layers
        return {"none": 0, "every": layers - -(-layers // section.every)}.get(section.mode, layers)

    def of_backward(self, section: ActivationCheckpointSection) -> int:
        """In the backward pass of one block: what is computed again, and the gradients inside the MLP."""
        model = self.model
        recomputed = section.mode in ("full", "selective") or (section.mode == "every" and section.every > 1)
        remains = self._block_selective() if section.mode == "selective" else self._stream()
        gradients = 3 * model.intermediate_size // self.degrees.tensor + 3 * model.hidden_size
        return (self._block() - remains if recomputed else 0) + self.size * self.tokens * gradients

    def _stream(self) -> int:
        """The residual stream at one place, which tensor-parallel ranks hold in parts."""
        return self.size * self.tokens * self.model.hidden_size // self.degrees.tensor

    def _block(self) -> int:
        """A block that keeps everything."""
        return sum(self._block_kinds().values())

    def _block_kinds(self) -> dict[str, int]:
        model, tensor = self.model, self.degrees.tensor
        heads = model.num_attention_heads // tensor
        attention = self.size * self._attention_numbers() + 4 * heads  # logsumexp in float32
        if model.qk_layer_norm:
            attention += 4 * 2 * sum(head_widths(model, tensor))  # before and after the weights, in float32
        return {
            "residual stream": 2 * self._stream(),
            "norms": self.tokens * (self.size * 2 * model.hidden_size + 4 * 2),  # with their reciprocals in float32
            "attention": self.tokens * attention,
            "MLP": self.tokens * self.size * 3 * (model.intermediate_size // tensor),
            "dropout": 2 * self._dropped(),
        }

    def _dropped(self) -> int:
        """A mask of hidden states. Of attention's dropout a GPU's kernels keep their generator's state alone."""
        return self._stream() // self.size if self.model.hidden_dropout else 0

    def _attention_numbers(self) -> int:
        """What attention keeps per token of this rank."""
        queries, keys = head_widths(self.model, self.degrees.tensor)
        context = self.degrees.context
        if self.pattern.masked:  # keys and values of the whole row, and the mask as numbers
            return 2 * queries + 2 * queries * context + self.sequence_length
        if context > 1:  # causal: the outputs of two chunks, and put together
            return (3 if self.pattern.causal else 2) * queries + 2 * keys * context
        # Values are a view of the packed projections, so these live on beside the rotated queries and keys.
        return (queries + 2 * keys) + queries + keys + queries

    def _block_selective(self) -> int:
        """A block that keeps its input, matrix products, attention and what it scatters over tensor-parallel ranks."""
        model, tensor = self.model, self.degrees.tensor
        queries, keys = head_widths(model, tensor)
        products = 2 * queries + 2 * keys + 2 * model.intermediate_size // tensor + 2 * model.hidden_size
        scattered = 2 * self._stream() if tensor > 1 else 0
        statistics = 4 * (model.num_attention_heads // tensor)
        dropped = self._stream() if model.hidden_dropout else 0  # what the next block gets is no product then
        return self._stream() + scattered + dropped + self.tokens * (self.size * products + statistics)


def ranks_that_fit(config: RunConfig, memory: int) -> int | None:
    """The smallest number of devices with `memory` bytes each that the run fits on; None if none does.

    Numbers that [parallel] or the global batch exclude are passed over.
    """
    for world in range(1, MOST_RANKS + 1):
        try:
            need = estimate_memory(config, world).total
        except UserError:
            continue
        if need <= memory and all(fills_ranks(phase, world) for phase in config.phases[config.first_phase :]):
            return world
    return None


def fills_ranks(phase: PhaseSection, ranks: int) -> bool:
    """Whether a batch has a row for every rank that reads its own."""
    layout = phase.parallel
    return phase.batch.rows(phase.sequence_length) * layout.context * layout.tensor >= ranks


def checkpoint_bytes(config: RunConfig) -> int:
    """Size of one checkpoint."""
    return _CHECKPOINT_BYTES * count_parameters(config.model)


def disk_forecast(config: RunConfig, plan: Plan) -> tuple[int, int]:
    """(number of checkpoints on disk at the worst moment, their bytes): the ends of phases, the newest `keep`, the
    best one, and the one being written."""
    phases, section = len(plan.phases) - config.first_phase, config.checkpoint
    most = phases + (section.keep if section.every or section.keep_best else 0) + section.keep_best + 1
    return most, most * checkpoint_bytes(config)
