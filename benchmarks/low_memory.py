"""Measure what trains on a card of 16 GB: memory and speed under a cap, what each saving gains and costs in loss.

    python benchmarks/low_memory.py                                   # the table of memory, some 12 minutes on an H100
    python benchmarks/low_memory.py --variants 'bf16: 3B*' '*QLoRA'   # some variants of it
    python benchmarks/low_memory.py --loss --data zh.jsonl.zst en.jsonl.zst --tokenizer qwen2.5-tokenizer

Memory: each variant is launched in a process of its own. torch.cuda.set_per_process_memory_fraction caps it, so torch's
allocator refuses what does not fit. The cap is 15.5 GiB for a card with bf16. For a card like a T4 it is 14.5 GiB, with
fp16, fp32 master weights, and attention without flash or cuDNN kernels. The CUDA context, some 0.5 GiB, is not part of
the cap; a real card needs it on top. What is refused is run again without the cap, to see how much it needs.
Weights and tokens are random. 4-bit weights are made from 16-bit weights before the cap is set;
recipes/low_memory_16gb.py loads them one by one. A step has one micro-batch. Tokens a second are the median of the
steps after the third.

Loss: every run starts from the same weights and trains on the same rows, with full-precision AdamW or with the savings.
The model is the 123M of wiki_zh_scratch.py; with --job 0.5B it is Qwen2.5-0.5B's shape, with --job 4.2M the bundled
sample's, which also trains on a CPU (Trainer's 8-bit states need a GPU). Every 50th document is held out (every 20th of
the sample). There is no clipping, because it cannot be combined with steps inside backward, and no cap.
"""

import argparse
import fnmatch
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from launching import ROOT, compact, launcher, one_gpu, result_of
from torch import nn
from trainers import trainer_on
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from common.arguments import SharedArguments
from common.corpus.sources import resolve_sources
from common.dataset.packing import JoinedRows, PackedRows
from common.distributed.accelerator import memory_gib
from common.distributed.launch import read_launch
from common.model.adapters import ALL_LINEAR, add_adapters
from common.model.attention import set_attention
from common.model.counts import numbers_of
from common.model.from_config import keep_residual_in_bf16, model_from_config
from common.model.fused_loss import use_fused_loss
from common.model.memory import CONTEXT_BYTES, predict
from common.model.presets import PRESETS
from common.model.recompute import ALL, choose_recompute
from common.system import GIB
from common.tokens.store import TokenStore
from common.tokens.token_index import write_index
from common.tokens.tokenizer import load_tokenizer
from common.tokens.writer import tokenize
from common.train.low_memory import compute_dtype, optimizer_for
from common.train.probe import StepTimer
from common.train.setting import setting_of_trainer

WARM_STEPS, STEPS = 3, 10
CAPS = {"bf16": 15.5, "T4": 14.5}  # GiB

SHAPES = {
    "0.5B": PRESETS["qwen2.5-0.5b"] | dict(vocab_size=151_936),
    "1.5B": PRESETS["qwen2.5-1.5b"] | dict(vocab_size=151_936),
    "3B": PRESETS["qwen2.5-3b"] | dict(vocab_size=151_936),
    "7B": PRESETS["qwen2.5-7b"] | dict(vocab_size=152_064),
    "Llama-2-7B": PRESETS["llama-2-7b"] | dict(vocab_size=32_000),
    "4.2M": dict(
        model_type="qwen2", hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "123M": dict(
        model_type="qwen2", hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
}  # fmt: skip

# Every saving, for training all parameters; below, each of them switched off.
ALL_SAVINGS = dict(
    method="full", weights="bfloat16", optim="adamw_8bit", recompute=True, fused_head=True, in_backward=True
)
WITHOUT = {
    "8-bit states": dict(optim="adamw_torch_fused"),
    "bf16 weights": dict(weights="float32"),
    "step in backward": dict(in_backward=False),
    "fused head": dict(fused_head=False),
    "recompute": dict(recompute=False),
}
NONE = {name: value for changes in WITHOUT.values() for name, value in changes.items()}
ADAPTERS = dict(in_backward=False)


def variant(size: str, card: str = "bf16", context_length: int = 2048, **changes) -> dict:
    """Describe a run of one row at once: ALL_SAVINGS, overridden by ``changes``."""
    return {**ALL_SAVINGS, "size": size, "card": card, "context_length": context_length, **changes}


T4_FULL = dict(weights="float32", in_backward=False)  # the loss scaler needs both
VARIANTS = {
    "bf16: 0.5B": variant("0.5B"),
    **{f"bf16: 0.5B without {name}": variant("0.5B", **off) for name, off in WITHOUT.items()},
    "bf16: 0.5B without any": variant("0.5B", **NONE),
    "bf16: 1.5B": variant("1.5B"),
    **{f"bf16: 1.5B without {name}": variant("1.5B", **off) for name, off in WITHOUT.items()},
    "bf16: 3B": variant("3B"),
    "bf16: 3B without step in backward": variant("3B", in_backward=False),
    "bf16: Llama-2-7B LoRA": variant("Llama-2-7B", method="lora", **ADAPTERS),
    "bf16: Llama-2-7B QLoRA": variant("Llama-2-7B", method="qlora", **ADAPTERS),
    "bf16: 7B LoRA": variant("7B", method="lora", **ADAPTERS),
    "bf16: 7B QLoRA": variant("7B", method="qlora", **ADAPTERS),
    "bf16: 0.5B of 1,024": variant("0.5B", context_length=1024),  # PaddleNLP's guide: 12.31 GiB there
    "bf16: 0.5B of 1,024 without any": variant("0.5B", context_length=1024, **NONE),
    "T4: 0.5B": variant("0.5B", "T4", **T4_FULL),
    "T4: 0.5B of 1,024": variant("0.5B", "T4", 1024, **T4_FULL),
    "T4: 1.5B LoRA": variant("1.5B", "T4", method="lora", **ADAPTERS),
    "T4: 1.5B QLoRA": variant("1.5B", "T4", method="qlora", **ADAPTERS),
    "T4: Llama-2-7B LoRA": variant("Llama-2-7B", "T4", method="lora", **ADAPTERS),
    "T4: 7B LoRA": variant("7B", "T4", method="lora", **ADAPTERS),
    "T4: 7B QLoRA": variant("7B", "T4", method="qlora", **ADAPTERS),
}

# The runs of --loss. The first is the reference.
LOSS_RUNS = {
    "fp32 weights, fp32 states": NONE | dict(method="full", fused_head=True),
    "fp32 weights, 8-bit states of Trainer's": dict(weights="float32", in_backward=False),
    "bf16 weights, fp32 states, rounded to the nearest": dict(optim="adamw_torch_fused", stochastic=False),
    "bf16 weights, fp32 states, rounded stochastically": dict(optim="adamw_torch_fused"),
    "bf16 weights, 8-bit states, rounded to the nearest": dict(stochastic=False),
    "bf16 weights, 8-bit states, rounded stochastically": {},
}
JOBS = {  # of --loss; every=20: every 20th document is held out
    "4.2M": dict(size="4.2M", context_length=128, rows=4, learning_rate=1e-3, every=20),
    "123M": dict(size="123M", context_length=512, rows=64, learning_rate=1e-3, every=50),
    "0.5B": dict(size="0.5B", context_length=1024, rows=16, learning_rate=5e-4, every=50),
}


def training_arguments(described: dict, folder: str, **settings) -> TrainingArguments:
    launch = read_launch()
    training = TrainingArguments(
        output_dir=folder, optim=described["optim"], gradient_accumulation_steps=1, weight_decay=0.1, adam_beta2=0.95,
        logging_nan_inf_filter=False, report_to="none", save_strategy="no", disable_tqdm=True, **settings,
        **launch.defaults(),
    )  # fmt: skip
    choose_recompute(ALL if described["recompute"] else None, launch, training)
    assert training.n_gpu <= 1, "one GPU is measured; Trainer would spread the batch over several GPUs"
    return training


def work(described: dict, capped: bool, folder: str) -> dict:
    """Train one variant in this process; return its row of the table of memory."""
    set_seed(0)
    in_backward = described["in_backward"]
    length = described["context_length"]
    training = training_arguments(
        described, folder, max_steps=STEPS, per_device_train_batch_size=1, learning_rate=1e-5, logging_steps=STEPS,
        max_grad_norm=0.0 if in_backward else 1.0,
    )  # fmt: skip
    if described["card"] == "T4":
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    limit = CAPS[described["card"]] if capped else None
    if described["method"] != "qlora":
        cap(limit)
    model = random_model_of(described, compute_dtype(training), training.device)
    cap(limit)
    data = random_rows(described, folder)
    set_attention(model, "auto", False, training.device)
    if described["fused_head"]:
        use_fused_loss(model)
    keep_residual_in_bf16(model)
    if described["method"] != "full":
        model = add_adapters(model, 16, [ALL_LINEAR], train_embedding=False)
    dtype = None if described["method"] != "full" else model.dtype
    own = optimizer_for(dtype, in_backward, training)
    timer = StepTimer()
    launch = replace(read_launch(), rows_per_step=1, optimizer="adamw")
    trainer = trainer_on(data, data, model, training, launch, optimizer_cls_and_kwargs=own, callbacks=[timer])
    predicted = predict(model, setting_of_trainer(trainer)).total - CONTEXT_BYTES
    trainer.train()
    allocated = torch.cuda.max_memory_allocated()
    return {
        "parameters": sum(map(numbers_of, model.parameters())),
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "allocated_gib": allocated / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "predicted_gib": predicted / GIB,
        "prediction_error": predicted / allocated - 1,
        "tokens_per_second": length / statistics.median(timer.seconds[WARM_STEPS:]),
        "fits": capped,
        "device": torch.cuda.get_device_name(),
    }


def cap(limit_gib: float | None) -> None:
    """Make torch's allocator refuse more than ``limit_gib`` (None: no limit) from now on, and reset its peak."""
    torch.cuda.empty_cache()
    if limit_gib is not None:
        torch.cuda.set_per_process_memory_fraction(limit_gib * GIB / torch.cuda.get_device_properties(0).total_memory)
    torch.cuda.reset_peak_memory_stats()


def random_model_of(described: dict, computes_in: torch.dtype, device: torch.device):
    """Build a model on ``device``, in its training dtype, or in ``computes_in`` if adapters are trained instead."""
    shape = {**SHAPES[described["size"]], "max_position_embeddings": described["context_length"]}
    dtype = getattr(torch, described["weights"]) if described["method"] == "full" else computes_in
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=dtype)
    if described["method"] == "qlora":
        quantize_layers(model, dtype)
    return model


def quantize_layers(model, dtype: torch.dtype) -> None:
    """Quantize the layers' matrices to NF4, as transformers does when it loads with the adapters' four_bits config."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in model.model.layers:
        for name, linear in [(n, module) for n, module in layer.named_modules() if type(module) is nn.Linear]:
            sizes = (linear.in_features, linear.out_features)
            has_bias = linear.bias is not None
            packed = Linear4bit(*sizes, has_bias, dtype, compress_statistics=True, quant_type="nf4", device="meta")
            weight = Params4bit(linear.weight.data, False, compress_statistics=True, quant_type="nf4", module=packed)
            packed.weight = weight.to(linear.weight.device)
            packed.bias = linear.bias
            layer.set_submodule(name, packed)
    model.is_loaded_in_4bit = True  # peft reads it


def random_rows(described: dict, folder: str) -> JoinedRows:
    """Return a few rows of random tokens."""
    vocabulary = SHAPES[described["size"]]["vocab_size"]
    length = described["context_length"]
    ids = np.random.default_rng(0).integers(0, vocabulary, 8 * length + 1, dtype=np.int32)
    ids.tofile(f"{folder}/tokens.bin")
    write_index(f"{folder}/tokens.idx", np.array([len(ids)], np.int32), ids.dtype)
    return JoinedRows([PackedRows(TokenStore(f"{folder}/tokens.bin"), np.ones(1, bool), length)])


def token_stores(arguments: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, list[TokenStore]]:
    """Return the tokenizer and the tokenized sources of --loss; they are made once and then found in the cache."""
    tokenizer = load_tokenizer(arguments.tokenizer, None)
    shared = SharedArguments(cache_dir=arguments.cache_dir)
    return tokenizer, [tokenize(source, tokenizer, shared) for source in resolve_sources(arguments.data)]


def work_on_loss(described: dict, arguments: argparse.Namespace, folder: str) -> dict:
    """Train one run of --loss in this process; return its row of the table of losses."""
    job = JOBS[arguments.job]
    length = job["context_length"]
    rows = job["rows"]
    tokenizer, stores = token_stores(arguments)
    train_rows, held_out_rows = (
        JoinedRows(
            [PackedRows(store, (np.arange(store.documents) % job["every"] == 0) == out, length) for store in stores]
        )
        for out in (False, True)
    )
    training = training_arguments(
        described, folder, max_steps=round(arguments.tokens / (rows * length)), per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows, learning_rate=job["learning_rate"], lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1}, warmup_steps=0.03, logging_steps=50, max_grad_norm=0.0,
    )  # fmt: skip
    set_seed(0)
    shape = {name: value for name, value in SHAPES[job["size"]].items() if name != "vocab_size"}
    model = model_from_config(shape, tokenizer, length).to(getattr(torch, described["weights"]))
    set_attention(model, "auto", False, training.device)
    use_fused_loss(model)
    keep_residual_in_bf16(model)
    own = optimizer_for(model.dtype, described["in_backward"], training)
    if own is not None:
        own[1]["stochastic"] = described.get("stochastic", True)
    timer = StepTimer()
    launch = replace(read_launch(), rows_per_step=rows, optimizer="adamw")
    trainer = trainer_on(
        train_rows, held_out_rows, model, training, launch, tokenizer, optimizer_cls_and_kwargs=own, callbacks=[timer]
    )
    trainer.train()
    held_out = trainer.evaluate()
    return {
        "loss": held_out["eval_loss"],
        "bits_per_byte": held_out["eval_bits_per_byte"],
        "tokens": training.max_steps * rows * length,
        "allocated_gib": memory_gib(training.device)["memory_peak_gib"],
        "tokens_per_second": rows * length / statistics.median(timer.seconds[WARM_STEPS:]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }


def launch(name: str, described: dict, flags: list[str], compiled: bool, limit: float) -> dict | str:
    """Run a variant in a process of its own; return its row, or an error message."""
    with tempfile.TemporaryDirectory() as folder:
        precision = "fp16" if described.get("card") == "T4" else "bf16"
        command = launcher("single_gpu.yaml" if torch.cuda.is_available() else "cpu.yaml")
        command += ["--mixed_precision", precision, *([] if compiled else ["--dynamo_backend", "no"])]
        command += [__file__, *flags, "--worker", name, "--folder", folder]
        return result_of(command, folder, one_gpu(), limit)


def table(found: dict[str, dict | str]) -> str:
    """Return the table of memory in Markdown."""
    lines = [
        "| variant | parameters | trained | allocated GiB | reserved GiB | predicted GiB | error | tokens/s | fits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        if isinstance(row, str):
            lines.append(f"| {name} | failed: {row} | | | | | | | |")
            continue
        lines.append(
            f"| {name} | {row['parameters'] / 1e9:.2f}B | {row['trained'] / 1e6:,.0f}M | {row['allocated_gib']:.2f} "
            f"| {row['reserved_gib']:.2f} | {row['predicted_gib']:.2f} | {row['prediction_error']:+.1%} "
            f"| {row['tokens_per_second']:,.0f} | {'yes' if row['fits'] else 'no, refused'} |"
        )
    return "\n".join(lines)


def loss_table(found: dict[str, dict | str]) -> str:
    """Return the table of losses in Markdown. The difference is to the reference, the first run."""
    reference = found.get(next(iter(LOSS_RUNS)))
    lines = [
        "| run | tokens | held-out loss | difference | bits per byte | tokens/s | GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        if isinstance(row, str):
            lines.append(f"| {name} | failed: {row} | | | | | |")
            continue
        difference = f"{row['loss'] / reference['loss'] - 1:+.2%}" if isinstance(reference, dict) else "-"
        lines.append(
            f"| {name} | {row['tokens'] / 1e6:.1f}M | {row['loss']:.4f} | {difference} | {row['bits_per_byte']:.4f} "
            f"| {row['tokens_per_second']:,.0f} | {row['allocated_gib']:.2f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["*"], help="names or patterns, such as 'bf16: 0.5B*'")
    parser.add_argument("--compiled", action="store_true", help="compile the layers, as the recipe's YAML does")
    parser.add_argument("--limit", type=float, help="seconds a variant may take: 180, with --loss 600")
    parser.add_argument("--loss", action="store_true", help="measure the table of losses instead")
    parser.add_argument("--data", nargs="+", help="with --loss: documents")
    parser.add_argument("--tokenizer", help="with --loss: a folder or id")
    parser.add_argument("--tokens", type=float, default=8e6, help="with --loss: tokens that each run trains on")
    parser.add_argument("--job", choices=list(JOBS), default="123M", help="with --loss")
    parser.add_argument("--cache_dir", default=str(ROOT / "data" / "cache"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--uncapped", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    runs = {name: ALL_SAVINGS | run for name, run in LOSS_RUNS.items()} if arguments.loss else VARIANTS
    if arguments.loss and not (arguments.data and arguments.tokenizer):
        parser.error("--loss needs --data and --tokenizer")
    if arguments.worker:
        described = runs[arguments.worker]
        if arguments.loss:
            result = work_on_loss(described, arguments, arguments.folder)
        else:
            result = work(described, not arguments.uncapped, arguments.folder)
        Path(arguments.folder, "result.json").write_text(json.dumps(result), encoding="utf-8")
        return
    chosen = [name for name in runs if any(fnmatch.fnmatch(name, pattern) for pattern in arguments.variants)]
    if not chosen:
        sys.exit(f"--variants {arguments.variants}: none of {', '.join(runs)}")
    if arguments.loss:
        token_stores(arguments)  # first, so that no run spends its time on tokenizing
    limit = arguments.limit or (600 if arguments.loss else 180)
    found = {}
    try:
        for name in chosen:
            row = launch(name, runs[name], argv, arguments.compiled, limit)
            if isinstance(row, str) and "out of memory" in row.lower() and not arguments.loss:
                print(f"{name}: refused: {row}", flush=True)
                row = launch(name, runs[name], [*argv, "--uncapped"], arguments.compiled, limit)
            found[name] = row
            print(name, compact(row), flush=True)
    finally:  # also after Ctrl-C: print what was measured before it
        print(loss_table(found) if arguments.loss else table(found), flush=True)


if __name__ == "__main__":
    main()
