"""What Trainer does, as a loop to read: the run of wiki_zh_scratch.py on Accelerate alone, with the same losses.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/explicit_loop.py --sample

The same YAMLs and hyperparameters. Not here: context parallelism, --model, --plan, recompute by flag, trackers,
samples, test rows, and what common/train/safety.py does. A flag that only Trainer would read is refused."""

import common.console  # noqa: F401  # isort: skip  # before the libraries that it keeps quiet

import json
import math
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin, gather_object
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, TrainingArguments, get_scheduler, set_seed

from common.arguments import SharedArguments
from common.console import say
from common.corpus.download import download
from common.corpus.sources import resolve_sources
from common.dataset.ledger import Ledger
from common.dataset.mixture import IGNORED_ROW, TrainingOrder, rows_asked_for
from common.dataset.packing import collate_rows
from common.dataset.rows import split_rows
from common.distributed.context_parallel import parallel_size
from common.distributed.launch import launch_defaults
from common.distributed.strategy import gather_layers_whole, reduce_in_fp32, under_fsdp
from common.model.attention import DOCUMENTS, block_mask, choose_attention
from common.model.from_config import model_from_config, residual_stream_in_bf16
from common.model.fused_loss import use_fused_loss
from common.run.checkpoints import finish_checkpoint, prune_checkpoints, unfinished
from common.run.folder import check_disk_space, claim_output_folder, finished_results, last_checkpoint, run_identity
from common.tokens.tokenizer import load_tokenizer, tokenizer_fingerprint
from common.tokens.train_tokenizer import tokenizer_trained_on
from common.tokens.writer import token_store_of
from common.train.muon import MuonWithAdamW
from common.train.preflight import preflight
from common.train.schedule import schedule_settings

ROOT = Path(__file__).resolve().parent.parent
NOT_READ = {"swanlab", "plan", "probe", "init_from", "save_minutes", "on_save_error", "max_bad_steps", "on_loss_spike"}
MODEL = dict(model_type="qwen2", hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
             num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
DATA = dict(data=None, tokenizer="Qwen/Qwen2-0.5B", context_length=512, held_out_fraction=0.005,
            cache_dir=str(ROOT / "data" / "cache"), swanlab="off")  # fmt: skip
TRAINING = dict(output_dir=str(ROOT / "outputs" / "explicit_loop"), num_train_epochs=2, max_steps=-1, seed=42,
                tokens_per_step=65_536, per_device_train_batch_size=64, gradient_accumulation_steps=0,  # 0: derived
                optimizer="auto", learning_rate=0.0, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8,
                lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 0.3}, weight_decay=0.1,
                max_grad_norm=1.0, logging_steps=10, logging_first_step=True, eval_steps=200, save_steps=200,
                per_device_eval_batch_size=64, save_total_limit=2, warmup_steps=0.03, ddp_timeout=6 * 3600)  # fmt: skip
LEARNING_RATES = {"muon": 4e-3, "adamw": 1e-3}
SAMPLE_MODEL = MODEL | dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4)
SAMPLE = dict(data=[str(ROOT / "data" / "sample_zh.jsonl")], tokenizer="train", vocabulary_size=4096, eval_steps=300,
              context_length=128, held_out_fraction=0.05, tokens_per_step=512, per_device_train_batch_size=4,
              output_dir=str(ROOT / "outputs" / "explicit_loop_sample"), optimizer="adamw", learning_rate=1e-3,
              max_steps=900, logging_steps=50, save_steps=300)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    # Flags: the dicts above are defaults, any flag overrides. What only Trainer would read is refused.
    parser = HfArgumentParser((SharedArguments, TrainingArguments), allow_abbrev=False)
    parser.add_argument("--sample", action="store_true", help="Train a small model on the bundled articles, offline.")
    parser.set_defaults(**DATA, **TRAINING, **launch_defaults())
    if sample := parser.parse_args(argv).sample:
        parser.set_defaults(**SAMPLE)
    given, defaults = parser.parse_args(argv), parser.parse_args([])
    for name in {*NOT_READ, *TrainingArguments.__dataclass_fields__} - {*TRAINING, "disable_tqdm"}:
        if getattr(given, name) != getattr(defaults, name):
            parser.error(f"--{name}: not read here. Precision and devices are the launcher's; or wiki_zh_scratch.py.")
    parallel_size("cp") == 1 or parser.error("context parallelism: rows are not divided here; wiki_zh_scratch.py does.")
    shared, training, _ = parser.parse_args_into_dataclasses(argv)
    rows_per_step, optimizer_name = preflight(Path(__file__).name, shared, training, learning_rates=LEARNING_RATES)
    set_seed(training.seed)

    # Accelerate: precision, strategy and compile come from the launcher's YAML. Gradients are added up in fp32.
    accumulation = GradientAccumulationPlugin(training.gradient_accumulation_steps, None, False, under_fsdp())
    copying = DataLoaderConfiguration(non_blocking=True)
    accelerator = Accelerator(gradient_accumulation_plugin=accumulation, dataloader_config=copying)
    reduce_in_fp32(accelerator)
    if accelerator.distributed_type == "DEEPSPEED":  # its engine accumulates and clips by itself
        own = {"gradient_accumulation_steps": accumulation.num_steps, "gradient_clipping": training.max_grad_norm}
        accelerator.state.deepspeed_plugin.deepspeed_config |= own | {"data_types": {"grad_accum_dtype": "fp32"}}

    # Tokenizer and data: the first process of each machine prepares them, the others wait and find them.
    with accelerator.local_main_process_first():
        sources = resolve_sources(shared.data or [str(download("wiki-zh", ROOT / "data", verify=False)[0])])
        name = shared.tokenizer
        tokenizer = tokenizer_trained_on(sources, shared) if name == "train" else load_tokenizer(name, shared.end_token)
        stores = [token_store_of(source, tokenizer, shared) for source in sources]
    train_rows, eval_rows, _, ledgers = split_rows(dict(enumerate(stores)), shared)
    say(f"ledger: {sum(ledgers.values(), Ledger())}")
    steps = math.ceil((rows := rows_asked_for(training, rows_per_step, len(train_rows))) / rows_per_step)

    # Model, randomly initialised; the seed was set above, so every process builds the same one.
    model = model_from_config(shape := SAMPLE_MODEL if sample else MODEL, tokenizer, shared.context_length, training)
    model.config.pad_token_id, model.config.use_cache = None, False  # the first: see model_from_config
    choose_attention(model, shared.attn_implementation, shared.packing == "isolated", accelerator.device)
    documents = model.config._attn_implementation == DOCUMENTS  # flex attention, which needs their borders
    masked = (lambda batch: batch | {"document_mask": block_mask(batch["position_ids"])}) if documents else dict
    use_fused_loss(model)
    residual_stream_in_bf16(model)
    gather_layers_whole(accelerator.state.deepspeed_plugin, model)
    training.gradient_checkpointing and model.gradient_checkpointing_enable()  # where the launcher's YAML asks for it

    # One folder, one run: relaunching continues it, and a finished one is only shown.
    folder = Path(training.output_dir)
    launch = [accelerator.distributed_type, accelerator.num_processes, accelerator.state.dynamo_plugin.backend]
    deciding = {"rows": rows, "rows_per_step": rows_per_step, "optimizer": optimizer_name, "launch": launch}
    deciding |= {"documents": [store.fingerprint() for store in stores], "tokenizer": tokenizer_fingerprint(tokenizer)}
    with accelerator.main_process_first():
        identity = run_identity(Path(__file__).name, shape, deciding, shared, training)
        _lock = claim_output_folder(folder, identity, shared.allow_changes)  # until this process ends
    if results := finished_results(folder, steps, rows * shared.context_length):
        return say(f"{folder} is finished; nothing to train. Held-out loss: {results['eval_loss']:.4f}")
    check_disk_space(folder, model.num_parameters(), training)
    checkpoint = last_checkpoint(folder)
    state = json.loads(Path(checkpoint, "trainer_state.json").read_text()) if checkpoint else {}
    first_step, log = state.get("global_step", 0), folder / "log.jsonl"
    with open(log, "ab") as file:
        file.truncate(min(file.tell(), state.get("log_bytes", 0)))  # a run cut off has logged beyond its checkpoint

    # Batches: training starts at the checkpoint's row. Ignored rows complete the last step and the evaluation.
    order = TrainingOrder([len(source) for source in train_rows.sources], training.seed, train_rows.weights)
    order.lay_out(first_step * rows_per_step, rows, steps * rows_per_step)
    eval_batch, eval_targets = training.per_device_eval_batch_size, len(eval_rows.targets())
    ignored = [IGNORED_ROW] * (-len(eval_rows) % (eval_batch * accelerator.num_processes))
    loading = dict(collate_fn=collate_rows, pin_memory=accelerator.device.type == "cuda", generator=torch.Generator())
    train_batches = DataLoader(train_rows, training.per_device_train_batch_size, sampler=order, **loading)
    eval_batches = DataLoader(eval_rows, eval_batch, sampler=[*range(len(eval_rows)), *ignored], **loading)

    # Optimizer and schedule. Norms and biases, the vectors, have no weight decay.
    adamw = dict(lr=training.learning_rate, weight_decay=training.weight_decay, eps=training.adam_epsilon)
    adamw |= dict(betas=(training.adam_beta1, training.adam_beta2), fused=True)
    others = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    if optimizer_name == "muon":
        optimizer = MuonWithAdamW(model, list(others), **adamw)
    else:
        vectors = {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}
        optimizer = torch.optim.AdamW([{"params": list(others.values())}, vectors], **adamw)
    settings = schedule_settings(training, steps)
    schedule = get_scheduler(training.lr_scheduler_type, optimizer, training.get_warmup_steps(steps), steps, settings)
    model, optimizer, train_batches, eval_batches = accelerator.prepare(model, optimizer, train_batches, eval_batches)
    accelerator.register_for_checkpointing(schedule)  # prepared, it would step once for every process
    checkpoint and accelerator.load_state(checkpoint)

    every = (training.logging_steps, training.eval_steps, training.save_steps)  # below 1: a share of all; 0: never
    log_every, eval_every, save_every = (math.ceil(n if n >= 1 else n * steps) or math.inf for n in every)
    batches, loss_sum, logged_step = iter(train_batches), 0.0, first_step
    for step in range(first_step + 1, steps + 1):
        step_batches = [next(batches) for _ in range(accumulation.num_steps)]
        targets = accelerator.reduce(sum(batch["labels"].ne(-100).sum() for batch in step_batches), "sum")
        for batch in step_batches:
            with accelerator.accumulate(model):  # processes exchange their gradients in the last micro-batch only
                loss = model(**masked(batch), num_items_in_batch=targets).loss
                # Accelerate divides by the micro-batches, and averages over the processes; targets counts them all.
                accelerator.backward(loss * accumulation.num_steps * accelerator.num_processes)
                loss_sum += loss.detach()
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), training.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        entry, saving = {"step": step}, step % save_every == 0 or step == steps
        if saving or step % log_every == 0 or (step == 1 and training.logging_first_step):
            entry["loss"] = accelerator.reduce(loss_sum, "sum").item() / (step - logged_step)  # mean since the last log
            entry |= {"grad_norm": float(grad_norm), "learning_rate": schedule.get_last_lr()[0]}
            entry["tokens_seen"] = min(step * rows_per_step, rows) * shared.context_length
            loss_sum, logged_step = 0.0, step
        if step % eval_every == 0 or step == steps:
            model.eval()
            with torch.no_grad():
                shares = [model(**masked(batch), num_items_in_batch=eval_targets).loss.item() for batch in eval_batches]
            model.train()
            entry |= {"eval_loss": sum(gather_object(shares)), "eval_tokens": eval_targets}
        if len(entry) > 1 and accelerator.is_main_process:
            print(json.dumps(entry), flush=True)
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        accelerator.optimizer_step_was_skipped or schedule.step()  # skipped after an overflow in fp16
        if saving:
            accelerator.save_state(unfinished(folder, step))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:  # the checkpoint gets its name when it is whole
                state = {"global_step": step, "steps": step, "log_bytes": log.stat().st_size, **entry}
                (unfinished(folder, step) / "trainer_state.json").write_text(json.dumps(state))
                finish_checkpoint(folder, step, accelerator.num_processes)
                prune_checkpoints(folder, training.save_total_limit)

    # Save the model, and the last log as results.
    weights = {name.replace("_orig_mod.", ""): weight for name, weight in accelerator.get_state_dict(model).items()}
    if accelerator.is_main_process:
        accelerator.unwrap_model(model, keep_torch_compile=False).save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        (folder / "all_results.json").write_text(json.dumps(state, indent=1))
    accelerator.end_training()


if __name__ == "__main__":
    main()
