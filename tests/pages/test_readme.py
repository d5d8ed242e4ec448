"""What the READMEs say exists, and the two languages of a page say the same."""

import re
import shlex

import pytest
from conftest import ROOT, load_recipe

READMES = ["README.md", "README.zh-CN.md"]
CHINESE = [
    "README.zh-CN.md",
    "data/README.zh-CN.md",
    *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.zh-CN.md")),
]
FOLDERS = "recipes|accelerate_configs|common|data|tests|docs|notebooks|benchmarks"
PATH = re.compile(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*|(?:requirements\.txt|Makefile|LICENSE|CONTRIBUTING\.md)")
MADE_BY_USERS = {"recipes/mine.py", "data/cache", "data/wikipedia-zh-cn-20240820.json", "data/openwebtext"}


def english_of(page: str) -> str:
    return page.replace(".zh-CN.md", ".md")


def chinese_of(page: str) -> str:
    return page.removesuffix(".md") + ".zh-CN.md"


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
    for page in {english_of(f"docs/{path.name}") for path in ROOT.glob("docs/*.md")}:
        linked = chinese_of(page) if name == "README.zh-CN.md" and chinese_of(page) in CHINESE else page
        assert f"]({linked})" in text, f"{linked} is not on the front page"


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
        if hasattr(module, "fit_to_text"):  # it wants the reader's files
            monkeypatch.setattr(module, "fit_to_text", lambda family, *_: family)
        if hasattr(module, "pipelines"):  # it wants the processes that the launcher would start
            monkeypatch.setattr(module.pipelines, "divide_launch", lambda launch, *_: launch)
        if hasattr(module, "check_method"):  # it wants a GPU for some lines
            monkeypatch.setattr(module, "check_method", lambda *_: None)
        with pytest.raises(Understood):
            module.main(words[words.index(recipe) + 1 :])


FIGURE = re.compile(r"\d(?:[\d,.]*\d)?")


def sections(name: str) -> list[str]:
    """Return the text of each section with its heading, without code blocks; the first part is before any heading."""
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.split(r"^(?=#+ )", text, flags=re.MULTILINE)


def without_comments(block: str) -> list[str]:
    return [line.split("# ")[0].rstrip() for line in block.splitlines()]


@pytest.mark.parametrize("chinese", CHINESE)
def test_the_two_languages_have_the_same_commands_and_figures(chinese):
    """Code blocks equal but for comments; in each section the same names in backticks, and no figure left out."""
    english = english_of(chinese)
    blocks = [[without_comments(block) for block in code_blocks(name)] for name in (english, chinese)]
    assert blocks[0] == blocks[1]
    levels = [[section.split(" ")[0] for section in sections(name)] for name in (english, chinese)]
    assert levels[0] == levels[1]
    for here, there in zip(sections(english), sections(chinese), strict=True):
        tables = [re.findall(r"^\|.*\|$", text, flags=re.MULTILINE) for text in (here, there)]
        numbers = [[FIGURE.findall(row) for row in table] for table in tables]
        assert numbers[0] == numbers[1]
        missing = set(FIGURE.findall(here)) - set(FIGURE.findall(there))
        assert not missing, f"{missing} are not in the Chinese section {there.splitlines()[0]}"
        names = [set(re.findall(r"`([^`]+)`", text)) for text in (here, there)]
        assert names[0] == names[1], there.splitlines()[0]


@pytest.mark.parametrize("chinese", CHINESE)
def test_the_two_languages_link_to_each_other(chinese):
    """Each page links to its other language; a Chinese page links to Chinese pages where they exist."""
    english = english_of(chinese)
    links = {
        name: re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8"))
        for name in (english, chinese)
    }
    for name, targets in links.items():
        for target in targets:
            assert ((ROOT / name).parent / target).exists(), target
    assert links[english][0] == (ROOT / chinese).name and links[chinese][0] == (ROOT / english).name
    for target in links[chinese][1:]:
        assert not ((ROOT / chinese).parent / chinese_of(target)).exists(), f"{target} has a Chinese page"
