"""Byte-level BPE, trained by a process of its own, so that Ctrl-C ends it and the time left is known.

tokenizers trains in one call, which Python cannot interrupt. How far it is, it says on stderr only. As a script, this
file needs no more than tokenizers:

    python bpe.py TEXTS.json VOCABULARY_SIZE TOKENIZER.json
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

END_TOKEN = "<|endoftext|>"  # Qwen's and GPT-2's end-of-document token
# Qwen2's pre-tokenisation: each digit alone, letters of any script together, white space separate.
# Source: pre_tokenizer of https://huggingface.co/Qwen/Qwen2-0.5B/blob/main/tokenizer.json
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A pair of tokens is merged only if it occurs so often in the sample, so a small text gives a small vocabulary: a token
# that a model hardly meets is not learnt. 5 is word2vec's limit for words (-min-count).
# Source: https://code.google.com/archive/p/word2vec/. Gowda and May would rather have 95% of the tokens 100 times:
# https://aclanthology.org/2020.findings-emnlp.352/
LEAST_OCCURRENCES = 5
MERGING = "Compute merges"  # the stage of tokenizers that takes the time


def train_bpe(texts: Iterable[str], vocabulary_size: int, progress_format: str = "silent") -> Tokenizer:
    """Train a byte-level BPE tokenizer with Qwen2's pre-tokenisation on ``texts``.

    Args:
        progress_format: "silent", or "json": one line for each merge on stderr, as tokenizers 0.23 writes it.
    """
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=LEAST_OCCURRENCES,
        show_progress=progress_format != "silent",
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    if hasattr(trainer, "progress_format"):  # earlier versions have bars only, and none in a pipe
        trainer.progress_format = progress_format
    backend.train_from_iterator(texts, trainer=trainer)
    return backend


def train_bpe_aside(texts: list[str], vocabulary_size: int) -> Tokenizer:
    """Do as ``train_bpe`` in a process of its own, and show the time left.

    Raises:
        RuntimeError: the process fails; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "texts.json"), Path(folder, "tokenizer.json")
        given.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
        command = [sys.executable, __file__, str(given), str(vocabulary_size), str(result)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8") as process:
            try:
                said = show_merges(process.stderr)
            except BaseException:  # Ctrl-C, for example
                process.kill()
                raise
        if process.returncode != 0:
            raise RuntimeError(f"training the tokenizer failed ({process.returncode}): {' '.join(said[-3:])}")
        return Tokenizer.from_file(str(result))


def show_merges(lines: Iterable[str]) -> list[str]:
    """Show how far the training is whose stderr has ``lines``, until they end; return what else it said."""
    from common.progress import Progress  # not needed, and perhaps not found, where this file is run

    said = []
    with Progress("training the tokenizer", 100, "%") as progress:
        for line in lines:
            if not line.startswith('{"stage"'):
                said.append(line.strip())
                continue
            state = json.loads(line)
            if state["stage"] == MERGING:
                progress.reach(100 * share_done(state["current"], state["total"]))
    return said


def share_done(merges: int, total: int) -> float:
    """Return about which share of the time has passed when so many merges are done.

    The first ones take longest, because their pairs are the most frequent. Measured with 8,000 tokens on 4 MB of
    Chinese, 48 s: 26% of the time after 309 merges (here 28%), 57% after 3,090 (60%), 85% after 6,180 (87%).
    """
    return 0.6 * merges / total + 0.4 * math.log1p(merges) / math.log1p(total)


if __name__ == "__main__":
    texts_file, size, result_file = sys.argv[1:]
    sample = json.loads(Path(texts_file).read_text(encoding="utf-8"))
    train_bpe(sample, int(size), "json").save(result_file)
