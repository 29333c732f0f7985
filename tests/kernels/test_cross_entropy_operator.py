"""The operators of both cross-entropies as PyTorch sees them: compiled, checkpointed, faked, sharded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.distributed.ranks import run_ranks
from titan_yulan.kernels import cross_entropy as logits_module
from titan_yulan.kernels import linear_cross_entropy as head_module
from titan_yulan.kernels.cross_entropy import CrossEntropy, cross_entropy, cross_entropy_reference
from titan_yulan.kernels.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from titan_yulan.parallel.process import World

TOKENS, VOCAB, HIDDEN, Z = 9, 21, 6, 0.05
OPERATORS = torch.ops.titan_yulan


def inputs(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, targets and weights (one 0); `logits` is made of the first two."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    token_weights = torch.rand(TOKENS, generator=generator) + 0.1
    token_weights[3] = 0
    return hidden, weight, torch.randint(0, VOCAB, (TOKENS,), generator=generator), token_weights


def logits_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, *rest = inputs(dtype)
    return (hidden @ weight.t()).detach().requires_grad_(), *rest  # type: ignore[return-value]


def gradients(function: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> list[Tensor]:
    objective, *reports = function(*arguments)
    assert not any(report.requires_grad for report in reports)
    wanted = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    return [objective.detach(), *reports, *torch.autograd.grad(1.5 * objective, wanted)]


def head(*arguments: Any) -> tuple[Tensor, ...]:
    return linear_cross_entropy(
        *arguments, z_weight=Z, denominator=torch.tensor(3.0), with_logsumexp=True, chunk_rows=4
    )


def logits_loss(*arguments: Any) -> tuple[Tensor, ...]:
    return cross_entropy(*arguments, z_weight=Z, denominator=torch.tensor(3.0))


CASES = pytest.mark.parametrize(("function", "make"), [(head, inputs), (logits_loss, logits_inputs)])


@pytest.mark.parametrize("denominator", [None, torch.tensor([3.0])])
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True), (False, False)])
def test_opcheck_of_the_head(needed: tuple[bool, bool], denominator: Tensor | None) -> None:
    hidden, weight, *rest = inputs(torch.float32)
    hidden, weight = hidden.detach().requires_grad_(needed[0]), weight.detach().requires_grad_(needed[1])
    arguments = (hidden, weight, *rest, Z, denominator, 4, *needed, False)
    torch.library.opcheck(OPERATORS.linear_cross_entropy_forward.default, arguments)


def test_opcheck_of_the_others() -> None:
    logits, targets, token_weights = logits_inputs(torch.bfloat16)
    torch.library.opcheck(OPERATORS.cross_entropy_forward.default, (logits, targets, token_weights, Z))
    losses, statistics = OPERATORS.cross_entropy_forward(logits.detach(), targets, token_weights, Z)
    arguments = (torch.ones_like(losses), logits.detach(), targets, token_weights, statistics, Z)
    torch.library.opcheck(OPERATORS.cross_entropy_backward.default, arguments)
    ones = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16), torch.ones(VOCAB, HIDDEN)
    arguments = (torch.tensor(2.0), *ones, torch.bfloat16)
    torch.library.opcheck(OPERATORS.linear_cross_entropy_backward.default, arguments)


def test_gradcheck() -> None:
    logits, targets, token_weights = logits_inputs()
    for function in (cross_entropy, cross_entropy_reference):
        torch.autograd.gradcheck(lambda x, f=function: f(x, targets, token_weights, Z)[0], (logits,))


def test_cross_entropy_and_its_reference_agree() -> None:
    logits, targets, token_weights = logits_inputs()
    targets[3] = -100  # without weight
    operator = gradients(cross_entropy, logits, targets, token_weights, Z)
    reference = gradients(partial(cross_entropy, kernels="reference"), logits, targets, token_weights, Z)
    torch.testing.assert_close(operator, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "make", "backend"),
    [(head, inputs, "aot_eager"), (head, inputs, "inductor"), (logits_loss, logits_inputs, "aot_eager")],
)
def test_compiles_without_graph_breaks(function: Callable, make: Callable, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    arguments = make(torch.float32)
    torch.testing.assert_close(gradients(compiled, *arguments), gradients(function, *arguments))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), function(*arguments))


@pytest.mark.parametrize("selective", [False, True])
@CASES
def test_activation_checkpointing(function: Callable, make: Callable, selective: bool) -> None:
    saved = [OPERATORS.linear_cross_entropy_forward.default, OPERATORS.cross_entropy_forward.default]
    called: list[Any] = []

    def policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        called.append(operator)
        return CheckpointPolicy.MUST_SAVE if operator in saved else CheckpointPolicy.PREFER_RECOMPUTE

    options: dict[str, Any] = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)} if selective else {}
    arguments = make()
    checkpointed = gradients(lambda *a: checkpoint(function, *a, use_reentrant=False, **options), *arguments)
    torch.testing.assert_close(checkpointed, gradients(function, *arguments), rtol=0, atol=0)
    assert any(operator in saved for operator in called) == selective


@torch.no_grad()
def test_fake_tensors_of_a_gpu() -> None:
    """Shapes, types and devices without a GPU and without a kernel; only CUDA can differentiate them."""
    real = [tensor.detach() for tensor in inputs(torch.bfloat16)]
    expected = OPERATORS.linear_cross_entropy_forward(*real, Z, None, None, True, True, False)
    with FakeTensorMode():
        hidden, weight, *rest = (torch.empty(a.shape, dtype=a.dtype, device="cuda") for a in real)
        outputs = OPERATORS.linear_cross_entropy_forward(hidden, weight, *rest, Z, None, None, True, True, True)
        scaled = OPERATORS.linear_cross_entropy_backward(outputs[0], *outputs[3:], torch.bfloat16)
        reports = linear_cross_entropy(hidden, weight, *rest, z_weight=Z, with_logsumexp=True, kernels="triton")
        of_logits = cross_entropy(hidden @ weight.t(), *rest, z_weight=Z)
    pairs = [*zip(outputs, expected, strict=True), *zip(scaled, real[:2], strict=True)]
    pairs += [*zip(reports, expected[:3], strict=True), *zip(of_logits, expected[:3], strict=True)]
    for fake, other in pairs:
        assert fake.device.type == "cuda" and fake.shape == other.shape and fake.dtype == other.dtype


@CASES
def test_the_operators_never_wait_for_the_device(function: Callable, make: Callable) -> None:
    """A fake tensor has no values: whatever asks for one, as .item() does, raises."""
    real = [tensor.detach() for tensor in make(torch.bfloat16)]
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in real]
        one = torch.ones(())
        if function is head:
            outputs = head_module._forward._init_fn(*fake, Z, one, 4, True, True, False)
            head_module._backward._init_fn(one, *outputs[3:], torch.bfloat16)
        else:
            losses, statistics = logits_module._forward._init_fn(*fake, Z)
            logits_module._backward._init_fn(losses, *fake, statistics, Z)
        with pytest.raises(DataDependentOutputException):
            fake[0].sum().item()  # the probe works


def test_no_gradient_is_larger_than_it_must_be() -> None:
    """What backward does not need is neither computed nor kept."""
    hidden, weight, *rest = inputs()
    for needed in ((True, False), (False, True)):
        outputs = OPERATORS.linear_cross_entropy_forward(hidden, weight, *rest, Z, None, None, *needed, False)
        assert [output.numel() > 0 for output in outputs[3:]] == list(needed)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.ones(TOKENS, VOCAB, dtype=torch.int64)}, TypeError, "logits is torch.int64"),
        ({"logits": torch.ones(TOKENS)}, ValueError, r"logits has shape \(9,\)"),
        ({"logits": torch.ones(TOKENS, 0)}, ValueError, r"logits has shape \(9, 0\)"),
        ({"logits": torch.ones(VOCAB, TOKENS).t()}, ValueError, r"strides \(1, 9\).*contiguous"),
        ({"logits": torch.ones(4, VOCAB)}, ValueError, r"targets has shape \(9,\); 4 tokens"),
        ({"token_weights": torch.ones(TOKENS, dtype=torch.float64)}, TypeError, "token_weights is torch.float64"),
        ({"kernels": "triton"}, ValueError, "Triton"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    logits, targets, token_weights = logits_inputs(torch.float32)
    arguments: dict[str, Any] = {"logits": logits, "targets": targets, "token_weights": token_weights}
    with pytest.raises(error, match=message):
        cross_entropy(**(arguments | change))


class Tied(nn.Module):
    """Embedding, one layer, and the same matrix as head, the loss inside the forward."""

    def __init__(self, loss: Callable[..., tuple[Tensor, ...]] = linear_cross_entropy) -> None:
        super().__init__()
        self.loss = loss
        self.embedding, self.layer = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, tokens: Tensor, targets: Tensor, token_weights: Tensor, denominator: Tensor) -> Tensor:
        hidden = self.layer(self.embedding(tokens))
        weight = self.embedding.weight
        assert type(weight.data) is Tensor  # gathered
        return linear_cross_entropy(hidden, weight, targets, token_weights, Z, denominator=denominator, chunk_rows=2)[0]


def model_and_batch(*loss: Callable[..., tuple[Tensor, ...]]) -> tuple[Tied, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    model = Tied(*loss)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    tokens, targets = torch.randint(0, VOCAB, (2, 10), generator=generator)
    token_weights = torch.rand(10, generator=generator)
    return model, [tokens, targets, token_weights]


def sharded(world: World) -> dict[str, dict[str, Tensor]]:
    """Full gradients of one batch cut over the ranks, eagerly and with the loss compiled."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = {}
    mesh = init_device_mesh("cpu", (world.size,))
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    for how, loss in (("eager", linear_cross_entropy), ("compiled", compiled)):
        model, batch = model_and_batch(loss)
        fully_shard(model.layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        mine = [tensor.tensor_split(world.size)[world.rank] for tensor in batch]
        denominator = mine[2].sum()
        dist.all_reduce(denominator)
        model(*mine, denominator / world.size).backward()  # FSDP2 averages
        found[how] = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    return found


def test_fsdp2_with_a_tied_head() -> None:
    model, batch = model_and_batch()
    model(*batch, batch[2].sum()).backward()
    for found in run_ranks(sharded, 2):
        for how, gradient_of in found.items():
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(gradient_of[name], parameter.grad, rtol=1e-5, atol=1e-6, msg=f"{how} {name}")


@pytest.mark.parametrize("denominator", [None, torch.tensor(3.0)])
def test_the_modules_are_the_functions_with_settings(denominator: Tensor | None) -> None:
    logits, *rest = logits_inputs()
    one, other = CrossEntropy(Z), partial(cross_entropy, z_weight=Z)
    expected = gradients(partial(other, denominator=denominator), logits, *rest)
    assert_equal(gradients(partial(one, denominator=denominator), logits, *rest), expected)
    head_one, head_other = LinearCrossEntropy(Z, chunk_rows=4), partial(linear_cross_entropy, z_weight=Z, chunk_rows=4)
    expected = gradients(partial(head_other, denominator=denominator), *inputs())
    assert_equal(gradients(partial(head_one, denominator=denominator), *inputs()), expected)
    assert not [*one.state_dict(), *head_one.state_dict()]
    assert str(one) == "CrossEntropy(z_weight=0.05, kernels='auto')"
    assert str(head_one) == "LinearCrossEntropy(z_weight=0.05, chunk_rows=4, kernels='auto')"


def test_a_module_insists_on_its_kernels() -> None:
    for module, arguments in (
        (CrossEntropy(kernels="triton"), logits_inputs()),
        (LinearCrossEntropy(kernels="triton"), inputs()),
    ):
        with pytest.raises(ValueError, match="Triton"):
            module(*arguments)


def assert_equal(values: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(values, expected, rtol=0, atol=0)
