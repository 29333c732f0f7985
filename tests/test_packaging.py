"""A wheel of the project holds one package, and lives beside Hugging Face's package that is also called `kernels`."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
_FOREIGN = "owner = 'somebody else'\n"

_IMPORTS = """
import sys
from pathlib import Path
import titan_yulan.kernels.rms_norm, titan_yulan.kernels.linear_cross_entropy, titan_yulan.model.decoder
assert "kernels" not in sys.modules, "something of ours imported the foreign package"
import kernels
assert kernels.owner == "somebody else", kernels.__file__
print(kernels.__file__, titan_yulan.kernels.rms_norm.__file__, sep="\\n")
"""


def _copy_checkout(target: Path) -> None:
    """The files that a commit would hold: building in place would leave `build/` behind."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of the project's files")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if os.path.lexists(ROOT / name):  # not deleted since the last commit
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `pip wheel --no-build-isolation` does, through the build backend, without pip and the network."""
    try:
        version = int(importlib.metadata.version("setuptools").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        version = 0
    if version < 78:
        pytest.skip("no setuptools of at least 77.0.3, which pyproject.toml needs for a build")
    source, target = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    _copy_checkout(source)
    run = subprocess.run([sys.executable, "-c", _BUILD, str(target)], cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (built,) = target.glob("*.whl")
    return built


def test_nothing_but_the_package_is_inside(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (information,) = {name.split("/")[0] for name in names if name.split("/")[0].endswith(".dist-info")}
        assert {name.split("/")[0] for name in names} == {"titan_yulan", information}
        python = {name for name in names if name.endswith(".py")}
        for name in python:
            for node in ast.walk(ast.parse(archive.read(name))):
                imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    imported = [node.module or ""]
                assert "kernels" not in {module.split(".")[0] for module in imported}, name
        assert f"{information}/entry_points.txt" in names
    # The link is followed: each file of the checkout's kernels/ and of the rest of the package is there.
    expected = {f"titan_yulan/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert "titan_yulan/kernels/rms_norm.py" in expected and expected <= python


def test_beside_a_foreign_package_called_kernels(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(_FOREIGN)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert [path.name for path in (site / "kernels").iterdir()] == ["__init__.py"]
    assert (site / "kernels" / "__init__.py").read_text() == _FOREIGN
    # The path's first entry wins over an editable installation of the checkout.
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _IMPORTS], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [
        str(site / "kernels" / "__init__.py"),
        str(site / "titan_yulan" / "kernels" / "rms_norm.py"),
    ]


def test_a_checkout_does_not_hide_the_foreign_package(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(_FOREIGN)
    program = "import titan_yulan.kernels.runtime, kernels; print(kernels.owner)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout == "somebody else\n", run.stderr
