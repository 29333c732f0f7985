"""The built-in corpus: real text that every installation has, read in place and never copied.

    builtin:code    the Python standard library's sources
    builtin:math    the sources of sympy, mpmath and networkx (torch needs the first two through sympy, and networkx)
    builtin:prose   docstrings of more than 200 characters of all of these and of numpy
    builtin:chat    questions about the public names of the standard library, answered by their docstrings

A part of a domain is named after what it comes from, such as builtin:math/networkx or builtin:prose/stdlib; the parts
of a domain have no file in common.

The licences (PSF-2.0 and BSD-3-Clause) concern whoever redistributes the text. The content follows the installed
versions, so two machines compare losses only when their sources have equal fingerprints.

A docstring occurs in a code or math file, in prose and in a chat. We leave the files whole, because code without its
docstrings teaches a wrong Python, and hold out by file: a file has one name in every domain ("sympy/core/add.py") and
the split depends on the name alone, so no held-out text occurs in the training part of any domain.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from titan_yulan.data import hashing
from titan_yulan.errors import UserError

DOMAINS = ("code", "math", "prose", "chat")
_MATH_PACKAGES = ("sympy", "mpmath", "networkx")
_SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_MIN_DOCSTRING = 200  # characters
_ANSWER = range(40, 1001)  # characters of a docstring that is an answer
# Source bytes of one domain: preparing all of them on two cores stays well under a minute.
_MAX_BYTES = {"code": 9_000_000, "math": 9_000_000, "prose": 40_000_000, "chat": 9_000_000}

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def builtin_files(name: str) -> list[tuple[str, Path]]:
    """(name, path) of every file of a domain, or of a part of it (`math/networkx`), sorted by name.

    Where a domain is larger than its limit, it keeps the files with the smallest hashes of their names.

    Raises:
        UserError: unknown domain or part, or a package is not installed with its sources.
    """
    domain, _, part = name.partition("/")
    if domain not in DOMAINS:
        raise UserError(f"unknown built-in corpus 'builtin:{domain}': choose builtin:{', builtin:'.join(DOMAINS)}")
    roots = {}
    if domain != "math":
        roots["stdlib"] = Path(sysconfig.get_paths()["stdlib"])
    if domain in ("math", "prose"):
        packages = (*_MATH_PACKAGES, "numpy") if domain == "prose" else _MATH_PACKAGES
        roots.update({package: _package_folder(package, domain) for package in packages})
    files = [file for root_name, root in roots.items() for file in _python_files(root_name, root, domain)]
    if part and part not in roots:
        raise UserError(f"unknown part 'builtin:{name}': builtin:{domain} is made of {', '.join(roots)}")
    kept = _keep_bytes(files, _MAX_BYTES[domain])
    return sorted(file for file in kept if file[0].startswith(part and f"{part}/"))


def read_docstrings(source: str) -> Iterator[str]:
    """The long docstrings of a Python module, in the order of the file; nothing for a file that does not parse."""
    for node in _statements(_parse(source)):
        if isinstance(node, _Documented):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) > _MIN_DOCSTRING:
                yield docstring


def read_chats(name: str, source: str) -> Iterator[list[dict[str, str]]]:
    """Chats of one question and its answer, about every public name of a module whose docstring has a fit length.

    Args:
        name: name of the file in its domain, such as `stdlib/json/decoder.py`.
        source: its content; of a file that does not parse there are none.
    """
    path = name.removesuffix(".py").removesuffix("/__init__").split("/")[1:]
    if any(part.startswith("_") for part in path):
        return
    for qualified, node in _public(".".join(path), _parse(source)):
        answer = ast.get_docstring(node)
        if answer and len(answer) in _ANSWER:
            question = f"What does {qualified} do?"
            if isinstance(node, ast.Module | ast.ClassDef):
                question = f"What is the {type(node).__name__.removesuffix('Def').lower()} {qualified}?"
            yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _parse(source: str) -> ast.Module:
    """The module; an empty one if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return ast.parse(source)
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def _public(name: str, node: ast.AST) -> Iterator[tuple[str, _Documented]]:
    """A module or class under its full name, then its public classes and functions, and those of the classes."""
    if isinstance(node, _Documented):
        yield name, node
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            inner = getattr(child, "name", "_")
            if not inner.startswith("_"):
                yield from _public(f"{name}.{inner}", child)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The node and the statements in its body, at any depth, without walking through expressions."""
    yield node
    for child in getattr(node, "body", ()):
        yield from _statements(child)


def _package_folder(package: str, domain: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"'builtin:{domain}' reads the package {package}, which is not installed: pip install {package}"
        )
    return Path(spec.submodule_search_locations[0])


def _python_files(name: str, root: Path, domain: str) -> list[tuple[str, Path]]:
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [subfolder for subfolder in subfolders if subfolder not in _SKIPPED_FOLDERS]
        # _sysconfigdata holds the folders of the machine that built this Python.
        kept = [file for file in names if file.endswith(".py") and not file.startswith(("_sysconfigdata", "test_"))]
        place = (name, *Path(folder).relative_to(root).parts)
        files += [("/".join((*place, file)), Path(folder, file)) for file in kept]
    if not files:
        raise UserError(f"'builtin:{domain}' finds no Python sources in {root}: install a Python that has them")
    return files


def _keep_bytes(files: list[tuple[str, Path]], limit: int) -> list[tuple[str, Path]]:
    files = sorted(files, key=lambda file: hashing.key("built-in corpus", file[0]))
    sizes = np.cumsum([path.stat().st_size for _, path in files])
    return files[: int(np.searchsorted(sizes, limit, side="right"))]
