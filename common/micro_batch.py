"""The micro-batch where it is left open: as many rows at once as fit the card, until more make it no faster.

Large micro-batches keep the card busy while the CPU prepares the next layers, above all where several cards exchange
something for each layer. The losses do not depend on it: what a step trains on is ``--tokens_per_step``.
"""

from dataclasses import replace

from transformers import PreTrainedModel

from common.memory import GIB, Setting, predict

FASTEST_TOKENS = 65_536  # 123M on an H100: 490k tokens/s with 32,768 at once, 508k with these (benchmarks/README.md)
UNKNOWN_TOKENS = 8192  # where memory or model is not known
USED_SHARE = 0.85  # of the card. The prediction is within 5%; memory in pieces and other libraries want some


def rows_that_fit(model: PreTrainedModel | None, setting: Setting, rows_a_step: int, limit_gib: float | None) -> int:
    """Return how many rows ``setting`` should take at once; at least 1, whether that fits or not.

    Args:
        model: on any device, or on none; None: not known.
        setting: its ``rows`` are not read.
        rows_a_step: of each process.
        limit_gib: memory of a card; None: not known.
    """
    known = model is not None and limit_gib is not None
    tokens = FASTEST_TOKENS if known else UNKNOWN_TOKENS
    rows = max(1, min(tokens // setting.context_length, rows_a_step))
    while known and rows > 1:
        tried = replace(setting, rows=rows, accumulated=rows_a_step > rows)
        if predict(model, tried).total <= USED_SHARE * limit_gib * GIB:
            break
        rows = (rows + 1) // 2 if rows > 2 else 1
    return rows
