"""Shards written by several tasks hold what one pass over the corpus gives, with every executor."""

import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import numpy as np
import psutil
import pytest
from conftest import ROOT

from common.console import InputError
from common.corpus.sources import Source, resolve_sources
from common.tokens import writer as token_writer
from common.tokens.encoding import Encoder
from common.tokens.shards import check_shards, plan_shards, shard_prefix, share_files, write_shard
from common.tokens.store import TokenStore
from common.tokens.train_tokenizer import train_tokenizer

TASKS = 4
SCRIPT = ROOT / "data" / "prepare_distributed.py"


def bundled() -> list[str]:
    lines = (ROOT / "data" / "sample_zh.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines][:101]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = train_tokenizer(bundled()[:40], 600)
    tokenizer.folder = str(tmp_path_factory.mktemp("tokenizer"))
    tokenizer.save_pretrained(tokenizer.folder)
    return tokenizer


@pytest.fixture(autouse=True)
def encoder(monkeypatch):
    """Use the plain tokenizer: choosing an engine takes a second, and there are many shards here."""

    def encoder_of(tokenizer, cache_dir=None) -> Encoder:
        return Encoder("plain", "", lambda texts: [np.array(tokenizer.encode(text), np.uint32) for text in texts])

    monkeypatch.setattr(token_writer, "encoder_of", encoder_of)


@pytest.fixture
def one_file(tmp_path) -> tuple[Path, list[str]]:
    """One file that 4 tasks share, with an empty document and a broken line in it, and a copy; and its documents."""
    texts = [*bundled(), bundled()[0]]
    lines = [json.dumps({"text": text}) for text in texts]
    lines[30:30] = ['{"text": "  "}', '{"text": 3}']
    (tmp_path / "one.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "one.jsonl", texts


@pytest.fixture
def many_files(tmp_path) -> tuple[Path, list[str]]:
    """Nine files in three folders, read in the order of their names; and their documents."""
    texts = bundled()
    for number in range(9):
        path = tmp_path / "many" / f"{number // 3}" / f"part-{number}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = texts[number * 12 : number * 12 + 12]
        path.write_text("\n".join(json.dumps({"text": text}) for text in part), encoding="utf-8")
    return tmp_path / "many", texts


def plan(path: Path, output: Path, tokenizer, tasks: int = TASKS) -> str:
    plan_shards(str(output), resolve_sources([str(path)]), tokenizer.folder, None, None, True, tasks)
    return str(output)


def written(path: Path, output: Path, tokenizer, tasks: int = TASKS) -> str:
    folder = plan(path, output, tokenizer, tasks)
    for rank in reversed(range(tasks)):
        write_shard(None, rank, tasks, folder, 1)
    return folder


def tokens_of(folder: str) -> list[list[int]]:
    store = TokenStore(folder)
    starts = store.document_starts.tolist()
    return [store.tokens[starts[i] : starts[i + 1]].tolist() for i in range(store.documents)]


def expected_tokens(texts: list[str], tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] for text in texts]


def test_whole_files_give_the_documents_in_order(many_files, tmp_path, tokenizer):
    path, texts = many_files
    folder = written(path, tmp_path / "out", tokenizer)
    expected = expected_tokens(texts, tokenizer)
    assert tokens_of(folder) == expected
    assert [TokenStore(shard_prefix(folder, rank, TASKS)).documents > 0 for rank in range(TASKS)] == [True] * TASKS
    assert check_shards(folder) == {
        "documents": len(texts),
        "tokens": sum(map(len, expected)) - len(texts),
        "end_tokens": len(texts),
        "duplicates": 0,
        "empty": 0,
        "malformed": 0,
        "bytes": sum(len(text.encode()) for text in texts),
        "shards": TASKS,
    }


@pytest.mark.parametrize("tasks", [1, 4, 7])
def test_one_file_is_divided_and_everything_is_counted_once(one_file, tmp_path, tokenizer, tasks):
    path, texts = one_file
    folder = written(path, tmp_path / "out", tokenizer, tasks)
    in_turn = [text for rank in range(tasks) for text in texts[rank::tasks]]
    assert tokens_of(folder) == expected_tokens(in_turn, tokenizer)
    counts = check_shards(folder)
    assert (counts["documents"], counts["empty"], counts["malformed"], counts["duplicates"]) == (len(texts), 1, 1, 1)
    assert counts["bytes"] == sum(len(text.encode()) for text in texts) and counts["shards"] == tasks
    assert TokenStore(folder).sidecar["malformed"] == 1


def test_same_as_one_store_of_prepare(one_file, tmp_path, tokenizer):
    from common.corpus.documents import CorpusCounts, read_documents
    from common.tokens.writer import write_token_store

    path, _ = one_file
    folder = written(path, tmp_path / "out", tokenizer)
    counts = CorpusCounts()
    documents = read_documents(resolve_sources([str(path)])[0], None, True, counts)
    single = write_token_store(documents, counts, tokenizer, tmp_path / "single" / "tokens", {})
    shards = TokenStore(folder)
    assert sorted(shards.document_hashes().tolist()) == sorted(single.document_hashes().tolist())
    assert sorted(tokens_of(folder)) == sorted(tokens_of(str(tmp_path / "single" / "tokens")))
    for name in ("documents", "tokens", "end_tokens", "text_bytes", "empty", "malformed"):
        assert shards.sidecar[name] == single.sidecar[name], name


def sized(folder: Path, sizes: list[int]) -> Source:
    files = []
    for number, size in enumerate(sizes):
        path = folder / f"{number}.txt"
        path.write_bytes(b"x" * size)
        files.append(path)
    return Source("given", "name", tuple(files))


def test_files_are_shared_by_size_in_order(tmp_path):
    source = sized(tmp_path, [10] * 12)
    shares = share_files([source], 4)
    assert [[len(part.files) for part in share] for share in shares] == [[3]] * 4
    assert [path for share in shares for part in share for path in part.files] == list(source.files)
    assert share_files([sized(tmp_path, [100, 10, 10, 10])], 4) is None  # one task would have 3 times its share
    assert share_files([sized(tmp_path, [100])], 4) is None and share_files([sized(tmp_path, [100])], 1) is not None
    assert share_files([sized(tmp_path, [100])], 2) is None
    assert share_files([Source("a/b", "b", hub_id="a/b")], 2) is None
    (tmp_path / "second").mkdir()
    first, second = sized(tmp_path, [10, 10, 10]), sized(tmp_path / "second", [10, 20])
    shares = share_files([first, second], 2)
    assert [[part.files for part in share] for share in shares] == [[first.files], [second.files]]


def test_every_share_is_read_by_the_rules_of_its_source(tmp_path, tokenizer):
    """A task may get a single .txt file of many: it is one document there, too."""
    (tmp_path / "texts").mkdir()
    documents = [f"标题 {i}\n\n第一段。\n\n第二段。" for i in range(4)]
    for number, text in enumerate(documents):
        (tmp_path / "texts" / f"{number}.txt").write_bytes(text.encode("gbk"))
    folder = str(tmp_path / "shards")
    sources = resolve_sources([str(tmp_path / "texts")], "gbk")
    plan_shards(folder, sources, tokenizer.folder, None, None, False, 4)
    for rank in range(4):
        write_shard(None, rank, 4, folder, 1)
    assert tokens_of(folder) == expected_tokens(documents, tokenizer)


@pytest.mark.parametrize("seed", range(30))
def test_every_file_is_in_one_share(tmp_path, seed):
    generator = np.random.default_rng(seed)
    tasks = int(generator.integers(1, 9))
    source = sized(tmp_path, generator.integers(1, 60, int(generator.integers(1, 30))).tolist())
    shares = share_files([source], tasks)
    if shares is None:
        largest = max(path.stat().st_size for path in source.files)
        assert largest > source.size_bytes / tasks / 2  # never while all files are smaller than half an equal share
    else:
        assert len(shares) == tasks
        assert [path for share in shares for part in share for path in part.files] == list(source.files)


def test_all_tasks_read_the_same_field(tmp_path, tokenizer):
    """The second file alone looks as if its text were in another field; the third source has its own."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.jsonl").write_text('{"text": "一一一", "summary": "a"}\n', encoding="utf-8")
    (tmp_path / "in" / "1.jsonl").write_text('{"content": "no!"}\n{"text": "二二二"}\n', encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"content": "三三三", "summary": "a"}\n', encoding="utf-8")
    sources = resolve_sources([str(tmp_path / "in"), str(tmp_path / "b.jsonl")])
    folder = str(tmp_path / "out")
    plan_shards(folder, sources, tokenizer.folder, None, None, True, 3)
    for rank in range(3):
        write_shard(None, rank, 3, folder, 1)
    assert tokens_of(folder) == expected_tokens(["一一一", "二二二", "三三三"], tokenizer)
    assert check_shards(folder)["malformed"] == 1


def test_a_plan_is_continued_without_looking_for_the_field_again(one_file, tmp_path, tokenizer, monkeypatch):
    """The hub of a data set may not answer any more. An older plan without the field is completed."""
    asked = [str(tmp_path / "out"), resolve_sources([str(one_file[0])]), tokenizer.folder, None, None, True, 2]
    plan_shards(*asked)
    [path] = (tmp_path / "out").rglob("plan.json")
    planned = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({name: planned[name] for name in planned if name != "text_fields"}), encoding="utf-8")
    plan_shards(*asked)
    assert json.loads(path.read_text(encoding="utf-8")) == planned
    monkeypatch.setattr("common.tokens.shards.detect_text_field", lambda source: 1 / 0)
    plan_shards(*asked)


def test_a_share_may_be_without_documents_but_not_all(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.jsonl").write_text('{"text": "一一一"}\n', encoding="utf-8")
    (tmp_path / "in" / "1.jsonl").write_text('{"text": "   "}\n{"text": 3}\n', encoding="utf-8")
    folder = written(tmp_path / "in", tmp_path / "out", tokenizer, 2)
    counts = check_shards(folder)
    assert [counts[name] for name in ("documents", "empty", "malformed", "shards")] == [1, 1, 1, 2]
    assert tokens_of(folder) == expected_tokens(["一一一"], tokenizer)
    for tasks in (1, 2):
        folder = written(tmp_path / "in" / "1.jsonl", tmp_path / f"none{tasks}", tokenizer, tasks)
        with pytest.raises(InputError, match=r"no document in any shard \(1 empty, 1 malformed"):
            check_shards(folder)


def test_few_files_leave_a_task_without_one(many_files, tmp_path, tokenizer):
    path, texts = many_files
    folder = written(path, tmp_path / "out", tokenizer, 10)
    counts = check_shards(folder)
    assert counts["documents"] == len(texts) and counts["shards"] == 9
    assert tokens_of(folder) == expected_tokens(texts, tokenizer)


def test_more_tasks_than_documents(tmp_path, tokenizer):
    (tmp_path / "few.jsonl").write_text('{"text": "一"}\n{"text": "二"}\n', encoding="utf-8")
    folder = written(tmp_path / "few.jsonl", tmp_path / "out", tokenizer)
    assert check_shards(folder)["documents"] == 2 and tokens_of(folder) == expected_tokens(["一", "二"], tokenizer)


def test_missing_shard_is_named_and_written_by_the_next_launch(many_files, tmp_path, tokenizer):
    path, texts = many_files
    folder = written(path, tmp_path / "out", tokenizer)
    for file in Path(folder).glob("shard-00002*"):
        file.unlink()
    with pytest.raises(InputError, match=r"1 of 4 shards are missing, of tasks \[2\]"):
        check_shards(folder)
    before = Path(f"{shard_prefix(folder, 1, TASKS)}.bin").stat().st_mtime_ns
    written(path, tmp_path / "out", tokenizer)
    assert tokens_of(folder) == expected_tokens(texts, tokenizer)
    assert Path(f"{shard_prefix(folder, 1, TASKS)}.bin").stat().st_mtime_ns == before


def test_a_lost_document_is_noticed(one_file, tmp_path, tokenizer):
    """The sums show that a shard lacks a document, even if the shard itself is valid."""
    path, texts = one_file
    folder = written(path, tmp_path / "out", tokenizer)
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("\n".join(json.dumps({"text": text}) for text in texts[:-4]), encoding="utf-8")
    other = written(shorter, tmp_path / "other", tokenizer)
    for suffix in (".bin", ".idx", ".json", ".hashes.npy"):
        shutil.copy(shard_prefix(other, 1, TASKS) + suffix, shard_prefix(folder, 1, TASKS) + suffix)
    with pytest.raises(InputError, match="do not add up"):
        check_shards(folder)


def test_a_file_that_grew_meanwhile_is_noticed(many_files, tmp_path, tokenizer):
    path, _ = many_files
    folder = plan(path, tmp_path / "out", tokenizer)
    with (path / "1" / "part-4.jsonl").open("a", encoding="utf-8") as file:
        file.write('\n{"text": "new"}')
    for rank in range(TASKS):
        write_shard(None, rank, TASKS, folder, 1)
    with pytest.raises(InputError, match="do not add up"):
        check_shards(folder)


def test_a_foreign_store_in_the_folder_is_noticed(many_files, tmp_path, tokenizer):
    folder = written(many_files[0], tmp_path / "out", tokenizer)
    for suffix in (".bin", ".idx", ".json", ".hashes.npy"):
        shutil.copy(shard_prefix(folder, 1, TASKS) + suffix, str(Path(folder) / f"copy{suffix}"))
    with pytest.raises(InputError, match="do not add up"):
        check_shards(folder)


def test_a_folder_of_something_else_is_refused(many_files, one_file, tmp_path, tokenizer):
    path, _ = many_files
    folder = plan(path, tmp_path / "out", tokenizer)
    assert plan(path, tmp_path / "out", tokenizer) == folder  # the same again is a relaunch
    with pytest.raises(InputError, match="shards for 4 tasks"):
        plan(path, tmp_path / "out", tokenizer, 5)
    with pytest.raises(InputError, match=r"made with other settings \(sources"):
        plan(one_file[0], tmp_path / "out", tokenizer)
    other = train_tokenizer(bundled()[:5], 300)
    other.folder = str(tmp_path / "other_tokenizer")
    other.save_pretrained(other.folder)
    with pytest.raises(InputError, match=r"made with other settings \(tokenizer"):
        plan(path, tmp_path / "out", other)
    (tmp_path / "stores").mkdir()
    (tmp_path / "stores" / "x.bin").write_bytes(b"")
    with pytest.raises(InputError, match="token stores that this command did not write"):
        plan(path, tmp_path / "stores", tokenizer)
    with pytest.raises(InputError, match="at least 1"):
        plan(path, tmp_path / "none", tokenizer, 0)


def test_bad_input_fails_the_task_with_the_message_and_no_exit(one_file, tmp_path, tokenizer):
    """An exit would end a worker of the pool, which would wait for it forever."""
    folder = str(tmp_path / "out")
    plan_shards(folder, resolve_sources([str(one_file[0])]), tokenizer.folder, None, None, False, TASKS)
    with pytest.raises(RuntimeError, match=r"one\.jsonl, line 32"):
        write_shard(None, 2, TASKS, folder, 1)


def launch(*flags: str, path: str = "") -> subprocess.CompletedProcess:
    environment = {**os.environ, "PATH": path + os.environ["PATH"], "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)


@pytest.mark.heavy
def test_local_run_interrupted_and_launched_again(one_file, tmp_path, tokenizer):
    pytest.importorskip("datatrove")
    path, texts = one_file
    output = tmp_path / "out"
    flags = ["--input", str(path), "--tokenizer", tokenizer.folder, "--output", str(output), "--tasks", "4"]
    failed = launch(*flags)
    assert failed.returncode == 1 and "one.jsonl, line 32" in failed.stderr.splitlines()[-2]
    shutil.rmtree(output)
    flags.append("--skip_malformed")
    first = launch(*flags)
    assert first.returncode == 0, first.stderr
    counts = json.loads(first.stdout.splitlines()[-1])
    tokens = sum(len(ids) for ids in expected_tokens(texts, tokenizer))
    assert counts | {"seconds": 0} == {
        **dict(documents=len(texts), tokens=tokens - len(texts), end_tokens=len(texts), duplicates=1, empty=1),
        **dict(malformed=1, bytes=sum(len(text.encode()) for text in texts), shards=4, seconds=0),
    }
    # As after an interruption: task 2 did not finish, and left part of its file.
    completions = output / ".tasks" / "tokenize" / "completions"
    (completions / "00002").unlink()
    for file in output.glob("shard-00002*"):
        file.unlink()
    Path(f"{shard_prefix(str(output), 2, 4)}.partial.bin").write_bytes(b"half")
    before = {file: file.stat().st_mtime_ns for file in output.glob("shard*.bin") if "partial" not in file.name}
    again = launch(*flags)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1]) | {"seconds": 0} == counts | {"seconds": 0}
    assert all(file.stat().st_mtime_ns == time for file, time in before.items()) and len(before) == 3
    assert not list(output.glob("*.partial*"))


@pytest.mark.heavy
@pytest.mark.skipif(os.name == "nt", reason="Slurm is for Linux")
def test_slurm_runs_the_tasks_and_then_the_check(many_files, tmp_path, tokenizer):
    """With an ``sbatch`` that runs its jobs at once, in new processes, and an ``srun`` that just starts the command."""
    pytest.importorskip("datatrove")
    commands = tmp_path / "bin"
    commands.mkdir()
    sbatch = f"""#!{sys.executable}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
log = open({str(tmp_path / "sbatch.log")!r}, "a+")
print([line for line in script.splitlines() if "#SBATCH" in line], sys.argv[1:-1], file=log, flush=True)
last = re.search(r"--array=0-(\\d+)", script)
for task in range(int(last[1]) + 1 if "launch_pickled" in script else 0):
    settings = dict(os.environ, SLURM_ARRAY_TASK_ID=str(task), SLURM_NODELIST="here", SLURM_JOB_ID="1")
    subprocess.run(["bash", sys.argv[-1]], env=settings, stdout=log, stderr=log, check=True)
print("Submitted batch job 7")
"""
    srun = '#!/bin/bash\nwhile [ "$1" != launch_pickled_pipeline ]; do shift; done\nexec "$@"\n'
    for name, content in {"sbatch": sbatch, "srun": srun, "scontrol": "#!/bin/bash\necho here\n"}.items():
        (commands / name).write_text(content)
        (commands / name).chmod(stat.S_IRWXU)
    path, texts = many_files
    flags = ["--input", str(path), "--tokenizer", tokenizer.folder, "--output", str(tmp_path / "out"), "--tasks", "2"]
    flags += ["--executor", "slurm", "--partition", "cpu", "--cpus_per_task", "2", "--sbatch", "account=me"]
    result = launch(*flags, path=f"{commands}:")
    log = (tmp_path / "sbatch.log").read_text()
    assert result.returncode == 0 and "submitted" in result.stdout, result.stderr + log
    assert tokens_of(str(tmp_path / "out")) == expected_tokens(texts, tokenizer)
    printed = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert len(printed) == 1 and printed[0]["documents"] == len(texts) and printed[0]["shards"] == 2
    for setting in ("--partition=cpu", "--cpus-per-task=2", "--account=me", "--array=0-1", "--dependency=afterok:7"):
        assert setting in log
    without = launch(*flags[:-6], "--sbatch")
    assert without.returncode == 1 and "needs --partition" in without.stderr


def test_datatrove_missing_names_the_command(tmp_path, monkeypatch):
    specification = importlib.util.spec_from_file_location("prepare_distributed", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(InputError, match="pip install 'datatrove"):
        script.main(["--input", "a", "--tokenizer", "b", "--output", str(tmp_path / "out"), "--tasks", "2"])
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is not known there")
def test_a_worker_that_is_killed_ends_the_launch_with_the_command_that_continues(many_files, tmp_path, tokenizer):
    """As the system kills a process when memory runs out. Nothing waits for it, and no worker is left."""
    pytest.importorskip("datatrove")
    path, texts = many_files
    flags = ["--input", str(path), "--tokenizer", tokenizer.folder, "--output", str(tmp_path / "out")]
    flags += ["--tasks", "3", "--workers", "2"]
    spec = importlib.util.spec_from_file_location("prepare_distributed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    killed = []

    def kill_one() -> None:
        while not killed:
            for child in psutil.Process().children():
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()
                    killed.append(time.monotonic())
                    return
            time.sleep(0.05)

    thread = Thread(target=kill_one, daemon=True)
    thread.start()
    with pytest.raises(InputError, match="a worker was killed.*the same command continues.*--workers 1"):
        module.main(flags)
    assert time.monotonic() - killed[0] < 60
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    module.main([*flags[:-1], "1"])
    assert TokenStore(str(tmp_path / "out")).documents == len(texts)
