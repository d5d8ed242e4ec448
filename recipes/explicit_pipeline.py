"""Pipeline parallelism, as a loop to read: the run of explicit_loop.py on a model cut into stages, with its losses.

    accelerate launch --config_file accelerate_configs/cpu_2proc.yaml recipes/explicit_pipeline.py --sample

Each process has some of the layers. Micro-batches go through the stages, forward and backward, as a schedule of
torch.distributed.pipelining says. While the first comes and the last goes, processes wait: the bubble, which is logged.
With --pipeline_processes 2, four processes are two pipelines, on different rows. On GPUs: ddp.yaml (not tried yet).
"""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B
from transformers import PreTrainedModel, TrainingArguments, set_seed

from common.arguments import parse_flags
from common.console import say
from common.corpus.download import download
from common.corpus.sources import resolve_sources
from common.dataset.mixture import training_order
from common.dataset.packing import IGNORED_ROW, IGNORED_TARGET, collate_rows
from common.dataset.rows import build_rows
from common.distributed import pipeline as pipelines
from common.distributed.launch import read_launch
from common.model.attention import DOCUMENTS, block_mask, set_attention
from common.model.from_config import keep_residual_in_bf16, model_from_config, residual_dtype
from common.model.fused_loss import use_fused_loss
from common.model.presets import ModelSize
from common.run.checkpoints import unfinished
from common.run.folder import open_run
from common.run.identity import run_identity
from common.run.step_log import StepLog
from common.tokens.tokenizer import load_tokenizer, vocabulary_size
from common.tokens.train_tokenizer import tokenizer_trained_on
from common.tokens.writer import tokenize
from common.train.muon import muon_or_adamw
from common.train.preflight import preflight
from common.train.schedule import is_due, keep_settings, make_schedule, settings_of

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
    output_dir=str(ROOT / "outputs" / "explicit_pipeline"),
    num_train_epochs=2,
    max_steps=-1,  # -1: as many as the passes take
    tokens_per_step=65_536,
    optimizer="auto",
    learning_rate=0.0,  # 0: that of the optimizer in LEARNING_RATES
    per_device_train_batch_size=8,  # of a micro-batch: 16 a step, so that the bubble is small
    gradient_accumulation_steps=0,  # the micro-batches. 0: derived from tokens_per_step
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
    output_dir=str(ROOT / "outputs" / "explicit_pipeline_sample"),
    tokens_per_step=1024,
    per_device_train_batch_size=2,
    max_steps=400,
    weight_decay=3.0,
    logging_steps=20,
    eval_steps=100,
    save_steps=100,
)

NOT_READ = {"swanlab", "plan", "probe", "init_from", "save_minutes", "on_save_error", "max_bad_steps", "on_loss_spike"}
NOT_READ |= {"branch_from", "eval_tasks", "eval_tasks_every", "language", "recompute", "cuda_graph"}
NOT_READ |= {*TrainingArguments.__dataclass_fields__} - {*TRAINING, "disable_tqdm"}


@dataclass
class RecipeArguments:
    """Flags of this recipe alone."""

    sample: bool = field(default=False, metadata={"help": "Train a small model on the bundled articles, offline."})
    stages_per_process: int = field(default=1, metadata={"help": "1: schedule 1F1B. 2 or more: interleaved 1F1B."})
    pipeline_processes: int = field(default=0, metadata={"help": "Processes of each pipeline. 0: all are one."})


class Stage(torch.nn.Module):
    """What a stage computes: token ids or hidden states -> hidden states, in the last stage the loss."""

    def __init__(self, model: PreTrainedModel, first: bool, last: bool, dtype: torch.dtype, accelerator: Accelerator):
        super().__init__()
        self.model, self.first, self.last, self.dtype, self.accelerator = model, first, last, dtype, accelerator

    def forward(self, passed, labels, targets, position_ids=None):
        """``targets``: of all micro-batches and replicas. Each loss is divided by it, so that the losses add up."""
        inputs = {"input_ids" if self.first else "inputs_embeds": passed, "use_cache": False}
        if position_ids is not None:  # every stage needs them: rotary positions, and where documents begin
            inputs["position_ids"] = position_ids
            if self.model.config._attn_implementation == DOCUMENTS:
                inputs["document_mask"] = block_mask(position_ids)
        with self.accelerator.autocast():
            if self.last:
                return self.model(**inputs, labels=labels, shift_labels=labels, num_items_in_batch=targets).loss
            return self.model.base_model(**inputs).last_hidden_state.to(self.dtype)


def main(argv: list[str] | None = None) -> None:
    # Flags: the dicts above are defaults, any flag overrides. What only Trainer would read is refused.
    launch = read_launch()
    defaults = DATA | TRAINING | launch.defaults()
    own, shared, training = parse_flags(RecipeArguments, argv, defaults, NOT_READ, sample=SAMPLE)
    launch = pipelines.divide_launch(launch, own.pipeline_processes, own.stages_per_process)
    size = ModelSize(SAMPLE_MODEL if own.sample else MODEL, None, None, shared)
    launch = preflight(RECIPE, launch, None, shared, training, LEARNING_RATES)
    processes, micro_batches = launch.pipeline_parallel, training.gradient_accumulation_steps
    replicas, stages = launch.row_readers, processes * own.stages_per_process
    formula = pipelines.bubble_by_formula(processes, micro_batches, own.stages_per_process)
    set_seed(training.seed)

    # Processes: a grid of pipelines (columns) and replicas (rows), which have the same stages and train on other rows.
    accelerator = Accelerator()
    grid = pipelines.Grid(accelerator.device, processes, replicas)

    # Tokenizer and token stores: the first process of each machine makes them, the others wait and find them.
    with accelerator.local_main_process_first():
        names = shared.data or [str(download("wiki-zh", ROOT / "data", verify=False)[0])]
        sources = resolve_sources(names, shared.encoding)
        if shared.tokenizer == "train":
            tokenizer = tokenizer_trained_on(sources, shared)
        else:
            tokenizer = load_tokenizer(shared.tokenizer, shared.end_token)
        stores = {source.name: tokenize(source, tokenizer, shared) for source in sources}

    # Rows, and the whole model with random weights, the same on every process. It is cut when all is set.
    rows = build_rows(stores, shared)
    shape = size.shape(vocabulary_size(tokenizer))
    model = model_from_config(shape, tokenizer, shared.context_length, training)
    model.config.pad_token_id = None  # model_from_config says why
    layers = pipelines.divide_layers(model, stages)
    set_attention(model, shared.attn_implementation, shared.packing == "isolated", grid.device)
    use_fused_loss(model)  # the logits of a micro-batch, its largest tensor, are never held
    keep_residual_in_bf16(model)  # what layers pass on to each other; autocast would keep it in fp32
    dtype = residual_dtype(model, accelerator.mixed_precision)  # of what stages pass on
    say(f"pipelines: {replicas} of {processes} processes; bubble by formula: {formula:.1%}")
    # One folder, one run: continued if it was interrupted, shown if it is finished.
    order = training_order(rows.train, training, launch.rows_per_step)
    steps = training.max_steps
    more = dict(rows=order.rows_in_run, optimizer=launch.optimizer)
    more["launch"] = [processes, replicas, stages, launch.compiler]
    identity = run_identity(RECIPE, shape, rows, tokenizer, launch, shared, training, more)
    with open_run(identity, shared, training) as run:
        results = run.finished(order)
        if results is not None:
            return say(f"{run.folder} is finished; nothing to train. Held-out loss: {results['eval_loss']:.4f}")
        run.check_disk_space(model.num_parameters(), launch.strategy, training)
        checkpoint = run.last_checkpoint()
        log = StepLog(run.folder)
        state = log.continue_from(checkpoint)
        first_step = state.get("global_step", 0)

        # Rows: every process of a pipeline reads the same ones. Ignored rows complete the last step and the evaluation.
        order.begin_at(first_step, state.get("tokens_seen", 0) // shared.context_length, training)
        eval_targets = len(rows.held_out.targets())
        eval_order = [*range(len(rows.held_out)), *[IGNORED_ROW] * (-len(rows.held_out) % launch.rows_per_step)]
        eval_rows = [eval_order[i : i + launch.rows_per_step] for i in range(0, len(eval_order), launch.rows_per_step)]

        def batch_of(rows, numbers) -> dict[str, torch.Tensor]:
            """Return the rows ``numbers``, of which each replica takes its share."""
            batch = collate_rows(rows.__getitems__(numbers[grid.replica :: replicas]))
            return {name: batch[name].to(grid.device) for name in batch if name != "shift_labels"}  # the same as labels

        # The cut: of 2 processes with 2 stages each, the first has stages 0 and 2, the second has 1 and 3. Shapes are
        # given: torch would find them out by one more forward and backward, which draw random numbers.
        ids = torch.empty(training.per_device_train_batch_size, shared.context_length, dtype=torch.int64, device="meta")
        hidden = torch.empty(*ids.shape, shape["hidden_size"], dtype=dtype, device="meta", requires_grad=True)
        passed_on = [ids, *[hidden] * (stages - 1), torch.empty((), device="meta", requires_grad=True)]  # the loss
        parts, own_stages = torch.nn.ModuleList(), []
        for number in range(grid.position, stages, processes):
            first, last = number == 0, number == stages - 1
            parts.append(pipelines.cut(model, layers[number], first, last).to(grid.device))
            stage = Stage(parts[-1], first, last, dtype, accelerator)
            own_stages.append(pipelines.TimedStage(stage, number, stages, grid, *passed_on[number : number + 2]))
        pipelines.compile_layers(parts, accelerator.state.dynamo_plugin)

        # Optimizer: the whole model's sorts the parameters. Then each process keeps its own, and the rest is freed.
        optimizer = pipelines.keep_only(muon_or_adamw(model, launch.optimizer, training), parts)
        del model
        schedule = make_schedule(training, optimizer, steps)
        own_settings = settings_of(optimizer)
        if checkpoint is not None:
            pipelines.load_stages(Path(checkpoint), grid, parts, optimizer, schedule)
            keep_settings(optimizer, schedule, own_settings)  # this launch's
        run.accept_changes()

        # The schedule. Gradients are not scaled: each loss is divided by the targets of all micro-batches already.
        settings = dict(n_microbatches=micro_batches, loss_fn=lambda loss, labels: loss, scale_grads=False)
        one = own.stages_per_process == 1
        pipeline = Schedule1F1B(own_stages[0], **settings) if one else ScheduleInterleaved1F1B(own_stages, **settings)

        def loss_of(run_schedule, targets, input_ids, labels, **positions) -> torch.Tensor:
            """Return the loss of this replica's share of a batch on the process of the last stage, 0 on the others."""
            losses = []
            given = dict(labels=labels, targets=targets, **positions)  # to every stage
            run_schedule(input_ids, target=labels, losses=losses, return_outputs=False, **given)
            return sum(losses, torch.zeros((), device=grid.device)).detach()

        # The loop.
        tied, counted = pipelines.tied_weight(parts, grid), pipelines.counted_once(parts, grid).values()
        whole = pipelines.Stopwatch(grid.device)
        loss_sum, logged_step = 0.0, first_step
        for step in range(first_step + 1, steps + 1):
            batch = batch_of(rows.train, order.rows_of_step(step))
            targets = batch["labels"].ne(IGNORED_TARGET).sum()
            dist.all_reduce(targets, group=grid.replicas)
            with whole:
                loss_sum += loss_of(pipeline.step, int(targets), **batch)

            # Gradients of all replicas add up. So do the two of a tied embedding, which is used at both ends.
            for parameter in parts.parameters():
                dist.all_reduce(parameter.grad, group=grid.replicas)
            if tied is not None:
                dist.all_reduce(tied.grad, group=grid.ends)
            # The norm is that of the whole model, in which a tied matrix counts once. 0 is no clipping.
            square = torch.nn.utils.get_total_norm([parameter.grad for parameter in counted]).square()
            dist.all_reduce(square, group=grid.pipeline)
            grad_norm = square.sqrt()
            largest_norm = training.max_grad_norm if training.max_grad_norm > 0 else math.inf
            torch.nn.utils.clip_grads_with_norm_(parts.parameters(), largest_norm, grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            entry = {"step": step}
            saving = is_due(training.save_steps, step, steps)
            if saving or is_due(training.logging_steps, step, steps) or (step == 1 and training.logging_first_step):
                mean_loss = accelerator.reduce(loss_sum, "sum").item() / (step - logged_step)  # since the last log
                entry |= {"loss": mean_loss, "grad_norm": grad_norm.item(), "learning_rate": schedule.get_last_lr()[0]}
                entry["tokens_seen"] = order.position_after(step) * shared.context_length
                entry |= pipelines.measured_bubble(own_stages, whole)
                loss_sum, logged_step = 0.0, step
            if is_due(training.eval_steps, step, steps):
                parts.eval()
                with torch.no_grad():
                    batches = (batch_of(rows.held_out, some) for some in eval_rows)
                    share = sum(loss_of(pipeline.eval, eval_targets, **batch) for batch in batches)
                parts.train()
                entry |= {"eval_loss": accelerator.reduce(share, "sum").item(), "eval_tokens": eval_targets}
            log.write(entry)
            schedule.step()
            if saving:
                state, aside = log.state(entry), unfinished(run.folder, step)
                write = partial(pipelines.save_stages, aside, grid, parts, optimizer, schedule, state)
                run.save_checkpoint(step, write, collective=False, keep=training.save_total_limit)

        # Save the model, an ordinary folder of transformers, and the last log as results.
        write = partial(pipelines.write_model, grid=grid, parts=parts, tokenizer=tokenizer)
        run.save_model(write, accelerator.wait_for_everyone)
        log.write_results(state)
        say(f"bubble: {state['bubble']:.1%} of the steps since the last log but one, {formula:.1%} by formula")
    accelerator.end_training()


if __name__ == "__main__":
    main()
