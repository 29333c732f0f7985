"""Writes sources.toml, phase01.toml ... phase27.toml, phase26_4k.toml and curriculum.toml of this folder.

    python train_configs/yulan_mini/generate.py

`data_mix.csv` holds how many billion tokens each phase took from each source, as published: the recipes (data_mix) of
github.com/RUC-GSAI/YuLan-Mini, described in arXiv 2412.17743. `sources.csv` gives each source a domain (our grouping,
for the reader and for mini.toml). What is not in the recipes stands here: the step at which a phase ends, the learning
rate, the longer rows of the last two phases. `base.toml` and `mini.toml` are written by hand.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from titan_yulan.config.mix_file import source_name as key

FOLDER = Path(__file__).resolve().parent
DATA_ROOT = "data/yulan_mini"

# Phases by the name of their file, with the name of their recipe.
PHASES = {f"phase{number:02d}": f"{number:02d}" for number in range(1, 26)} | {
    "phase26": "26-28k",
    "phase27": "27-28k",
}
BRANCH = ("phase26_4k", "26-4k")  # the annealing with rows of 4,096 tokens, which begins where phase 26 begins

# Last step of some phases, from the published checkpoints. In between, steps go in proportion to the recipes' tokens.
BOUNDARIES = {"phase20": 194_526, "phase22": 213_995, "phase25": 243_198, "phase26": 253_006, "phase27": 262_772}

# gradient_checkpointing_step where it is known: the code's default, the configurations of the checkpoints of phases 21
# and 23, the script of phase 25, the configuration at 28K. A phase that is not named takes that of the one before.
RECOMPUTE_EVERY = {"phase01": 7, "phase21": 11, "phase25": 12, "phase26": 56, "phase26_4k": 12, "phase27": 56}

WARM_UP = """# 10 billion tokens are 2,422.03 steps
lr = [
    { shape = "linear", from = 0.0, to = 1.0, over = "2422 steps" },
    { shape = "constant" },
]
"""
ANNEALING = """# aimed at 0 after 19,000 steps and held 198 steps before: the last multiplier is 1 - sqrt(18802 / 19000)
lr = { shape = "1-sqrt", from = 1.0, to = 0.0, over = "19000 steps", hold_at = "18802 steps" }
"""
LONG_ROWS = """sequence_length = 28672
rope_theta = 490000.0
# a seventh of the rows, seven times as long: the same 4,128,768 tokens a step
batch = { global_batch_size = 144, micro_batch_size = 3 }
"""


def read_mixes() -> dict[str, dict[str, str]]:
    """Recipe -> source -> billions of tokens, digit by digit."""
    mixes: dict[str, dict[str, str]] = defaultdict(dict)
    with open(FOLDER / "data_mix.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            mixes[row["phase"]][row["source"]] = row["tokens_billion"]
    return dict(mixes)


def read_domains() -> dict[str, str]:
    """Source -> domain, in the order of the file."""
    with open(FOLDER / "sources.csv", encoding="utf-8", newline="") as file:
        return {row["source"]: row["domain"] for row in csv.DictReader(file)}


def phase_lengths(mixes: dict[str, dict[str, str]]) -> dict[str, int]:
    """Steps of every phase, so that the known boundaries hold exactly."""
    tokens = {name: total(mixes[recipe]) for name, recipe in PHASES.items()}
    lengths: dict[str, int] = {}
    waiting: list[str] = []
    begin = 0
    for name in PHASES:
        waiting.append(name)
        if name not in BOUNDARIES:
            continue
        stretch, all_tokens, done, sum_ = BOUNDARIES[name] - begin, Fraction(sum(tokens[n] for n in waiting)), 0, 0
        for member in waiting:
            sum_ += tokens[member]
            end = round(stretch * Fraction(sum_) / all_tokens)
            lengths[member], done = end - done, end
        begin, waiting = BOUNDARIES[name], []
    # the end of the 4K branch was not published: as many tokens a step as in the phases before it
    stable = sum(tokens[name] for name in PHASES if name <= "phase25")
    lengths[BRANCH[0]] = round(BOUNDARIES["phase25"] * Fraction(total(mixes[BRANCH[1]])) / Fraction(stable))
    return lengths


def total(mix: dict[str, str]) -> Decimal:
    """Billions of tokens of a recipe."""
    return sum((Decimal(amount) for amount in mix.values()), Decimal(0))


def sources_text(domains: dict[str, str]) -> str:
    """sources.toml: where every source is expected."""
    lines = [
        "# The sources of YuLan-Mini's recipes. Written by generate.py; the comments are their paths in the recipes.",
        f"# To keep them elsewhere, make {DATA_ROOT} a symbolic link.",
    ]
    for source in sorted(domains, key=key):
        lines += ["", f"[data.sources.{key(source)}] # {source}", f'path = "{DATA_ROOT}/{key(source)}"']
        lines.append(f'domain = "{domains[source]}"')
    return "\n".join(lines) + "\n"


def mix_text(mix: dict[str, str], domains: dict[str, str]) -> str:
    """[phase.mix], grouped by domain, largest first."""
    lines = [f"[phase.mix] # billions of tokens, {total(mix)} in all; used as weights"]
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for source, amount in sorted(mix.items(), key=lambda item: (-Decimal(item[1]), item[0])):
        groups[domains[source]][source] = amount
    for domain in sorted(groups, key=lambda domain: (-total(groups[domain]), domain)):
        lines += ["", f"# {domain}: {total(groups[domain])}"]
        lines += [f"{key(source)} = {amount}" for source, amount in groups[domain].items()]
    return "\n".join(lines) + "\n"


def phase_text(name: str, before: str | None, steps: int, mix: dict[str, str], domains: dict[str, str]) -> str:
    """One phase file."""
    text = "# Written by generate.py from data_mix.csv.\n"
    if name == BRANCH[0]:
        text += "# Annealing with 4,096 tokens a row; it begins where phase26.toml begins. See docs/curriculum.md.\n"
    text += '\nextends = "base.toml"\n'
    if name == BRANCH[0]:
        text += '\n[run]\nname = "yulan_mini_4k"\n'
    text += f'\n[phase]\nname = "{name}"\n'
    text += f'after = "{before}.toml"\n' if before else ""
    text += f'length = "{steps} steps"\n'
    text += LONG_ROWS if name in ("phase26", "phase27") else ""
    text += WARM_UP if name == "phase01" else ANNEALING if name in ("phase26", BRANCH[0]) else ""
    recompute = RECOMPUTE_EVERY[max(first for first in RECOMPUTE_EVERY if first <= name)]
    text += f'activation_checkpoint = {{ mode = "every", every = {recompute} }}\n'
    return text + "\n" + mix_text(mix, domains)


def files() -> dict[str, str]:
    """Every file that this script writes: name -> content."""
    mixes, domains = read_mixes(), read_domains()
    lengths = phase_lengths(mixes)
    before = dict(zip(PHASES, [None, *PHASES], strict=False)) | {BRANCH[0]: "phase25"}
    written = {
        f"{name}.toml": phase_text(name, before[name], lengths[name], mixes[recipe], domains)
        for name, recipe in [*PHASES.items(), BRANCH]
    }
    listed = "".join(f'    "{name}.toml",\n' for name in PHASES)
    written["sources.toml"] = sources_text(domains)
    written["curriculum.toml"] = (
        "# All of YuLan-Mini in one run. Written by generate.py.\n"
        "#\n"
        "#   titan-yulan plan train_configs/yulan_mini/curriculum.toml --gpus 56\n"
        "#   ./run_train.sh --config train_configs/yulan_mini/curriculum.toml\n"
        f"\ncurriculum = [\n{listed}]\n"
    )
    return written


if __name__ == "__main__":
    for file_name, content in files().items():
        (FOLDER / file_name).write_text(content, encoding="utf-8")
    print(f"wrote {len(files())} files into {FOLDER}")
