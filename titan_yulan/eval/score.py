"""Perplexity of documents under a trained model: what sorts them from easy to hard.

    perplexity = exp(sum of the cross-entropies of the document's tokens / number of its tokens)

Its first token is predicted from end of text, as in training, where a document follows another one's end; end of text
itself is not counted. A document longer than the context is cut into windows that do not overlap: each token counts
once, and the first token of a later window is predicted from the one token before it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from titan_yulan.data.annotate import Counts, Job, annotate
from titan_yulan.data.documents import find_inputs
from titan_yulan.data.report import Say, say_now
from titan_yulan.data.rows import Document
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import RunError, UserError
from titan_yulan.eval.batches import batches_of
from titan_yulan.eval.open_model import in_precision, open_device, open_model
from titan_yulan.kernels.linear_cross_entropy import linear_cross_entropy
from titan_yulan.kernels.runtime import Kernels
from titan_yulan.model import Decoder

_LARGEST_LOSS = 700.0  # the exponential of a little more is no float64


@dataclass(frozen=True)
class _Window:
    """Some tokens of a document; `targets` are `inputs` one place later."""

    document: int
    inputs: np.ndarray
    targets: np.ndarray


class Scorer:
    """Perplexities of documents, many at a time; see the head of this file."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, context: int, batch_tokens: int) -> None:
        """
        Args:
            decoder: on the device and in the types that it computes in.
            context: tokens of a window, at most.
            batch_tokens: tokens of a batch, padding included; a batch holds at least one window.
        """
        self.decoder, self.tokenizer, self.context, self.batch_tokens = decoder, tokenizer, context, batch_tokens
        self.device = decoder.head_weight().device

    def __call__(self, documents: Sequence[Document]) -> list[dict[str, Any] | str]:
        """`perplexity` and `tokens` of each document, or why it has none.

        Raises:
            RunError: the model gives no finite loss.
        """
        ids = [self._ids(document) for document in documents]
        windows = [window for i, part in enumerate(ids) if not isinstance(part, str) for window in self._cut(i, part)]
        sums = torch.zeros(len(documents), dtype=torch.float64, device=self.device)
        for numbers in batches_of([len(window.inputs) for window in windows], self.batch_tokens):
            batch = [windows[number] for number in numbers]
            places = torch.tensor([window.document for window in batch], device=self.device)
            sums.index_add_(0, places, self._losses(batch))
        results: list[dict[str, Any] | str] = []
        for part, total in zip(ids, sums.tolist(), strict=True):
            if isinstance(part, str):
                results.append(part)
                continue
            loss = total / len(part)
            if not loss < _LARGEST_LOSS:  # nor if it is no number
                raise RunError(f"the model gives a loss of {loss}: is its checkpoint that of a run that failed?")
            results.append({"perplexity": math.exp(loss), "tokens": len(part)})
        return results

    def _ids(self, document: Document) -> np.ndarray | str:
        if document.token_ids is None:
            ids = np.array(self.tokenizer.encode(document.text), dtype=np.int64)
            return ids if len(ids) else "the tokenizer makes nothing of its text"
        largest = int(document.token_ids.max())
        if largest >= self.tokenizer.vocab_size:
            return f"token id {largest} is outside the vocabulary of {self.tokenizer.vocab_size}"
        return document.token_ids

    def _cut(self, document: int, ids: np.ndarray) -> list[_Window]:
        inputs = np.concatenate([[self.tokenizer.eos_id], ids[:-1]])
        places = [slice(start, start + self.context) for start in range(0, len(ids), self.context)]
        return [_Window(document, inputs[place], ids[place]) for place in places]

    @torch.no_grad()
    def _losses(self, batch: Sequence[_Window]) -> Tensor:
        """Sum of the cross-entropies of each window, (windows,) float64."""
        shape = (len(batch), len(batch[0].inputs))
        inputs, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        weights = np.zeros(shape, dtype=np.float32)
        for row, window in enumerate(batch):
            length = len(window.inputs)
            inputs[row, :length], targets[row, :length], weights[row, :length] = window.inputs, window.targets, 1
        on_device = [torch.from_numpy(array).to(self.device) for array in (inputs, targets, weights)]

        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            kernels = cast(Kernels, self.decoder.config.kernels)
            _, losses = linear_cross_entropy(
                hidden.flatten(0, 1), weight, on_device[1].flatten(), on_device[2].flatten(), kernels=kernels
            )
            return losses.view(shape).double().sum(1)

        # what is added behind a window does not reach it
        return self.decoder(on_device[0], head=head)


def score(
    run: Path,
    inputs: Sequence[str],
    output: Path,
    *,
    context: int | None = None,
    batch_tokens: int = 16384,
    device: str | None = None,
    on_bad_row: Literal["skip", "fail"] = "skip",
    say: Say = say_now,
) -> Counts:
    """Write every input file into `output`, with the columns `perplexity` and `tokens` (see `data.annotate`).

    Of several ranks (torchrun's RANK and WORLD_SIZE), rank r scores files r, r + WORLD_SIZE, ...

    Args:
        run: run folder, checkpoint folder, or folder of a Hugging Face Llama model; it computes in the precision of
            its training, or in that of its files.
        context: tokens of a window; None: the length of the rows that it was trained with.
        device: cpu, cuda or cuda:N; None: this rank's GPU where there is one.

    Raises:
        UserError: the request is wrong, or an input cannot be read.
        RunError: the model is missing or damaged, the disk is full, or a loss is not finite.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    files = find_inputs(inputs)[rank::world]
    place = open_device(device)
    model = open_model(run)
    context = model.context if context is None else context
    if not 1 <= context <= model.longest or batch_tokens < 1:
        raise UserError(f"--context must be from 1 to {model.longest} for this model, --batch-tokens at least 1")
    request = {
        "model": model.fingerprint,
        "tokenizer": model.tokenizer.fingerprint,
        "context": context,
        "precision": model.precision,
    }
    decoder = in_precision(model.decoder, getattr(torch, model.precision), place)
    scorer = Scorer(decoder, model.tokenizer, context, batch_tokens)
    prefix = f"rank {rank}: " if world > 1 else ""
    job = Job(output, request, scorer, lambda line: say(f"{prefix}{line}"), on_bad_row == "fail")
    return annotate(files, job, workers=1)
