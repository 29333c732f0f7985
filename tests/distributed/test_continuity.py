"""Beginning from a Hugging Face folder and re-balancing, on four ranks in layouts that cut unevenly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoint.hugging_face_folders import LLAMA, YULAN, write_llama, write_yulan
from tests.distributed.continuity import IDS, LAYOUTS, RMS, WORLD, continuity
from tests.distributed.ranks import run_ranks
from tests.optimizer.rebalancing import factor_of, scales
from titan_yulan.model import Decoder

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two files in bfloat16, and one in float32 with scalars; with the logits that they stand for."""
    root = tmp_path_factory.mktemp("folders")
    peer = write_llama(root / "llama", LLAMA, torch.bfloat16, shard="20KB")
    assert len(list((root / "llama").glob("*.safetensors"))) > 1
    decoder = Decoder(YULAN)
    decoder.load_state_dict(write_yulan(root / "yulan", YULAN))
    with torch.no_grad():
        return {"root": root, "llama": peer(IDS).logits, "yulan": decoder(IDS)}


@pytest.fixture(scope="module")
def found(folders: dict[str, Any]) -> Found:
    root: Path = folders["root"]
    return run_ranks(continuity, WORLD, root / "llama", root / "yulan")


@pytest.mark.parametrize("model", ["llama", "yulan"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_begins_with_the_published_weights(
    model: str, layout: str, found: Found, folders: dict[str, Any]
) -> None:
    expected: Tensor = folders[model]
    for rank in found:
        assert rank[model][layout]["differs"] == []
        difference = (rank[model][layout]["logits"] - expected).abs().max() / expected.abs().max()
        assert difference < 2e-6


def test_a_file_that_one_rank_cannot_read_ends_all_alike(found: Found) -> None:
    assert len({rank["failure"] for rank in found}) == 1
    assert "llama cannot be loaded: " in found[0]["failure"] and "lost" in found[0]["failure"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_rebalance_as_one_process_would(layout: str, found: Found) -> None:
    first: dict[str, Tensor] = found[0]["rebalanced"][layout]["after"]
    for rank in found:
        result = rank["rebalanced"][layout]
        before, after = result["before"], result["after"]
        # scalars are whole on every rank, and must stay the same to the last bit
        assert all(torch.equal(after[name], first[name]) for name in after)
        weights = {name.removeprefix("model."): t for name, t in before.items() if name.startswith("model.")}
        by_scalar = scales(weights, RMS)
        assert len(by_scalar) == 6 * 3 and min(abs(math.log(scale)) for scale in by_scalar.values()) > 0.1
        for name in weights:
            factor = factor_of(name, by_scalar)
            # two roundings to float32
            close = {"rtol": 3e-7, "atol": 1e-30}
            torch.testing.assert_close(after[f"model.{name}"], before[f"model.{name}"] * factor, **close)
            mean, square = f"optimizer.{name}.exp_avg", f"optimizer.{name}.exp_avg_sq"
            torch.testing.assert_close(after[mean], before[mean] / factor, **close)
            torch.testing.assert_close(after[square], before[square] / factor**2, **close)
            assert torch.equal(after[f"optimizer.{name}.step"], before[f"optimizer.{name}.step"])
        then, now = result["logits"]
        assert (now - then).abs().max() / then.abs().max() < 2e-6
        assert math.isfinite(result["loss"])
