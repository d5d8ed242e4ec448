"""Checkpoints are whole or absent: written aside, synced, listed in a manifest, and only then given their name.

``OUTPUT/unfinished/checkpoint-N`` becomes ``OUTPUT/checkpoint-N`` by one rename, which a file system does wholly or not
at all. What a crash leaves in ``unfinished`` is removed by the next launch. The manifest has the size of every file. A
checkpoint that lost a file, or part of one, afterwards is passed over. Why sizes and not hashes: hashing would read
every checkpoint a second time, and the flipped bits that only a hash would find are found by the disk itself.
"""

import copy
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from common.console import InputError, is_main_process, say
from common.io import DISK_FULL, write_json

UNFINISHED, MANIFEST = "unfinished", "manifest.json"
REMOVED = "removed-"  # a checkpoint that is being removed
LARGEST_MANIFEST_BYTES = 64 * 2**20
FULL = {*DISK_FULL, errno.EFBIG}


def checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """Return (step, path) of everything in ``folder`` that has the name of a checkpoint, oldest first."""
    found = Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return sorted((int(step), path) for path in found if (step := path.name.rpartition("-")[2]).isdecimal())


def unfinished(folder: str | Path, step: int | str) -> Path:
    """Return where the checkpoint of ``step`` is written until it is whole. The run's end has names for steps."""
    return Path(folder) / UNFINISHED / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def finish_checkpoint(folder: str | Path, step: int, processes: int) -> None:
    """Make the unfinished checkpoint of ``step`` a whole one. Call this on one process, after all have written."""
    path, final = unfinished(folder, step), Path(folder) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    sizes = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file != path / MANIFEST:
            with open(file, "r+b") as opened:  # Windows syncs only files that are open for writing
                os.fsync(opened.fileno())
            sizes[file.relative_to(path).as_posix()] = file.stat().st_size
    write_json(path / MANIFEST, {"step": step, "processes": processes, "files": sizes}, durable=True)
    for inner in [*(inner for inner in path.rglob("*") if inner.is_dir()), path]:
        sync_folder(inner)
    _discard(folder, final)  # a checkpoint of this step that was passed over
    path.rename(final)
    sync_folder(final.parent)
    _remove_if_empty(path.parent)


def problem_of(path: Path) -> str | None:
    """Return why the checkpoint ``path`` cannot be continued from, None if it is whole."""
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        return f"no {MANIFEST}: half-written, or not written by these recipes"
    except (OSError, ValueError, RecursionError) as error:
        return f"{MANIFEST} is damaged ({error})"
    if f"{PREFIX_CHECKPOINT_DIR}-{manifest['step']}" != path.name:
        return f"{MANIFEST} is of step {manifest['step']}"
    for name, size in manifest["files"].items():
        file = path / name
        try:
            if not file.is_file():
                return f"{name[:200]!r} is missing"
            if file.stat().st_size != size:
                return f"{name!r} has {file.stat().st_size:,} bytes, not {size:,}"
        except OSError as error:  # such as a name that is too long
            return f"{name[:200]!r} cannot be examined ({error.strerror})"
    return None


def read_manifest(path: Path) -> dict:
    """Return the manifest of the checkpoint ``path``, with "step", "processes" and "files": name -> bytes.

    Raises:
        OSError: there is no manifest, or it cannot be read.
        ValueError: it is not a manifest, or it names a file outside its checkpoint.
    """
    if (path / MANIFEST).stat().st_size > LARGEST_MANIFEST_BYTES:
        raise ValueError("too large")
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError("no list of files")
    counts = [manifest.get("step"), manifest.get("processes"), *manifest["files"].values()]
    if not all(type(count) is int and count >= 0 for count in counts) or not manifest["files"]:
        raise ValueError("a count is not a whole number of at least 0, or there are no files")
    for name in manifest["files"]:
        if "\0" in name or "\\" in name or os.path.isabs(name) or ".." in name.split("/"):
            raise ValueError(f"{name[:200]!r} is outside the checkpoint")
    return manifest


@contextmanager
def reading(checkpoint: str | Path, files: str) -> Iterator[None]:
    """Around reading ``files`` of a checkpoint: whatever a library says of files that were replaced is one error.

    The manifest has the sizes of files, not their content.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each library has its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"{checkpoint}: {files} cannot be read ({reason[:200]}). If a file was replaced, put it back, or remove "
            "this checkpoint: the same command then continues from the one before it, if this run has one."
        ) from None


def newest_whole(folder: str | Path) -> Path | None:
    """Return the newest whole checkpoint of ``folder``; say which are passed over, and why."""
    for _, path in reversed(checkpoints(folder)):
        problem = problem_of(path)
        if problem is None:
            return path
        say(f"passing over {path}: {problem}")
    return None


def prune_checkpoints(folder: str | Path, keep: int | None) -> None:
    """Remove the oldest whole checkpoints beyond ``keep`` (None or 0: none), never the newest whole one."""
    whole = [path for _, path in checkpoints(folder) if problem_of(path) is None]
    for path in whole[: -max(keep, 1)] if keep and keep > 0 else []:
        _discard(folder, path)


def remove_unfinished(folder: str | Path) -> None:
    """Remove the checkpoints that a crash left half-written or half-removed, and nothing else.

    Only the process that holds the folder's lock may call this, and only when the folder is known to be a run's.
    """
    inside = Path(folder) / UNFINISHED
    for path in inside.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        say(f"removing {path}: half-written when the run ended")
        shutil.rmtree(path, ignore_errors=True)
    for path in inside.glob(f"{REMOVED}{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(path, ignore_errors=True)
    _remove_if_empty(inside)


def check_room(folder: str | Path) -> None:
    """Raise OSError (ENOSPC) if another checkpoint as large as the last whole one will not fit."""
    whole = [path for _, path in checkpoints(folder) if problem_of(path) is None]
    needed = sum(read_manifest(whole[-1])["files"].values()) if whole else 0
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{free / 1e6:,.1f} MB free, the last checkpoint has {needed / 1e6:,.1f}")


def why_not_written(error: Exception, folder: str | Path, doing: str) -> str | None:
    """Return why ``doing`` this in ``folder`` failed, and what to do about it; None if no file was the reason.

    ``error`` is an OSError, or what safetensors or torch make of one.
    """
    if not Path(folder).is_dir():
        return f"the folder is gone while {doing} ({error}); bring it back"
    if (
        getattr(error, "errno", None) in FULL
        or "os error 28" in str(error)
        or "No space left" in str(error)
        # torch does not say why, and NumPy gives no number
        or (_says_no_reason(error) and shutil.disk_usage(folder).free < 2**20)
    ):
        return f"no space left while {doing} ({error}); make room"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
        return f"the disk refused while {doing} ({error}); see to that"
    return None


def _says_no_reason(error: Exception) -> bool:
    return isinstance(error, RuntimeError) or (isinstance(error, OSError) and error.errno is None)


def begin_checkpoint(
    folder: str | Path, step: int, write: Callable[[], list | None], gather: Callable[[list], list], collective: bool
) -> tuple[str | None, list[Callable[[], None]]]:
    """Begin the checkpoint of ``step`` with all processes, before training goes on.

    Args:
        write: writes files of this process into ``unfinished(folder, step)``, and may return functions that write the
            others: ``end_checkpoint`` calls them.
        gather: returns the lists of all processes end to end, to all of them.
        collective: whether ``write`` waits for other processes after it has begun to write. Then a process that fails
            alone cannot tell them.

    Returns:
        Why it cannot be written, or None; and what ``write`` returned.

    Raises:
        InputError: the disk failed in the middle of a collective write.
        Exception: whatever else ``write`` raises.
    """
    left: list[Callable[[], None]] = []

    def prepare() -> None:
        if is_main_process():
            shutil.rmtree(unfinished(folder, step), ignore_errors=True)
            check_room(folder)

    def write_first() -> None:
        left.extend(write() or [])

    alone = collective and len(gather([0])) > 1
    return _together([(prepare, False), (write_first, alone)], folder, step, gather), left


def end_checkpoint(
    folder: str | Path, step: int, left: list[Callable[[], None]], gather: Callable[[list], list]
) -> str | None:
    """Write what is left of the checkpoint of ``step`` with all processes, and finish it; return why not, or None.

    This may run in a thread, if ``gather`` may.
    """
    processes = len(gather([0]))

    def write() -> None:
        for function in left:
            function()

    def finish() -> None:
        if is_main_process():
            finish_checkpoint(folder, step, processes)

    return _together([(write, False), (finish, False)], folder, step, gather)


def write_checkpoint(
    folder: str | Path, step: int, write: Callable[[], list | None], gather: Callable[[list], list], collective: bool
) -> str | None:
    """Write and finish the checkpoint of ``step`` with all processes; return why it cannot be written, or None.

    Nothing is left of a checkpoint that did not fit, and no earlier one is touched. The arguments and errors are those
    of ``begin_checkpoint``.
    """
    problem, left = begin_checkpoint(folder, step, write, gather, collective)
    return problem if problem is not None else end_checkpoint(folder, step, left, gather)


def _together(
    actions: list[tuple[Callable[[], None], bool]], folder: str | Path, step: int, gather: Callable[[list], list]
) -> str | None:
    """Do each action on all processes before the next; return the first problem, and remove what is there of ``step``.

    An action comes with whether a process whose disk fails in it cannot tell the others.
    """
    for action, alone in actions:
        problem = next(filter(None, gather([_attempt(action, folder, step, alone)])), None)
        if problem is not None:
            if is_main_process():
                shutil.rmtree(unfinished(folder, step), ignore_errors=True)
            return problem
    return None


def _attempt(action: Callable[[], None], folder: str | Path, step: int, alone: bool) -> str | None:
    """Return why ``action``, a part of saving ``step``, could not write, None if it could."""
    try:
        action()
    except Exception as error:  # any that is not about a file is raised again
        problem = why_not_written(error, folder, f"saving step {step}")
        if problem is None:
            raise
        if alone:
            shutil.rmtree(unfinished(folder, step), ignore_errors=True)
            raise InputError(
                f"{folder}: {problem}. The other processes are in the middle of saving, so the run cannot go on. The "
                "checkpoints before this one are whole, and the same command continues from the last of them."
            ) from None
        return problem
    return None


def saved_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the safetensors files of a model in ``path``, by the names that they were saved under."""
    files = sorted(path.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def renamed_when_saved(model: PreTrainedModel, path: Path) -> bool:
    """Whether a model in ``path`` was saved under names that ``model`` does not have."""
    names = set()
    for file in path.glob("model*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    return not names <= model.state_dict().keys()


def named_as_in(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return saved ``weights`` under the names that ``model`` has for them.

    transformers saves a mixture of experts under the names of the hub, each expert's matrices by themselves, and joins
    them when it loads a model; ``load_state_dict`` does not. Weights that are not the model's keep their names.
    """
    if weights.keys() <= model.state_dict().keys():
        return weights
    config = copy.deepcopy(model.config)
    settings = dict(dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True)
    loaded, found = type(model).from_pretrained(None, config=config, state_dict=dict(weights), **settings)
    wrong = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    joined = {name: tensor for name, tensor in loaded.state_dict().items() if name not in wrong}
    return joined | {name: weights[name] for name in found["unexpected_keys"] if name in weights}


def sync_folder(path: Path) -> None:
    """Make the names of files in ``path`` survive a power cut. Windows does so by itself."""
    if os.name == "posix":
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _discard(folder: str | Path, path: Path) -> None:
    """Remove a checkpoint. It loses its name first, so that a crash cannot leave half of it under that name."""
    if not path.exists():
        return
    trash = Path(folder) / UNFINISHED / f"{REMOVED}{path.name}"
    trash.parent.mkdir(exist_ok=True)
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)
    _remove_if_empty(trash.parent)


def move_into(source: Path, folder: Path, last: str = "") -> None:
    """Move all files in ``source`` into ``folder``, over files of the same name there, and remove ``source``.

    ``last``: a file in ``source`` that is moved after all others. If it is in ``folder``, all of them are.
    """
    if last:
        (folder / last).unlink(missing_ok=True)
    for file in sorted(source.rglob("*"), key=lambda file: (file.name == last, file)):
        if file.is_file():
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
    shutil.rmtree(source, ignore_errors=True)
    _remove_if_empty(source.parent)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
