"""Why a folder with a model or a tokenizer cannot be loaded, and what to do: custom code, Git LFS pointers."""

import json
from collections.abc import Iterable
from pathlib import Path

from common.console import InputError
from common.io import LFS_POINTER

# Families whose folders bring custom code, which is never run here: model_type -> their place in transformers.
PLACES = {
    "qwen": "Qwen 1 is Qwen2 under other names (model_type qwen2): python data/convert_weights.py FOLDER OUT. Or take "
    "a later one: Qwen/Qwen2.5-0.5B",
    "chatglm": "ChatGLM 2 and 3 are GLM under other names (model_type glm): python data/convert_weights.py FOLDER OUT. "
    "ChatGLM 1 has no place in transformers. GLM-4 has, in its folders whose name ends in -hf or 0414: "
    "zai-org/glm-4-9b-hf",
    "baichuan": "Baichuan 7B (1 and 2) is Llama under other names (model_type llama): python data/convert_weights.py "
    "FOLDER OUT. Baichuan 13B has no place in transformers",
    "yuan": "Yuan 2 has no place in transformers: its attention has a filter that no other family has",
    "minimind": "MiniMind has no place of its own in transformers. Its scripts/convert_model.py writes a folder in the "
    "format of a family that has: give that one",
}
# How the names of their classes begin, for a folder whose config has no model_type.
CLASSES = {"qwen": "QWen", "chatglm": "ChatGLM", "baichuan": "Baichuan", "yuan": "Yuan", "minimind": "MiniMind"}


def custom_code(folder: str | Path) -> str | None:
    """Return what to do about a ``folder`` that brings custom code; None if it has none."""
    entries = [object_in(Path(folder) / name) for name in ("config.json", "tokenizer_config.json")]
    if not any("auto_map" in entry for entry in entries):
        return None
    family = str(entries[0].get("model_type", ""))
    classes = " ".join(str(entry.get("auto_map")) for entry in entries)
    for name, beginning in CLASSES.items():
        if family == name or beginning in classes:
            return f"it comes with custom code, which is not run here. {PLACES[name]}."
    return (
        f"it comes with custom code, which is not run here, and transformers has no place for {family or 'it'}. "
        "Take a family that transformers has, or save the folder again in the format of one."
    )


def refuse_pointers(folder: str | Path, globs: Iterable[str]) -> None:
    """Raise InputError if a file of ``folder`` that matches ``globs`` is a Git LFS pointer instead of its content."""
    pointers = [path for glob in globs for path in sorted(Path(folder).glob(glob)) if is_pointer(path)]
    if pointers:
        raise InputError(
            f"{pointers[0]}: a Git LFS pointer, not the file itself ({len(pointers)} such files in this folder). Fetch "
            f"the content: cd {folder} && git lfs install && git lfs pull"
        )


def is_pointer(path: Path) -> bool:
    """Whether a file has a few lines that stand for its content, as ``git clone`` without Git LFS leaves them."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def object_in(path: Path) -> dict:
    """Return the JSON object in a file; {} if there is none."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entry if isinstance(entry, dict) else {}
