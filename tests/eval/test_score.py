"""`data score`: perplexities against a direct computation in float64, and what becomes of the files."""

from __future__ import annotations

import gzip
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.checkpoint.hugging_face_folders import LLAMA, write_llama
from tests.checkpoint.making import make_state
from tests.data.making import BYTES, EOS
from tests.eval.small_models import CONFIG
from titan_yulan import cli, config
from titan_yulan.checkpoint import layout
from titan_yulan.checkpoint.files import HashingWriter
from titan_yulan.data.documents import find_inputs, read_documents
from titan_yulan.data.rows import Document
from titan_yulan.data.tokenizer import save_ranks
from titan_yulan.errors import RunError, UserError
from titan_yulan.eval.load import load_decoder
from titan_yulan.eval.open_model import in_precision
from titan_yulan.eval.score import Scorer, score
from titan_yulan.model import Decoder

CONTEXT = 16
TEXTS = ["one short text", "x", "longer than one window of sixteen tokens " * 3, "汉字也可以", "y" * 16, "z" * 17]


def make_run(folder: Path, seed: int) -> Path:
    """A run folder with one checkpoint, whose model has random weights and scalars."""
    folder.mkdir()
    save_ranks(folder / "bytes.tiktoken", BYTES.ranks)
    text = CONFIG.format(folder=folder, length=16, held_out="")
    (folder / "config.toml").write_text(text)
    decoder = Decoder(config.load(folder / "config.toml").config.model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    path = layout.step_folder(folder / "checkpoints", 4)
    path.mkdir(parents=True)
    writer = HashingWriter(path)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
    dcp.save({"model": dict(decoder.named_parameters())}, storage_writer=writer, no_dist=True)
    layout.commit(path, writer.hashing.files, make_state(4, tokenizer=BYTES.fingerprint), text)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("score") / "run", seed=1)


@pytest.fixture(scope="module")
def decoder(run: Path) -> Decoder:
    return load_decoder(run)[0]


@pytest.fixture(scope="module")
def direct(run: Path) -> Any:
    """Perplexity by the definition, one window at a time, with all logits in float64."""
    decoder = load_decoder(run)[0].double()

    @torch.no_grad()
    def perplexity(ids: list[int], context: int = CONTEXT) -> float:
        total, whole = 0.0, [EOS, *ids]
        for start in range(1, len(whole), context):
            end = min(start + context, len(whole))
            logits = decoder(torch.tensor([whole[max(0, end - 1 - context) : end - 1]]))[0, start - end :]
            total += float(-logits.log_softmax(-1)[range(end - start), whole[start:end]].sum())
        return math.exp(total / len(ids))

    return perplexity


def read_scores(folder: Path) -> dict[str, tuple[float, int]]:
    """Text -> perplexity and tokens, as `data prepare --order perplexity` reads them."""
    found = {}
    for file in find_inputs([str(folder)]):
        for document in read_documents(file, columns=("perplexity", "tokens")):
            assert isinstance(document, Document)
            found[document.text] = (document.columns["perplexity"], document.columns["tokens"])
    return found


@pytest.mark.parametrize("batch_tokens", [1, 40, 100_000])
def test_perplexities_are_those_of_the_definition(decoder: Decoder, direct: Any, batch_tokens: int) -> None:
    documents = [Document(((text, True),)) for text in TEXTS]
    documents.append(Document(token_ids=np.array([3, EOS, 255, 7] * 9)))
    scores = Scorer(decoder, BYTES, CONTEXT, batch_tokens)(documents)
    expected = [BYTES.encode(text) for text in TEXTS] + [[3, EOS, 255, 7] * 9]
    for ids, values in zip(expected, scores, strict=True):
        assert isinstance(values, dict) and values["tokens"] == len(ids)
        assert values["perplexity"] == pytest.approx(direct(ids), rel=1e-5)
    assert direct(expected[2]) != pytest.approx(direct(expected[2], context=64), rel=1e-3)  # windows do matter


def test_matrices_take_the_precision_of_the_run_and_scalars_keep_theirs(run: Path, direct: Any) -> None:
    decoder = in_precision(load_decoder(run)[0], torch.bfloat16, torch.device("cpu"))
    types = {name: parameter.dtype for name, parameter in decoder.named_parameters()}
    assert types["model.layers.0.mlp.up_proj.weight"] == types["model.layers.0.self_attn.q_proj.bias"] == torch.bfloat16
    assert types["lm_head_alpha"] == types["model.norm.weight"] == torch.float32
    [values] = Scorer(decoder, BYTES, CONTEXT, 64)([Document(((TEXTS[0], True),))])
    assert isinstance(values, dict)
    assert values["perplexity"] == pytest.approx(direct(BYTES.encode(TEXTS[0])), rel=0.02)


def test_what_no_perplexity_can_be_given_for(decoder: Decoder) -> None:
    scorer = Scorer(decoder, BYTES, CONTEXT, 64)
    results = scorer([Document(token_ids=np.array([1, 257])), Document((("a", True),))])
    assert results[0] == "token id 257 is outside the vocabulary of 257" and isinstance(results[1], dict)
    broken = Decoder(decoder.config)
    broken.load_state_dict({name: value * math.nan for name, value in decoder.state_dict().items()})
    with pytest.raises(RunError, match="the model gives a log-likelihood of nan"):
        Scorer(broken, BYTES, CONTEXT, 64)([Document((("a", True),))])


def test_a_hugging_face_folder_scores_as_transformers_does(tmp_path: Path) -> None:
    """The starting model itself is what Llama3-SynE sorts by."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path / "llama"
    peer = write_llama(folder, replace(LLAMA, vocab_size=264))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.add_special_tokens(["<end>"])
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    text = tmp_path / "a.txt"
    text.write_text(TEXTS[2])
    score(folder, [str(text)], tmp_path / "scored", say=lambda line: None)
    ids = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).encode(TEXTS[2])
    tokens = torch.tensor([[core.token_to_id("<end>"), *ids]])
    with torch.no_grad():
        expected = float(peer.double()(tokens[:, :-1]).logits[0].log_softmax(-1).gather(1, tokens[0, 1:, None]).mean())
    assert read_scores(tmp_path / "scored") == {TEXTS[2]: (pytest.approx(math.exp(-expected), rel=1e-5), len(ids))}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Every format, with columns of their own, bad rows and empty documents."""
    folder = tmp_path / "inputs"
    (folder / "sub").mkdir(parents=True)
    lines = [json.dumps({"text": text, "id": i, "nested": {"ü": [i]}}) for i, text in enumerate(TEXTS[:3])]
    (folder / "a.jsonl").write_text("\n\n".join([*lines, "{broken", '{"text": ""}']))
    (folder / "sub" / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "in an archive"}\n{"no": 1}\n'))
    (folder / "c.txt").write_text("plain text")
    texts = [*TEXTS[3:], None, "", *(f"row {i}" for i in range(600))]
    table = pyarrow.table({"text": texts, "day": pyarrow.array(range(len(texts)), pyarrow.date32()), "tokens": texts})
    pyarrow.parquet.write_table(table, folder / "d.parquet")
    return folder


def test_files_keep_their_rows_and_columns(run: Path, inputs: Path, tmp_path: Path, direct: Any) -> None:
    said: list[str] = []
    counts = score(run, [str(inputs)], tmp_path / "scored", say=said.append)
    assert (counts.documents, counts.bad_rows, counts.empty) == (3 + 1 + 1 + 603, 3, 2)
    assert "scored: 4 files, 608 documents; skipped: 3 bad rows, 2 empty documents, " in said[0]
    assert [line.split()[0] for line in said[1:]] == ["a.jsonl:7:", "d.parquet:4:", "sub/b.jsonl.gz:2:"]
    assert {
        path.relative_to(tmp_path / "scored").as_posix() for path in (tmp_path / "scored").rglob("*.[jtp]*[ltz]")
    } == {
        "a.jsonl",
        "sub/b.jsonl.gz",
        "c.txt.jsonl",
        "d.parquet",
    }
    scores = read_scores(tmp_path / "scored")
    assert len(scores) == 608
    for text in (*TEXTS, "plain text", "in an archive", "row 599"):
        ids = BYTES.encode(text)
        assert scores[text] == (pytest.approx(direct(ids), rel=1e-5), len(ids))
    rows = [json.loads(line) for line in (tmp_path / "scored" / "a.jsonl").read_text().splitlines()]
    assert [(row["id"], row["nested"]) for row in rows] == [(i, {"ü": [i]}) for i in range(3)]
    table = pyarrow.parquet.read_table(tmp_path / "scored" / "d.parquet")
    assert table.column_names == ["text", "day", "tokens", "perplexity"]  # `tokens` was there, and is replaced
    assert table.schema.types[1:] == [pyarrow.date32(), pyarrow.int64(), pyarrow.float64()]


def test_a_finished_file_is_left_alone_and_a_broken_off_one_made_again(
    run: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, compute = tmp_path / "scored", Scorer.__call__

    def fail_late(self: Scorer, documents: list[Document]) -> Any:
        if len(documents) < 512 and any(document.text == "row 599" for document in documents):
            raise KeyboardInterrupt
        return compute(self, documents)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Scorer, "__call__", fail_late)
        score(run, [str(inputs)], output)
    assert sorted(path.name for path in output.iterdir()) == [".done", "a.jsonl", "c.txt.jsonl"]
    before = (output / "a.jsonl").stat().st_mtime_ns
    said: list[str] = []
    counts = score(run, [str(inputs)], output, say=said.append)
    assert counts.documents == 608 and len(read_scores(output)) == 608
    assert (output / "a.jsonl").stat().st_mtime_ns == before
    assert said[0].endswith("(2 of the files were there already)")


def test_scores_of_another_model_are_never_mixed_in(run: Path, inputs: Path, tmp_path: Path) -> None:
    arguments = [str(inputs / "c.txt")]
    score(run, arguments, tmp_path / "scored")
    with pytest.raises(UserError, match=r"made from something else \(context 16 there, 8 now\)"):
        score(run, arguments, tmp_path / "scored", context=8)
    with pytest.raises(UserError, match=r"made from something else \(model "):
        score(make_run(tmp_path / "other", seed=2), arguments, tmp_path / "scored")
    (inputs / "c.txt").write_text("longer plain text")
    with pytest.raises(UserError, match=r"made from something else \(bytes 10 there, 17 now\)"):
        score(run, arguments, tmp_path / "scored")


def test_ranks_share_the_files(
    run: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        output = str(tmp_path / "scored")
        assert cli.main(["data", "score", "--run", str(run), "--output", output, str(inputs), "--device", "cpu"]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[0].startswith(f"rank {rank}: ") and "scored: 2 files" in printed[0]
    assert len(read_scores(tmp_path / "scored")) == 608


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "65"], "--context must be from 1 to 64"),
        (["--batch-tokens", "0"], "--batch-tokens at least 1"),
        (["--device", "abacus"], "--device abacus"),
        (["--on-bad-row", "fail"], "bad row a.jsonl:7: not JSON"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_requests(
    run: Path, inputs: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "scored")
    assert cli.main(["data", "score", "--run", str(run), "--output", output, str(inputs), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_inputs_are_never_replaced(run: Path, inputs: Path) -> None:
    before = (inputs / "a.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"a.jsonl is an input and would be replaced"):
        score(run, [str(inputs)], inputs)
    assert (inputs / "a.jsonl").read_bytes() == before
