"""What the trainer calls before it starts: making what is missing, refusing what does not fit."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import titan_yulan.data.prepare as prepare_module
import titan_yulan.data.train_tokenizer as train_tokenizer_module
from titan_yulan.config.sections import DataSection, SourceSection, TokenizerSection
from titan_yulan.data import ensure as ensure_module
from titan_yulan.data.ensure import ensure_prepared
from titan_yulan.data.source import Source
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.data.train_tokenizer import train_tokenizer
from titan_yulan.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with text for two sources."""
    monkeypatch.chdir(tmp_path)
    for module in (prepare_module, train_tokenizer_module):  # starting processes costs more than the work
        monkeypatch.setattr(module, "default_workers", lambda: 1)
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for file in range(30):
            text = "".join(f"{name} number {file * line} say {line:x}\n" for line in range(20))
            (tmp_path / name / f"{file}.txt").write_text(text)
    return tmp_path


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `made` keeps what it made first."""
    return tmp_path_factory.mktemp("kept") / "made"


@pytest.fixture
def made(folder: Path, kept: Path) -> Path:
    """The working folder after `ensure(make_config(both()))`."""
    if kept.exists():
        shutil.copytree(kept, folder / "made")
    else:
        ensure(make_config(both()))
        shutil.copytree(folder / "made", kept)
    return folder


def make_config(sources: dict[str, SourceSection], *, vocab_size: int = 300, model_vocab_size: int = 300) -> Any:
    """The parts of a RunConfig that are read."""
    return SimpleNamespace(
        tokenizer=TokenizerSection(path="made/t.tiktoken", train_vocab_size=vocab_size),
        data=DataSection(sources=sources),
        model=SimpleNamespace(vocab_size=model_vocab_size),
        sources_to_read=tuple(sources),
    )


def section(name: str, **options: Any) -> SourceSection:
    defaults: dict[str, Any] = {"text": (name,), "validation_path": f"made/{name}-validation", "validation_share": 0.2}
    return SourceSection(path=f"made/{name}", **defaults | options)


def both(**options: Any) -> dict[str, SourceSection]:
    return {name: section(name, **options) for name in ("cats", "dogs")}


def ensure(config: Any) -> list[str]:
    return ensure_prepared(config, say=lambda line: None)


def test_everything_is_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ensure(make_config(both()))
    assert any("tokenizer made/t.tiktoken: 300 entries" in line for line in lines)
    assert any(line.startswith("source dogs:") for line in lines)
    tokenizer = Tokenizer.load("made/t.tiktoken")
    for name in ("cats", "dogs"):
        training, validation = Source.open(f"made/{name}"), Source.open(f"made/{name}-validation")
        assert training.documents + validation.documents == 30
        assert training.tokenizer_fingerprint == validation.tokenizer_fingerprint == tokenizer.fingerprint
    monkeypatch.setattr(ensure_module, "prepare", None)
    monkeypatch.setattr(ensure_module, "train_tokenizer", None)
    assert ensure(make_config(both())) == []


def test_prepared_sources_do_not_need_their_text(made: Path) -> None:
    assert ensure(make_config(both(text=()))) == []
    warnings = ensure(make_config(both(text=("gone/*.txt",))))
    assert [line.split(" is ")[0] for line in warnings] == [f"WARNING: data.sources.{n}.text" for n in ("cats", "dogs")]
    (warning,) = ensure(make_config({"cats": section("cats", order="keep")}))
    assert "cats.order is 'keep', but made/cats was made with 'shuffle' and is used as it is" in warning
    (warning,) = ensure(make_config({"cats": section("cats", validation_share=0.1)}))
    assert "cats.validation_share is 0.1, but made/cats was made with 0.2" in warning
    assert ensure(make_config({"cats": section("cats", validation_share=0.1, validation_path="")})) == []


def test_only_what_is_missing_is_made(folder: Path) -> None:
    ensure(make_config({"cats": section("cats")}))
    before = Path("made/cats/source.json").stat()
    ensure(make_config(both()))
    assert Path("made/cats/source.json").stat() == before
    assert Source.open("made/dogs").documents > 0


@pytest.mark.parametrize(("key", "lost"), [("path", "made/dogs"), ("validation_path", "made/dogs-validation")])
def test_missing_source_without_text_names_key_and_command(made: Path, key: str, lost: str) -> None:
    Path(lost).rename("elsewhere")
    with pytest.raises(UserError, match=rf"data\.sources\.dogs\.{key}: .*titan-yulan data prepare --name dogs"):
        ensure(make_config(both(text=())))


def test_source_of_another_tokenizer_is_refused(made: Path) -> None:
    Path("made/t.tiktoken").unlink()
    train_tokenizer([["cats"]], "made/t.tiktoken", 300, say=lambda line: None)
    with pytest.raises(UserError, match=r"data\.sources\.cats\.path: .*another tokenizer"):
        ensure(make_config(both()))


def test_vocabulary_must_fit_the_model(made: Path) -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size is 299.*at least 300"):
        ensure(make_config(both(), model_vocab_size=299))
    assert ensure(make_config(both(), model_vocab_size=512)) == []


def test_vocabulary_file_of_another_size_is_refused(made: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.train_vocab_size is 290.*300 entries"):
        ensure(make_config(both(), vocab_size=290))


def test_missing_tokenizer_is_refused_when_it_must_exist(folder: Path) -> None:
    with pytest.raises(UserError, match=r"made/t\.tiktoken.*tokenizer train"):
        ensure(make_config(both(), vocab_size=0))


def test_validation_without_a_share_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.sources\.cats\.validation_share is 0"):
        ensure(make_config(both(validation_share=0.0)))


def test_tokenizer_does_not_depend_on_workers_or_place(folder: Path) -> None:
    trained = [
        train_tokenizer([["cats"], ["dogs"]], f"t{workers}.tiktoken", 320, workers=workers, say=lambda line: None)
        for workers in (1, 2)
    ]
    Path("moved").mkdir()
    Path("cats").rename("moved/cats")
    trained.append(train_tokenizer([["moved/cats"], ["dogs"]], "t3.tiktoken", 320, say=lambda line: None))
    assert trained[0].fingerprint == trained[1].fingerprint == trained[2].fingerprint


def test_tokenizer_that_another_process_made_meanwhile_is_kept(folder: Path) -> None:
    first = train_tokenizer([["cats"]], "t.tiktoken", 300, say=lambda line: None)
    assert train_tokenizer([["dogs"]], "t.tiktoken", 300, say=lambda line: None).fingerprint == first.fingerprint
    with pytest.raises(UserError, match="has 300 entries, not 310"):
        train_tokenizer([["dogs"]], "t.tiktoken", 310, say=lambda line: None)


def test_tokenizer_needs_text(folder: Path) -> None:
    Path("ids.jsonl").write_text('{"input_ids": [1, 2]}')
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([["ids.jsonl"]], "t.tiktoken", 300, say=lambda line: None)
