"""`titan-yulan generate`: continue texts with a trained model, shown while they are written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from titan_yulan.errors import UserError
from titan_yulan.eval.batches import batches_of
from titan_yulan.eval.generate import Continuation, Speed
from titan_yulan.eval.open_model import TrainedModel, in_precision, open_device, open_model
from titan_yulan.eval.sampling import Sampling
from titan_yulan.eval.text_stream import InOrder, TextStream
from titan_yulan.eval.unmask import writing


@dataclass(frozen=True)
class Settings:
    """What `titan-yulan generate` is asked for.

    context: tokens of prompt and continuation; None: as many as the model was trained with.
    batch_tokens: tokens of a batch, padding and what may be written included.
    steps: forward passes that fill a text, of a model of masked diffusion; None: one for each token.
    precision: float32 or bfloat16; None: the model's own.
    """

    sampling: Sampling
    new_tokens: int = 100
    context: int | None = None
    batch_tokens: int = 16384
    steps: int | None = None
    device: str | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        for name in ("new_tokens", "context", "batch_tokens", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: at least 1")


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the command line and then those of a file, one a line; empty lines are left out.

    Raises:
        UserError: there is none, or one is empty or no Unicode, or the file cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n") if file else []
        "".join(given).encode()
    except UnicodeError as error:
        raise UserError(f"{file if isinstance(error, UnicodeDecodeError) else '--prompt'} is not UTF-8") from None
    prompts = [*given, *(line.removesuffix("\r") for line in lines if line.strip())]
    if not prompts or "" in given:
        raise UserError("there is nothing to continue: give a text with --prompt, or a file of them with --prompts")
    return prompts


def continue_texts(
    path: Path,
    prompts: Sequence[str],
    settings: Settings,
    write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> list[Continuation]:
    """Write each prompt with its continuation, in the order of the prompts, while they are drawn; of masked diffusion
    what no hidden token stands before.

    Args:
        path: run folder (its newest checkpoint), checkpoint folder, or Hugging Face folder.
        write: gets the text; more prompts than one are written below a line with their number.
        say: gets the lines that are about the texts.

    Raises:
        UserError: the model cannot be opened or does not write in `steps`, or a prompt leaves no room in the context.
        RunError: the model is damaged.
    """
    place = open_device(settings.device)
    model = open_model(path)
    context = _context(model, settings)
    ids = [model.tokenizer.encode(prompt) for prompt in prompts]
    for number, prompt in enumerate(ids, start=1):
        if not 0 < len(prompt) < context:
            remedy = f" or raise --context (up to {model.longest})" if context < model.longest else ""
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens and the context {context}, which leaves nothing to write: "
                f"shorten it{remedy}"
                if prompt
                else f"prompt {number} has no tokens"
            )
    in_precision(model.decoder, getattr(torch, settings.precision or model.precision), place)
    many = len(prompts) > 1
    heads = [f"--- {i} of {len(prompts)} ---\n{text}" if many else text for i, text in enumerate(prompts, start=1)]
    found, speed = _write_all(model, ids, settings, context, InOrder(heads, write))
    full = sum(continuation.ending == "context" for continuation in found)
    if full:
        which = f"{full} of {len(found)} texts end" if many else "the text ends"
        say(f"{which} where the context of {context} tokens is full, before --new-tokens {settings.new_tokens}")
    say(_report(found, speed))
    return found


def _context(model: TrainedModel, settings: Settings) -> int:
    context = model.context if settings.context is None else settings.context
    if context > model.longest:
        raise UserError(f"--context must be at most {model.longest} for this model")
    return context


def _write_all(
    model: TrainedModel, prompts: Sequence[list[int]], settings: Settings, context: int, output: InOrder
) -> tuple[list[Continuation], Speed]:
    """Batches of prompts of similar length, one batch after the other."""
    found: dict[int, Continuation] = {}
    speed, write = Speed(), writing(model.mask_token_id, settings.steps)
    lengths = [len(prompt) for prompt in prompts]
    rooms = [min(settings.new_tokens, context - length) for length in lengths]
    for batch in batches_of(lengths, settings.batch_tokens, rooms):
        streams = [
            TextStream(model.tokenizer, prompts[i], lambda piece, i=i: output.add(i, piece))  # type: ignore[misc]
            for i in batch
        ]
        written = write(
            model.decoder,
            [prompts[i] for i in batch],
            settings.sampling,
            new_tokens=settings.new_tokens,
            context=context,
            eos_id=model.tokenizer.eos_id,
            vocab_size=model.tokenizer.vocab_size,
            goes_on=lambda row, ids, streams=streams: streams[row].add(ids[-1]) or True,
            speed=speed,
        )
        for i, stream, continuation in zip(batch, streams, written, strict=True):
            stream.close()
            output.close(i)
            found[i] = continuation
    return [found[i] for i in range(len(prompts))], speed


def _report(found: Sequence[Continuation], speed: Speed) -> str:
    total = sum(len(continuation.ids) for continuation in found)
    line = f"tokens: {speed.read:,} read in {speed.reading:.2f} s, {total:,} written"
    if speed.written:
        line += f", {speed.written / speed.writing:,.1f}/s after the first"
    return line
