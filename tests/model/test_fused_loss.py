"""The fused loss against materialised logits in float64 and against transformers' own losses, on every wrapper.

The kernel's tests need a GPU, or Triton's interpreter: TRITON_INTERPRET=1 pytest tests/model/test_fused_loss.py
"""

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from two_processes import in_two_processes

from common.console import InputError
from common.model.fused_loss import DeferredLogits, use_fused_loss
from common.model.linear_cross_entropy import (
    cross_entropy_in_place,
    cross_entropy_plain,
    fused_linear_cross_entropy,
    rows_of_a_chunk,
)

VOCABULARY = 131
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=None,
)
FAMILIES = {
    "qwen2, tied": dict(model_type="qwen2", tie_word_embeddings=True),
    "llama, untied": dict(model_type="llama", tie_word_embeddings=False),
    "gpt2": dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "gemma2, soft cap": dict(model_type="gemma2", head_dim=8, final_logit_softcapping=0.5, query_pre_attn_scalar=8),
    "cohere, scaled": dict(model_type="cohere", logit_scale=0.25),
    "granite, scaled": dict(model_type="granite", logits_scaling=4.0),
    "phi, bias": dict(model_type="phi", resid_pdrop=0.0, embd_pdrop=0.0),
    "mixtral": dict(model_type="mixtral", num_local_experts=4),  # with a router loss: test_router_loss.py
    "gpt_neox, embed_out": dict(model_type="gpt_neox", tie_word_embeddings=False),
    "mamba, float": dict(model_type="mamba", tie_word_embeddings=True),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def tiny_model(family="qwen2, tied", seed=0, **overrides):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**(SIZES | FAMILIES[family] | overrides))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "head.bias" in name:
            torch.nn.init.normal_(parameter)  # transformers starts it at zero
    return model


def batch(seed=0, rows=3, length=10, ignored=7):
    """Random ids and targets; the first ``ignored`` targets are -100."""
    generator = torch.Generator().manual_seed(seed)
    ids, targets = torch.randint(2, VOCABULARY, (2, rows, length), generator=generator)
    targets.view(-1)[:ignored] = -100
    return {"input_ids": ids, "shift_labels": targets, "labels": targets}


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(found, expected, tolerance=1e-5):
    """Compare to ``tolerance`` of a parameter's largest gradient; the gradient of k_proj.bias is fp32 noise only."""
    assert found.keys() == expected.keys() and len(expected) > 0
    for name, gradient in expected.items():
        limit = tolerance * gradient.abs().max().item() + 1e-8
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=limit, msg=lambda text, name=name: name + text)


# linear + cross entropy


def materialised(hidden, weight, targets, bias, scale, soft_cap, num_items):
    logits = F.linear(hidden, weight, bias) * scale
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    if logits.dtype != torch.float64:
        logits = logits.float()
    losses = F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    return losses / ((targets != -100).sum() if num_items is None else num_items)


def loss_and_gradients(function, tensors, upstream, *arguments):
    """Return the loss and the gradients by ``tensors`` of upstream * loss, as float64."""
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in tensors]
    loss = function(*leaves, *arguments)
    (loss * upstream).backward()
    return [value.double() for value in (loss.detach(), *(leaf.grad for leaf in leaves if leaf is not None))]


def problem(rows, hidden_size, vocabulary, biased, dtype, device="cpu", seed=0, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, hidden_size, generator=generator)
    weight = torch.randn(vocabulary, hidden_size, generator=generator) * 2 / hidden_size**0.5
    bias = torch.randn(vocabulary, generator=generator) if biased else None
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = -100
    hidden, weight, bias = (None if x is None else x.to(device, dtype) for x in (hidden, weight, bias))
    return hidden, weight, bias, targets.to(device)


def compare(
    rows, hidden_size, vocabulary, biased, scale, soft_cap, num_items, chunk_bytes, dtype, device="cpu", **more
):
    """Compare loss and gradients with float64.

    The error may be twice that of materialised logits in the same dtype, and a little more. Source of the criterion:
    the tests of https://github.com/apple/ml-cross-entropy.
    """
    hidden, weight, bias, targets = problem(rows, hidden_size, vocabulary, biased, dtype, device, **more)

    def fused(hidden, weight, bias):
        options = dict(scale=scale, soft_cap=soft_cap, num_items=num_items, chunk_bytes=chunk_bytes)
        return fused_linear_cross_entropy(hidden, weight, targets, bias, **options)

    def plain(hidden, weight, bias):
        return materialised(hidden, weight, targets, bias, scale, soft_cap, num_items)

    upstream = torch.tensor(0.37, device=device)
    tensors = (hidden, weight, bias)
    truth = loss_and_gradients(plain, [None if x is None else x.double() for x in tensors], upstream.double())
    reference = loss_and_gradients(plain, tensors, upstream)
    found = loss_and_gradients(fused, tensors, upstream)
    tolerance = {torch.float64: 1e-6, torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    # Larger numbers may cancel in a gradient: 1 - 1 at a probable target, or the parts of several chunks.
    largest = max(x.abs().max().item() for x in tensors if x is not None)
    cancelled = max(2e-6, torch.finfo(dtype).eps) * upstream.item() * scale / (num_items or 1) * max(1, largest)
    for true, other, ours in zip(truth, reference, found, strict=True):
        if true.numel() == 0:
            continue
        assert torch.isfinite(ours).all() or not torch.isfinite(true).all()
        allowed = 2 * (true - other).abs().max() + tolerance * true.abs().max() + cancelled
        assert not (true - ours).abs().max() > allowed, ((true - ours).abs().max(), allowed)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    hidden_size=st.integers(1, 33),
    vocabulary=st.integers(1, 200),
    biased=st.booleans(),
    scale=st.sampled_from([1.0, 0.0625, 3.0]),
    soft_cap=st.sampled_from([None, 1.0, 30.0]),
    num_items=st.sampled_from([None, 131_072]),
    chunk_bytes=st.integers(1, 100_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 1000),
    ignored=st.sampled_from([0.0, 0.3]),
)
def test_any_shape(seed, ignored, rows, num_items, **arguments):
    if num_items is None and bool((problem(rows, 1, 2, False, torch.float32, seed=seed, ignored=ignored)[3] < 0).all()):
        num_items = 5  # 0 / 0 is tested below
    compare(rows, num_items=num_items or 5, seed=seed, ignored=ignored, **arguments)


@pytest.mark.parametrize("num_items", [None, 7])
def test_no_target_at_all(num_items):
    hidden, weight, _, targets = problem(5, 4, 9, False, torch.float32, ignored=1.1)
    weight.requires_grad_()
    loss = fused_linear_cross_entropy(hidden, weight, targets, num_items=num_items)
    expected = materialised(hidden, weight, targets, None, 1.0, None, num_items)
    torch.testing.assert_close(loss, expected, equal_nan=True)  # NaN as a mean over nothing, 0 as a sum
    if num_items is not None:
        loss.backward()
        assert not weight.grad.any()


def test_no_row_at_all():
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(9, 4, requires_grad=True)
    loss = fused_linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64), num_items=3)
    loss.backward()
    assert loss == 0 and not weight.grad.any() and hidden.grad.shape == (0, 4)


def test_the_mean_is_over_targets_not_rows():
    hidden, weight, bias, targets = problem(30, 8, 50, True, torch.float64, ignored=0.5)
    found = fused_linear_cross_entropy(hidden, weight, targets, bias)
    torch.testing.assert_close(found, F.cross_entropy(F.linear(hidden, weight, bias), targets))


def test_another_ignored_index():
    hidden, weight, _, targets = problem(30, 8, 50, False, torch.float32, ignored=0.0)
    found = fused_linear_cross_entropy(hidden, weight, targets, ignore_index=int(targets[0]))
    torch.testing.assert_close(found, F.cross_entropy(hidden @ weight.T, targets, ignore_index=int(targets[0])))


def test_a_frozen_weight_gets_no_gradient_and_a_frozen_body_none_either():
    hidden, weight, _, targets = problem(6, 4, 9, False, torch.float32)
    for trained, frozen in ((hidden, weight), (weight, hidden)):
        trained.requires_grad_()
        fused_linear_cross_entropy(hidden, weight, targets).backward()
        assert trained.grad.any() and frozen.grad is None
        trained.requires_grad_(False).grad = None


def test_wrong_targets_are_errors():
    hidden, weight, _, targets = problem(6, 4, 9, False, torch.float32)
    with pytest.raises(ValueError, match="6 rows"):
        fused_linear_cross_entropy(hidden, weight, targets[:-1])
    for outside in (9, -1):
        targets[0] = outside
        with pytest.raises((IndexError, RuntimeError)):
            fused_linear_cross_entropy(hidden, weight, targets)


def test_a_second_backward_raises_an_error_that_says_why():
    hidden, weight, _, targets = problem(6, 4, 9, False, torch.float32)
    loss = fused_linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_in_its_dtype_and_keeps_the_gradients_wide(dtype):
    hidden, weight, bias, targets = problem(200, 16, 300, True, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    with torch.autocast("cpu", dtype=dtype):
        expected = materialised(hidden, weight, targets, bias, 1.0, None, None)
        loss = fused_linear_cross_entropy(hidden, weight, targets, bias, chunk_bytes=2**16)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # that of fp32 is 2e-6 and 7e-5 off
    for found, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, other, rtol=0, atol=0.02 * other.abs().max().item())


def test_half_precision_gradients_of_a_huge_batch_do_not_vanish():
    """Gradients of logits divided by 10 million targets are below the smallest fp16; a loss scale brings them back."""
    hidden, weight, _, targets = problem(64, 8, 30, False, torch.float16)
    wide = weight.double().requires_grad_()
    materialised(hidden.double(), wide, targets, None, 1.0, None, 1e7).backward()
    weight.requires_grad_()
    (fused_linear_cross_entropy(hidden, weight, targets, num_items=1e7) * 2**16).backward()
    expected = wide.grad * 2**16
    torch.testing.assert_close(weight.grad.double(), expected, rtol=0, atol=0.01 * expected.abs().max().item())


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that an operation allocates. Views and in-place results do not count."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and storage(leaf) not in given:
                self.elements = max(self.elements, leaf.numel())
        return result


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


def test_all_logits_are_never_held():
    rows, hidden_size, vocabulary = 640, 8, 1000
    hidden, weight, _, targets = problem(rows, hidden_size, vocabulary, False, torch.float32)
    hidden.requires_grad_()
    with LargestTensor() as materialising:
        materialised(hidden, weight, targets, None, 1.0, None, None).backward()
    assert materialising.elements == rows * vocabulary  # so the recorder does see logits
    chunk_bytes = 64 * 1024 * (4 + 8)  # 64 rows of the padded vocabulary, with two copies
    with LargestTensor() as chunked:
        fused_linear_cross_entropy(hidden, weight, targets, chunk_bytes=chunk_bytes).backward()
    assert chunked.elements == 64 * 1024


def test_evaluation_holds_no_gradients():
    hidden, weight, _, targets = problem(640, 8, 1024, False, torch.float32)
    weight.requires_grad_()
    with torch.no_grad(), LargestTensor() as recorder:
        fused_linear_cross_entropy(hidden, weight, targets, chunk_bytes=4 * 1024 * 12)
    assert recorder.elements == 4 * 1024  # four rows of logits; the gradients would have 5,120 and 8,192


@given(rows=st.integers(0, 100_000), row_bytes=st.integers(1, 10**6), chunk_bytes=st.integers(1, 10**9))
def test_chunks_are_few_and_fit(rows, row_bytes, chunk_bytes):
    size = rows_of_a_chunk(rows, row_bytes, chunk_bytes)
    most = max(1, chunk_bytes // row_bytes)
    assert 1 <= size <= most
    step = 1 if most < 128 else 128
    assert size >= rows or size % step == 0
    fewest = -(-rows // (most // step * step)) if rows > most else 1
    assert -(-max(rows, 1) // size) <= fewest


def test_the_seed_tutorials_chunks():
    """16 rows x 512 tokens x 2 = 16,384 rows of 151,680 bf16 logits in the default 1.25 GiB: four times 4,096."""
    assert rows_of_a_chunk(16_384, 151_680 * 2, 5 * 2**28) == 4096


# The kernel

needs_kernel = pytest.mark.skipif(
    cross_entropy_in_place is None or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")),
    reason="no GPU with Triton",
)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 131, 8192, 20_001])
@pytest.mark.parametrize(("scale", "soft_cap"), [(1.0, None), (0.25, None), (0.5, 2.0)])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_the_kernel_does_what_plain_torch_does(dtype, vocabulary, scale, soft_cap, with_gradient):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(vocabulary)
    given = (4 * torch.randn(6, -(-vocabulary // 64) * 64)).to(device, dtype)  # rows wider than the vocabulary
    targets = torch.randint(vocabulary, (6,), device=device)
    targets[2] = -100
    whole, plain = given.clone(), given.float().clone()[:, :vocabulary]
    ours = whole[:, :vocabulary]
    found = cross_entropy_in_place(ours, targets, scale, soft_cap, -100, with_gradient)
    expected = cross_entropy_plain(plain, targets, scale, soft_cap, -100, with_gradient)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if with_gradient:
        bits = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        torch.testing.assert_close(ours.float(), plain, rtol=bits, atol=1e-6)
        assert not whole[:, vocabulary:].any()
    else:
        assert torch.equal(whole, given)


@needs_kernel
def test_the_kernel_shows_a_wrong_target_as_nan():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    targets = torch.tensor([0, 64, -1, -100, 63], device=device)
    losses = cross_entropy_in_place(torch.zeros(5, 64, device=device), targets, 1.0, None, -100, True)
    assert losses.isnan().tolist() == [False, True, True, False, False] and losses[3] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [50_257, 151_680, 151_646])
@pytest.mark.parametrize("soft_cap", [None, 30.0])
@pytest.mark.parametrize("biased", [False, True])
def test_on_a_gpu(dtype, vocabulary, soft_cap, biased):
    """700 rows in chunks of 256: the last one partial."""
    assert cross_entropy_in_place is not None
    torch.backends.cuda.matmul.allow_tf32 = False
    chunk_bytes = 256 * vocabulary * dtype.itemsize
    compare(700, 96, vocabulary, biased, 1.0, soft_cap, 1000, chunk_bytes, dtype, "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_memory_is_a_chunks_and_nothing_waits():
    rows, vocabulary = 8192, 151_680
    hidden, weight, _, targets = problem(rows, 64, vocabulary, False, torch.float32, "cuda")
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = fused_linear_cross_entropy(hidden, weight, targets, chunk_bytes=2**28)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 2**28 + 3 * sum(leaf.nbytes for leaf in leaves)
    assert taken > 2**27


# Models


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_models_own(family, device):
    """Three rows of ten tokens in chunks of a few; num_items_in_batch as Trainer counts it, over several batches."""
    own = tiny_model(family).to(device)
    fused = copy.deepcopy(own)
    use_fused_loss(fused, chunk_bytes=5 * VOCABULARY * 12)
    inputs = {name: tensor.to(device) for name, tensor in batch().items()}
    losses = []
    for model in (own, fused):
        output = model(**inputs, num_items_in_batch=torch.tensor(61, device=device))
        output.loss.backward()
        losses.append(output.loss.item())
    assert isinstance(output.logits, DeferredLogits)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert_same_gradients(gradients(fused), gradients(own))


def test_labels_to_be_shifted_and_no_count():
    """As other data collators give them: the loss is a mean, and the last token predicts nothing."""
    own = tiny_model()
    fused = copy.deepcopy(own)
    use_fused_loss(fused)
    ids = batch()["input_ids"]
    assert fused(input_ids=ids, labels=ids).loss.item() == pytest.approx(own(input_ids=ids, labels=ids).loss.item())


def test_two_micro_batches_of_different_counts_equal_one_batch():
    whole = batch(rows=4, ignored=13)
    one, two = tiny_model(), tiny_model()
    use_fused_loss(one)
    use_fused_loss(two)
    items = torch.tensor(27)
    one(**whole, num_items_in_batch=items).loss.backward()
    for rows in (slice(0, 1), slice(1, 4)):
        two(**{name: tensor[rows] for name, tensor in whole.items()}, num_items_in_batch=items).loss.backward()
    assert_same_gradients(gradients(two), gradients(one))


def test_evaluation_and_generation_are_unchanged():
    own = tiny_model().eval()
    fused = copy.deepcopy(own)
    use_fused_loss(fused, chunk_bytes=5 * VOCABULARY * 12)
    inputs = batch()
    with torch.no_grad():
        loss = fused(**inputs, num_items_in_batch=1).loss
        torch.testing.assert_close(loss, own(**inputs, num_items_in_batch=1).loss)
        assert not loss.requires_grad
        ids = inputs["input_ids"]
        torch.testing.assert_close(fused(input_ids=ids).logits, own(input_ids=ids).logits)
    prompt = inputs["input_ids"][:, :3]
    for sample in (False, True):
        torch.manual_seed(0)
        expected = own.generate(prompt, max_new_tokens=5, do_sample=sample, pad_token_id=0)
        torch.manual_seed(0)
        assert torch.equal(fused.generate(prompt, max_new_tokens=5, do_sample=sample, pad_token_id=0), expected)


@pytest.mark.parametrize("family", ["qwen2, tied", "llama, untied"])
def test_checkpoints_are_the_models_own(family, tmp_path):
    own = tiny_model(family)
    fused = copy.deepcopy(own)
    use_fused_loss(fused)
    assert fused.state_dict().keys() == own.state_dict().keys()
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in own.named_parameters()]
    own.save_pretrained(tmp_path / "own")
    fused.save_pretrained(tmp_path / "fused")
    names = sorted(path.name for path in (tmp_path / "own").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "fused").iterdir()) and "model.safetensors" in names
    for name in names:
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes(), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert type(loaded) is type(own) and type(loaded.get_output_embeddings()) is torch.nn.Linear
    torch.testing.assert_close(loaded(**batch()).loss, own(**batch()).loss)


def test_compiled_it_is_one_graph_and_the_same_loss():
    from torch._dynamo.testing import CompileCounter

    own = tiny_model("gemma2, soft cap", use_cache=False)
    fused = copy.deepcopy(own)
    use_fused_loss(fused)
    counter = CompileCounter()
    compiled = torch.compile(fused, backend=counter)
    for items in (23, 40):
        inputs = batch(seed=items)
        expected = own(**inputs, num_items_in_batch=torch.tensor(items)).loss
        found = compiled(**inputs, num_items_in_batch=torch.tensor(items)).loss
        torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


# Refusals


class Odd(torch.nn.Linear):
    pass


def test_models_that_it_does_not_support_are_refused():
    wrapped = tiny_model()
    use_fused_loss(wrapped)
    with pytest.raises(InputError, match="before anything wraps it"):
        use_fused_loss(wrapped)
    with pytest.raises(InputError, match="before anything wraps it"):
        use_fused_loss(torch.nn.Linear(2, 2))
    odd = tiny_model()
    odd.set_output_embeddings(Odd(32, VOCABULARY))
    with pytest.raises(InputError, match="its head is Odd"):
        use_fused_loss(odd)
    other = tiny_model()
    other.loss_function = F.mse_loss
    with pytest.raises(InputError, match="its loss is mse_loss"):
        use_fused_loss(other)


def test_a_model_with_a_loss_of_its_own_is_refused():
    """Bart computes CrossEntropyLoss()(logits.view(...)) and knows neither shift_labels nor num_items_in_batch."""
    shape = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    config = AutoConfig.for_model("bart", vocab_size=VOCABULARY, is_decoder=True, **shape, pad_token_id=1)
    model = AutoModelForCausalLM.from_config(config)
    use_fused_loss(model)
    inputs = batch()
    with pytest.raises(InputError, match=r"this model uses their \.device"):
        model(input_ids=inputs["input_ids"], labels=inputs["labels"])


@pytest.mark.parametrize(
    "use",
    [
        lambda logits: logits[..., :5],
        lambda logits: logits + 1,
        lambda logits: torch.ones(3) + logits,
        lambda logits: logits * torch.ones(1),
        lambda logits: torch.softmax(logits, -1),
        lambda logits: logits.logsumexp(-1),
        lambda logits: logits.tanh().tanh(),
        lambda logits: F.relu(logits),
    ],
)
def test_other_uses_of_deferred_logits_are_refused(use):
    model = tiny_model()
    use_fused_loss(model)
    logits = model(**batch()).logits
    with pytest.raises(InputError, match="never holds the logits, but this model"):
        use(logits)


# Wrappers


@pytest.mark.parametrize("family", ["qwen2, tied", "gemma2, soft cap", "mamba, float"])
def test_under_the_mixed_precision_of_accelerate(family):
    """Accelerate puts autocast around forward, and makes what comes out of it fp32."""
    found = []
    for fuse in (False, True):
        model = tiny_model(family)
        if fuse:
            use_fused_loss(model)
        model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype=torch.bfloat16)(model.forward))
        loss = model(**batch(), num_items_in_batch=torch.tensor(23)).loss
        loss.backward()
        found.append((loss.item(), gradients(model)))
    (own_loss, own), (fused_loss, fused) = found
    assert fused_loss == pytest.approx(own_loss, rel=1e-3)
    assert {gradient.dtype for gradient in fused.values()} == {torch.float32}
    assert_same_gradients(fused, own, tolerance=0.03)


def test_lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, task_type="CAUSAL_LM")
    own, fused = tiny_model(), tiny_model()
    use_fused_loss(fused)
    found = []
    for model in (own, fused):
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)  # peft starts it at zero
        model(**batch(), num_items_in_batch=torch.tensor(23)).loss.backward()
        found.append(gradients(model))
    assert all("lora" in name for name in found[0])
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("config", [dict(target_modules=["lm_head"]), dict(modules_to_save=["lm_head"])])
def test_lora_on_the_head_is_refused(config):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama, untied")
    use_fused_loss(model)
    model = peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": ["q_proj"], **config}))
    with pytest.raises(InputError, match="leave the head out of target_modules and modules_to_save"):
        model(**batch())


def check_wrappers(rank: int, folder: Path) -> None:
    """In each of two processes: DDP and FSDP2 give the gradients that one process gets from both batches."""
    from accelerate.utils.other import compile_regions_fsdp2
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    batches = [batch(seed=0), batch(seed=1, ignored=12)]
    items = torch.tensor(23 + 18)
    for family in ("qwen2, tied", "llama, untied"):
        alone, ddp, fsdp, compiled = (tiny_model(family) for _ in range(4))
        for inputs in batches:
            alone(**inputs, num_items_in_batch=items).loss.backward()
        for model in (ddp, fsdp, compiled):
            use_fused_loss(model)
        compile_regions_fsdp2(compiled, backend="aot_eager", dynamic=False)  # as accelerate does, before sharding
        for model in (fsdp, compiled):
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        for model in (DistributedDataParallel(ddp), fsdp, compiled):
            for _ in range(2):  # the second forward finds what the first has left
                model.zero_grad()
                (2 * model(**batches[rank], num_items_in_batch=items).loss).backward()  # both average over processes
        assert_same_gradients(gradients(ddp), gradients(alone))
        for model in (fsdp, compiled):
            whole = {name: grad.full_tensor() for name, grad in gradients(model).items()}
            assert_same_gradients(whole, gradients(alone))
        fsdp.eval()
        with torch.no_grad():
            expected = alone.eval()(**batches[rank], num_items_in_batch=1).loss
            torch.testing.assert_close(fsdp(**batches[rank], num_items_in_batch=1).loss, expected)


def test_ddp_and_fsdp2_give_the_gradients_of_one_process(tmp_path):
    in_two_processes(check_wrappers, tmp_path)


@pytest.mark.parametrize("vocabulary", [128, 100])  # no multiple of PADDING: the padded rows are cut off
def test_a_tied_embeddings_gradient_is_added_in_place(vocabulary):
    """A third tensor of its size (Qwen2.5-0.5B: half a GiB) would be the peak of a step with fp32 weights."""
    weight = torch.randn(vocabulary, 16, requires_grad=True)
    hidden = F.embedding(torch.arange(40), weight) * 1.0
    loss = fused_linear_cross_entropy(hidden, weight, torch.arange(40))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        loss.backward()
    sums = [e.name for e in profiler.events() if "add" in e.name and [vocabulary, 16] in e.input_shapes]
    assert sums == ["aten::add_"]


# a head that is divided by vocabulary


def check_divided_vocabulary(rank: int, folder: Path) -> None:
    """In each of two processes: part of the vocabulary, whose rows do not divide by two, against all logits in fp64."""
    from torch.distributed.tensor import Shard, distribute_tensor

    from common.model.linear_cross_entropy import Vocabulary, divided_vocabulary

    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for biased, scale, soft_cap, items in ((False, 1.0, None, None), (True, 0.25, 3.0, torch.tensor(23))):
        hidden, weight, bias, targets = problem(50, 24, VOCABULARY, biased, torch.float64)

        def together(hidden, weight, bias, settings=(scale, soft_cap, items), targets=targets):
            return materialised(hidden, weight, targets, bias, *settings)

        expected = loss_and_gradients(together, [hidden, weight, bias], 3.0)
        shards = [None if part is None else distribute_tensor(part, mesh, [Shard(0)]) for part in (weight, bias)]
        vocabulary = divided_vocabulary(shards[0])
        parts = [hidden, *(None if part is None else part.to_local() for part in shards)]

        more = dict(scale=scale, soft_cap=soft_cap, num_items=items, vocabulary=vocabulary, chunk_bytes=70 * 24 * 17)

        def divided(hidden, weight, bias, more=more, targets=targets):
            return fused_linear_cross_entropy(hidden, weight, targets, bias, **more)

        found = loss_and_gradients(divided, parts, 3.0)
        rows = slice(0, 66) if rank == 0 else slice(66, VOCABULARY)
        for place, truth in enumerate(expected):
            truth = truth[rows] if place >= 2 else truth  # the loss and the gradient of hidden are whole
            torch.testing.assert_close(found[place], truth, rtol=1e-9, atol=1e-9)
    targets[0] = VOCABULARY
    with pytest.raises((IndexError, RuntimeError)):  # in the process that has the end of the vocabulary
        cross_entropy_plain(torch.zeros(50, 65), targets, 1.0, None, -100, False, Vocabulary(66, VOCABULARY, None))


def test_a_vocabulary_that_processes_share_has_the_loss_and_gradients_of_all_logits(tmp_path):
    in_two_processes(check_divided_vocabulary, tmp_path)
