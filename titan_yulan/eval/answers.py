"""Whether what a model wrote is the answer.

number       the last number that it wrote is the answer's last number (GSM8K)
mathematics  its last \\boxed{...}, else what follows "the answer is", else its last number, is equivalent to the
             answer (MATH; see `equivalent`)
contains     the share of the answers that occur in it, whatever their case (RULER)
""           it is the answer, but for blanks around it
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from decimal import Decimal

from titan_yulan.eval.formula import LONGEST, same_value

_NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")
_ANSWER_IS = re.compile(r"answer is:?\s*(.+?)(?:\.(?:\s|$)|\n|$)", re.IGNORECASE)
_OPENING, _CLOSING = "([{", ")]}"

# What a formula may be written with, and without, in this order.
_LAYOUT = (
    (r"\\(?:left|right|displaystyle|limits|[bB]igg?[lr]?)(?![A-Za-z])", ""),
    (r"\\(?:text|textbf|textit|mbox|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}", r"\1"),
    (r"(?<!\\)\\!\s*", ""),
    (r"\\(?:quad|qquad)(?![A-Za-z])|(?<!\\)\\[,;: ]|~", " "),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", " "),
    (r"(?<=\d)\s*(?:\^\s*\{?\s*)?(?:st|nd|rd|th)\b\}?", " "),
    (r"_\s*\{\s*(\w+)\s*\}", r"_\1"),
    (r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset"),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
    (r"\\(?:le|leq|leqslant)(?![A-Za-z])", "<="),
    (r"\\(?:ge|geq|geqslant)(?![A-Za-z])", ">="),
    (r"\\neq?(?![A-Za-z])", "!="),
    (r"\\(?:cdot|times)(?![A-Za-z])|×|·", "*"),
    (r"\\div(?![A-Za-z])|÷", "/"),
    (r"\\(?:\$|%|#|&)|[$%]", " "),
    (r"\\\{", "{{"),
    (r"\\\}", "}}"),
    (r"\{,\}", ","),
    (r"\s+", " "),
)
# A number whose digits commas or blanks group by three; "(1,200)" is a point.
_GROUPED = re.compile(
    r"(?<![\d.(\[])(?<!\d[, ])(?<!\{\{)(?<![(\[]-)[1-9]\d{0,2}(?:(?:,\d{3})+(?!,?\d)|(?: \d{3})+(?! ?\d))|"
    r"(?<=[(\[])[1-9]\d{0,2}(?: \d{3})+(?! ?\d)"
)
_IS = r" ?(?:=|\\in(?![A-Za-z]))(?!=)"
_NAME = re.compile(r"(\\?[A-Za-z]\w?(?:\([a-z]\))?)" + _IS)
_MATRIX = re.compile(r"(.*?)\\begin ?\{(\w*matrix|array)\}(.*)\\end ?\{\2\}(.*)", re.DOTALL)
# A measured number: the unit is not compared.
_UNIT = re.compile(
    r"(?<=[\d}])(?:\s*(?:degrees?|cm|mm|km|inch(?:es)?|feet|foot|ft|yards?|miles?|meters?|units?|square|cubic|hours?|"
    r"minutes?|seconds?|days?|weeks?|months?|years?|dollars?|cents?|mph|percent|pounds?|ounces?|grams?|kg|gallons?|"
    r"liters?|per)\b|\s+(?:m|in)\b)+(?:\s*\^\s*\{?\d\}?)?\s*"
)


def grade(written: str, answers: Sequence[str], how: str) -> float:
    """1.0 where what was written is the answer in the sense of `how` (see above), or a share from 0 to 1."""
    if how == "number":
        found = last_number(written)
        return float(found is not None and any(found == last_number(answer) for answer in answers))
    if how == "mathematics":
        found_text = mathematical_answer(written)
        return float(found_text is not None and any(equivalent(found_text, answer) for answer in answers))
    if how == "contains":
        return sum(answer.lower() in written.lower() for answer in answers) / len(answers)
    return float(written.strip() in [answer.strip() for answer in answers])


def last_number(text: str) -> Decimal | None:
    """The last number of a text; commas may group its digits by three."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} (or \\boxed x) of a text; None: there is none, or it is not closed."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].removeprefix("\\boxed").removeprefix("\\fbox").lstrip()
    if not rest.startswith("{"):
        return rest.split()[0].strip("$.,") if rest else None
    depth = 0
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:place]
    return None


def mathematical_answer(text: str) -> str | None:
    """What a solution ends with: the last box, else what follows "the answer is", else the last number."""
    if (found := boxed(text)) is not None:
        return found
    if said := _ANSWER_IS.findall(text):
        return said[-1]
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def equivalent(first: str, second: str) -> bool:
    """Whether two answers in LaTeX are the same; never an error, whatever the texts are.

    Layout, spaces, units, dollar and percent signs, degrees, the ending of "5th", and a leading "x =" where the other
    has none or the same do not count. Lists, points, intervals and sets must have equal brackets and equivalent entries
    (those of a set, and the members of a union, in any order; a list may write two entries as one with a plus-minus
    sign), matrices the same environment and shape and equivalent entries in their places. Equal text is the same,
    whatever its case; so are formulas of equal value, for any values of their letters (`eval.formula`). Everything else
    differs.
    """
    left, right = _plain(first), _plain(second)
    names = [match.group(1) if (match := _NAME.match(side)) else "" for side in (left, right)]
    if not all(names) or names[0] == names[1]:
        left, right = (_without(name, side) for name, side in zip(names, (left, right), strict=True))
    if not left or not right:
        return False
    if max(len(left), len(right)) > LONGEST:
        return _bare(left) == _bare(right)
    try:
        return _same(left, right)
    except RecursionError:  # brackets in hundreds of brackets
        return False


def _without(name: str, text: str) -> str:
    """The answer, or each answer of a list, without "name ="."""
    return re.sub(rf"(^|,|\b(?:and|or)\b) ?{re.escape(name)}{_IS}", r"\1 ", text).strip() if name else text


def _plain(text: str) -> str:
    for pattern, by in _LAYOUT:
        text = re.sub(pattern, by, text)
    text = _GROUPED.sub(lambda match: re.sub("[, ]", "", match.group()), text.strip())
    text = _UNIT.sub(" ", text)
    text = re.sub(r"\\(frac|sqrt)\s*(?=\w)", r"\\\1 ", text)
    return text.strip().rstrip(".,").strip()


def _same(left: str, right: str) -> bool:
    if _bare(left) == _bare(right):
        return True
    matrices = _MATRIX.fullmatch(left), _MATRIX.fullmatch(right)
    if any(matrices) and not any(match and "\\begin" in match.group(3) for match in matrices):
        return _same_matrix(*matrices)
    if "\\cup" in left + right:
        return _same_set(_pieces(left, r"\\cup"), _pieces(right, r"\\cup"))
    parts, others = _entries(left), _entries(right)
    if len(parts) > 1 or len(others) > 1 or _brackets(left) != _brackets(right):
        if len(parts) != len(others) or _brackets(left) != _brackets(right):
            return False
        return _same_set(parts, others) if _brackets(left) in ("", "{}") else all(map(_same, parts, others))
    if "=" in left and "=" in right and not re.search(r"[<>!]=", left + right):
        sides = [side.split("=") for side in (left, right)]
        return len(sides[0]) == len(sides[1]) and all(map(_same, *sides))
    return same_value(left, right)


def _same_matrix(left: re.Match[str] | None, right: re.Match[str] | None) -> bool:
    if not left or not right or left.group(2) != right.group(2):
        return False
    around = [(match.group(1), match.group(4)) for match in (left, right)]
    rows, others = _rows(left), _rows(right)
    return (
        [len(row) for row in rows] == [len(row) for row in others]
        and all(map(_same, *around))
        and all(all(map(_same, row, other)) for row, other in zip(rows, others, strict=True))
    )


def _rows(matrix: re.Match[str]) -> list[list[str]]:
    content = re.sub(r"^\s*\{[clr| ]*\}", "", matrix.group(3)) if matrix.group(2) == "array" else matrix.group(3)
    rows = _pieces(content, r"\\\\")
    return [_pieces(row, "&") for row in (rows if rows[-1] else rows[:-1])]


def _pieces(text: str, separator: str) -> list[str]:
    return [piece.strip() for piece in re.split(separator, text)]


def _bare(text: str) -> str:
    """Without blanks, but for those between two digits, and small."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text).lower()


def _same_set(parts: list[str], others: list[str]) -> bool:
    if len(parts) != len(others):
        return False
    left = list(others)
    for part in parts:
        match = next((other for other in left if _same(part, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _brackets(text: str) -> str:
    """The kind of brackets around a list: "(]", "{}", ... ; "" where there are none, or around no list."""
    depths = list(itertools.accumulate((mark in _OPENING) - (mark in _CLOSING) for mark in text))
    if 0 in depths[:-1]:  # what opens first is closed before the end
        return ""
    if text.startswith("{{") and text.endswith("}}"):
        return "{}"
    if len(text) > 1 and text[0] in "([" and text[-1] in ")]" and len(_split(text[1:-1])) > 1:
        return text[0] + text[-1]
    return ""


def _entries(text: str) -> list[str]:
    brackets = _brackets(text)
    inner = text[2:-2] if brackets == "{}" else text[1:-1] if brackets else text
    entries = [entry.strip() for entry in _split(inner)]
    if brackets not in ("", "{}"):
        return entries
    return [entry.replace("\\pm", sign) for entry in entries for sign in ("+-" if "\\pm" in entry else "+")]


def _split(text: str) -> list[str]:
    """The parts between the commas (or words "and", "or") that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"[(\[{]|[)\]}]|,|\b(?:and|or)\b", text):
        found = match.group()
        depth += (found in _OPENING) - (found in _CLOSING)
        if depth == 0 and found not in _CLOSING:
            parts.append(text[start : match.start()])
            start = match.end()
    return [part for part in [*parts, text[start:]] if part.strip()]
