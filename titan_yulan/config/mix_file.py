"""`mix = "FILE"`: the shares of a phase from a published recipe, a table of two columns, or a list of weighted paths.

    *.json   a data_mix recipe as YuLan-Mini publishes them: {"Number of Selected Tokens(B)": {PATH: BILLIONS}, ...}
    *.csv    PATH,AMOUNT a line; a first line with a word for an amount is a header; empty lines do not count
    *.txt    "WEIGHT PATH" "WEIGHT PATH" ... on one line or several, as Megatron's scripts read them

A PATH becomes the name of a source by `source_name`, of a .txt without the slash that it may begin with; an AMOUNT is
what a [phase.mix] table takes: a weight, such as the recipe's billions, or tokens as in "1.2B". Source of the first:
github.com/RUC-GSAI/YuLan-Mini.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titan_yulan.config.read import Node, Origin, dotted
from titan_yulan.errors import UserError

_SELECTED = "Number of Selected Tokens(B)"


def source_name(path: str) -> str:
    """The name of a source in the configuration and on disk, for its path in a recipe: `a/b c.d` is `a-b_c_d`."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", path.replace("/", "-"))


def read_mix(path: Path, label: str, asked_by: Origin) -> Node:
    """The table that a file stands for; every amount knows its line there.

    Args:
        path: the file.
        label: how errors call it.
        asked_by: the key `mix` that names it.

    Raises:
        UserError: the file is missing, of another kind or damaged, or names a source twice.
    """
    on_command_line = asked_by.where == f"--{asked_by.key}"
    where = asked_by.where if on_command_line else f"{asked_by.where}: {asked_by.key}"
    if path.suffix not in _READERS:
        raise UserError(
            f"{where}: {label} is no mix; allowed: a data_mix .json, a .csv of source and amount, or a .txt of quoted "
            "'weight path' pairs"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{where}: {label} cannot be read: {error.strerror} ({path})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {label} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    table: dict[str, Node] = {}
    for source, amount, line in _READERS[path.suffix](text, label):
        name = source_name(source)
        if name in table:
            other = table[name].origin.where
            raise UserError(f"{label}:{line}: {source!r} is the source {name!r}, as in {other}; join the lines")
        if isinstance(amount, bool) or not isinstance(amount, int | float | str):
            raise UserError(f"{label}:{line}: {source!r} has the amount {json.dumps(amount)[:40]}; needed: a number")
        table[name] = Node(amount, Origin(f"{label}:{line}", dotted((name,), asked_by.key), path, line))
    return Node(table, asked_by)


def _read_recipe(text: str, label: str) -> Iterator[tuple[str, Any, int]]:
    """(path, billions of tokens, line) of a data_mix recipe."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if repeated := [key for key in keys if keys.count(key) > 1][:1] if len(set(keys)) < len(keys) else []:
            raise UserError(f"{label}: {repeated[0]!r} stands twice in one table; join the lines")
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(f"{label}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from None
    selected = content.get(_SELECTED) if isinstance(content, dict) else None
    if not isinstance(selected, dict):
        raise UserError(f'{label}:1: no data_mix recipe; it has no table "{_SELECTED}"')
    place = max(0, text.find(json.dumps(_SELECTED)))
    for source, amount in selected.items():
        # keys come in the order of the file, so each stands after the one before
        spellings = (text.find(json.dumps(source, ensure_ascii=ascii), place) for ascii in (False, True))
        place = max(place, *spellings)
        yield source, amount, text.count("\n", 0, place) + 1


def _read_columns(text: str, label: str) -> Iterator[tuple[str, Any, int]]:
    """(path, amount, line) of a CSV; an amount that is no number stays text."""
    rows = csv.reader(text.splitlines(keepends=True), skipinitialspace=True)
    first = True
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != 2:
                raise UserError(f"{label}:{rows.line_num}: {len(row)} columns; needed: two, source and amount")
            source, amount = row[0].strip(), row[1].strip()
            number = _amount(amount)
            if not (first and amount and isinstance(number, str) and not re.search("[0-9]", amount)):
                yield source, number, rows.line_num
            first = False
    except csv.Error as error:
        raise UserError(f"{label}:{rows.line_num}: not CSV: {error}") from None


def _read_paths(text: str, label: str) -> Iterator[tuple[str, Any, int]]:
    """(path, weight, line) of a list of quoted pairs."""
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            pairs = shlex.split(line)
        except ValueError as error:
            raise UserError(f'{label}:{number}: {error}; needed: "weight path" pairs in quotes') from None
        for pair in pairs:
            weight, _, path = pair.strip().partition(" ")
            if not path.strip() or isinstance(_amount(weight), str):
                raise UserError(f'{label}:{number}: {pair!r} is no weight and path; needed: "0.3 data/web" in quotes')
            yield path.strip().lstrip("/"), _amount(weight), number


def _amount(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


_READERS = {".json": _read_recipe, ".csv": _read_columns, ".txt": _read_paths}
