"""`titan-yulan`: one sub-command per verb. Argument parsing only; a verb imports what it needs when it is called."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from titan_yulan.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (2: the request or its files are wrong, 1: failed while running)."""
    parser = _parser()
    # keys of the configuration (--section.key=value) are not options of argparse
    given = list(sys.argv[1:] if arguments is None else arguments)
    overrides = [text for text in given if text.startswith("--") and "." in text.split("=")[0]]
    options = parser.parse_args([text for text in given if text not in overrides])
    if overrides and not getattr(options, "takes_keys", False):
        parser.error(f"unknown argument {overrides[0]!r}: this verb reads no configuration")
    options.overrides = overrides
    try:
        return options.verb(options) or 0
    except UserError as error:
        if options.debug:
            traceback.print_exc()
        print(f"ERROR: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return 1 if options.verb is _train else 0  # the reader of a listing may have seen enough
    except OSError as error:
        if options.debug:
            traceback.print_exc()
        print(f"ERROR: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted before anything was started" if options.verb is _train else "interrupted", file=sys.stderr)
        return 75 if options.verb is _train else 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="titan-yulan", description="Pre-train Llama-style models through curriculum phases."
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    train = _verb(verbs, "train", "check, prepare, and train to the end (what ./run_train.sh runs)", _train)
    _config_option(train)
    train.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="resume although KEY changed")

    plan = _verb(verbs, "plan", "what every phase will read, how fast it learns, how it lies on the GPUs", _show_plan)
    plan.add_argument("config", nargs="?", default="debug.toml", metavar="FILE", help="as for train --config")
    plan.add_argument("--gpus", type=int, metavar="N", help="ranks of the run")
    plan.add_argument("--warn-share", type=float, default=0.05, help="warn where neighbouring mixes differ by more")
    plan.add_argument("--top", type=int, default=8, metavar="N", help="sources to show for each phase; 0: all")
    plan.set_defaults(takes_keys=True)

    config = verbs.add_parser("config", help="read, check and compare configurations").add_subparsers(
        metavar="VERB", required=True
    )
    for name, text, verb in (
        ("show", "print the resolved configuration, with where each value comes from", _config_show),
        ("check", "report every mistake", _config_check),
    ):
        show = _verb(config, name, text, verb)
        show.add_argument("file", nargs="?", default="debug.toml")
        show.set_defaults(takes_keys=True)
    diff = _verb(config, "diff", "what differs between two resolved configurations", _config_diff)
    diff.add_argument("first")
    diff.add_argument("second")
    _verb(config, "schema", "print the JSON Schema of configuration files", _config_schema)

    tokenizer = verbs.add_parser("tokenizer", help="train a vocabulary").add_subparsers(metavar="VERB", required=True)
    train_bpe = _verb(tokenizer, "train", "train a byte-level BPE into tiktoken's format", _tokenizer_train)
    train_bpe.add_argument("inputs", nargs="+", metavar="INPUT", help="files, globs or builtin:code|math|prose|chat")
    train_bpe.add_argument("--vocab-size", type=int, required=True, help="entries, the end-of-text token included")
    train_bpe.add_argument("--output", required=True)

    _data_verbs(verbs)

    _checkpoint_verbs(verbs)

    picture = _verb(verbs, "plot", "draw a run: learning rate, loss of every source, mixture", _draw)
    picture.add_argument("run", help="run folder")
    picture.add_argument("--output", metavar="FILE", help=".png, .svg or .pdf (default: curves.png in the run folder)")

    _eval_verb(verbs)

    _generate_verb(verbs)
    return parser


def _data_verbs(verbs) -> None:
    data = verbs.add_parser("data", help="prepare and look at data").add_subparsers(metavar="VERB", required=True)
    prepare = _verb(data, "prepare", "turn text into a source", _data_prepare)
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
    prepare.add_argument("--part", type=_part, metavar="I/N", help="tokenise the I-th of N parts, for 'data merge'")
    prepare.add_argument("--on-bad-row", choices=("skip", "fail"), default="skip")
    prepare.add_argument("--workers", type=int, help="processes (default: one per core)")
    prepare.add_argument("--seed", type=int, default=0)
    merge = _verb(data, "merge", "assemble the parts that 'data prepare --part' made", _data_merge)
    merge.add_argument("output", help="the --output of the parts")
    merge.add_argument("--workers", type=int, help="processes (default: one per core)")
    inspect = _verb(data, "inspect", "counts, hashes and first documents of a source", _data_inspect)
    inspect.add_argument("folder")
    inspect.add_argument("--tokenizer", help="vocabulary file, to show text instead of ids")
    show = _verb(data, "show", "the text that a step is trained on", _data_show)
    _config_option(show)
    show.add_argument("--step", type=int, required=True, help="step of the run, from 1")
    show.add_argument("--rows", type=int, default=4, help="rows to print")
    stream = _verb(data, "stream", "source, tape position and fingerprint of rows, as JSON lines", _data_stream)
    _config_option(stream)
    stream.add_argument("--phase", help="name of the phase (default: the first that the file trains)")
    stream.add_argument("--from-row", type=int, default=0, help="first row, counted in the phase")
    stream.add_argument("--rows", type=int, required=True)
    stream.add_argument("--world", type=int, help="only the rows that rank --rank of this many reads")
    stream.add_argument("--rank", type=int)
    stream.add_argument("--batch", type=int, help="rows of a global batch (default: the phase's)")
    _annotation_verbs(data)


def _annotation_verbs(data) -> None:
    score = _verb(data, "score", "write the perplexity of every document under a trained model", _data_score)
    score.add_argument("--run", required=True, help="run folder, checkpoint folder, or Hugging Face Llama folder")
    score.add_argument("--context", type=int, metavar="N", help="tokens of a window (default: as it was trained)")
    score.add_argument("--batch-tokens", type=int, default=16384, metavar="N", help="tokens computed at a time")
    score.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    label = data.add_parser("label", help="give every document a topic").add_subparsers(metavar="VERB", required=True)
    train = _verb(label, "train", "train a small classifier on rows that have a topic", _data_label_train)
    train.add_argument("inputs", nargs="+", metavar="FILE", help="JSONL or Parquet with text and topic")
    train.add_argument("--output", required=True, help="file of the classifier")
    train.add_argument("--column", default="topic", help="the column that holds the topic")
    train.add_argument("--held-out-share", type=float, default=0.1)
    train.add_argument("--epochs", type=int, default=5)
    train.add_argument("--seed", type=int, default=0)
    apply = _verb(label, "apply", "write the topic of every document", _data_label_apply)
    apply.add_argument("--model", required=True, help="file of the classifier")
    apply.add_argument("--minimum-probability", type=float, default=0.0, metavar="P", help="less likely: 'others'")
    apply.add_argument("--workers", type=int, help="processes (default: one per core)")
    for verb in (score, apply):
        verb.add_argument(
            "inputs", nargs="+", metavar="INPUT", help="files, folders, globs or builtin:code|math|prose|chat"
        )
        verb.add_argument("--output", required=True, help="folder for the same files with more columns")
        verb.add_argument("--on-bad-row", choices=("skip", "fail"), default="skip")


def _checkpoint_verbs(verbs) -> None:
    checkpoint = verbs.add_parser(
        "checkpoint", help="list, verify, measure, compare and delete checkpoints"
    ).add_subparsers(metavar="VERB", required=True)
    for name, text, verb in (
        ("list", "the complete checkpoints of a run", _checkpoint_list),
        ("verify", "compare every file with its hash", _checkpoint_verify),
    ):
        _verb(checkpoint, name, text, verb).add_argument("folder", help="run folder or checkpoint folder")
    bring = _verb(
        checkpoint, "import", "a folder of Hugging Face or DeepSpeed as a checkpoint of ours", _checkpoint_import
    )
    bring.add_argument("--from", required=True, dest="source", metavar="DIR", help="config.json with weights or states")
    _config_option(bring)
    bring.add_argument("--output", required=True, metavar="RUN", help="run folder to make")
    bring.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="import although KEY differs")
    diff = _verb(
        checkpoint, "diff", "what differs between two checkpoints: configuration, state, tensors", _checkpoint_diff
    )
    diff.add_argument("first", help="checkpoint folder, or run folder (its newest)")
    diff.add_argument("second")
    stats = _verb(checkpoint, "stats", "size of every tensor, and how far it moved over a series", _checkpoint_stats)
    stats.add_argument(
        "folders", nargs="+", metavar="DIR", help="checkpoint folders, or run folders with all of theirs"
    )
    stats.add_argument("--csv", metavar="FILE", help="every number of every tensor")
    stats.add_argument("--plot", metavar="FILE", help=".png, .svg or .pdf")
    export = _verb(checkpoint, "export", "write a Hugging Face folder: a Llama, or YuLan-Mini's format", _export)
    which = export.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", metavar="DIR", help="run folder: its newest checkpoint")
    which.add_argument("--checkpoint", metavar="DIR", help="checkpoint folder")
    export.add_argument("--format", required=True, choices=("llama", "yulan"))
    export.add_argument("--output", required=True, metavar="DIR", help="the folder to make")
    export.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    export.add_argument("--shard-size", default="5GB", metavar="SIZE", help="largest size of one file (default: 5GB)")
    export.add_argument("--with-optimizer", action="store_true", help="yulan in float32: Adam's moments too")
    export.add_argument("--no-verify", action="store_true", help="do not load the result and compare it")
    prune = _verb(
        checkpoint, "prune", "delete all but the newest checkpoints and the ends of phases", _checkpoint_prune
    )
    prune.add_argument("folder", help="run folder")
    prune.add_argument("--keep", type=int, required=True, metavar="N", help="newest sound checkpoints to keep")
    prune.add_argument("--yes", action="store_true", help="delete; without it, only say what would be deleted")


def _eval_verb(verbs) -> None:
    evaluate = _verb(verbs, "eval", "benchmarks, perplexity and bits per byte of a model or of a run's phases", _eval)
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
    evaluate.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    evaluate.add_argument("--precision", choices=("float32", "bfloat16"), help="default: the model's own")


def _generate_verb(verbs) -> None:
    generate = _verb(verbs, "generate", "continue texts with a model, shown while they are written", _generate)
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
    generate.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    generate.add_argument("--precision", choices=("float32", "bfloat16"), help="default: the model's own")


def _verb(verbs, name: str, text: str, function) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text, description=text)
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.set_defaults(verb=function)
    return parser


def _config_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="debug.toml", help="file, or a bare name below train_configs/")
    parser.set_defaults(takes_keys=True)


def _load(options: argparse.Namespace, name: str):
    from titan_yulan import config

    return config.load(config.find(name, ROOT), options.overrides)


def _plan(options: argparse.Namespace):
    """The plan of the run as it is: it may have begun from another run's checkpoint."""
    from titan_yulan.checkpoint.layout import newest_readable
    from titan_yulan.checkpoint.resume import make_plan, run_folder

    config = _load(options, options.config).config
    checkpoint, start = newest_readable(run_folder(config) / "checkpoints", print), config.phases[0].start_from
    if checkpoint is None and start and not Path(start).exists():
        print(f"phase.start_from: there is no {start} yet; planned from step 0, as from a Hugging Face folder")
    return make_plan(config, checkpoint)


def _train(options: argparse.Namespace) -> int:
    from titan_yulan.launch import launch

    return launch(options.config, options.overrides, options.allow_change, options.debug)


def _show_plan(options: argparse.Namespace) -> None:
    from titan_yulan.plan.curriculum import forecast
    from titan_yulan.plan.picture import plan_lines
    from titan_yulan.plan.sources import prepared_tokens

    for name in ("gpus", "top", "warn_share"):
        value, least = getattr(options, name), 1 if name == "gpus" else 0
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: at least {least}")
    plan = _plan(options)
    forecasts = forecast(plan, prepared_tokens(plan.config), options.gpus)
    for line in plan_lines(plan, forecasts, options.gpus, options.warn_share, options.top):
        print(line)


def _config_show(options: argparse.Namespace) -> None:
    from titan_yulan import config

    print(config.show(_load(options, options.file)))


def _config_check(options: argparse.Namespace) -> None:
    _load(options, options.file)
    print(f"{options.file}: correct")


def _config_diff(options: argparse.Namespace) -> int:
    from titan_yulan import config

    differences = config.diff(_load(options, options.first).config, _load(options, options.second).config)
    for difference in differences:
        print(difference)
    return 1 if differences else 0


def _config_schema(options: argparse.Namespace) -> None:
    import json

    from titan_yulan import config

    print(json.dumps(config.schema(), indent=2))


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
        part=options.part,
        workers=options.workers,
        on_bad_row=options.on_bad_row,
        seed=options.seed,
    )
    print("\n".join(report.lines()))


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
    )
    if options.against and not options.series:
        raise UserError("--against goes with --series")
    if options.series:
        evaluate_series(Path(options.series), settings, Path(options.against) if options.against else None)
    else:
        evaluate(Path(options.run), settings)


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

    for line in show_step(_plan(options), options.step, options.rows):
        print(line)


def _data_stream(options: argparse.Namespace) -> None:
    from titan_yulan.curriculum.browse import stream_rows

    for line in stream_rows(
        _plan(options), options.phase, options.from_row, options.rows, options.world, options.rank, options.batch
    ):
        print(line)


def _checkpoint_list(options: argparse.Namespace) -> None:
    from titan_yulan.checkpoint.report import list_checkpoints

    print("\n".join(list_checkpoints(Path(options.folder))))


def _checkpoint_verify(options: argparse.Namespace) -> int:
    from titan_yulan.checkpoint.report import verify_checkpoints

    lines, sound = verify_checkpoints(Path(options.folder))
    print("\n".join(lines))
    return 0 if sound else 1


def _checkpoint_import(options: argparse.Namespace) -> None:
    from titan_yulan.checkpoint.importing import import_checkpoint

    config = _load(options, options.config).config
    import_checkpoint(Path(options.source), config, Path(options.output), allow_changes=options.allow_change)


def _checkpoint_diff(options: argparse.Namespace) -> int:
    from titan_yulan.checkpoint.diff import diff_checkpoints

    differs = False
    for line in diff_checkpoints(Path(options.first), Path(options.second)):
        print(line)
        differs = True
    return 1 if differs else 0


def _checkpoint_stats(options: argparse.Namespace) -> None:
    from titan_yulan.checkpoint.stats import find_series, measure, table, write_csv

    measured = list(measure(find_series([Path(folder) for folder in options.folders])))
    if options.csv:
        write_csv(Path(options.csv), measured)
    if options.plot:
        from titan_yulan.checkpoint.stats_plot import plot_stats

        plot_stats(measured, Path(options.plot))
    print("\n".join(table(measured)))


def _export(options: argparse.Namespace) -> None:
    from titan_yulan.checkpoint.export import export

    export(
        Path(options.run or options.checkpoint),
        Path(options.output),
        options.format,
        dtype=options.dtype,
        shard_size=options.shard_size,
        with_optimizer=options.with_optimizer,
        verify=not options.no_verify,
    )


def _checkpoint_prune(options: argparse.Namespace) -> None:
    from titan_yulan.checkpoint.report import prune_checkpoints

    print("\n".join(prune_checkpoints(Path(options.folder), options.keep, delete=options.yes)))


def _draw(options: argparse.Namespace) -> None:
    from titan_yulan.monitor.plot import plot

    print(plot(Path(options.run), Path(options.output) if options.output else None))


def _generate(options: argparse.Namespace) -> None:
    from titan_yulan.eval.continue_texts import Settings, continue_texts, read_prompts
    from titan_yulan.eval.sampling import Sampling

    settings = Settings(
        Sampling(options.temperature, options.top_k, options.top_p, options.seed),
        new_tokens=options.new_tokens,
        context=options.context,
        batch_tokens=options.batch_tokens,
        device=options.device,
        precision=options.precision,
    )
    prompts = read_prompts(options.prompt, Path(options.prompts) if options.prompts else None)
    continue_texts(Path(options.run), prompts, settings)


if __name__ == "__main__":
    sys.exit(main())
