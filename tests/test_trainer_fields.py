"""Every field of TrainingArguments is decided on: refused, without influence on what is trained, or deciding."""

from dataclasses import fields

import pytest
from transformers import TrainingArguments

from common.console import InputError
from common.trainer_fields import CHOICES, NOT_DECIDING, REFUSED, check_fields, deciding_fields, default_of

FIELDS = {each.name: each for each in fields(TrainingArguments)}
DECIDING = {
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "optim_args", "optim_target_modules", "seed", "data_seed",
    "bf16", "fp16", "tf32", "neftune_noise_alpha",
}  # fmt: skip


def test_a_field_that_a_new_transformers_brings_is_decided_on():
    """Does this fail? Decide: REFUSED or NOT_DECIDING in common/trainer_fields.py, or DECIDING here."""
    assert set(deciding_fields()) == DECIDING & FIELDS.keys()
    assert not FIELDS.keys() - DECIDING - REFUSED.keys() - NOT_DECIDING.keys()


def test_every_field_is_in_one_place():
    assert not REFUSED.keys() & NOT_DECIDING.keys() and not DECIDING & (REFUSED.keys() | NOT_DECIDING.keys())
    assert CHOICES.keys() <= NOT_DECIDING.keys()


def raw_defaults() -> dict:
    return {name: default_of(field) for name, field in FIELDS.items()}


def test_the_defaults_of_transformers_are_refused_nowhere():
    check_fields(raw_defaults())


@pytest.mark.parametrize("name", sorted(REFUSED.keys() & FIELDS.keys()))
def test_what_would_do_another_thing_is_refused_with_the_reason(name):
    default = default_of(FIELDS[name])
    other = not default if isinstance(default, bool) else "other"
    with pytest.raises(InputError, match=f"--{name}: not with these recipes, .*Leave it out") as stopped:
        check_fields(raw_defaults() | {name: other})
    assert "other" not in str(stopped.value).replace("each other", ""), "a token is not printed"


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in CHOICES for value in ("epoch", "best", "no")])
def test_only_the_choices_that_do_what_they_say_are_taken(name, value):
    if value in CHOICES[name][0]:
        return check_fields(raw_defaults() | {name: value})
    with pytest.raises(InputError, match=f"--{name} {value}: .*What works: steps"):
        check_fields(raw_defaults() | {name: value})


def test_loader_settings_without_workers_are_refused():
    with pytest.raises(InputError, match="there are no workers. Add --dataloader_num_workers 2"):
        check_fields(raw_defaults() | {"dataloader_persistent_workers": True})
    check_fields(raw_defaults() | {"dataloader_persistent_workers": True, "dataloader_num_workers": 2})


def test_checkpoints_are_not_pushed():
    with pytest.raises(InputError, match="--hub_strategy every_save: .*Add --hub_strategy end"):
        check_fields(raw_defaults() | {"push_to_hub": True})
    check_fields(raw_defaults() | {"push_to_hub": True, "hub_strategy": "end"})
