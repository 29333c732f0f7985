"""What the verbs have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titan_yulan.config import Loaded
    from titan_yulan.curriculum.plan import Plan

ROOT = Path(__file__).resolve().parents[2]


def add_verb(
    verbs: Any, name: str, text: str, function: Callable[[argparse.Namespace], Any]
) -> argparse.ArgumentParser:
    """Add a verb to those of `add_subparsers`; `function` gets the options, and returns an exit code or None for 0."""
    parser = verbs.add_parser(name, help=text, description=text)
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.set_defaults(verb=function)
    return parser


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """Let a verb read a configuration: `--config`, and `--section.key=value`."""
    parser.add_argument("--config", default="debug.toml", help="file, or a bare name below train_configs/")
    parser.set_defaults(takes_keys=True)


def load(options: argparse.Namespace, name: str) -> Loaded:
    """The configuration in the file `name`, with the keys of the command line.

    Raises:
        UserError: it has mistakes.
    """
    from titan_yulan import config

    return config.load(config.find(name, ROOT), options.overrides)


def planned(options: argparse.Namespace) -> Plan:
    """The plan of the run as it is: it may have begun from another run's checkpoint."""
    from titan_yulan.checkpoint.layout import newest_readable
    from titan_yulan.checkpoint.resume import make_plan, run_folder

    config = load(options, options.config).config
    checkpoint, start = newest_readable(run_folder(config) / "checkpoints", print), config.phases[0].start_from
    if checkpoint is None and start and not Path(start).exists():
        print(f"phase.start_from: there is no {start} yet; planned from step 0, as from a Hugging Face folder")
    return make_plan(config, checkpoint)
