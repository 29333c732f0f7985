"""tokenizer.json files: against transformers on a tokenizer trained here, and everything that can be wrong with one."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_yulan.data import tokenizer as tokenizer_module
from titan_yulan.data.documents import Document
from titan_yulan.data.tokenise import encode_document
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import UserError

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TEXT = Path(tokenizer_module.__file__).read_text() + "naïve 日本語 12345\n"
EOS = "<|end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with a template that adds tokens, an ordinary added token, truncation and padding."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=[EOS, "<s>"], show_progress=False, initial_alphabet=alphabet
    )
    core.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    core.add_tokens(["::added::"])
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"<s> $A {EOS}", special_tokens=[("<s>", 1), (EOS, 0)]
    )
    core.enable_truncation(16)
    core.enable_padding(length=16)
    folder = tmp_path_factory.mktemp("tokenizer")
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": EOS}}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def peer(folder: Path) -> Any:
    core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.no_truncation()
    core.no_padding()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, bos_token="<s>")


PIECES = st.lists(st.sampled_from([EOS, "<s>", "::added::", " ", "\n", "don't", "日本", "é", "12", "<|"]) | st.text())


@given(PIECES.map("".join))
@settings(max_examples=200, deadline=None)
def test_ids_are_those_of_transformers_and_text_survives(tokenizer: Tokenizer, peer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == peer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not {0, 1} & set(ids)


def test_interface(folder: Path, tokenizer: Tokenizer, peer: Any) -> None:
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (0, len(peer)) == (peer.eos_token_id, 501)
    assert len(tokenizer.encode(TEXT)) > 16
    assert tokenizer.decode([tokenizer.eos_id, *tokenizer.encode("a")]) == f"{EOS}a"
    assert Tokenizer.load(folder / "tokenizer.json").fingerprint == tokenizer.fingerprint
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.encode(TEXT), copy.eos_id, copy.fingerprint) == (
        tokenizer.encode(TEXT),
        tokenizer.eos_id,
        tokenizer.fingerprint,
    )
    ids, mask = encode_document(copy, Document(((TEXT, True),)))
    assert mask is None and ids.tolist() == [*tokenizer.encode(TEXT), 0]
    for token_id in (501, -1):
        with pytest.raises(UserError, match=f"token id {token_id}"):
            tokenizer.decode([1, token_id])


def test_a_tokenizer_that_marks_blanks_and_has_no_pattern(tmp_path: Path) -> None:
    """As LLaMA's: a mark before each word and each text, no pre-tokens, bytes where a character is unknown."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    normalizers = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    core.normalizer = tokenizers.normalizers.Sequence(normalizers)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    core.train_from_iterator(TEXT.splitlines(), trainer)
    path = tmp_path / "tokenizer.json"
    core.save(str(path))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = Tokenizer.load(tmp_path)
    peer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="</s>")
    for text in ("", " ", "the file </s> is </s>", "  two  blanks", TEXT, "\U0001f600 <0x41>"):
        ids = tokenizer.encode(text)
        assert ids == peer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.eos_id not in ids


@pytest.mark.parametrize("unit", [" ", "a", "日"])
def test_long_texts_are_encoded_whole(tokenizer: Tokenizer, peer: Any, unit: str) -> None:
    text = unit * (150_000 // len(unit))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == peer(text, add_special_tokens=False)["input_ids"]


def edited(folder: Path, target: Path, edit: Any) -> Path:
    """A copy of the tokenizer whose JSON went through `edit`."""
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    content = json.loads((target / "tokenizer.json").read_text())
    edit(content)
    (target / "tokenizer.json").write_text(json.dumps(content))
    return target


def test_fingerprint_follows_what_decides_the_ids(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    same = edited(folder, tmp_path, lambda content: content.update(truncation=None, padding=None))
    assert Tokenizer.load(same).fingerprint == tokenizer.fingerprint
    other = edited(folder, tmp_path, lambda content: content["model"]["merges"].pop())
    assert Tokenizer.load(other).fingerprint != tokenizer.fingerprint
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    other_end = edited(folder, tmp_path, lambda content: None)
    (other_end / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    loaded = Tokenizer.load(other_end)
    assert loaded.eos_id == 1 and loaded.fingerprint != tokenizer.fingerprint


def test_holes_count_as_ids(folder: Path, tmp_path: Path) -> None:
    added = {"id": 999, "content": "<|late|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}

    def edit(content: Any) -> None:
        content["model"]["vocab"]["<|late|>"] = 999
        content["added_tokens"].append({**added, "single_word": False})

    tokenizer = Tokenizer.load(edited(folder, tmp_path, edit))
    assert tokenizer.vocab_size == 1000
    with pytest.raises(UserError, match="token id 700"):
        tokenizer.decode([700])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r'no end of text: write {"eos_token": "..."} into .*tokenizer_config.json'),
        ({"tokenizer_config.json": "{}", "generation_config.json": '{"eos_token_id": [0, 1]}'}, r"\[0, 1\]"),
        ({"generation_config.json": '{"eos_token_id": 5000}'}, "5000"),
        ({"tokenizer_config.json": '{"eos_token": "<none>"}'}, "'<none>', which is no token"),
        ({"tokenizer_config.json": "{"}, "cannot read .*tokenizer_config.json"),
        ({"tokenizer_config.json": "[]"}, "holds no JSON object"),
    ],
)
def test_a_missing_end_of_text_is_named(folder: Path, tmp_path: Path, files: dict[str, str], message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("value", ["0", "[0]"])
def test_end_of_text_from_the_generation_config(folder: Path, tmp_path: Path, value: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    assert Tokenizer.load(tmp_path / "tokenizer.json").eos_id == 0


def test_files_that_are_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the tokenizer .*tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match=r"is no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match='set its "dropout" to null'):
        Tokenizer.load(edited(folder, tmp_path, lambda content: content["model"].update(dropout=0.2)))


def test_a_model_that_finds_the_end_of_text_in_text_is_refused(tmp_path: Path) -> None:
    core = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), (EOS, 0.0), ("a", -1.0)], unk_id=0))
    core.add_special_tokens([EOS])
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    with pytest.raises(UserError, match="would end documents in their middle"):
        Tokenizer.load(tmp_path)


def test_without_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'titan-yulan\[huggingface\]'"):
        Tokenizer.load(folder)
