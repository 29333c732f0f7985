"""Unmasking against the definition, one text at a time in float64, and `titan-yulan generate` for masked diffusion."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.making import BYTES, make, write_files
from tests.eval.diffusion_models import MASK, bidirectional_decoder
from tests.eval.test_evaluation import save
from titan_yulan import cli
from titan_yulan import config as configuration
from titan_yulan.data.tokenizer import save_ranks
from titan_yulan.errors import RunError, UserError
from titan_yulan.eval.generate import continue_ids
from titan_yulan.eval.load import load_decoder
from titan_yulan.eval.sample import continue_prompt
from titan_yulan.eval.sampling import Sampling
from titan_yulan.eval.unmask import unmask_ids, writing
from titan_yulan.model import Decoder

PROMPTS = [[random.Random(i).randrange(256) for _ in range(length)] for i, length in enumerate([5, 1, 17, 9, 17, 2])]
GREEDY = Sampling(temperature=0.0)
DRAWN = Sampling(temperature=1.3, top_k=30, top_p=0.9, seed=4)
NEW = [12, 7, 12, 1, 9, 12]
KEYS: dict[str, Any] = {"mask_token_id": MASK, "context": 2048, "eos_id": 256, "vocab_size": 257}
PARTS = {None: lambda new: [1] * new, 1: lambda new: [new], 5: lambda new: [len(p) for p in split(new, 5)]}


def split(count: int, parts: int) -> list[range]:
    """0 .. count - 1 in at most so many parts, equal up to one, the larger ones as late and even as can be."""
    parts = min(parts, count)
    return [range(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return bidirectional_decoder()


@torch.no_grad()
def direct(decoder: Decoder, prompt: list[int], new: int, steps: int | None, sampling: Sampling, eos: int = 256) -> Any:
    """The text and, pass by pass, the places that were filled."""
    ids, order = [*prompt, *[MASK] * new], []
    numbers = sampling.numbers(prompt, new)
    for count in PARTS[steps](new):
        end = ids.index(eos, len(prompt)) if eos in ids[len(prompt) :] else len(ids)
        hidden = [place for place in range(len(prompt), end) if ids[place] == MASK]
        logits = decoder(torch.tensor([ids]), causal=False)[0, :, :257]
        highest = logits.softmax(-1).amax(-1)
        places = sorted(hidden, key=lambda place: (-float(highest[place]), place))[:count]
        for place in places:
            (ids[place],) = sampling.choose(logits[place : place + 1], [numbers[place - len(prompt)]])
        order.append({place - len(prompt) for place in places})
    written = ids[len(prompt) :]
    return written[: written.index(eos)] if eos in written else written, [part for part in order if part]


@pytest.mark.parametrize("steps", [None, 1, 5])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_the_surest_places_are_filled_first(decoder: Decoder, steps: int | None, sampling: Sampling) -> None:
    placed: list[list[int]] = [[] for _ in PROMPTS]

    def note(row: int, place: int, token: int) -> bool:
        placed[row].append(place)
        return True

    found = unmask_ids(decoder, PROMPTS, sampling, new_tokens=NEW, steps=steps, placed=note, **KEYS)
    expected = [direct(decoder, prompt, new, steps, sampling) for prompt, new in zip(PROMPTS, NEW, strict=True)]
    assert [text.ids for text in found] == [ids for ids, _ in expected]
    for places, (_, order) in zip(placed, expected, strict=True):
        assert [set(places[a:b]) for a, b in edges(order)] == order
    assert any(places != sorted(places) for places in placed) == (steps != 1)
    assert {text.ending for text in found} <= {"length", "end of text"}


def edges(parts: list[set[int]]) -> list[tuple[int, int]]:
    ends = [sum(map(len, parts[:i])) for i in range(len(parts) + 1)]
    return list(itertools.pairwise(ends))


def test_end_of_text_ends_a_text_where_it_is_written(decoder: Decoder) -> None:
    free = direct(decoder, PROMPTS[0], 12, None, GREEDY)[0]
    ends = []
    for eos in dict.fromkeys(free):  # as if it had been trained to write that where the text is over
        expected = direct(decoder, PROMPTS[0], 12, None, GREEDY, eos)[0]
        passes: list[bool] = []
        (found,) = unmask_ids(
            decoder,
            PROMPTS[:1],
            GREEDY,
            new_tokens=12,
            join=lambda goes_on, passes=passes: passes.append(goes_on) or goes_on,
            **KEYS | {"eos_id": eos},
        )
        assert found.ids == expected and found.ending == "end of text"
        assert passes[-1] is False and len(passes) <= 12
        ends.append(len(passes))
    assert min(ends) < 12  # what stands behind the end is not filled


def test_neither_the_mask_nor_padding_rows_are_written() -> None:
    decoder = bidirectional_decoder()
    decoder.head_weight().data[40:] *= 100.0  # whatever the hidden state, some of them are far the likeliest
    hot = Sampling(temperature=3.0, top_k=0, seed=1)
    for sampling in (hot, GREEDY):
        found = unmask_ids(decoder, PROMPTS, sampling, new_tokens=12, **KEYS | {"vocab_size": 40})
        assert max(token for text in found for token in text.ids) < 40


def test_text_is_passed_on_as_far_as_nothing_in_it_is_hidden(decoder: Decoder) -> None:
    heard: list[list[int]] = []
    plain = unmask_ids(decoder, PROMPTS, GREEDY, new_tokens=12, **KEYS)[2].ids

    def until(row: int, ids: list[int]) -> bool:
        if row == 2:
            heard.append(list(ids))
        return row != 2 or len(ids) < 5

    found = unmask_ids(decoder, PROMPTS, GREEDY, new_tokens=12, goes_on=until, **KEYS)
    assert heard == [plain[:n] for n in range(1, 6)]
    assert found[2].ids == plain[:5] and found[2].ending == "stop"
    (short,) = unmask_ids(decoder, PROMPTS[:1], GREEDY, new_tokens=12, **KEYS | {"context": 9})
    assert len(short.ids) == 4 and short.ending == "context"


def test_damaged_weights_are_told() -> None:
    decoder = bidirectional_decoder()
    decoder.model.norm.weight.data[0] = float("nan")
    with pytest.raises(RunError, match="logits are not finite"):
        unmask_ids(decoder, PROMPTS, GREEDY, new_tokens=2, **KEYS)


def test_who_writes_how() -> None:
    assert writing(None) is continue_ids
    with pytest.raises(UserError, match=r"--steps is for models of objective\.kind = 'masked_diffusion'"):
        writing(None, 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of masked diffusion of one phase, with a held-out part."""
    folder = tmp_path_factory.mktemp("diffusion") / "run"
    folder.mkdir()
    save_ranks(folder / "bytes.tiktoken", BYTES.ranks)
    make(write_files(folder / "input", files=2, rows=9), folder / "held_out")
    save(folder, 4, "a", 1, '[objective]\nkind = "masked_diffusion"\n[eval]\nprompt = "to be"\nnew_tokens = 9\n')
    return folder


def test_a_run_writes_by_itself_as_it_was_trained(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoder, options = load_decoder(run)[0], ("--new-tokens", "9", "--temperature", "0")
    assert cli.main(["generate", "--run", str(run), "--prompt", "to be", "--prompt", "é", *options]) == 0
    captured = capsys.readouterr()
    keys: dict[str, Any] = {**KEYS, "context": 48, "new_tokens": 9}
    texts = [unmask_ids(decoder, [list(text.encode())], GREEDY, **keys)[0] for text in ("to be", "é")]
    first, second = (BYTES.decode(text.ids) for text in texts)
    assert captured.out == f"--- 1 of 2 ---\nto be{first}\n--- 2 of 2 ---\né{second}\n"
    assert "tokens: 7 read in " in captured.err and " 18 written, " in captured.err
    assert cli.main(["generate", "--run", str(run), "--prompt", "to be", *options, "--steps", "3"]) == 0
    (three,) = unmask_ids(decoder, [list(b"to be")], GREEDY, steps=3, **keys)
    assert capsys.readouterr().out == f"to be{BYTES.decode(three.ids)}\n"
    assert cli.main(["generate", "--run", str(run), "--prompt", "to be", "--steps", "0"]) == 2
    assert "--steps 0: at least 1" in capsys.readouterr().err


def test_the_sample_at_the_end_of_a_run_is_unmasked(run: Path) -> None:
    decoder, config = load_decoder(run)[0], configuration.load(run / "config.toml").config
    sampling = Sampling(0.8, 40, seed=config.run.seed)
    (expected,) = unmask_ids(decoder, [list(b"to be")], sampling, **KEYS | {"context": 48, "new_tokens": 9})
    assert continue_prompt(decoder, BYTES, config, torch.device("cpu")) == BYTES.decode(expected.ids)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["data", "score", "--run", "{run}", "{run}/input", "--output", "{run}/scored"],
         "data score reads from left to right, and this model was trained with objective.kind = 'masked_diffusion'"),
        (["checkpoint", "export", "--run", "{run}", "--output", "{run}/llama", "--format", "llama"],
         "neither format can say so"),
        (["checkpoint", "export", "--run", "{run}", "--output", "{run}/yulan", "--format", "yulan"],
         "neither format can say so"),
    ],
)  # fmt: skip
def test_what_would_read_from_left_to_right_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], command: list[str], message: str
) -> None:
    assert cli.main([part.format(run=run) for part in command]) == 2
    assert message in capsys.readouterr().err
    assert not any((run / name).exists() for name in ("scored", "llama", "yulan"))
