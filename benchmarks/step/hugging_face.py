"""The peer `hf_liger`: LlamaForCausalLM of transformers with the patches of liger-kernel, as people fine-tune and train
with it.

Float32 weights under bfloat16 autocast, which is what `bf16 = true` of the Trainer does; SDPA; eager; fused AdamW;
gradients clipped at 1. `apply_liger_kernel_to_llama` replaces rotation, RMSNorm, SwiGLU and the head with its loss. Its
Triton kernels need a GPU: on a CPU the peer is transformers alone.
"""

from __future__ import annotations

import importlib
import importlib.metadata

import torch
from torch import Tensor, nn

from titan_yulan.config.model import ModelConfig

_MAXIMAL_NORM = 1.0


class HuggingFaceTraining:
    """Model, optimizer and the step of the peer on one rank."""

    def __init__(
        self, config: ModelConfig, length: int, dtype: torch.dtype, recompute: bool, device: torch.device
    ) -> None:
        """
        Args:
            length: of the rows.
            dtype: of autocast; float32: none.
            recompute: gradient checkpointing of every block.

        Raises:
            ImportError: transformers is not there, or on a GPU liger-kernel.
        """
        transformers = importlib.import_module("transformers")
        if device.type == "cuda":
            importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama()
        published = transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.attention_head_dim,
            max_position_embeddings=length,
            rms_norm_eps=config.rms_norm_eps,
            attention_bias=config.attention_bias,
            tie_word_embeddings=config.tie_word_embeddings,
            use_cache=False,
            attn_implementation="sdpa",
        )
        with torch.device(device):
            self.model = transformers.LlamaForCausalLM(published)
        self.model.train()
        if recompute:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def step(self, batches: list[Tensor]) -> Tensor:
        """Forward, backward and update for micro-batches of (rows, seq + 1) ids; returns the () mean loss. The model
        shifts labels itself, so the last of them is no target: one in `seq` less than the others."""
        total = torch.zeros((), device=batches[0].device)
        for batch in batches:
            ids = batch[:, :-1]
            with self._autocast:
                loss = self.model(input_ids=ids, labels=ids).loss / len(batches)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), _MAXIMAL_NORM, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def versions(device: torch.device) -> str:
    """Of transformers and liger-kernel, for the table."""
    if device.type != "cuda":
        return f"transformers {_version('transformers')} without liger-kernel, whose kernels need a GPU"
    return f"transformers {_version('transformers')}, liger-kernel {_version('liger-kernel')}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
