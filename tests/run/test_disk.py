"""Whether checkpoints fit the disk."""

import shutil
from types import SimpleNamespace

import pytest

from common.console import InputError
from common.distributed.strategy import FSDP2, SINGLE, ZERO2
from common.run.disk import check_disk_space
from common.run.folder import Run


@pytest.mark.parametrize(
    ("strategy", "bf16", "bytes_a_parameter"), [(FSDP2, True, 16), (ZERO2, True, 16), (ZERO2, False, 20)]
)
def test_what_fsdp2_and_deepspeed_write_twice_is_counted(tmp_path, monkeypatch, strategy, bf16, bytes_a_parameter):
    training = SimpleNamespace(bf16=bf16, fp16=False, save_strategy="steps", save_total_limit=1)
    free = 1000 * (2 * bytes_a_parameter + 4)  # two checkpoints and the model
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    check_disk_space(tmp_path, 1000, strategy, training)
    with pytest.raises(InputError, match="needed for 2 checkpoints"):
        check_disk_space(tmp_path, 1001, strategy, training)


@pytest.mark.parametrize(("limit", "strategy", "checkpoints"), [(2, "steps", 3), (None, "steps", 10), (None, "no", 0)])
def test_checkpoints_that_will_not_fit_are_refused(tmp_path, monkeypatch, limit, strategy, checkpoints):
    training = SimpleNamespace(save_strategy=strategy, save_total_limit=limit, save_steps=10, max_steps=100)
    needed = 1000 * (12 * checkpoints + 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    check_disk_space(tmp_path, 1000, SINGLE, training)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(InputError, match=f"needed for {checkpoints} checkpoints"):
        check_disk_space(tmp_path, 1000, SINGLE, training)


def test_room_for_merged_weights_is_asked_for_before_the_run(tmp_path, monkeypatch):
    """Of 1,000 trained parameters: no checkpoint, 4 bytes each at the end, and 2 GiB of the base."""
    training, run = SimpleNamespace(save_strategy="no", save_total_limit=None, max_steps=10), Run(str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4000 + 2 * 2**30))
    run.check_disk_space(1000, SINGLE, training, merged_bytes=2 * 2**30)
    with pytest.raises(InputError, match="and the model, merged 2.00. Make room"):
        run.check_disk_space(1000, SINGLE, training, merged_bytes=2 * 2**30 + 1)
