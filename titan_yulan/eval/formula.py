"""Formulas in a little LaTeX, by their values.

    sum      = product (("+" | "-") product)*
    product  = power (["*" | "/"] power)*         a sign of multiplication may be left out, but not between two numbers
    power    = ("+" | "-") power | atom ["!"] ["^" power]
    atom     = number | mixed | letter | \\frac g g | \\binom g g | \\sqrt [ "[" sum "]" ] g | \\f ["^" power] argument
             | "(" sum ")" | "{" sum "}"
    argument = power letter*                      \\sin 2x is the sine of 2x

with g a group in braces or one digit or letter, \\f one of sin, cos, tan, ln, log and their like, a letter of the
Latin or Greek alphabet, and a mixed number as 1\\frac12, all three of them whole. Any other command is unreadable.

Two formulas have the same value if they agree for three choices of fractions for their letters; nothing is simplified.
Whatever has no root, no e, i or pi and no function is computed exactly. The rest is computed in 16 digits with a bound
on its error, and agrees where it lies within the bounds: a tiny number is not 0, and a decimal of a root not the root.
"""

from __future__ import annotations

import cmath
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

_TOKEN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+|\\[A-Za-z]+|[A-Za-z]|[-+*/^!(){}\[\]])")
_MIXED = re.compile(r"\\frac(?:\{[0-9]+\}|[0-9])(?:\{[0-9]+\}|[0-9])")
_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "\\sin": cmath.sin,
    "\\cos": cmath.cos,
    "\\tan": cmath.tan,
    "\\cot": lambda x: 1 / cmath.tan(x),
    "\\sec": lambda x: 1 / cmath.cos(x),
    "\\csc": lambda x: 1 / cmath.sin(x),
    "\\arcsin": cmath.asin,
    "\\arccos": cmath.acos,
    "\\arctan": cmath.atan,
    "\\ln": cmath.log,
    "\\log": cmath.log10,
}
_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega ell infty"
)
_LETTERS = (*"abcdfghjklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", *(f"\\{name}" for name in _GREEK.split()))
# One choice of values is a table; they are positive, so that the root of x^2 is x.
_CHOICES = tuple(
    {letter: Fraction(value, 1009) for letter, value in zip(_LETTERS, numbers, strict=True)}
    for numbers in (random.Random(seed).sample(range(500, 1500), len(_LETTERS)) for seed in range(3))
)
LONGEST = 2000  # characters of an answer that is read: they are fewer, and a parser that calls itself must end
_LARGEST = 10_000  # bits of an exact number
_ROUNDING = 1e-15  # of one operation in floating point, with room to spare
_SMALLEST = 1e-300


class _Unreadable(Exception):
    pass


def same_value(first: str, second: str) -> bool:
    """Whether both are formulas of the grammar above with the same value; False where one is not.

    Letters without a number or a sign are a word, not a product: two words are the same letter by letter.
    """
    if max(len(first), len(second)) > LONGEST:
        return False
    words = [re.sub(r"[\s(){}\[\]]", "", text) for text in (first, second)]
    if all(word.isalpha() and len(word) > 1 for word in words):
        return words[0] == words[1]
    try:
        return all(_Formula(first, letters).value().agrees(_Formula(second, letters).value()) for letters in _CHOICES)
    except (_Unreadable, ArithmeticError, ValueError, RecursionError):
        return False


@dataclass(frozen=True)
class _Number:
    """A fraction, which is exact, or a complex number and a bound on how far it lies from the true one."""

    value: Fraction | complex
    error: float = 0.0

    def agrees(self, other: _Number) -> bool:
        if isinstance(self.value, Fraction) and isinstance(other.value, Fraction):
            return self.value == other.value
        left, right = self.rounded(), other.rounded()
        return abs(left.value - right.value) <= left.error + right.error

    def rounded(self) -> _Rounded:
        if isinstance(self.value, Fraction):
            return _rounded(complex(float(self.value)), 0.0, nonzero=self.value != 0)
        return _Rounded(self.value, self.error)

    def __neg__(self) -> _Number:
        return _exact(-self.value) if isinstance(self.value, Fraction) else _rounded(-self.value, self.error)

    def __add__(self, other: _Number) -> _Number:
        if isinstance(self.value, Fraction) and isinstance(other.value, Fraction):
            return _exact(self.value + other.value)
        left, right = self.rounded(), other.rounded()
        return _rounded(left.value + right.value, left.error + right.error)

    def __mul__(self, other: _Number) -> _Number:
        if isinstance(self.value, Fraction) and isinstance(other.value, Fraction):
            return _exact(self.value * other.value)
        left, right = self.rounded(), other.rounded()
        error = abs(left.value) * right.error + (abs(right.value) + right.error) * left.error
        return _rounded(left.value * right.value, error, nonzero=left.value != 0 and right.value != 0)

    def __truediv__(self, other: _Number) -> _Number:
        if isinstance(self.value, Fraction) and isinstance(other.value, Fraction):
            return _exact(self.value / other.value)
        left, right = self.rounded(), other.rounded()
        if abs(right.value) <= 2 * right.error:
            raise _Unreadable  # it may be 0
        quotient = left.value / right.value
        error = 2 * (left.error + abs(quotient) * right.error) / abs(right.value)
        return _rounded(quotient, error, nonzero=left.value != 0)

    def __pow__(self, other: _Number) -> _Number:
        if isinstance(self.value, Fraction) and isinstance(other.value, Fraction) and other.value.denominator == 1:
            size = max(abs(self.value.numerator), self.value.denominator).bit_length() - 1
            if size * abs(other.value.numerator) > _LARGEST:
                raise _Unreadable
            return _exact(Fraction(self.value**other.value.numerator))
        base, power = self.rounded(), other.rounded()
        if abs(base.value) <= 2 * base.error:  # it may be 0: only a root is near 0, too
            if power.value.real <= 0 or power.value.imag:
                raise _Unreadable
            return _rounded(base.value**power.value, (abs(base.value) + base.error) ** power.value.real)
        value = base.value**power.value
        relative = abs(power.value) * base.error / abs(base.value) + abs(cmath.log(base.value)) * power.error
        return _rounded(value, 2 * abs(value) * relative, nonzero=True)

    def through(self, function: Callable[[complex], complex]) -> _Number:
        """The value of an analytic function here, the error from its values at both ends of the bound."""
        at = self.rounded()
        value = function(at.value)
        ends = (function(at.value + at.error), function(at.value - at.error)) if at.error else ()
        return _rounded(value, max((abs(end - value) for end in ends), default=0.0))


@dataclass(frozen=True)
class _Rounded(_Number):
    value: complex


def _rounded(value: complex, error: float, nonzero: bool = False) -> _Rounded:
    size = abs(value)
    error += _ROUNDING * size
    # Also where one of them is not a number. What is known to fewer than 6 digits would agree with too much.
    if not error <= 1e-6 * max(1.0, size) or not math.isfinite(size) or (nonzero and size < _SMALLEST):
        raise _Unreadable
    return _Rounded(value + 0, error)  # + 0: an imaginary part of -0.0 would be the other side of a branch cut


def _exact(value: Fraction) -> _Number:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _LARGEST:
        raise _Unreadable
    return _Number(value)


_PI, _E, _I = _rounded(math.pi, 0.0), _rounded(math.e, 0.0), _rounded(1j, 0.0)


class _Formula:
    """One formula with its letters at the values given; each method reads one rule of the grammar."""

    def __init__(self, text: str, letters: dict[str, Fraction]) -> None:
        self.letters = letters
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

    def value(self) -> _Number:
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

    def _sum(self) -> _Number:
        total = self._product()
        while self._next() in ("+", "-"):
            total += self._product() if self._take() == "+" else -self._product()
        return total

    def _product(self) -> _Number:
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

    def _power(self, mixed: bool = True) -> _Number:
        if self._next() in ("+", "-"):
            return self._power(mixed) if self._take() == "+" else -self._power(mixed)
        base = self._atom(mixed)
        if self._next() == "!":
            self._take()
            base = _Number(Fraction(math.factorial(_whole(base))))
        if self._next() == "^":
            self._take()
            base **= self._power(mixed=False)
        return base

    def _atom(self, mixed: bool = True) -> _Number:
        token = self._take()
        if token[0].isdigit() or token[0] == ".":
            number = _exact(Fraction(token))
            if mixed and token.isdigit() and _MIXED.match("".join(reversed(self.tokens[-7:]))):
                number += self._atom()
            return number
        if token in ("(", "{", "["):
            result = self._sum()
            self._take({"(": ")", "{": "}", "[": "]"}[token])
            return result
        if token == "\\frac":
            return self._group() / self._group()
        if token == "\\binom":
            return _Number(Fraction(math.comb(_whole(self._group()), _whole(self._group()))))
        if token == "\\sqrt":
            return self._root()
        if token in _FUNCTIONS or token == "\\exp":
            return self._function(token)
        if token in self.letters:
            return _Number(self.letters[token])
        if token in ("\\pi", "e", "i"):
            return {"\\pi": _PI, "e": _E, "i": _I}[token]
        raise _Unreadable

    def _root(self) -> _Number:
        index = self._atom() if self._next() == "[" else _Number(Fraction(2))
        radicand = self._group()
        real = radicand.rounded().value
        if isinstance(index.value, Fraction) and index.value % 2 == 1 and real.imag == 0 and real.real < 0:
            return -((-radicand) ** (_ONE / index))
        return radicand ** (_ONE / index)

    def _function(self, token: str) -> _Number:
        power = _ONE
        if self._next() == "^":
            self._take()
            power = self._power(mixed=False)
            if power.value == -1:
                raise _Unreadable  # an inverse function or a reciprocal
        bracket = self._next() in ("(", "{", "[")
        argument = self._power()
        while not bracket and (self._next() in self.letters or self._next() == "\\pi"):
            argument *= self._power()
        return (_E**argument if token == "\\exp" else argument.through(_FUNCTIONS[token])) ** power

    def _group(self) -> _Number:
        if self._next() == "{":
            return self._atom()
        token = self._take()
        if token[0].isdigit() and len(token) > 1:  # \frac12: each digit is a group
            self.tokens += [token[1:]]
            token = token[0]
        if token.isdigit():
            return _Number(Fraction(int(token)))
        self.tokens.append(token)
        return self._atom()


_ONE = _Number(Fraction(1))


def _whole(number: _Number) -> int:
    """Of what a factorial is taken."""
    if not isinstance(number.value, Fraction) or number.value.denominator != 1 or not 0 <= number.value <= 1000:
        raise _Unreadable
    return number.value.numerator
