"""`titan-yulan eval` and `generate`: what a model can do."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from titan_yulan.errors import UserError
from titan_yulan.verbs.common import add_verb


def add(verbs: Any) -> None:
    """The verbs eval, generate."""
    _eval_verb(verbs)
    _generate_verb(verbs)


def _eval_verb(verbs: Any) -> None:
    evaluate = add_verb(
        verbs, "eval", "benchmarks, perplexity and bits per byte of a model or of a run's phases", _eval
    )
    model = evaluate.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--run", "--checkpoint", metavar="DIR", help="run folder, checkpoint folder, or Hugging Face Llama folder"
    )
    model.add_argument("--series", metavar="RUN", help="the ends of all phases that a run folder has kept")
    evaluate.add_argument("--against", metavar="DIR", help="with --series: the model that the phases are compared with")
    evaluate.add_argument(
        "--tasks", required=True, metavar="NAME,...", help="tasks, held_out, files of requests or of text"
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="only the first N requests of each task")
    evaluate.add_argument("--requests", metavar="DIR", help="folder in which NAME.jsonl is looked for first")
    evaluate.add_argument("--output", metavar="DIR", help="folder for evaluation.json, evaluation.md and items.jsonl")
    evaluate.add_argument("--context", type=int, metavar="N", help="tokens of a row (default: as it was trained)")
    evaluate.add_argument("--batch-tokens", type=int, default=16384, metavar="N", help="tokens computed at a time")
    evaluate.add_argument("--max-new-tokens", type=int, metavar="N", help="write at most so many, whatever is asked")
    evaluate.add_argument("--execute-code", action="store_true", help="run the programs that the model writes")
    evaluate.add_argument(
        "--likelihood",
        choices=("left-to-right", "bound"),
        help="of answers, under masked diffusion (default: left-to-right, which has no noise)",
    )
    evaluate.add_argument(
        "--samples", type=int, metavar="N", help="masked diffusion: passes for a bound, of texts too (default: 32)"
    )
    evaluate.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    evaluate.add_argument("--precision", choices=("float32", "bfloat16"), help="default: the model's own")


def _generate_verb(verbs: Any) -> None:
    generate = add_verb(verbs, "generate", "continue texts with a model, shown while they are written", _generate)
    generate.add_argument(
        "--run",
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="run folder, checkpoint folder, or Hugging Face Llama folder",
    )
    generate.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="can be given more than once")
    generate.add_argument("--prompts", metavar="FILE", help="more of them, one a line")
    generate.add_argument("--new-tokens", type=int, default=100, metavar="N", help="write at most so many")
    generate.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    generate.add_argument("--top-k", type=int, default=40, metavar="N", help="draw from the N likeliest; 0: from all")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest making up P")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--context", type=int, metavar="N", help="tokens of prompt and text (default: as trained)")
    generate.add_argument("--batch-tokens", type=int, default=16384, metavar="N", help="tokens computed at a time")
    generate.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="masked diffusion: forward passes of a text (default: one a token)",
    )
    generate.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    generate.add_argument("--precision", choices=("float32", "bfloat16"), help="default: the model's own")


def _eval(options: argparse.Namespace) -> None:
    from titan_yulan.eval.evaluation import Settings, evaluate, evaluate_series

    settings = Settings(
        tasks=tuple(name for name in options.tasks.split(",") if name),
        limit=options.limit,
        requests=Path(options.requests) if options.requests else None,
        output=Path(options.output) if options.output else None,
        context=options.context,
        batch_tokens=options.batch_tokens,
        max_new_tokens=options.max_new_tokens,
        execute_code=options.execute_code,
        device=options.device,
        precision=options.precision,
        likelihood=options.likelihood.replace("-", "_") if options.likelihood else None,
        samples=options.samples,
    )
    if options.against and not options.series:
        raise UserError("--against goes with --series")
    if options.series:
        evaluate_series(Path(options.series), settings, Path(options.against) if options.against else None)
    else:
        evaluate(Path(options.run), settings)


def _generate(options: argparse.Namespace) -> None:
    from titan_yulan.eval.continue_texts import Settings, continue_texts, read_prompts
    from titan_yulan.eval.sampling import Sampling

    settings = Settings(
        Sampling(options.temperature, options.top_k, options.top_p, options.seed),
        new_tokens=options.new_tokens,
        context=options.context,
        batch_tokens=options.batch_tokens,
        steps=options.steps,
        device=options.device,
        precision=options.precision,
    )
    prompts = read_prompts(options.prompt, Path(options.prompts) if options.prompts else None)
    continue_texts(Path(options.run), prompts, settings)
