"""Perplexity of documents under a trained model: what sorts them from easy to hard.

    perplexity = exp(sum of the cross-entropies of the document's tokens / number of its tokens)

Its first token is predicted from end of text, as in training, where a document follows another one's end; end of text
itself is not counted. A document longer than the context is cut into windows as in every evaluation
(`eval.likelihood`): each token counts once, and the last window reads as far back as it can.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from titan_yulan.data.annotate import Counts, Job, annotate
from titan_yulan.data.documents import find_inputs
from titan_yulan.data.report import Say, say_now
from titan_yulan.data.rows import Document
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import RunError, UserError
from titan_yulan.eval.diffusion import refuse_diffusion
from titan_yulan.eval.likelihood import Likelihood, Likelihoods, Span
from titan_yulan.eval.open_model import in_precision, open_device, open_model
from titan_yulan.model import Decoder

_LARGEST_LOSS = 700.0  # the exponential of a little more is no float64


class Scorer:
    """Perplexities of documents, many at a time; see the head of this file."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, context: int, batch_tokens: int) -> None:
        """
        Args:
            decoder: on the device and in the types that it computes in.
            context: tokens of a window, at most.
            batch_tokens: tokens of a batch, padding included; a batch holds at least one window.
        """
        self.tokenizer = tokenizer
        self._likelihoods = Likelihoods(decoder, context, batch_tokens)

    def __call__(self, documents: Sequence[Document]) -> list[dict[str, Any] | str]:
        """`perplexity` and `tokens` of each document, or why it has none.

        Raises:
            RunError: the model gives no finite loss.
        """
        ids = [self._ids(document) for document in documents]
        spans = [Span([self.tokenizer.eos_id], part) for part in ids if not isinstance(part, str)]
        found = iter(self._likelihoods(spans))
        return [part if isinstance(part, str) else self._perplexity(next(found)) for part in ids]

    def _perplexity(self, found: Likelihood) -> dict[str, Any]:
        loss = -found.logprob / found.tokens
        if loss > _LARGEST_LOSS:
            raise RunError(
                f"the model gives a loss of {loss}: is it that of a run that failed? take another checkpoint"
            )
        return {"perplexity": math.exp(loss), "tokens": found.tokens}

    def _ids(self, document: Document) -> list[int] | str:
        if document.token_ids is None:
            return self.tokenizer.encode(document.text) or "the tokenizer makes nothing of its text"
        largest = int(document.token_ids.max())
        if largest >= self.tokenizer.vocab_size:
            return f"token id {largest} is outside the vocabulary of {self.tokenizer.vocab_size}"
        return document.token_ids.tolist()


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
    refuse_diffusion(model, "data score", "titan-yulan eval --tasks FILE gives a bound for each text")
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
