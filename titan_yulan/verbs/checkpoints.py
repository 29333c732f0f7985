"""`titan-yulan checkpoint`: look at checkpoints, import, export and delete them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from titan_yulan.verbs.common import add_config_option, add_verb, load


def add(verbs: Any) -> None:
    """The verb checkpoint."""
    checkpoint = verbs.add_parser(
        "checkpoint", help="list, verify, measure, compare and delete checkpoints"
    ).add_subparsers(metavar="VERB", required=True)
    for name, text, verb in (
        ("list", "the complete checkpoints of a run", _checkpoint_list),
        ("verify", "compare every file with its hash", _checkpoint_verify),
    ):
        add_verb(checkpoint, name, text, verb).add_argument("folder", help="run folder or checkpoint folder")
    bring = add_verb(
        checkpoint, "import", "a folder of Hugging Face or DeepSpeed as a checkpoint of ours", _checkpoint_import
    )
    bring.add_argument("--from", required=True, dest="source", metavar="DIR", help="config.json with weights or states")
    add_config_option(bring)
    bring.add_argument("--output", required=True, metavar="RUN", help="run folder to make")
    bring.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="import although KEY differs")
    diff = add_verb(
        checkpoint, "diff", "what differs between two checkpoints: configuration, state, tensors", _checkpoint_diff
    )
    diff.add_argument("first", help="checkpoint folder, or run folder (its newest)")
    diff.add_argument("second")
    stats = add_verb(checkpoint, "stats", "size of every tensor, and how far it moved over a series", _checkpoint_stats)
    stats.add_argument(
        "folders", nargs="+", metavar="DIR", help="checkpoint folders, or run folders with all of theirs"
    )
    stats.add_argument("--csv", metavar="FILE", help="every number of every tensor")
    stats.add_argument("--plot", metavar="FILE", help=".png, .svg or .pdf")
    export = add_verb(checkpoint, "export", "write a Hugging Face folder: a Llama, or YuLan-Mini's format", _export)
    which = export.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", metavar="DIR", help="run folder: its newest checkpoint")
    which.add_argument("--checkpoint", metavar="DIR", help="checkpoint folder")
    export.add_argument("--format", required=True, choices=("llama", "yulan"))
    export.add_argument("--output", required=True, metavar="DIR", help="the folder to make")
    export.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    export.add_argument("--shard-size", default="5GB", metavar="SIZE", help="largest size of one file (default: 5GB)")
    export.add_argument("--with-optimizer", action="store_true", help="yulan in float32: Adam's moments too")
    export.add_argument("--no-verify", action="store_true", help="do not load the result and compare it")
    prune = add_verb(
        checkpoint, "prune", "delete all but the newest checkpoints and the ends of phases", _checkpoint_prune
    )
    prune.add_argument("folder", help="run folder")
    prune.add_argument("--keep", type=int, required=True, metavar="N", help="newest sound checkpoints to keep")
    prune.add_argument("--yes", action="store_true", help="delete; without it, only say what would be deleted")


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

    config = load(options, options.config).config
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
