"""The bare loop against Trainer: the same numbers, and the same manners."""

import ast
import json
import re
from dataclasses import fields

import pytest
import torch
from conftest import ROOT, load_recipe, small_run
from launched_processes import FSDP2, in_launched_processes, meet_again
from safetensors import safe_open
from test_distributed import launch
from transformers import AutoModelForCausalLM, TrainingArguments

from common.arguments import SharedArguments
from common.console import InputError
from common.dataset.packing import JoinedRows
from common.trainer_fields import deciding_fields

# 0.017 passes end in a partial step, of two micro-batches a step; 5 held-out rows do not divide by 2.
EVAL_ROWS = "per_device_eval_batch_size"
ODD = "--max_steps -1 --num_train_epochs 0.017 --per_device_train_batch_size 2 --per_device_eval_batch_size 2".split()
BOTH = [str(ROOT / "data" / f"sample_{language}.jsonl") for language in ("zh", "en")]
COMPILE = {"BACKEND": "AOT_EAGER", "USE_REGIONAL_COMPILATION": "true", "USE_DYNAMIC": "false"}  # no C++ compiler needed
SOURCE = (ROOT / "recipes" / "explicit_loop.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def loop():
    return load_recipe("explicit_loop")


@pytest.fixture(scope="module")
def odd(loop, cache_dir, tmp_path_factory):
    """A finished run in one process, of a partial last step."""
    folder = tmp_path_factory.mktemp("odd")
    loop.main(small_run(cache_dir, folder, *ODD))
    return folder


def by_step(entries: list[dict]) -> dict[int, dict]:
    """Join what is logged of a step, without the clocks; nothing may be logged twice."""
    steps = {}
    for entry in entries:
        known = steps.setdefault(entry["step"], {})
        names = {"loss", "router_loss", "grad_norm", "learning_rate", "tokens_seen", "eval_loss", "eval_tokens"}
        names &= entry.keys()
        assert not names & known.keys(), entry
        known |= {name: entry[name] for name in names}
    return steps


def logged(folder) -> dict[int, dict]:
    return by_step([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()])


def logged_by_trainer(folder) -> dict[int, dict]:
    return by_step(json.loads((folder / "trainer_state.json").read_text())["log_history"])


def assert_same(found: dict[int, dict], expected: dict[int, dict], tolerance: float) -> None:
    assert found.keys() == {step for step, entry in expected.items() if entry}
    for step, entry in found.items():
        assert entry == pytest.approx(expected[step], rel=tolerance), step


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer", "adamw"],
        ["--optimizer", "muon", "--learning_rate", "0.004", "--logging_steps", "4"],
        [*"--packing isolated --split 90,10 --max_grad_norm 0 --data_weights 3 1 --data".split(), *BOTH],
    ],
    ids=["adamw", "muon", "isolated mixture"],
)
def test_the_losses_are_trainers(loop, wiki, cache_dir, tmp_path, flags):
    """Also learning rates, gradient norms and held-out losses, of every step that either of them logs."""
    flags = [*ODD, *flags]
    loop.main(small_run(cache_dir, tmp_path / "loop", *flags))
    wiki.main(small_run(cache_dir, tmp_path / "trainer", *flags))
    found = logged(tmp_path / "loop")
    assert_same(found, logged_by_trainer(tmp_path / "trainer"), tolerance=1e-6)
    last = max(found)
    assert last > 5 and found[last]["tokens_seen"] < last * 256, "the last step must be a partial one"
    assert len({entry["loss"] for entry in found.values() if "loss" in entry}) > 2


def test_a_mixture_of_experts_has_trainers_losses_too(loop, wiki, cache_dir, tmp_path, monkeypatch):
    experts = dict(model_type="mixtral", num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1)
    for recipe in (loop, wiki):
        monkeypatch.setattr(recipe, "SAMPLE_MODEL", recipe.SAMPLE_MODEL | experts)
    loop.main(small_run(cache_dir, tmp_path / "loop", *ODD))
    wiki.main(small_run(cache_dir, tmp_path / "trainer", *ODD))
    found = logged(tmp_path / "loop")
    assert_same(found, logged_by_trainer(tmp_path / "trainer"), tolerance=1e-5)
    assert all(entry["router_loss"] > 0.1 for entry in found.values() if "loss" in entry)


def test_the_folder_is_an_ordinary_checkpoint(loop, odd, cache_dir):
    """Its held-out loss computed again, by other means; and the results are those of the last log."""
    model = AutoModelForCausalLM.from_pretrained(odd)
    tokenizer = loop.load_tokenizer(str(odd))
    arguments = SharedArguments(held_out_fraction=0.05, context_length=64, cache_dir=str(cache_dir))
    [source] = loop.resolve_sources([str(ROOT / "data" / "sample_zh.jsonl")])
    rows = loop.build_rows({source.name: loop.tokenize(source, tokenizer, arguments)}, arguments).held_out
    with torch.no_grad():
        chances = model(torch.stack([rows[row]["input_ids"] for row in range(5)])).logits.double().log_softmax(-1)
    targets = torch.stack([rows[row]["shift_labels"] for row in range(5)])
    loss = -chances.gather(-1, targets[..., None]).mean().item()
    results = json.loads((odd / "all_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert results["eval_tokens"] == 5 * 64
    assert results["steps"] == max(logged(odd))


def test_interrupted_and_relaunched_equals_uninterrupted(loop, cache_dir, tmp_path, monkeypatch):
    """Bit for bit, with dropout, reading no row again; what was written after the checkpoint is gone."""
    monkeypatch.setitem(loop.SAMPLE_MODEL, "attention_dropout", 0.1)
    flags = [*ODD, "--optimizer", "muon"]
    visited, rows_of = [], JoinedRows.__getitems__

    def rows_until_interrupted(rows, indexes):
        if stop_after is not None and len(visited) >= stop_after:
            raise KeyboardInterrupt
        visited.extend(indexes if rows.documents > 100 else [])
        return rows_of(rows, indexes)

    monkeypatch.setattr(JoinedRows, "__getitems__", rows_until_interrupted)
    stop_after = None
    loop.main(small_run(cache_dir, tmp_path / "alone", *flags))
    rows_alone, visited = visited, []
    stop_after = 4 * 4 + 2  # in the fifth step; the loader is one micro-batch ahead
    with pytest.raises(KeyboardInterrupt):
        loop.main(small_run(cache_dir, tmp_path / "halves", *flags))
    log = tmp_path / "halves" / "log.jsonl"
    assert list(logged(tmp_path / "halves")) == [1, 2, 3, 4]
    log.write_text(log.read_text() + '{"step": 5, "lo')  # cut off while writing
    (tmp_path / "halves" / "checkpoint-5").mkdir()
    visited, stop_after = [], None
    loop.main(small_run(cache_dir, tmp_path / "halves", *flags))
    assert visited == rows_alone[3 * 4 :], "the checkpoint of step 3 goes on at its row"
    assert log.read_bytes() == (tmp_path / "alone" / "log.jsonl").read_bytes()
    with (
        safe_open(tmp_path / "alone" / "model.safetensors", "pt") as alone,
        safe_open(tmp_path / "halves" / "model.safetensors", "pt") as halves,
    ):
        for name in alone.keys():  # noqa: SIM118
            assert torch.equal(alone.get_tensor(name), halves.get_tensor(name)), name


def test_a_rate_and_a_step_that_may_change_are_applied(loop, cache_dir, tmp_path):
    """The second half has another rate and twice the rows a step, and begins at the next row."""
    constant = "--lr_scheduler_type constant --lr_scheduler_kwargs {} --warmup_steps 0".split()
    flags = small_run(cache_dir, tmp_path, *constant)
    loop.main([*flags, "--max_steps", "3"])
    changes = "--learning_rate 3e-4 --tokens_per_step 512 --allow_changes training.learning_rate data.rows"
    loop.main([*flags, *changes.split(), "data.rows_per_step"])
    entries = [logged(tmp_path)[step] for step in range(1, 7)]
    assert [entry["learning_rate"] for entry in entries] == [1e-3] * 3 + [3e-4] * 3
    assert [entry["tokens_seen"] for entry in entries] == [256, 512, 768, 1280, 1792, 2304]
    assert json.loads((tmp_path / "run.json").read_text())["training"]["learning_rate"] == 3e-4


def test_more_steps_are_refused_with_the_flag_that_allows_them(loop, cache_dir, tmp_path):
    """The schedule depends on the number of steps, and with it the losses; the message names the flag."""
    flags = [*small_run(cache_dir, tmp_path), "--max_steps"]
    loop.main([*flags, "2"])
    with pytest.raises(InputError, match=r"data.rows: 8 in the folder, 16 now\n.*\n  --allow_changes data.rows"):
        loop.main([*flags, "4"])
    loop.main([*flags, "4", "--allow_changes", "data.rows"])
    assert list(logged(tmp_path)) == [1, 2, 3, 4]


FORMS = {"one file": {}, "parts": {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}}
FORMS["recompute"] = {"FSDP_ACTIVATION_CHECKPOINTING": "true"}
CONSTANT = "--lr_scheduler_type constant --lr_scheduler_kwargs {} --warmup_steps 0".split()


def check_fsdp2(rank: int, folder) -> None:
    """Train in two halves."""
    loop = load_recipe("explicit_loop")
    for flags in (["--max_steps", "3"], ["--allow_changes", "data.rows"]):
        more = [*CONSTANT, "--per_device_train_batch_size", "1", *flags]
        loop.main(small_run(folder / "cache", folder / "two", *more))
        meet_again()


@pytest.mark.heavy
@pytest.mark.parametrize("form", FORMS)
def test_fsdp2_on_two_processes_is_the_run_of_one_and_continues(loop, cache_dir, tmp_path, form):
    """Checkpoints of one file and in parts, recompute by the YAML; the model at the end is an ordinary one."""
    loop.main(small_run(cache_dir, tmp_path / "one", *CONSTANT))
    (tmp_path / "cache").symlink_to(cache_dir)
    in_launched_processes(2, check_fsdp2, tmp_path, **FSDP2 | FORMS[form])
    runs = [logged(tmp_path / name) for name in ("two", "one")]
    norms = [[entry.pop("grad_norm") for entry in run.values()] for run in runs]
    assert_same(*runs, tolerance=2e-5)
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)  # of halves: fp32 adds up in another order
    parts = [*(tmp_path / "two" / "checkpoint-6").glob("**/*.distcp")]
    assert bool(parts) == (form == "parts")
    found, expected = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("two", "one"))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_a_finished_run_is_shown_and_not_trained_again(loop, odd, cache_dir, capsys):
    before = {path: path.stat().st_mtime_ns for path in odd.rglob("*") if path.is_file() and path.name != "log.jsonl"}
    log = (odd / "log.jsonl").read_bytes()
    loop.main(small_run(cache_dir, odd, *ODD))
    assert "is finished; nothing to train" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (odd / "log.jsonl").read_bytes() == log


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate", "0.5"], r"training.learning_rate: 0.001 in the folder, 0.5 now"),
        (["--num_train_epochs", "0.03"], r"data.rows: \d+ in the folder, \d+ now"),
    ],
)
def test_another_run_in_the_folder_is_refused(loop, odd, cache_dir, flags, message):
    with pytest.raises(InputError, match=message):
        loop.main(small_run(cache_dir, odd, *ODD, *flags))


def test_the_run_of_the_other_recipe_is_refused(loop, wiki, cache_dir, tmp_path):
    flags = small_run(cache_dir, tmp_path, "--max_steps", "1", "--eval_strategy", "no")
    wiki.main(flags)
    with pytest.raises(InputError, match="recipe: 'wiki_zh_scratch.py' in the folder, 'explicit_loop.py' now"):
        loop.main(flags[:-2])


def test_only_the_newest_checkpoints_are_kept(loop, cache_dir, tmp_path):
    """Saved every 0.3 of the steps, rounded up, and at the end; evaluated and logged at the end only."""
    rarely = "--eval_steps 0 --logging_steps 10 --logging_first_step false".split()
    loop.main(small_run(cache_dir, tmp_path, *"--save_steps 0.3 --save_total_limit 1 --max_steps 4".split(), *rarely))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert {step: "eval_loss" in entry for step, entry in logged(tmp_path).items()} == {2: False, 4: True}


def test_a_compiled_run_has_the_losses_and_the_names_of_any_other(loop, odd, cache_dir, tmp_path, monkeypatch):
    for name, value in COMPILE.items():
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", value)
    loop.main(small_run(cache_dir, tmp_path, *ODD))
    assert_same(logged(tmp_path), logged(odd), tolerance=1e-5)
    with safe_open(tmp_path / "model.safetensors", "pt") as file, safe_open(odd / "model.safetensors", "pt") as other:
        assert set(file.keys()) == set(other.keys())
    with pytest.raises(InputError, match="data.launch: .*'NO'] in the folder, .*'AOT_EAGER'] now"):
        loop.main(small_run(cache_dir, odd, *ODD))


@pytest.mark.parametrize("config", ["ddp.yaml", pytest.param("zero2.yaml", marks=pytest.mark.heavy)])
def test_two_processes_give_the_losses_of_one(odd, cache_dir, tmp_path, config):
    """The slowest of this file: it launches."""
    flags = ["recipes/explicit_loop.py", *small_run(cache_dir, tmp_path, *ODD, "--per_device_train_batch_size", "1")]
    done = launch(config, "--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", "2", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 rows x 2 processes x 64 tokens x 2 accumulated" in done.stdout
    assert_same(logged(tmp_path), logged(odd), tolerance=1e-4)


def test_help_fits_a_screen(loop, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        loop.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 40
    assert all(flag in printed for flag in ("--sample", "--tokens_per_step", "--learning_rate"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no_such_flag"], "unknown flags: --no_such_flag"),
        (["--max_step=2"], "unknown flags: --max_step=2"),
        (["--gradient_checkpointing", "true"], "--gradient_checkpointing: this recipe does not read it"),
        (["--optim", "adafactor"], "--optim: this recipe does not read it"),
        (["--bf16", "true"], "--bf16: this recipe does not read it. Precision and devices are the launcher's"),
        (["--swanlab", "offline"], "--swanlab: this recipe does not read it"),
        (["--plan"], "--plan: this recipe does not read it"),
        (["--probe"], "--probe: this recipe does not read it"),
    ],
)
def test_a_flag_that_is_unknown_or_not_read_is_refused(loop, cache_dir, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        loop.main(small_run(cache_dir, tmp_path / "run", *flags))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_steps", "0"], "--max_steps 0 with --num_train_epochs 2 trains on no row"),
        (
            ["--max_steps", "-1", "--num_train_epochs", "0"],
            "--max_steps -1 with --num_train_epochs 0.0 trains on no row",
        ),
        (["--data", "no/such/file.jsonl"], "no such file"),
        (["--tokens_per_step", "100"], "cannot be divided"),
    ],
)
def test_bad_input_is_one_clear_error(loop, cache_dir, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        loop.main(small_run(cache_dir, tmp_path / "run", *flags))
    assert not (tmp_path / "run" / "run.json").exists()


def test_it_is_short_and_without_trainer():
    assert len(SOURCE.splitlines()) <= 300
    imports = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names} | {getattr(node, "module", "") for node in imports}
    assert not names & {"Trainer", "PretrainingTrainer", "common.train.trainer", "transformers.trainer"}


def test_its_numbers_are_those_of_the_other_recipe(loop, wiki):
    assert (loop.MODEL, loop.SAMPLE_MODEL) == (wiki.MODEL, wiki.SAMPLE_MODEL)
    assert loop.LEARNING_RATES == wiki.LEARNING_RATES
    defaults = TrainingArguments(output_dir="unused")
    for name in ("DATA", "TRAINING", "SAMPLE"):
        ours, theirs = getattr(loop, name), getattr(wiki, name)
        for flag in (ours.keys() | theirs.keys()) - {"output_dir", "swanlab"}:
            if name == "TRAINING" and theirs.get(flag) == 0 and flag.startswith("per_device"):
                assert ours[flag] == 64, "not derived from the card here"
            elif flag in ours:
                assert ours[flag] == (theirs[flag] if flag in theirs else getattr(defaults, flag)), flag
            else:  # of Trainer alone
                assert flag in {"eval_strategy", "report_to", "logging_nan_inf_filter", "per_device_eval_batch_size"}, (
                    flag
                )


def test_every_flag_that_is_not_refused_is_read(loop):
    """By the loop, or by what it hands the flags to."""
    handed_to = ("distributed/launch.py", "dataset/mixture.py", "run/folder.py", "train/preflight.py", "train/batch.py")
    handed = "".join((ROOT / "common" / name).read_text(encoding="utf-8") for name in handed_to)
    read = set(re.findall(r"training\.(\w+)", SOURCE + handed)) | set(deciding_fields()) | {"ddp_timeout"}
    assert {field.name for field in fields(TrainingArguments)} & loop.TRAINING.keys() <= read
    # Flags shared by all recipes: a new one is either read by the loop or has to be refused. --plan_* need --plan.
    flags = {field.name for field in fields(SharedArguments) if field.init}
    shared = flags - loop.DATA.keys() - loop.TRAINING.keys()
    assert {name for name in shared if not name.startswith("plan_")} - loop.NOT_READ == {
        "data_weights", "text_field", "keep_duplicates", "skip_malformed", "end_token", "split",
        "max_eval_rows", "packing", "attn_implementation", "allow_changes", "encoding", "max_data_tokens",
    }  # fmt: skip
