"""From a checkpoint to a chat in the terminal, by the commands of docs/next_steps.md."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

PROGRAMS = Path(sys.executable).parent
DIALOGUES = ROOT / "data" / "dialogues" / "train.jsonl"


def commands_of_the_page() -> list[list[str]]:
    """Return `trl sft`, `transformers serve` and `transformers chat`, each as words."""
    page = (ROOT / "docs" / "next_steps.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```\n(pip install -e '\.\[chat\]'\n.*?)```", page, flags=re.DOTALL)
    lines = block.replace("\\\n", " ").splitlines()[1:]
    return [shlex.split(line, comments=True) for line in lines]


def loss_of_answers(folder: Path) -> float:
    """Return the mean loss of all answers, each token of it given what is before, in the form that the page gives."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end, nats, count = tokenizer.eos_token, 0.0, 0
    for line in DIALOGUES.read_text(encoding="utf-8").splitlines():
        ids, labels = [], []
        for message in json.loads(line)["messages"]:
            answer = message["role"] == "assistant"
            given = "### assistant\n" if answer else f"### user\n{message['content']}\n"
            learnt = message["content"] + end if answer else ""
            for text, counts in ((given, False), (learnt, True), ("\n" if answer else "", False)):
                tokens = tokenizer(text)["input_ids"]
                ids += tokens
                labels += tokens if counts else [-100] * len(tokens)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum").item()
        count += sum(label != -100 for label in labels)
    return nats / count


def answer_by_hand(folder: Path, question: str) -> str:
    """Return what the model finds most probable, token by token, until it ends the document."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(f"### user\n{question}\n### assistant\n")["input_ids"]
    start = len(ids)
    while len(ids) < start + 80:
        with torch.no_grad():
            token = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:])


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_a_checkpoint_becomes_a_chat(weights, tmp_path):
    train, serve, chat = commands_of_the_page()
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "datasets"), "HF_HUB_OFFLINE": "1"}
    environment |= {"COLUMNS": "300", "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"}
    chatting = tmp_path / "OUT-chat"
    places = {"OUT": str(weights), "OUT-chat": str(chatting)}
    places |= {"accelerate_configs/single_gpu.yaml": "accelerate_configs/cpu.yaml"}
    train = [places.get(word, word) for word in train] + "--use_cpu true --bf16 false --save_strategy no".split()
    train += "--learning_rate 3e-3 --disable_tqdm true".split()  # the larger for so small a model
    before = loss_of_answers(weights)
    done = subprocess.run(train, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    after = loss_of_answers(chatting)
    assert after < before - 1  # nat
    assert (chatting / "chat_template.jinja").read_text() == (ROOT / "data" / "chat_template.jinja").read_text()

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    serve = [places.get(word, word) for word in serve] + ["--port", str(port), "--device", "cpu"]
    log = tmp_path / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(serve, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for_health(port, server, log)
        question = "What is the capital of France?"
        chat = [places.get(word, word) for word in chat] + [f"http://localhost:{port}"]
        chat += ["max_new_tokens=80", "do_sample=False"]
        online = environment | {"HF_HUB_OFFLINE": "0"}  # otherwise its client refuses localhost, too
        lines = f"{question}\n!exit\n"
        said = subprocess.run(chat, env=online, input=lines, capture_output=True, text=True, timeout=300)
    finally:
        server.terminate()
        server.wait(60)
    expected = answer_by_hand(chatting, question)
    assert expected and " ".join(expected.split()) in " ".join(said.stdout.split()), said.stdout + said.stderr


def wait_for_health(port: int, server: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"the server does not answer: {log.read_text()}")
