"""``log.jsonl``, of the recipes that have a loop of their own: one line of JSON a step of which something is logged."""

import json
from pathlib import Path

from common.console import is_main_process
from common.io import append_lines, write_json
from common.run.folder import RESULTS_FILE


class StepLog:
    """The log of a run. Only the main process writes; the state that it goes into a checkpoint with is the same."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / "log.jsonl"

    def continue_from(self, checkpoint: str | None) -> dict:
        """Return the state that ``checkpoint`` was saved with, {} without one, and remove all that was logged later.

        A run that was cut off may have logged more steps than its checkpoint knows. They are made again.
        """
        state = {}
        if checkpoint is not None:
            state = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
        if is_main_process():
            with open(self.path, "ab") as file:
                file.truncate(min(file.tell(), state.get("log_bytes", 0)))
        return state

    def write(self, entry: dict) -> None:
        """Print ``entry`` and add it to the file, if it says more than its ``step``."""
        if is_main_process() and len(entry) > 1:
            print(json.dumps(entry), flush=True)
            append_lines(self.path, [entry])

    def state(self, entry: dict) -> dict:
        """Return the state of a checkpoint after ``entry``, the last one, whose ``step`` is the checkpoint's."""
        written = self.path.stat().st_size if is_main_process() else 0
        return {"global_step": entry["step"], "steps": entry["step"], "log_bytes": written, **entry}

    def write_results(self, state: dict) -> None:
        """Write ``state``, that of the last step, as the results of the run."""
        if is_main_process():
            write_json(self.path.parent / RESULTS_FILE, state)
