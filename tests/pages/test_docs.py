"""What the pages in docs/ say exists, runs, and is complete."""

import csv
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load_recipe, small_run
from test_readme import MADE_BY_USERS, PATH, Understood, stop
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.console import InputError

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md"])
MADE_HERE = MADE_BY_USERS | {"recipes/essays_en.py", "recipes/z_loss.py", "data/openwebtext", "recipes/x.py"}


@pytest.mark.parametrize("name", PAGES)
def test_every_path_and_link_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for path in {match.rstrip("./") for match in PATH.findall(text)} - MADE_HERE:
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / name).parent / link).exists(), link


def test_the_benchmarks_pages_are_short_and_their_links_exist():
    assert len((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").splitlines()) <= 80
    for name in ("README.md", "LOG.md"):
        text = (ROOT / "benchmarks" / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / "benchmarks" / link).exists(), link


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/results/*.csv")), ids=lambda path: path.stem)
def test_a_measured_row_has_its_commit_and_versions(path):
    """The columns; a cell is empty where it is not known."""
    assert re.fullmatch(r"[a-z_]+_(cpu|h100|h200)_\d{4}-\d{2}-\d{2}", path.stem), "script_hardware_date"
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file, strict=True)
    assert {"commit", "date", "device", "torch", "transformers", "command"} <= set(head) and len(set(head)) == len(head)
    assert rows and all(len(row) == len(head) for row in rows)


def test_the_tour_names_every_file():
    """Each room, recipes/ and data/ have a section with one line per file, and no line for a file that is gone."""
    tour = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### `([\w/]+)/`\n(.*?)(?=^##|\Z)", tour, flags=re.MULTILINE | re.DOTALL))
    rooms = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "common").rglob("*.py")}
    assert set(sections) == rooms | {"recipes", "data"}
    for folder, section in sections.items():
        named = re.findall(r"^\| `(\w+\.py)` \|", section, flags=re.MULTILINE)
        there = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
        assert sorted(named) == sorted(there), folder


def test_every_new_import_path_exists():
    """The right column of docs/moved.md: each dotted name is a module, or a name that a module has."""
    page = (ROOT / "docs" / "moved.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `.* \| (.*) \|$", page, flags=re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"common\.[\w.]+\w", row)}
    assert names
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute) or importlib.util.find_spec(name), name


def test_the_output_page_names_every_file_of_a_run(wiki, cache_dir, tmp_path):
    wiki.main([flag if flag != "off" else "offline" for flag in small_run(cache_dir, tmp_path)])
    page = (ROOT / "docs" / "output.md").read_text(encoding="utf-8")
    for path in [*tmp_path.iterdir(), *(tmp_path / "checkpoint-6").iterdir()]:
        name = re.sub(r"checkpoint-\d+", "checkpoint-N", path.name)
        assert re.search(rf"`{re.escape(name)}/?`", page), f"{name} is not explained in docs/output.md"


def test_the_log_fields_are_those_of_a_run(wiki, cache_dir, tmp_path):
    """The middle columns of the two tables in docs/coming_from.md, against a run with a test split."""
    wiki.main([*small_run(cache_dir, tmp_path), "--split", "90,5,5"])
    history = json.loads((tmp_path / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    logged = next(entry for entry in history if "loss" in entry)
    results = json.loads((tmp_path / "all_results.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
    section = page.split("## Log fields\n")[1].split("\n## ")[0]
    tables = [
        re.findall(r"^\| [^|]+ \| ([^|]+) \|", table, flags=re.MULTILINE)
        for table in section.split("|---|---|---|")[1:]
    ]
    named = [re.findall(r"`(\w+)`", " ".join(cells)) for cells in tables]
    assert len(named[0]) == 11 and set(named[0]) <= logged.keys()
    assert len(named[1]) == 8 and set(named[1]) <= results.keys()
    assert {"train_runtime", "train_samples_per_second", "train_steps_per_second"} <= {k for e in history for k in e}


def launch_lines(text: str) -> list[str]:
    """Return the commands of code blocks, and of the tables' cells in backticks, that launch a recipe."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", text)
    return [line for line in lines if line.startswith("accelerate launch") and "recipes/" in line]


@pytest.mark.parametrize("name", [page for page in PAGES if "recipes/" in (ROOT / page).read_text(encoding="utf-8")])
def test_every_launch_line_is_understood_by_the_recipe(name, monkeypatch):
    for line in launch_lines((ROOT / name).read_text(encoding="utf-8")):
        words = shlex.split(line, comments=True)
        recipe = next(word for word in words if word.startswith("recipes/"))
        stem = recipe.removeprefix("recipes/").removesuffix(".py")
        module = load_recipe(stem if (ROOT / recipe).exists() else "wiki_zh_scratch")
        monkeypatch.setattr(module, "preflight", stop)
        if hasattr(module, "fit_to_text"):  # it wants the reader's files
            monkeypatch.setattr(module, "fit_to_text", lambda family, *_: family)
        if hasattr(module, "pipelines"):  # it wants the processes that the launcher would start
            monkeypatch.setattr(module.pipelines, "divide_launch", lambda launch, *_: launch)
        if hasattr(module, "check_method"):  # it wants a GPU for some lines
            monkeypatch.setattr(module, "check_method", lambda *_: None)
        with pytest.raises(Understood):
            module.main(words[words.index(recipe) + 1 :])


def changed_recipe(name: str, folder: Path):
    """Return the module of wiki_zh_scratch.py with the changes that docs/next_steps.md has for recipes/``name``.py."""
    page = (ROOT / "docs" / "next_steps.md").read_text(encoding="utf-8")
    diff = re.search(rf"```diff\n--- a/recipes/{name}.py\n(.*?)```", page, flags=re.DOTALL)[1]
    text = (ROOT / "recipes" / "wiki_zh_scratch.py").read_text(encoding="utf-8")
    for hunk in re.split(r"^@@ .* @@\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines()
        old = "\n".join(line[1:] for line in lines if line[0] in " -") + "\n"
        new = "\n".join(line[1:] for line in lines if line[0] in " +") + "\n"
        assert text.count(old) == 1, f"these lines are not in the recipe:\n{old}"
        text = text.replace(old, new)
    added = [line for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert 10 <= len(added) <= 20
    recipe = folder / f"{name}.py"
    recipe.write_text(text.replace("Path(__file__).resolve().parent.parent", f"Path({str(ROOT)!r})"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, recipe)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_worked_example_applies_and_trains(cache_dir, tmp_path):
    """The lines of docs/next_steps.md, taken out and put in where it says, make a recipe that runs."""
    module = changed_recipe("essays_en", tmp_path)
    flags = [flag for flag in small_run(cache_dir, tmp_path / "run") if flag != "--sample"]
    module.main([*flags, "--optimizer", "adamw"])
    samples = (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8")
    assert "The earth is" in samples and "language: en" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def losses_of(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry[name] for entry in history for name in ("loss", "eval_loss") if name in entry]


def test_the_example_of_another_loss_is_its_formula_and_part_of_the_run(wiki, cache_dir, tmp_path, monkeypatch):
    """With weight 0 the losses of the recipe itself; with another, one refused in the same folder, and named."""
    monkeypatch.setitem(sys.modules, "z_loss", changed_recipe("z_loss", tmp_path))
    module = sys.modules["z_loss"]
    logits, targets = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    targets[1, 3:] = -100
    z = logits.exp().sum(-1).log()
    token = z - logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    kept = (targets >= 0).float()
    for training, extra in ((True, 0.3 * z**2), (False, 0.0)):
        for items in (None, 20):
            found = module.loss_with_z(SimpleNamespace(training=training), 0.3, logits, None, 7, items, targets)
            assert found.item() == pytest.approx((((token + extra) * kept).sum() / (items or 8)).item(), rel=1e-5)
    wiki.main(small_run(cache_dir, tmp_path / "wiki"))
    module.main(small_run(cache_dir, tmp_path / "run"))
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "wiki"), rel=1e-4)
    with pytest.raises(InputError, match="data.z_loss: 0.0 in the folder, 0.1 now"):
        module.main([*small_run(cache_dir, tmp_path / "run"), "--z_loss", "0.1"])


@pytest.mark.heavy
def test_lm_eval_measures_a_run_on_the_task_of_the_page(wiki, cache_dir, tmp_path):
    """Its bits per byte are those that plain transformers computes; offline, by the commands of the page."""
    wiki.main(small_run(cache_dir, tmp_path / "run", "--context_length", "128"))
    page = (ROOT / "docs" / "next_steps.md").read_text(encoding="utf-8")
    [task] = re.findall(r"```yaml\n(task: my_task\n.*?)```", page, re.DOTALL)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "my_task.yaml").write_text(task, encoding="utf-8")
    texts = ["地球是太阳系的行星。", "The earth is round.", "计算机科学"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "my_texts.jsonl").write_text(lines, encoding="utf-8")
    [command] = re.findall(r"`(lm_eval .*?)`", page)
    command = command.replace("OUT", "run").replace("TASKS", "tasks").split()
    flags = ["--output_path", "measured", "--batch_size", "1"]
    program = str(Path(sys.executable).parent / command[0])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    done = subprocess.run(
        [program, *command[1:], *flags], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [results] = (tmp_path / "measured").rglob("results*.json")
    measured = json.loads(results.read_text(encoding="utf-8"))["results"]["my_task"]["bits_per_byte,none"]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert measured == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in texts), rel=1e-4)


@pytest.mark.parametrize("name", [*PAGES, "README.md", "benchmarks/README.md"])
def test_every_module_that_a_page_runs_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for module in re.findall(r"python -m (common\.[\w.]+\w)", text):
        assert importlib.util.find_spec(module), module
