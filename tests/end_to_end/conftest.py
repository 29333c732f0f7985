from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock

from tests.end_to_end import harness


@pytest.fixture(scope="session")
def small_data(tmp_path_factory, worker_id) -> Path:
    """Prepared data that all end-to-end tests share (all pytest workers too)."""
    base = tmp_path_factory.getbasetemp()
    return (base if worker_id == "master" else base.parent) / "small_data"


@pytest.fixture(scope="session")
def reference(small_data, tmp_path_factory, worker_id) -> Path:
    """Run folder of an undisturbed run on 2 ranks; made once for all pytest workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "reference"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            config = harness.write_small_config(folder, small_data, folder / "outputs")
            result = harness.train(config, 2)
            assert result.code == 0, result.output
            (folder / "done").touch()
    return folder / "outputs" / "small"
