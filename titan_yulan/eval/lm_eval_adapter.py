"""A model of ours for EleutherAI's lm-evaluation-harness, an optional package.

from lm_eval import simple_evaluate
from titan_yulan.eval.lm_eval_adapter import TitanYulan
simple_evaluate(model=TitanYulan("runs/yulan_mini"), tasks=["arc_easy"])
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from titan_yulan.errors import UserError
from titan_yulan.eval.diffusion import refuse_diffusion
from titan_yulan.eval.likelihood import Likelihoods, Span, encode_pair
from titan_yulan.eval.open_model import in_precision, open_device, open_model
from titan_yulan.eval.requests import DEFAULT_NEW_TOKENS, Generation
from titan_yulan.eval.write import Writer

try:
    from lm_eval.api.model import LM  # pyrefly: ignore[missing-import]
except ImportError as error:
    raise UserError("the package lm-eval is not installed: pip install 'titan-yulan[eval]'") from error

_LOG = logging.getLogger(__name__)


class TitanYulan(LM):
    """A run (its newest checkpoint), a checkpoint or a Hugging Face Llama folder, in one process."""

    def __init__(
        self,
        run: Path | str,
        context: int | None = None,
        batch_tokens: int = 16384,
        device: str | None = None,
        precision: str | None = None,
    ) -> None:
        """
        Args:
            context: tokens of a row, at most; None: as many as it was trained with.
            batch_tokens: tokens of a batch, padding included.
            precision: float32 or bfloat16; None: the model's own.

        Raises:
            UserError: the model cannot be opened, or is one of masked diffusion.
        """
        super().__init__()
        model = open_model(Path(run))
        refuse_diffusion(model, "lm-evaluation-harness", "evaluate it with titan-yulan eval")
        self.tokenizer, self.context = model.tokenizer, context or model.context
        decoder = in_precision(model.decoder, getattr(torch, precision or model.precision), open_device(device))
        self._likelihoods = Likelihoods(decoder, self.context, batch_tokens)
        self._writer = Writer(decoder, self.tokenizer, self.context, batch_tokens)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is the likeliest) for each (context, continuation)."""
        found = self._likelihoods([encode_pair(self.tokenizer, *request.args) for request in requests])
        self._tell_cuts("loglikelihood", [value.cut for value in found])
        return [(value.logprob, value.greedy is True) for value in found]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Log-likelihood of each whole text; that of a text without a token is 0, as in lm-eval's own hf model."""
        texts = [self.tokenizer.encode(request.args[0]) for request in requests]
        found = iter(self._likelihoods([Span([self.tokenizer.eos_id], ids) for ids in texts if ids]))
        return [next(found).logprob if ids else 0.0 for ids in texts]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """What is written after each context, up to a stop; sampling is refused.

        Raises:
            UserError: a request samples, or may write more than the model reads.
        """
        asked = []
        for number, request in enumerate(requests):
            context, options = request.args
            if options.get("do_sample") or options.get("temperature", 0.0) > 0:
                raise UserError("generate_until: only the likeliest token is taken; set do_sample: false in the task")
            until = options.get("until") or []
            stop = (until,) if isinstance(until, str) else tuple(until)
            tokens = options.get("max_gen_toks", DEFAULT_NEW_TOKENS)
            if tokens >= self.context:
                raise UserError(
                    f"generate_until: a request may write {tokens} tokens, and the model reads {self.context}: lower "
                    "max_gen_toks (generation_kwargs of the task, or gen_kwargs of the harness), or raise context if "
                    "the model can"
                )
            asked.append(Generation(str(number), context, stop, tokens))
        found = self._writer(asked)
        self._tell_cuts("generate_until", [written.cut for written in found])
        return [written.text for written in found]

    def _tell_cuts(self, what: str, cuts: Sequence[bool]) -> None:
        if any(cuts):
            _LOG.warning(
                "%s: %d of %d contexts are longer than the %d tokens that the model reads leave room for, and lost "
                "their first ones",
                what,
                sum(cuts),
                len(cuts),
                self.context,
            )
