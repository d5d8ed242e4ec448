"""The largest run on one card of 16 GB: all parameters of up to 3B, or adapters beside 7B, continued on your own text.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/low_memory_16gb.py \
        --model Qwen/Qwen2.5-1.5B --data my-text.jsonl

All parameters: in bf16, AdamW's states in 8 bits, activations recomputed, logits never held. The update of each weight
is rounded stochastically, because bf16 loses small updates (train/low_memory_adamw.py). 3B leaves no room for gradients
either: the optimizer steps inside backward, at the price of one micro-batch a step and no clipping:

    ... recipes/low_memory_16gb.py --model Qwen/Qwen2.5-3B --data my-text.jsonl \
        --step_in_backward --tokens_per_step 2048 --max_grad_norm 0 --learning_rate 5e-6

Adapters (LoRA) beside frozen weights, which QLoRA keeps in 4 bits; merged at the end into a plain checkpoint:

    ... recipes/low_memory_16gb.py --method qlora --model Qwen/Qwen2.5-7B --data my-text.jsonl

T4 and V100 have no bf16: add --mixed_precision fp16 before the recipe. The fp16 scaler needs weights in fp32. That
leaves room for all parameters of 0.5B, for adapters beside 1.5B, or for 7B in 4 bits: --plan names what fits, with the
whole commands. To try the recipe on a CPU: --optim adamw_torch. Any flag overrides the values below; --help shows them.
The same command again continues where the run stopped.

Result: all parameters of 3B in 13.8 GiB, 3,505 tokens/s, stepping inside backward, one row of 2,048 tokens a step, on
an H100 limited to 15.5 GiB (commit 37454be, 2026-11-22). More, with versions: benchmarks/results/.
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import set_seed

from common.arguments import parse_flags
from common.console import say
from common.corpus.download import download
from common.corpus.sources import resolve_sources
from common.dataset.mixture import training_order
from common.dataset.rows import beginnings, build_rows, unigram_loss
from common.distributed.launch import read_launch
from common.model.adapters import ALL_LINEAR, add_adapters, check_adapters, four_bits, unpacked_gguf
from common.model.attention import set_attention
from common.model.counts import parameters_in_words
from common.model.from_config import keep_residual_in_bf16
from common.model.fused_loss import use_fused_loss
from common.model.memory import state_bits
from common.model.presets import PretrainedSize
from common.model.pretrained import (
    check_fit,
    files_fingerprint,
    find_model,
    model_without_memory,
    pretrained_model,
    weights_fingerprint,
)
from common.run.branch import begin_branch
from common.run.folder import open_run
from common.run.identity import run_identity
from common.run.merge_adapters import is_merged, save_merged
from common.run.report import ReportCallback
from common.run.results import save_results, summary, where_to_look
from common.run.tracking import swanlab_callbacks
from common.tokens.tokenizer import load_tokenizer
from common.tokens.writer import tokenize
from common.train.callbacks import SampleCallback
from common.train.eval_tasks import EvalTasks
from common.train.forgetting import MeasureBefore, before_and_after, figures_before
from common.train.low_memory import check_method, check_step_in_backward, compute_dtype, optimizer_for, trained_dtype
from common.train.plan import print_plan
from common.train.preflight import preflight
from common.train.probe import probe
from common.train.setting import take_precision_of_yaml, yaml_to_plan
from common.train.trainer import PretrainingTrainer

RECIPE = Path(__file__).name
ROOT = Path(__file__).resolve().parent.parent

MODEL = dict(model="Qwen/Qwen2.5-1.5B")

DATA = dict(
    data=None,  # None: OpenWebText in data/, downloaded if it is not there: 80 files in one folder
    tokenizer=None,  # None: the model's own
    context_length=2048,
    held_out_fraction=0.0005,  # of the documents: of OpenWebText's 8 million, some 4,000, 4.5M tokens
    max_eval_rows=200,  # of 2,048 tokens: a small card takes minutes for more
    cache_dir=str(ROOT / "data" / "cache"),
)

TRAINING = dict(
    output_dir=str(ROOT / "outputs" / "low_memory_16gb"),
    max_steps=1000,  # 66M tokens; for passes over the data: --max_steps -1 --num_train_epochs 1
    tokens_per_step=65_536,  # 32 rows of 2,048: 1 row x 1 process x 2,048 x 32 accumulated
    gradient_accumulation_steps=0,  # 0: derived from tokens_per_step
    per_device_train_batch_size=1,  # 2,048 tokens keep the matrices of 1.5B busy; activations and logits stay small
    per_device_eval_batch_size=1,
    gradient_checkpointing=True,  # activations of a layer are computed again when backward needs them
    optim="adamw_8bit",  # bitsandbytes; for adapters and fp32 weights also paged_adamw_8bit: moves to RAM when short
    optimizer="adamw",
    learning_rate=2e-5,
    lr_scheduler_type="cosine_with_min_lr",
    lr_scheduler_kwargs={"min_lr_rate": 0.1},  # down to 10%
    warmup_steps=0.01,  # below 1: a share of all steps
    weight_decay=0.1,  # Trainer leaves norms and biases out
    adam_beta2=0.95,  # as usual in pretraining: 0.999 averages over more steps than a short run has
    max_grad_norm=1.0,
    logging_steps=10,
    logging_first_step=True,
    logging_nan_inf_filter=False,  # show a loss of NaN
    eval_strategy="steps",
    eval_steps=200,
    save_steps=200,
    save_total_limit=1,  # 4 bytes a parameter
    seed=42,
    ddp_timeout=6 * 3600,  # seconds: the first process downloads and tokenizes while the others wait
    report_to="none",  # for trackers other than SwanLab, whose flag is --swanlab
)

# --method lora, qlora: they learn best at about ten times the rate. Source: https://thinkingmachines.ai/blog/lora/
ADAPTERS = dict(output_dir=str(ROOT / "outputs" / "low_memory_lora"), learning_rate=2e-4, weight_decay=0.0)

PROMPTS = None  # None: how some of the held-out text begins; otherwise a list, such as ["The meaning of life is"]


# fmt: off
@dataclass
class RecipeArguments:
    """Flags of this recipe alone."""

    model: str = field(default=MODEL["model"], metadata={
        "help": "Weights to continue from: a local folder, a .gguf file, a ModelScope or Hugging Face id."})
    method: str = field(default="full", metadata={"choices": ["full", "lora", "qlora"],
        "help": "full: train all parameters. lora: adapters beside them. qlora: adapters, the rest in 4 bits."})
    weights: str = field(default="auto", metadata={"choices": ["auto", "bf16", "fp32"],
        "help": "Dtype of the weights of --method full. auto: bf16 where the YAML says bf16, else fp32."})
    step_in_backward: bool = field(default=False, metadata={
        "help": "Step the optimizer inside backward, so that the gradients are never all held. For one process and one "
        "micro-batch a step (--tokens_per_step = rows x --context_length), with --max_grad_norm 0."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters; their product is scaled by 2."})
    lora_targets: list[str] = field(default_factory=lambda: [ALL_LINEAR], metadata={
        "help": "Layers that get adapters, such as q_proj v_proj; left out: all linear layers but the head."})
    train_embedding: bool = field(default=False, metadata={"help": "With adapters: train the input embedding, too."})
    accept_weak_weights: bool = field(default=False, metadata={
        "help": "Also continue weights that predict this text no better than the frequency of its tokens does."})
    merge_only: bool = field(default=False, metadata={"help": "Only merge the finished adapter of --output_dir."})
# fmt: on


def main(argv: list[str] | None = None) -> None:
    # The launcher's YAML decides strategy, precision, compile and recompute. It is read once, here.
    launch = read_launch()
    # Flags: the dicts are defaults, --method lora or qlora swaps in ADAPTERS, any flag overrides, unknown ones fail.
    own, shared, training = parse_flags(RecipeArguments, argv, DATA | TRAINING | launch.defaults(), method=ADAPTERS)
    size = PretrainedSize(own.model)
    size.shorten_rows(shared)
    adapters = own.method != "full"
    if own.merge_only:  # by one process, whatever the YAML
        if training.process_index == 0:
            say(f"merged: {save_merged(find_model(own.model, weights=True), training.output_dir)}")
        return

    # Before anything is loaded: --plan prints what the run needs; otherwise print what will run, refuse what cannot.
    planning = shared.plan and not shared.probe
    if planning:
        shared.plan_config = yaml_to_plan(shared, launch, training)
        if shared.plan_config is not None:  # not that of a launch, so its precision has not come yet
            take_precision_of_yaml(shared.plan_config, training)
    else:
        check_method(own.method, own.weights, launch, shared, training)
        launch = preflight(RECIPE, launch, None, shared, training, method=own.method)
    if own.step_in_backward:
        check_step_in_backward(training, shared)
    # Frozen weights need no more than what is computed in; trained ones in bf16 need the rounding of LowMemoryAdamW.
    dtype = compute_dtype(training) if adapters else trained_dtype(own.weights, training)
    own_optimizer = optimizer_for(None if adapters else dtype, own.step_in_backward, training)
    adapter = dict(rank=own.lora_rank, targets=own.lora_targets, train_embedding=own.train_embedding)
    if planning:
        model = size.planned(shared.context_length, for_plan=True).to(dtype)
        model = add_adapters(model, **adapter) if adapters else model
        return print_plan(RECIPE, model, launch, shared, training, own_optimizer, own.method, continues=True)
    set_seed(training.seed)

    # Weights, tokenizer and token stores: the first process of each machine makes them, the others wait and find them.
    with training.main_process_first(desc="tokenizing"):
        place = find_model(own.model, weights=True)
        tokenizer = load_tokenizer(shared.tokenizer or place, shared.end_token)
        check_fit(place, tokenizer, shared.context_length)
        if adapters:
            check_adapters(model_without_memory(place), own.lora_rank, own.lora_targets)
        sources = resolve_sources(
            shared.data or [str(download("openwebtext", ROOT / "data", verify=False)[0].parent)], shared.encoding
        )
        stores = {source.name: tokenize(source, tokenizer, shared) for source in sources}
        unpacked = place
        if own.method == "qlora" and place.endswith(".gguf"):
            unpacked = unpacked_gguf(place, tokenizer, shared.context_length, dtype, shared.cache_dir)

    # Rows, and the model: straight onto the card, in 4 bits for QLoRA; the head is exchanged before peft wraps it.
    rows = build_rows(stores, shared)
    quantization = four_bits(dtype) if own.method == "qlora" else None
    model = pretrained_model(unpacked, tokenizer, shared.context_length, dtype, training.device, quantization)
    say(f"parameters: {parameters_in_words(model)}")
    start = {"weights": weights_fingerprint(model), "embedding": weights_fingerprint(model.get_input_embeddings())}
    if own.method == "qlora":  # what is loaded has 4 bits; merging compares the files
        start["files"] = files_fingerprint(place)
    set_attention(model, shared.attn_implementation, shared.packing == "isolated", training.device)
    use_fused_loss(model)  # the logits of a micro-batch, its largest tensor, are never held
    keep_residual_in_bf16(model)  # what layers pass on to each other; autocast would keep it in fp32
    model = add_adapters(model, **adapter) if adapters else model

    # One folder, one run: continued if it was interrupted, shown if it is finished.
    start |= {"method": own.method, "dtype": str(dtype).removeprefix("torch."), "adapter": adapters and adapter}
    start |= {"step_in_backward": own.step_in_backward, "vocabulary_rows": model.config.vocab_size}
    identity = run_identity(RECIPE, start, rows, tokenizer, launch, shared, training, {})
    order = training_order(rows.train, training, launch.rows_per_step)
    branch = begin_branch(order, identity, shared, training)  # None without --branch_from
    with open_run(identity, shared, training, branch) as run:
        if results := run.finished(order):
            finished = f"{run.folder} is finished; nothing to train."
            say(f"{finished}\n{summary(results)}\n\n{before_and_after(results)}")
            if adapters and training.process_index == 0 and not is_merged(run.folder):
                say(f"the adapter merged into its base, a plain checkpoint: {save_merged(place, run.folder)}")
            return

        # Train, from the last checkpoint if there is one; a first start measures what the weights know already.
        trainer = PretrainingTrainer(
            model, training, shared, rows, order, launch, run, tokenizer, optimizer_cls_and_kwargs=own_optimizer
        )
        if shared.probe:
            probe(trainer, shared)
            return
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        state_bytes = 3 if state_bits(training.optim) == 8 else 8  # a parameter; the embedding's may stay in fp32
        merged_bytes = model_without_memory(place).num_parameters() * dtype.itemsize if adapters else 0
        parameters = sum(parameter.numel() for parameter in trained)
        weight_bytes = trained[0].itemsize
        run.check_disk_space(parameters, launch.strategy, training, weight_bytes, state_bytes, merged_bytes)
        prompts = beginnings(rows.held_out, tokenizer) if PROMPTS is None else PROMPTS
        trainer.add_callback(SampleCallback(run, launch.strategy, tokenizer, prompts, trainer.clock.interval))
        trainer.add_callback(ReportCallback(run, rows.ledgers))
        tasks = EvalTasks(trainer, shared)  # --eval_tasks: those of lm_eval
        trainer.add_callback(tasks)
        trainer.add_callback(MeasureBefore(trainer, None, True, own.accept_weak_weights))
        for callback in swanlab_callbacks(shared.swanlab, "accelerate-pretraining", run.folder):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=run.last_checkpoint())

        # Evaluate on the held-out documents, with samples; save the model; print what came of it.
        metrics = trainer.evaluate()
        metrics["eval_unigram_loss"] = unigram_loss(rows.train, rows.held_out, model.config.vocab_size)
        if rows.test is not None:
            metrics |= trainer.evaluate(rows.test, metric_key_prefix="test")
        metrics |= figures_before(trainer.state.log_history, run.measured_from)
        metrics |= tasks.measure()
        trainer.save_model()
        results = save_results(trainer, rows.ledgers, metrics)
        say(f"{summary(results)}\n\n{before_and_after(results)}")
        say(where_to_look(run.folder))
    trainer.accelerator.end_training()
    if adapters and training.process_index == 0:
        say(f"the adapter merged into its base, a plain checkpoint: {save_merged(place, training.output_dir)}")


if __name__ == "__main__":
    main()
