"""A tokenizer that is trained in a process of its own: the same tokenizer, with the time left, ended by Ctrl-C."""

import json
import subprocess

import pytest
from conftest import ROOT, texts_of

from common.tokens import bpe, train_tokenizer
from common.tokens.bpe import share_done, show_merges, train_bpe, train_bpe_aside

TEXTS = texts_of(ROOT / "data" / "sample_zh.jsonl")[:40]


def test_it_is_the_same_tokenizer():
    assert train_bpe_aside(TEXTS, 600).to_str() == train_bpe(TEXTS, 600).to_str()


def test_a_large_sample_is_trained_aside(monkeypatch):
    sizes = []
    monkeypatch.setattr(train_tokenizer, "SMALL_BYTES", 1)
    monkeypatch.setattr(
        train_tokenizer, "train_bpe_aside", lambda texts, size: sizes.append(size) or train_bpe(texts, size)
    )
    assert len(train_tokenizer.train_tokenizer(TEXTS, 300)) == 300 and sizes == [300]


class Shown:
    """Stands in for Progress."""

    def __init__(self, *_):
        self.reached, self.closed = [], False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def reach(self, done):
        self.reached.append(done)


@pytest.fixture
def shown(monkeypatch):
    bar = Shown()
    monkeypatch.setattr("common.progress.Progress", lambda *_: bar)
    return bar


def test_how_far_it_is_is_shown(shown):
    """What tokenizers 0.23 says on stderr, and what it does not say itself."""
    stages = [("Tokenize words", 0, 5), ("Compute merges", 0, 300), ("Compute merges", 20, 300)]
    lines = [json.dumps({"stage": s, "current": c, "total": t}, separators=(",", ":")) + "\n" for s, c, t in stages]
    assert show_merges([*lines, "thread panicked\n"]) == ["thread panicked"]
    assert shown.reached == [0, pytest.approx(100 * share_done(20, 300))] and shown.closed


def test_the_process_says_how_far_it_is(shown):
    """A new version of tokenizers that says it in other words fails here."""
    train_bpe_aside(TEXTS, 600)
    assert len(shown.reached) > 100 and shown.reached == sorted(shown.reached) and shown.reached[-1] == 100


def test_the_share_rises_from_nothing_to_all():
    shares = [share_done(merges, 8000) for merges in range(0, 8001, 100)]
    assert shares[0] == 0 and shares[-1] == pytest.approx(1) and shares == sorted(shares)


def test_ctrl_c_ends_the_process(monkeypatch):
    started = []

    class Noted(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Noted)
    monkeypatch.setattr(bpe, "show_merges", stop)
    with pytest.raises(KeyboardInterrupt):
        train_bpe_aside(TEXTS * 50, 8000)
    [process] = started
    assert process.wait(timeout=10) != 0


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="training the tokenizer failed .*not-a-number"):
        train_bpe_aside(TEXTS, "not-a-number")
