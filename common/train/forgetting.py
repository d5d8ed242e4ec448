"""Continued pretraining, measured before and after: what the model learns, and what it must not forget.

What it must not forget is a second held-out set, the documents of --retain, none of which is trained on. The figures
from before the first step are in the log of every checkpoint, at step 0. A run that is continued from a checkpoint
reports them, too. A branch that holds out other documents measures them anew where it begins.
"""

from dataclasses import asdict, dataclass

import numpy as np
from transformers import TrainerCallback

from common.arguments import SharedArguments
from common.console import InputError, say
from common.corpus.splits import Split, repeated
from common.dataset.ledger import Ledger
from common.dataset.packing import JoinedRows, PackedRows
from common.dataset.rows import unigram_loss
from common.model.pretrained import check_start
from common.tokens.store import TokenStore
from common.train.trainer import PretrainingTrainer

SETS = {"eval": "held out", "retain": "retained"}  # prefix of the metrics: name in the table
FIGURES = ("loss", "perplexity", "bits_per_byte")


@dataclass
class Retained:
    """The documents of --retain, as rows.

    Attributes:
        rows: None without --retain.
        counts: entries of the results file: documents left out, ledgers.
        fingerprints: of the token stores.
    """

    rows: JoinedRows | None
    counts: dict
    fingerprints: list[str]


def retained_rows(
    stores: dict[str, TokenStore], training: dict[str, TokenStore], train_rows: JoinedRows, arguments: SharedArguments
) -> Retained:
    """Return rows of the documents of ``stores`` that are not trained on; without stores, no rows.

    Left out, and counted as duplicates in the ledger of each source: documents that are trained on, and copies of an
    earlier document (unless --keep_duplicates). Dropped: the last partial row of each source.

    Args:
        training: the token stores that ``train_rows`` are made of.

    Raises:
        InputError: less than one row is left.
    """
    if not stores:
        return Retained(None, {}, [])
    chosen = [rows.chosen for rows in train_rows.sources]
    trained_on = [store.id_hashes()[mask] for store, mask in zip(training.values(), chosen, strict=True)]
    hashes = np.concatenate([store.id_hashes() for store in stores.values()])
    in_training = np.isin(hashes, np.concatenate(trained_on))
    left_out = in_training if arguments.keep_duplicates else in_training | repeated(hashes)
    packed, ledgers, first = [], {}, 0  # first: of the documents of all stores
    isolated = arguments.packing == "isolated"
    for name, store in stores.items():
        out = left_out[first : first + store.documents]
        nothing = np.zeros(store.documents, dtype=bool)
        rows = PackedRows(store, ~out, arguments.context_length, isolated, arguments.max_eval_rows)
        ledgers[name] = Ledger.of(store, Split(nothing, ~out, nothing, out), {"held_out": rows})
        say(f"ledger of --retain {name}: {ledgers[name]}")
        packed.append(rows)
        first += store.documents
    joined = JoinedRows(packed)
    say(f"--retain: {int(in_training.sum()):,} of its {len(hashes):,} documents are trained on, and left out")
    if len(joined) == 0:
        raise InputError(
            f"--retain: {joined.stream_tokens:,} tokens in documents that are not trained on, less than one row of "
            f"{arguments.context_length:,} + 1. Give other text, or more of it."
        )
    counted = {name: asdict(ledger) for name, ledger in ledgers.items()}
    counts = {"retain_documents_trained_on": int(in_training.sum()), "retain_sources": counted}
    return Retained(joined, counts, [store.fingerprint() for store in stores.values()])


class MeasureBefore(TrainerCallback):
    """Evaluate both held-out sets before the first step; stop if pretrained weights know nothing of the text.

    It does so when training begins and not earlier, because DeepSpeed and FSDP have the model ready only then.
    """

    def __init__(
        self, trainer: PretrainingTrainer, retained: JoinedRows | None, pretrained: bool, accept_weak_weights: bool
    ):
        self.trainer, self.retained, self.pretrained = trainer, retained, pretrained
        self.accept_weak_weights = accept_weak_weights

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step > self.trainer.run.measured_from:  # a continued run, whose checkpoint has the figures
            return
        held_out = self.trainer.evaluate()
        rows = model.config.get_text_config().vocab_size
        by_frequency = unigram_loss(self.trainer.train_dataset, self.trainer.eval_dataset, rows)
        say(
            f"before training: {held_out['eval_loss']:.4f} nats a token; by chance ln({rows:,}) = {np.log(rows):.4f}, "
            f"by token frequency alone {by_frequency:.4f}"
        )
        if self.pretrained and state.global_step == 0:  # the text of a branch may be new to it
            check_start(held_out["eval_loss"], by_frequency, rows, self.accept_weak_weights)
        if self.retained is not None:
            retained = self.trainer.evaluate(self.retained, metric_key_prefix="retain")
            say(f"before training, --retain: {retained['retain_loss']:.4f} nats a token")


def figures_before(log_history: list[dict], step: int = 0) -> dict[str, float]:
    """Return the figures that MeasureBefore measured, from the log of a run: ``before_eval_loss`` and so on.

    ``step``: at which they were measured. It is above 0 in a branch that holds out other documents.
    """
    wanted = [f"{prefix}_{figure}" for prefix in SETS for figure in FIGURES]
    measured = [entry for entry in log_history if entry["step"] == step]
    return {f"before_{name}": entry[name] for entry in measured for name in wanted if name in entry}


def before_and_after(results: dict) -> str:
    """Return a table, as text, of both held-out sets before and after training.

    Args:
        results: of the run, with the entries of ``figures_before``.
    """
    lines = [f"{'':<16} {'tokens':>11}   {'loss':^19}   {'perplexity':^23}   {'bits per byte':^19}"]
    for prefix, name in SETS.items():
        if f"before_{prefix}_loss" not in results:
            continue
        loss, perplexity, bits = (
            (results[f"before_{prefix}_{figure}"], results[f"{prefix}_{figure}"]) for figure in FIGURES
        )
        lines.append(
            f"{name:<16} {results[f'{prefix}_tokens']:>11,}   {loss[0]:>8.4f} -> {loss[1]:<7.4f}   "
            f"{perplexity[0]:>10,.2f} -> {perplexity[1]:<9,.2f}   {bits[0]:>8.4f} -> {bits[1]:<7.4f}"
        )
    return "\n".join(lines)
