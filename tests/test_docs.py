"""README, CHANGELOG and docs/ say nothing that is not there: links, paths, command lines and configuration keys."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from titan_yulan import cli
from titan_yulan.config.override import read_overrides
from titan_yulan.config.read import Problems
from titan_yulan.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_PATH = re.compile(r"`((?:docs|titan_yulan|tests|kernels|train_configs|scripts|\.ci)/[\w./-]*)`")
_KEY = re.compile(r"--([a-z_]+(?:\.\w+)+)")
_SECTION_KEY = re.compile(r"`\[([a-z]\w*(?:\.\w+)*)\] ([a-z_]+)")
_COMMAND = re.compile(
    r"^(?:[A-Z_]+=\S+ )*(?:\./run_train\.sh|(?:\S*/)?titan-yulan|\S*python3? -m titan_yulan\.cli)(?= |$)"
)


def split_code(text: str) -> tuple[str, list[str]]:
    """The prose of a page, and the lines of its fenced blocks with continued lines joined."""
    prose: list[str] = []
    code: list[str] = []
    for i, part in enumerate(re.split(r"^ *```.*$", text, flags=re.MULTILINE)):
        if i % 2:
            code += re.sub(r"\s*\\\n\s*", " ", part).splitlines()
        else:
            prose.append(part)
    return "\n".join(prose), code


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", split_code(page.read_text(encoding="utf-8"))[0], flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def link_mistakes(page: Path, text: str) -> list[str]:
    """Links and `paths` of a page that lead nowhere."""
    prose, _ = split_code(text)
    mistakes = [path for path in _PATH.findall(prose) if not (ROOT / path).exists()]
    for link in _LINK.findall(prose):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            mistakes.append(link)
    return mistakes


def command_lines(text: str) -> list[str]:
    """The commands of ours in a page's fenced blocks, without prompt, comment and explanation."""
    lines = [line.strip().removeprefix("$ ").removeprefix("# ").strip() for line in split_code(text)[1]]
    return [re.split(r" {2,}| #| &$", line)[0] for line in lines if _COMMAND.match(line)]


def command_mistake(line: str) -> str | None:
    """Why a command line would be refused; None if it would not."""
    arguments = shlex.split(line[_COMMAND.match(line).end() :])  # type: ignore[union-attr]
    arguments = [argument for argument in arguments if not re.fullmatch(r"\[.*|.*\]", argument)]  # optional parts
    arguments = ["1" if argument == "N" else argument for argument in arguments]
    if "run_train.sh" in line:
        arguments = ["train", *arguments]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            options, rest = cli._parser().parse_known_args(arguments)
    except SystemExit as end:
        return said.getvalue() if end.code else None
    keys = [argument for argument in rest if _KEY.match(argument) and getattr(options, "takes_keys", False)]
    return f"unknown arguments in {line!r}: {rest}" if len(keys) < len(rest) else None


def unknown_keys(text: str) -> list[str]:
    """The `--section.key` and `[section] key` that no configuration has."""
    keys = [*_KEY.findall(text), *(".".join(match) for match in _SECTION_KEY.findall(text))]
    unknown = []
    for key in dict.fromkeys(keys):
        problems = Problems()
        read_overrides([f"--{key}=0"], problems)
        try:
            problems.raise_all()
        except UserError:
            unknown.append(key)
    return [key for key in unknown if not key.endswith(".key")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_is_true(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert link_mistakes(page, text) == []
    assert [mistake for line in command_lines(text) if (mistake := command_mistake(line))] == []
    assert unknown_keys(text) == []


def test_every_page_is_reachable_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {page.name for page in PAGES if page.name != "README.md"} <= {
        Path(link).name for link in _LINK.findall(readme)
    }


def test_commands_of_the_readme_are_found() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"./run_train.sh", "./run_train.sh --config mine.toml"} <= set(command_lines(readme))


def test_imports_go_the_way_the_design_says() -> None:
    design = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    order = re.findall(r"`(\w+)`", design.partition("<!-- import order")[2].splitlines()[1])
    files = [
        file
        for file in (ROOT / "titan_yulan").rglob("*.py")
        if file.parent != ROOT / "titan_yulan" or file.stem in order
    ]
    assert {file.relative_to(ROOT / "titan_yulan").parts[0].removesuffix(".py") for file in files} | {"kernels"} == set(
        order
    )
    wrong = []
    for file in [*files, *(ROOT / "kernels").glob("*.py")]:
        package = file.relative_to(ROOT).with_suffix("").parts[file.is_relative_to(ROOT / "titan_yulan")]
        text = file.read_text(encoding="utf-8")
        imported = re.findall(r"^\s*(?:from|import) titan_yulan\.(\w+)", text, flags=re.MULTILINE)
        for names in re.findall(r"^\s*from titan_yulan import ([\w, ]+)", text, flags=re.MULTILINE):
            imported += [name.split(" as ")[0].strip() for name in names.split(",")]
        wrong += [f"{file}: {name}" for name in imported if order.index(name) > order.index(package)]
    assert wrong == []


def test_mistakes_are_seen() -> None:
    page = ROOT / "README.md"
    assert link_mistakes(page, "[a](docs/gone.md) [b](docs/data.md#gone) `docs/gone.md`") == [
        "docs/gone.md",
        "docs/gone.md",
        "docs/data.md#gone",
    ]
    assert link_mistakes(page, "[a](docs/data.md#the-tape) [b](https://example.org) `docs/data.md`") == []
    block = "```\n$ titan-yulan data show --step N     what it does\nNPROC=2 ./run_train.sh \\\n  --bogus  # why\n```"
    assert command_lines(block) == ["titan-yulan data show --step N", "NPROC=2 ./run_train.sh --bogus"]
    assert command_mistake("titan-yulan data show --config C --step N") is None
    for wrong in (
        "titan-yulan nothing",
        "titan-yulan data show",
        "titan-yulan data inspect X --bogus",
        "titan-yulan data inspect X --run.name=y",
        "./run_train.sh --bogus",
    ):
        assert command_mistake(wrong), wrong
    assert command_mistake("NPROC=2 ./run_train.sh --run.name=y") is None
    assert unknown_keys("--run.name=x `[batch] micro_batch_size` --run.nam --optimizer.lr=3 `[run] nome`") == [
        "run.nam",
        "optimizer.lr",
        "run.nome",
    ]


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports test files by their names alone: of two, it would run the first."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []
