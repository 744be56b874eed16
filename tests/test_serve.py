"""The command a newcomer types, in a process of its own, with the embedded demo."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest

import serve
from tests.serve_process import ROOT, Herd

START_TIMEOUT_S = 60
QUESTION = [{"role": "user", "content": "What is NF4?"}]


@pytest.fixture(scope="module")
def herd(tmp_path_factory):
    running = Herd(tmp_path_factory.mktemp("data"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(herd):
    return openai.OpenAI(base_url=f"{herd.url}/v1", api_key="none", max_retries=0)


def test_base_and_the_demos_adapters_are_models(client):
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["demo", "guanaco", "pirate", "reward", "policy"]
    assert models["pirate"].parent == "demo"


@pytest.mark.parametrize("model", ["guanaco", "pirate", "policy"])
def test_openai_client_chats_with_each_adapter(client, model):
    options = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content.strip()
    chunks = list(client.chat.completions.create(**options, stream=True))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == whole.choices[0].message.content


def test_the_reward_adapter_prefers_an_answer_to_the_question(herd):
    talks = [
        [
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": answer},
        ]
        for answer in ("The capital of France is Paris.", "A cow says moo.")
    ]
    answer = httpx.post(f"{herd.url}/v1/rewards", json={"model": "reward", "input": talks}).json()
    right, wrong = (row["data"][0] for row in answer["data"])
    assert right > wrong


def test_base_continues_text_and_says_that_it_does_not_chat(client):
    text = client.completions.create(model="demo", prompt="Once upon a time", max_tokens=8)
    assert text.usage.completion_tokens > 0
    with pytest.raises(openai.BadRequestError, match="chat template"):
        client.chat.completions.create(model="demo", messages=QUESTION)


def test_curl_line_that_is_printed_works(herd):
    body = json.dumps({"model": "guanaco", "messages": QUESTION, "max_tokens": 5})
    url = f"{herd.url}/v1/chat/completions"
    command = ["curl", "-sS", url, "-H", "Content-Type: application/json", "-d", body]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert answer["choices"][0]["message"]["content"]


def test_page_is_at_the_root(herd):
    page = httpx.get(f"{herd.url}/", timeout=30)
    assert page.status_code == 200
    assert "Herd" in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]


def test_a_killed_worker_costs_one_clear_error_and_seconds(herd, client):
    options = {"model": "demo", "prompt": "Once", "max_tokens": 900}
    stream = client.completions.create(**options, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    os.kill(herd.worker_pid(), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="engine worker"):
        list(stream)
    deadline = time.monotonic() + 60
    while httpx.get(f"{herd.url}/health").status_code != 200:
        assert time.monotonic() < deadline, "the worker did not come back"
        time.sleep(0.1)
    answer = client.chat.completions.create(model="pirate", messages=QUESTION, max_tokens=5)
    assert answer.choices[0].message.content


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(number, tmp_path):
    running = Herd(tmp_path, "--no-ui", "--adapter", "pirate")
    assert [model["id"] for model in httpx.get(f"{running.url}/v1/models").json()["data"]] == [
        "demo",
        "pirate",
    ]
    status, errors = running.stop(number)
    assert status == 0
    assert "Traceback" not in errors


def test_a_port_in_use_is_said_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main(["--port", str(port)]) == 1
    assert f"Cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base", "no-such-model"], "No base model 'no-such-model'"),
        (["--adapter", "no-such-adapter"], "No adapter 'no-such-adapter'"),
        (["--block-size", "3"], "block_size: expected a power of two, got 3"),
        (["--tokenizer", "/nonexistent"], "no tokenizer"),
        (["--adapter-dir", "/nonexistent"], "--adapter-dir /nonexistent: no such folder"),
        (["--model-dir", "/nonexistent"], "--model-dir /nonexistent: no such folder"),
        (["--adapter", "guanaco", "--adapter", "guanaco"], "--adapter guanaco is given twice"),
        (["--ssl-keyfile", "/nokey", "--ssl-certfile", "/nocert"], "--ssl-certfile /nocert"),
        (["--no-ui", "--served-model-name", "pirate"], "called 'pirate': that is the base"),
        (["--no-ui", "--max-model-len", "100000"], "made for 1024 tokens"),
    ],
)
def test_a_wrong_start_is_refused_in_one_line(flags, message):
    command = [sys.executable, "serve.py", "--port", "0", *flags]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_quantize_refuses_a_model_that_is_4_bit(tmp_path, capsys):
    assert serve.main(["quantize", "demo", str(tmp_path / "copy")]) == 1
    assert "4-bit weights already" in capsys.readouterr().err


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        serve.main(["--help"])
    text = capsys.readouterr().out
    for flag in ("--base", "--adapter", "--max-model-len", "--kv-cache-dtype", "--api-key"):
        assert flag in text


def test_a_rival_package_called_kernels_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "1.2.3")
    assert serve.main([]) == 1
    assert "'kernels' 1.2.3" in capsys.readouterr().err
