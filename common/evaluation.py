"""What an evaluation says: exact sums over all batches of all processes, divided once."""

import math


def held_out_metrics(batches: list[tuple[float, int]], target_bytes: float, prefix: str) -> dict[str, float]:
    """Return loss, perplexity, bits per byte and targets of ``batches``, named ``{prefix}_loss`` and so on.

    Args:
        batches: (nats, targets) of each batch, nats being the sum over its targets.
        target_bytes: of UTF-8 text that all targets are. Bits per byte compare different tokenizers.

    Source: The Pile, section 3.1, https://arxiv.org/abs/2101.00027
    """
    nats, targets = (sum(column) for column in zip(*batches, strict=True))
    loss = nats / targets
    return {
        f"{prefix}_loss": loss,
        f"{prefix}_perplexity": math.exp(loss) if loss < 709 else math.inf,  # what a float holds
        f"{prefix}_bits_per_byte": nats / target_bytes / math.log(2),
        f"{prefix}_tokens": targets,
    }
