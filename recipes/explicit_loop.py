"""What Trainer does, as a loop to read: the run of wiki_zh_scratch.py on Accelerate alone, with the same losses.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/explicit_loop.py --sample

The YAMLs and hyperparameters are the same. Left out: context parallelism, --model, --plan, recompute by flag, trackers,
samples, test rows, the check of every step, and signals. A flag that only Trainer would read is refused.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin, gather_object, set_seed
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from common.arguments import parse_flags
from common.console import InputError, say
from common.corpus.download import download
from common.corpus.sources import resolve_sources
from common.dataset.mixture import training_order
from common.dataset.packing import IGNORED_ROW, collate_rows
from common.dataset.rows import build_rows
from common.distributed.accelerator import RandomState, pins_memory
from common.distributed.launch import read_launch
from common.distributed.workarounds import gather_layers_whole, reduce_in_fp32
from common.model.attention import DOCUMENTS, block_mask, set_attention
from common.model.from_config import keep_residual_in_bf16, model_from_config
from common.model.fused_loss import use_fused_loss
from common.model.presets import ModelSize
from common.run.checkpoints import finish_checkpoint, prune_checkpoints, unfinished
from common.run.folder import open_run
from common.run.identity import run_identity
from common.run.step_log import StepLog
from common.tokens.tokenizer import load_tokenizer, vocabulary_size
from common.tokens.train_tokenizer import tokenizer_trained_on
from common.tokens.writer import tokenize
from common.train.muon import MuonWithAdamW
from common.train.preflight import preflight
from common.train.schedule import is_due, keep_settings, make_schedule, settings_of
from common.train.step_guard import weights_not_finite

RECIPE = Path(__file__).name
ROOT = Path(__file__).resolve().parent.parent

MODEL = dict(
    model_type="qwen3", hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
    num_key_value_heads=6, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip

DATA = dict(
    data=None,  # None: data/wikipedia-zh-cn-20240820.json, downloaded if it is not there
    tokenizer="train",
    vocabulary_size=32_768,
    context_length=512,
    held_out_fraction=0.005,
    cache_dir=str(ROOT / "data" / "cache"),
    swanlab="off",
)

TRAINING = dict(
    output_dir=str(ROOT / "outputs" / "explicit_loop"),
    num_train_epochs=2,
    max_steps=-1,  # -1: as many as the passes take
    tokens_per_step=65_536,
    optimizer="auto",
    learning_rate=0.0,  # 0: that of the optimizer in LEARNING_RATES
    per_device_train_batch_size=64,
    gradient_accumulation_steps=0,  # 0: derived from tokens_per_step
    per_device_eval_batch_size=64,
    lr_scheduler_type="warmup_stable_decay",
    lr_scheduler_kwargs={"num_decay_steps": 0.3},  # below 1: a share of all steps
    warmup_steps=0.03,  # likewise
    weight_decay=0.1,
    adam_beta1=0.9,
    adam_beta2=0.95,
    adam_epsilon=1e-8,
    max_grad_norm=1.0,
    logging_steps=10,
    logging_first_step=True,
    eval_steps=200,
    save_steps=200,
    save_total_limit=2,
    seed=42,
    ddp_timeout=6 * 3600,  # seconds: the first process downloads and tokenizes while the others wait
)
LEARNING_RATES = {"muon": 5e-3, "adamw": 1e-3}

SAMPLE_MODEL = dict(
    model_type="qwen2", hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
SAMPLE = dict(
    data=[str(ROOT / "data" / "sample_zh.jsonl")],
    tokenizer="train",
    vocabulary_size=4096,
    context_length=128,
    held_out_fraction=0.05,
    output_dir=str(ROOT / "outputs" / "explicit_loop_sample"),
    tokens_per_step=1024,
    per_device_train_batch_size=8,
    max_steps=400,
    weight_decay=3.0,
    logging_steps=20,
    eval_steps=100,
    save_steps=100,
)

NOT_READ = {"swanlab", "plan", "probe", "init_from", "branch_from", "save_minutes", "on_save_error", "max_bad_steps"}
NOT_READ |= {"on_loss_spike", "eval_tasks", "eval_tasks_every", "language", "recompute", "cuda_graph"}
NOT_READ |= set(TrainingArguments.__dataclass_fields__) - {*TRAINING, "disable_tqdm"}


@dataclass
class RecipeArguments:
    """Flags of this recipe alone."""

    sample: bool = field(default=False, metadata={"help": "Train a small model on the bundled articles, offline."})


def main(argv: list[str] | None = None) -> None:
    # Flags: the dicts above are defaults, any flag overrides. What only Trainer would read is refused.
    launch = read_launch()
    defaults = DATA | TRAINING | launch.defaults()
    own, shared, training = parse_flags(RecipeArguments, argv, defaults, NOT_READ, sample=SAMPLE)
    if launch.row_pieces > 1 or launch.building_device is not None:
        raise InputError(f"{launch.dimensions}: rows and weights are not divided here. Use wiki_zh_scratch.py.")
    launch = preflight(RECIPE, launch, None, shared, training, LEARNING_RATES)
    set_seed(training.seed)

    # Accelerate: precision, strategy and compile come from the launcher's YAML. Gradients are added up in fp32.
    micro_batches = training.gradient_accumulation_steps
    accumulation = GradientAccumulationPlugin(micro_batches, adjust_scheduler=False, sync_with_dataloader=False)
    accumulation.sync_each_batch = launch.strategy.is_fsdp  # FSDP2 would keep whole gradients between micro-batches
    copying = DataLoaderConfiguration(non_blocking=True)
    accelerator = Accelerator(gradient_accumulation_plugin=accumulation, dataloader_config=copying)
    reduce_in_fp32(accelerator)
    deepspeed = accelerator.state.deepspeed_plugin
    if deepspeed is not None:  # DeepSpeed's engine accumulates and clips by itself
        deepspeed.deepspeed_config["gradient_accumulation_steps"] = micro_batches
        deepspeed.deepspeed_config["gradient_clipping"] = training.max_grad_norm
        deepspeed.deepspeed_config["data_types"] = {"grad_accum_dtype": "fp32"}

    # Tokenizer and token stores: the first process of each machine makes them, the others wait and find them.
    with accelerator.local_main_process_first():
        names = shared.data or [str(download("wiki-zh", ROOT / "data", verify=False)[0])]
        sources = resolve_sources(names, shared.encoding)
        if shared.tokenizer == "train":
            tokenizer = tokenizer_trained_on(sources, shared)
        else:
            tokenizer = load_tokenizer(shared.tokenizer, shared.end_token)
        stores = {source.name: tokenize(source, tokenizer, shared) for source in sources}

    # Rows, and the model: random weights. The seed was set above, so every process draws the same ones.
    rows = build_rows(stores, shared)
    shape = ModelSize(SAMPLE_MODEL if own.sample else MODEL, None, None, shared).shape(vocabulary_size(tokenizer))
    model = model_from_config(shape, tokenizer, shared.context_length, training)
    model.config.pad_token_id = None  # model_from_config says why
    model.config.use_cache = False
    if launch.offloads:
        model.cpu()
    set_attention(model, shared.attn_implementation, shared.packing == "isolated", accelerator.device)
    model_attention = model.config._attn_implementation
    use_fused_loss(model)  # the logits of a micro-batch, its largest tensor, are never held
    has_router_loss = model.router_coefficient > 0  # of a mixture of experts: common/model/router_loss.py
    keep_residual_in_bf16(model)  # what layers pass on to each other; autocast would keep it in fp32
    gather_layers_whole(deepspeed, model, launch.compiled)
    if training.gradient_checkpointing:  # where the launcher's YAML asks for it
        model.gradient_checkpointing_enable()

    def losses_of(batch: dict[str, torch.Tensor], targets: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the losses divided by ``targets``, and the part that a router adds to it in training."""
        if model_attention == DOCUMENTS:  # flex attention is told where documents begin
            batch = batch | {"document_mask": block_mask(batch["position_ids"])}
        output = model(**batch, num_items_in_batch=targets)
        return output.loss, output.aux_loss if has_router_loss and model.training else torch.zeros_like(output.loss)

    # One folder, one run: continued if it was interrupted, shown if it is finished.
    order = training_order(rows.train, training, launch.rows_per_step)
    steps = training.max_steps
    more = {"rows": order.rows_in_run, "optimizer": launch.optimizer}
    more["launch"] = [accelerator.distributed_type, accelerator.num_processes, accelerator.state.dynamo_plugin.backend]
    identity = run_identity(RECIPE, shape, rows, tokenizer, launch, shared, training, more)
    with open_run(identity, shared, training) as run:
        if results := run.finished(order):
            return say(f"{run.folder} is finished; nothing to train. Held-out loss: {results['eval_loss']:.4f}")
        run.check_disk_space(model.num_parameters(), launch.strategy, training)
        folder = Path(run.folder)
        checkpoint = run.last_checkpoint()
        log = StepLog(folder)
        state = log.continue_from(checkpoint)
        first_step = state.get("global_step", 0)

        # Batches: training starts at the checkpoint's row. Ignored rows complete the last step and the evaluation.
        order.begin_at(first_step, state.get("tokens_seen", 0) // shared.context_length, training)
        eval_rows = training.per_device_eval_batch_size * accelerator.num_processes
        eval_targets = len(rows.held_out.targets())
        eval_order = [*range(len(rows.held_out)), *[IGNORED_ROW] * (-len(rows.held_out) % eval_rows)]
        loading = dict(collate_fn=collate_rows, pin_memory=pins_memory(accelerator.device))
        loading["generator"] = torch.Generator()  # its own: a loader draws a number whenever it starts
        train_batches = DataLoader(rows.train, training.per_device_train_batch_size, sampler=order, **loading)
        eval_batches = DataLoader(rows.held_out, training.per_device_eval_batch_size, sampler=eval_order, **loading)

        # Optimizer and schedule. Norms and biases, the vectors, have no weight decay.
        adamw = dict(lr=training.learning_rate, eps=training.adam_epsilon, weight_decay=training.weight_decay)
        adamw |= dict(betas=(training.adam_beta1, training.adam_beta2), fused=True)
        decayed = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() >= 2}
        if launch.optimizer == "muon":
            optimizer = MuonWithAdamW(model, list(decayed), **adamw)
        else:
            vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
            groups = [{"params": list(decayed.values())}, {"params": vectors, "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(groups, **adamw)
        schedule = make_schedule(training, optimizer, steps)
        prepared = accelerator.prepare(model, optimizer, train_batches, eval_batches)
        model, optimizer, train_batches, eval_batches = prepared
        accelerator.register_for_checkpointing(schedule)  # prepared, it would step once for every process
        if accelerator.device.type in ("mps", "npu"):  # whose random numbers Accelerate does not save
            accelerator.register_for_checkpointing(RandomState(accelerator.device))
        settings = settings_of(optimizer)
        if checkpoint is not None:
            accelerator.load_state(checkpoint)
            keep_settings(optimizer, schedule, settings)  # this launch's
        run.accept_changes()

        # The loop.
        batches = iter(train_batches)
        sums, logged_step = torch.zeros(2, device=accelerator.device), first_step  # the tokens' losses, the router's
        for step in range(first_step + 1, steps + 1):
            step_batches = [next(batches) for _ in range(micro_batches)]
            targets = accelerator.reduce(sum(batch["labels"].ne(-100).sum() for batch in step_batches), "sum")
            for batch in step_batches:
                with accelerator.accumulate(model):  # processes exchange gradients in the last micro-batch only
                    loss, router = losses_of(batch, targets)
                    # ``targets`` counts those of all micro-batches and processes: undo Accelerate's divisions by both.
                    accelerator.backward(loss * micro_batches * accelerator.num_processes)
                    sums += torch.stack([loss - router, router]).detach()
            # 0 is no clipping, and the norm is still logged.
            largest_norm = training.max_grad_norm if training.max_grad_norm > 0 else math.inf
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), largest_norm)
            optimizer.step()
            optimizer.zero_grad()

            entry = {"step": step}
            saving = is_due(training.save_steps, step, steps)
            logging = is_due(training.logging_steps, step, steps) or (step == 1 and training.logging_first_step)
            if saving or logging:
                means = [total / (step - logged_step) for total in accelerator.reduce(sums, "sum").tolist()]
                entry |= {"loss": means[0], "grad_norm": float(grad_norm)}
                entry |= {"router_loss": means[1]} if has_router_loss else {}
                entry["learning_rate"] = schedule.get_last_lr()[0]
                entry["tokens_seen"] = order.position_after(step) * shared.context_length
                sums, logged_step = torch.zeros_like(sums), step
            if is_due(training.eval_steps, step, steps):
                model.eval()
                with torch.no_grad():
                    shares = [losses_of(batch, eval_targets)[0].item() for batch in eval_batches]
                model.train()
                entry |= {"eval_loss": sum(gather_object(shares)), "eval_tokens": eval_targets}
            log.write(entry)
            if not accelerator.optimizer_step_was_skipped:  # fp16 skips a step after an overflow
                schedule.step()
            if saving:
                if problem := weights_not_finite(model):
                    raise InputError(f"step {step} is not saved: {problem}; {run.way_back()}.")
                accelerator.save_state(unfinished(folder, step))
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:  # the checkpoint gets its name when it is whole
                    state = log.state(entry)
                    (unfinished(folder, step) / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
                    finish_checkpoint(folder, step, accelerator.num_processes)
                    prune_checkpoints(folder, training.save_total_limit)

        # Save the model, and the last log as results.
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            weights = {name.replace("_orig_mod.", ""): weight for name, weight in weights.items()}
            accelerator.unwrap_model(model, keep_torch_compile=False).save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
            log.write_results(state)
    accelerator.end_training()


if __name__ == "__main__":
    main()
