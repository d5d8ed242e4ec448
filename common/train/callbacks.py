"""What a run shows and writes while it goes on: one readable line a log, status.json, samples at every evaluation."""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, ProgressCallback, TrainerCallback, TrainingArguments

from common.arguments import SharedArguments
from common.console import no_bars_while_training, printable, say
from common.distributed.accelerator import torch_random_states_kept
from common.distributed.strategy import Strategy
from common.io import append_lines
from common.model.attention import generating
from common.progress import NARROW, in_notebook, shows_bars, terminal_columns
from common.run.folder import Run
from common.run.record import LAUNCHES_FILE, describe_launch, record_launch
from common.train.metrics import Stopwatch
from common.train.step_guard import StepGuard

SAMPLES_FILE, SAMPLE_TOKENS = "samples.jsonl", 60
EARLY_SAMPLES = (1 / 8, 1 / 4, 1 / 2)  # of the steps before the first evaluation
TRAINING_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
NARROW_TRAINING_BAR = "{n_fmt}/{total_fmt}, {remaining} left{postfix}"
SHORTEST_BAR = 10


class RunCallback(TrainerCallback):
    """Keep ``status.json`` up to date, record the launch, and end the run when the guard asks for it."""

    def __init__(self, run: Run, guard: StepGuard, shared: SharedArguments):
        self.run, self.guard, self.shared = run, guard, shared
        self.training = False

    def on_train_begin(self, args, state, control, **kwargs):
        # The intervals of logs, saves and evaluations are those of now, not those that the checkpoint was written with.
        state.compute_steps(args, state.max_steps)
        self.training = True
        self._running(state)
        self.run.accept_changes()  # the checkpoint, if there is one, has been loaded
        if self.run.claimed:
            with self.run.writing(LAUNCHES_FILE):
                record_launch(args.output_dir, describe_launch(self.shared, args))

    def on_log(self, args, state, control, **kwargs):
        if self.training:
            self._running(state)

    def on_step_end(self, args, state, control, **kwargs):
        self.run.step = state.global_step
        if self.guard.not_saved is not None and self.guard.in_a_row == 0:
            control.should_save = True  # the bad streak in which a checkpoint was due is over
        if self.guard.stop is not None:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        self.training = False

    def _running(self, state) -> None:
        self.run.step, self.run.max_steps = state.global_step, state.max_steps
        self.run.write_status("running")


class ScreenCallback(ProgressCallback):
    """In a terminal or a notebook one bar with the newest figures, elsewhere (a file, a pipe) one line a log."""

    def __init__(self, compiler: str = "no"):
        """``compiler``: torch.compile's backend, or "no"."""
        super().__init__()
        self.compiler = compiler

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.timed_from = time.time(), state.global_step
        self.warm_after = state.global_step + 1
        self.bar = shows_bars() and not args.disable_tqdm
        self.bits_per_byte = float("nan")
        no_bars_while_training()
        if self.compiler != "no":
            say(f"compiling the layers at the first step ({self.compiler}): about 15 s on a GPU, longer the first time")
        if self.bar:
            super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:  # of a continued run, the time left is not that of steps made before
            self.current_step = self.training_bar.initial = self.training_bar.n = state.global_step
            self._lay_out({})

    def _lay_out(self, logs: dict) -> None:
        """Show ``logs`` after the bar, as many of them as the terminal has room for; without room, no bar either."""
        bar = self.training_bar
        room: float = terminal_columns() - 2 * len(str(bar.total)) - len("/, 00:00:00 left, ")
        if in_notebook():  # which has a layout of its own
            room = math.inf
        elif terminal_columns() < NARROW:
            bar.bar_format = NARROW_TRAINING_BAR
        else:
            bar.bar_format = TRAINING_BAR
            room -= len("100%|") + SHORTEST_BAR + len("| ")
        if logs:
            bar.set_postfix_str(bar_text(logs, self.bits_per_byte, room), refresh=False)
        bar.refresh()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.warm_after:  # the first step compiles, which says nothing of those to come
            self.began, self.timed_from = time.time(), state.global_step
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, **kwargs):
        if shows_bars() and not args.disable_tqdm:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            self.bits_per_byte = logs["eval_bits_per_byte"]
            tqdm.write(
                f"held out   step {state.global_step}  loss {logs['eval_loss']:.4f}  perplexity "
                f"{logs['eval_perplexity']:,.1f}  bits per byte {self.bits_per_byte:.4f}"
            )
        elif "loss" in logs and self.training_bar is not None:
            self._lay_out(logs)
        elif "loss" in logs:
            steps, to_come = state.global_step - self.timed_from, state.max_steps - state.global_step
            left = math.nan if steps == 0 else (time.time() - self.began) / steps * to_come
            print(step_line(logs, state.global_step, state.max_steps, left), flush=True)


def bar_text(logs: dict, bits_per_byte: float, room: float = math.inf) -> str:
    """Return the text after the bar, of at most ``room`` letters if these are enough for the loss, which comes first.

    The bar itself has the step, the share done and the time left.
    """
    parts = [f"loss {logs['loss']:.3f}"]
    parts += [f"{bits_per_byte:.3f} bits/byte"] if bits_per_byte == bits_per_byte else []
    parts += [f"{logs['tokens_per_second_per_device']:,.0f} tokens/s/device"]
    parts += [f"{logs['mfu']:.0%} MFU"] if "mfu" in logs else []
    parts += [f"experts {expert_shares(logs)}"] if "busiest_expert" in logs else []
    parts += [f"{logs['memory_peak_gib']:.1f} GiB"]
    while len(parts) > 1 and len(", ".join(parts)) > room:
        parts.pop()
    return ", ".join(parts)


def expert_shares(logs: dict) -> str:
    """Return the shares of a layer's tokens that its idlest and its busiest expert got."""
    return f"{logs['idlest_expert']:.1%} to {logs['busiest_expert']:.1%} of the tokens"


def step_line(logs: dict, step: int, max_steps: int, seconds_left: float) -> str:
    """Return what a training step's log says, on one line; ``seconds_left``: NaN if it is not known yet."""
    left = "?"
    if seconds_left == seconds_left:
        minutes, seconds = divmod(round(seconds_left), 60)
        left = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
    parts = [
        f"step {step}/{max_steps} {step / max_steps:4.0%}",
        f"loss {logs['loss']:.4f}" + (f" + router {logs['router_loss']:.4f}" if "router_loss" in logs else ""),
        *([f"experts {expert_shares(logs)}"] if "busiest_expert" in logs else []),
        f"grad_norm {logs.get('grad_norm', float('nan')):.2f}",
        f"lr {logs['learning_rate']:.2e}",
        f"{logs['tokens_seen']:,} tokens",
        f"{logs['tokens_per_second_per_device']:,.0f} tokens/s/device",
        f"{logs['tflops_per_device']:.3g} TFLOP/s" + (f" ({logs['mfu']:.1%} MFU)" if "mfu" in logs else ""),
        f"{logs['memory_allocated_gib']:.2f} GiB (peak {logs['memory_peak_gib']:.2f})",
        f"left {left}",
    ]
    return "  ".join(parts)


class SampleCallback(TrainerCallback):
    """Continue each prompt at every evaluation, and the first prompt early; keep the texts in ``samples.jsonl``.

    All processes generate, because a sharded model needs all of them; the main one writes. The random state of the
    training is left as it was, so that sampling does not change the run, nor end it.
    """

    def __init__(
        self,
        run: Run,
        strategy: Strategy,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[str],
        interval: Stopwatch | None = None,
    ):
        """``interval``: is paused while the early texts are generated, so that they do not count as training.

        Without it, there are no early texts.
        """
        self.run, self.strategy, self.tokenizer, self.prompts = run, strategy, tokenizer, prompts
        self.interval = interval
        self.failed = False  # said once

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        if "eval_loss" in metrics:  # not another set, right after the held-out documents: the same texts again
            self._sample(args, state, model, self.prompts)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.interval is None or args.eval_strategy != "steps" or control.should_training_stop:
            return
        first_evaluation = min(state.eval_steps, state.max_steps)
        if state.global_step in {int(share * first_evaluation) for share in EARLY_SAMPLES}:
            with self.interval.paused():
                self._sample(args, state, model, self.prompts[:1])

    def _sample(self, args, state, model, prompts: list[str]) -> None:
        """Print how ``model`` continues ``prompts``, and add it to the file."""
        synchronized = self.strategy.is_fsdp and torch.distributed.is_initialized()
        try:
            with computing(args):
                texts = generate_samples(model, self.tokenizer, prompts, args.seed, args.device, synchronized)
        except Exception as error:  # a model may fail to generate in its own way; it trains all the same
            if not self.failed:
                say(f"note: no samples, training continues: {type(error).__name__}: {error}".splitlines()[0])
            self.failed = True
            return
        if not state.is_world_process_zero:
            return
        for prompt, text in zip(prompts, texts, strict=True):
            tqdm.write(f"sample     step {state.global_step}  {on_one_line(prompt)}|'{on_one_line(text)}'")
        entries = [
            {"step": state.global_step, "prompt": prompt, "text": text}
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        with self.run.writing(SAMPLES_FILE):
            append_lines(Path(args.output_dir) / SAMPLES_FILE, entries)


def on_one_line(text: str) -> str:
    """Return ``text`` as it can be printed on one line, its spaces and letters of any language as they are."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def computing(args: TrainingArguments) -> AbstractContextManager:
    """Return the context in which the forward of training computes: generation calls the model without it.

    Under DeepSpeed the model itself is in the precision of the computation.
    """
    if args.deepspeed_plugin is not None or not (args.bf16 or args.fp16):
        return nullcontext()
    return torch.autocast(args.device.type, torch.bfloat16 if args.bf16 else torch.float16)


@torch.no_grad()
def generate_samples(
    model, tokenizer, prompts: list[str], seed: int, device: torch.device, synchronized: bool = False
) -> list[str]:
    """Return the model's continuation of every prompt, at most SAMPLE_TOKENS tokens each.

    ``synchronized``: processes go on generating until the last one is done, because the model is sharded by FSDP.
    """
    was_training = model.training
    model.eval()
    try:
        with generating(model), torch_random_states_kept(device):
            torch.manual_seed(seed)
            return [continuation(model, tokenizer, prompt, device, synchronized) for prompt in prompts]
    finally:
        model.train(was_training)


def continuation(model, tokenizer, prompt: str, device: torch.device, synchronized: bool) -> str:
    """Return the model's continuation of ``prompt``."""
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]], device=device)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # Bloom has no limit
    new_tokens = max(1, min(SAMPLE_TOKENS, most - ids.shape[1])) if most else SAMPLE_TOKENS
    # A model that has become NaN still gives a text: drawing from NaN would end the run, on CUDA for good.
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        remove_invalid_values=True,
        synced_gpus=True if synchronized else None,  # None: transformers synchronizes under ZeRO-3
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
