"""The rooms of common/ stand on each other: a module imports from its own room and from rooms below it."""

import ast

from conftest import ROOT

ROOMS = ["ground", "distributed", "corpus", "tokens", "dataset", "model", "run", "train"]  # from the ground up


def test_no_room_imports_from_a_room_above_it():
    for path in (ROOT / "common").rglob("*.py"):
        room = path.parent.name if path.parent.name != "common" else "ground"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("common."):
                _, other, *module = node.module.split(".")
                other = other if module else "ground"
                assert ROOMS.index(other) <= ROOMS.index(room), f"{path}:{node.lineno} imports {node.module}"


def test_file_names_are_unique():
    names = [path.name for path in (ROOT / "common").rglob("*.py") if path.name != "__init__.py"]
    assert len(names) == len(set(names))
