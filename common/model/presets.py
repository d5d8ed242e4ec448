"""The size of a model from scratch: the shape of a published one by name, or one with a number of parameters.

--model qwen2.5-0.5b             a name of PRESETS, or a folder or id whose config.json gives the shape
--target_parameters 120M         hidden size and layers are chosen, of the family of the recipe's MODEL
--target_parameters auto         the same by the text and this machine: fit_to_text.py
"""

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from common.arguments import SharedArguments, count_of
from common.console import InputError, in_one_line, say
from common.hub import fetch_model, full_name
from common.model.from_config import planned_model
from common.model.pretrained import find_model, model_without_memory
from common.model.refused_config import unknown_name
from common.model_folder import custom_code, object_in

# Shapes as their config.json files have them, and one of our own; weights and vocabulary are not theirs here.
PRESETS = {
    # SwanLab's wiki tutorial: 123M parameters with Qwen2's tokenizer, 78M of them in the embedding
    "swanlab-wiki": dict(
        model_type="qwen2", hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "smollm2-135m": dict(
        model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, rope_theta=100_000.0,
    ),
    "qwen2.5-0.5b": dict(
        model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1_000_000.0,
    ),
    "qwen2.5-1.5b": dict(
        model_type="qwen2", hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1_000_000.0,
    ),
    "qwen2.5-3b": dict(
        model_type="qwen2", hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1_000_000.0,
    ),
    "qwen2.5-7b": dict(
        model_type="qwen2", hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False, rope_theta=1_000_000.0,
    ),
    "llama-2-7b": dict(
        model_type="llama", hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, tie_word_embeddings=False,
    ),
    "llama-2-13b": dict(
        model_type="llama", hidden_size=5120, intermediate_size=13_824, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=40, tie_word_embeddings=False,
    ),
    # A mixture of experts of our own, in the shape of Qwen3-30B-A3B: with 32,768 tokens 158M parameters, of which a
    # token meets 59M, 17M of them in the embedding. 0.01: https://arxiv.org/abs/2101.03961, section 2.2
    "qwen3-moe-a60m": dict(
        model_type="qwen3_moe", hidden_size=512, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=896, norm_topk_prob=True, tie_word_embeddings=True,
        output_router_logits=True, router_aux_loss_coef=0.01,
    ),
    # https://arxiv.org/abs/2005.14165 table 2.1, with dense attention in every layer; its weights were never published
    "gpt3-6.7b": dict(model_type="gpt2", n_embd=4096, n_layer=32, n_head=32),
}  # fmt: skip

HEAD_SIZE = 64
AUTO = "auto"
# For what is planned before a tokenizer is loaded.
QWEN2_TOKENIZER, QWEN2_VOCABULARY = "Qwen/Qwen2-0.5B", 151_646
PUBLISHED = {  # id -> preset, rows of the embedding; from small to large
    "Qwen/Qwen2.5-0.5B": ("qwen2.5-0.5b", 151_936),
    "Qwen/Qwen2.5-1.5B": ("qwen2.5-1.5b", 151_936),
    "Qwen/Qwen2.5-3B": ("qwen2.5-3b", 151_936),
    "Qwen/Qwen2.5-7B": ("qwen2.5-7b", 152_064),
}
# Layers and hidden size of GPT-3's models up to 6.7B: the width for each layer grows from 43 to 128, and between these
# the loss hardly depends on it. Sources: https://arxiv.org/abs/2005.14165 table 2.1, https://arxiv.org/abs/2001.08361
NARROWEST, WIDEST, USUAL = 40, 130, 64


@dataclass(frozen=True)
class ModelSize:
    """The size of a model from scratch, as far as the flags say it. Its vocabulary comes with the tokenizer.

    Attributes:
        default: the recipe's own shape.
        model: of --model: a name of PRESETS, or a folder or id whose config.json gives the shape.
        target_parameters: of --target_parameters, such as "120M"; with "auto", ``default`` is what was fitted.
        shared: says which tokenizer it will be.
        found: the shapes that were asked for, by vocabulary, so that each is printed once.
    """

    default: dict
    model: str | None
    target_parameters: str | None
    shared: SharedArguments
    found: dict[int | None, dict] = field(default_factory=dict, compare=False, repr=False)

    def shape(self, vocabulary_size: int) -> dict:
        """Return the shape of the model to build: ``default`` unless a flag gives another one.

        Raises:
            InputError: both flags are given, or one that is not understood.
        """
        decides = vocabulary_size if self.model is None else None
        if decides not in self.found:
            self.found[decides] = self._shape(vocabulary_size)
        return self.found[decides]

    def _shape(self, vocabulary_size: int) -> dict:
        if self.model is not None and self.target_parameters is not None:
            raise InputError("--model and --target_parameters both give the size. Leave one out.")
        if self.model is not None:
            return shape_named(self.model)
        if self.target_parameters is not None and not is_auto(self.target_parameters):
            return shape_with(parameter_count(self.target_parameters), self.default, vocabulary_size)
        return self.default

    @property
    def vocabulary(self) -> int | None:
        """The tokens of the tokenizer, None if only loading it would tell."""
        return {QWEN2_TOKENIZER: QWEN2_VOCABULARY, "train": self.shared.vocabulary_size}.get(self.shared.tokenizer)

    @property
    def guessed(self) -> bool:
        """Whether the vocabulary, and so the number of parameters, is a guess."""
        return self.vocabulary is None

    def planned(self, context_length: int, for_plan: bool = False) -> PreTrainedModel | None:
        """Return a model of this size without memory, on torch's meta device.

        If the vocabulary is a guess and the flags ask for a number of parameters, the shape is not known: None, or
        ``for_plan`` the shape with the guess. A note says so.
        """
        if self.guessed and for_plan:
            tokenizer = f"{self.shared.tokenizer} is not loaded for a plan"
            say(f"note: planned for a vocabulary of {QWEN2_VOCABULARY:,}; {tokenizer}")
        elif self.guessed and self.target_parameters is not None:
            return None
        vocabulary = QWEN2_VOCABULARY if self.guessed else self.vocabulary
        return planned_model(self.shape(vocabulary), vocabulary, context_length)


@dataclass(frozen=True)
class PretrainedSize:
    """The size of published weights, as far as it is known without fetching anything. ``model``: of --model."""

    model: str
    guessed = False

    def shorten_rows(self, shared: SharedArguments) -> None:
        """Make the rows as long as the model in a folder knows positions, if the recipe's are longer; print it.

        A row length of the command line stays as it is.
        """
        if "context_length" in shared.given or not Path(self.model, "config.json").is_file():
            return
        try:
            config = AutoConfig.from_pretrained(self.model, trust_remote_code=False)
        except Exception:  # whatever is wrong with it, loading it will say
            return
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and positions < shared.context_length:
            say(
                f"note: rows of {positions:,} tokens, not {shared.context_length:,}: {self.model} has no more positions"
            )
            shared.context_length = positions

    def planned(self, context_length: int, for_plan: bool = False) -> PreTrainedModel | None:
        """Return the model without memory, on torch's meta device; None if its config is still on a hub.

        ``for_plan``: the config is fetched then.
        """
        if Path(self.model).exists():
            return model_without_memory(find_model(self.model, weights=False))
        if full_name(self.model) in PUBLISHED:
            preset, rows = PUBLISHED[full_name(self.model)]
            return planned_model(PRESETS[preset], rows, context_length)
        if for_plan:
            return model_without_memory(find_model(self.model, weights=False))
        return None


def shape_named(model: str) -> dict:
    """Return the shape of a preset, or of the config.json in a folder or on a hub.

    Raises:
        InputError: it is none of these, or transformers cannot read the config.
    """
    if model.lower() in PRESETS:
        return PRESETS[model.lower()]
    if not model or ("/" not in model and not Path(model).is_dir()):
        raise InputError(f"--model {model}: not a folder, not an id like owner/name, and not of {', '.join(PRESETS)}.")
    folder = fetch_model(model, weights=False)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = config.get_text_config()
    except Exception as error:  # a config may be wrong in any way
        code = custom_code(folder)
        if code is not None:
            raise InputError(f"--model {model}: {code}") from None
        unknown = unknown_name(error, object_in(Path(folder) / "config.json"))
        reason = f"{folder} has no config that transformers can read ({in_one_line(error)})."
        raise InputError(f"--model {model}: {unknown or reason}") from None
    if text is not config:
        say(f"note: of {model} ({config.model_type}), its text model alone is built and trained: {text.model_type}")
    return shape_of_config(text)


def parameter_count(text: str) -> int:
    """Return the number that ``text`` means, as ``count_of`` does."""
    return count_of("--target_parameters", text, also=f" or {AUTO}")


def is_auto(target_parameters: str | None) -> bool:
    """Whether ``--target_parameters`` is "auto", in upper or lower case."""
    return target_parameters is not None and target_parameters.strip().lower() == AUTO


def shape_with(target: int, family: dict, vocabulary_rows: int) -> dict:
    """Return ``shape_near``, and say what it is.

    Raises:
        InputError: there is none; the limits are named.
    """
    shape, count = shape_near(target, family, vocabulary_rows)
    embedding = vocabulary_rows * shape["hidden_size"] * (1 if shape.get("tie_word_embeddings") else 2)
    say(
        f"size: {count:,} parameters = {embedding:,} embedding + {count - embedding:,} others: "
        "{num_hidden_layers} layers of {hidden_size}, {num_attention_heads} heads of 64, {num_key_value_heads} "
        "key-value heads, MLP of {intermediate_size}".format(**shape)
    )
    return shape


def shape_near(target: int, family: dict, vocabulary_rows: int) -> tuple[dict, int]:
    """Return a shape like ``family`` with about ``target`` parameters, embedding included, and their number.

    Heads are HEAD_SIZE wide, two query heads share a key-value head, the MLP is as much wider than
    the hidden size as in ``family``. Among all depths and widths within 5% of ``target`` and between NARROWEST and
    WIDEST, the one closest to USUAL is taken.

    Raises:
        InputError: there is none; the limits are named.
    """
    best, nearest = None, None
    described = json.dumps(family)
    for heads in (1, *range(2, 129, 2)):  # widths of whole multiples of 128, which matrix products like
        hidden = heads * HEAD_SIZE
        one, two = (parameters_of_width(described, heads, layers, vocabulary_rows) for layers in (1, 2))
        if one > 1.05 * target and nearest is not None:
            break
        for layers in range(max(1, round(hidden / WIDEST)), round(hidden / NARROWEST) + 1):
            count = one + (layers - 1) * (two - one)
            error, unusual = abs(count / target - 1), abs(hidden / layers / USUAL - 1)
            if nearest is None or error < nearest[0]:
                nearest = (error, count)
            if error <= 0.05 and (best is None or unusual < best[0]):
                best = (unusual, count, shape_of_width(family, heads, layers))
    if best is None:
        raise InputError(
            f"--target_parameters {target:,}: with a vocabulary of {vocabulary_rows:,} nothing sensible is within 5%; "
            f"the nearest has {nearest[1]:,}. Ask for that, or take a smaller vocabulary (--tokenizer train)."
        )
    _, count, shape = best
    return shape, count


def shape_of_width(family: dict, heads: int, layers: int) -> dict:
    """Return a shape like ``family`` with so many heads of HEAD_SIZE, and an MLP as much wider as in ``family``.

    Two query heads share a key-value head; all do if their number is odd.

    Raises:
        InputError: ``family`` does not name its sizes.
    """
    if not {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"} <= family.keys():
        raise InputError(f"--target_parameters: MODEL {family} does not name its sizes as Llama, Qwen and Mistral do.")
    hidden = heads * HEAD_SIZE
    wider = family["intermediate_size"] / family["hidden_size"]
    return family | dict(
        hidden_size=hidden,
        intermediate_size=round(hidden * wider / 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=1 if heads % 2 else heads // 2,
    )


@lru_cache(maxsize=512)  # a time budget asks for the same widths again and again
def parameters_of_width(family: str, heads: int, layers: int, vocabulary_rows: int) -> int:
    """Return the number of parameters of ``shape_of_width``, of a family as JSON."""
    return parameters_of(shape_of_width(json.loads(family), heads, layers), vocabulary_rows)


def parameters_of(shape: dict, vocabulary_rows: int) -> int:
    """Return the number of parameters of a shape, embedding included."""
    return planned_model(shape, vocabulary_rows, context_length=512).num_parameters()


def shape_of_config(config: PretrainedConfig) -> dict:
    """Return what a model's config says of its shape, without what belongs to its tokenizer or to its context."""
    own = {"vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype"}
    described = {name: value for name, value in config.to_diff_dict().items() if name not in own}
    described = {name: value for name, value in described.items() if not name.startswith(("_", "transformers_"))}
    return described | {"model_type": config.model_type}
