"""What a launch decided, and in which precision sums are made under it."""

from types import SimpleNamespace

import pytest
import torch

from common.strategy import reduce_in_fp32


@pytest.mark.parametrize(("precision", "computed"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("no", None)])
def test_fsdp2_adds_up_in_fp32_and_returns_the_loss_as_it_is(precision, computed):
    plugin = SimpleNamespace(mixed_precision_policy=None)
    reduce_in_fp32(SimpleNamespace(mixed_precision=precision, state=SimpleNamespace(fsdp_plugin=plugin)))
    policy = plugin.mixed_precision_policy
    if computed is None:
        assert policy is None
    else:
        assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (computed, torch.float32, None)
    reduce_in_fp32(SimpleNamespace(mixed_precision=precision, state=SimpleNamespace()))  # another strategy
