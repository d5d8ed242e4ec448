"""SwanLab, without ever asking, waiting or failing: online when logged in, otherwise offline.

Which SwanLab run an output folder is stands in its ``tracking.json``: a continued run continues its curves. Other
trackers come with ``--report_to`` and have the same names, train/loss, eval/bits_per_byte and so on.
"""

import json
import secrets
import sys
from pathlib import Path

from transformers import TrainerCallback

from common.console import InputError, is_main_process, say
from common.io import read_lines, write_json

TRACKING_FILE = "tracking.json"


def swanlab_callbacks(mode: str, project: str, output_dir: str) -> list[TrainerCallback]:
    """Start a SwanLab run on the main process and return the callbacks that log to it (none when off).

    Args:
        mode: auto, online, local, offline or off. Only an explicit ``online`` may fail.

    Raises:
        InputError: ``online`` was asked for and SwanLab cannot be reached or there is no login.
    """
    if mode == "off" or not is_main_process():
        return []
    import swanlab
    from swanlab.integration.transformers import SwanLabCallback

    log_dir = Path(output_dir) / "swanlog"
    log_dir.mkdir(parents=True, exist_ok=True)
    never_ask = swanlab.Settings(interactive=False)
    run = {"name": Path(output_dir).name, "log_dir": str(log_dir), "settings": never_ask, "resume": "allow"}
    run |= swanlab_identity(output_dir, project)
    attempts = [mode] if mode != "auto" else ["online", "offline"] if never_ask.api_key else ["offline"]
    for attempt in attempts:
        try:
            swanlab.init(mode=attempt, **run)
        except Exception as error:  # no tracker problem of any kind may stop a training run
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


def swanlab_identity(output_dir: str, project: str) -> dict[str, str]:
    """Return id and project of this folder's SwanLab run; a new id, which is kept, where it has none."""
    path = Path(output_dir) / TRACKING_FILE
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["swanlab"]
        return {"id": str(known["id"]), "project": str(known["project"])}
    except (OSError, ValueError, KeyError, TypeError):
        identity = {"id": secrets.token_hex(11)[:21], "project": project}
        try:
            write_json(path, {"swanlab": identity})
        except OSError as error:  # a full disk; a continued run has other curves then
            say(f"note: {TRACKING_FILE} cannot be written ({error})")
        return identity


class MayFail:
    """A tracker whose failure is said once and does not stop training, for Trainer's list of callbacks.

    It is left out for the rest of the launch: on a full disk every call of some trackers waits for seconds.
    """

    def __init__(self, tracker: TrainerCallback):
        self.tracker, self.failed = tracker, False

    def __getattr__(self, event: str):
        def call(args, state, control, **kwargs):
            if self.failed:
                return None
            try:
                return getattr(self.tracker, event)(args, state, control, **kwargs)
            except Exception as error:  # of any kind: a tracker may not stop a training run
                self.failed, name = True, type(self.tracker).__name__.removesuffix("Callback")
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                if event == "on_train_begin":  # as without a login: nothing is lost by saying so now
                    raise InputError(f"{name} cannot be used ({reason}). Mend it, or train without it.") from None
                say(f"note: {name} failed and gets no more of this launch ({reason}). report.html has all curves.")

        return call


def trackers_may_fail(callbacks: list[TrainerCallback]) -> list:
    """Return ``callbacks`` with those that send numbers elsewhere wrapped in MayFail."""
    modules = ("swanlab.", "transformers.integrations.")
    trackers = [isinstance(one, TextCallback) or type(one).__module__.startswith(modules) for one in callbacks]
    return [MayFail(one) if tracker else one for one, tracker in zip(callbacks, trackers, strict=True)]


class TextCallback(TrainerCallback):
    """Log the samples of every evaluation as texts. Added behind the callback that writes them."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        import swanlab

        samples = read_lines(Path(args.output_dir) / "samples.jsonl")
        latest = {sample["prompt"]: sample["text"] for sample in samples if sample["step"] == state.global_step}
        if latest and "eval_loss" in metrics and swanlab.has_run():
            texts = [swanlab.Text(prompt + text, caption=prompt) for prompt, text in latest.items()]
            swanlab.log({"samples": texts}, step=state.global_step)


def finish_tracking(results: dict, step: int) -> None:
    """Log ledger and final figures as tables, and close the SwanLab run, if there is one."""
    swanlab = sys.modules.get("swanlab")  # not loaded: --swanlab off
    if swanlab is None or not (is_main_process() and swanlab.has_run()):
        return
    final = {name: value for name, value in results.items() if isinstance(value, int | float)}
    try:
        for name, rows in (("ledger", results["ledger"]), ("results", final)):
            table = swanlab.echarts.Table()
            table.add(["", "value"], [[key, f"{value:,}"] for key, value in rows.items()])
            swanlab.log({name: table}, step=step)
        swanlab.finish()
    except Exception as error:  # as on a full disk; the files of the run are complete
        say(f"note: SwanLab's run could not be completed ({type(error).__name__}: {error})")
