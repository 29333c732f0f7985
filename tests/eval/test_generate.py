"""Continuations against transformers, alone and in batches, and `titan-yulan generate` from folder to text."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.hugging_face_folders import YULAN
from tests.data.making import BYTES
from tests.eval.small_models import MODEL, write_model
from tests.eval.test_evaluation import save
from tests.eval.test_generate_cache import random_decoder
from titan_yulan import cli
from titan_yulan.data.tokenizer import save_ranks
from titan_yulan.errors import RunError
from titan_yulan.eval.generate import Continuation, Speed, continue_ids, generate
from titan_yulan.eval.open_model import TrainedModel, open_model
from titan_yulan.eval.sampling import Sampling
from titan_yulan.model import Decoder

PROMPTS = [[random.Random(i).randrange(256) for _ in range(length)] for i, length in enumerate([5, 1, 17, 9, 17, 2])]
GREEDY = Sampling(temperature=0.0)
DRAWN = Sampling(temperature=1.0, top_k=30, top_p=0.9, seed=4)
KEYS: dict[str, Any] = {"new_tokens": 16, "context": 2048, "eos_id": 256, "vocab_size": 257}


@pytest.fixture(scope="module")
def peer_and_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TrainedModel, Path]:
    folder = tmp_path_factory.mktemp("generate") / "llama"
    peer = write_model(folder)
    return peer, open_model(folder), folder


@pytest.fixture(scope="module")
def yulan() -> Decoder:
    return random_decoder(replace(YULAN, vocab_size=257, qk_layer_norm=True))


@torch.no_grad()
def test_greedy_continuations_are_those_of_transformers(peer_and_model: Any) -> None:
    peer, model, _ = peer_and_model
    found = continue_ids(model.decoder, PROMPTS, GREEDY, **KEYS | {"vocab_size": MODEL.vocab_size})
    for prompt, continuation in zip(PROMPTS, found, strict=True):
        ids = peer.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=0,
        )[0].tolist()
        assert [*prompt, *continuation.ids] == [token for token in ids if token != 256]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_a_batch_gives_what_each_prompt_gives_alone(yulan: Decoder, sampling: Sampling) -> None:
    together = continue_ids(yulan, PROMPTS, sampling, **KEYS)
    assert together == [continue_ids(yulan, [prompt], sampling, **KEYS)[0] for prompt in PROMPTS]
    assert len({tuple(continuation.ids) for continuation in together}) == len(PROMPTS)
    other = continue_ids(yulan, PROMPTS, replace(sampling, seed=5), **KEYS)
    assert (other == together) == (sampling is GREEDY)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_without_a_cache_the_same_is_drawn(yulan: Decoder, temperature: float) -> None:
    sampling = Sampling(temperature, 30, seed=4)
    for prompt in PROMPTS[:3]:
        ids = list(prompt)
        for number in sampling.numbers(prompt, 16).tolist():
            if 256 not in ids:
                ids += sampling.choose(yulan(torch.tensor([ids]))[:, -1, :257], [number])
        found = generate(yulan, prompt, temperature=temperature, top_k=30, seed=4, **KEYS)
        assert [token for token in ids[len(prompt) :] if token != 256] == found


def test_of_a_prompt_that_fills_the_context_the_end_is_read(yulan: Decoder) -> None:
    short = KEYS | {"context": 8}
    assert generate(yulan, PROMPTS[2], **short) == generate(yulan, PROMPTS[2][-4:], **short)
    assert len(generate(yulan, PROMPTS[2], **short)) == 4


def test_a_continuation_ends_at_the_end_of_text_and_where_the_context_is_full(yulan: Decoder) -> None:
    free = [continuation.ids for continuation in continue_ids(yulan, PROMPTS, DRAWN, **KEYS)]
    eos_id = free[0][5]
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    speed = Speed()
    found = continue_ids(
        yulan,
        PROMPTS,
        DRAWN,
        **KEYS | {"eos_id": eos_id, "context": 20},
        goes_on=lambda row, ids: tokens[row].append(ids[-1]) or True,
        speed=speed,
    )
    for prompt, ids, continuation, seen in zip(PROMPTS, free, found, tokens, strict=True):
        room = min(20 - len(prompt), 16)
        end = ids.index(eos_id) if eos_id in ids[:room] else room
        ending = "end of text" if end < room else "length" if room == 16 else "context"
        assert continuation == Continuation(ids[:end], ending) and seen == ids[:end]
    assert {continuation.ending for continuation in found} == {"end of text", "context", "length"}
    assert speed.read == sum(map(len, PROMPTS)) and speed.reading > 0 and speed.writing > 0


def test_ids_that_the_tokenizer_lacks_are_never_drawn(yulan: Decoder) -> None:
    hot = replace(DRAWN, temperature=50.0, top_k=0, top_p=1.0)
    found = continue_ids(yulan, PROMPTS, hot, **KEYS | {"vocab_size": 40})
    drawn = {token for continuation in found for token in continuation.ids}
    assert max(drawn) < 40 < len(drawn) + 10


def test_a_damaged_model_is_named(yulan: Decoder) -> None:
    broken = random_decoder(yulan.config)
    torch.nn.init.constant_(broken.model.norm.weight, torch.nan)
    with pytest.raises(RunError, match="the logits are not finite"):
        continue_ids(broken, PROMPTS, GREEDY, **KEYS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "run"
    folder.mkdir()
    save_ranks(folder / "bytes.tiktoken", BYTES.ranks)
    save(folder, 4, "a", seed=1)
    save(folder, 8, "b", seed=2)
    return folder


def write(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> tuple[str, str]:
    assert cli.main(["generate", "--run", str(folder), *options]) == 0
    return capsys.readouterr()


def test_a_run_its_checkpoint_and_a_published_folder_continue_a_text(
    run: Path, peer_and_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--prompt", "to be é", "--new-tokens", "9", "--temperature", "0")
    text, report = write(capsys, run, *options)
    assert text.startswith("to be é") and text.endswith("\n") and len(text.encode()) > 9
    assert "tokens: 8 read in " in report and " 9 written, " in report and "/s after the first" in report
    assert write(capsys, run / "checkpoints" / "step-00000008", *options)[0] == text
    assert write(capsys, run / "checkpoints" / "step-00000004", *options)[0] != text
    _, model, folder = peer_and_model
    (expected,) = continue_ids(model.decoder, [model.tokenizer.encode("to be é")], GREEDY, **KEYS | {"new_tokens": 9})
    assert write(capsys, folder, *options)[0] == "to be é" + model.tokenizer.decode(expected.ids) + "\n"


def test_prompts_of_a_file_are_continued_in_their_order(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("the second one\r\n\n  third\n")
    options = ("--new-tokens", "7", "--seed", "3", "--top-p", "0.9")
    given = ("--prompt", "a", "--prompts", str(tmp_path / "prompts.txt"))
    text, report = write(capsys, run, *given, *options)
    alone = [write(capsys, run, "--prompt", prompt, *options)[0] for prompt in ("a", "the second one", "  third")]
    assert text == "".join(f"--- {i} of 3 ---\n{part}" for i, part in enumerate(alone, start=1))
    assert "tokens: 22 read" in report
    assert write(capsys, run, *given, *options, "--batch-tokens", "1")[0] == text


def test_a_full_context_ends_a_text_with_a_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, report = write(capsys, run, "--prompt", "x" * 40)
    assert "the text ends where the context of 48 tokens is full, before --new-tokens 100" in report
    assert " 8 written" in report and text.startswith("x" * 40)
    assert " 24 written" in write(capsys, run, "--prompt", "x" * 40, "--context", "64")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "x" * 48), "prompt 1 has 48 tokens and the context 48, which leaves nothing to write: shorten it "
         "or raise --context (up to 64)"),
        (("--prompt", "x" * 64, "--context", "64"), "which leaves nothing to write: shorten it\n"),
        (("--prompt", "x", "--context", "65"), "--context must be at most 64"),
        ((), "there is nothing to continue: give a text with --prompt"),
        (("--prompt", ""), "there is nothing to continue"),
        (("--prompt", "\udce9"), "--prompt is not UTF-8"),
        (("--prompt", "x", "--new-tokens", "0"), "--new-tokens 0: at least 1"),
        (("--prompt", "x", "--top-k", "-1"), "--top-k -1"),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    run: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert cli.main(["generate", "--run", str(run), *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_text_is_written_while_it_is_drawn(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from titan_yulan.eval.continue_texts import Settings, continue_texts

    events: list[str] = []
    choose = Sampling.choose
    monkeypatch.setattr(Sampling, "choose", lambda *arguments: events.append("drawn") or choose(*arguments))
    settings = Settings(Sampling(top_k=1), new_tokens=30)
    (found,) = continue_texts(run, ["some"], settings, events.append, lambda line: None)
    texts = [event for event in events if event != "drawn"]
    assert events.count("drawn") == 30 and "".join(texts) == "some" + BYTES.decode(found.ids) + "\n"
    assert events[0] == "some" and len(texts) > 9  # bytes that become no letter wait
    assert texts[-3] in events[: len(events) - 1 - events[::-1].index("drawn")]
