"""Writes sweep_isoflop.toml of this folder: sizes and tokens that cost the same compute.

    python train_configs/data_constrained/generate.py

The levels and the rule are those of arXiv 2507.15857: with compute C and N parameters by the family's formula, one
epoch of C / (6 N) tokens. Which sizes were trained at which level is not published: these are ours, around the best.
"""

from __future__ import annotations

from pathlib import Path

from titan_yulan.config.family import FAMILY, PREFIX, formula_parameters
from titan_yulan.scaling.answers import tokens_for_one_epoch

FOLDER = Path(__file__).resolve().parent

# Level: sizes in millions. Best as published: 1e19 217 autoregressive, 117 diffusion; 3e19 425, 217; 1e20 724, 425.
LEVELS = {
    "6e18": (44, 57, 74, 90, 117, 140, 163, 217, 278),
    "1e19": (57, 74, 90, 117, 140, 163, 217, 278, 425),
    "3e19": (90, 117, 163, 217, 278, 425, 552, 724),
    "1e20": (163, 217, 278, 425, 552, 724, 1018, 1424),
}

_HEAD = """# Compute of 6e18, 1e19, 3e19 and 1e20 FLOPs, spent on fresh tokens by models of many sizes: which is best?
# Written by generate.py. Needs up to {most:.0f} billion tokens: prepare more documents than base.toml asks for into
# data/data_constrained/c4-fresh, and take levels with --only, such as --only '*-1e19-*'.

config = "base.toml"
output_dir = "outputs/data_constrained/isoflop"
name = "{{kind}}-{{flops}}-{{size}}"

[set]
data.sources.c4.path = "data/data_constrained/c4-fresh"
data.sources.c4.max_documents = "none"
phase.epochs = 1
checkpoint.keep = 1

[grid]
kind = [
    {{ kind = "ar", objective.kind = "autoregressive" }},
    {{ kind = "mdm", objective.kind = "masked_diffusion" }},
]
size = [
"""


def tokens(flops: str, millions: int) -> int:
    """Fresh tokens that a size of the family gets for so much compute."""
    return round(tokens_for_one_epoch(float(flops), formula_parameters(FAMILY[f"{PREFIX}{millions}m"])))


def text() -> str:
    """sweep_isoflop.toml."""
    pairs = [(flops, size) for flops, sizes in LEVELS.items() for size in sizes]
    lines = [
        f'    {{ flops = "{flops}", size = "{size}m", model.preset = "{PREFIX}{size}m", '
        f"phase.unique_tokens = {tokens(flops, size):_} }},"
        for flops, size in pairs
    ]
    most = max(tokens(*pair) for pair in pairs) / 1e9
    return _HEAD.format(most=most) + "\n".join(lines) + "\n]\n"


if __name__ == "__main__":
    (FOLDER / "sweep_isoflop.toml").write_text(text(), encoding="utf-8")
