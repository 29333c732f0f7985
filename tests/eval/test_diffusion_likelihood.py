"""Likelihoods under masked diffusion against the definitions, one row at a time in float64, and the exact bound over
all sets of hidden places."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.making import BYTES
from tests.eval.diffusion_models import MASK, bidirectional_decoder, diffusion
from tests.eval.test_unmask import run  # noqa: F401, a fixture
from titan_yulan import cli
from titan_yulan import config as configuration
from titan_yulan.data import hashing
from titan_yulan.data.loader import read_rows
from titan_yulan.errors import RunError, UserError
from titan_yulan.eval import diffusion_likelihood
from titan_yulan.eval.diffusion import diffusion_of
from titan_yulan.eval.diffusion_likelihood import DiffusionLikelihoods, draws
from titan_yulan.eval.evaluate import Evaluator
from titan_yulan.eval.find_work import Work, find_work
from titan_yulan.eval.in_training import TaskEvaluation
from titan_yulan.eval.likelihood import Span
from titan_yulan.eval.load import load_decoder
from titan_yulan.eval.open_model import TrainedModel
from titan_yulan.eval.requests import Choice, Text
from titan_yulan.eval.sampling import Sampling
from titan_yulan.eval.tasks import Task
from titan_yulan.eval.unmask import unmask_ids
from titan_yulan.model import Decoder
from titan_yulan.objective.masked_diffusion import MaskedDiffusion

_random = random.Random(5)
SPANS = [
    Span([_random.randrange(256) for _ in range(before)], [_random.randrange(256) for _ in range(after)])
    for before, after in [(1, 1), (9, 1), (9, 3), (4, 5), (20, 2), (1, 9), (2, 1)]
]
SMALL = 9  # ids of a model so small that all continuations can be tried


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return bidirectional_decoder()


@torch.no_grad()
def logprobs(decoder: Decoder, span: Span, hidden: set[int], mask: int = MASK) -> list[float]:
    """Of every token of the continuation, where the places `hidden` of it are; alone in its batch."""
    ids = [mask if place in hidden else token for place, token in enumerate(span.continuation)]
    logits = decoder(torch.tensor([[*span.context, *ids]]), causal=False)[0, len(span.context) :].log_softmax(-1)
    return logits[range(len(ids)), list(span.continuation)].tolist()


def chain_rule(decoder: Decoder, span: Span, mask: int = MASK) -> float:
    length = len(span.continuation)
    return sum(logprobs(decoder, span, set(range(j, length)), mask)[j] for j in range(length))


def losses(decoder: Decoder, span: Span) -> dict[frozenset[int], float]:
    """The loss of the hidden tokens for every set of hidden places."""
    places = range(len(span.continuation))
    sets = [frozenset(part) for size in places for part in itertools.combinations(places, size + 1)]
    return {hidden: -sum(logprobs(decoder, span, set(hidden))[place] for place in hidden) for hidden in sets}


def exact_bound(table: dict[frozenset[int], float], count: int) -> float:
    """The integral over t of 1/t sum over H of t^h (1 - t)^(m - h) loss(H): Euler's beta function of (h, m - h + 1)."""
    return sum(
        math.gamma(len(hidden)) * math.gamma(count - len(hidden) + 1) / math.gamma(count + 1) * loss
        for hidden, loss in table.items()
    )


def estimate(table: dict[frozenset[int], float], count: int, key: int, samples: int) -> float:
    """The Monte-Carlo sum, from the table."""
    found = [(time, frozenset(np.flatnonzero(hidden).tolist())) for time, hidden in draws(key, samples, count)]
    return sum(table[hidden] / time for time, hidden in found if hidden) / samples


@pytest.mark.parametrize("batch_tokens", [1, 50, 4096])
def test_left_to_right_is_the_chain_rule(decoder: Decoder, batch_tokens: int) -> None:
    found = DiffusionLikelihoods(decoder, 32, batch_tokens, diffusion=diffusion())(SPANS)
    for span, value in zip(SPANS, found, strict=True):
        assert value.logprob == pytest.approx(chain_rule(decoder, span), rel=1e-9)
        assert value.tokens == len(span.continuation) and value.greedy is None and not value.cut


def test_progress_is_told_when_a_batch_is_done(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    compute = DiffusionLikelihoods._batch_sums
    monkeypatch.setattr(
        DiffusionLikelihoods, "_batch_sums", lambda *arguments: (compute(*arguments), events.append("computed"))[0]
    )
    likelihoods = DiffusionLikelihoods(decoder, 8, 1, diffusion=diffusion())
    likelihoods([Span([1], [2, 3])], lambda done, total: events.append((done, total)))
    assert events == ["computed", (1, 2), "computed", (2, 2)]


def test_left_to_right_is_a_probability_over_all_continuations() -> None:
    decoder = bidirectional_decoder(SMALL)
    spans = [Span([1, 2], pair) for pair in itertools.product(range(SMALL), repeat=2)]
    found = DiffusionLikelihoods(decoder, 8, 4096, diffusion=diffusion(SMALL - 1))(spans)
    assert math.fsum(math.exp(value.logprob) for value in found) == pytest.approx(1.0, rel=1e-9)


def test_what_does_not_fit_is_computed_in_windows_that_see_nothing_behind_them(decoder: Decoder) -> None:
    long = Span([1, 2, 3], [_random.randrange(256) for _ in range(12)])
    whole = [*long.context, *long.continuation]
    likelihoods = DiffusionLikelihoods(decoder, 6, 4096, diffusion=diffusion())
    (found,) = likelihoods([long])
    windows = [Span(whole[2:3], whole[3:8]), Span(whole[7:8], whole[8:13]), Span(whole[9:13], whole[13:15])]
    assert found.logprob == pytest.approx(sum(chain_rule(decoder, window) for window in windows), rel=1e-9)
    assert found.cut and found.tokens == 12
    (part,) = likelihoods([Span(long.context, long.continuation[:10])])  # what follows changes nothing before it
    assert part.logprob == pytest.approx(found.logprob - chain_rule(decoder, windows[2]), rel=1e-9)
    with pytest.raises(UserError, match="no room for a token and one before it; raise --context"):
        DiffusionLikelihoods(decoder, 1, 64, diffusion=diffusion())


def test_the_bound_is_the_sum_over_its_samples(decoder: Decoder) -> None:
    spans = [span for span in SPANS if len(span.continuation) < 6]
    for batch_tokens in (60, 1 << 14):
        found = DiffusionLikelihoods(decoder, 32, batch_tokens, diffusion=diffusion(likelihood="bound", samples=6))
        for span, value in zip(spans, found(spans), strict=True):
            key = hashing.key("diffusion likelihood", " ".join(map(str, span.context)))
            count = len(span.continuation)
            expected = -estimate(losses(decoder, span), count, key, 6)
            assert value.logprob == pytest.approx(expected, rel=1e-9)


def test_the_bound_converges_to_the_exact_one(decoder: Decoder) -> None:
    span = SPANS[2]
    table = losses(decoder, span)
    exact = exact_bound(table, 3)
    orders = [
        -sum(logprobs(decoder, span, set(order[i:]))[order[i]] for i in range(3))
        for order in itertools.permutations(range(3))
    ]
    assert statistics.fmean(orders) == pytest.approx(exact, rel=1e-9)  # what the integral is, too
    found = [estimate(table, 3, key, 16) for key in range(600)]
    error = statistics.stdev(found) / math.sqrt(len(found))
    assert error < 0.02 * exact and statistics.fmean(found) == pytest.approx(exact, abs=4 * error)


def test_spreading_times_takes_noise_from_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of m tokens, each of which loses 1 + 3 h / m where h are hidden; the integral is the sum of that over h."""

    def typical_error(samples: int, count: int) -> float:
        exact, errors = sum(1 + 3 * h / count for h in range(1, count + 1)), []
        for key in range(200):
            found = [(time, int(hidden.sum())) for time, hidden in draws(key, samples, count)]
            bound = sum(h * (1 + 3 * h / count) / time for time, h in found if h) / samples
            errors.append(abs(bound - exact) / exact)
        return statistics.median(errors)

    assert 0.08 < typical_error(32, 1) < 0.13
    spread = typical_error(16, 50)
    monkeypatch.setattr(
        diffusion_likelihood, "times", lambda key, samples: hashing.uniform(key ^ 0x5EED, np.arange(samples))
    )
    assert spread < 0.04 and spread < 0.6 * typical_error(16, 50)


def test_times_are_spread_evenly_from_a_random_one() -> None:
    starts = []
    for key in range(50):
        found = np.sort(diffusion_likelihood.times(key, 8))
        assert 0 <= found[0] < 1 / 8 and np.allclose(np.diff(found), 1 / 8)
        starts.append(float(found[0]))
    assert len(set(starts)) == 50 and min(starts) < 0.02 and max(starts) > 0.1


def test_choices_of_a_question_share_times_and_places() -> None:
    likelihoods = DiffusionLikelihoods(bidirectional_decoder(), 32, 64, diffusion=diffusion(likelihood="bound"))
    rows = [likelihoods._samples(0, Span([1, 2, 3], list(range(count)))) for count in (4, 6)]
    short, long = ({row.weight: row.hidden for row in part} for part in rows)
    assert set(short) <= set(long) and len(short) > 20
    assert all(np.array_equal(long[weight][:4], hidden) for weight, hidden in short.items())


def test_a_cloze_is_right_where_the_model_would_write_it(decoder: Decoder) -> None:
    likelihoods = DiffusionLikelihoods(decoder, 32, 60, diffusion=diffusion())
    keys: dict[str, Any] = {"mask_token_id": MASK, "context": 32, "eos_id": 256, "vocab_size": 257}
    contexts, counts = [span.context for span in SPANS], [1, 2, 3, 4, 5, 6, 7]
    texts = unmask_ids(decoder, contexts, Sampling(temperature=0.0), new_tokens=counts, **keys)
    spans = [Span(context, text.ids) for context, text in zip(contexts, texts, strict=True)]
    assert likelihoods.written(spans, BYTES) == [True] * 7
    for place in range(3):
        ids = list(spans[2].continuation)
        ids[place] ^= 1
        assert likelihoods.written([spans[0], Span(contexts[2], ids)], BYTES) == [True, False]
    (free,) = unmask_ids(decoder, [[7]], Sampling(temperature=0.0), new_tokens=5, **keys)
    (then,) = unmask_ids(decoder, [free.ids[-4:]], Sampling(temperature=0.0), new_tokens=2, **keys)
    narrow = DiffusionLikelihoods(decoder, 6, 60, diffusion=diffusion())
    assert narrow.written([Span([7], [*free.ids, *then.ids]), Span([7], [*free.ids, 0, 0])], BYTES) == [True, False]


def test_damaged_weights_are_told() -> None:
    decoder = bidirectional_decoder()
    decoder.model.norm.weight.data[0] = float("nan")
    with pytest.raises(RunError, match="log-likelihood of nan"):
        DiffusionLikelihoods(decoder, 32, 64, diffusion=diffusion())(SPANS)


def test_held_out_parts_have_the_bound_of_validation(run: Path) -> None:  # noqa: F811
    decoder, config = load_decoder(run)
    (work,) = find_work(["held_out"], run, limit=3)
    assert work.held_out is not None and [item.id for item in work.items] == ["row 0", "row 1", "row 2"]
    keys = diffusion(samples=5)
    result = Evaluator(decoder, BYTES, 48, batch_tokens=100, diffusion=keys)(work)
    objective = MaskedDiffusion(replace(config.objective, validation_samples=5), 1, mask_token_id=MASK)
    batch = read_rows(work.held_out.rows, {0: work.held_out.tape}, np.arange(3), 3)
    sums = torch.zeros(3, dtype=torch.float64)
    for sample in range(5):
        inputs = objective.validation_inputs(batch, sample)
        with torch.no_grad():
            found = decoder(inputs.input_ids, causal=False).double().log_softmax(-1)
        sums -= (found.gather(2, inputs.targets[..., None])[..., 0] * inputs.weights).sum(1) / 5
    assert [row["logprob"] for row in result.rows] == pytest.approx((-sums).tolist(), rel=1e-5)
    assert [row["tokens"] for row in result.rows] == [48] * 3
    assert result.metrics["perplexity"] == pytest.approx(math.exp(float(sums.sum()) / 144), rel=1e-5)
    text = [token for token in batch.tokens[0, :-1].tolist() if token != 256]
    assert result.rows[0]["bytes"] == len(text)
    with pytest.raises(UserError, match="this model predicts the next token"):
        Evaluator(decoder, BYTES, 48)(work)


def test_texts_have_the_bound_and_answers_what_was_asked_for(decoder: Decoder) -> None:
    text = Work(Task("text", "text", "bits_per_byte", ""), [Text("a", "some text")], "")
    choice = Work(Task("c", "choice", "accuracy", ""), [Choice("a", ("x",) * 2, (" one", " three"), 0, "A:")], "")
    found = {}
    for likelihood in ("left_to_right", "bound"):
        keys = diffusion(likelihood=likelihood, samples=6)
        evaluate = Evaluator(decoder, BYTES, 48, diffusion=keys)
        likelihoods = DiffusionLikelihoods(decoder, 48, 64, diffusion=replace(keys, likelihood="bound"))
        (bound,) = likelihoods([Span([256], list(b"some text"))])
        assert evaluate(text).rows[0]["logprob"] == pytest.approx(bound.logprob, rel=1e-9)
        found[likelihood] = evaluate(choice).rows[0]["logprobs"]
    spans = [Span(list(b"x"), list(answer)) for answer in (b" one", b" three")]
    assert found["left_to_right"] == pytest.approx([chain_rule(decoder, span) for span in spans], rel=1e-9)
    assert found["bound"] != pytest.approx(found["left_to_right"], rel=1e-3)


def test_the_command_evaluates_by_the_objective(
    run: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = {
        "cloze": {"context": "a text that", "continuation": " goes"},
        "answer": {"context": "1 + 1 =", "answer": "2", "stop": ["\n"], "max_new_tokens": 5},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    tasks = ",".join(["held_out", *(str(tmp_path / f"{name}.jsonl") for name in rows)])
    command = ["eval", "--run", str(run), "--tasks", tasks, "--output", str(tmp_path / "report"), "--limit", "2"]
    assert cli.main([*command, "--samples", "3", "--likelihood", "bound"]) == 0
    assert "likelihood bound, samples 3" in capsys.readouterr().out
    (model,) = json.loads((tmp_path / "report" / "evaluation.json").read_text())["models"]
    assert (model["likelihood"], model["samples"]) == ("bound", 3)
    assert model["tasks"]["held_out/text"]["items"] == 2
    assert cli.main([*command, "--samples", "0"]) == 2
    assert "--samples 0: give at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [{"samples": 3}, {"likelihood": "bound"}])
def test_a_model_of_the_next_token_has_no_bound(decoder: Decoder, asked: dict[str, Any]) -> None:
    model = TrainedModel(decoder, BYTES, "", "float32", 48, 48)
    assert diffusion_of(model) is None
    with pytest.raises(UserError, match=r"--\w+ is for models of .*masked_diffusion.* leave it out"):
        diffusion_of(model, **asked)


def test_tasks_in_training_take_the_objective_of_the_run(run: Path, tmp_path: Path) -> None:  # noqa: F811
    config = configuration.load(run / "config.toml").config
    (tmp_path / "lambada.jsonl").write_text('{"context": "a text", "continuation": " goes"}')
    section = replace(config.eval, tasks=("lambada",), requests=str(tmp_path), likelihood="bound", likelihood_samples=7)
    tasks = TaskEvaluation(section, BYTES, 48, config.objective, MASK)
    assert tasks._diffusion == diffusion(likelihood="bound", samples=7)
    assert TaskEvaluation(section, BYTES, 48, config.objective, None)._diffusion is None
