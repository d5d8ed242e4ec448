"""Bits per byte of held-out text against seconds of training: the seed tutorial's recipe and ours, on the same text."""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from common.arguments import SharedArguments
from common.loss import use_fused_loss
from common.model import model_from_config
from common.order import TrainingOrder
from common.packing import JoinedRows, PackedRows, collate_rows
from common.sources import resolve_sources
from common.token_writer import token_store_of
from common.tokenizer import load_tokenizer
from common.tokenizer_training import tokenizer_trained_on
from common.trainer import PretrainingTrainer
import importlib.util

spec = importlib.util.spec_from_file_location(
    "wiki", Path(__file__).resolve().parent.parent / "recipes" / "wiki_zh_scratch.py"
)
wiki = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wiki)


class Race(TrainerCallback):
    def __init__(self, rows, tokenizer, every, total):
        self.rows, self.bytes, self.every, self.total = rows, rows.target_bytes(tokenizer), every, total
        self.points, self.seconds = [], 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        step = state.global_step
        if step in (1, 5) or step % self.every == 0 or step == self.total:
            torch.cuda.synchronize()
            self.seconds += time.perf_counter() - self.began
            if step not in (1, 5):
                bits = held_out_bits(model, self.rows) / self.bytes
            else:
                bits = None
            self.points.append([step, self.seconds, bits])
            torch.cuda.synchronize()
            self.began = time.perf_counter()


@torch.no_grad()
def held_out_bits(model, rows, batch=32):
    model.eval()
    total = 0.0
    with torch.autocast("cuda", torch.bfloat16), torch.compiler.set_stance("force_eager"):
        for start in range(0, len(rows), batch):
            b = collate_rows([rows[i] for i in range(start, min(start + batch, len(rows)))])
            x, y = b["input_ids"].cuda(), b["shift_labels"].cuda()
            logits = model(input_ids=x).logits.float()
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    model.train()
    return total / np.log(2)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--data", nargs="+")
    p.add_argument("--tokenizer")
    p.add_argument("--vocab", type=int, default=0)
    p.add_argument("--name")
    p.add_argument("--out")
    p.add_argument("--seed_recipe", action="store_true")
    p.add_argument("--micro", type=int, default=64)
    p.add_argument("--tps", type=int, default=131072)
    p.add_argument("--lr", type=float, default=5e-4)
    p.add_argument("--tokens", type=float, default=35.4e6)
    p.add_argument("--schedule", default="cosine_with_min_lr")
    p.add_argument("--kwargs", default='{"min_lr_rate": 0.1}')
    p.add_argument("--warmup", type=float, default=0.03)
    p.add_argument("--wd", type=float, default=0.1)
    p.add_argument("--beta2", type=float, default=0.95)
    p.add_argument("--muon", action="store_true")
    p.add_argument("--evals", type=int, default=4)
    p.add_argument("--shape", default="{}")
    p.add_argument("--clip", type=float, default=1.0)
    p.add_argument("--scale", type=float, default=0.2)
    a = p.parse_args()
    import common.muon
    common.muon.UPDATE_SIZE = a.scale
    set_seed(42)
    shared = SharedArguments(data=a.data, cache_dir="/tmp/cache", context_length=512, vocabulary_size=a.vocab or 32000)
    sources = resolve_sources(a.data)
    tokenizer = tokenizer_trained_on(sources, shared) if a.vocab else load_tokenizer(a.tokenizer, None)
    stores = [token_store_of(s, tokenizer, shared) for s in sources]
    masks = [np.arange(s.documents) % 50 == 0 for s in stores]
    held = JoinedRows([PackedRows(s, m, 512) for s, m in zip(stores, masks)])
    train = JoinedRows([PackedRows(s, ~m, 512) for s, m in zip(stores, masks)])
    steps = round(a.tokens / a.tps)
    args = dict(
        output_dir=f"/tmp/out/{a.name}",
        max_steps=steps,
        per_device_train_batch_size=a.micro,
        gradient_accumulation_steps=a.tps // 512 // a.micro,
        learning_rate=a.lr,
        weight_decay=a.wd,
        bf16=True,
        logging_steps=10,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        lr_scheduler_type="cosine",
        warmup_steps=200,
    )
    race = Race(held, tokenizer, max(1, steps // a.evals), steps)
    if a.seed_recipe:
        rows = []
        for s, m in zip(stores, masks):
            for d in np.flatnonzero(~m):
                doc = s.tokens[int(s.document_starts[d]) : int(s.document_starts[d + 1]) - 1]
                rows += [np.asarray(doc[i : i + 512]).astype(np.int64) for i in range(0, len(doc) - 511, 512)]
        data = [{"input_ids": torch.from_numpy(r), "labels": torch.from_numpy(r)} for r in rows]
        config = AutoConfig.for_model(**(wiki.MODEL | dict(vocab_size=len(tokenizer), max_position_embeddings=512)))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        trainer = Trainer(model, TrainingArguments(**args), train_dataset=data)
    else:
        args |= dict(
            lr_scheduler_type=a.schedule,
            lr_scheduler_kwargs=json.loads(a.kwargs),
            warmup_steps=a.warmup,
            adam_beta2=a.beta2,
            per_device_eval_batch_size=a.micro,
            max_grad_norm=a.clip,
        )
        model = model_from_config(wiki.MODEL | json.loads(a.shape), tokenizer, 512)
        use_fused_loss(model)
        trainer = PretrainingTrainer(
            model,
            TrainingArguments(**args),
            train,
            held,
            a.tps // 512,
            "muon" if a.muon else "adamw",
            processing_class=tokenizer,
        )
    trainer.add_callback(race)
    trainer.train()
    last = race.points[-1]
    f5 = next(x for x in race.points if x[0] == 5)
    rate = (steps - 5) * a.tps / (last[1] - f5[1])
    line = f"{a.name:34} steps {steps} tok/s {rate:>9,.0f} first5 {f5[1]:.1f}s total {last[1]:.1f}s  bpb {last[2]:.4f}  curve {[(round(x[1]), round(x[2], 3)) for x in race.points if x[2]]} peak {torch.cuda.max_memory_allocated() / 2**30:.1f} params {sum(q.numel() for q in model.parameters()) / 1e6:.1f}M train_tokens {train.stream_tokens / 1e6:.2f}M held_bytes {race.bytes}"
    print(line, flush=True)
    Path(a.out).mkdir(exist_ok=True, parents=True)
    (Path(a.out) / f"{a.name}.txt").write_text(line + "\n")


if __name__ == "__main__":
    main()
