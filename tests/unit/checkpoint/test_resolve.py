"""The run's folder: one writer at a time, and which checkpoint is meant."""

from pathlib import Path

import pytest

from gcvit.checkpoint import format, resolve
from gcvit.errors import UserError
from gcvit.runtime.run_lock import RunLock


def test_the_lock_is_free_again_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError), RunLock(tmp_path):
            raise RuntimeError


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot write the run folder"),
        RunLock(tmp_path / "file" / "run"),
    ):
        pass


def write_checkpoint(run_dir: Path, step: int, best_step: int = -1, suffix: str = "") -> Path:
    path = resolve.checkpoints_of(run_dir) / f"step_{step:08d}{suffix}"
    path.mkdir(parents=True)
    state = {"step": step, "best_step": best_step}
    content = {"format": format.FORMAT, "state": state, "files": {}}
    (path / format.STATE_FILE).write_bytes(format.encode_state(content, "{}"))
    return path


def test_auto_takes_the_newest_complete_one_or_begins(tmp_path):
    assert resolve.choose_checkpoint(tmp_path, "auto") is None
    write_checkpoint(tmp_path, 9)
    newest = write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 11, suffix=".tmp")
    assert resolve.choose_checkpoint(tmp_path, "auto") == newest


def test_none_begins_but_never_over_an_old_run(tmp_path):
    assert resolve.choose_checkpoint(tmp_path, "none") is None
    newest = write_checkpoint(tmp_path, 5)
    with pytest.raises(UserError, match="holds a run already") as caught:
        resolve.choose_checkpoint(tmp_path, "none")
    assert str(newest) in str(caught.value)


def test_a_path_names_a_checkpoint_or_a_runs_best(tmp_path):
    best = write_checkpoint(tmp_path / "old", 5)
    newest = write_checkpoint(tmp_path / "old", 10, best_step=5)
    assert resolve.choose_checkpoint(tmp_path / "new", str(newest)) == newest
    assert resolve.choose_checkpoint(tmp_path / "new", str(tmp_path / "old")) == best


def test_without_its_best_a_run_means_its_newest(tmp_path):
    newest = write_checkpoint(tmp_path, 10, best_step=5)
    assert resolve.find_checkpoint(tmp_path) == newest


@pytest.mark.parametrize("name", ["absent", "file", "empty"])
def test_a_path_without_a_checkpoint(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no checkpoint here") as caught:
        resolve.find_checkpoint(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
