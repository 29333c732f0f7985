"""Formulas in a little LaTeX, by their values.

    sum      = product (("+" | "-") product)*
    product  = power (["*" | "/"] power)*         a sign of multiplication may be left out, but not between two numbers
    power    = ("+" | "-") power | atom ["!"] ["^" power]
    atom     = number | letter | \\pi | \\frac g g | \\sqrt [ "[" sum "]" ] g | \\f power | "(" sum ")" | "{" sum "}"

with g a group in braces or one digit or letter, and \\f one of sin, cos, tan, ln, log and their like. Two formulas
have the same value if they agree for three choices of values for their letters; nothing is simplified.
"""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Callable

_TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+|\\[A-Za-z]+|[A-Za-z]|[-+*/^!(){}\[\]])")
_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "\\sin": cmath.sin,
    "\\cos": cmath.cos,
    "\\tan": cmath.tan,
    "\\arcsin": cmath.asin,
    "\\arccos": cmath.acos,
    "\\arctan": cmath.atan,
    "\\ln": cmath.log,
    "\\log": cmath.log10,
    "\\exp": cmath.exp,
}
_SEEDS = (0.137, 0.718, 1.393)
_LONGEST = 2000  # characters; an answer is shorter, and a parser that calls itself must end


class _Unreadable(Exception):
    pass


def same_value(first: str, second: str) -> bool:
    """Whether both are formulas of the grammar above and agree to 9 digits; False where one is not."""
    if max(len(first), len(second)) > _LONGEST:
        return False
    try:
        for seed in _SEEDS:
            left, right = _Formula(first, seed).value(), _Formula(second, seed).value()
            if not cmath.isclose(left, right, rel_tol=1e-9, abs_tol=1e-12):
                return False
    except (_Unreadable, ArithmeticError, ValueError, RecursionError):
        return False
    return True


class _Formula:
    """One formula with its letters at values that `seed` gives; each method reads one rule of the grammar."""

    def __init__(self, text: str, seed: float) -> None:
        self.seed = seed
        self.last = ""  # the token taken
        self.tokens: list[str] = []
        place = 0
        text = text.strip()
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None:
                raise _Unreadable
            self.tokens.append(match.group(1))
            place = match.end()
        self.tokens.reverse()  # the next one is the last

    def value(self) -> complex:
        result = self._sum()
        if self.tokens:
            raise _Unreadable
        return result

    def _next(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def _take(self, token: str = "") -> str:
        if not self.tokens or (token and self.tokens[-1] != token):
            raise _Unreadable
        self.last = self.tokens.pop()
        return self.last

    def _sum(self) -> complex:
        total = self._product()
        while self._next() in ("+", "-"):
            total += self._product() if self._take() == "+" else -self._product()
        return total

    def _product(self) -> complex:
        result = self._power()
        while self._next() and self._next() not in ("+", "-", ")", "}", "]"):
            if self._next() == "/":
                self._take()
                result /= self._power()
            else:
                if self._next() == "*":
                    self._take()
                elif self._next()[0].isdigit() and self.last[0].isdigit():
                    raise _Unreadable  # two numbers side by side are no product
                result *= self._power()
        return result

    def _power(self) -> complex:
        if self._next() in ("+", "-"):
            return self._power() if self._take() == "+" else -self._power()
        base = self._atom()
        if self._next() == "!":
            self._take()
            if base != int(base.real) or not 0 <= base.real <= 170:
                raise _Unreadable
            base = complex(math.factorial(int(base.real)))
        if self._next() == "^":
            self._take()
            base **= self._power()
        return base

    def _atom(self) -> complex:
        token = self._take()
        if token[0].isdigit() or token[0] == ".":
            # "1\frac12" is one and a half
            if self._next() == "\\frac" and token.isdecimal():
                return float(token) + self._atom()
            return complex(float(token))
        if token in ("(", "{", "["):
            result = self._sum()
            self._take({"(": ")", "{": "}", "[": "]"}[token])
            return result
        if token == "\\frac":
            return self._group() / self._group()
        if token == "\\sqrt":
            index = complex(2)
            if self._next() == "[":
                index = self._atom()
            return self._group() ** (1 / index)
        if token == "\\pi":
            return complex(math.pi)
        if token in _FUNCTIONS:
            return _FUNCTIONS[token](self._power())
        if token[-1].isalpha():
            return self._letter(token)
        raise _Unreadable

    def _group(self) -> complex:
        if self._next() == "{":
            return self._atom()
        token = self._take()
        if token[0].isdigit() and len(token) > 1:  # \frac12: each digit is a group
            self.tokens += [token[1:]]
            token = token[0]
        if token.isdecimal():
            return complex(int(token))
        self.tokens.append(token)
        return self._atom()

    def _letter(self, token: str) -> complex:
        if token == "i":
            return 1j
        if token == "e":
            return complex(math.e)
        number = sum(ord(character) * 31**place for place, character in enumerate(token))
        return complex(0.5 + math.modf(number * self.seed)[0])
