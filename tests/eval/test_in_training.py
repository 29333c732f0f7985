"""What `[eval] tasks` refuses; the runs with tasks are in tests/end_to_end/test_tasks_in_training.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.making import BYTES
from titan_yulan.config.sections import EvalSection
from titan_yulan.errors import UserError
from titan_yulan.eval.in_training import TaskEvaluation


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tasks": ("held_out",)}, "leave it out"),
        ({"tasks": ("ceval",)}, "no requests of ceval"),
        ({"tasks": ("humaneval",)}, r"humaneval runs programs .* eval.execute_programs = true"),
        ({"tasks": ("gsm8k",)}, r"may write 48 tokens, and the model reads 48: lower .*eval.task_new_tokens"),
    ],
)
def test_tasks_that_cannot_be_evaluated_in_training(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    (tmp_path / "gsm8k.jsonl").write_text('{"context": "1 + 1?", "answer": "2", "max_new_tokens": 48}')
    (tmp_path / "humaneval.jsonl").write_text('{"context": "x", "test": "pass"}')
    with pytest.raises(UserError, match=message):
        TaskEvaluation(EvalSection(requests=str(tmp_path), **keys), BYTES, 48)
    TaskEvaluation(EvalSection(requests=str(tmp_path), tasks=("gsm8k",), task_new_tokens=47), BYTES, 48)
