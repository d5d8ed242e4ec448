"""The recipes' Trainer on rows that a benchmark makes."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from common.arguments import SharedArguments
from common.dataset.mixture import training_order
from common.dataset.packing import JoinedRows
from common.dataset.rows import Rows
from common.distributed.launch import Launch
from common.run.folder import Run
from common.train.trainer import PretrainingTrainer


def trainer_on(
    train_rows: JoinedRows,
    held_out_rows: JoinedRows,
    model: PreTrainedModel,
    training: TrainingArguments,
    launch: Launch,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **kwargs,
) -> PretrainingTrainer:
    """Return the recipes' Trainer on rows made here. It claims no folder, so nothing is checked or recorded there.

    ``launch``: its ``optimizer`` and ``rows_per_step`` are decided. ``kwargs``: transformers.Trainer's own.
    """
    rows = Rows(train_rows, held_out_rows, None, {}, [])
    order = training_order(train_rows, training, launch.rows_per_step)
    run = Run(training.output_dir)
    return PretrainingTrainer(model, training, SharedArguments(), rows, order, launch, run, tokenizer, **kwargs)
