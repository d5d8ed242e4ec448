"""What the READMEs say exists, and the two languages say the same."""

import re
import shlex

import pytest
from conftest import ROOT, load_recipe

READMES = ["README.md", "README.zh-CN.md"]
FOLDERS = "recipes|accelerate_configs|common|data|tests|docs|notebooks|benchmarks"
PATH = re.compile(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*|(?:requirements\.txt|Makefile|LICENSE|CONTRIBUTING\.md)")
MADE_BY_USERS = {"recipes/mine.py", "data/cache", "data/wikipedia-zh-cn-20240820.json", "data/openwebtext"}


def code_blocks(name: str) -> list[str]:
    return re.findall(r"```\w*\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("name", READMES)
def test_it_is_short_and_every_path_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160
    for path in {match.rstrip("./") for match in PATH.findall(text)} - MADE_BY_USERS:
        assert (ROOT / path).exists(), path
    for recipe in (ROOT / "recipes").glob("*.py"):
        assert f"recipes/{recipe.name}" in text, f"{recipe.name} is not on the front page"
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in text, f"{page.name} is not on the front page"


class Understood(Exception):
    """The recipe has parsed its flags and goes on to the next step."""


def stop(*_, **__):
    raise Understood


@pytest.mark.parametrize("name", READMES)
def test_every_launch_line_is_understood_by_the_recipe(name, monkeypatch):
    lines = [line for block in code_blocks(name) for line in block.replace("\\\n", " ").splitlines()]
    launches = [line for line in lines if "accelerate launch" in line]
    assert launches
    for line in launches:
        words = shlex.split(line.split("accelerate launch")[1], comments=True)
        recipe = next(word for word in words if word.startswith("recipes/"))
        # recipes/mine.py is the reader's copy, made by the line above it.
        module = load_recipe(recipe.removeprefix("recipes/").removesuffix(".py").replace("mine", "wiki_zh_scratch"))
        monkeypatch.setattr(module, "preflight", stop)
        if hasattr(module, "pipelines"):  # it wants the processes that the launcher would start
            monkeypatch.setattr(module.pipelines, "divide_launch", lambda launch, *_: launch)
        if hasattr(module, "check_method"):  # it wants a GPU for some lines
            monkeypatch.setattr(module, "check_method", lambda *_: None)
        with pytest.raises(Understood):
            module.main(words[words.index(recipe) + 1 :])


def test_the_two_languages_have_the_same_commands_and_figures():
    """Code blocks equal but for comments and expected text; the same numbers in the tables."""
    commands = [
        [line.split("#")[0].strip() for block in code_blocks(name) for line in block.splitlines() if line[:1].isascii()]
        for name in READMES
    ]
    runs = [
        [line for line in lines if re.match(r"(make|accelerate|python|pip|cp|export|git) ", line)] for lines in commands
    ]
    assert runs[0] == runs[1] and runs[0]
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in READMES)
    tables = [re.findall(r"^\|.*\|$", text, flags=re.MULTILINE) for text in (english, chinese)]
    numbers = [[re.findall(r"\d(?:[\d,.]*\d)?", row) for row in table] for table in tables]
    assert numbers[0] == numbers[1]
    assert english.count("\n## ") == chinese.count("\n## ")
