"""Settings of the learning-rate schedule, in shares and in steps, against transformers' own schedules."""

import copy

import bitsandbytes
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainingArguments, get_scheduler

from common.console import InputError
from common.train.low_memory_adamw import LowMemoryAdamW
from common.train.muon import MuonWithAdamW
from common.train.schedule import (
    check_schedule,
    keep_settings,
    leave_out_settings_of_another,
    make_schedule,
    schedule_settings,
    settings_of,
)


def training_of(kind: str, settings: dict, **more) -> TrainingArguments:
    return TrainingArguments(
        output_dir="unused", use_cpu=True, lr_scheduler_type=kind, lr_scheduler_kwargs=settings, **more
    )


def rates(training: TrainingArguments, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    settings, warmup = schedule_settings(training, steps), training.get_warmup_steps(steps)
    schedule = get_scheduler(training.lr_scheduler_type, optimizer, warmup, steps, settings)
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_a_share_of_the_run_decays_in_runs_of_every_length():
    training = training_of("warmup_stable_decay", {"num_decay_steps": 0.3}, warmup_steps=0.1)
    for steps in (10, 200):
        found = rates(training, steps)
        rising, falling = steps // 10, steps * 3 // 10
        assert found[0] == 0 and found[rising : steps - falling] == [1.0] * (steps - rising - falling)
        assert found[-1] < 0.3 and found[-falling:] == sorted(found[-falling:], reverse=True)
    assert training.lr_scheduler_kwargs == {"num_decay_steps": 0.3}, "for a run of another length, it stays a share"


def test_steps_stay_steps_and_other_schedules_do_not_change():
    assert schedule_settings(training_of("warmup_stable_decay", {"num_decay_steps": 7}), 50) == {"num_decay_steps": 7}
    assert schedule_settings(training_of("cosine_with_min_lr", {"min_lr_rate": 0.1}), 50) == {"min_lr_rate": 0.1}
    assert schedule_settings(training_of("linear", None), 50) == {}


@pytest.mark.parametrize(
    ("kind", "settings", "warmup", "message"),
    [
        ("polynomial", {"lr_end": 0.1}, 20, "--warmup_steps 20: none of the 20 steps"),
        ("warmup_stable_decay", {"num_decay_steps": 15}, 6, "--warmup_steps 6 and num_decay_steps 15 .* the 20 steps"),
    ],
)
def test_settings_that_do_not_fit_the_run_are_refused(kind, settings, warmup, message):
    with pytest.raises(InputError, match=message):
        schedule_settings(training_of(kind, settings, warmup_steps=warmup), 20)


def test_a_warmup_of_most_of_the_run_is_a_warning(capsys):
    for warmup, steps, warned in ((6, 10, True), (10, 10, True), (5, 10, False), (1, 1, False), (0.03, 10, False)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        make_schedule(training_of("cosine", None, warmup_steps=warmup), optimizer, steps)
        said = capsys.readouterr().out
        assert (f"warning: --warmup_steps {warmup}: the learning rate rises in more than half" in said) == warned
        assert bool(said) == warned


def test_a_schedule_of_the_command_line_leaves_out_what_the_recipe_has_for_its_own(capsys):
    training = training_of("cosine", {"num_decay_steps": 0.3, "num_cycles": 0.25})
    leave_out_settings_of_another(training)
    assert training.lr_scheduler_kwargs == {"num_cycles": 0.25}
    note = "note: --lr_scheduler_type cosine: without {'num_decay_steps': 0.3}, which this recipe has for its own"
    assert capsys.readouterr().out == f"{note} schedule\n"
    fitting = {"warmup_stable_decay": {"num_decay_steps": 0.3}, "linear": {}, "reduce_lr_on_plateau": {"patience": 1}}
    for kind, settings in fitting.items():
        training = training_of(kind, settings, eval_strategy="steps", eval_steps=1)
        leave_out_settings_of_another(training)
        assert training.lr_scheduler_kwargs == settings
    assert capsys.readouterr().out == ""


def test_the_end_of_a_schedule_must_be_below_the_learning_rate():
    check_schedule(training_of("polynomial", {"lr_end": 0.001}, learning_rate=4e-3))
    with pytest.raises(InputError, match="polynomial.*must be smaller"):
        check_schedule(training_of("polynomial", {"lr_end": 5e-4}, learning_rate=1e-4))


def small_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_key_value_heads=1, **shape))


def optimizer_of(kind: str, model, rate: float, decay: float, beta: float):
    adamw = dict(lr=rate, betas=(0.9, beta), eps=1e-8)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    if kind == "muon":
        names = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
        return MuonWithAdamW(model, names, weight_decay=decay, **adamw)
    if kind == "low memory":
        return LowMemoryAdamW(groups, state_bits=32, **adamw)
    if kind == "8 bit":
        return bitsandbytes.optim.AdamW8bit(groups, **adamw)
    return torch.optim.AdamW(groups, **adamw)


@pytest.mark.parametrize("kind", ["adamw", "muon", "low memory", "8 bit"])
def test_a_loaded_checkpoint_keeps_its_states_and_takes_the_rate_decay_and_betas_of_now(kind):
    """The truth: an optimizer that had the new settings from the start, with the states of the old one."""

    def prepared(rate: float, decay: float, beta: float):
        model = small_model()
        optimizer = optimizer_of(kind, model, rate, decay, beta)
        schedule = get_scheduler("linear", optimizer, 0, 10)
        return model, optimizer, schedule

    def step(model, optimizer, schedule):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()
        schedule.step()

    before, now = (1e-2, 0.1, 0.95), (2e-3, 0.3, 0.9)
    first = prepared(*before)
    for _ in range(3):
        step(*first)
    saved = copy.deepcopy([part.state_dict() for part in first])

    for settings, share in ((before, 0.7), (now, 0.7)):  # linear, 3 of 10 steps made
        loaded = prepared(*settings)
        of_flags = settings_of(loaded[1])
        for part, state in zip(loaded, copy.deepcopy(saved), strict=True):
            part.load_state_dict(state)
        keep_settings(loaded[1], loaded[2], of_flags)
        assert loaded[2].get_last_lr()[0] == pytest.approx(share * settings[0])
        decays = {group["weight_decay"] for group in loaded[1].param_groups}
        assert decays == {settings[1], 0.0}
        assert all(group["betas"] == (0.9, settings[2]) for group in loaded[1].param_groups)
        assert [group["lr"] for group in loaded[1].param_groups] == loaded[2].get_last_lr()

        truth = prepared(*settings)
        truth[0].load_state_dict(copy.deepcopy(saved[0]))
        state = copy.deepcopy(saved[1])
        for group, own in zip(state["param_groups"], truth[1].param_groups, strict=True):
            group.update({name: own[name] for name in ("weight_decay", "betas")} | {"lr": settings[0] * (1 - 3 / 10)})
        truth[1].load_state_dict(state)
        step(*loaded)
        step(*truth)
        for one, other in zip(loaded[0].parameters(), truth[0].parameters(), strict=True):
            assert torch.allclose(one, other, atol=1e-7)
