"""What `titan-yulan plan` says, and what a run says before it starts about sources that are short or missing."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.curriculum.making import configuration, phase, segment
from tests.data.making import BYTES, make, write_files
from titan_yulan import cli
from titan_yulan.config import load
from titan_yulan.config.sections import BatchSection, ParallelSection, RunConfig
from titan_yulan.curriculum.plan import Plan
from titan_yulan.data.partition import rank_rows
from titan_yulan.data.source import Source
from titan_yulan.data.tokenizer import save_ranks
from titan_yulan.errors import UserError
from titan_yulan.plan.curriculum import RankShare, forecast, repetitions
from titan_yulan.plan.picture import amount, plan_lines
from titan_yulan.plan.sources import check_sources_there, prepared_tokens

ROOT = Path(__file__).resolve().parents[2]


def two_phases(**changes: float) -> RunConfig:
    """20 steps of 8 rows of 16 tokens, a and b alike; then 10 steps with `changes` to a 1:1 mix."""
    lr = (segment("linear", 0.0, 1.0, over="10 steps"), segment("constant"))
    return configuration(
        phase("first", "20 steps", {"a": 1, "b": 1}, lr=lr),
        phase("second", "10 steps", {"a": 1, "b": 1, **changes}),
    )


def text(config: RunConfig, gpus: int | None = None, warn: float = 0.05, top: int = 0, **prepared: int) -> str:
    plan = Plan(config)
    return "\n".join(plan_lines(plan, forecast(plan, prepared, gpus), gpus, warn, top))


def test_a_batch_that_ranks_do_not_divide_leaves_them_idle() -> None:
    long_rows = phase("p", "10 steps", {"a": 1}, sequence_length=28_672, batch=144)
    with_three = dataclasses.replace(long_rows, batch=BatchSection(global_batch_size=144, micro_batch_size=3))
    for section, micro_batches in ((long_rows, 3), (with_three, 1)):
        (planned,) = Plan(configuration(section)).phases
        share = RankShare.of(planned, 56)
        assert (share.rows, share.micro_batches) == (3, micro_batches)
        assert share.idle == pytest.approx(1 - 144 / (56 * 3))
    assert RankShare.of(planned, 48).idle == 0


@given(rows=st.integers(1, 300), micro=st.integers(1, 40), ranks=st.integers(1, 80))
def test_idle_share_counts_what_ranks_compute(rows: int, micro: int, ranks: int) -> None:
    section = phase("p", "1 steps", {"a": 1}, batch=rows)
    section = dataclasses.replace(section, batch=BatchSection(global_batch_size=rows, micro_batch_size=micro))
    share = RankShare.of(Plan(configuration(section)).phases[0], ranks)
    fullest = max(stop - start for start, stop in (rank_rows(rows, rank, ranks) for rank in range(ranks)))
    assert share.rows == fullest <= share.micro_batches * micro < fullest + micro
    assert share.idle == pytest.approx(1 - rows / (ranks * share.micro_batches * micro)) and 0 <= share.idle < 1


def test_ranks_that_share_rows_count_once() -> None:
    section = phase("p", "1 steps", {"a": 1}, parallel=ParallelSection(context=2))
    (only,) = forecast(Plan(configuration(section)), {}, 8)
    assert only.on_ranks is not None and (only.on_ranks.ranks, only.on_ranks.rows, only.on_ranks.idle) == (4, 2, 0)
    with pytest.raises(UserError, match="context = 2"):
        forecast(Plan(configuration(section)), {}, 7)


def test_rows_tokens_and_epochs_follow_the_tapes() -> None:
    plan = Plan(two_phases(a=3))
    first, second = forecast(plan, {"a": 1000})
    for item in (first, second):
        assert sum(use.rows for use in item.uses) == item.phase.rows_total
        assert all(use.tokens == 16 * use.rows for use in item.uses)
    a, b = second.uses
    assert (a.name, b.name) == ("a", "b") and a.share == 0.75  # the larger one first
    before = next(use for use in first.uses if use.name == "a")
    assert a.begin == before.end and a.epochs == (before.end / 1000, a.end / 1000) and b.epochs is None
    assert first.learning_rates == (0.0, 1.0) and second.learning_rates == (1.0, 1.0)


def test_distance_of_mixes_is_total_variation() -> None:
    first, second = forecast(Plan(two_phases(a=3)), {})
    assert first.moved == 0 and second.moved == pytest.approx(0.25)
    assert dict(second.moves) == pytest.approx({"a": 0.25, "b": -0.25})


def test_a_phase_that_needs_more_than_is_left_says_so() -> None:
    plan = Plan(two_phases())
    read = {use.name: use.end for use in forecast(plan, {})[0].uses}
    first, second = forecast(plan, {"a": read["a"], "b": 10**6})
    assert repetitions(first.phase, first.uses) == []  # to the last token is no repetition
    (line,) = repetitions(second.phase, second.uses)
    need = second.phase.tapes(second.phase.rows_total)[0] - read["a"]
    end = 1 + need / read["a"]
    assert line == (
        f"phase 'second' reads {need:,} tokens of a, of whose {read['a']:,} 0 are left unread: epochs 1.00 to {end:.2f}"
    )
    assert f"WARNING: {line}" in text(two_phases(), a=read["a"], b=10**6)


def test_warnings_have_their_threshold() -> None:
    assert "WARNING: second: 25.0% of the mix differs from the phase before: a +25.0%, b -25.0%" in text(
        two_phases(a=3)
    )
    assert "WARNING" not in text(two_phases(a=3), warn=0.26)
    assert "8 rows a step for 9 data-parallel ranks" in text(two_phases(), gpus=9)
    assert "WARNING" not in text(two_phases(), gpus=8)


def test_picture() -> None:
    mix = {"a": 6.0, "b": 3.0, "c": 1.0}
    shown = text(configuration(phase("p", "100 steps", mix)), top=2)
    lines = shown[shown.index("p: 800 rows of 16 tokens from 3 source(s), 0 of them prepared") :].splitlines()
    assert [line.count("█") for line in lines] == [0, 30, 15, 0]
    assert lines[1].split()[:4] == ["a", "60.00%", "480", "rows"] and lines[3].split()[:3] == ["1", "more", "10.00%"]


def test_amounts_have_four_digits() -> None:
    numbers = (7, 999, 1000, 4_128_768, 40_160_526_336, 1_084_924_624_896)
    assert list(map(amount, numbers)) == ["7", "999", "1.000K", "4.129M", "40.16B", "1.085T"]


def test_plan_of_yulan_mini(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    file = str(ROOT / "train_configs/yulan_mini/curriculum.toml")
    assert cli.main(["plan", file, "--gpus", "56", "--top", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("yulan_mini: 27 phase(s), 262,772 steps, 247,962,240 rows, 1,084,924,624,896 tokens, 56 ranks")
    table = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[2:30]}
    assert table["phase20"] == "184,802 194,526 9,725 40.15B 1,008 x 4,096 1.0000e-02 1.0000e-02 3.9% 18 1 of 18 0.0%"
    assert table["phase27"] == "253,007 262,772 9,766 40.32B 144 x 28,672 2.8152e-03 5.2242e-05 27.2% 3 1 of 3 14.3%"
    sources = [line for line in lines if line.endswith("█")]
    assert len(sources) == 2051 + 291 and all(
        "not prepared" in line for line in sources
    )  # the phases, and all together
    assert [line.split()[1] for line in lines if line.startswith("WARNING") and "of the mix" in line] == [
        *("phase15:", "phase16:", "phase18:", "phase19:", "phase26:", "phase27:")
    ]
    page = (ROOT / "docs/curriculum.md").read_text(encoding="utf-8")
    assert "\n".join(lines[:30]) in page  # what the page shows is what the command says


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose first phase reads the prepared a, its second one b, which is missing, too."""
    folder = tmp_path_factory.mktemp("plan")
    make(write_files(folder / "text", 6), folder / "a")
    save_ranks(folder / "tokenizer.tiktoken", BYTES.ranks)
    (folder / "config.toml").write_text(f"""
[run]
name = "test"
output_dir = "{folder}/outputs"
[model]
preset = "debug"
[tokenizer]
path = "{folder}/none.tiktoken"
[data.sources.a]
path = "{folder}/a"
[data.sources.b]
path = "{folder}/a b"
[data.sources.c]
path = "{folder}/c"
[batch]
global_batch_size = 5
micro_batch_size = 2
[optimizer]
learning_rate = 0.01
[[curriculum]]
name = "first"
length = "4 steps"
sequence_length = 16
mix = {{ a = 1 }}
[[curriculum]]
name = "second"
length = "4 steps"
sequence_length = 16
mix = {{ a = 1, b = 1, c = 0 }}
""")
    return folder


def test_plan_reads_the_size_of_what_is_prepared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(folder / "config.toml"), "--phase.length=100 steps"]) == 0
    tokens = Source.open(folder / "a").tokens
    printed = capsys.readouterr().out
    assert f"epochs 0.00 to {100 * 5 * 16 / tokens:.2f}" in printed and "not prepared" in printed


def test_plan_needs_no_torch(folder: Path) -> None:
    code = "import sys; from titan_yulan import cli; cli.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "plan", str(folder / "config.toml"), "--gpus=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("option", ["--gpus=0", "--top=-1", "--warn-share=-0.1"])
def test_options_out_of_range_are_refused(folder: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(folder / "config.toml"), option]) == 2
    assert option.split("=")[0] in capsys.readouterr().err


def test_missing_sources_are_named_with_their_remedy(folder: Path) -> None:
    config = load(folder / "config.toml").config
    assert config.sources_to_read == ("a", "b")  # c has no share
    assert set(prepared_tokens(config)) == {"a"}
    with pytest.raises(UserError) as error:
        check_sources_there(config)
    head, tokenizer, source = str(error.value).splitlines()
    assert head.startswith("1 of 2 sources are not prepared")
    assert source == (
        f"  b: titan-yulan data prepare --name b --tokenizer {folder}/none.tiktoken --output '{folder}/a b' INPUT..."
    )
    assert f"{folder}/none.tiktoken" in tokenizer
    check_sources_there(dataclasses.replace(config, phases=config.phases[:1]))
    finished = dataclasses.replace(config, first_phase=1, phases=(config.phases[1], config.phases[0]))
    check_sources_there(finished)  # a source of a finished phase may be gone
