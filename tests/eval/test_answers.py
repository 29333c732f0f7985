"""Answer equivalence against a table of cases, and what counts as the answer in what a model wrote."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_yulan.eval.answers import boxed, equivalent, grade, last_number, mathematical_answer

SAME = [
    (r"\frac12", r"\frac{1}{2}"),
    ("0.5", "1/2"),
    (r"\dfrac{3}{4}", "0.75"),
    (r"1\frac12", r"\frac32"),
    (r"-\frac{2}{3}", r"\frac{-2}{3}"),
    ("10,000", "10000"),
    (r"11,\! 111,\!100", "11111100"),
    (r"\$18.90", "18.9"),
    (r"50\%", "50"),
    (r"90^\circ", "90"),
    (r"5\text{ cm}", "5"),
    (r"10\text{ square units}", "10"),
    ("x=5", "5"),
    (r"x \in [2,5)", "[2,5)"),
    ("y=2x+3", "y = 3+2x"),
    ("p-q", "-q+p"),
    ("x^2+2x+1", "(x+1)^2"),
    ("2k+2", "2(k+1)"),
    ("5x", "x5"),
    ("2^{3}", "8"),
    ("6!", "720"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"11\sqrt2", r"11\sqrt{2}"),
    (r"\sqrt[3]{8}", "2"),
    (r"\frac{\sqrt{3}}{2}", r"\sqrt3/2"),
    (r"\sin 0", "0"),
    (r"3\pm2\sqrt2", r"3\pm 2\sqrt{2}"),
    (r"(3,\frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"(-\infty, 2)", r"(-\infty,2)"),
    ("1,2,3", "3,2,1"),
    ("5 and 6", "6,5"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\text{Evelyn}", "evelyn"),
    (r"\text{(C)}", "(C)"),
    ("25_8", "25_{8}"),
    (r"2516_{\text{eight}}", "2516_{eight}"),
    (r"\frac1{72}", r"\dfrac{1}{72}"),
    (r"1{,}000{,}000", "1,000,000"),
    (r"1\,000\,000", "1000000"),
    ("10 000", "10000"),
    (r"5^{\text{th}}", "5"),
    ("21st", "21"),
    (r"90^{\circ}", "90 degrees"),
    (r"12\text{ cm}^2", "12"),
    ("60 miles per hour", "60"),
    (r"(-\infty, 0) \cup (0, \infty)", r"(0,\infty)\cup(-\infty,0)"),
    (r"[-1, \frac12) \cup \{3\}", r"\left[-1, 0.5\right) \cup \left\{3\right\}"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"),
    (r"\pm 3", "3,-3"),
    (r"\varnothing", r"\emptyset"),
    (r"\{ \}", r"\emptyset"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&\frac42\\3&4\\\end{pmatrix}"),
    (r"\begin{array}{cc} 1 & 2 \end{array}", r"\begin{array}{c|c}1&2\end{array}"),
    (r"2\begin{bmatrix} 1 \\ 2 \end{bmatrix}", r"2 \begin{bmatrix} 1.0 \\ 2 \end{bmatrix}"),
    ("(1,200)", "(1, 200)"),
    ("(-1,200]", "(-1, 200]"),
    ("(1,2),(3,4)", "(3,4), (1,2)"),
    (r"2\frac{\pi}{3}", r"\frac{2\pi}{3}"),
    (r"2\frac{3}{4}", "2.75"),
    (r"2^3\frac12", "4"),
    ("x=3", "3"),
    ("x=1,x=2", "x = 2 or x = 1"),
    ("x=1, x=2", "1,2"),
    ("x=1, y=2", "y=2, x=1"),
    (r"5\text{ feet }6\text{ inches}", "5 ft 6 in"),
    ("f(x)=x+1", "f(x) = 1+x"),
    (r"\binom{5}{2}", "10"),
    (r"\sin 2x", r"\sin(2x)"),
    (r"\sin^2 x", r"(\sin x)^2"),
    (r"\sec x", r"1/\cos x"),
    (r"\cot x \sin x", r"\cos x"),
    (r"\cos\frac{\pi}{3}", "1/2"),
    (r"\sin \pi", "0"),
    (r"\sqrt{50}-5\sqrt2", "0"),
    (r"(\sqrt2-1)^{10}", r"3363-2378\sqrt2"),
    (r"\sqrt[3]{-8}", "-2"),
    ("i^2", "-1"),
    (r"+\infty", r"\infty"),
    ("2^{100}", "1267650600228229401496703205376"),
    ("10^{10^{10}}", "10^{10^{10}}"),
    ("007", "7"),
]
DIFFERENT = [
    ("[0,1)", "(0,1)"),
    ("(1,2)", "(2,1)"),
    ("(1,2,3)", "1,2,3"),
    (r"\{1,2\}", "(1,2)"),
    ("1,2", "1,2,2"),
    ("x+1", "x+2"),
    (r"\frac{1}{3}", "0.333"),
    ("0", r"\pi"),
    ("i", "j"),
    ("12_5", "12"),
    ("25_8", "25_{9}"),
    ("10000000001", "10000000002"),
    ("2 3", "6"),
    (r"[0,1) \cup (2,3)", r"[0,1] \cup (2,3)"),
    (r"(0,1) \cup (2,3)", "(0,1)"),
    (r"1 \pm 2", "3"),
    ("5 cm", "6 cm"),
    ("C", "B"),
    (r"\text{even}", r"\text{odd}"),
    ("9^9^9^9", "1"),
    ("1/0", "2"),
    ("", ""),
    ("\\frac{1}{", "1"),
    ("(" * 5000, "1"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 4 & 3 \\ 2 & 1 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 & 2 & 3 \\ 4 & 5 & 6 \end{pmatrix}", r"\begin{pmatrix} 1 & 3 & 2 \\ 4 & 5 & 6 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 & 2 & 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 \\ 2 \\ 3 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 & 3 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 \\ 2 \\ 3 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 3 \\ 2 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{vmatrix} 1 \\ 2 \end{vmatrix}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"2\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "1,2"),
    ("1" * 5000, "5"),
    ("1" * 5000, "1" * 4999 + "2"),
    ("10^{10^{10}}", "10^{10^{11}}"),
    ("x^{10^{10}}", "y^{10^{11}}"),
    ("e^{-10000}", "0"),
    ("2 1/2", "21/2"),
    ("1 2", "12"),
    ("-1 0", "-10"),
    (r"\frac1{2^{50}}", r"\frac1{2^{51}}"),
    ("2^{-50}", "0"),
    ("10^{-13}", "0"),
    (r"\pi \cdot 10^{-13}", "0"),
    (r"\tan\frac{\pi}{2}", "5"),
    ("10^{10}", "10000000001"),
    ("2^{100}", "2^{100}+1"),
    ("1.414213562", r"\sqrt2"),
    ("1.414213562373", r"\sqrt2"),
    ("3.14159265359", r"\pi"),
    (r"\binom52", r"\binom25"),
    (r"\binom62", r"\binom43"),
    (r"\cot 2x", r"2\cot x"),
    (r"\overrightarrow{AB}", r"\overrightarrow{BA}"),
    (r"2\frac{\pi}{3}", r"2+\frac\pi3"),
    ("east", "seat"),
    ("no", "on"),
    ("CAB", "ABC"),
    ("(CAB)", "ABC"),
    ("x=3", "y=3"),
    ("f(x)=x", "g(x)=x"),
    (r"x\in[1,2]", r"y\in[1,2]"),
    ("x=1,y=2", "x=2,y=1"),
    ("x=1,y=2", "1,2,3"),
    (r"5\text{ feet }6\text{ inches}", "56"),
    (r"5^\circ30", "530"),
    ("1,2,100", "1,2100"),
    ("1,200", "(1,200)"),
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_the_same_answer(first: str, second: str) -> None:
    assert equivalent(first, second) and equivalent(second, first)


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_another_answer(first: str, second: str) -> None:
    assert not equivalent(first, second) and not equivalent(second, first)


PIECES = st.sampled_from(
    [
        *"0123456789.,+-*/^(){}[]!&=xei \n",
        *(r"\\ \{ \} \frac \sqrt \sin \tan \ln \binom \pi \pm \cup \infty \begin{pmatrix} \end{pmatrix}".split()),
        *(r"\boxed{", r"\text{", " and ", "^{10^{10}}", "7" * 4301, "(" * 300),
    ]
)
FORMULAS = st.lists(PIECES, max_size=20).map("".join)
REFERENCES = st.sampled_from([first for first, _ in SAME + DIFFERENT]) | FORMULAS


@given(FORMULAS, REFERENCES)
def test_any_two_texts_can_be_compared_either_way(first: str, second: str) -> None:
    assert equivalent(first, second) == equivalent(second, first)


@given(FORMULAS | st.text(), REFERENCES, st.sampled_from(["number", "mathematics", "contains", ""]))
def test_any_text_has_a_grade(written: str, answer: str, how: str) -> None:
    assert 0.0 <= grade(written, [answer], how) <= 1.0


@pytest.mark.parametrize(
    "text",
    [
        *("9" * 5000, "9" * 5000 + "!", "2^" * 600 + "2", "9!" * 300, "10^{10^{10}}", "-" * 1900 + "1"),
        *(r"\sqrt" * 390 + "2", r"\frac{" * 300 + "1", "(" * 900 + "1" + ")" * 900, "(0," * 600 + "1" + ")" * 600),
        *(r"\{1," * 400 + "1" + r"\}" * 400, "(2^{9999}+x)" * 150, "1000!" * 300, "{1/(x+" * 250 + "1" + ")}" * 250),
        *("1" + " " * 20000, r"\text{" * 4000, "1,000" * 4000 + "1", r"\begin{pmatrix}" * 130, r"\pm" * 5000),
        *("x=" * 5000, "1 and " * 5000, "a" * 5000, "((" * 200 + "1,2" + "))" * 200, r"\ln" * 600 + "2"),
    ],
)
def test_no_text_is_too_long_too_deep_or_too_large(text: str) -> None:
    for answer in ("1", text):
        written = text + " "
        assert grade(rf"\boxed{{{written}}}", [answer + "+1", answer + "x"], "mathematics") == 0.0
        assert grade(written, [answer + "5"], "number") in (0.0, 1.0)


def test_numbers_are_compared_to_the_last_digit() -> None:
    assert grade("9" * 5000, ["9" * 5000 + ".0"], "number") == 1.0
    assert grade("9" * 5000, ["9" * 4999 + "8"], "number") == 0.0


@given(st.fractions(min_value=-1000, max_value=1000, max_denominator=1000), st.integers(1, 9))
def test_fractions_are_compared_by_value(value, factor: int) -> None:
    written = rf"\frac{{{value.numerator * factor}}}{{{value.denominator * factor}}}"
    assert equivalent(written, f"{value.numerator}/{value.denominator}")
    assert not equivalent(written, f"{value.numerator + 1}/{value.denominator}")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.", 7.0),
        ("She has $1,234.50 left", 1234.5),
        ("from -3 to -2", -2.0),
        ("#### 18", 18.0),
        ("1, 2", 2.0),
        ("that is 8-3", 3.0),
        ("12 - 15 = -3", -3.0),
        ("none", None),
    ],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $\boxed{\frac{1}{2}}$, not \boxed{3}", "3"),
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed 5 apples", "5"),
        (r"\boxed{1", None),
        ("no box", None),
    ],
)
def test_box(text: str, answer: str | None) -> None:
    assert boxed(text) == answer


def test_an_answer_without_a_box() -> None:
    assert equivalent(mathematical_answer("The final answer is $[2,5)$. I hope it is correct.") or "", "[2,5)")
    assert mathematical_answer("about 3 or 4") == "4"
    assert mathematical_answer("nothing") is None


def test_grades() -> None:
    assert grade("she pays 5 + 13 = 18 dollars.", ["18"], "number") == 1.0
    assert grade("she pays 17", ["18"], "number") == 0.0 == grade("nothing", ["18"], "number")
    assert grade(r"hence \boxed{0.5}", [r"\frac{1}{2}"], "mathematics") == 1.0
    assert grade("The keys are 123 and ABC.", ["123", "abc", "789"], "contains") == pytest.approx(2 / 3)
    assert grade(" Paris\n", ["Paris"], "") == 1.0 and grade("Paris!", ["Paris"], "") == 0.0
