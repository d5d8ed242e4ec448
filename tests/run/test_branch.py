"""--branch_from: exact where nothing differs, recorded where something does, and each source continues where it can."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_recipe, losses, small_run
from launched_processes import FSDP2, in_launched_processes, meet_again
from safetensors.torch import load_file

from common.arguments import SharedArguments
from common.console import InputError
from common.dataset.packing import JoinedRows

CHINESE, ENGLISH = (str(ROOT / "data" / f"sample_{language}.jsonl") for language in ("zh", "en"))
STATES = ("optimizer", "rng_state", "scheduler")  # files of a checkpoint begin so, whatever the strategy
NOISE = ["--neftune_noise_alpha", "5"]  # drawn in every step: the random states must be those of the run


@pytest.fixture(scope="module")
def quick(wiki):
    """The recipe with one prompt: generating takes longer than these runs' training."""
    prompts, wiki.PROMPTS = wiki.PROMPTS, wiki.PROMPTS[:1]
    yield wiki
    wiki.PROMPTS = prompts


@pytest.fixture(scope="module")
def trunk(quick, cache_dir, tmp_path_factory) -> Path:
    """A run of 6 steps, with checkpoints at 3 and 6."""
    folder = tmp_path_factory.mktemp("trunk") / "run"
    quick.main(small_run(cache_dir, folder, *NOISE))
    return folder


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def logged(folder: Path, name: str) -> dict[int, float]:
    history = read(folder / "trainer_state.json")["log_history"]
    return {entry["step"]: entry[name] for entry in history if name in entry and "loss" in entry}


def same(one, other) -> bool:
    """Whether two states of nested dicts, lists and tensors are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool((one == other).all()) if hasattr(one, "all") else one == other


def assert_same_end(one: Path, other: Path) -> None:
    for name in ("loss", "grad_norm", "learning_rate", "tokens_seen"):
        assert logged(one, name) == logged(other, name)
    assert same(load_file(one / "model.safetensors"), load_file(other / "model.safetensors"))
    ends = [folder / f"checkpoint-{read(folder / 'trainer_state.json')['global_step']}" for folder in (one, other)]
    states = [sorted(file.name for file in end.iterdir() if file.name.startswith(STATES)) for end in ends]
    assert states[0] == states[1] and len(states[0]) >= len(STATES)
    for name in states[0]:
        assert same(*(torch.load(end / name, weights_only=False) for end in ends)), name


def test_a_branch_with_nothing_changed_equals_the_run_to_the_bit(quick, cache_dir, trunk, tmp_path):
    quick.main(small_run(cache_dir, tmp_path, *NOISE, "--branch_from", str(trunk / "checkpoint-3")))
    assert_same_end(tmp_path, trunk)
    assert len(logged(tmp_path, "loss")) == 6 and not (tmp_path / "checkpoint-3").exists()
    assert read(tmp_path / "all_results.json")["eval_loss"] == read(trunk / "all_results.json")["eval_loss"]
    assert read(tmp_path / "all_results.json")["ledger"] == read(trunk / "all_results.json")["ledger"]
    branch = read(tmp_path / "branch.json")
    assert branch["changed"] == {} and branch["step"] == 3 and branch["tokens"] == 3 * 256


def test_decay_now_by_hand_and_the_branch_needs_the_run_no_more(quick, cache_dir, trunk, tmp_path, capsys):
    """The rate of step 4 + k is 1e-3 * (1 + cos(pi k / 5)) / 2: a cosine over 5 steps, which begins at once."""
    shutil.copytree(trunk, tmp_path / "run")
    kwargs = json.dumps({"num_decay_steps": 5})
    decay = ["--max_steps", "8", "--lr_scheduler_kwargs", kwargs, "--weight_decay", "0.2", "--save_steps", "2"]
    decay += ["--branch_from", str(tmp_path / "run" / "checkpoint-3")]
    quick.main(small_run(cache_dir, tmp_path / "decayed", *NOISE, *decay))
    rates = logged(tmp_path / "decayed", "learning_rate")
    assert {step: rates[step] for step in (1, 2, 3)} == {k: logged(trunk, "learning_rate")[k] for k in (1, 2, 3)}
    for k in range(5):
        assert rates[4 + k] == pytest.approx(1e-3 * (1 + math.cos(math.pi * k / 5)) / 2)
    assert [loss for step, loss in losses(tmp_path / "decayed").items() if step <= 4] == [
        loss for step, loss in losses(trunk).items() if step <= 4
    ], "the loss of step 4 is that before the first changed update"

    changed = {
        "training.lr_scheduler_kwargs.num_decay_steps": [0.3, 5],
        "training.weight_decay": [0.1, 0.2],
        "max_steps": [6, 8],
    }
    assert read(tmp_path / "decayed" / "branch.json")["changed"] == changed
    assert read(tmp_path / "decayed" / "all_results.json")["branch"]["changed"] == changed
    printed = capsys.readouterr().out
    assert "branch: training.weight_decay was 0.1, and is 0.2 from here on" in printed
    assert "the order of rows is the same, and continues at the next row" in printed
    assert "training.weight_decay 0.1 -&gt; 0.2" in (tmp_path / "decayed" / "report.html").read_text()
    assert "- training.weight_decay: `0.1` -> `0.2`" in (tmp_path / "decayed" / "README.md").read_text()

    # Cut off after step 6, and the other run gone: the same command continues.
    shutil.copytree(tmp_path / "decayed", tmp_path / "cut")
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-8")
    (tmp_path / "cut" / "all_results.json").unlink()
    quick.main(small_run(cache_dir, tmp_path / "cut", *NOISE, *decay))
    assert_same_end(tmp_path / "cut", tmp_path / "decayed")
    capsys.readouterr()
    quick.main(small_run(cache_dir, tmp_path / "cut", *NOISE, *decay))
    assert "is finished; nothing to train" in capsys.readouterr().out


def test_a_batch_that_grows_is_a_branch(quick, cache_dir, trunk, tmp_path, capsys):
    """Three steps of 4 rows, then two of 8: the next rows of the same order."""
    grown = ["--branch_from", str(trunk / "checkpoint-3"), "--tokens_per_step", "512", "--max_steps", "5"]
    quick.main(small_run(cache_dir, tmp_path, *NOISE, *grown))
    rows = {1: 4, 2: 8, 3: 12, 4: 20, 5: 28}
    assert logged(tmp_path, "tokens_seen") == {step: 64 * trained for step, trained in rows.items()}
    assert read_results(tmp_path)["ledger"]["rows_trained"] == 28
    assert read(tmp_path / "branch.json")["changed"] == {"data.rows_per_step": [4, 8], "max_steps": [6, 5]}
    assert "the order of rows is the same, and continues at the next row" in capsys.readouterr().out


@pytest.mark.parametrize(("packing", "said"), [("isolated", "the same, and continues"), ("best_fit", "new")])
def test_a_branch_with_other_packing(quick, cache_dir, trunk, tmp_path, capsys, packing, said):
    """Isolated rows are those of cross, so their order goes on. Those of best_fit are others."""
    flags = [*NOISE, "--packing", packing, "--branch_from", str(trunk / "checkpoint-3")]
    quick.main(small_run(cache_dir, tmp_path / "run", *flags))
    printed = capsys.readouterr().out
    assert f"branch: data.packing was 'cross', and is '{packing}' from here on" in printed
    assert f"branch: the order of rows is {said}" in printed
    assert losses(tmp_path / "run").keys() == {1, 2, 3, 4, 5, 6}


def test_a_source_continues_after_its_rows_in_another_mixture(quick, cache_dir, tmp_path, monkeypatch, capsys):
    """A run on one source, a branch with a second one, a branch of that with other weights: no row comes twice."""
    fetched = []
    get = JoinedRows.__getitems__

    def noted(self, rows):
        found = get(self, rows)
        if self.documents > 100:  # training, not held-out rows
            fetched.extend(tuple(row["input_ids"].tolist()) for row in found)
        return found

    def rows_of(folder, *flags):
        fetched.clear()
        quick.main(small_run(cache_dir, tmp_path / folder, "--eval_strategy", "no", *flags))
        return list(fetched)

    rows_of("alone", "--data", CHINESE, "--max_steps", "1")
    monkeypatch.setattr(JoinedRows, "__getitems__", noted)
    tokenizer = ["--tokenizer", str(tmp_path / "alone")]
    alone = rows_of("alone12", "--data", CHINESE, *tokenizer, "--max_steps", "12")
    english = rows_of("english", "--data", ENGLISH, *tokenizer, "--max_steps", "12")

    rows_of("run", "--data", CHINESE, *tokenizer, "--max_steps", "3")
    at_3 = ["--branch_from", str(tmp_path / "run" / "checkpoint-3"), *tokenizer]
    mixed = rows_of("mixed", *at_3, "--data", CHINESE, ENGLISH, "--data_weights", "3", "1", "--max_steps", "5")
    own = [row for row in mixed if row in alone]
    assert len(mixed) == 8 and own == alone[12:18], "the next rows that the run itself would have had"
    assert len([row for row in mixed if row not in alone]) == 2
    assert "source 1 after the 12 rows that were trained on, source 2 at its first row" in capsys.readouterr().out
    trained = {name: source["rows_trained"] for name, source in read_results(tmp_path / "mixed")["sources"].items()}
    assert trained == {"sample_zh": 12 + 6, "sample_en": 2}
    assert read_results(tmp_path / "mixed")["branch"]["tokens_elsewhere"] == 0

    again = ["--data", CHINESE, ENGLISH, "--data_weights", "1", "1", *tokenizer, "--max_steps", "6"]
    more = rows_of("more", *again, "--branch_from", str(tmp_path / "mixed" / "checkpoint-5"))
    assert [row for row in more if row in alone] == alone[18:20]
    trained = {name: source["rows_trained"] for name, source in read_results(tmp_path / "more")["sources"].items()}
    assert trained == {"sample_zh": 20, "sample_en": 4}

    other = rows_of("other", *at_3, "--data", ENGLISH, "--max_steps", "4")
    assert other == english[:4]
    results = read_results(tmp_path / "other")
    assert results["ledger"]["rows_trained"] == 4 and results["branch"]["tokens_elsewhere"] == 12 * 64
    assert read(tmp_path / "other" / "branch.json")["measured_from"] == 3
    assert "text that was trained on may come again" in capsys.readouterr().out


def test_too_few_documents_for_the_same_split_are_warned_of_and_begin_anew(quick, cache_dir, trunk, tmp_path, capsys):
    """At 1 in 2,000, no document is held out by its hash: the lowest hash of all sources is, which another one has."""
    flags = ["--tokenizer", str(trunk), "--held_out_fraction", "0.0005", "--max_steps"]
    run, branch = tmp_path / "run", tmp_path / "branch"
    quick.main(small_run(cache_dir, run, *flags, "3", "--data", ENGLISH))
    mixture = ["--data", ENGLISH, CHINESE, "--data_weights", "1", "1", "--branch_from", str(run / "checkpoint-3")]
    capsys.readouterr()
    quick.main(small_run(cache_dir, branch, *flags, "5", *mixture))
    held_out = [
        {name: source["documents_held_out"] for name, source in read_results(folder)["sources"].items()}
        for folder in (run, branch)
    ]
    assert held_out == [{"sample_en": 1}, {"sample_en": 0, "sample_zh": 1}]
    printed = capsys.readouterr().out
    assert "warning: branch: so few documents are in both runs" in printed
    assert "the order of rows is new. It begins at its first row" in printed
    assert read(branch / "branch.json")["taken"] == [0, 0]


def read_results(folder: Path) -> dict:
    return read(folder / "all_results.json")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--branch_from", "RUN"], r"no manifest.json.*There are .*checkpoint-3, .*checkpoint-6"),
        (["--branch_from", "RUN/checkpoint-4"], "there is no such folder.*There are .*checkpoint-3"),
        (["--branch_from", "RUN/checkpoint-3", "--output_dir", "RUN"], "A branch needs a folder of its own"),
        (["--branch_from", "RUN/checkpoint-3", "--context_length", "32"], "context_length: 64 there, 32 here"),
        (["--branch_from", "RUN/checkpoint-3", "--data", ENGLISH], "--tokenizer .*checkpoint-3"),
        (["--branch_from", "RUN/checkpoint-3", "--optimizer", "muon"], "data.optimizer: 'adamw' there, 'muon' here"),
        (["--branch_from", "RUN/checkpoint-3", "--max_steps", "2"], "has made 3 steps = 12 rows, more than is asked"),
    ],
)
def test_what_cannot_branch_is_refused(quick, cache_dir, trunk, tmp_path, flags, message):
    flags = [flag.replace("RUN", str(trunk)) for flag in flags]
    with pytest.raises(InputError) as error:
        quick.main(small_run(cache_dir, tmp_path / "branch", *NOISE, *flags))
    assert re.search(message, str(error.value), re.DOTALL), error.value
    assert not (tmp_path / "branch" / "run.json").exists()


def test_it_goes_with_no_other_start():
    with pytest.raises(InputError, match="Leave --init_from out"):
        SharedArguments(branch_from="a", init_from="b")
    with pytest.raises(InputError, match="--branch_from '': names no checkpoint"):
        SharedArguments(branch_from="")
    with pytest.raises(InputError, match="--init_from '': names no checkpoint"):
        SharedArguments(init_from="")


def test_the_tokenizer_that_the_refusal_names_is_the_runs(quick, cache_dir, trunk, tmp_path):
    """The run trained its tokenizer on its text. A branch with other text takes it from the run's checkpoint."""
    flags = ["--data", ENGLISH, "--branch_from", str(trunk / "checkpoint-3"), "--max_steps", "4", *NOISE]
    with pytest.raises(InputError, match="a branch has the tokenizer of its run") as unknown:
        quick.main(small_run(tmp_path / "empty", tmp_path / "branch", *flags))
    quick.main(small_run(cache_dir, tmp_path / "another", "--data", ENGLISH, "--max_steps", "1"))
    with pytest.raises(InputError, match="data.tokenizer: .* there, .* here") as trained:
        quick.main(small_run(cache_dir, tmp_path / "branch", *flags))
    named = [re.findall(r"--tokenizer (\S+checkpoint-3)", str(error.value)) for error in (unknown, trained)]
    assert named == [[str(trunk / "checkpoint-3")]] * 2
    quick.main(small_run(cache_dir, tmp_path / "branch", *flags, "--tokenizer", *named[0]))
    assert read(tmp_path / "branch" / "branch.json")["changed"].keys() == {"data.documents", "max_steps"}


MIXED = {  # folder -> where it branches off, and its flags
    "run": (None, ["--data", CHINESE, "--max_steps", "3"]),
    "mixed": ("run/checkpoint-3", ["--data", CHINESE, ENGLISH, "--data_weights", "3", "1", "--max_steps", "5"]),
    "more": ("mixed/checkpoint-5", ["--data", CHINESE, ENGLISH, "--data_weights", "1", "1", "--max_steps", "6"]),
    "decayed": ("mixed/checkpoint-5", ["--data", CHINESE, ENGLISH, "--data_weights", "3", "1", "--max_steps", "7",
                                       "--weight_decay", "0.2", "--lr_scheduler_kwargs", '{"num_decay_steps": 2}']),
}  # fmt: skip


def make_runs(folder: Path, *flags: str, between=lambda: None) -> None:
    """Make the runs of MIXED in ``folder``, with the tokenizer that is there."""
    recipe = load_recipe("wiki_zh_scratch")
    recipe.PROMPTS = recipe.PROMPTS[:1]
    for name, (branch_from, own) in MIXED.items():
        own = [*own, *flags, "--tokenizer", str(folder / "tokenizer"), "--optimizer", "adamw"]
        if branch_from is not None:
            own += ["--branch_from", str(folder / branch_from)]
        recipe.main(small_run(folder / "cache", folder / name, *own))
        between()


def check_branches(rank: int, folder: Path) -> None:
    """A run of 6 steps and its branch from step 3 with nothing changed; then the runs of MIXED."""
    recipe = load_recipe("wiki_zh_scratch")
    recipe.PROMPTS = recipe.PROMPTS[:1]
    two = [*NOISE, "--per_device_train_batch_size", "2", "--tokenizer", str(folder / "tokenizer")]
    recipe.main(small_run(folder / "cache", folder / "trunk", *two))
    meet_again()
    recipe.main(small_run(folder / "cache", folder / "same", *two, "--branch_from", str(folder / "trunk/checkpoint-3")))
    meet_again()
    make_runs(folder, "--per_device_train_batch_size", "2", between=meet_again)


@pytest.mark.heavy
@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_branches_of_two_processes(quick, cache_dir, trunk, tmp_path, environment):
    """To the bit where nothing differs; else the decisions, the rows and, within 2e-5, the losses of one process.

    A branch of one process from the checkpoint of two under DDP continues with the same rows, too. From one under FSDP2
    it is refused before it has a folder.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "cache").symlink_to(cache_dir)
        (folder / "tokenizer").symlink_to(trunk)
    in_launched_processes(2, check_branches, two, **environment)
    assert_same_end(two / "same", two / "trunk")
    assert len([*(two / "same" / "checkpoint-6").glob("rng_state_*.pth")]) == 2
    assert read(two / "same" / "branch.json")["changed"] == {}
    assert read_results(two / "same")["ledger"] == read_results(two / "trunk")["ledger"]

    make_runs(one)
    for name in MIXED:
        assert losses(two / name) == pytest.approx(losses(one / name), rel=2e-5), name
        assert logged(two / name, "learning_rate") == logged(one / name, "learning_rate")
        assert read_results(two / name)["ledger"] == read_results(one / name)["ledger"]
        assert read_results(two / name)["eval_loss"] == pytest.approx(read_results(one / name)["eval_loss"], rel=2e-5)
        if name != "run":
            branch, other = (read(folder / name / "branch.json") for folder in (two, one))
            assert branch | {"checkpoint": ""} == other | {"checkpoint": ""}
    trained = {name: source["rows_trained"] for name, source in read_results(two / "more")["sources"].items()}
    assert trained == {"sample_zh": 12 + 6 + 2, "sample_en": 2 + 2}

    branch = ["--branch_from", str(two / "mixed" / "checkpoint-5"), "--tokenizer", str(two / "tokenizer")]
    by_one = small_run(cache_dir, tmp_path / "by_one", *MIXED["more"][1], "--optimizer", "adamw", *branch)
    if environment:
        with pytest.raises(InputError, match="checkpoint-5 was written under FSDP2; single on 1 processes cannot"):
            quick.main(by_one)
        assert not (tmp_path / "by_one").exists()
    else:
        quick.main(by_one)
        assert losses(tmp_path / "by_one") == pytest.approx(losses(one / "more"), rel=2e-5)
