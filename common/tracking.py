"""SwanLab, without ever asking, waiting or failing: online when logged in, otherwise offline."""

from pathlib import Path

from transformers import TrainerCallback

from common.messages import InputError, is_main_process, say


def swanlab_callbacks(mode: str, project: str, output_dir: str) -> list[TrainerCallback]:
    """Start a SwanLab run on the main process and return the callback that logs to it (none when off).

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
    run = {"project": project, "name": Path(output_dir).name, "log_dir": str(log_dir), "settings": never_ask}
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
        return [SwanLabCallback()]
    return []
