"""--eval_tasks: tasks of lm_eval on the model while it trains, and at the end. The scores are those of its command.

    tasks = EvalTasks(trainer, shared)      # before training; their documents are loaded
    trainer.add_callback(tasks)             # every --eval_tasks_every steps
    metrics |= tasks.measure()              # at the end

lm_eval is EleutherAI's harness, https://github.com/EleutherAI/lm-evaluation-harness. It is an extra of this project.
Which tasks say something about a small model: docs/tasks.md.
"""

import difflib
import functools
import io
import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback, TrainingArguments

from common.arguments import SharedArguments
from common.console import InputError, say
from common.distributed.accelerator import torch_random_states_kept
from common.distributed.launch import Launch
from common.io import append_lines
from common.run.record import TASKS_FILE, installed, score_text, task_key
from common.train.interruption import EvaluationStopped, Interruption

LM_EVAL = "lm_eval>=0.4.13,<0.5"
OLDEST = (0, 4, 13)
RESAMPLES = 100_000  # for standard errors without a formula, as the command has it
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # as the command has them
NOT_FOR_USERS = (  # beginnings of lm_eval's warnings that are answered here
    "`pretrained` model kwarg is not of type `str`",
    "Passed an already-initialized model",
    "Combined length of context",  # one for each request; they are counted
)


def check_eval_tasks(launch: Launch, shared: SharedArguments, training: TrainingArguments) -> None:
    """Refuse --eval_tasks that cannot be measured, before anything else is read; load them once to find out.

    Raises:
        InputError: lm_eval is missing or too old, the parameters are sharded, or a task cannot be loaded.
    """
    if not shared.eval_tasks:
        return
    version = installed("lm_eval")
    if version is None:
        raise InputError(f"--eval_tasks needs lm_eval: pip install '{LM_EVAL}'. Or leave the flag out.")
    if tuple(int(part) for part in version.split(".")[:3] if part.isdecimal()) < OLDEST:
        raise InputError(f"--eval_tasks: lm_eval {version} is too old: pip install '{LM_EVAL}'.")
    if launch.strategy.shards_parameters:
        raise InputError(
            f"--eval_tasks under {launch.strategy}: no process has the whole model, which lm_eval needs. Use ddp.yaml "
            "or zero2.yaml, or measure the finished model: lm_eval --model hf --model_args "
            f"pretrained={training.output_dir} --tasks {','.join(shared.eval_tasks)}"
        )
    with training.main_process_first(desc="tasks"):
        load_tasks(tuple(shared.eval_tasks))


class EvalTasks(TrainerCallback):
    """Measure tasks every so many steps, and at the end; without --eval_tasks, do nothing.

    Measuring changes nothing of the training: not the weights, not the random states, not what is logged when. A task
    that fails while it is measured is named and left out from then on: it must not end a run.
    """

    def __init__(self, trainer: Trainer, shared: SharedArguments):
        """``trainer``: a PretrainingTrainer."""
        self.trainer, self.every = trainer, shared.eval_tasks_every
        self.interruption: Interruption = trainer.interruption
        self.failed: dict[str, str] = {}  # name -> what went wrong
        self.tasks: dict[str, dict] = {}  # name -> what lm_eval loaded
        self.chances: dict[str, dict] = {}  # name -> the chance level of it and of its parts
        if shared.eval_tasks:
            with random_states_kept(trainer.args.device):
                self.tasks = load_tasks(tuple(shared.eval_tasks))
                self.chances = {name: chance_levels(loaded) for name, loaded in self.tasks.items()}

    def on_step_end(self, args, state, control, **kwargs):
        due = self.every is not None and state.global_step % self.every == 0
        # At the last step the recipe measures.
        if not due or control.should_training_stop or state.global_step >= state.max_steps:
            return
        logging_is_due = control.should_log  # logging scores must not shift the log of the training loss
        try:
            self.measure()
        except EvaluationStopped:
            self.interruption.on_step_end(args, state, control)
            say(f"tasks: stopped, and not measured at step {state.global_step}")
            logging_is_due = True  # a checkpoint's log ends with its own step
        control.should_log = logging_is_due

    def measure(self) -> dict[str, list[dict]]:
        """Measure all tasks; log, print and keep the scores. Return them as an entry of all_results.json.

        Raises:
            EvaluationStopped: while training, a process was asked to end. Nothing is logged.
        """
        if not self.tasks and not self.failed:
            return {}
        say(f"tasks: measuring {', '.join(self.tasks)}")
        scores = []
        for name in list(self.tasks):
            try:
                scores += self._measure_one(name)
            except EvaluationStopped:
                raise
            except Exception as error:  # of any kind: a measure must not end a training run
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                say(f"note: --eval_tasks {name}: it failed ({reason}), and is not measured again")
                self.failed[name] = reason
                del self.tasks[name]
        self._keep(scores)
        shown = [score for score in scores if "part_of" not in score]
        return {"tasks": [*shown, *({"task": name, "failed": reason} for name, reason in self.failed.items())]}

    def _measure_one(self, name: str) -> list[dict]:
        """Return the scores of one task, or of a group and all its parts."""
        from lm_eval.evaluator import evaluate

        from common.train.eval_model import live_model

        trainer, loaded = self.trainer, self.tasks[name]
        began = time.perf_counter()
        with (
            trainer.clock.interval.paused(),
            random_states_kept(trainer.args.device),
            lm_eval_is_quiet(),
            live_model(trainer, self.interruption) as model,
        ):
            set_seeds(loaded)
            # The main process computes standard errors: those without a formula keep all cores busy.
            resamples = RESAMPLES if trainer.is_world_process_zero() else 0
            results = evaluate(lm=model, task_dict=loaded, bootstrap_iters=resamples, log_samples=False)
        [results] = broadcast_object_list([results])
        seconds = time.perf_counter() - began
        if model.cut:
            say(
                f"note: {name}: {model.cut:,} requests are longer than the {model.max_length:,} tokens that the model "
                "reads, and lost their first tokens"
            )
        return scores_of(name, results, self.chances[name], trainer.state.global_step, seconds)

    def _keep(self, scores: list[dict]) -> None:
        """Log and print the scores of what was asked for; write these and those of parts to the file."""
        shown = [score for score in scores if "part_of" not in score]
        logs: dict[str, float] = {}
        for score in shown:
            say(f"task       step {score['step']}  {score_text(score)}, {score['seconds']:.1f} s")
            key = task_key(score)
            figures = {key: score["score"], f"{key}_stderr": score["stderr"], f"{key}_chance": score["chance"]}
            figures[f"eval_{score['task']}_seconds"] = score["seconds"]
            logs |= {name: figure for name, figure in figures.items() if figure is not None}
        if logs:
            self.trainer.log(logs)
        if self.trainer.is_world_process_zero() and scores:
            with self.trainer.run.writing(TASKS_FILE):
                append_lines(Path(self.trainer.run.folder) / TASKS_FILE, scores)


@functools.lru_cache(maxsize=1)  # takes seconds: lm_eval reads the names of all its tasks
def load_tasks(names: tuple[str, ...]) -> dict[str, dict]:
    """Return what lm_eval loads for each of ``names``: a task, a group or a tag of its own, or a YAML file.

    The name of a YAML file is the one that is written in it.

    Raises:
        InputError: a name is unknown or there twice, its documents cannot be loaded, or its answers would be run.
    """
    from lm_eval.tasks import TaskManager

    files = {name: _content(name) for name in names if Path(name).is_file()}
    # A task becomes what is in its file, as in the command. A group is found by its name, with the files beside it:
    # lm_eval 0.4.13 cannot load one by its file.
    groups = [name for name, content in files.items() if "group" in content]
    alone = len(files) == len(names) and not groups  # they need none of lm_eval's 14,000 tasks
    try:
        manager = TaskManager(include_path=[str(Path(name).parent) for name in groups], include_defaults=not alone)
    except Exception as error:  # of a file beside that of a group
        raise InputError(f"--eval_tasks {' '.join(groups)}: the files beside it cannot be read ({error}).") from None
    tasks: dict[str, dict] = {}
    for name in names:
        try:
            loaded = manager.load([files[name]["group"] if name in groups else files.get(name, name)])
        except Exception as error:  # lm_eval and datasets raise many kinds
            raise InputError(why_not_loaded(name, name in files, manager.all_tasks, error)) from None
        unsafe = [task for task, loaded_task in loaded["tasks"].items() if getattr(loaded_task, "UNSAFE_CODE", False)]
        if unsafe:
            raise InputError(f"--eval_tasks {name}: {unsafe[0]} runs code that the model writes. Not in these recipes.")
        own_name = next(iter([*loaded["groups"], *loaded["tasks"]])) if name in files else name
        if own_name in tasks:
            raise InputError(f"--eval_tasks: {own_name} is there twice. Name it once.")
        tasks[own_name] = loaded
    return tasks


def _content(path: str) -> dict:
    """Return what is in a YAML file of lm_eval's."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        content = load_yaml(path)
    except Exception as error:  # of YAML, of an included file, of a function that it names
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"--eval_tasks {path}: it cannot be read ({reason}).") from None
    if not isinstance(content, dict) or not {"task", "group"} & set(content):
        raise InputError(f"--eval_tasks {path}: there is no task and no group in it.")
    own_name = content.get("group", content.get("task"))
    if not isinstance(own_name, str):  # the list of a group's parts has a name of its own beside it
        raise InputError(f"--eval_tasks {path}: its name is {own_name!r}, and must be text: task: my_task")
    return content


def why_not_loaded(name: str, is_file: bool, known: list[str], error: Exception) -> str:
    """Return what to say of a task that lm_eval cannot load. ``is_file``: ``name`` is that of a YAML file."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    mirror = "export HF_ENDPOINT=https://hf-mirror.com if that cannot be reached"
    if is_file:
        return (
            f"--eval_tasks {name}: it cannot be loaded ({reason}). docs/tasks.md has a file that works, with documents "
            f"beside it. If its documents are on Hugging Face: {mirror}."
        )
    if not isinstance(error, KeyError) or name in known:
        return (
            f"--eval_tasks {name}: it cannot be loaded ({reason}). Its documents come from Hugging Face: {mirror}. A "
            "YAML of your own with files beside it needs no network: docs/tasks.md."
        )
    if Path(name).suffix in (".yaml", ".yml"):
        return f"--eval_tasks {name}: no such file."
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"Near it: {', '.join(near)}. " if near else ""
    return f"--eval_tasks {name}: lm_eval has no such task, group or tag. {hint}All of them: lm_eval ls tasks."


def set_seeds(loaded: dict) -> None:
    """Begin with the random states that lm_eval's command begins with, the choice of examples included."""
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEEDS["fewshot"])


def chance_levels(loaded: dict) -> dict[str, float | None]:
    """Return the accuracy of guessing for every task and group, by name; None where there is nothing to choose from."""
    sizes = {name: len(task.eval_docs) for name, task in loaded["tasks"].items()}
    levels = {name: chance_level(task) for name, task in loaded["tasks"].items()}
    for name, group in loaded["groups"].items():
        parts = [task.task_name for task in group.get_all_tasks()]
        if not group.has_aggregation or any(levels[part] is None for part in parts):
            levels[name] = None
            continue
        by_size = group.aggregate_metric_list[0].weight_by_size
        weights = [sizes[part] if by_size else 1 for part in parts]
        levels[name] = float(np.average([levels[part] for part in parts], weights=weights))
    return levels


def chance_level(task) -> float | None:
    """Return the share of right answers that guessing has in ``task``; None if it is not multiple choice."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    shares = []
    for document in task.eval_docs:
        right = task.doc_to_target(document)
        shares.append((len(right) if isinstance(right, list) else 1) / len(task.doc_to_choice(document)))
    return float(np.mean(shares))


def scores_of(name: str, results: dict, chances: dict[str, float | None], step: int, seconds: float) -> list[dict]:
    """Return every metric in the ``results`` of lm_eval as a dict, for the task ``name`` or a group and its parts.

    A part has the entry "part_of", unless the whole has no score of its own. Metrics that are not numbers are left out.
    """
    scores = []
    measured = results["results"]
    whole_has_scores = any("," in key for key in measured.get(name, {}))
    for row, figures in measured.items():
        for key, value in figures.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{filtered}")
            score = {
                "step": step,
                "task": row,
                "metric": metric if filtered == "none" else f"{metric}_{filtered}",
                "score": float(value),
                "stderr": float(error) if isinstance(error, int | float) else None,  # lm_eval has "N/A"
                "chance": chances.get(row) if metric.startswith("acc") else None,
                "documents": figures["sample_len"],
                "shots": results["n-shot"].get(row),
                "seconds": seconds,  # of the whole
            }
            scores.append(score | {"part_of": name} if whole_has_scores and row != name else score)
    return scores


@contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Leave the random states of Python, NumPy and torch as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch_random_states_kept(device):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class Warnings(logging.Handler):
    """Keeps each warning once, but those that are answered here."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.kept: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if not message.startswith(NOT_FOR_USERS):
            self.kept[message] = None


@contextmanager
def lm_eval_is_quiet() -> Iterator[None]:
    """Leave out lm_eval's bars and lines, of which a group of 100 tasks has hundreds; print its warnings at the end."""
    logger = logging.getLogger("lm_eval")
    warnings, passed_on = Warnings(), logger.propagate
    logger.addHandler(warnings)
    logger.propagate = False
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.removeHandler(warnings)
        logger.propagate = passed_on
        for message in warnings.kept:
            say(f"lm_eval: {message}")
