"""Why transformers refuses a config, in one line: above all a name in it that transformers does not know."""

import difflib
from collections.abc import Collection

import transformers
from transformers import CONFIG_MAPPING
from transformers.activations import ACT2FN
from transformers.configuration_utils import ALLOWED_LAYER_TYPES
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)
MOST_SHOWN = 40  # of the known names


def unknown_name(error: Exception, config: dict) -> str | None:
    """Return which setting of ``config`` has a name that transformers does not know, and those that it knows.

    Args:
        error: that transformers raised. Often it is nothing but ``KeyError: 'name'``.
        config: a config.json, or the arguments of a config class.

    Returns:
        None if ``error`` is about something else.
    """
    for setting, value, known in names_in(config):
        names = list(known)
        if value in names or not (str(value) in str(error) or setting in str(error)):
            continue
        shown = ", ".join(names)
        if len(names) > MOST_SHOWN:
            near = difflib.get_close_matches(str(value), names, n=5)
            shown = f"{', '.join(near)} and others" if near else f"{len(names)} others"
        return (
            f"{setting} {value}: transformers {transformers.__version__} does not know it. It knows {shown}. Write one "
            "of them into the config."
        )
    return None


def names_in(config: dict) -> list[tuple[str, object, Collection[str]]]:
    """Return the settings of ``config`` that must be known names: each with its value and the names that are known."""
    found = [("model_type", config["model_type"], CONFIG_MAPPING)] if "model_type" in config else []
    found += [(key, value, ACT2FN) for key, value in config.items() if "act" in key and isinstance(value, str)]
    layers = config.get("layer_types")
    found += [("layer_types", each, ALLOWED_LAYER_TYPES) for each in (layers if isinstance(layers, list) else [])]
    for key in ("rope_scaling", "rope_parameters"):
        ropes = config.get(key)
        if not isinstance(ropes, dict):
            continue
        for rope in (ropes, *(inner for inner in ropes.values() if isinstance(inner, dict))):  # one for each layer type
            found += [(f"{key}.{name}", rope[name], ROPE_TYPES) for name in ("rope_type", "type") if name in rope][:1]
    text = config.get("text_config")
    return found + (names_in(text) if isinstance(text, dict) else [])
