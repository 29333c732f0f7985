"""What ranks exchange in a step is what docs/parallelism.md says: calls and numbers, counted on gloo ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.layout_cases import LENGTH, MICRO_BATCH, MODELS, TAPES, Case, make_learner
from tests.distributed.ranks import run_ranks
from titan_yulan.parallel.process import World

RANKS = 2
MODEL = MODELS["plain"]
CASES = [
    Case(RANKS, "FSDP", {}),
    Case(RANKS, "FSDP", {}, checkpointing="full"),
    Case(RANKS, "FSDP, gathered once", {"reshard_after_forward": False}),
    Case(RANKS, "FSDP, reduced last", {"synchronize": "last"}),
    Case(RANKS, "replicas", {"data_replicate": 2}),
    Case(RANKS, "TP", {"tensor": 2}),
    Case(RANKS, "TP", {"tensor": 2}, checkpointing="full"),
    Case(RANKS, "TP", {"tensor": 2}, checkpointing="selective"),
    Case(RANKS, "CP", {"context": 2}),
    Case(RANKS, "CP", {"context": 2}, checkpointing="full"),
    Case(RANKS, "CP", {"context": 2}, checkpointing="selective"),
]
L, H, F, V = MODEL.num_hidden_layers, MODEL.hidden_size, MODEL.intermediate_size, MODEL.vocab_size
Q = MODEL.num_attention_heads * MODEL.attention_head_dim
K = MODEL.num_key_value_heads * MODEL.attention_head_dim
BLOCK = 2 * H * Q + 2 * H * K + 3 * H * F + Q + 2 * K
ROOT = V * H


class Exchanges(TorchDispatchMode):
    """Counts collectives outside of operators, and the numbers that a rank receives through them in a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.received: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.name()
        if name == "c10d::_allgather_base_":
            self._note("weights gathered", args[0].numel() - args[1].numel())
        elif name == "c10d::_reduce_scatter_base_":
            self._note("gradients scattered", args[1].numel() - args[0].numel())
        elif name == "_c10d_functional::all_gather_into_tensor":
            self._note("gathered", args[0].numel() * (RANKS - 1))
        elif name == "_c10d_functional::reduce_scatter_tensor":
            self._note("scattered", args[0].numel() * (RANKS - 1) // RANKS)
        elif name == "c10d::allreduce_" and args[0][0].numel() > 3 * (8 + 2 * H) + 2 + H:
            self._note("reduced", 2 * args[0][0].numel() * (RANKS - 1) // RANKS)
        return made

    def _note(self, what: str, numbers: int) -> None:
        self.calls[what] += 1
        self.received[what] += numbers


def count_exchanges(world: World) -> list[tuple[int, Counter[str], Counter[str]]]:
    """(micro-batches, calls, numbers received) of one step of every case."""
    found = []
    for case in CASES:
        learner = make_learner(case, world)
        with learner.loader(0, TAPES) as loader:
            batches = next(iter(loader))
            with Exchanges() as exchanges:
                learner.train_step(0, batches)
        found.append((len(batches), exchanges.calls, exchanges.received))
    return found


def expected(case: Case, micro_batches: int) -> tuple[dict[str, int], dict[str, int]]:
    """The table of docs/parallelism.md for 2 ranks."""
    part, tokens = (RANKS - 1) / RANKS, MICRO_BATCH * LENGTH
    calls: dict[str, float] = {}
    received: dict[str, float] = {}
    reductions = 1 if case.layout == "FSDP, reduced last" else micro_batches
    if case.layout.startswith(("FSDP", "CP")):
        gathers = 1 if case.layout == "FSDP, gathered once" else 2
        calls["weights gathered"] = micro_batches * (gathers * L + 1)
        received["weights gathered"] = micro_batches * (gathers * L * BLOCK + ROOT) * part
        calls["gradients scattered"] = reductions * (L + 1)
        received["gradients scattered"] = reductions * (L * BLOCK + ROOT) * part
    if case.layout == "replicas":
        calls["reduced"] = micro_batches * (L + 1)
        received["reduced"] = micro_batches * 2 * (L * BLOCK + ROOT) * part
    if case.layout == "TP":
        again = {"none": (0, 0), "full": (2, 1), "selective": (2, 0)}[case.checkpointing]
        for what, more in zip(("gathered", "scattered"), again, strict=True):
            calls[what] = micro_batches * ((4 + more) * L + 2)
            received[what] = calls[what] * tokens * H * part
    if case.layout == "CP":
        own = tokens // RANKS
        for what, times in (("gathered", 1 if case.checkpointing == "none" else 2), ("scattered", 1)):
            calls[what] = micro_batches * times * L
            received[what] = calls[what] * 2 * K * own * (RANKS - 1)
    return {k: int(v) for k, v in calls.items()}, {k: int(v) for k, v in received.items()}


def test_collectives_of_a_step() -> None:
    for rank in run_ranks(count_exchanges, RANKS):
        for case, (micro_batches, calls, received) in zip(CASES, rank, strict=True):
            assert micro_batches > 1
            assert (dict(calls), dict(received)) == expected(case, micro_batches), case.name
