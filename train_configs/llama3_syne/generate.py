"""Writes syne_sources.toml, syne_stage1.toml and syne_stage2.toml of this folder.

    python train_configs/llama3_syne/generate.py

The shares of languages and of kinds of text, the stages and the learning rate are those of Llama3-SynE (arXiv
2407.18743). Not published, and ours: the topics' initial shares (equal inside a language's web pages), the batch, and
the strength and period of the adjustments. `base.toml` and `curriculum.toml` are written by hand.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
DATA_ROOT = "data/llama3_syne"

# The published groups of subjects; each language has ten and `others`.
_BOTH = (
    "math-physics",
    "computer-science-engineering",
    "biology-chemistry",
    "history-geography",
    "law-policy",
    "economics-business",
    "medicine-health",
    "others",
)
TOPICS = {
    "en": (*_BOTH, "philosophy-logic", "psychology-sociology", "security-international-relations"),
    "zh": (*_BOTH, "philosophy-arts-culture", "psychology-sociology-education", "practical-management"),
}
LANGUAGES = {"en": "English", "zh": "Chinese"}

# Published shares of the kinds of text inside each language, in percent.
KINDS = {
    "en": {"web": 40, "encyclopedia": 5, "books": 15, "qa": 5, "papers": 10, "math": 10, "code": 15},
    "zh": {"web": 70, "encyclopedia": 5, "books": 20, "qa": 5},
}

# Billions of tokens of each stage, and its parts by language.
STAGE1 = {"en": Fraction("92.5") * 8 / 10, "zh": Fraction("92.5") * 2 / 10}
STAGE2 = {"en": Fraction("7.5") * 7 / 10, "zh": Fraction("7.5") * 1 / 10, "synthetic": Fraction("7.5") * 2 / 10}


def stage1_mix() -> dict[str, Fraction]:
    """Source -> billions of tokens; the web pages of a language are one source a topic."""
    mix = {}
    for language, amount in STAGE1.items():
        for kind, percent in KINDS[language].items():
            part = amount * percent / 100
            if kind == "web":
                mix |= {f"{language}-web-{topic}": part / len(TOPICS[language]) for topic in TOPICS[language]}
            else:
                mix[f"{language}-{kind}"] = part
    return mix


def stage2_mix() -> dict[str, Fraction]:
    """Source -> billions of tokens, of sources that stage 1 does not read."""
    mix = {
        f"stage2-{language}-{kind}": STAGE2[language] * percent / 100
        for language in LANGUAGES
        for kind, percent in KINDS[language].items()
    }
    return mix | {"synthetic": STAGE2["synthetic"]}


def domain(source: str) -> str:
    """What kind of text a source is, for tables."""
    if source == "synthetic":
        return source
    language, kind = source.removeprefix("stage2-").split("-")[:2]
    return f"{LANGUAGES[language]} {kind}"


def sources_text() -> str:
    """syne_sources.toml: where every source is expected."""
    lines = [
        "# The sources of Llama3-SynE's two stages. Written by generate.py; docs/llama3_syne.md says how to make them.",
        f"# To keep them elsewhere, make {DATA_ROOT} a symbolic link.",
    ]
    for source in stage1_mix():
        folder, _, topic = source.partition("-web-")
        folder, below = (f"{folder}-web", f"/{topic}") if topic else (source, "")
        lines += [
            "",
            f"[data.sources.{source}]",
            f'path = "{DATA_ROOT}/{folder}{below}"',
            f'validation_path = "{DATA_ROOT}/{folder}-validation{below}"',
            'order = "perplexity" # from low to high',
            f'domain = "{domain(source)}"',
        ]
    lines += ["", "# Stage 2 draws at random, from documents that stage 1 does not read."]
    for source in stage2_mix():
        lines += ["", f"[data.sources.{source}]", f'path = "{DATA_ROOT}/{source}"', f'domain = "{domain(source)}"']
    return "\n".join(lines) + "\n"


def mix_text(mix: dict[str, Fraction]) -> str:
    """[phase.mix], a block for each language."""
    lines = [f"[phase.mix] # billions of tokens, {float(sum(mix.values()))} in all; used as weights"]
    for language in dict.fromkeys(domain(source).split()[0] for source in mix):
        part = {source: amount for source, amount in mix.items() if domain(source).split()[0] == language}
        lines += ["", f"# {language}: {float(sum(part.values()))}"]
        lines += [f"{source} = {float(round(amount, 6))}" for source, amount in part.items()]
    return "\n".join(lines) + "\n"


STAGE1_HEAD = """# Llama3-SynE, stage 1: bilingual adaptation, Chinese : English = 2 : 8.
# Written by generate.py.

extends = "base.toml"

[phase]
name = "stage1"
length = "92.5B"
start_from = "data/llama3_syne/Meta-Llama-3-8B" # a Hugging Face folder; also any checkpoint of ours
# from 1e-7 to 1e-5 over 10 billion tokens, then constant, also in stage 2
lr = [
    { shape = "linear", from = 0.01, to = 1.0, over = "10B" },
    { shape = "constant" },
]

# Topics whose perplexity rises get a larger share of their language's web pages. The formula is published, its numbers
# are not: these are ours.
[phase.adaptive]
every = "500 steps" # 2.1 billion tokens
alpha = 0.1
floor = 0.02
groups = { english = ["en-web-*"], chinese = ["zh-web-*"] }

"""
STAGE2_HEAD = """# Llama3-SynE, stage 2: synthetic enhancement, Chinese : English : synthetic = 1 : 7 : 2.
# Written by generate.py.

extends = "base.toml"

[phase]
name = "stage2"
after = "syne_stage1.toml"
length = "7.5B"

"""


def files() -> dict[str, str]:
    """Every file that this script writes: name -> content."""
    return {
        "syne_sources.toml": sources_text(),
        "syne_stage1.toml": STAGE1_HEAD + mix_text(stage1_mix()),
        "syne_stage2.toml": STAGE2_HEAD + mix_text(stage2_mix()),
    }


if __name__ == "__main__":
    for file_name, content in files().items():
        (FOLDER / file_name).write_text(content, encoding="utf-8")
    print(f"wrote {len(files())} files into {FOLDER}")
