"""What takes seconds to find out about a tokenizer, kept in ``cache_dir`` for the next time.

It is found again only for the same tokenizer, the same versions of the libraries that it is about, and the same code of
this project: all of that is in the file's name. A file that cannot be read is made again.
"""

import hashlib
import os
import unicodedata
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from common.corpus.sources import mark_as_cache
from common.tokens.tiktoken_engine import CODE_POINTS, Facts

CODE = ("proofs.py", "encoding.py", "tiktoken_engine.py")


@dataclass(frozen=True)
class Proof:
    """Whether tiktoken gives the ids of a tokenizer.

    Attributes:
        reason: why it does not, as the end of a sentence; "" if it does.
        facts: what its engine is built from; None if it does not.
        tried: texts on which both were compared.
    """

    reason: str = ""
    facts: Facts | None = None
    tried: int = 0


def place_of_proof(cache_dir: str | Path, tokenizer_json: str, end_token: str | None) -> Path:
    """Return the file for the proof about a tokenizer, given as its tokenizer.json and end-of-document token."""
    known = hashlib.sha256(tokenizer_json.encode())
    versions = [
        end_token,
        unicodedata.unidata_version,
        *(f"{name} {version(name)}" for name in ("tiktoken", "tokenizers")),
    ]
    known.update(repr(versions).encode())
    for name in CODE:
        known.update(Path(__file__).with_name(name).read_bytes())
    return Path(cache_dir) / "tokenizer_proofs" / f"{known.hexdigest()[:32]}.npz"


def read_proof(path: Path) -> Proof | None:
    """Return the proof that ``write_proof`` wrote to ``path``; None if there is none, or if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            reason, tried = str(file["reason"]), int(file["tried"])
            if reason:
                return Proof(reason)
            joined, ends = file["tokens"].tobytes(), file["ends"].tolist()
            id_of_rank = file["id_of_rank"]
            disputed = np.unpackbits(file["disputed"], count=CODE_POINTS).astype(bool)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    tokens = [joined[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return Proof(reason, Facts(ranks, id_of_rank, disputed), tried)


def write_proof(path: Path, proof: Proof) -> None:
    """Keep ``proof`` in ``path``. A disk that does not take it is no reason to stop: it is found out again then."""
    found = {"reason": np.array(proof.reason), "tried": np.array(proof.tried)}
    if proof.facts is not None:
        tokens = list(proof.facts.ranks)
        found |= {
            "tokens": np.frombuffer(b"".join(tokens), np.uint8),
            "ends": np.cumsum([len(token) for token in tokens]),
            "id_of_rank": proof.facts.id_of_rank,
            "disputed": np.packbits(proof.facts.disputed),
        }
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        mark_as_cache(path.parent)
        with partial.open("wb") as file:
            np.savez(file, **found)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
