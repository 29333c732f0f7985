"""What `[eval] tasks` refuses; the runs with tasks are in tests/end_to_end/test_tasks_in_training.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.making import BYTES
from titan_yulan.config.sections import EvalSection
from titan_yulan.errors import UserError
from titan_yulan.eval.in_training import TaskEvaluation


@pytest.mark.parametrize(
    ("task", "message"),
    [("gsm8k", "gsm8k lets the model write"), ("held_out", "leave it out"), ("ceval", "no requests of ceval")],
)
def test_tasks_that_cannot_be_evaluated_in_training(tmp_path: Path, task: str, message: str) -> None:
    (tmp_path / "gsm8k.jsonl").write_text('{"context": "1 + 1?", "answer": "2"}')
    with pytest.raises(UserError, match=message):
        TaskEvaluation(EvalSection(tasks=(task,), requests=str(tmp_path)), BYTES, 48)
