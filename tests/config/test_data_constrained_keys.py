"""`unique_tokens`, `epochs` and the keys of `[objective]`: what they mean, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.config_texts import BASE, phase, write
from titan_yulan.config import load
from titan_yulan.config.subset import shares_of_unique, source_limit
from titan_yulan.curriculum.plan import Plan
from titan_yulan.errors import UserError

EPOCHS = """
[phase]
name = "repeated"
sequence_length = 128
unique_tokens = "100K"
epochs = 3
mix = {code = 2, math = 1}
"""


def test_length_and_subsets(tmp_path: Path):
    config = load(write(tmp_path, "a.toml", BASE + EPOCHS)).config
    assert shares_of_unique(config.phases[0]) == {"code": 66_667, "math": 33_333}
    assert (source_limit(config, "code"), source_limit(config, "math")) == (66_667, 33_333)
    assert Plan(config).end.step == 300_000 // (8 * 128)


def test_published_steps_of_the_study(tmp_path: Path):
    """Best runs on 100 million tokens of arXiv 2507.15857: 50 and 500 epochs of 99,952,399 tokens, 256 x 2048."""
    text = BASE + EPOCHS.replace('"100K"', "99952399").replace("128", "2048")
    path = write(tmp_path, "a.toml", text)
    keys = ["--batch.global_batch_size=256", "--model.max_position_embeddings=2048"]
    for epochs, steps in ((50, 9_532), (500, 95_322)):
        assert Plan(load(path, [*keys, f"--phase.epochs={epochs}"]).config).end.step == steps


def test_a_share_of_zero_is_no_subset(tmp_path: Path):
    text = BASE + EPOCHS.replace("math = 1", "math = 0")
    config = load(write(tmp_path, "a.toml", text)).config
    assert shares_of_unique(config.phases[0]) == {"code": 100_000}
    assert source_limit(config, "math") is None


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("--phase.unique_tokens=none", r"phase.epochs: 3.0 of what\? set unique_tokens"),
        ('--phase.length="10 steps"', r"3.0 and length = '10 steps': remove one of them"),
        ("--phase.epochs=0.001", r"less than one global batch \(1024 tokens\)"),
        ("--phase.unique_tokens=0", "unique_tokens: found 0"),
        ("--objective.left_to_right_share=0.5", "0.5 has no effect with kind = 'autoregressive'; needs 'masked_diff"),
        ("--eval.likelihood=bound", "eval.likelihood: bound has no effect with kind = 'autoregressive'"),
        ("--eval.likelihood_samples=4", "4 has no effect with kind = 'autoregressive'; needs 'masked_diffusion'"),
        ("--objective.kind=diffusion", "found 'diffusion'"),
        ("--objective.order_kind=sorted", "found 'sorted'"),
        ("--model.attention_dropout=1", "attention_dropout: found 1"),
    ],
)
def test_refusals(tmp_path: Path, key: str, message: str):
    with pytest.raises(UserError, match=message):
        load(write(tmp_path, "a.toml", BASE + EPOCHS), [key])


def test_autoregressive_keys_of_masked_diffusion_are_refused(tmp_path: Path):
    path = write(tmp_path, "a.toml", BASE + EPOCHS)
    with pytest.raises(UserError, match=r"objective.orders: 4 has no effect with kind = 'masked_diffusion'"):
        load(path, ["--objective.kind=masked_diffusion", "--objective.orders=4"])


def test_a_source_has_one_subset_in_a_run(tmp_path: Path):
    write(tmp_path, "base.toml", BASE)
    write(tmp_path, "one.toml", 'extends = "base.toml"\n' + EPOCHS)
    later = phase("later", 'after = "one.toml"\n')
    with pytest.raises(UserError, match=r"all tokens of 'code', but 66,667 tokens in the phase at one.toml"):
        load(write(tmp_path, "two.toml", 'extends = "base.toml"\n' + later))
    same = EPOCHS.replace("repeated", "again") + 'after = "one.toml"\n'
    config = load(write(tmp_path, "three.toml", 'extends = "base.toml"\n' + same)).config
    assert source_limit(config, "math") == 33_333
