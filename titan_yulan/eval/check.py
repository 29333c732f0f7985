"""Whether tasks can be run at all, seen before the first of them is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import UserError
from titan_yulan.eval.find_work import Work
from titan_yulan.eval.requests import Choice, Generation, shortened
from titan_yulan.eval.sandbox import check_sandbox


def check_works(
    works: Sequence[Work],
    tokenizer: Tokenizer,
    context: int,
    max_new_tokens: int | None = None,
    execute_code: bool = False,
) -> None:
    """See that all tasks can be run; the arguments are those of `eval.evaluate.Evaluator`.

    Raises:
        UserError: one would execute code, which was not asked for or cannot be done safely; or its requests do not
            fit the model or the task.
    """
    programs = [work.task.name for work in works if work.task.kind == "code"]
    if programs and not execute_code:
        raise UserError(
            f"{programs[0]} runs programs that the model writes: allow it with --execute-code (while training: "
            "eval.execute_programs = true), or leave the task out"
        )
    if programs:
        check_sandbox()
    for work in works:
        name = work.task.name
        if work.task.generates:
            check_room(shortened(cast(list[Generation], work.items), max_new_tokens), context)
        if work.tokenizer not in (None, tokenizer.fingerprint):
            raise UserError(
                f"{name} holds ids of another tokenizer than this model's: name the text files instead of held_out"
            )
        choices = cast(list[Choice], work.items) if work.task.metric == "accuracy_pmi" else []
        if any(item.unconditional is None for item in choices):
            raise UserError(f"{name} is reported by accuracy_pmi: its requests need the key 'unconditional'")


def check_room(requests: Sequence[Generation], context: int) -> None:
    """There must be room for what each request may write.

    Raises:
        UserError: a request may write more than the model reads.
    """
    for request in requests:
        if request.max_new_tokens >= context:
            raise UserError(
                f"request {request.id} may write {request.max_new_tokens} tokens, and the model reads {context}: lower "
                "--max-new-tokens (while training: eval.task_new_tokens), or raise --context if the model can"
            )
