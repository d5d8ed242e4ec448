"""All launches of a folder are one SwanLab run, with texts and tables. TensorBoard gets the same names."""

import json
import subprocess

import pytest
from conftest import losses, small_run
from transformers import TrainerCallback

from common.console import InputError
from common.run.tracking import swanlab_identity

REMOTE = "https://me:passw0rd@git.example.org/me/private.git"


@pytest.fixture(scope="module")
def tracked(wiki, cache_dir, tmp_path_factory):
    """A run that was continued, with SwanLab offline in both launches."""
    tmp_path = tmp_path_factory.mktemp("tracked")
    flags = small_run(cache_dir, tmp_path / "run")
    flags = [flag if flag != "off" else "offline" for flag in flags]
    repository = tmp_path / "repository"
    for command in (["init", "-q", repository], ["-C", repository, "remote", "add", "origin", REMOTE]):
        subprocess.run(["git", *command], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repository)
        wiki.main([flag if flag != "6" else "3" for flag in flags])
        wiki.main(flags)
    return tmp_path / "run"


def test_no_password_of_a_git_remote_is_in_what_a_tracker_keeps(tracked):
    """SwanLab would keep the remote as it is."""
    kept = [path for path in tracked.rglob("*") if path.is_file() and ".git" not in path.parts]
    assert len(kept) > 10 and any("swanlog" in path.parts for path in kept)
    for path in kept:
        content = path.read_bytes()
        assert b"passw0rd" not in content and b"git.example.org" not in content, path


def test_a_continued_run_is_the_same_swanlab_run(tracked):
    folders = sorted((tracked / "swanlog").glob("run-*"))
    assert len(folders) == 2, "one for each launch"
    [identity] = {folder.name.rpartition("-")[2] for folder in folders}
    assert identity == json.loads((tracked / "tracking.json").read_text())["swanlab"]["id"]
    for folder in folders:
        texts = [path.read_text(encoding="utf-8") for path in folder.glob("media/text/*")] or [
            path.read_text(encoding="utf-8") for path in folder.glob("media/**/*.txt")
        ]
        assert any(text.startswith("地球是") for text in texts), "the samples of this launch"
    record = b"".join(path.read_bytes() for path in folders[1].rglob("*") if path.is_file())
    assert b"bits_per_byte" in record and b"tokens_dropped" in record and b"effective_tokens_per_second" in record


def test_an_identity_is_kept_and_a_damaged_one_is_replaced(tmp_path):
    first = swanlab_identity(tmp_path, "p")
    assert swanlab_identity(tmp_path, "another") == first and first["project"] == "p"
    (tmp_path / "tracking.json").write_text('{"swan')
    assert swanlab_identity(tmp_path, "p")["id"] != first["id"]


def test_other_trackers_get_the_same_names(wiki, cache_dir, tmp_path):
    from tensorboard.backend.event_processing import event_accumulator

    wiki.main(small_run(cache_dir, tmp_path, "--report_to", "tensorboard"))
    events = event_accumulator.EventAccumulator(str(next(tmp_path.glob("runs/*"))))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "train/tokens_seen", "eval/loss", "eval/bits_per_byte"} <= names
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    logged = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    assert {event.step: event.value for event in events.Scalars("train/loss")} == pytest.approx(logged, rel=1e-5)


class Refusing(TrainerCallback):
    """Fails as a tracker does on a full disk, or when its server is gone."""

    def __init__(self, event: str):
        self.calls = 0
        setattr(self, event, self.refuse)

    def refuse(self, *args, **kwargs):
        self.calls += 1
        raise OSError(28, "No space left on device")


Refusing.__module__ = "swanlab.integration.transformers"


def test_training_continues_without_a_tracker_that_fails(wiki, cache_dir, tmp_path, monkeypatch, capsys):
    tracker = Refusing("on_log")
    monkeypatch.setattr(wiki, "swanlab_callbacks", lambda *_: [tracker])
    wiki.main(small_run(cache_dir, tmp_path))
    assert [*losses(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert tracker.calls == 1
    assert capsys.readouterr().out.count("Refusing failed (OSError: [Errno 28] No space left on device)") == 1


def test_a_tracker_that_fails_at_the_start_is_an_error(wiki, cache_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(wiki, "swanlab_callbacks", lambda *_: [Refusing("on_train_begin")])
    with pytest.raises(InputError, match="Refusing cannot be used .*No space left"):
        wiki.main(small_run(cache_dir, tmp_path))
