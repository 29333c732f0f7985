"""A model to compute with, ours or a Hugging Face folder, and all that must be known of it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from titan_yulan.checkpoint.hugging_face import CONFIG, check_tensors, is_hugging_face, open_hugging_face
from titan_yulan.checkpoint.hugging_face_weights import load_hugging_face
from titan_yulan.checkpoint.layout import MANIFEST, hash_file, open_checkpoint
from titan_yulan.checkpoint.resume import trained_tokenizer
from titan_yulan.config.sections import ObjectiveSection
from titan_yulan.data.mask_token import mask_token
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import UserError
from titan_yulan.eval.load import load_decoder
from titan_yulan.model import Decoder
from titan_yulan.parallel.fsdp import is_replicated


@dataclass(frozen=True)
class TrainedModel:
    """A decoder with float32 weights on the CPU.

    fingerprint: changes when a weight changes.
    precision: float32 or bfloat16, in which the matrices are meant to be used.
    context: tokens of the rows that it was trained with; longest: the most that it takes.
    objective: what it was trained for; of a Hugging Face folder to predict the next token.
    mask_token_id: what stands for a hidden token in masked diffusion, where tokens also see those behind them; None:
        the model predicts the next token.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    fingerprint: str
    precision: str
    context: int
    longest: int
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    mask_token_id: int | None = None


def open_model(path: Path) -> TrainedModel:
    """The model of a run folder (its newest checkpoint), a checkpoint folder, or a Hugging Face folder.

    Raises:
        UserError: the model or its tokenizer is missing, not supported, or they do not belong together.
        RunError: the weights are damaged.
    """
    model = _open_hugging_face(path) if is_hugging_face(path) else _open_checkpoint(path)
    rows = model.decoder.config.vocab_size
    if model.tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer of {path} has {model.tokenizer.vocab_size} entries and its model {rows}: it was not "
            "trained with this vocabulary; put the tokenizer that it was trained with in its place"
        )
    return model


def _open_checkpoint(path: Path) -> TrainedModel:
    checkpoint = open_checkpoint(path)
    decoder, config = load_decoder(checkpoint.path)
    phase = next(phase for phase in config.phases if phase.name == checkpoint.state().phase)
    tokenizer = trained_tokenizer(checkpoint, config)
    return TrainedModel(
        decoder,
        tokenizer,
        fingerprint=hash_file(checkpoint.path / MANIFEST),
        precision=phase.parallel.compute_dtype,
        context=phase.sequence_length,
        longest=max(config.model.max_position_embeddings, phase.sequence_length),
        objective=config.objective,
        mask_token_id=mask_token(config, tokenizer.vocab_size),
    )


def _open_hugging_face(path: Path) -> TrainedModel:
    folder = open_hugging_face(path)
    check_tensors(folder, folder.model)
    with torch.device("meta"):  # random values for billions of weights would take minutes
        decoder = Decoder(folder.model)
    decoder.to_empty(device="cpu")
    load_hugging_face(folder, dict(decoder.named_parameters()))
    files = sorted({path / CONFIG, *(tensor.file for tensor in folder.tensors.values())})
    hashes = "".join(hash_file(file) for file in files)
    longest = folder.model.max_position_embeddings
    stored = {tensor.dtype for tensor in folder.tensors.values()}
    return TrainedModel(
        decoder,
        Tokenizer.load(path),
        fingerprint=hashlib.sha256(hashes.encode()).hexdigest(),
        precision="bfloat16" if "BF16" in stored else "float32",
        context=longest,
        longest=longest,
    )


def in_precision(decoder: Decoder, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The decoder on a device, in the types of a training step: matrices in `dtype`, scalars and norms in float32."""
    for name, parameter in decoder.named_parameters():
        parameter.data = parameter.data.to(device, parameter.dtype if is_replicated(name) else dtype)
    return decoder.eval()


def open_device(name: str | None) -> torch.device:
    """The device of that name; None: this rank's GPU where there is one.

    Raises:
        UserError: there is no such device.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise UserError(f"--device {name}: torch sees no GPU here; give --device cpu")
            device = torch.device("cuda", local if device.index is None else device.index)
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {error}; give --device cpu, cuda or cuda:N") from error
    return device
