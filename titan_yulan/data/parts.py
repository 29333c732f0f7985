"""Preparing divided over machines: each tokenises its groups of files into a folder of its own on a shared disk.

    OUTPUT.parts/part-2-of-4/recipe.json    the whole request, the same in every part
    OUTPUT.parts/part-2-of-4/units/         groups 1, 5, 9, ...

Group g (from 0) belongs to part g modulo n, plus 1. No two parts write the same file, so the machines need neither
locks nor clocks in common.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from titan_yulan.data.arrange import Units
from titan_yulan.data.request import Recipe, read_recipe, save_recipe
from titan_yulan.data.unit import finished_counts
from titan_yulan.errors import UserError

_NAME = re.compile(r"part-(\d+)-of-(\d+)")


def parts_folder(output: Path) -> Path:
    """Where machines that prepare parts of a source put them until they are merged."""
    return output.with_name(output.name + ".parts")


def own_units(part: tuple[int, int], units: int) -> range:
    """The groups of part i of n; every group belongs to one part."""
    return range(part[0] - 1, units, part[1])


def begin_part(output: Path, part: tuple[int, int], recipe: Recipe, validation_output: Path | None) -> Path:
    """The folder of a part, with its recipe in it.

    Raises:
        UserError: parts of another request, or of another division, are there.
    """
    parts = parts_folder(output)
    relative = os.path.relpath(validation_output, output.parent) if validation_output else None
    for number, others, there, validation in _recipes(output):
        if (others, there.fingerprint, validation) != (part[1], recipe.fingerprint, relative):
            raise UserError(
                f"{parts} holds part {number}/{others} of another request (other inputs, options, tokenizer, folders "
                "or number of parts): give all machines the same, or delete that folder"
            )
    folder = parts / f"part-{part[0]}-of-{part[1]}"
    save_recipe(folder / "recipe.json", recipe, validation_output=relative)
    return folder


@dataclass(frozen=True)
class Parts:
    """The parts of one request that are there."""

    folder: Path
    number: int  # of parts
    recipe: Recipe
    validation_output: Path | None

    def whole(self) -> Units:
        """All tokenised units.

        Raises:
            UserError: names the parts that are missing or unfinished.
        """
        folders = tuple(self.folder / f"part-{part}-of-{self.number}" / "units" for part in range(1, self.number + 1))
        counts = [finished_counts(folders[unit % self.number], unit) for unit in range(self.recipe.units)]
        missing = []
        for part in range(1, self.number + 1):
            own = own_units((part, self.number), self.recipe.units)
            done = sum(counts[unit] is not None for unit in own)
            if done < len(own):
                missing.append(f"{part}/{self.number} ({done} of {len(own)} groups of files done)")
        if missing:
            raise UserError(
                f"{self.folder} is not complete, missing: part {', part '.join(missing)}. Run 'data prepare' with "
                "these --part again (it goes on where it stopped), then merge"
            )
        return Units(self.recipe, folders, [unit for unit in counts if unit is not None])


def open_parts(output: Path) -> Parts:
    """The parts of a divided request, complete or not.

    Raises:
        UserError: there are none, or they do not belong together.
    """
    parts = parts_folder(output)
    recipes = _recipes(output)
    if not recipes:
        raise UserError(
            f"there is no part in {parts}: first run 'titan-yulan data prepare ... --output {output} --part i/n' "
            "for i = 1 to n"
        )
    if len({(number_of, recipe.fingerprint, validation) for _, number_of, recipe, validation in recipes}) > 1:
        found = ", ".join(f"{number}/{number_of}" for number, number_of, _, _ in recipes)
        raise UserError(f"{parts} holds parts of different requests ({found}): delete those that do not belong")
    _, number_of, recipe, validation_output = recipes[0]
    validation = output.parent / validation_output if validation_output else None
    return Parts(parts, number_of, recipe, validation)


def _recipes(output: Path) -> list[tuple[int, int, Recipe, str | None]]:
    """(part, number of parts, recipe, folder of the held-out part seen from that of the output) of each part there.

    Raises:
        UserError: one of them cannot be read.
    """
    found = []
    for folder in parts_folder(output).glob("part-*-of-*"):
        name, file = _NAME.fullmatch(folder.name), folder / "recipe.json"
        if name and file.exists():
            if (stored := read_recipe(file)) is None:
                raise UserError(f"{file} is damaged, or was made by another version of this program: delete {folder}")
            found.append((int(name[1]), int(name[2]), stored[0], stored[1]["validation_output"]))
    return sorted(found, key=lambda part: part[:2])
