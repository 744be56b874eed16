"""The worker's loop over a fake engine, and the worker's process as its parent meets it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from engine import worker
from engine.api import (
    CancelRequest,
    EngineInfo,
    GenerateRequest,
    LoadAdapter,
    SamplingParams,
    Shutdown,
    StepOutput,
    WorkerFailed,
)
from engine.config import EngineConfig, ModelConfig
from engine.errors import CheckpointError, EngineError
from engine.startup import create_engine
from engine.worker import run_worker, serve
from tests.engine.fakes import FakeEngine, adapter, expected_text
from tests.engine.tiny_models import save_model
from tests.engine.train.fake_trainers import Runner

WAIT_S = 60.0


def request(request_id: str, max_tokens: int = 4, **fields) -> GenerateRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return GenerateRequest(
        request_id=request_id, prompt_token_ids=(5, 6, 7), params=params, **fields
    )


@pytest.fixture
def served():
    """(the parent's end of the pipe, the fake engine, the thread that serves it)."""
    fake = FakeEngine()
    parent, child = multiprocessing.Pipe()

    def run() -> None:
        try:
            serve(child, fake.engine, Runner(fake).runner)
        except EOFError:
            pass
        finally:
            child.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield parent, fake, thread
    parent.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    fake.engine.check_integrity()


def receive(conn):
    assert conn.poll(WAIT_S), "no message came"
    return conn.recv()


def deltas_until_end(conn, request_id: str):
    found = []
    while not found or found[-1].finish_reason is None:
        message = receive(conn)
        assert isinstance(message, StepOutput)
        found += [delta for delta in message.deltas if delta.request_id == request_id]
    return found


def test_a_request_comes_back_as_one_message_per_step(served):
    conn, _, _ = served
    conn.send(request("a"))
    deltas = deltas_until_end(conn, "a")
    assert [t for d in deltas for t in d.token_ids] == expected_text([5, 6, 7], 4)


def test_an_idle_worker_runs_no_step(served):
    conn, fake, _ = served
    conn.send(request("a"))
    deltas_until_end(conn, "a")
    num_steps = 0
    step = fake.engine.step

    def counted():
        nonlocal num_steps
        num_steps += 1
        return step()

    fake.engine.step = counted
    assert not conn.poll(0.2)
    assert num_steps == 0


def test_an_idle_worker_gives_memory_back_once_after_its_work(monkeypatch):
    given_back: list[float] = []
    monkeypatch.setattr(worker, "IDLE_S", 0.05)
    monkeypatch.setattr(worker, "return_freed_memory", lambda: given_back.append(time.monotonic()))
    fake = FakeEngine()
    parent, child = multiprocessing.Pipe()
    thread = threading.Thread(target=serve, args=(child, fake.engine, Runner(fake).runner))
    thread.start()
    for times in (1, 2, 3):  # first for what loading has left
        if times > 1:
            parent.send(request(f"r{times}"))
            deltas_until_end(parent, f"r{times}")
        deadline = time.monotonic() + WAIT_S
        while len(given_back) < times and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(given_back) == times
    parent.send(Shutdown())
    thread.join(WAIT_S)
    parent.close()


def test_a_cancelled_request_ends_within_a_step(served):
    conn, _, _ = served
    conn.send(request("a", max_tokens=120))
    receive(conn)
    conn.send(CancelRequest(request_id="a"))
    assert deltas_until_end(conn, "a")[-1].finish_reason == "cancelled"


def test_shutdown_cancels_what_runs_and_ends_the_loop(served):
    conn, _, thread = served
    conn.send(request("a", max_tokens=120))
    receive(conn)
    conn.send(Shutdown())
    assert deltas_until_end(conn, "a")[-1].finish_reason == "cancelled"
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_nonsense_and_repeated_ids_are_dropped_and_the_rest_goes_on(served):
    conn, _, _ = served
    conn.send("nonsense")
    conn.send(request("a", max_tokens=30))
    conn.send(request("a", max_tokens=30))
    conn.send(CancelRequest(request_id="unknown"))
    assert len(deltas_until_end(conn, "a")) == 30


def test_an_adapter_command_is_answered_in_an_idle_worker(served):
    conn, _, _ = served
    conn.send(LoadAdapter(command_id=7, ref=adapter(1)))
    message = receive(conn)
    while isinstance(message, StepOutput):
        message = receive(conn)
    assert (message.command_id, message.error) == (7, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_model(path, "llama")
    return path


def config(folder, **model) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(base=str(folder), quantization="none", device="cpu", **model)
    )


def no_adapters(*args):
    raise AssertionError(args)


def test_start_up_reports_what_was_found(folder):
    stages = []
    engine, info = create_engine(
        config(folder, max_model_len=64), folder, no_adapters, lambda *report: stages.append(report)
    )
    engine.close()
    assert (info.max_model_len, info.dtype, info.kv_cache_dtype) == (64, "float32", "float32")
    assert info.num_kv_blocks == 64 * 4  # 64 sequences of 64 tokens in blocks of 16
    assert info.kv_cache_bytes == info.num_kv_blocks * 16 * 2 * 2 * 2 * 16 * 4
    assert info.quantization == "none" and info.eos_token_ids == (2,)
    assert stages[-1][1] == stages[-1][2]


def test_a_model_len_beyond_what_the_model_was_made_for_is_refused(folder):
    with pytest.raises(EngineError, match=r"--max-model-len 129.*at most 128"):
        create_engine(config(folder, max_model_len=129), folder, no_adapters, lambda *_: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(folder):
    cuda = EngineConfig(model=ModelConfig(base=str(folder), device="cuda"))
    with pytest.raises(EngineError, match="--device cuda"):
        create_engine(cuda, folder, no_adapters, lambda *_: None)


def test_a_worker_that_cannot_start_says_so_and_ends(tmp_path):
    parent, child = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    missing = tmp_path / "missing"
    process = context.Process(
        target=run_worker, args=(child, config(missing), missing, no_adapters, no_adapters)
    )
    process.start()
    child.close()
    message = receive(parent)
    assert isinstance(message, WorkerFailed) and message.error.code == CheckpointError.code
    process.join(WAIT_S)
    assert process.exitcode is not None


ORPHAN = """
import multiprocessing, sys, time
from pathlib import Path
from engine.worker import run_worker
from tests.engine.test_worker import config, no_adapters

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    parent, child = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=run_worker, daemon=True,
        args=(child, config(folder), folder, no_adapters, no_adapters))
    process.start()
    child.close()
    while type(parent.recv()).__name__ != "EngineInfo":
        pass
    print(process.pid, flush=True)
    time.sleep(600)
"""


def test_a_worker_dies_with_its_parent(folder, tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    parent = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait(WAIT_S)
    deadline = time.monotonic() + WAIT_S
    while _is_running(pid):
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    """Neither gone nor a zombie that nobody has collected yet."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_messages_survive_the_pipe():
    info = EngineInfo(
        architecture="a", vocab_size=1, max_model_len=1, eos_token_ids=(1,), num_kv_blocks=1,
        block_size=1, dtype="x", kv_cache_dtype="x", device="cpu", weights_bytes=1,
        kv_cache_bytes=1, base_fingerprint="f",
    )  # fmt: skip
    parent, child = multiprocessing.Pipe()
    child.send(info)
    assert parent.recv() == info
