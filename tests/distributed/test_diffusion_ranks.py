"""Likelihoods and texts under masked diffusion, with the help of another rank, are those of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.data.making import BYTES, make, write_files
from tests.distributed.layout_cases import VOCABULARY, Case, make_learner
from tests.distributed.ranks import run_ranks
from tests.distributed.test_task_layouts import Found, requests, spans, whole, works
from tests.eval.diffusion_models import bidirectional_decoder, diffusion
from titan_yulan.eval.diffusion import Diffusion
from titan_yulan.eval.diffusion_likelihood import DiffusionLikelihoods
from titan_yulan.eval.evaluate import Evaluator
from titan_yulan.eval.find_work import Work
from titan_yulan.eval.held_out_bound import HeldOut
from titan_yulan.eval.requests import Text
from titan_yulan.eval.share import Share
from titan_yulan.eval.tasks import Task
from titan_yulan.eval.validation import HeldOutRows, held_out_tape
from titan_yulan.eval.write import Writer
from titan_yulan.model import Decoder
from titan_yulan.parallel.fsdp import reshard
from titan_yulan.parallel.process import World

# 250 rows: the last one is the mask
CASES = (
    Case(2, "FSDP 2"),
    Case(2, "TP 2", {"tensor": 2}, model="grouped"),
    Case(2, "CP 2", {"context": 2}, model="norms"),
)


def held_out(folder: str) -> Work:
    tape = held_out_tape(folder)
    rows = HeldOutRows({0: tape}, 7, 16)
    assert rows.batch_rows == 7
    items = [Text(f"row {number}", "") for number in range(7)]
    return Work(Task("held_out", "text", "perplexity", ""), [*items], "", held_out=HeldOut(tape, rows))


def share_the_work(world: World, folder: str) -> list[bool]:
    """Whether this rank's results, with the other's help and a whole model, are to the bit those of one alone."""
    decoder, share = bidirectional_decoder(), Share(world.rank, world.size, world.host)
    same = []
    for work in [*(replace(work, items=work.items[:5]) for work in works()), held_out(folder)]:
        for likelihood in ("left_to_right", "bound") if work.task.kind == "cloze" else ("left_to_right",):
            keys = diffusion(likelihood=likelihood, samples=3)
            together = Evaluator(decoder, BYTES, 48, batch_tokens=300, share=share, diffusion=keys)(work)
            alone = Evaluator(decoder, BYTES, 48, batch_tokens=300, diffusion=keys)(work)
            same.append(replace(together, seconds=0.0) == replace(alone, seconds=0.0))
    return same


def measure(decoder: Decoder, keys: Diffusion, share: Share | None = None) -> tuple[list[Found], list[bool]]:
    likelihoods = DiffusionLikelihoods(decoder, 24, 240, share, diffusion=keys)
    write = Writer(decoder, BYTES, 24, 240, share, mask_token_id=keys.mask_token_id)
    bound = likelihoods(spans(), likelihood="bound")
    return [likelihoods(spans()), bound, write(requests()[:5])], likelihoods.written(spans(), BYTES)


def compare(world: World, folder: str) -> tuple[list[bool], list]:
    """What `share_the_work` says; for each case its name and what the ranks found together and one did."""
    found = []
    for case in CASES:
        learner, keys = make_learner(case, world), diffusion(VOCABULARY - 1, samples=3)
        weights = {name: whole(parameter).clone() for name, parameter in learner.decoder.named_parameters()}
        share = Share(learner.mesh.data_rank, learner.mesh.data_size, world.host, together=True)
        together = measure(learner.decoder, keys, share)
        reshard(learner.decoder)
        alone = Decoder(learner.config.model)
        alone.load_state_dict(weights)
        found.append((case.name, together, measure(alone, keys)))
    return share_the_work(world, folder), found


def test_two_ranks_find_what_one_does(tmp_path: Path) -> None:
    make(write_files(tmp_path / "input", files=2, rows=9), tmp_path / "held_out")
    shared, ranks = zip(*run_ranks(compare, 2, str(tmp_path / "held_out"), limit=200), strict=True)
    assert shared == ([True] * 6,) * 2
    for cases in ranks:
        for name, (together, written), (alone, written_alone) in cases:
            assert written == written_alone and together[2] == alone[2], name
            for left, right in zip(together[0] + together[1], alone[0] + alone[1], strict=True):
                assert abs(left.logprob - right.logprob) < 1e-4 * max(1.0, abs(right.logprob)), name
                assert (left.tokens, left.greedy, left.cut) == (right.tokens, right.greedy, right.cut), name
