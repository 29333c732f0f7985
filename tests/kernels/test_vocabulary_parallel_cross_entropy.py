"""The fused head and loss over a vocabulary cut over gloo ranks, against the whole head on one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.distributed.ranks import run_ranks
from tests.kernels.accuracy import error
from tests.kernels.shards import all_shards
from titan_yulan.kernels.cross_entropy import cross_entropy_reference
from titan_yulan.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from titan_yulan.parallel.process import World

HIDDEN, CHUNK = 6, 4
Z = 0.05
FACTOR = 1.5  # the upstream gradient
NAMES = ("objective", "cross_entropy", "logsumexp", "grad_hidden", "grad_weight")


@dataclass(frozen=True)
class Case:
    """One call. `dead` are rows without weight, whose targets are -100."""

    dtype: torch.dtype = torch.float64
    vocab: int = 250
    tokens: int = 11
    dead: tuple[int, ...] = (2, 7)
    z_weight: float = Z
    denominator: float | None = 7.0
    chunk_rows: int | None = CHUNK


CASES = {
    "float64": Case(),
    "float32": Case(torch.float32, tokens=40),
    "bfloat16": Case(torch.bfloat16, tokens=40),
    "one chunk": Case(chunk_rows=None),
    "without z-loss and denominator": Case(z_weight=0.0, denominator=None),
    "a dead chunk": Case(dead=(4, 5, 6, 7)),
    "all dead": Case(dead=tuple(range(11))),
    "one token": Case(tokens=1, dead=()),
    "no token": Case(tokens=0, dead=()),
    "a last shard without rows": Case(vocab=4, chunk_rows=None),
    "one row": Case(vocab=1),
}


def inputs(case: Case, ranks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, the whole head, targets at the borders of every shard and anywhere, and weights."""
    generator = torch.Generator().manual_seed(case.vocab + case.tokens)
    hidden = torch.randn(case.tokens, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(case.vocab, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, case.vocab, (case.tokens,), generator=generator)
    starts = torch.arange(ranks + 1) * -(-case.vocab // ranks)
    borders = torch.cat([starts - 1, starts]).clamp(0, case.vocab - 1)[: case.tokens]
    targets[: len(borders)] = borders
    token_weights = torch.rand(case.tokens, generator=generator) + 0.1
    token_weights[list(case.dead)] = 0
    targets[list(case.dead)] = -100
    return hidden.to(case.dtype), weight.to(case.dtype), targets, token_weights


def call(case: Case, hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, **options: Any):
    """The five results, the gradients those of `FACTOR` times the objective."""
    function = options.pop("function", linear_cross_entropy)
    denominator = None if case.denominator is None else torch.tensor([case.denominator])
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    rest = (targets, token_weights, case.z_weight)
    objective, *reports = function(*leaves, *rest, denominator=denominator, **options)
    assert not any(report.requires_grad for report in reports)
    return [objective.detach(), *reports, *torch.autograd.grad(FACTOR * objective, leaves)]


def sharded(case: Case, world: World, **options: Any) -> list[Tensor]:
    hidden, weight, *rest = inputs(case, world.size)
    shares = [*weight.split(-(-case.vocab // world.size)), *[weight[:0]] * world.size]
    options = {"group": dist.group.WORLD, "vocabulary_size": case.vocab} | options
    return call(case, hidden, shares[world.rank], *rest, with_logsumexp=True, chunk_rows=case.chunk_rows, **options)


def on_ranks(world: World) -> dict[str, Any]:
    """Everything that needs ranks, in one start of them."""
    found: dict[str, Any] = {"cases": {name: sharded(case, world) for name, case in CASES.items()}}
    with mock.patch("torch.distributed.all_gather", wraps=dist.all_gather) as gather:
        found["again"] = {name: sharded(case, world) for name, case in CASES.items()}
        found["bytes"] = [sum(part.nbytes for part in call.args[0]) for call in gather.call_args_list]
    with torch.no_grad():
        found["without gradients"] = values_without_gradients(CASES["float32"], world)
    check_one_rank_alone(world)
    check_compiled(world)
    check_operator(world)
    found["messages"] = check_errors(world)
    return found


def values_without_gradients(case: Case, world: World) -> tuple[Tensor, ...]:
    hidden, weight, targets, token_weights = inputs(case, world.size)
    return linear_cross_entropy(
        hidden,
        weight.split(-(-case.vocab // world.size))[world.rank],
        targets,
        token_weights,
        case.z_weight,
        denominator=torch.tensor(case.denominator),
        with_logsumexp=True,
        chunk_rows=case.chunk_rows,
        group=dist.group.WORLD,
        vocabulary_size=case.vocab,
    )


def check_one_rank_alone(world: World) -> None:
    """A group of one rank gives the bits that the whole head gives without a group; its name is enough."""
    alone = [dist.new_group([rank]) for rank in range(world.size)][world.rank]
    assert isinstance(alone, dist.ProcessGroup)
    for case in (CASES["float32"], CASES["bfloat16"], CASES["a dead chunk"]):
        arguments = inputs(case, world.size)
        options = {"with_logsumexp": True, "chunk_rows": case.chunk_rows}
        whole = call(case, *arguments, **options)
        for group in (alone, alone.group_name):
            values = call(case, *arguments, **options, group=group, vocabulary_size=case.vocab)
            assert all(torch.equal(a, b) for a, b in zip(values, whole, strict=True))


def check_compiled(world: World) -> None:
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for name in ("bfloat16", "a last shard without rows"):
        eager, graph = sharded(CASES[name], world), sharded(CASES[name], world, function=compiled)
        assert all(torch.equal(a, b) for a, b in zip(eager, graph, strict=True)), name


def check_operator(world: World) -> None:
    case = CASES["float32"]
    hidden, weight, *rest = inputs(case, world.size)
    weight = weight.split(-(-case.vocab // world.size))[world.rank].clone().requires_grad_()
    group = dist.group.WORLD
    assert group is not None
    arguments = (hidden.requires_grad_(), weight, *rest, Z, None, CHUNK, True, True, False, case.vocab)
    operator = torch.ops.titan_yulan.linear_cross_entropy_forward.default
    torch.library.opcheck(operator, (*arguments, group.group_name))


def check_errors(world: World) -> list[str]:
    hidden, weight, targets, token_weights = inputs(CASES["float32"], world.size)
    share = weight.split(-(-250 // world.size))[world.rank]
    options: dict[str, Any] = {"group": dist.group.WORLD, "vocabulary_size": 250}
    targets[9] = 250
    assert linear_cross_entropy(hidden, share, targets, token_weights, **options)[0].isinf()
    messages = []
    with mock.patch.dict("os.environ", TITAN_YULAN_CHECK_TARGETS="1"):
        with pytest.raises(IndexError) as raised:
            linear_cross_entropy(hidden, share, targets, token_weights, **options)
        messages.append(str(raised.value))
    with pytest.raises(ValueError) as wrong:
        linear_cross_entropy(hidden, weight, targets, token_weights, **options)
    return [*messages, str(wrong.value)]


def check_against_the_whole_head(name: str, case: Case, ranks: int, found: list[list[Tensor]]) -> None:
    hidden, weight, *rest = inputs(case, ranks)
    wide = call(case, hidden.double(), weight.double(), *rest, function=linear_cross_entropy_reference)
    parts = [values[3].double() for values in found]
    results = [*found[0][:3], torch.stack(parts).sum(0), torch.cat([values[4] for values in found])]
    if case.dtype == torch.float64:
        torch.testing.assert_close(results, wide, rtol=1e-12, atol=1e-12)
        return
    single = call(case, hidden, weight, *rest, with_logsumexp=True, chunk_rows=case.chunk_rows)
    for what, value, peer, right in zip(NAMES, results, single, wide, strict=True):
        # Every rank rounds its part of the hidden states' gradient to their type; the parts may cancel.
        slack = ranks if what == "grad_hidden" else 1.05
        assert error(value, right) <= slack * error(peer, right) + 1e-6, (name, what)


@pytest.mark.parametrize("ranks", [2, 3])
def test_on_ranks(ranks: int) -> None:
    found = run_ranks(on_ranks, ranks)
    for name, case in CASES.items():
        values = [rank["cases"][name] for rank in found]
        check_against_the_whole_head(name, case, ranks, values)
        for rank in found:
            again, first = rank["again"][name], rank["cases"][name]
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True)), f"{name}: a repeated call"
            assert all(torch.equal(a, b) for a, b in zip(first[:3], values[0][:3], strict=True)), f"{name}: ranks"
        for row in case.dead:
            assert not any(v[1][row] or v[2][row] or v[3][row].any() for v in values), f"{name}: a dead row"
    for rank, result in enumerate(found):
        assert result["bytes"] == [size for case in CASES.values() for size in gathered_bytes(case, ranks)]
        pairs = zip(result["without gradients"], result["cases"]["float32"], strict=False)
        assert all(torch.equal(a, b) for a, b in pairs)
        check, wrong = result["messages"]
        assert "target 250 of token 9 is outside the vocabulary of 250" in check
        assert f"weight has 250 rows on rank {rank} of the group; a vocabulary of 250 cut over {ranks}" in wrong


def gathered_bytes(case: Case, ranks: int) -> list[int]:
    """Of each chunk's all-gather, on every rank: 3 numbers a token and rank, and nothing of the logits' size."""
    chunk = case.chunk_rows or max(1, case.tokens)
    size = 8 if case.dtype == torch.float64 else 4
    return [ranks * 3 * size * min(chunk, case.tokens - start) for start in range(0, case.tokens, chunk)]


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.integers(1, 40),
    ranks=st.integers(1, 9),
    scale=st.sampled_from([0.0, 1.0, 100.0, 1e30]),
    shift=st.sampled_from([0.0, -1e5, 1e5]),
    seed=st.integers(0, 2**30),
)
def test_any_shards_give_what_whole_rows_give(vocab: int, ranks: int, scale: float, shift: float, seed: int) -> None:
    """Also shards whose logits are all far below the others', and none of whose exponentials count."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocab, generator=generator, dtype=torch.float64) * scale
    logits[0, vocab // 2 :] += shift
    targets = torch.randint(0, vocab, (3,), generator=generator)
    token_weights = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    objective, losses, logsumexp = cross_entropy_reference(leaf, targets, token_weights, 1e-3)
    (right,) = torch.autograd.grad(objective, leaf)
    statistics, gradients = all_shards(logits, ranks, targets, token_weights, 1e-3, use_triton=False)
    loss, maxima, sums = statistics[0].unbind()
    torch.testing.assert_close(token_weights * loss, losses, rtol=1e-11, atol=1e-9)
    torch.testing.assert_close(maxima + sums.log(), logsumexp, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(gradients, 1), right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("rows", "options"),
    [(4, {"group": "0"}), (4, {"vocabulary_size": 4}), (0, {})],
    ids=["no size", "no group", "no rows"],
)
def test_a_group_and_a_size_belong_together(rows: int, options: dict[str, Any]) -> None:
    hidden, weight, targets, token_weights = inputs(Case(tokens=3, dead=()), 1)
    with pytest.raises(ValueError, match=f"weight has {rows} rows.*needs both group and vocabulary_size"):
        linear_cross_entropy(hidden, weight[:rows], targets, token_weights, **options)
