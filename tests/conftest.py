"""Tests run offline, on the CPU, and leave the checkout as it was."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from common.corpus.splits import content_hash
from common.tokens.store import TokenStore
from common.tokens.token_index import write_index

os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is imported. With a GPU, its tests: TEST_GPU=0 python -m pytest -k 'cuda or gpu'
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("TEST_GPU", "")

from common.train import callbacks

callbacks.SAMPLE_TOKENS = 6  # generating 60 takes half of a small run's time; also in the processes of tests
settings.register_profile("no deadline", deadline=None)  # a busy machine is not a failure
settings.load_profile("no deadline")
ROOT = Path(__file__).resolve().parent.parent
END = 0


def store_of_tokens(folder: Path, documents: list[list[int]], end: list[int] = [END]):  # noqa: B006
    """Return a token store of documents given as token ids below 1,000, with ``end`` behind each."""
    prefix = Path(folder) / "tokens"
    closed = [[*document, *end] for document in documents]
    np.array([token for document in closed for token in document], np.uint16).tofile(f"{prefix}.bin")
    write_index(f"{prefix}.idx", np.array([len(document) for document in closed], np.int32), np.dtype(np.uint16))
    hashes = [content_hash(str(document).encode()) for document in documents]
    np.save(f"{prefix}.hashes.npy", np.array(hashes, np.uint64))
    return TokenStore(prefix)


def load_recipe(name: str):
    """Import recipes/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def compiled_afresh():
    """Forget what other files have compiled: torch.compile stops at 8 variants of a function, whoever wants them."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture(scope="session")
def wiki():
    return load_recipe("wiki_zh_scratch")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """One cache of tokenizers and tokens for all tests."""
    return tmp_path_factory.mktemp("cache")


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A model of 512 ids that has read the English articles: about 4 nats a token, by chance 6.2."""
    return trained_weights(tmp_path_factory.mktemp("weights") / "small", key_value_heads=1)


def trained_weights(folder: Path, key_value_heads: int) -> Path:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from common.tokens.train_tokenizer import train_tokenizer

    torch.manual_seed(0)
    texts = texts_of(ROOT / "data" / "sample_en.jsonl")
    tokenizer = train_tokenizer(texts, 512)
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    rows = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    shape = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2)
    config = Qwen2Config(vocab_size=512, max_position_embeddings=128, num_key_value_heads=key_value_heads, **shape)
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(150):
        batch = rows[torch.randint(len(rows), (16,))]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_run(cache_dir: Path, output_dir: Path, *flags: str) -> list[str]:
    """Return the flags of a run of a few seconds: 6 steps of 4 rows of 64 tokens."""
    return [
        *"--sample --max_steps 6 --context_length 64 --tokens_per_step 256 --per_device_train_batch_size 4".split(),
        *"--optimizer adamw --learning_rate 1e-3 --weight_decay 0.1".split(),
        *"--logging_steps 1 --eval_steps 3 --save_steps 3 --swanlab off --disable_tqdm true".split(),
        *"--max_eval_rows 5 --per_device_eval_batch_size 4".split(),
        *("--cache_dir", str(cache_dir), "--output_dir", str(output_dir)),
        *flags,
    ]


def losses(folder: Path) -> dict[int, float]:
    """Return the logged training loss of every step of a finished run."""
    history = json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
