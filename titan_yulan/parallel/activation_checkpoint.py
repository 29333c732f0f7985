"""Activation checkpointing: what backward computes again instead of keeping it from forward.

Apply it before `compile_layers` and before `fully_shard`. The names of parameters stay as they are: no module is
wrapped, a recomputed block only gets a `forward` of its own. FSDP2's hooks surround that `forward`, and backward
computes it again after FSDP2 has gathered the block's weights for backward.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titan_yulan.config.sections import ActivationCheckpointSection
from titan_yulan.model.decoder import DecoderLayer

_SAVE = CheckpointPolicy.MUST_SAVE
_RECOMPUTE = CheckpointPolicy.MUST_RECOMPUTE

# Mode "selective", operator by operator. Names, so that an operator this PyTorch lacks is simply never met.
OPERATOR_POLICY = {
    # matrix products: most of a block's arithmetic. No bmm: only the mathematical fallback of attention uses it, for
    # scores of size seq x seq, which nobody wants kept.
    "aten::mm": _SAVE,
    "aten::addmm": _SAVE,
    "titan_yulan::packed_linear_forward": _SAVE,
    # attention, one name per backend
    "aten::_scaled_dot_product_flash_attention": _SAVE,
    "aten::_scaled_dot_product_efficient_attention": _SAVE,
    "aten::_scaled_dot_product_cudnn_attention": _SAVE,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _SAVE,
    "aten::_scaled_dot_product_fused_attention_overrideable": _SAVE,
    # collectives: a reduce-scatter leaves 1/n of its input, so keeping it is cheap and saves a transfer; an all-gather
    # leaves n times its input, and keeping it would undo sequence parallelism (arXiv 2205.05198, section 4.2.2)
    "_c10d_functional::reduce_scatter_tensor": _SAVE,
    "_c10d_functional::all_gather_into_tensor": _RECOMPUTE,
    # norms and SwiGLU: bound by memory traffic, and as large as what they read
    "titan_yulan::rms_norm_forward": _RECOMPUTE,
    "titan_yulan::add_rms_norm_forward": _RECOMPUTE,
    "titan_yulan::swiglu_forward": _RECOMPUTE,
    "titan_yulan::swiglu_packed_forward": _RECOMPUTE,
}
# rotation, scalars, residual sums, casts, views
_OTHERS = CheckpointPolicy.PREFER_RECOMPUTE


def apply_activation_checkpoint(layers: nn.ModuleList, section: ActivationCheckpointSection) -> None:
    """Make the blocks recompute their activations in backward, in place; gradients do not change.

    Args:
        layers: the decoder's `DecoderLayer`s, not yet compiled or sharded.
        section: which blocks, and which operators of them. With mode "every", block i is recomputed unless `every`
            divides i, the meaning of `gradient_checkpointing_step` in YuLan-Mini (arXiv 2412.17743): 1 recomputes
            nothing.
    """
    for index, block in enumerate(layers):
        if not is_recomputed(index, section):
            continue
        if section.mode == "selective":
            block.forward = MethodType(_selective_forward, block)
        else:
            block.forward = MethodType(_full_forward, block)
            # One tensor instead of two is then kept between blocks. A selective block keeps both in any case.
            cast(DecoderLayer, block).hands_on = False


def is_recomputed(index: int, section: ActivationCheckpointSection) -> bool:
    """Whether backward computes block `index` (or, with mode "selective", some of its operators) again."""
    if section.mode == "every":
        return index % section.every != 0
    return section.mode != "none"


# The class's forward is looked up at each call, not bound here: FSDP2 swaps the block's class, a copy of the block must
# call its own, and blocks that differ in nothing but their weights can share compiled code.


def _full_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(
        type(block).forward, block, *args, use_reentrant=False, preserve_rng_state=_draws(block), **kwargs
    )


def _selective_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(
        type(block).forward,
        block,
        *args,
        use_reentrant=False,
        preserve_rng_state=_draws(block),
        context_fn=_selective_contexts,
        **kwargs,
    )


def _draws(block: nn.Module) -> bool:
    """Whether dropout must come out the same the second time; restoring the generator costs a little."""
    return cast(DecoderLayer, block).draws_random_numbers


def _selective_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return OPERATOR_POLICY.get(operator.name(), _OTHERS)
