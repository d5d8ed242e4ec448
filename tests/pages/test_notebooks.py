"""The notebooks run from top to bottom, and what is committed of their outputs is small."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load_recipe, texts_of
from test_readme import Understood, stop

NOTEBOOKS = ["colab", "ai_studio"]


def cells(name: str) -> list[dict]:
    return json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_there_and_small_and_name_nobodys_folders(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    assert path.stat().st_size < 200_000
    code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code), "every cell has been run"
    outputs = json.dumps([cell["outputs"] for cell in code])
    assert "image/png" in outputs and "bits per byte" in outputs
    assert not re.search(r"/(home(?!/aistudio)|tmp|root|work(?!/models)|Users)/", outputs), (
        "outputs name the folders of a machine"
    )


def test_both_do_the_same():
    """Up to comments, texts and places, the code is equal."""
    codes = []
    for name in NOTEBOOKS:
        text = "\n".join("".join(cell["source"]) for cell in cells(name)[:-1] if cell["cell_type"] == "code")
        text = re.sub(r"#.*|print\(f?\".*|\".*?\"", "", text)
        codes.append([line.strip() for line in text.splitlines() if line.strip() and "os.environ" not in line])
    assert codes[0] == codes[1]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_address_to_clone_from_is_the_first_line(name):
    first = next(cell for cell in cells(name) if cell["cell_type"] == "code")
    assert first["source"][0].startswith('REPOSITORY = ""  # ')
    assert "OWNER" not in json.dumps(cells(name)), "no placeholder for somebody's account"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_commands_for_ones_own_text_are_understood(name, monkeypatch):
    """low_memory_16gb.py on a GPU, a model that fits the text on a CPU; the file's name may have spaces."""
    source = "".join(next(cell for cell in cells(name) if cell["id"] == "cell-own-run")["source"])
    monkeypatch.setenv("NOTEBOOK_TEXT", "my notes.txt")
    named = {"os": os, "OUT": "outputs/x"}
    exec(source.split("if not TEXT")[0], named)
    commands = re.findall(r"recipes/(\w+)\.py (.*)", source)
    assert [recipe for recipe, _ in commands] == ["wiki_zh_scratch", "low_memory_16gb", "low_memory_16gb"]
    for recipe, flags in commands:
        module = load_recipe(recipe)
        for step in ("preflight", "print_plan"):
            monkeypatch.setattr(module, step, stop)
        for missing in ("check_method", "fit_to_text"):  # a GPU, the text
            monkeypatch.setattr(module, missing, lambda first, *_: first, raising=False)
        words = shlex.split(flags.split(" 2>&1")[0].format(**named))
        assert words[words.index("--data") + 1] == "my notes.txt"
        with pytest.raises(Understood):
            module.main(words)


@pytest.mark.heavy
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("NOTEBOOK_STEPS", "12")
    monkeypatch.setenv("NOTEBOOK_KEPT", str(tmp_path / "kept"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    texts = texts_of(ROOT / "data" / "sample_zh.jsonl")
    (tmp_path / "my notes.txt").write_text("\n\n".join(texts[:12]), encoding="utf-8")
    monkeypatch.setenv("NOTEBOOK_TEXT", str(tmp_path / "my notes.txt"))
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:  # its runs go to a folder of their own
        cell.source = cell.source.replace('OUT = "outputs/', f'OUT = "{tmp_path.as_posix()}/')
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    if os.environ.get("SAVE_NOTEBOOKS"):  # for committing new outputs
        nbformat.write(notebook, tmp_path.parent / f"{name}.ipynb")
    text = json.dumps(notebook, ensure_ascii=False)
    assert "continuing from" in text and "Traceback" not in text
    kept = tmp_path / "kept" / name
    assert (kept / "model.safetensors").exists() and (kept / "report.html").exists()
    assert (tmp_path / f"{name}_inside" / "report.html").exists(), "trained inside the notebook, too"
    last = json.loads((kept / "all_results.json").read_text())
    assert last["steps"] == 12
    assert (tmp_path / "kept" / f"{name}_own" / "model.safetensors").exists(), "trained on one's own text, too"
