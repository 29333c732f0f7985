"""Log-likelihoods and greedy writing against transformers, which computes one request at a time."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.making import BYTES, EOS
from tests.eval.small_models import write_model
from titan_yulan.errors import UserError
from titan_yulan.eval import generate
from titan_yulan.eval.batches import batches_of
from titan_yulan.eval.cache import KeyValueCache
from titan_yulan.eval.likelihood import Likelihood, Likelihoods, Span, encode_pair
from titan_yulan.eval.open_model import TrainedModel, open_model
from titan_yulan.eval.requests import Generation
from titan_yulan.eval.write import Writer


@pytest.fixture(scope="module")
def peer_and_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TrainedModel]:
    folder = tmp_path_factory.mktemp("eval") / "llama"
    peer = write_model(folder)
    return peer, open_model(folder)


@torch.no_grad()
def direct(peer: Any, span: Span, context: int) -> tuple[float, bool]:
    """By the definition, all logits in float64."""
    ids = torch.tensor([[*span.context, *span.continuation]])[:, -context - 1 :]
    logprobs = peer(ids[:, :-1]).logits[0].double().log_softmax(-1)[-len(span.continuation) :]
    targets = torch.tensor(span.continuation)
    return float(logprobs.gather(1, targets[:, None]).sum()), bool((logprobs.argmax(1) == targets).all())


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_likelihoods_are_those_of_transformers(peer_and_model: Any, batch_tokens: int) -> None:
    peer, model = peer_and_model
    generator = random.Random(3)
    spans = [
        Span([generator.randrange(250) for _ in range(before)], [generator.randrange(250) for _ in range(after)])
        for before, after in [(1, 1), (30, 1), (30, 5), (7, 20), (60, 3), (1, 32), (2, 1)]
    ]
    spans += [Span(spans[1].context, [letter]) for letter in (4, 5, 6)]
    spans += [Span(spans[3].context, spans[i].continuation) for i in (2, 4, 3, 0)]  # one row for several continuations
    likeliest = int(peer(torch.tensor([list(spans[2].context)])).logits[0, -1].argmax())
    spans.append(Span(spans[2].context, [likeliest]))
    found = Likelihoods(model.decoder, 32, batch_tokens)(spans)
    for span, value in zip(spans, found, strict=True):
        logprob, greedy = direct(peer, span, 32)
        assert value.logprob == pytest.approx(logprob, rel=1e-5, abs=1e-5) and value.greedy == greedy
        assert value.tokens == len(span.continuation)
        assert value.cut == (len(span.context) + len(span.continuation) > 33)
    assert found[-1].greedy and not found[0].greedy


def test_equal_contexts_are_computed_once(peer_and_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peer_and_model[1]
    rows = []
    forward = type(model.decoder).forward
    monkeypatch.setattr(
        type(model.decoder), "forward", lambda self, ids, **more: rows.append(len(ids)) or forward(self, ids, **more)
    )
    spans = [Span([1, 2, 3], [letter]) for letter in range(4)] + [Span([1, 2, 3], [4, 5, 6]), Span([1, 2, 3], [4, 7])]
    Likelihoods(model.decoder, 64, 4096)(spans)
    assert rows == [1]
    Likelihoods(model.decoder, 5, 4096)(spans)  # all do not fit into one row
    assert rows == [1, 2]


def test_pairs_are_split_where_the_context_ends() -> None:
    assert encode_pair(BYTES, "a b", " c") == Span(list(b"a b"), list(b" c"))
    assert encode_pair(BYTES, "a b ", "c") == Span(list(b"a b"), list(b" c"))
    assert encode_pair(BYTES, "", "c") == Span([EOS], list(b"c"))
    with pytest.raises(UserError, match="makes nothing of ''"):
        encode_pair(BYTES, "a", "")


def test_what_is_longer_than_the_context_is_predicted_in_windows(peer_and_model: Any) -> None:
    peer, model = peer_and_model
    ids = list(range(10))
    # what is read for each window of at most 4 tokens, and how many tokens it predicts
    windows = [((EOS, 0, 1, 2, 3), 4), ((3, 4, 5, 6, 7), 4), ((5, 6, 7, 8, 9), 2)]
    expected = sum(direct(peer, Span(row[:-n], row[-n:]), 4)[0] for row, n in windows)
    (found,) = Likelihoods(model.decoder, 4, 64)([Span([EOS], ids)])
    assert found.logprob == pytest.approx(expected, rel=1e-5) and found.tokens == 10 and found.cut
    (whole,) = Likelihoods(model.decoder, 10, 64)([Span([EOS], ids)])
    assert whole.logprob == pytest.approx(direct(peer, Span([EOS], ids), 10)[0], rel=1e-5) and not whole.cut


def test_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = [5, 9, 1, 9, 30, 2, 2]
    batches = batches_of(lengths, 18)
    assert sorted(place for batch in batches for place in batch) == list(range(7))
    assert all(len(batch) * lengths[batch[0]] <= 18 or len(batch) == 1 for batch in batches)
    assert batches[0] == [4] and batches[1] == [1, 3]


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), max_size=12), st.integers(1, 200))
def test_a_batch_has_room_for_its_longest_answer_behind_its_longest_prompt(
    rows: list[tuple[int, int]], budget: int
) -> None:
    lengths, rooms = [length for length, _ in rows], [room for _, room in rows]
    batches = batches_of(lengths, budget, rooms)
    assert sorted(place for batch in batches for place in batch) == list(range(len(rows)))
    for batch in batches:
        places = max(lengths[place] for place in batch) + max(rooms[place] for place in batch)
        assert len(batch) * places <= budget or len(batch) == 1


def test_the_cache_of_a_batch_is_within_the_budget(peer_and_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peer_and_model[1]
    taken: list[int] = []

    def cache(pads: list[int], length: int, device: torch.device) -> KeyValueCache:
        taken.append(len(pads) * length)
        return KeyValueCache(pads, length, device)

    monkeypatch.setattr(generate, "KeyValueCache", cache)
    long, short = Generation("1", "x" * 40, (), 4), Generation("2", "x", (), 40)
    Writer(model.decoder, model.tokenizer, 64, 100)([long, short])  # 44 and 41 places, together 2 x 80
    assert len(taken) == 2 and max(taken) <= 100


def test_progress_is_told_when_a_batch_is_done(peer_and_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    compute = Likelihoods._batch
    monkeypatch.setattr(Likelihoods, "_batch", lambda *arguments: (compute(*arguments), events.append("computed"))[0])
    spans = [Span([1, 2, i], [4]) for i in range(3)]
    Likelihoods(peer_and_model[1].decoder, 8, 3)(spans, lambda done, total: events.append((done, total)))
    assert events == ["computed", (1, 3), "computed", (2, 3), "computed", (3, 3)]


def test_writing_is_the_greedy_writing_of_transformers(peer_and_model: Any) -> None:
    peer, model = peer_and_model
    texts = ["one", "another context, longer", "x", "汉字", "the same length as", "some more text here"]
    requests = [Generation(str(i), text, (), 12 + i) for i, text in enumerate(texts)]
    together = Writer(model.decoder, model.tokenizer, 64, 4096)(requests)
    alone = Writer(model.decoder, model.tokenizer, 64, 1)(requests)
    assert together == alone
    for request, written in zip(requests, alone, strict=True):
        ids = torch.tensor([model.tokenizer.encode(request.context)])
        for _ in range(written.tokens):
            logits = peer(ids).logits[:, -1, : model.tokenizer.vocab_size]
            ids = torch.cat([ids, logits.argmax(1, keepdim=True)], dim=1)
        expected = model.tokenizer.decode(ids[0, -written.tokens :].tolist())
        assert written.text == expected and not written.cut
        ended = int(peer(ids).logits[0, -1, : model.tokenizer.vocab_size].argmax()) == model.tokenizer.eos_id
        assert written.tokens == request.max_new_tokens or ended


def test_writing_ends_before_a_stop(peer_and_model: Any) -> None:
    model = peer_and_model[1]
    write = Writer(model.decoder, model.tokenizer, 64, 4096)
    free = write([Generation("1", "one", (), 12)])[0]
    stop = free.text[3:5]
    stopped = write([Generation("1", "one", (stop, "never"), 12), Generation("2", "x", (), 3)])
    assert stopped[0].text == free.text[: free.text.index(stop)] and stopped[0].tokens < 12
    assert stopped[1].tokens == 3


def test_a_long_context_loses_its_beginning(peer_and_model: Any) -> None:
    model = peer_and_model[1]
    write = Writer(model.decoder, model.tokenizer, 16, 4096)
    text = "0123456789abcdef"
    cut, whole = write([Generation("1", text, (), 6)]), write([Generation("1", text[-10:], (), 6)])
    assert cut[0].cut and not whole[0].cut and cut[0].text == whole[0].text
    with pytest.raises(UserError, match="may write 16 tokens, and the model reads 16"):
        write([Generation("1", "a", (), 16)])


def test_no_request_is_no_work(peer_and_model: Any) -> None:
    found: list[Likelihood] = Likelihoods(peer_and_model[1].decoder, 8, 64)([])
    assert found == []
