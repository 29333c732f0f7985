"""`titan-yulan train`, `plan`, `plot`, `report` and `config`: runs and their configurations."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from titan_yulan.errors import UserError
from titan_yulan.verbs.common import add_config_option, add_verb, load, planned


def add(verbs: Any) -> None:
    """The verbs train, plan, plot, report, config."""
    train = add_verb(verbs, "train", "check, prepare, and train to the end (what ./run_train.sh runs)", start_training)
    add_config_option(train)
    train.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="resume although KEY changed")

    plan = add_verb(
        verbs, "plan", "what every phase will read, how fast it learns, how it lies on the GPUs", _show_plan
    )
    plan.add_argument("config", nargs="?", default="debug.toml", metavar="FILE", help="as for train --config")
    plan.add_argument("--gpus", type=int, metavar="N", help="ranks of the run")
    plan.add_argument("--device", metavar="NAME", help="forecast memory, time and traffic on N such GPUs, as h100")
    plan.add_argument("--phase", default="", metavar="NAME", help="with --device: of this phase alone")
    plan.add_argument(
        "--interconnect",
        default="",
        metavar="LINK,NETWORK[,NODE]",
        help="with --device: GB/s of a GPU in one direction, inside and between nodes; GPUs of a node",
    )
    plan.add_argument(
        "--assume", action="append", default=[], metavar="NAME=NUMBER", help="with --device: another number for it"
    )
    plan.add_argument(
        "--trace", action="store_true", help="with --device: run the model's code without numbers, and count"
    )
    plan.add_argument("--warn-share", type=float, default=0.05, help="warn where neighbouring mixes differ by more")
    plan.add_argument("--top", type=int, default=8, metavar="N", help="sources to show for each phase; 0: all")
    plan.set_defaults(takes_keys=True)

    picture = add_verb(verbs, "plot", "draw a run: learning rate, loss of every source, mixture", _draw)
    picture.add_argument("run", help="run folder")
    picture.add_argument("--output", metavar="FILE", help=".png, .svg or .pdf (default: curves.png in the run folder)")

    page = add_verb(verbs, "report", "a run as one HTML page: curves, events, benchmarks, configuration", _report)
    page.add_argument("run", help="run folder")
    page.add_argument("--output", metavar="FILE", help="file to write (default: report.html in the run folder)")

    config = verbs.add_parser("config", help="read, check and compare configurations").add_subparsers(
        metavar="VERB", required=True
    )
    for name, text, verb in (
        ("show", "print the resolved configuration, with where each value comes from", _config_show),
        ("check", "report every mistake", _config_check),
    ):
        show = add_verb(config, name, text, verb)
        show.add_argument("file", nargs="?", default="debug.toml")
        show.set_defaults(takes_keys=True)
    diff = add_verb(config, "diff", "what differs between two resolved configurations", _config_diff)
    diff.add_argument("first")
    diff.add_argument("second")
    add_verb(config, "schema", "print the JSON Schema of configuration files", _config_schema)


def start_training(options: argparse.Namespace) -> int:
    """Train as the options say; returns the exit code of the run (launch.py)."""
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
    if options.device is not None:
        _show_devices(options)
        return
    for name in ("phase", "interconnect", "assume", "trace"):
        if getattr(options, name):
            raise UserError(f"--{name} needs --device NAME, such as h100")
    plan = planned(options)
    forecasts = forecast(plan, prepared_tokens(plan.config), options.gpus)
    for line in plan_lines(plan, forecasts, options.gpus, options.warn_share, options.top):
        print(line)


def _show_devices(options: argparse.Namespace) -> None:
    from titan_yulan.plan.device_picture import device_lines, stages
    from titan_yulan.plan.devices import choose

    if options.gpus is None:
        raise UserError(f"--device {options.device} needs --gpus N")
    device, assumptions = choose(options.device, options.interconnect, options.assume)
    plan = planned(options)
    found = stages(plan, options.gpus, device, assumptions, options.phase)
    for line in device_lines(plan, found, options.gpus, device, assumptions):
        print(line)
    if options.trace:
        from titan_yulan.plan.trace_picture import trace_lines

        for stage in found:
            for line in trace_lines(plan.config, stage, options.gpus):
                print(line)


def _draw(options: argparse.Namespace) -> None:
    from titan_yulan.monitor.plot import plot

    print(plot(Path(options.run), Path(options.output) if options.output else None))


def _report(options: argparse.Namespace) -> None:
    from titan_yulan.monitor.report import report

    print(report(Path(options.run), Path(options.output) if options.output else None))


def _config_show(options: argparse.Namespace) -> None:
    from titan_yulan import config

    print(config.show(load(options, options.file)))


def _config_check(options: argparse.Namespace) -> None:
    load(options, options.file)
    print(f"{options.file}: correct")


def _config_diff(options: argparse.Namespace) -> int:
    from titan_yulan import config

    differences = config.diff(load(options, options.first).config, load(options, options.second).config)
    for difference in differences:
        print(difference)
    return 1 if differences else 0


def _config_schema(options: argparse.Namespace) -> None:
    import json

    from titan_yulan import config

    print(json.dumps(config.schema(), indent=2))
