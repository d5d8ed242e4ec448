"""Measure training speed on one GPU: plain Trainer as in the tutorials, the recipe, and a bare loop, in one table.

    python benchmarks/gpu.py                                        # every variant, about 10 minutes on an H100
    python benchmarks/gpu.py --variants '123M*' --profile           # some variants, and where their time goes
    python benchmarks/gpu.py --variants '*, recompute*' '*, kept'   # --recompute: its choices, and without it

Each variant is launched in a process of its own with accelerate_configs/single_gpu.yaml or fp8.yaml. It trains on
random tokens, so its losses mean nothing. Tokens a second are the median over intervals of two steps, after the fourth
step. The seconds to the first step include compiling. The compiler cache starts empty, so it has nothing for the first
compiled variant of a job. MFU is model FLOPs (attention in full, recompute not counted) over the card's dense bf16
peak. FP8 has no MFU, because its products have another peak. The ratio is to the job's variant "tutorial". The planned
memory is that of --plan, without the CUDA context that the peak does not count either.
"""

import argparse
import fnmatch
import json
import re
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from launching import compact, launcher, one_gpu, result_of
from trainers import trainer_on
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from common.dataset.packing import JoinedRows, PackedRows, collate_rows
from common.distributed.launch import read_launch
from common.model.attention import set_attention
from common.model.counts import flops_per_token, peak_tflops
from common.model.from_config import keep_residual_in_bf16
from common.model.fused_loss import use_fused_loss
from common.model.memory import CONTEXT_BYTES, predict
from common.model.recompute import choose_recompute
from common.system import GIB
from common.tokens.store import TokenStore
from common.tokens.token_index import write_index
from common.train.setting import setting_of_run

WARM_STEPS, INTERVAL = 4, 2

# What is trained: shape, dtype of the parameters, context length, tokens a step, steps.
JOBS = {
    "123M": dict(
        shape=dict(
            model_type="qwen2", hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
            num_key_value_heads=2, tie_word_embeddings=True, vocab_size=151_680,
        ),
        context_length=512, tokens_per_step=131_072, steps=16,
    ),
    "0.5B": dict(  # Qwen2.5-0.5B
        shape=dict(
            model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, tie_word_embeddings=True, vocab_size=151_936,
        ),
        context_length=2048, tokens_per_step=131_072, steps=12,
    ),
    "7B": dict(  # Llama-2-7B
        shape=dict(
            model_type="llama", hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False, vocab_size=32_000,
        ),
        context_length=4096, tokens_per_step=32_768, steps=10, dtype="bfloat16", optim="adamw_8bit",
    ),
}  # fmt: skip


def variant(job: str, rows: int, loop: str = "recipe", compiled: bool = True, **changes) -> dict:
    """Describe a run: ``rows`` of a micro-batch; ``loop`` is tutorial, recipe or bare; ``changes`` override the job."""
    return {**JOBS[job], "job": job, "rows": rows, "loop": loop, "compiled": compiled, **changes}


def recomputing(job: str, rows: int, **changes) -> dict[str, dict]:
    """Describe the choices of --recompute, and the same job without it."""
    found = {f"{job} recipe, {rows} rows, kept": variant(job, rows, **changes)}
    for choice in ("keep_products", "2", "keep_attention", "all"):
        found[f"{job} recipe, {rows} rows, recompute {choice}"] = variant(job, rows, recompute=choice, **changes)
    return found


# SwanLab's wiki tutorial does not pad the vocabulary: it has the tokenizer's 151,646 entries.
TUTORIAL_123M = {**JOBS["123M"]["shape"], "vocab_size": 151_646}
VARIANTS = {
    "123M tutorial": variant("123M", 32, "tutorial", compiled=False, shape=TUTORIAL_123M),
    "123M recipe, not compiled": variant("123M", 64, compiled=False),
    "123M recipe": variant("123M", 64),
    "123M recipe, Muon": variant("123M", 64, optimizer="muon"),
    "123M recipe, 128 rows": variant("123M", 128),
    "123M recipe, isolated": variant("123M", 64, isolated=True),
    "123M bare loop": variant("123M", 64, "bare"),
    "0.5B tutorial": variant("0.5B", 8, "tutorial", compiled=False),
    "0.5B recipe": variant("0.5B", 8),
    "0.5B recipe, 15 rows": variant("0.5B", 15, tokens_per_step=122_880),
    "0.5B recipe, 16 rows": variant("0.5B", 16),
    "0.5B recipe, isolated": variant("0.5B", 8, isolated=True),
    "0.5B recipe, 16 rows, FP8": variant("0.5B", 16, yaml="fp8.yaml"),
    "0.5B bare loop": variant("0.5B", 8, "bare"),
    "7B tutorial": variant("7B", 4, "tutorial", compiled=False, recompute="all"),
    "7B recipe": variant("7B", 1),
    "7B recipe, isolated": variant("7B", 1, isolated=True),
    "7B recipe, recompute": variant("7B", 4, recompute="all"),
    "7B recipe, FP8": variant("7B", 1, yaml="fp8.yaml"),
    **recomputing("0.5B", 16),
    **recomputing("0.5B", 1, context_length=32_768, tokens_per_step=65_536, steps=10),  # attention is most of the work
    **recomputing("7B", 1),
}


class Clock(TrainerCallback):
    """Time the steps. Wait for the GPU only at the end of each interval. Optionally profile one interval."""

    def __init__(self, profile: bool):
        self.intervals = []
        self.step = 0
        self.kernels = None
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if profile else None

    def on_train_begin(self, *_, **__):
        self.started = self.last = self.now()

    def on_step_end(self, *_, **__):
        self.step += 1
        if self.step == 1:
            self.first_step_seconds = self.now() - self.started
        if self.step % INTERVAL:
            return
        now = self.now()
        if self.step > WARM_STEPS:
            self.intervals.append(now - self.last)
        if self.profiler is not None and self.step == WARM_STEPS:
            self.profiler.start()
        if self.profiler is not None and self.step == WARM_STEPS + INTERVAL:
            self.profiler.stop()
            self.kernels = kernel_shares(self.profiler, now - self.last)
        self.last = self.now()

    @staticmethod
    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()


KINDS = {  # patterns of kernels' names
    "loss": "cross_entropy",
    "attention": "flash|fmha|cudnn.*attention|sdpa|flex_attention",
    "products": "gemm|nvjet|cutlass|splitK|ampere_|sm90_xmma",
    "optimizer": "multi_tensor|adam|Adam|foreach|kOptimizer",
    "compiled elementwise": "triton_",
    "copies": "Memcpy|Memset|copy_kernel",
}


def kernel_shares(profiler, seconds: float) -> dict[str, float]:
    """Return the share of ``seconds`` that each kind of kernel takes, and the share in which the GPU is idle."""
    events = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    shares = dict.fromkeys([*KINDS, "other"], 0.0)
    busy = until = 0.0  # microseconds: total time with a kernel running; end of the kernels seen so far
    for start, end, name in events:
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")
        shares[kind] += (end - start) / 1e6 / seconds
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return {**shares, "idle": 1 - busy / 1e6 / seconds}


def random_rows(described: dict, folder: str) -> JoinedRows:
    """Return rows of random tokens, in documents of about 500 tokens, enough for two steps."""
    generator = np.random.default_rng(0)
    tokens = 2 * described["tokens_per_step"] + 1
    sizes = generator.geometric(1 / 500, size=tokens // 100)
    sizes = sizes[: int(np.searchsorted(np.cumsum(sizes), tokens)) + 1].astype(np.int32)
    ids = generator.integers(0, described["shape"]["vocab_size"], int(sizes.sum()), dtype=np.int32)
    ids.tofile(f"{folder}/tokens.bin")
    write_index(f"{folder}/tokens.idx", sizes, ids.dtype)
    store = TokenStore(f"{folder}/tokens.bin")
    chosen = np.ones(store.documents, bool)
    return JoinedRows([PackedRows(store, chosen, described["context_length"], described.get("isolated", False))])


def work(described: dict, profile: bool, folder: str) -> dict:
    """Train one variant in this process; return its row of the table."""
    set_seed(0)
    loop, rows = described["loop"], described["rows"]
    rows_per_step = described["tokens_per_step"] // described["context_length"]
    launch = read_launch()
    training = TrainingArguments(
        output_dir=folder, max_steps=described["steps"], per_device_train_batch_size=rows,
        gradient_accumulation_steps=rows_per_step // rows, optim=described.get("optim", "adamw_torch_fused"),
        learning_rate=1e-4, weight_decay=0.1, logging_steps=10, logging_nan_inf_filter=False, report_to="none",
        save_strategy="no", disable_tqdm=True, **launch.defaults(),
    )  # fmt: skip
    launch = choose_recompute(described.get("recompute"), launch, training)
    training.mixed_precision = launch.precision  # also FP8, which has no flag
    assert training.n_gpu <= 1, "one GPU is measured; Trainer would spread the batch over several GPUs"
    shape = {**described["shape"], "max_position_embeddings": described["context_length"]}
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**shape), dtype=getattr(torch, described.get("dtype", "float32"))
        )
    flops, parameters = flops_per_token(model, described["context_length"]), model.num_parameters()
    data = random_rows(described, folder)
    clock = Clock(profile)
    model.config.use_cache = False  # as Trainer does; a cache of keys and values costs a bare loop 4 GiB
    planned = None  # the prediction is for the recipe's loss
    if loop == "tutorial":
        train_tutorial(model, training, data, clock)
    else:
        set_attention(model, "auto", described.get("isolated", False), training.device)
        use_fused_loss(model)
        keep_residual_in_bf16(model)
        launch = replace(launch, rows_per_step=rows_per_step, optimizer=described.get("optimizer", "adamw"))
        setting = setting_of_run(model, launch, training, described["context_length"])
        planned = (predict(model, setting).total - CONTEXT_BYTES) / GIB
        train = train_bare if loop == "bare" else train_recipe
        train(model, training, data, launch, clock)
    rate = INTERVAL * described["tokens_per_step"] / statistics.median(clock.intervals)
    peak = peak_tflops(training.device, half_precision=training.mixed_precision != "fp8")  # FP8 has another peak
    return {
        "parameters": parameters,
        "tokens_per_second": rate,
        "mfu": None if peak is None else rate * flops / 1e12 / peak,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "planned_gib": planned,
        "first_step_seconds": clock.first_step_seconds,
        "kernels": clock.kernels,
        "device": torch.cuda.get_device_name(),
    }


def train_tutorial(model, training, data, clock) -> None:
    """Train as SwanLab's wiki tutorial and run_clm.py: plain Trainer; the model shifts labels and holds all logits."""
    rows = []
    for row in range(len(data)):
        ids = data[row]["input_ids"]
        rows.append({"input_ids": ids, "labels": ids})
    Trainer(model, training, train_dataset=rows, callbacks=[clock]).train()


def train_recipe(model, training, data, launch, clock) -> None:
    before = first_rows(model)
    trainer = trainer_on(data, data, model, training, launch, callbacks=[clock])
    trainer.train()
    check_all_trained(model, trainer.optimizer, before)


def first_rows(model) -> list[list[torch.Tensor]]:
    """Return a copy of the first row of every matrix, layer by layer."""
    return [[p[0].detach().clone() for p in layer.parameters() if p.dim() == 2] for layer in model.model.layers]


def check_all_trained(model, optimizer, before: list[list[torch.Tensor]]) -> None:
    """Fail unless the optimizer has exactly the trainable parameters, and a matrix of every layer has changed."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert held == trained, f"the optimizer has {len(held & trained)} of the model's {len(trained)} parameters"
    for layer, (was, now) in enumerate(zip(before, first_rows(model), strict=True)):
        assert not all(map(torch.equal, was, now)), f"no matrix of layer {layer} was trained"


def train_bare(model, training, data, launch, clock) -> None:
    """Train the same without Trainer. The difference in speed is what Trainer costs."""
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(non_blocking=True))  # the YAML sets the rest
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-4, fused=True
    )
    loader = torch.utils.data.DataLoader(
        data, training.per_device_train_batch_size, shuffle=True, collate_fn=collate_rows, pin_memory=True
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    clock.on_train_begin()
    batches = (batch for _ in range(training.max_steps) for batch in loader)  # as many passes over the rows as needed
    for _ in range(training.max_steps):
        for _ in range(training.gradient_accumulation_steps):
            batch = next(batches)
            accelerator.backward(model(**batch, num_items_in_batch=launch.rows_per_step * data.context_length).loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.on_step_end()


def launch(name: str, described: dict, profile: bool, cache: str, limit: float) -> dict | str:
    """Run a variant in a process of its own; return its row, or an error message."""
    with tempfile.TemporaryDirectory() as folder:
        command = launcher(described.get("yaml", "single_gpu.yaml"))
        command += [] if described["compiled"] else ["--dynamo_backend", "no"]
        command += [__file__, "--worker", name, "--folder", folder, *(["--profile"] if profile else [])]
        return result_of(command, folder, one_gpu(TORCHINDUCTOR_CACHE_DIR=cache), limit)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["*"], help="names or patterns, such as '0.5B*'")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    parser.add_argument("--limit", type=float, default=300, help="seconds a variant may take")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        result = work(VARIANTS[arguments.worker], arguments.profile, arguments.folder)
        Path(arguments.folder, "result.json").write_text(json.dumps(result))
        return
    chosen = [name for name in VARIANTS if any(fnmatch.fnmatch(name, pattern) for pattern in arguments.variants)]
    if not chosen:
        sys.exit(f"--variants {arguments.variants}: none of {', '.join(VARIANTS)}")
    found = {}
    try:
        with tempfile.TemporaryDirectory() as cache:
            for name in chosen:
                found[name] = launch(name, VARIANTS[name], arguments.profile, cache, arguments.limit)
                print(name, compact(found[name]), file=sys.stderr, flush=True)
    finally:  # also after Ctrl-C: print what was measured before it
        print(table(found), flush=True)


def table(found: dict[str, dict | str]) -> str:
    """Return ``found`` as Markdown tables: the speed and, if profiled, where the time goes."""
    lines = [
        "| variant | rows at once | tokens/s | MFU | peak GiB (planned) | s to first step | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        rows, baseline = VARIANTS[name]["rows"], found.get(f"{VARIANTS[name]['job']} tutorial")
        if isinstance(row, str):
            lines.append(f"| {name} | {rows} | failed: {row} | | | | |")
            continue
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        ratio = f"{row['tokens_per_second'] / baseline['tokens_per_second']:.2f}" if isinstance(baseline, dict) else "-"
        planned = "" if row["planned_gib"] is None else f" ({row['planned_gib']:.1f})"
        lines.append(
            f"| {name} | {rows} | {row['tokens_per_second']:,.0f} | {mfu} | {row['peak_gib']:.1f}{planned} "
            f"| {row['first_step_seconds']:.1f} | {ratio} |"
        )
    profiled = {name: row["kernels"] for name, row in found.items() if isinstance(row, dict) and row["kernels"]}
    if profiled:
        kinds = list(next(iter(profiled.values())))
        lines += ["", f"| share of the time | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(f'{row[kind]:.1%}' for kind in kinds)} |" for name, row in profiled.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
