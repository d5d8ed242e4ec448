"""docs/families.md and its Chinese page are what docs/families.py writes; the models are the published ones."""

import importlib.util
import re
import sys

import pytest
from conftest import ROOT
from test_families import FAMILIES

from common.model.from_config import planned_model

spec = importlib.util.spec_from_file_location("families", ROOT / "docs" / "families.py")
families = importlib.util.module_from_spec(spec)
sys.modules["families"] = families  # its dataclass looks itself up
spec.loader.exec_module(families)
PAGE = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
SMALL = ("Llama-3.2-1B", "bloom-560m", "Qwen2.5-0.5B", "gemma-3-1b-pt")  # planned in a second


def test_every_family_of_the_list_is_on_the_page():
    """PaddleNLP's list and today's families: trained, or with the reason why not."""
    wanted = "LLaMA 1, Llama 2, Llama 3, Llama 3.1, Llama 3.2, Llama 3.3, Baichuan, Baichuan 2, Bloom, ChatGLM 2, "
    wanted += "ChatGLM 3, DeepSeek V2, DeepSeek V3, DeepSeek R1, DeepSeek R1 distilled, Gemma, Mistral, Mixtral, OPT, "
    wanted += "Qwen 1, Qwen1.5, Qwen2, Qwen2.5, Qwen2.5-Math, Qwen2.5-Coder, QwQ, GPT-3, Qwen3, Qwen3-MoE, Gemma 3, "
    wanted += "GLM-4, OLMo 2, SmolLM3"
    listed = re.findall(r"^\| ([^|]+) \| [^|]+ \| `\w+` \|", PAGE, flags=re.MULTILINE)
    assert set(listed) == set(wanted.split(", "))
    assert listed == [published.family for published in families.MODELS]
    reasons = PAGE.split("## Not trained here")[1]
    for family in ("Baichuan 13B", "Baichuan 2 13B", "ChatGLM 1", "Yuan 2"):
        assert family in reasons


def test_a_small_model_of_every_architecture_on_the_page_is_trained():
    assert {published.shape["model_type"] for published in families.MODELS} <= {
        shape["model_type"] for shape in FAMILIES.values()
    }


def test_rows_are_what_the_script_plans():
    found = {published.model: published for published in families.MODELS}
    small = [model for model in found if model.endswith(SMALL)]
    assert len(small) == len(SMALL)
    for model in small:
        assert f"{families.planned_row(found[model])} |" in PAGE.splitlines()


def test_the_pages_are_what_the_script_writes():
    """With the rows of the table as they are on the page; the tests around this one plan them again."""
    rows = re.findall(r"^(\| [^|]+ \| [^|]+ \| `\w+` \|(?:[^|]+\|){4} `[^`]+`)", PAGE, flags=re.MULTILINE)
    for name, text in families.pages(rows).items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, name


@pytest.mark.heavy
@pytest.mark.parametrize("published", families.MODELS, ids=lambda published: published.model)
def test_every_row_is_what_the_script_plans(published):
    assert families.planned_row(published) in PAGE


@pytest.mark.heavy
@pytest.mark.parametrize("published", families.MODELS, ids=lambda published: published.model)
def test_the_shapes_have_the_published_numbers_of_parameters(published):
    """DeepSeek V3 publishes 256 biases of 58 routers as parameters, which transformers has as buffers."""
    shape = published.shape
    count = planned_model(shape, shape.get("vocab_size", families.GPT2_VOCABULARY), 2048).num_parameters()
    buffers = 58 * 256 if shape["model_type"] == "deepseek_v3" else 0
    assert published.parameters in (0, count + buffers)
