"""All launches of a folder are one SwanLab run, with texts and tables. TensorBoard gets the same names."""

import importlib.util
import json
import re
import subprocess

import pytest
import transformers.integrations.integration_utils
from conftest import losses, small_run
from transformers import TrainerCallback

from common.console import InputError
from common.run import tracking
from common.run.tracking import has_wandb_login, swanlab_callbacks, swanlab_identity

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


def test_swanlab_prints_a_path_in_one_piece(tmp_path, capsys):
    """Its console would break the line after 80 letters."""
    import swanlab

    folder = tmp_path / ("a_rather_long_name_of_a_folder" * 4)
    try:
        assert swanlab_callbacks("offline", "p", str(folder))
    finally:
        swanlab.finish()
    lines = capsys.readouterr().out.splitlines()
    assert any("saved at" in line and re.search(rf"{re.escape(str(folder))}/swanlog/run-\S+$", line) for line in lines)
    assert any(re.search(rf"`swanlab sync {re.escape(str(folder))}/swanlog/run-\S+`", line) for line in lines)


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


def logged_by(folder, name: str) -> dict[int, float]:
    """Return what trainer_state.json has of ``name``, by step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[name] for entry in history if name in entry}


def nobodys_machine(monkeypatch, folder) -> None:
    """Have no login, and a git remote with a password in the working directory."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(folder / "no_netrc"))
    monkeypatch.setenv("WANDB_DIR", str(folder))
    monkeypatch.setenv("TRACKIO_DIR", str(folder / "trackio"))
    repository = folder / "repository"
    for command in (["init", "-q", repository], ["-C", repository, "remote", "add", "origin", REMOTE]):
        subprocess.run(["git", *command], check=True)
    monkeypatch.chdir(repository)


def test_wandb_without_a_login_is_offline_and_gets_every_log(wiki, cache_dir, tmp_path, monkeypatch, capsys):
    """The last values are those of the log; the final evaluation is among them; no question is asked."""
    wandb = pytest.importorskip("wandb")
    nobodys_machine(monkeypatch, tmp_path)
    wiki.main(small_run(cache_dir, tmp_path / "run", "--report_to", "wandb"))
    assert wandb.run is None, "a notebook's next run would be added to this one"
    assert "wandb: there is no login, so offline" in capsys.readouterr().out
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    record = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for name in (b"train/loss", b"train/tokens_seen", b"eval/bits_per_byte", b"eval/loss"):
        assert name in record
    final = re.findall(rb'eval/bits_per_byte"?[^0-9]{1,12}([0-9]\.[0-9]{6,})', record)
    bits = logged_by(tmp_path / "run", "eval_bits_per_byte")
    assert pytest.approx(bits[6], rel=1e-6) in [float(value) for value in final]
    assert b"passw0rd" not in record


def test_trackio_keeps_one_local_run_with_every_log(wiki, cache_dir, tmp_path, monkeypatch):
    """Trainer closes it before the final evaluation, which then belongs to the same run."""
    nobodys_machine(monkeypatch, tmp_path)
    trackio = pytest.importorskip("trackio")
    wiki.main(small_run(cache_dir, tmp_path / "run", "--report_to", "trackio"))
    assert trackio.context_vars.current_run.get() is None
    from trackio.sqlite_storage import SQLiteStorage

    [project] = SQLiteStorage.get_projects()
    assert SQLiteStorage.get_runs(project) == ["run"]
    entries = SQLiteStorage.get_logs(project, "run")
    found = {entry["train/global_step"]: entry["train/loss"] for entry in entries if "train/loss" in entry}
    assert found == pytest.approx(logged_by(tmp_path / "run", "loss"))
    found = {entry["train/global_step"]: entry["eval/loss"] for entry in entries if "eval/loss" in entry}
    assert found == pytest.approx(logged_by(tmp_path / "run", "eval_loss")) and len(found) == 2
    assert not any(b"passw0rd" in path.read_bytes() for path in (tmp_path / "trackio").rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("flags", "module", "message"),
    [
        (["--report_to", "wandb"], "wandb", "--report_to wandb: its package is not installed.*pip install wandb"),
        (["--report_to", "trackio"], "trackio", "--report_to trackio: .*pip install trackio"),
        (["--report_to", "tensorboard"], "tensorboard", "--report_to tensorboard: .*pip install tensorboard"),
        (["--swanlab", "offline"], "swanlab", "--swanlab offline: .*pip install swanlab"),
    ],
)
def test_a_missing_package_is_said_before_anything_is_read(
    wiki, cache_dir, tmp_path, monkeypatch, flags, module, message
):
    def nothing_is_read(*_):
        raise AssertionError

    hide(module, monkeypatch)
    monkeypatch.setattr(wiki, "resolve_sources", nothing_is_read)
    with pytest.raises(InputError, match=message):
        wiki.main(small_run(cache_dir, tmp_path, *flags))


def hide(module: str, monkeypatch) -> None:
    """Have Python not find ``module``."""
    find = importlib.util.find_spec

    def without(name, *more):
        return None if name == module else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.setattr(tracking, "find_spec", without)
    monkeypatch.setattr(transformers.integrations.integration_utils, f"is_{module}_available", lambda: False)


def test_without_swanlab_a_run_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    hide("swanlab", monkeypatch)
    assert swanlab_callbacks("auto", "p", str(tmp_path)) == []
    assert "SwanLab is not installed" in capsys.readouterr().out


def test_a_login_at_wandb_is_found_where_wandb_keeps_it(tmp_path, monkeypatch):
    nobodys_machine(monkeypatch, tmp_path)
    assert not has_wandb_login()
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert has_wandb_login()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_wandb_login()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert has_wandb_login()


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
