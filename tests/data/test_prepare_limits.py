"""`max_documents` and `max_tokens`: the first documents of the input after all filters, however preparing went."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.making import content, documents, make
from titan_yulan.config.load import load
from titan_yulan.data import prepare as prepare_module
from titan_yulan.data import tokenise
from titan_yulan.data.ensure import ensure_prepared, prepare_command
from titan_yulan.data.prepare import merge
from titan_yulan.data.source import Source
from titan_yulan.data.tokenizer import save_ranks
from titan_yulan.errors import UserError


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """100 documents in 10 groups of files: empty, short and equal ones, and bad rows among them."""
    monkeypatch.setattr(tokenise, "_GROUP_BYTES", 300)
    (tmp_path / "in").mkdir()
    for file in range(10):
        rows = [json.dumps({"text": f"{(file * 10 + row) * 7 % 40:02d}" * (row % 5)}) for row in range(10)]
        (tmp_path / "in" / f"{file}.jsonl").write_text("\n".join([*rows, "no row"]))
    return str(tmp_path / "in")


def test_limits_count_the_training_part_and_the_held_out_one_ends_with_it(tmp_path: Path, inputs: str) -> None:
    for name, limits in (("all", {}), ("some", {"max_documents": 23})):
        held_out = {"validation_output": tmp_path / f"{name}-held-out", "validation_share": 0.3}
        make(inputs, tmp_path / name, order="keep", **held_out, **limits)
    some, whole, held_out, all_held_out = (
        documents(Source.open(tmp_path / name)) for name in ("some", "all", "some-held-out", "all-held-out")
    )
    assert some == whole[:23]
    assert Source.open(tmp_path / "some").made_from["max_documents"] == 23
    assert held_out == all_held_out[: len(held_out)] and 0 < len(held_out) < len(all_held_out)


def test_a_subset_is_the_same_on_any_way_to_it_and_reads_no_more_than_it_must(
    tmp_path: Path, inputs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_documents": 35, "shard_tokens": 60}
    done: list[int] = []

    def counted(job, unit):
        done.append(unit.index)
        if len(done) == 3:
            raise KeyboardInterrupt
        return tokenise.tokenise_unit(job, unit)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "tokenise_unit", counted)
        with pytest.raises(KeyboardInterrupt):
            make(inputs, tmp_path / "killed", **options)
        report = make(inputs, tmp_path / "killed", **options)
    assert done == [0, 1, 2, 2, 3, 4]  # 8 of 10 documents of each group are not empty
    assert (report.documents, report.bad_rows) == (35, 5)
    make(inputs, tmp_path / "workers", workers=2, **options)
    for part in (1, 2):
        make(inputs, tmp_path / "parts", part=(part, 2), **options)
    merged = merge(tmp_path / "parts", workers=1, say=lambda line: None)
    assert (merged.documents, merged.bad_rows) == (35, 5)
    assert content(tmp_path / "killed") == content(tmp_path / "workers") == content(tmp_path / "parts")
    assert make(inputs, tmp_path / "killed", **options).reused
    with pytest.raises(UserError, match="made from other inputs, options or tokenizer"):
        make(inputs, tmp_path / "killed", **{**options, "max_documents": 34})


def test_limits_that_are_none(tmp_path: Path, inputs: str) -> None:
    said: list[str] = []
    make(inputs, tmp_path / "out", max_documents=1000, max_tokens=10**6, say=said.append)
    assert [line for line in said if "WARNING" in line] == [
        "WARNING: source test: the whole input has 80, fewer than max_documents 1,000",
        "WARNING: source test: the whole input has 480, fewer than max_tokens 1,000,000",
    ]
    make(inputs, tmp_path / "plain")
    shards = [content(tmp_path / name) for name in ("out", "plain")]
    assert shards[0].keys() == shards[1].keys()
    assert all(shards[0][file] == shards[1][file] for file in shards[0] if file != "source.json")
    for limit in ("max_documents", "max_tokens"):
        with pytest.raises(UserError, match=f"{limit} 0: at least 1"):
            make(inputs, tmp_path / "none", **{limit: 0})


def test_limits_of_a_source_in_the_configuration(tmp_path: Path, inputs: str) -> None:
    vocabulary = tmp_path / "bytes.tiktoken"
    save_ranks(vocabulary, {bytes([value]): value for value in range(256)})
    file = tmp_path / "run.toml"
    source = f'path = "{tmp_path}/made"\ntext = ["{inputs}"]\nminimum_tokens = 0\n'
    file.write_text(
        f'[run]\nname = "x"\n[model]\npreset = "debug"\n[tokenizer]\npath = "{vocabulary}"\n[data.sources.a]\n{source}'
        "max_documents = 50\nmax_tokens = '1K'\n[batch]\nglobal_batch_size = 1\nmicro_batch_size = 1\n"
        "[optimizer]\nlearning_rate = 1.0\n[phase]\nname = 'p'\nsequence_length = 8\nlength = '1 steps'\nmix.a = 1\n"
    )
    config = load(file).config
    ensure_prepared(config, lambda line: None)
    assert Source.open(tmp_path / "made").documents == 50
    section = config.data.sources["a"]
    assert "--max-documents 50 --max-tokens 1000 INPUT..." in prepare_command("a", section, "t")
    lines = ensure_prepared(load(file, ["--data.sources.a.max_tokens=200"]).config, lambda line: None)
    assert len(lines) == 1 and "max_tokens is 200, but" in lines[0] and "made with 1000" in lines[0]
