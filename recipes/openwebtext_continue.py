"""Continue the pretraining of Qwen2.5-0.5B, or of any causal language model, on OpenWebText or on your own text.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/openwebtext_continue.py

To adapt a model to a domain, mix in one part in ten of text like that of its pretraining (replay), and name a second
held-out set that must not be forgotten. Both held-out sets are measured before and after. Weights are an id of
ModelScope or Hugging Face, a folder such as the output of another recipe, or a .gguf file (pip install gguf).

    accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/openwebtext_continue.py \
        --model Qwen/Qwen2.5-0.5B --data my-domain.jsonl web.jsonl --data_weights 0.9 0.1 --retain web-held-out.jsonl

From random weights, PaddleNLP's guide: its shape, its hyperparameters, its token files (ids of LLaMA's tokenizer):

    python data/prepare.py download openwebtext-100k --output data
    accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/openwebtext_continue.py --from_scratch \
        --data data/openwebtext-100k/llama_openwebtext_100k.bin --tokenizer FOLDER_OF_LLAMA_TOKENIZER --split 949,50,1

Data: OpenWebText, https://huggingface.co/datasets/Skylion007/openwebtext (CC0-1.0 for the collection), 24 GB. The files
in data/ are used if they are there, otherwise they are downloaded. Any flag overrides the values below; --help shows
them. The same command again continues where the run stopped.

Result: SmolLM2-135M-Instruct on 11,131 English documents, 40 steps of 2,048 tokens, fp32 on two CPU cores, 2026-11-22:
held-out loss 2.901 before, 2.688 after. Qwen2.5 on OpenWebText is not yet measured. More: benchmarks/results/.
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import set_seed

from common.arguments import parse_flags
from common.console import InputError, say
from common.corpus.download import download
from common.corpus.sources import resolve_sources
from common.dataset.mixture import training_order
from common.dataset.rows import beginnings, build_rows, unigram_loss
from common.distributed.launch import read_launch
from common.model.attention import set_attention
from common.model.counts import parameters_in_words
from common.model.from_config import keep_residual_in_bf16
from common.model.fused_loss import use_fused_loss
from common.model.placement import place_model
from common.model.presets import PretrainedSize
from common.model.pretrained import check_fit, find_model, pretrained_model, random_model, weights_fingerprint
from common.run.branch import begin_branch
from common.run.folder import open_run
from common.run.identity import run_identity
from common.run.init_from import load_start, rows_before
from common.run.report import ReportCallback
from common.run.results import save_results, summary, where_to_look
from common.run.tracking import swanlab_callbacks
from common.tokens.tokenizer import load_tokenizer
from common.tokens.train_tokenizer import tokenizer_trained_on
from common.tokens.writer import tokenize
from common.train.callbacks import SampleCallback
from common.train.eval_tasks import EvalTasks
from common.train.forgetting import MeasureBefore, before_and_after, figures_before, retained_rows
from common.train.plan import print_plan
from common.train.preflight import preflight
from common.train.probe import probe
from common.train.trainer import PretrainingTrainer

RECIPE = Path(__file__).name
ROOT = Path(__file__).resolve().parent.parent

MODEL = dict(model="Qwen/Qwen2.5-0.5B")

DATA = dict(
    data=None,  # None: OpenWebText in data/, downloaded if it is not there
    tokenizer=None,  # None: the model's own
    context_length=1024,  # as in PaddleNLP's guide; the model knows 32,768 positions
    held_out_fraction=0.0005,  # of the documents: of OpenWebText's 8 million, some 4,000, 4.5M tokens
    cache_dir=str(ROOT / "data" / "cache"),
)

# The learning rate is warmed up again, as at the start of a pretraining, and falls to a tenth; with some replay this
# equals training anew on all data. A lower rate learns the new text less and forgets the old one less.
# Sources: https://arxiv.org/abs/2308.04014 (re-warming), https://arxiv.org/abs/2403.08763 (with replay: 5% where the
# new text resembles the old, 25% where it does not).
TRAINING = dict(
    output_dir=str(ROOT / "outputs" / "openwebtext_continue"),
    max_steps=2000,  # 262M tokens; for passes over the data: --max_steps -1 --num_train_epochs 1
    tokens_per_step=131_072,  # 128 rows of 1,024
    per_device_train_batch_size=0,  # rows at once, at most; 0: as many as fit the card, up to 65,536 tokens
    gradient_accumulation_steps=0,  # 0: derived from tokens_per_step
    per_device_eval_batch_size=0,  # 0: as in training
    optimizer="adamw",  # as in the pretraining of Qwen2.5; Muon gained nothing on such weights (arXiv 2502.16982)
    # The papers re-warm 0.4B parameters to 3e-4 with 2.3M tokens a step; a step here has a 17th of them. Not measured.
    learning_rate=1e-4,
    lr_scheduler_type="cosine_with_min_lr",
    lr_scheduler_kwargs={"min_lr_rate": 0.1},  # down to 10%
    warmup_steps=0.01,  # below 1: a share of all steps; how long hardly matters (2308.04014)
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

# --from_scratch: the job of PaddleNLP's guide, 10.24M tokens, which took 36 minutes there (loss 5.43 in training).
FROM_SCRATCH = dict(
    output_dir=str(ROOT / "outputs" / "openwebtext_scratch"),
    max_steps=10_000,
    tokens_per_step=1024,
    per_device_train_batch_size=1,
    learning_rate=3e-5,
    lr_scheduler_type="polynomial",
    lr_scheduler_kwargs={"lr_end": 3e-6, "power": 1.0},  # a straight line
    warmup_steps=0.003,  # of 10,000 steps: 30, as there
    weight_decay=0.01,
    adam_beta2=0.999,  # PaddleNLP's default
    eval_steps=1000,
    save_steps=1000,
)

PROMPTS = None  # None: how some of the held-out text begins; otherwise a list, such as ["The meaning of life is"]


@dataclass
class RecipeArguments:
    """Flags of this recipe alone."""

    model: str = field(
        default=MODEL["model"],
        metadata={"help": "Weights to continue from: a local folder, a .gguf file, a ModelScope or Hugging Face id."},
    )
    retain: list[str] | None = field(
        default=None,
        metadata={
            "help": "Documents that must not be forgotten, given as --data is: measured before and after, never "
            "trained on. Those that --data trains on are left out."
        },
    )
    from_scratch: bool = field(
        default=False,
        metadata={"help": "Take only the config of --model, start at random, with PaddleNLP's hyperparameters."},
    )
    accept_weak_weights: bool = field(
        default=False,
        metadata={
            "help": "Also continue weights that predict this text no better than the frequency of its tokens does, as "
            "those of a short run or of another language may."
        },
    )


def main(argv: list[str] | None = None) -> None:
    # The launcher's YAML decides strategy, precision, compile and recompute. It is read once, here.
    launch = read_launch()
    # Flags: the dicts are defaults, --from_scratch swaps in FROM_SCRATCH, any flag overrides, unknown ones fail.
    defaults = DATA | TRAINING | launch.defaults()
    own, shared, training = parse_flags(RecipeArguments, argv, defaults, from_scratch=FROM_SCRATCH)
    size = PretrainedSize(own.model)
    size.shorten_rows(shared)

    # Before anything is loaded: --plan prints what the run needs; otherwise print what will run, refuse what cannot.
    if shared.plan and not shared.probe:
        model = size.planned(shared.context_length, for_plan=True)
        return print_plan(RECIPE, model, launch, shared, training, continues=not own.from_scratch)
    launch = preflight(RECIPE, launch, size, shared, training)
    if shared.tokenizer == "train" and not own.from_scratch:
        raise InputError("--tokenizer train: the weights know the ids of their own tokenizer only. Leave it out.")
    set_seed(training.seed)

    # Weights, tokenizer and token stores: the first process of each machine makes them, the others wait and find them.
    with training.main_process_first(desc="tokenizing"):
        place = find_model(own.model, weights=not own.from_scratch)
        # OpenWebText is 80 files in one folder.
        sources = resolve_sources(
            shared.data or [str(download("openwebtext", ROOT / "data", verify=False)[0].parent)], shared.encoding
        )
        retained_sources = resolve_sources(own.retain or [])
        if shared.tokenizer == "train":
            tokenizer = tokenizer_trained_on(sources, shared)
        else:
            tokenizer = load_tokenizer(shared.tokenizer or place, shared.end_token)
        check_fit(place, tokenizer, shared.context_length)
        stores = {source.name: tokenize(source, tokenizer, shared) for source in sources}
        retained_stores = {source.name: tokenize(source, tokenizer, shared) for source in retained_sources}

    # Rows, and the model: in float32, because the optimizer's steps are too small for bf16 weights. The YAML's bf16 is
    # autocast.
    rows = build_rows(stores, shared)
    retained = retained_rows(retained_stores, stores, rows.train, shared)
    build = random_model if own.from_scratch else pretrained_model
    model = build(place, tokenizer, shared.context_length, device=launch.building_device)
    if shared.init_from:
        load_start(model, shared.init_from)
    model = place_model(model, launch, shared.cache_dir, training.seed)  # divided, under tensor parallelism
    say(f"parameters: {parameters_in_words(model)}")
    start = {"weights": weights_fingerprint(model), "from_scratch": own.from_scratch}
    isolated = shared.packing == "isolated"
    set_attention(model, shared.attn_implementation, isolated, training.device, launch=launch)
    use_fused_loss(model)  # the logits of a micro-batch, its largest tensor, are never held
    keep_residual_in_bf16(model)  # what layers pass on to each other; autocast would keep it in fp32

    # One folder, one run: continued if it was interrupted, shown if it is finished.
    start["vocabulary_rows"] = model.config.vocab_size
    more = {"optimizer": launch.optimizer, "init_from": shared.init_from, "retained": retained.fingerprints}
    identity = run_identity(RECIPE, start, rows, tokenizer, launch, shared, training, more)
    order = training_order(rows.train, training, launch.rows_per_step, rows_before(identity, shared))
    branch = begin_branch(order, identity, shared, training)  # None without --branch_from
    with open_run(identity, shared, training, branch) as run:
        if results := run.finished(order):
            finished = f"{run.folder} is finished; nothing to train."
            return say(f"{finished}\n{summary(results)}\n\n{before_and_after(results)}")

        # Train, from the last checkpoint if there is one; a first start measures what the weights know already.
        trainer = PretrainingTrainer(model, training, shared, rows, order, launch, run, tokenizer)
        if shared.probe:
            probe(trainer, shared)
            return
        run.check_disk_space(model.num_parameters(), launch.strategy, training)
        prompts = beginnings(rows.held_out, tokenizer) if PROMPTS is None else PROMPTS
        trainer.add_callback(SampleCallback(run, launch.strategy, tokenizer, prompts, trainer.clock.interval))
        trainer.add_callback(ReportCallback(run, rows.ledgers))
        tasks = EvalTasks(trainer, shared)  # --eval_tasks: those of lm_eval
        trainer.add_callback(tasks)
        trainer.add_callback(MeasureBefore(trainer, retained.rows, not own.from_scratch, own.accept_weak_weights))
        for callback in swanlab_callbacks(shared.swanlab, "accelerate-pretraining", run.folder):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=run.last_checkpoint())

        # Evaluate on the held-out documents, with samples; save the model; print what came of it.
        metrics = trainer.evaluate()
        metrics["eval_unigram_loss"] = unigram_loss(rows.train, rows.held_out, model.config.vocab_size)
        if rows.test is not None:
            metrics |= trainer.evaluate(rows.test, metric_key_prefix="test")
        if retained.rows is not None:
            metrics |= trainer.evaluate(retained.rows, metric_key_prefix="retain") | retained.counts
        metrics |= figures_before(trainer.state.log_history, run.measured_from)
        metrics |= tasks.measure()
        trainer.save_model()
        results = save_results(trainer, rows.ledgers, metrics)
        say(f"{summary(results)}\n\n{before_and_after(results)}")
        say(where_to_look(run.folder))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
