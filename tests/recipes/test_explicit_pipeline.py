"""The pipeline against explicit_loop.py on one process: the same numbers, whatever is cut and however it is scheduled.

Every trap of pipelines that trains wrongly without a message moves one of these numbers: gradients scaled by the
micro-batches, a tied embedding with one of its two gradients or counted twice in the norm, a norm over one stage only,
targets counted by micro-batch or by replica, documents whose borders later stages do not know or a cache hides.
"""

import ast
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_recipe, small_run
from launched_processes import in_launched_processes
from safetensors.torch import load_file
from test_distributed import launch
from test_explicit_loop import ODD as ODD_OF_LOOP
from test_explicit_loop import assert_same, by_step
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from common.arguments import SharedArguments
from common.console import InputError
from common.trainer_fields import deciding_fields

# 0.017 passes end in a partial step, which ignored rows complete; so do 5 held-out rows. Micro-batches of one row.
ODD = "--max_steps -1 --num_train_epochs 0.017 --per_device_train_batch_size 1".split()
TOLERANCE = 2e-6
SOURCE = (ROOT / "recipes" / "explicit_pipeline.py").read_text(encoding="utf-8")


def small_pipeline(cache_dir: Path, output_dir: Path, *flags: str) -> list[str]:
    """Return the flags of a small run, without one that the recipe does not read."""
    given = small_run(cache_dir, output_dir, *flags)
    place = given.index("--per_device_eval_batch_size")
    return given[:place] + given[place + 2 :]


@pytest.fixture(scope="module")
def loop():
    return load_recipe("explicit_loop")


@pytest.fixture(scope="module")
def pipeline():
    return load_recipe("explicit_pipeline")


def logged(folder: Path) -> dict[int, dict]:
    return by_step([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()])


def run(folder: Path) -> list[str]:
    """Run the recipe with the flags in ``folder``; return what its stages computed on this process, in order."""
    recipe, calls = load_recipe("explicit_pipeline"), []
    recipe.SAMPLE_MODEL |= json.loads((folder / "shape").read_text())
    forward = recipe.Stage.forward

    def counted(stage, *arguments, **named):
        calls.append("train" if stage.model.training else "evaluate")
        return forward(stage, *arguments, **named)

    recipe.Stage.forward = counted
    recipe.main(json.loads((folder / "flags").read_text()))
    return calls


def check_run(rank: int, folder: Path) -> None:
    (folder / f"calls.{rank}").write_text(json.dumps(run(folder)))


def check_interrupted(rank: int, folder: Path) -> None:
    """Interrupt the run in its fifth step."""
    from common.dataset.packing import JoinedRows

    rows_of, reads = JoinedRows.__getitems__, []

    def rows_until_interrupted(rows, numbers):
        reads.append(rows.documents > 100)
        if sum(reads) == 5:
            raise KeyboardInterrupt
        return rows_of(rows, numbers)

    JoinedRows.__getitems__ = rows_until_interrupted
    with pytest.raises(KeyboardInterrupt):
        run(folder)


def check_loop(rank: int, folder: Path) -> None:
    load_recipe("explicit_loop").main(json.loads((folder / "flags").read_text()))


def launched(
    cache_dir, folder: Path, *flags: str, processes: int = 2, check=check_run, precision: str = "no", **shape
) -> Path:
    """Return the output folder of a run in several processes."""
    work = folder / f"work{len(list(folder.iterdir()))}"
    work.mkdir()
    (work / "flags").write_text(json.dumps(small_pipeline(cache_dir, folder / "run", *flags)))
    (work / "shape").write_text(json.dumps(shape))
    in_launched_processes(processes, check, work, ACCELERATE_MIXED_PRECISION=precision)
    return folder / "run"


def alone(loop, cache_dir, folder: Path, *flags: str, monkeypatch=None, **shape) -> Path:
    """Return the output folder of explicit_loop.py's run in this process."""
    for name, value in shape.items():
        monkeypatch.setitem(loop.SAMPLE_MODEL, name, value)
    loop.main(small_run(cache_dir, folder, *ODD_OF_LOOP, *flags))
    return folder


@pytest.fixture(scope="module")
def one_process(loop, cache_dir, tmp_path_factory):
    return alone(loop, cache_dir, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def cut_in_two(one_process, cache_dir, tmp_path_factory):
    """A finished run of two stages; the tokens are in the cache."""
    return launched(cache_dir, tmp_path_factory.mktemp("two"), *ODD)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def test_1f1b_has_the_losses_and_norms_of_one_process(cut_in_two, one_process):
    assert_same(logged(cut_in_two), logged(one_process), tolerance=TOLERANCE)
    last = max(logged(cut_in_two))
    assert last > 5 and logged(cut_in_two)[last]["tokens_seen"] < last * 256, "the last step must be a partial one"


def test_the_folder_is_an_ordinary_model_with_the_weights_of_one_process(cut_in_two, one_process):
    """The matrix that is embedding and head is in the files once, and both of its copies were trained alike."""
    found, info = AutoModelForCausalLM.from_pretrained(cut_in_two, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = AutoModelForCausalLM.from_pretrained(one_process)
    for name, weight in expected.state_dict().items():
        # Adam divides by the gradient's size: where it is next to nothing, rounding decides the direction.
        torch.testing.assert_close(found.get_parameter(name), weight, rtol=1e-4, atol=2e-5, msg=name)
    assert weights_of(cut_in_two).keys() == weights_of(one_process).keys()
    assert len(list(cut_in_two.glob("model-*.safetensors"))) == 2
    assert found.config.to_dict().keys() == expected.config.to_dict().keys()
    assert len(AutoTokenizer.from_pretrained(cut_in_two)) == len(AutoTokenizer.from_pretrained(one_process))

    checkpoint = sorted(cut_in_two.glob("checkpoint-*"))[-1]
    [[first], [last]] = (
        torch.load(checkpoint / f"stages-{position}.pt", weights_only=True)["weights"] for position in range(2)
    )
    assert torch.equal(first["model.embed_tokens.weight"], last["lm_head.weight"])
    assert not first.keys() & last.keys() and "lm_head.weight" not in weights_of(cut_in_two)


def test_no_forward_is_made_beside_those_of_the_micro_batches(cut_in_two):
    """torch would make one more to find out the shapes, and draw random numbers that a continued run draws again."""
    steps, evaluations = max(logged(cut_in_two)), sum("eval_loss" in entry for entry in logged(cut_in_two).values())
    for rank in range(2):
        calls = json.loads((cut_in_two.parent / "work0" / f"calls.{rank}").read_text())
        assert calls.count("train") == steps * 4
        assert calls.count("evaluate") == evaluations * 2 * 4  # 5 held-out rows take two rounds of 4 micro-batches


def test_the_bubble_is_logged_and_compared_with_the_formula(cut_in_two):
    """4 micro-batches through 2 stages: 1 of 5 units of time is waiting."""
    entries = [json.loads(line) for line in (cut_in_two / "log.jsonl").read_text().splitlines()]
    for entry in entries:
        assert len(entry["waiting"]) == 2 and all(0 < share < 1 for share in entry["waiting"])
        assert entry["bubble"] == pytest.approx(sum(entry["waiting"]) / 2, abs=1e-3)
    output = (cut_in_two.parent / "work0" / "output.0").read_text()
    assert "stages: 2, of 3, 1 layers; the last one has the head" in output
    assert "pipelines: 1 of 2 processes; bubble by formula: 20.0%" in output
    assert re.search(r"bubble: [\d.]+% of the steps since the last log but one, 20.0% by formula", output)


@pytest.mark.heavy
def test_interleaved_with_muon_has_the_losses_of_one_process(loop, cut_in_two, cache_dir, tmp_path):
    flags = ["--optimizer", "muon", "--learning_rate", "0.004"]
    expected = alone(loop, cache_dir, tmp_path / "alone", *flags)
    found = launched(cache_dir, tmp_path, *ODD, *flags, "--stages_per_process", "2")
    assert_same(logged(found), logged(expected), tolerance=1e-5)  # Muon's iteration enlarges what rounding left
    assert "bubble by formula: 11.1%" in next(tmp_path.glob("work*/output.0")).read_text()


@pytest.mark.heavy
def test_isolated_documents_and_an_untied_head(loop, cut_in_two, cache_dir, tmp_path, monkeypatch):
    """Some targets are ignored, differently many in each micro-batch; nothing is clipped; two rows a micro-batch."""
    flags = "--packing isolated --max_grad_norm 0 --attn_implementation sdpa".split()
    shape = dict(tie_word_embeddings=False)
    expected = alone(loop, cache_dir, tmp_path / "alone", *flags, monkeypatch=monkeypatch, **shape)
    two_rows = ["--per_device_train_batch_size", "2"]
    found = launched(cache_dir, tmp_path, *ODD, *flags, *two_rows, **shape)
    assert_same(logged(found), logged(expected), tolerance=TOLERANCE)
    model = AutoModelForCausalLM.from_pretrained(found)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.heavy
def test_in_bf16_it_is_the_run_of_one_process_in_bf16(cut_in_two, cache_dir, tmp_path):
    """Stages pass on what layers pass on in one process: bf16. The order of sums differs, and in bf16 rounding does."""
    (tmp_path / "alone").mkdir()
    expected = launched(cache_dir, tmp_path / "alone", *ODD_OF_LOOP, processes=1, check=check_loop, precision="bf16")
    found = launched(cache_dir, tmp_path, *ODD, "--stages_per_process", "2", precision="bf16")
    assert_same(logged(found), logged(expected), tolerance=2e-3)
    assert logged(found)[1]["loss"] != logged(cut_in_two)[1]["loss"], "not in bf16"


@pytest.mark.heavy
@pytest.mark.parametrize("packing", ["cross", "isolated"])
@pytest.mark.parametrize("flags", ["--pipeline_processes 2", "--pipeline_processes 2 --stages_per_process 2", ""])
def test_four_processes(loop, cut_in_two, cache_dir, tmp_path, flags, packing):
    """Two pipelines of two processes, which have other numbers of targets; and one pipeline of four."""
    expected = alone(loop, cache_dir, tmp_path / "alone", "--packing", packing)
    found = launched(cache_dir, tmp_path, *ODD, "--packing", packing, *flags.split(), processes=4)
    assert_same(logged(found), logged(expected), tolerance=TOLERANCE)
    assert weights_of(found).keys() == weights_of(expected).keys()
    AutoModelForCausalLM.from_pretrained(found)


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (2, ["--optimizer", "muon"]),
        pytest.param(4, "--pipeline_processes 2 --stages_per_process 2".split(), marks=pytest.mark.heavy),
    ],
)
def test_interrupted_and_relaunched_equals_uninterrupted(cut_in_two, cache_dir, tmp_path, processes, flags):
    """Bit for bit, with dropout; what was logged after the checkpoint is gone."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "halves").mkdir()
    settings = dict(processes=processes, attention_dropout=0.1)
    whole = launched(cache_dir, tmp_path / "whole", *ODD, *flags, **settings)
    halves = launched(cache_dir, tmp_path / "halves", *ODD, *flags, check=check_interrupted, **settings)
    assert list(logged(halves)) == [1, 2, 3, 4] and (halves / "checkpoint-3").is_dir()
    launched(cache_dir, tmp_path / "halves", *ODD, *flags, **settings)
    assert logged(halves) == logged(whole)
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(halves)[name], weight), name


def check_finished(rank: int, folder: Path) -> None:
    assert run(folder) == []


def check_refused(rank: int, folder: Path) -> None:
    with pytest.raises(InputError, match=(folder / "message").read_text()):
        run(folder)


@pytest.mark.heavy
def test_a_finished_run_is_shown_and_not_trained_again(cut_in_two, cache_dir):
    log = (cut_in_two / "log.jsonl").read_bytes()
    launched(cache_dir, cut_in_two.parent, *ODD, check=check_finished)
    assert (cut_in_two / "log.jsonl").read_bytes() == log


def test_other_stages_in_the_folder_are_refused(cut_in_two, cache_dir, tmp_path):
    flags = small_pipeline(cache_dir, cut_in_two, *ODD, "--stages_per_process", "2")
    (tmp_path / "flags").write_text(json.dumps(flags))
    (tmp_path / "shape").write_text("{}")
    (tmp_path / "message").write_text(
        r"data.launch: \[2, 1, 2, 'no'\] in the folder, \[2, 1, 4, 'no'\] now \(cannot change"
    )
    in_launched_processes(2, check_refused, tmp_path)


def test_one_process_is_refused(pipeline, cache_dir, tmp_path):
    with pytest.raises(InputError, match="a pipeline needs at least two processes, .*cpu_2proc.yaml"):
        pipeline.main(small_pipeline(cache_dir, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.heavy
def test_the_launch_line_trains(cut_in_two, cache_dir, tmp_path):
    """As its docstring says, and compiled. The slowest of this file."""
    flags = ["recipes/explicit_pipeline.py", *small_pipeline(cache_dir, tmp_path, *ODD)]
    done = launch("cpu_2proc.yaml", "--dynamo_backend", "aot_eager", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compile: aot_eager" in done.stdout
    assert_same(logged(tmp_path), logged(cut_in_two), tolerance=1e-5)
    assert weights_of(tmp_path).keys() == weights_of(cut_in_two).keys()


def test_help_fits_a_screen(pipeline, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        pipeline.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 40
    assert all(flag in printed for flag in ("--sample", "--stages_per_process", "--pipeline_processes"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no_such_flag"], "unknown flags: --no_such_flag"),
        (["--gradient_checkpointing", "true"], "--gradient_checkpointing: this recipe does not read it"),
        (["--per_device_eval_batch_size", "2"], "--per_device_eval_batch_size: this recipe does not read it"),
        (["--swanlab", "offline"], "--swanlab: this recipe does not read it"),
        (["--plan"], "--plan: this recipe does not read it"),
    ],
)
def test_a_flag_that_is_unknown_or_not_read_is_refused(pipeline, cache_dir, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        pipeline.main(small_pipeline(cache_dir, tmp_path / "run", *flags))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_every_flag_that_is_not_refused_is_read(pipeline):
    """By the loop, or by what it hands the flags to; explicit_loop.py's test says which of the shared ones."""
    handed_to = (
        "distributed/launch.py", "dataset/mixture.py", "run/folder.py", "train/preflight.py", "train/batch.py",
        "train/schedule.py", "train/muon.py",
    )  # fmt: skip
    handed = "".join((ROOT / "common" / name).read_text(encoding="utf-8") for name in handed_to)
    read = set(re.findall(r"training\.(\w+)", SOURCE + handed)) | set(deciding_fields()) | {"ddp_timeout"}
    assert {field.name for field in fields(TrainingArguments)} & pipeline.TRAINING.keys() <= read
    loop = load_recipe("explicit_loop")
    assert {field.name for field in fields(SharedArguments)} & pipeline.NOT_READ == {
        field.name for field in fields(SharedArguments)
    } & loop.NOT_READ


def test_its_numbers_are_those_of_the_other_recipe(pipeline, loop):
    """But for the size of a micro-batch, of which a pipeline needs many."""
    assert (pipeline.MODEL, pipeline.SAMPLE_MODEL) == (loop.MODEL, loop.SAMPLE_MODEL)
    assert pipeline.LEARNING_RATES == loop.LEARNING_RATES
    other = {"output_dir", "per_device_train_batch_size", "per_device_eval_batch_size"}
    for name in ("DATA", "TRAINING", "SAMPLE"):
        ours, theirs = getattr(pipeline, name), getattr(loop, name)
        assert {flag for flag in ours.keys() | theirs.keys() if ours.get(flag) != theirs.get(flag)} <= other


def test_it_is_short_and_without_trainer():
    assert len(SOURCE.splitlines()) <= 300
    imports = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names} | {getattr(node, "module", "") for node in imports}
    assert not names & {"Trainer", "PretrainingTrainer", "common.train.trainer", "transformers.trainer"}
