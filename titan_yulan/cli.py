"""`titan-yulan`: one sub-command per verb. Arguments only; a verb imports what it needs when it is called."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from titan_yulan.errors import UserError
from titan_yulan.verbs import checkpoints, data, models, runs, scaling, sweep


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
    trains = options.verb is runs.start_training
    try:
        return options.verb(options) or 0
    except UserError as error:
        if options.debug:
            traceback.print_exc()
        print(f"ERROR: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return 1 if trains else 0  # the reader of a listing may have seen enough
    except OSError as error:
        if options.debug:
            traceback.print_exc()
        print(f"ERROR: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted before anything was started" if trains else "interrupted", file=sys.stderr)
        return 75 if trains else 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="titan-yulan", description="Pre-train Llama-style models through curriculum phases."
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    for group in (runs, sweep, data, checkpoints, models, scaling):
        group.add(verbs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
