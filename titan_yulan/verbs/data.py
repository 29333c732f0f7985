"""`titan-yulan data` and `tokenizer`: from text to sources."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from titan_yulan.verbs.common import add_config_option, add_verb, planned


def add(verbs: Any) -> None:
    """The verbs data, tokenizer."""
    tokenizer = verbs.add_parser("tokenizer", help="train a vocabulary").add_subparsers(metavar="VERB", required=True)
    train_bpe = add_verb(tokenizer, "train", "train a byte-level BPE into tiktoken's format", _tokenizer_train)
    train_bpe.add_argument("inputs", nargs="+", metavar="INPUT", help="files, globs or builtin:code|math|prose|chat")
    train_bpe.add_argument("--vocab-size", type=int, required=True, help="entries, the end-of-text token included")
    train_bpe.add_argument("--output", required=True)

    data = verbs.add_parser("data", help="prepare and look at data").add_subparsers(metavar="VERB", required=True)
    prepare = add_verb(data, "prepare", "turn text into a source", _data_prepare)
    prepare.add_argument("inputs", nargs="+", metavar="INPUT", help="files, globs or builtin:code|math|prose|chat")
    prepare.add_argument("--name", required=True)
    prepare.add_argument(
        "--tokenizer", required=True, help="tiktoken vocabulary file, or a tokenizer.json or its folder"
    )
    prepare.add_argument("--output", required=True)
    prepare.add_argument("--validation-output", help="folder of the held-out part")
    prepare.add_argument("--validation-share", type=float, default=0.0)
    prepare.add_argument(
        "--order",
        default="shuffle",
        help="shuffle; keep: as in the input; COLUMN: from low to high by a column; --order=-COLUMN: from high to low",
    )
    prepare.add_argument("--split-by", default="", metavar="COLUMN", help="a source for each value, below --output")
    prepare.add_argument("--minimum-tokens", type=int, default=20, metavar="N", help="leave out shorter documents")
    prepare.add_argument("--deduplicate", action="store_true", help="keep the first of equal documents")
    prepare.add_argument("--max-documents", type=_count, metavar="N", help="only the first N documents, after filters")
    prepare.add_argument("--max-tokens", type=_count, metavar="N", help="only up to the document that reaches N tokens")
    prepare.add_argument("--part", type=_part, metavar="I/N", help="tokenise the I-th of N parts, for 'data merge'")
    prepare.add_argument("--on-bad-row", choices=("skip", "fail"), default="skip")
    prepare.add_argument("--workers", type=int, help="processes (default: one per core)")
    prepare.add_argument("--seed", type=int, default=0)
    merge = add_verb(data, "merge", "assemble the parts that 'data prepare --part' made", _data_merge)
    merge.add_argument("output", help="the --output of the parts")
    merge.add_argument("--workers", type=int, help="processes (default: one per core)")
    inspect = add_verb(data, "inspect", "counts, hashes and first documents of a source", _data_inspect)
    inspect.add_argument("folder")
    inspect.add_argument("--tokenizer", help="vocabulary file, to show text instead of ids")
    show = add_verb(data, "show", "the text that a step is trained on", _data_show)
    add_config_option(show)
    show.add_argument("--step", type=int, required=True, help="step of the run, from 1")
    show.add_argument("--rows", type=int, default=4, help="rows to print")
    stream = add_verb(data, "stream", "source, tape position and fingerprint of rows, as JSON lines", _data_stream)
    add_config_option(stream)
    stream.add_argument("--phase", help="name of the phase (default: the first that the file trains)")
    stream.add_argument("--from-row", type=int, default=0, help="first row, counted in the phase")
    stream.add_argument("--rows", type=int, required=True)
    stream.add_argument("--world", type=int, help="only the rows that rank --rank of this many reads")
    stream.add_argument("--rank", type=int)
    stream.add_argument("--batch", type=int, help="rows of a global batch (default: the phase's)")
    _annotation_verbs(data)


def _annotation_verbs(data: Any) -> None:
    score = add_verb(data, "score", "write the perplexity of every document under a trained model", _data_score)
    score.add_argument("--run", required=True, help="run folder, checkpoint folder, or Hugging Face Llama folder")
    score.add_argument("--context", type=int, metavar="N", help="tokens of a window (default: as it was trained)")
    score.add_argument("--batch-tokens", type=int, default=16384, metavar="N", help="tokens computed at a time")
    score.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    label = data.add_parser("label", help="give every document a topic").add_subparsers(metavar="VERB", required=True)
    train = add_verb(label, "train", "train a small classifier on rows that have a topic", _data_label_train)
    train.add_argument("inputs", nargs="+", metavar="FILE", help="JSONL or Parquet with text and topic")
    train.add_argument("--output", required=True, help="file of the classifier")
    train.add_argument("--column", default="topic", help="the column that holds the topic")
    train.add_argument("--held-out-share", type=float, default=0.1)
    train.add_argument("--epochs", type=int, default=5)
    train.add_argument("--seed", type=int, default=0)
    apply = add_verb(label, "apply", "write the topic of every document", _data_label_apply)
    apply.add_argument("--model", required=True, help="file of the classifier")
    apply.add_argument("--minimum-probability", type=float, default=0.0, metavar="P", help="less likely: 'others'")
    apply.add_argument("--workers", type=int, help="processes (default: one per core)")
    for verb in (score, apply):
        verb.add_argument(
            "inputs", nargs="+", metavar="INPUT", help="files, folders, globs or builtin:code|math|prose|chat"
        )
        verb.add_argument("--output", required=True, help="folder for the same files with more columns")
        verb.add_argument("--on-bad-row", choices=("skip", "fail"), default="skip")


def _tokenizer_train(options: argparse.Namespace) -> None:
    from titan_yulan.data.train_tokenizer import train_tokenizer

    train_tokenizer([options.inputs], options.output, options.vocab_size)


def _data_prepare(options: argparse.Namespace) -> None:
    from titan_yulan.data.prepare import prepare
    from titan_yulan.data.tokenizer import Tokenizer

    report = prepare(
        options.name,
        options.inputs,
        options.output,
        Tokenizer.load(options.tokenizer),
        validation_output=options.validation_output,
        validation_share=options.validation_share,
        order=options.order,
        split_by=options.split_by,
        minimum_tokens=options.minimum_tokens,
        deduplicate=options.deduplicate,
        max_documents=options.max_documents,
        max_tokens=options.max_tokens,
        part=options.part,
        workers=options.workers,
        on_bad_row=options.on_bad_row,
        seed=options.seed,
    )
    print("\n".join(report.lines()))


def _count(text: str) -> int:
    from titan_yulan.config.values import Tokens

    try:
        return int(Tokens.parse(text).value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, such as 208931 or 100M") from None


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 2/4")
    return int(part), int(parts)


def _data_merge(options: argparse.Namespace) -> None:
    from titan_yulan.data.prepare import merge

    print("\n".join(merge(options.output, workers=options.workers).lines()))


def _data_inspect(options: argparse.Namespace) -> None:
    from titan_yulan.data.inspect import inspect_source
    from titan_yulan.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    print("\n".join(inspect_source(options.folder, tokenizer=tokenizer)))


def _data_show(options: argparse.Namespace) -> None:
    from titan_yulan.curriculum.browse import show_step

    for line in show_step(planned(options), options.step, options.rows):
        print(line)


def _data_stream(options: argparse.Namespace) -> None:
    from titan_yulan.curriculum.browse import stream_rows

    for line in stream_rows(
        planned(options), options.phase, options.from_row, options.rows, options.world, options.rank, options.batch
    ):
        print(line)


def _data_score(options: argparse.Namespace) -> None:
    from titan_yulan.eval.score import score

    score(
        Path(options.run),
        options.inputs,
        Path(options.output),
        context=options.context,
        batch_tokens=options.batch_tokens,
        device=options.device,
        on_bad_row=options.on_bad_row,
    )


def _data_label_train(options: argparse.Namespace) -> None:
    from titan_yulan.data import label

    label.train(
        options.inputs,
        Path(options.output),
        column=options.column,
        held_out_share=options.held_out_share,
        epochs=options.epochs,
        seed=options.seed,
    )


def _data_label_apply(options: argparse.Namespace) -> None:
    from titan_yulan.data import label

    label.apply(
        Path(options.model),
        options.inputs,
        Path(options.output),
        minimum_probability=options.minimum_probability,
        workers=options.workers,
        on_bad_row=options.on_bad_row,
    )
