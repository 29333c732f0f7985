"""Values with units that a configuration file writes as text: durations and amounts of tokens."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_AMOUNT = re.compile(r"^\s*(\d+(?:_\d+)*(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([KMBT]?)\s*(tokens|steps|rows|%)?\s*$")

_STEPS = re.compile(r"^(\d+)-(\d+)$")

Unit = Literal["tokens", "steps", "rows", "share"]


@dataclass(frozen=True)
class Duration:
    """A length of training. `share` is a fraction of the phase it is used in (1% = 0.01)."""

    value: float
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Read `"40B"`, `"40B tokens"`, `"1000 steps"`, `"5000 rows"` or `"1%"`.

        Raises:
            ValueError: the text is none of these.
        """
        match = _AMOUNT.match(text)
        if not match:
            raise ValueError(
                f"cannot read {text!r} as a duration; write '40B' (tokens), '1000 steps', '5000 rows' or '1%'"
            )
        number, suffix, word = match.groups()
        value = _value(number, suffix)
        if word == "%":
            if suffix:
                raise ValueError(f"cannot read {text!r} as a duration: a percentage takes no suffix {suffix!r}")
            return cls(value / 100, "share")
        return cls(value, word or "tokens")  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.unit == "share":
            return _percent(self.value)
        return f"{_short(self.value)}{'' if self.unit == 'tokens' else ' ' + self.unit}"


@dataclass(frozen=True)
class Tokens:
    """An amount of tokens, written `"1.2B"`."""

    value: float

    @classmethod
    def parse(cls, text: str) -> Tokens:
        """Read `"1.2B"`, `"300M"` or `"4_128_768"`.

        Raises:
            ValueError: the text is not an amount of tokens.
        """
        match = _AMOUNT.match(text)
        if not match or match.group(3) not in (None, "tokens"):
            raise ValueError(f"cannot read {text!r} as an amount of tokens; write '1.2B', '300M' or '4128768'")
        return cls(_value(match.group(1), match.group(2)))

    def __str__(self) -> str:
        return _short(self.value)


def parse_steps(text: str) -> range:
    """Read steps from the first to the last, as in `"20-24"`; `""` is none. The first is at least 2.

    Raises:
        ValueError: the text is neither.
    """
    if not text:
        return range(0)
    match = _STEPS.match(text)
    if not match or not 2 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"cannot read {text!r} as steps; write FIRST-LAST, like '20-24', the first at least 2")
    return range(int(match[1]), int(match[2]) + 1)


def amount(share: float | Tokens) -> float:
    """The number of an entry of a mix, which is a weight or an amount of tokens."""
    return share.value if isinstance(share, Tokens) else share


def _value(number: str, suffix: str) -> float:
    """The number that was written: in floats, 4.1 * 10**6 is less than 4,100,000, and a phase would lose a batch."""
    return float(Decimal(number.replace("_", "")) * _SUFFIX[suffix])


def _short(value: float) -> str:
    """Shortest exact text: 40000000000.0 -> '40B', 4128768 -> '4128768'."""
    for suffix in ("T", "B", "M", "K"):
        scaled = value / _SUFFIX[suffix]
        text = f"{scaled:.12g}"
        if scaled >= 1 and _value(text, suffix) == value and len(text) <= 6:
            return text + suffix
    return repr(value).removesuffix(".0")


def _percent(share: float) -> str:
    """Text that reads back as exactly `share`; value * 100 / 100 is not always value."""
    percent = share * 100
    near = (percent, math.nextafter(percent, math.inf), math.nextafter(percent, 0))
    texts = [text for number in near for text in (f"{number:.12g}", repr(number))]
    return next(text for text in texts if float(text) / 100 == share) + "%"
