"""SwanLab and other trackers. None of them asks a question, waits for the network, or stops a training run.

SwanLab and wandb are online if you are logged in, and offline otherwise. ``tracking.json`` in the output folder names
the SwanLab run, so a continued run continues its curves. ``--report_to`` adds other trackers, which get the same names:
train/loss, eval/bits_per_byte and so on.
"""

import json
import netrc
import os
import secrets
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

from common.console import InputError, is_main_process, say
from common.io import write_json
from common.run.record import git_commit, read_samples

TRACKING_FILE = "tracking.json"


def prepare_trackers(training: TrainingArguments, swanlab_mode: str) -> None:
    """Refuse trackers that cannot work, before anything is read, and keep the others from asking questions.

    Args:
        swanlab_mode: auto, online, local, offline or off.

    Raises:
        InputError: with the command that installs what is missing.
    """
    check_trackers(training.report_to)
    if swanlab_mode not in ("auto", "off") and find_spec("swanlab") is None:
        raise InputError(
            f"--swanlab {swanlab_mode}: its package is not installed. Install it (pip install swanlab), or leave the "
            "flag out: report.html in the output folder has all curves."
        )
    if training.report_to and training.run_name is None:
        training.run_name = Path(training.output_dir).name  # trackio would give each launch a name of its own
    if "wandb" in training.report_to and "WANDB_MODE" not in os.environ and not has_wandb_login():
        os.environ["WANDB_MODE"] = "offline"  # it would ask, and wait for an answer
        say("wandb: there is no login, so offline. Later, wandb sync wandb/offline-run-* uploads the run")


def has_wandb_login() -> bool:
    """Whether wandb finds a key without asking: in the environment, or in the file that ``wandb login`` writes."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    given = os.environ.get("NETRC")
    files = [Path(given)] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]  # the second on Windows
    for file in files:
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(file).authenticators(host):
                return True
    return False


def check_trackers(names: list[str]) -> None:
    """Refuse trackers of ``--report_to`` that are unknown, or whose package is missing.

    Raises:
        InputError: with the command that installs it.
    """
    if "swanlab" in names:
        raise InputError("--report_to swanlab: SwanLab has its own flag, --swanlab. Leave it out.")
    try:
        get_reporting_integration_callbacks(names)
    except ValueError as error:
        raise InputError(f"--report_to: {error}") from None
    installed = {*get_available_reporting_integrations(), "flyte", "kubeflow"}  # it leaves out these two
    for name in names:
        if name not in installed:
            raise InputError(
                f"--report_to {name}: its package is not installed. Install it (pip install {name}), or leave the flag "
                "out: report.html in the output folder has all curves."
            )


def swanlab_callbacks(mode: str, project: str, output_dir: str) -> list[TrainerCallback]:
    """Start a SwanLab run on the main process, and return the callbacks that log to it.

    The list is empty on other processes, with ``off``, and if SwanLab cannot be started.

    Args:
        mode: auto, online, local, offline or off.
        project: name of the SwanLab project; a continued run keeps the project of its first launch.
        output_dir: output folder of the run.

    Raises:
        InputError: the mode is ``online``, and SwanLab cannot be reached or there is no login.
    """
    if mode == "off" or not is_main_process():
        return []
    if find_spec("swanlab") is None:  # with auto: prepare_trackers refuses the other modes
        say("note: SwanLab is not installed, and keeps nothing of this run (pip install swanlab)")
        return []
    import swanlab
    from swanlab.integration.transformers import SwanLabCallback

    print_paths_whole()
    log_dir = Path(output_dir) / "swanlog"
    log_dir.mkdir(parents=True, exist_ok=True)
    # It would record the remote of git, which may have a password in it (swanlab 0.10).
    settings = swanlab.Settings(interactive=False, probe={"git": False})
    run = {"name": Path(output_dir).name, "log_dir": str(log_dir), "settings": settings, "resume": "allow"}
    run["config"] = {"commit": git_commit()}
    run |= swanlab_identity(output_dir, project)
    if mode != "auto":
        attempts = [mode]
    elif settings.api_key:
        attempts = ["online", "offline"]
    else:
        attempts = ["offline"]
    for attempt in attempts:
        try:
            swanlab.init(mode=attempt, **run)
        except Exception as error:  # of any kind: a tracker must not stop a training run
            reason = f"{type(error).__name__}: {error}"
            if mode == "online":
                raise InputError(
                    f"SwanLab cannot be used online ({reason}). Log in, or use --swanlab offline."
                ) from None
            say(f"note: SwanLab {attempt} does not work ({reason})")
            continue
        say(f"SwanLab: {attempt}, in {log_dir}")
        return [SwanLabCallback(), TextCallback()]
    return []


def print_paths_whole() -> None:
    """Have SwanLab print a path or a command in one piece, to be copied.

    Its console breaks lines at the terminal's width, or at 80 letters of a file, in the middle of a path (seen with
    swanlab 0.10.3, which has no setting for it). It can go when it does not.
    """
    with suppress(ImportError, AttributeError):  # a later version may have it elsewhere
        from swanlab.sdk.internal.pkg import console

        console.c.soft_wrap = True


def swanlab_identity(output_dir: str, project: str) -> dict[str, str]:
    """Return id and project of this folder's SwanLab run. If it has none, make a new id and write it to the folder."""
    path = Path(output_dir) / TRACKING_FILE
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["swanlab"]
        return {"id": str(known["id"]), "project": str(known["project"])}
    except (OSError, ValueError, KeyError, TypeError):
        identity = {"id": secrets.token_hex(11)[:21], "project": project}
        try:
            write_json(path, {"swanlab": identity})
        except OSError as error:  # such as a full disk
            say(f"note: {TRACKING_FILE} cannot be written ({error}). A continued run will start new SwanLab curves.")
        return identity


class MayFail:
    """A tracker for Trainer's list of callbacks whose failure is printed once and does not stop training.

    After a failure it is not called again in this launch, because on a full disk each call of some trackers waits for
    seconds. A failure in on_train_begin is an InputError: nothing is trained yet, so nothing is lost.
    """

    def __init__(self, tracker: TrainerCallback):
        self.tracker = tracker
        self.failed = False

    def __getattr__(self, event: str):
        """Return a function that handles ``event``, a method name of TrainerCallback such as "on_log"."""

        def call(args, state, control, **kwargs):
            if self.failed:
                return None
            try:
                return getattr(self.tracker, event)(args, state, control, **kwargs)
            except Exception as error:  # of any kind: a tracker must not stop a training run
                self.failed = True
                name = type(self.tracker).__name__.removesuffix("Callback")
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                if event == "on_train_begin":  # for example, there is no login
                    raise InputError(f"{name} cannot be used ({reason}). Repair it, or train without it.") from None
                say(f"note: {name} failed ({reason}). It gets no more data in this launch; report.html has all curves.")

        return call


def trackers_may_fail(callbacks: list[TrainerCallback]) -> list:
    """Return ``callbacks`` with each tracker among them wrapped in MayFail."""
    modules = ("swanlab.", "transformers.integrations.")

    def is_tracker(callback: TrainerCallback) -> bool:
        return isinstance(callback, TextCallback) or type(callback).__module__.startswith(modules)

    return [MayFail(callback) if is_tracker(callback) else callback for callback in callbacks]


class TextCallback(TrainerCallback):
    """Log the samples of every evaluation to SwanLab as texts. Add it after the callback that writes them."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        import swanlab

        samples = read_samples(args.output_dir)
        latest = {sample["prompt"]: sample["text"] for sample in samples if sample["step"] == state.global_step}
        if latest and "eval_loss" in metrics and swanlab.has_run():
            texts = [swanlab.Text(prompt + text, caption=prompt) for prompt, text in latest.items()]
            swanlab.log({"samples": texts}, step=state.global_step)


def finish_tracking(results: dict, step: int) -> None:
    """Close what trackers have open, so that a notebook's next run is not added to this one.

    SwanLab first gets the ledger and the final figures as tables.
    """
    if is_main_process():
        _finish_others()
    swanlab = sys.modules.get("swanlab")  # None with --swanlab off, which never imports it
    if swanlab is None or not (is_main_process() and swanlab.has_run()):
        return
    final = {name: value for name, value in results.items() if isinstance(value, int | float)}
    try:
        for name, rows in (("ledger", results["ledger"]), ("results", final)):
            table = swanlab.echarts.Table()
            table.add(["", "value"], [[key, f"{value:,}"] for key, value in rows.items()])
            swanlab.log({name: table}, step=step)
        swanlab.finish()
    except Exception as error:  # such as a full disk
        reason = f"{type(error).__name__}: {error}"
        say(f"note: the SwanLab run could not be closed ({reason}). The files of the run are complete.")


def _finish_others() -> None:
    """Close the runs of wandb and trackio. Trainer leaves them open: the last evaluation comes after training."""
    wandb, trackio = sys.modules.get("wandb"), sys.modules.get("trackio")  # None if nobody uses them
    try:
        if wandb is not None and getattr(wandb, "run", None) is not None:
            wandb.finish()
        if trackio is not None and trackio.context_vars.current_run.get() is not None:
            trackio.finish()
    except Exception as error:  # of any kind: a tracker must not stop a training run
        say(
            f"note: a tracker could not be closed ({type(error).__name__}: {error}). The files of the run are complete."
        )
