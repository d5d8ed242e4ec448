"""Pretrain a 103M-parameter Qwen3-style language model from scratch on Chinese Wikipedia.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/wiki_zh_scratch.py

On a laptop, offline, in three minutes, on the articles that come with the project:

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/wiki_zh_scratch.py --sample

On your own text, with a model that fits it and this machine: --data FILES --target_parameters auto

Data: Chinese Wikipedia of 2024-08-20, https://huggingface.co/datasets/fjcanyue/wikipedia-zh-cn (CC BY-SA). If
data/wikipedia-zh-cn-20240820.json is not there, it is downloaded. Any flag overrides the values below; --help shows
them. The same command again continues where the run stopped.

Result: not yet measured on Wikipedia. On 149 MB of other Chinese and English: 106M tokens in 178 s on one H200, 595k
tokens/s, 1.235 bits per byte (2026-11-30). Versions and other results: benchmarks/README.md.

The model of SwanLab's tutorial, 123M parameters with 78M of them in the embedding: --model swanlab-wiki --tokenizer
Qwen/Qwen2-0.5B
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
from common.model.attention import set_attention
from common.model.counts import parameters_in_words
from common.model.fit_to_text import fit_to_text
from common.model.from_config import keep_residual_in_bf16, model_from_config
from common.model.fused_loss import use_fused_loss
from common.model.placement import place_model
from common.model.presets import ModelSize, is_auto
from common.model.scaling import defaults_for, learning_rates_for, passes_for, read_law
from common.run.branch import begin_branch
from common.run.folder import open_run
from common.run.identity import run_identity
from common.run.init_from import load_start, rows_before
from common.run.report import ReportCallback
from common.run.results import save_results, summary, where_to_look
from common.run.tracking import swanlab_callbacks
from common.tokens.tokenizer import load_tokenizer, vocabulary_size
from common.tokens.train_tokenizer import tokenizer_trained_on
from common.tokens.writer import tokenize
from common.train.callbacks import SampleCallback
from common.train.eval_tasks import EvalTasks
from common.train.plan import print_plan
from common.train.preflight import preflight
from common.train.probe import probe
from common.train.time_budget import check_minutes, name_size, speed_of_card
from common.train.trainer import PretrainingTrainer

RECIPE = Path(__file__).name
ROOT = Path(__file__).resolve().parent.parent

MODEL = dict(
    model_type="qwen3",  # Qwen2 with norms on queries and keys: 2% fewer bits (benchmarks/LOG.md)
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,  # heads of 64
    num_key_value_heads=6,  # two query heads share a key-value head
    head_dim=64,
    tie_word_embeddings=True,  # input and output share one matrix, a quarter of the parameters
)

DATA = dict(
    data=None,  # None: data/wikipedia-zh-cn-20240820.json, downloaded if it is not there
    tokenizer="train",  # on the data itself: 11% fewer bits for the same seconds than Qwen2's (benchmarks/LOG.md)
    vocabulary_size=32_768,
    context_length=512,
    held_out_fraction=0.005,  # of the documents
    cache_dir=str(ROOT / "data" / "cache"),
)

TRAINING = dict(
    output_dir=str(ROOT / "outputs" / "wiki_zh_scratch"),
    num_train_epochs=2,
    tokens_per_step=65_536,  # 128 rows of 512 on one process, 64 on two; how it was found: benchmarks/LOG.md
    optimizer="auto",  # Muon; AdamW under DeepSpeed, which shards the matrices that Muon needs whole
    learning_rate=0.0,  # 0: taken from LEARNING_RATES
    per_device_train_batch_size=0,  # 0: as many rows at once as fit the card, at most 65,536 tokens
    gradient_accumulation_steps=0,  # 0: derived from tokens_per_step
    per_device_eval_batch_size=0,  # 0: as in training
    lr_scheduler_type="warmup_stable_decay",  # 1.225 bits per byte, a cosine 1.271: benchmarks/LOG.md
    lr_scheduler_kwargs={"num_decay_steps": 0.3},  # the last 30% of the steps decay the rate to 0
    warmup_steps=0.03,  # below 1: a share of all steps
    weight_decay=0.1,  # Trainer leaves norms and biases out
    adam_beta2=0.95,  # as usual in pretraining: 0.999 averages over more steps than a short run has
    max_grad_norm=1.0,
    logging_steps=10,
    logging_first_step=True,
    logging_nan_inf_filter=False,  # show a loss of NaN
    eval_strategy="steps",
    eval_steps=200,
    save_steps=200,
    save_total_limit=2,
    seed=42,
    ddp_timeout=6 * 3600,  # seconds: the first process downloads and tokenizes while the others wait
    report_to="none",  # for trackers other than SwanLab, whose flag is --swanlab
)
LEARNING_RATES = {"muon": 5e-3, "adamw": 1e-3}  # the best of each at this batch: benchmarks/LOG.md

# --sample: the bundled articles, and what two CPU cores train on them in three minutes.
SAMPLE_MODEL = dict(
    model_type="qwen2",
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
SAMPLE = dict(
    data=[str(ROOT / "data" / "sample_zh.jsonl")],
    tokenizer="train",
    vocabulary_size=4096,
    context_length=128,
    held_out_fraction=0.05,
    output_dir=str(ROOT / "outputs" / "wiki_zh_sample"),
    tokens_per_step=1024,  # little data: many small steps learn more than few large ones
    per_device_train_batch_size=8,
    per_device_eval_batch_size=64,
    max_steps=400,
    weight_decay=3.0,  # so short a text is soon known by heart: 5% fewer bits than with 0.1 (benchmarks/LOG.md)
    logging_steps=20,
    eval_steps=100,
    save_steps=100,
)

PROMPTS = ["地球是", "在历史上，", "计算机"]


@dataclass
class RecipeArguments:
    """Flags of this recipe alone."""

    sample: bool = field(default=False, metadata={"help": "Train a small model on the bundled articles, offline."})
    model: str | None = field(
        default=None, metadata={"help": "Another shape: qwen2.5-0.5b, swanlab-wiki ..., a folder, an id."}
    )
    target_parameters: str | None = field(
        default=None,
        metadata={
            "help": "Another size, such as 30M; vocabulary, batch, learning rate and passes follow from it. auto: the "
            "size, too, from --data and this machine."
        },
    )
    ladder: str | None = field(
        default=None,
        metadata={
            "help": "With --plan --probe or --minutes: benchmarks/ladder.py's fit.json, to predict the final bits per "
            "byte."
        },
    )
    minutes: float | None = field(
        default=None,
        metadata={
            "help": "With --plan: name the --target_parameters that learns most in so many minutes on one card, at the "
            "speed that is known of it, or that --probe measures."
        },
    )
    plan_card: str | None = field(
        default=None, metadata={"help": "With --minutes: the card to plan for, such as H100; otherwise the one here."}
    )


def main(argv: list[str] | None = None) -> None:
    # The launcher's YAML decides strategy, precision, compile and recompute. It is read once, here.
    launch = read_launch()
    # Flags: the dicts are defaults, --sample swaps in SAMPLE, any flag overrides, unknown ones fail. They come as this
    # recipe's own, those that all recipes share, and Trainer's.
    defaults = DATA | TRAINING | launch.defaults()
    own, shared, training = parse_flags(RecipeArguments, argv, defaults, sample=SAMPLE, target_parameters=defaults_for)
    check_minutes(own.minutes, own.plan_card, launch, shared)
    law = read_law(own.ladder, shared, own.minutes)
    shape = SAMPLE_MODEL if own.sample else MODEL
    if is_auto(own.target_parameters):  # like MODEL, in the size that fits --data and this machine
        shape = fit_to_text(shape, shared, training)
    size = ModelSize(shape, own.model, own.target_parameters, shared)

    # --plan prints the memory that the run needs, or with --minutes the size that learns most, and ends here. (--plan
    # --probe also trains three steps, below.)
    if own.minutes is not None and not shared.probe:
        return name_size(RECIPE, MODEL, own.minutes, law, speed_of_card(own.plan_card, training), shared)
    if shared.plan and not shared.probe:
        return print_plan(RECIPE, size.planned(shared.context_length, for_plan=True), launch, shared, training)
    # Before anything is loaded, print what will run and refuse what cannot.
    rates = learning_rates_for(shared.tokens_per_step) if own.target_parameters else LEARNING_RATES
    launch = preflight(RECIPE, launch, size, shared, training, rates)
    set_seed(training.seed)

    # Tokenizer and token stores: the first process of each machine makes them, the others wait and find them.
    with training.main_process_first(desc="tokenizing"):
        sources = resolve_sources(
            shared.data or [str(download("wiki-zh", ROOT / "data", verify=False)[0])], shared.encoding
        )
        if shared.tokenizer == "train":
            tokenizer = tokenizer_trained_on(sources, shared)
        else:
            tokenizer = load_tokenizer(shared.tokenizer, shared.end_token)
        stores = {source.name: tokenize(source, tokenizer, shared) for source in sources}

    # Rows, and the model: random weights. The seed was set above, so every process draws the same weights.
    rows = build_rows(stores, shared)
    shape = size.shape(vocabulary_size(tokenizer))
    model = model_from_config(shape, tokenizer, shared.context_length, training, launch.building_device)
    if shared.init_from:
        load_start(model, shared.init_from)
    model = place_model(model, launch, shared.cache_dir, training.seed)  # divided, under tensor parallelism
    if own.target_parameters and training.num_train_epochs == 0:  # the passes follow from size and text
        training.num_train_epochs = passes_for(model.num_parameters(), rows.train.stream_tokens, shared.tokens_per_step)
    say(f"parameters: {parameters_in_words(model)}")
    isolated = shared.packing == "isolated"
    set_attention(model, shared.attn_implementation, isolated, training.device, launch=launch)
    use_fused_loss(model)  # never holds all logits, which would be the largest tensor
    keep_residual_in_bf16(model)  # the sum that layers add to; autocast would keep it in fp32

    # One folder, one run: continued if it was interrupted, shown if it is finished.
    recorded_shape = {**shape, "vocabulary_rows": model.config.vocab_size}
    more = {"optimizer": launch.optimizer, "init_from": shared.init_from}
    identity = run_identity(RECIPE, recorded_shape, rows, tokenizer, launch, shared, training, more)
    order = training_order(rows.train, training, launch.rows_per_step, rows_before(identity, shared))
    branch = begin_branch(order, identity, shared, training)  # None without --branch_from
    with open_run(identity, shared, training, branch) as run:
        if results := run.finished(order):
            return say(f"{run.folder} is finished; nothing to train.\n{summary(results)}")

        # Train, from the last checkpoint if there is one.
        trainer = PretrainingTrainer(model, training, shared, rows, order, launch, run, tokenizer)
        if shared.probe:
            speed = probe(trainer, shared, rows.ledgers, law)
            if own.minutes is not None:
                name_size(RECIPE, MODEL, own.minutes, law, speed, shared)
            return
        run.check_disk_space(model.num_parameters(), launch.strategy, training)
        prompts = beginnings(rows.held_out, tokenizer) if is_auto(own.target_parameters) else PROMPTS
        trainer.add_callback(SampleCallback(run, launch.strategy, tokenizer, prompts, trainer.clock.interval))
        trainer.add_callback(ReportCallback(run, rows.ledgers))
        tasks = EvalTasks(trainer, shared)  # --eval_tasks: those of lm_eval
        trainer.add_callback(tasks)
        for callback in swanlab_callbacks(shared.swanlab, "accelerate-pretraining", run.folder):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=run.last_checkpoint())

        # Evaluate on the held-out documents, with samples; save the model; print the results.
        metrics = trainer.evaluate()
        metrics["eval_unigram_loss"] = unigram_loss(rows.train, rows.held_out, model.config.vocab_size)
        if rows.test is not None:
            metrics |= trainer.evaluate(rows.test, metric_key_prefix="test")
        metrics |= tasks.measure()
        trainer.save_model()
        say(summary(save_results(trainer, rows.ledgers, metrics)))
        say(where_to_look(run.folder))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
