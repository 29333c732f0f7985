"""When a checkpoint exists, what is found damaged, and what is deleted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint.making import make_checkpoint, make_state
from titan_yulan.checkpoint import layout
from titan_yulan.checkpoint.layout import Checkpoint
from titan_yulan.errors import RunError, UserError


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in layout.find_checkpoints(folder)]


def test_a_committed_checkpoint_is_found_sound_and_readable(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, 12, "[run]\n# ü\n", phase="b")
    assert layout.find_checkpoints(tmp_path) == [made]
    assert layout.find_damage(made) == []
    assert made.state() == make_state(12, phase="b")
    assert sorted(made.manifest()) == ["__0_0.distcp", "config.toml", "state.json"]
    assert (made.path / "config.toml").read_text(encoding="utf-8") == "[run]\n# ü\n"
    assert {path.name for path in made.path.iterdir()} == {*made.manifest(), "manifest.json"}


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (20, 3, 123456789):
        make_checkpoint(tmp_path, step)
    for name in ("step-abc", "other", "step-00000004"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-5").write_text("a file")
    assert steps(tmp_path) == [3, 20, 123456789]
    assert steps(tmp_path / "missing") == []


def test_a_folder_without_a_manifest_is_invisible_and_a_leftover(tmp_path: Path) -> None:
    made = [make_checkpoint(tmp_path, step) for step in (1, 2)]
    (made[1].path / "manifest.json").unlink()
    assert steps(tmp_path) == [1]
    assert layout.remove_leftovers(tmp_path) == [made[1].path]
    assert not made[1].path.exists() and made[0].path.exists()
    assert layout.remove_leftovers(tmp_path) == []


def test_the_manifest_appears_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash at any rename, write or sync before the last rename leaves a folder that is no checkpoint."""
    calls = 0

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    def fsync_then_crash(at: int) -> Callable[[int], None]:
        def fsync(_: int) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                crash()

        return fsync

    for at in (1, 2, 3):  # state, config, the manifest's temporary file
        calls = 0
        monkeypatch.setattr(layout.os, "fsync", fsync_then_crash(at))
        with pytest.raises(KeyboardInterrupt):
            make_checkpoint(tmp_path, at)
        assert steps(tmp_path) == []
    monkeypatch.undo()
    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(tmp_path, 4)
    assert steps(tmp_path) == []
    monkeypatch.undo()
    assert len(layout.remove_leftovers(tmp_path)) == 4


def test_a_file_shorter_than_what_was_written_is_not_committed(tmp_path: Path) -> None:
    path = layout.step_folder(tmp_path, 1)
    path.mkdir()
    (path / "data").write_bytes(b"123")
    with pytest.raises(RunError, match=r"data has 3 bytes after writing 4; is the disk full\?"):
        layout.commit(path, {"data": {"size": 4, "sha256": ""}}, make_state(1), "")
    assert steps(tmp_path) == []


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, r"{path} is missing"),
        (damage_truncated, r"{path} has {less} bytes instead of {size}"),
        (damage_flipped, r"{path} is damaged (its SHA-256 differs from the manifest's)"),
    ],
)
@pytest.mark.parametrize("name", ["__0_0.distcp", "state.json", "config.toml"])
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str, name: str) -> None:
    made = make_checkpoint(tmp_path, 1)
    path = made.path / name
    size = path.stat().st_size
    damage(path)
    assert layout.find_damage(made) == [message.format(path=path, less=size - 1, size=size)]
    others = set(made.manifest()) - {name}
    assert layout.find_damage(made, others) == [] != layout.find_damage(made, [name])


def make_large(folder: Path, step: int, files: int) -> Checkpoint:
    """A checkpoint with an index and many files of tensors, of 10 bytes each."""
    path = layout.step_folder(folder, step)
    path.mkdir(parents=True)
    entries = {}
    for name in [".metadata", *(f"__{rank}_0.distcp" for rank in range(files))]:
        (path / name).write_bytes(name.encode()[:10].ljust(10))
        entries[name] = {"size": 10, "sha256": layout.hash_file(path / name)}
    layout.commit(path, entries, make_state(step), "")
    return Checkpoint(path, step)


STEERING = {".metadata", "state.json", "config.toml"}


@pytest.mark.parametrize(("files", "drawn"), [(1, 1), (8, 1), (9, 2), (64, 8)])
def test_a_sample_is_one_file_in_eight_and_always_what_steers_the_reading(
    tmp_path: Path, files: int, drawn: int
) -> None:
    made = make_large(tmp_path, 1, files)
    sample = layout.hashed_files(made, "sample")
    assert sample > STEERING and len(sample - STEERING) == drawn
    assert layout.hashed_files(made, "size") == STEERING
    assert layout.hashed_files(made, "full") == set(made.manifest())


def test_a_sample_is_that_of_the_checkpoint_s_name_wherever_it_lies(tmp_path: Path) -> None:
    samples = [layout.hashed_files(make_large(tmp_path / "a", step, 64), "sample") for step in (1, 2)]
    assert samples[0] != samples[1]
    assert layout.hashed_files(make_large(tmp_path / "b", 1, 64), "sample") == samples[0]


def test_what_is_not_hashed_is_still_measured(tmp_path: Path) -> None:
    made = make_large(tmp_path, 1, 9)
    left_out = made.path / min(set(made.manifest()) - layout.hashed_files(made, "sample"))
    damage_flipped(left_out)
    for verify, problems in (("full", 1), ("sample", 0), ("size", 0)):
        assert len(layout.find_damage(made, hashed=layout.hashed_files(made, verify))) == problems
    damage_truncated(left_out)
    for name in (".metadata", "state.json"):
        damage_flipped(made.path / name)
    for verify in ("full", "sample", "size"):
        found = layout.find_damage(made, hashed=layout.hashed_files(made, verify))
        assert any("9 bytes instead of 10" in line for line in found)
        assert sum("SHA-256 differs" in line for line in found) == 2


_HASH = "0" * 64


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 1}',
        '{"files": []}',
        '{"files": {"a": 3}}',
        f'{{"files": {{"a": {{"size": "3", "sha256": "{_HASH}"}}}}}}',
        f'{{"files": {{"a": {{"size": -3, "sha256": "{_HASH}"}}}}}}',
        f'{{"files": {{"a": {{"size": true, "sha256": "{_HASH}"}}}}}}',
        f'{{"files": {{"a": {{"sizd": 3, "sha256": "{_HASH}"}}}}}}',
        f'{{"files": {{"a": {{"size": 3, "sha256": "{_HASH[1:]}"}}}}}}',
        f'{{"files": {{"../a": {{"size": 3, "sha256": "{_HASH}"}}}}}}',
        f'{{"sha256": "{_HASH}", "files": {{}}}}',
        '{"sha256": null, "files": {}}',
    ],
)
def test_a_damaged_manifest_is_damage(tmp_path: Path, text: str) -> None:
    made = make_checkpoint(tmp_path, 1)
    (made.path / "manifest.json").write_text(text)
    (problem,) = layout.find_damage(made)
    assert problem.startswith(f"{made.path / 'manifest.json'} cannot be read")


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_one_flipped_bit_of_a_manifest_is_found_or_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    made = Checkpoint(layout.step_folder(folder, 1), 1) if folder.exists() else make_checkpoint(folder, 1)
    path = made.path / "manifest.json"
    original, files = path.read_bytes(), made.manifest()
    content = bytearray(original)
    content[data.draw(st.integers(0, len(original) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(content)
        assert layout.find_damage(made) or made.manifest() == files
        assert layout.newest_readable(folder, lambda _: None) in (made, None)
    finally:
        path.write_bytes(original)


def test_every_bit_of_an_older_manifest_too(tmp_path: Path) -> None:
    """Those had no hash of their table; the files' own hashes find most of it, and nothing raises."""
    made = make_checkpoint(tmp_path, 1)
    path, files = made.path / "manifest.json", made.manifest()
    original = json.dumps({"format": 1, "files": files}).encode()
    path.write_bytes(original)
    assert layout.find_damage(made) == [] and made.manifest() == files
    for place in range(8 * len(original)):
        content = bytearray(original)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        assert layout.find_damage(made) or made.manifest() == files


@pytest.mark.parametrize("text", ["", "{}", '{"step": 1, "surprise": 2}', "[]"])
def test_a_damaged_state_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    made = make_checkpoint(tmp_path, 1)
    (made.path / "state.json").write_text(text)
    with pytest.raises(RunError, match=r"state\.json cannot be read"):
        made.state()


def test_open_takes_a_step_folder_a_run_folder_or_the_folder_of_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    first, last = make_checkpoint(folder, 1), make_checkpoint(folder, 2)
    assert layout.open_checkpoint(first.path) == first
    assert layout.open_checkpoint(tmp_path) == layout.open_checkpoint(folder) == last


def test_open_refuses_what_holds_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no complete checkpoint"):
        layout.open_checkpoint(tmp_path)


@pytest.mark.parametrize("path", ["s3://bucket/run", "gs://bucket/run", "hdfs://host/run"])
def test_an_address_of_an_object_store_is_refused_with_the_remedy(path: str) -> None:
    scheme = path.split(":")[0]
    with pytest.raises(UserError, match=rf"{scheme}:// addresses are not supported.*mounted file system.*aws s3 sync"):
        layout.open_checkpoint(Path(path))


def test_a_name_with_a_colon_is_no_address(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path / "s3:bucket" / "checkpoints", 1)
    assert layout.open_checkpoint(tmp_path / "s3:bucket") == made


def test_prune_keeps_the_newest_and_every_end_of_a_phase(tmp_path: Path) -> None:
    for step in range(1, 9):
        make_checkpoint(tmp_path, step, phase_finished=step in (2, 8))
    deleted = layout.prune(tmp_path, 3, 8)
    assert steps(tmp_path) == [2, 6, 7, 8]
    assert [path.name for path in deleted] == [f"step-{step:08d}" for step in (1, 3, 4, 5)]
    assert not any(path.exists() for path in deleted)
    assert layout.prune(tmp_path, 3, 8) == []


def test_prune_keeps_the_best_and_the_link_follows_it(tmp_path: Path) -> None:
    losses = {0: 1.0, 1: 3.0, 2: 2.0, 4: 2.5, 5: 2.0, 7: 1.5, 9: 0.5}
    kept = []
    for step in range(1, 9):
        make_checkpoint(tmp_path, step)
        layout.prune(tmp_path, 1, step, losses)
        kept.append((steps(tmp_path), layout.open_checkpoint(tmp_path / "best").step))
    # of equal losses the first; 0 and 9 have no checkpoint, 3, 6 and 8 no loss
    of_each = [([1], 1), ([2], 2), ([2, 3], 2), ([2, 4], 2), ([2, 5], 2), ([2, 6], 2), ([7], 7), ([7, 8], 7)]
    assert kept == of_each
    assert (tmp_path / "best").readlink() == Path("step-00000007")
    assert [checkpoint.is_best for checkpoint in layout.find_checkpoints(tmp_path)] == [True, False]


def test_a_best_one_that_is_gone_or_damaged_is_followed_by_the_next(tmp_path: Path) -> None:
    losses = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    made = [make_checkpoint(tmp_path, step) for step in (1, 2, 3)]
    layout.remove(made[0].path)
    (made[1].path / "state.json").write_text("{")
    layout.prune(tmp_path, 3, 3, losses)
    assert layout.open_checkpoint(tmp_path / "best") == made[2]
    make_checkpoint(tmp_path, 4)
    layout.prune(tmp_path, 1, 4, losses)
    assert steps(tmp_path) == [2, 3, 4]  # damaged: left for inspection; best; newest


def test_nothing_is_deleted_before_the_link_leads_to_the_new_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    losses = {1: 2.0, 2: 1.0}
    first = make_checkpoint(tmp_path, 1)
    layout.prune(tmp_path, 1, 1, losses)
    second = make_checkpoint(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            layout.prune(tmp_path, 1, 2, losses)
    assert layout.open_checkpoint(tmp_path / "best") == first
    with monkeypatch.context() as patch:
        patch.setattr(layout, "remove", crash)
        with pytest.raises(KeyboardInterrupt):
            layout.prune(tmp_path, 1, 2, losses)
    assert layout.open_checkpoint(tmp_path / "best") == second and steps(tmp_path) == [1, 2]
    layout.prune(tmp_path, 1, 2, losses)
    assert steps(tmp_path) == [2]


def test_without_a_best_one_there_is_no_link(tmp_path: Path) -> None:
    for step in (1, 2):
        make_checkpoint(tmp_path, step)
    layout.prune(tmp_path, 2, 2, {1: 1.0})
    assert (tmp_path / "best").is_symlink()
    layout.prune(tmp_path, 1, 2)
    assert not (tmp_path / "best").is_symlink() and steps(tmp_path) == [2]


def test_prune_leaves_what_it_cannot_read(tmp_path: Path) -> None:
    made = [make_checkpoint(tmp_path, step) for step in (1, 2, 3)]
    (made[0].path / "state.json").write_text("{")
    layout.prune(tmp_path, 1, 3)
    assert steps(tmp_path) == [1, 3]


def test_prune_neither_counts_nor_deletes_checkpoints_of_later_steps(tmp_path: Path) -> None:
    """They are damaged ones that the run passed over."""
    for step in (1, 2, 3, 9):
        make_checkpoint(tmp_path, step)
    layout.prune(tmp_path, 1, 3)
    assert steps(tmp_path) == [3, 9]


def test_a_checkpoint_that_is_being_deleted_is_invisible_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_checkpoint(tmp_path, 1)
    visible = []
    monkeypatch.setattr(layout.shutil, "rmtree", lambda *_, **__: visible.append(steps(tmp_path)))
    layout.remove(made.path)
    assert visible == [[]]


def test_manifest_says_its_format(tmp_path: Path) -> None:
    made: Checkpoint = make_checkpoint(tmp_path, 1)
    content = json.loads((made.path / "manifest.json").read_text())
    assert content["format"] == 1 and set(content["files"]["__0_0.distcp"]) == {"size", "sha256"}
    assert content["files"]["__0_0.distcp"]["sha256"] == layout.hash_file(made.path / "__0_0.distcp")
