"""Settings of the learning-rate schedule, in shares and in steps, against transformers' own schedules."""

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from common.console import InputError
from common.train.schedule import check_schedule, schedule_settings


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


def test_the_end_of_a_schedule_must_be_below_the_learning_rate():
    check_schedule(training_of("polynomial", {"lr_end": 0.001}, learning_rate=4e-3))
    with pytest.raises(InputError, match="polynomial.*must be smaller"):
        check_schedule(training_of("polynomial", {"lr_end": 5e-4}, learning_rate=1e-4))
