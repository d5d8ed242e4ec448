"""--eval_tasks: the scores of lm_eval's command, from the model in training, whose training they do not change."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load_recipe, losses, small_run
from tiny import tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.arguments import SharedArguments
from common.console import InputError
from common.distributed.strategy import FSDP2
from common.run.lock import read_status
from common.run.record import RunRecord, score_text
from common.run.report import page
from common.train import eval_tasks

PAIRS = [
    ("地球是太阳系的行星。", "地球行星的太阳系是。"),
    ("他把书放在桌子上。", "他书把放在桌子上。"),
    ("这个城市的人口很多。", "这个城市人口的很多。"),
    ("历史上有许多国家。", "上历史有许多国家。"),
    ("水是由氢和氧组成的。", "水是由氢和氧组成。的"),
    ("计算机可以处理数据。", "可以计算机数据处理。"),
    ("The earth is round.", "The earth are round."),
    ("他昨天去了北京。", "他昨天了去北京。"),
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
num_fewshot: {shots}
fewshot_split: test
doc_to_text: "{text}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_target: 0
doc_to_choice: "{{[good, bad]}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_target: "{{good}}"
metric_list:
  - metric: bits_per_byte
"""
GENERATED = """
output_type: generate_until
doc_to_target: "{{good}}"
generation_kwargs: {until: ["。"], max_gen_toks: 4}
metric_list:
  - metric: exact_match
"""


def write_task(folder: Path, name: str, kind: str, pairs: list, shots: int = 0, text: str = "") -> str:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps({"good": good, "bad": bad}) + "\n" for good, bad in pairs), encoding="utf-8")
    path = folder / f"{name}.yaml"
    path.write_text(TASK.format(name=name, data=data, shots=shots, text=text) + kind, encoding="utf-8")
    return str(path)


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> list[str]:
    """Four tasks of our own: two choices with and without examples, bits per byte, and texts."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    eval_tasks.load_tasks.cache_clear()
    (tmp_path / "tasks").mkdir()
    return [
        write_task(tmp_path / "tasks", "own_pairs", CHOICE, PAIRS),
        write_task(tmp_path / "tasks", "own_examples", CHOICE, PAIRS, shots=2, text="：{{good}}"),
        write_task(tmp_path / "tasks", "own_bits", ROLLING, PAIRS),
        write_task(tmp_path / "tasks", "own_texts", GENERATED, PAIRS, text="{{good[:3]}}"),
    ]


def digest_of(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes()).hexdigest()


def results_of(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text(encoding="utf-8"))


def scores_of_run(folder: Path) -> dict[tuple[str, str], dict]:
    return {(score["task"], score["metric"]): score for score in results_of(folder)["tasks"]}


@pytest.mark.heavy
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_scores_are_those_of_the_command_on_the_saved_model(
    wiki, cache_dir, tmp_path, tasks, monkeypatch, precision
):
    """On the saved model, also where the run computes in bf16 and is compiled: the weights are saved in fp32.

    Computed in bf16, the bits per byte differ by 2e-5 of themselves.
    """
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    if precision == "bf16":
        for name, value in (("BACKEND", "AOT_EAGER"), ("USE_REGIONAL_COMPILATION", "true"), ("USE_DYNAMIC", "false")):
            monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", value)
    run = tmp_path / "run"
    bf16 = ["--bf16", "true"] if precision == "bf16" else []
    wiki.main(small_run(cache_dir, run, "--eval_tasks", *tasks, "--eval_tasks_every", "2", *bf16))
    command = [str(Path(sys.executable).parent / "lm_eval"), "--model", "hf", "--model_args", f"pretrained={run}"]
    command += ["--tasks", ",".join(tasks), "--device", "cpu", "--output_path", str(tmp_path / "measured")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [file] = (tmp_path / "measured").rglob("results*.json")
    measured = json.loads(file.read_text(encoding="utf-8"))["results"]
    scores = scores_of_run(run)
    wanted = {("own_pairs", "acc"), ("own_pairs", "acc_norm"), ("own_examples", "acc"), ("own_examples", "acc_norm")}
    assert set(scores) == wanted | {("own_bits", "bits_per_byte"), ("own_texts", "exact_match")}
    for (task, metric), score in scores.items():
        assert score["score"] == pytest.approx(measured[task][f"{metric},none"], rel=1e-6, abs=1e-9)
        error = measured[task][f"{metric}_stderr,none"]
        assert score["stderr"] == (None if error == "N/A" else pytest.approx(error, rel=1e-5))
        assert score["documents"] == len(PAIRS) and score["seconds"] > 0 and score["step"] == 6
    assert scores["own_pairs", "acc"]["chance"] == 0.5 and scores["own_bits", "bits_per_byte"]["chance"] is None
    assert scores["own_examples", "acc"]["shots"] == 2


@pytest.mark.heavy
def test_they_are_what_plain_transformers_computes(wiki, cache_dir, tmp_path, tasks):
    wiki.main(small_run(cache_dir, tmp_path / "run", "--eval_tasks", tasks[0]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")

    def log_probability(text: str) -> float:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            return -model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)

    right = [log_probability(good) > log_probability(bad) for good, bad in PAIRS]
    score = scores_of_run(tmp_path / "run")["own_pairs", "acc"]
    share = sum(right) / len(right)
    assert score["score"] == share
    assert score["stderr"] == pytest.approx((share * (1 - share) / (len(right) - 1)) ** 0.5)


@pytest.mark.heavy
def test_the_run_is_the_one_without_tasks_to_the_bit(wiki, cache_dir, tmp_path, tasks):
    """With dropout, and a log whose interval does not divide that of the tasks."""
    flags = ["--logging_steps", "3", "--save_steps", "3"]
    measuring = ["--eval_tasks", *tasks, "--eval_tasks_every", "2"]
    wiki.main(tiny_run(cache_dir, tmp_path / "without", *flags))
    wiki.main(tiny_run(cache_dir, tmp_path / "with", *flags, *measuring))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name
    for name in ("rng_state.pth", "optimizer.pt", "model.safetensors"):
        one, other = (digest_of(tmp_path / run / "checkpoint-6" / name) for run in ("with", "without"))
        assert one == other, name

    history = json.loads((tmp_path / "with" / "trainer_state.json").read_text())["log_history"]
    logged = {entry["step"]: entry for entry in history if "eval_own_pairs_acc" in entry}
    assert list(logged) == [2, 4, 6]
    assert set(logged[4]) >= {"eval_own_pairs_acc_stderr", "eval_own_pairs_acc_chance", "eval_own_pairs_seconds"}
    lines = [json.loads(line) for line in (tmp_path / "with" / "eval_tasks.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["task"] == "own_bits"] == [2, 4, 6]
    page = (tmp_path / "with" / "report.html").read_text(encoding="utf-8")
    assert "<td>own_pairs</td><td>acc</td>" in page and "own_pairs, acc</title>" in page


SIGNALLED = """
import os, signal, sys
from conftest import load_recipe
from common.train.eval_model import LiveModel

compute = LiveModel._in_batches

def in_batches(self, requests):
    if self.interruption is not None and int(os.environ.get("RANK", "0")) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGTERM)
    return compute(self, requests)

LiveModel._in_batches = in_batches
if __name__ == "__main__":
    load_recipe("wiki_zh_scratch").main(sys.argv[2:])
"""


def launch(script: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """Run ``script`` in two processes on the CPU."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / "ddp.yaml"), "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--num_processes", "2", str(script), *flags]
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    environment |= {"HF_DATASETS_CACHE": str(folder / "datasets")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.heavy
def test_two_processes_share_the_work_and_a_signal_to_one_ends_both(cache_dir, tmp_path, tasks):
    """It reaches the second one while tasks are measured. The same command then continues, with the same losses."""
    from lm_eval import simple_evaluate

    (tmp_path / "signalled.py").write_text(SIGNALLED, encoding="utf-8")
    recipe = ROOT / "recipes" / "wiki_zh_scratch.py"
    batch = ["--per_device_train_batch_size", "2"]
    alone = launch(recipe, tmp_path, *small_run(cache_dir, tmp_path / "alone", *batch))
    assert alone.returncode == 0, alone.stderr[-3000:]
    flags = small_run(cache_dir, tmp_path / "run", *batch, "--eval_tasks", *tasks, "--eval_tasks_every", "4")
    done = launch(tmp_path / "signalled.py", tmp_path, "1", *flags)
    status = read_status(tmp_path / "run")
    assert (status["state"], status["step"], status["reason"]) == ("interrupted", 4, "SIGTERM"), done.stderr[-3000:]
    assert "tasks: stopped, and not measured at step 4" in done.stdout
    done = launch(recipe, tmp_path, *flags)
    assert done.returncode == 0 and "continuing from" in done.stdout, done.stderr[-3000:]
    assert losses(tmp_path / "run") == losses(tmp_path / "alone")
    measured = simple_evaluate("hf", f"pretrained={tmp_path / 'run'}", tasks, device="cpu")["results"]
    for (task, metric), score in scores_of_run(tmp_path / "run").items():
        assert score["score"] == pytest.approx(measured[task][f"{metric},none"], rel=1e-5, abs=1e-9)


@pytest.mark.heavy
def test_a_signal_while_tasks_are_measured_saves_that_step(wiki, cache_dir, tmp_path, tasks, monkeypatch):
    from common.train.eval_model import LiveModel

    compute = LiveModel._in_batches

    def signalled(self, requests):
        os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, requests)

    flags = tiny_run(cache_dir, tmp_path / "run", "--eval_tasks", *tasks, "--eval_tasks_every", "3")
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(LiveModel, "_in_batches", signalled)
        wiki.main(flags)
    assert ended.value.code == 143
    assert (tmp_path / "run" / "checkpoint-3" / "manifest.json").exists()
    wiki.main(flags)
    wiki.main(tiny_run(cache_dir, tmp_path / "alone"))
    assert losses(tmp_path / "run") == losses(tmp_path / "alone")


@pytest.mark.heavy
def test_a_task_that_fails_is_named_and_does_not_end_the_run(wiki, cache_dir, tmp_path, tasks, capsys):
    """Its answers are longer than what the model reads."""
    long = write_task(tmp_path / "tasks", "own_long", CHOICE, [("历史" * 500, "史历" * 500)])
    wiki.main(small_run(cache_dir, tmp_path / "run", "--eval_tasks", long, tasks[0], "--eval_tasks_every", "3"))
    output = capsys.readouterr().out
    reason = "and the model reads 64), and is not measured again"
    assert output.count("note: --eval_tasks own_long: it failed") == output.count(reason) == 1
    *scores, failed = results_of(tmp_path / "run")["tasks"]
    assert failed["task"] == "own_long" and "the model reads 64" in failed["failed"]
    assert [score["task"] for score in scores] == ["own_pairs", "own_pairs"]
    assert "task             own_long failed: " in output and "task             own_pairs acc 0." in output


@pytest.mark.heavy
def test_a_model_that_gives_nan_has_no_score(wiki, cache_dir, tmp_path, tasks, monkeypatch):
    """lm_eval would take the first choice, which is the right one of every minimal pair."""
    from lm_eval.models.huggingface import HFLM

    call = HFLM._model_call
    monkeypatch.setattr(HFLM, "_model_call", lambda *args, **kwargs: call(*args, **kwargs) * torch.nan)
    wiki.main(small_run(cache_dir, tmp_path / "run", "--eval_tasks", tasks[0]))
    [entry] = results_of(tmp_path / "run")["tasks"]
    assert entry == {"task": "own_pairs", "failed": "RuntimeError: ValueError: the model gives NaN"}


@pytest.mark.heavy
def test_a_group_has_its_own_score_and_chance_and_its_parts_are_in_the_file(wiki, cache_dir, tmp_path, tasks):
    """Four choices in two documents, two in eight: by documents (2 x 1/4 + 8 x 1/2) / 10, by tasks 3/8."""
    four = CHOICE.replace("[good, bad]", "[good, bad, good, bad]")
    write_task(tmp_path / "tasks", "own_four", four, PAIRS[:2])
    group = "group: own_group\ntask: [own_pairs, own_four]\n"
    for by_size, chance in (("true", 0.45), ("false", 0.375)):
        text = f"{group}aggregate_metric_list:\n  - metric: acc\n    weight_by_size: {by_size}\n"
        (tmp_path / "tasks" / "own_group.yaml").write_text(text, encoding="utf-8")
        eval_tasks.load_tasks.cache_clear()
        run = tmp_path / by_size
        wiki.main(small_run(cache_dir, run, "--eval_tasks", str(tmp_path / "tasks" / "own_group.yaml")))
        [score] = results_of(run)["tasks"]
        assert (score["task"], score["metric"], score["documents"]) == ("own_group", "acc", 10)
        assert score["chance"] == pytest.approx(chance)
        lines = [json.loads(line) for line in (run / "eval_tasks.jsonl").read_text().splitlines()]
        parts = {line["task"]: line["score"] for line in lines if line["metric"] == "acc" and "part_of" in line}
        weights = {"own_pairs": 0.8, "own_four": 0.2} if by_size == "true" else {"own_pairs": 0.5, "own_four": 0.5}
        assert score["score"] == pytest.approx(sum(weights[name] * part for name, part in parts.items()))


@pytest.mark.heavy
def test_the_other_recipes_measure_too(weights, cache_dir, tmp_path, tasks):
    """Adapters are measured beside their frozen weights; the merged model has the same scores."""
    from lm_eval import simple_evaluate

    flags = [flag for flag in small_run(cache_dir, tmp_path / "x") if flag != "--sample"][:-2]
    flags += [
        "--data",
        str(ROOT / "data" / "sample_en.jsonl"),
        "--model",
        str(weights),
        "--eval_tasks",
        tasks[0],
        tasks[2],
    ]
    extra = {"openwebtext_continue": [], "low_memory_16gb": ["--method", "lora", "--optim", "adamw_torch"]}
    for recipe, own in extra.items():
        run = tmp_path / recipe
        load_recipe(recipe).main([*flags, "--output_dir", str(run), *own])
        model = run / "merged" if own else run
        measured = simple_evaluate("hf", f"pretrained={model}", [tasks[0], tasks[2]], device="cpu")["results"]
        scores = scores_of_run(run)
        assert len(scores) == 3
        for (task, metric), score in scores.items():
            assert score["score"] == pytest.approx(measured[task][f"{metric},none"], rel=1e-4, abs=1e-9)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["blimpp"], r"no such task, group or tag. Near it: .*blimp"),
        (["no/such.yaml"], r"no/such.yaml: no such file\.$"),
        (["{folder}/number.yaml"], "its name is 5, and must be text"),
        (["{folder}/split.yaml"], r"split.yaml: it cannot be loaded \(KeyError: 'validation'\)"),
        (["{folder}/metric.yaml"], r"metric.yaml: it cannot be loaded \(KeyError"),
        (["{folder}/group.yaml"], "group.yaml: the files beside it cannot be read"),
        (["{folder}/empty.yaml"], "there is no task and no group in it"),
        (["{folder}/broken.yaml"], "it cannot be read"),
        (["{folder}/own_pairs.yaml", "{folder}/own_pairs.yaml"], "own_pairs is there twice"),
        (["{folder}/gone.yaml"], "cannot be loaded .*HF_ENDPOINT=https://hf-mirror.com"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_refused_before_anything_is_read(
    wiki, cache_dir, tmp_path, tasks, names, message
):
    folder = tmp_path / "tasks"
    (folder / "empty.yaml").write_text("output_type: multiple_choice\n", encoding="utf-8")
    (folder / "broken.yaml").write_text("task: [", encoding="utf-8")
    gone = Path(tasks[0]).read_text(encoding="utf-8").replace("own_pairs", "gone")
    (folder / "gone.yaml").write_text(gone, encoding="utf-8")
    (folder / "group.yaml").write_text("group: all_of_them\ntask: [own_pairs, no_such_part]\n", encoding="utf-8")
    own = Path(tasks[0]).read_text(encoding="utf-8")
    for name, old, new in (
        ("number", "task: own_pairs", "task: 5"),
        ("split", "test_split: test", "test_split: validation"),
        ("metric", "metric: acc\n", "metric: no_such_metric\n"),
    ):
        assert old in own
        (folder / f"{name}.yaml").write_text(own.replace(old, new), encoding="utf-8")
    flags = ["--eval_tasks", *(name.format(folder=folder) for name in names), "--data", "no/such/data.jsonl"]
    with pytest.raises(InputError, match=message):
        wiki.main(small_run(cache_dir, tmp_path / "run", *flags))


def test_without_lm_eval_there_is_one_line_before_anything_is_read(wiki, cache_dir, tmp_path, monkeypatch):
    flags = small_run(cache_dir, tmp_path / "run", "--eval_tasks", "blimp", "--data", "no/such/data.jsonl")
    for version, message in ((None, "needs lm_eval: pip install"), ("0.4.9.1", "0.4.9.1 is too old")):
        monkeypatch.setattr(eval_tasks, "installed", lambda package, version=version: version)
        with pytest.raises(InputError, match=message):
            wiki.main(flags)
    pages = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert pages.count(f'"{eval_tasks.LM_EVAL}"') == 2  # the extra, and what the heavy tests need


def test_sharded_parameters_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(eval_tasks, "installed", lambda package: "0.4.13")
    shared, training = SharedArguments(eval_tasks=["blimp"]), SimpleNamespace(output_dir="OUT")
    with pytest.raises(InputError, match="under fsdp2: .* pretrained=OUT --tasks blimp"):
        eval_tasks.check_eval_tasks(SimpleNamespace(strategy=FSDP2), shared, training)
    with pytest.raises(InputError, match="name what to measure with --eval_tasks"):
        SharedArguments(eval_tasks_every=5)
    with pytest.raises(InputError, match="must be at least 1 step"):
        SharedArguments(eval_tasks=["blimp"], eval_tasks_every=0)


def score(**changes) -> dict:
    fields = {"step": 2, "task": "pairs", "metric": "acc", "score": 0.62, "stderr": 0.05, "chance": 0.5}
    return fields | {"documents": 100, "shots": 0, "seconds": 1.5} | changes


def test_a_score_within_two_standard_errors_of_chance_is_said_to_be_no_better():
    assert score_text(score()) == "pairs acc 0.6200 ± 0.0500 (chance 0.5000)"
    assert score_text(score(score=0.6)) == "pairs acc 0.6000 ± 0.0500 (chance 0.5000: not above it)"
    assert score_text(score(metric="bits_per_byte", stderr=None, chance=None)) == "pairs bits_per_byte 0.6200"


def test_the_report_has_a_row_a_task_and_a_plot_beside_chance():
    history = [{"step": step, "loss": 1.0, "tokens_seen": 10 * step, "train_seconds": step} for step in (1, 2)]
    history += [{"step": step, "eval_pairs_acc": 0.5 + step / 20} for step in (1, 2)]
    scores = [score(step=1, score=0.55), score(), score(task="part", part_of="pairs"), score(task="<b>", metric="x")]
    html = page(RunRecord("run", history, tasks=scores))
    assert "<td>pairs</td><td>acc</td><td>0.6200</td><td>0.0500</td><td>0.5000</td><td>100</td>" in html
    assert "&lt;b&gt;" in html and "<td>part</td>" not in html and "has 1 scores of parts" in html
    assert html.count("pairs, acc</title>") == 1
