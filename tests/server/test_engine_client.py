"""A real worker process on a tiny model: service, cancellation, death and return."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from engine.api import (
    AdapterRef,
    EngineStats,
    GenerateRequest,
    RecordingProgress,
    RequestDelta,
    SamplingParams,
    StepOutput,
)
from engine.config import CacheConfig, EngineConfig, ModelConfig
from engine.errors import (
    AdapterError,
    CheckpointError,
    ContextLengthExceeded,
    EngineError,
    NotEnoughMemory,
    RequestError,
    WorkerDied,
)
from engine.lora import LoraModule, LoraWeights
from server import engine_client
from server.engine_client import EngineClient, error_from_info
from tests.engine.tiny_models import save_model

REF = AdapterRef(uid=1, generation=1, name="tiny", path="/nowhere")
BROKEN = AdapterRef(uid=2, generation=1, name="broken", path="/nowhere")
TIMEOUT_S = 60.0


def load_adapter(ref: AdapterRef) -> LoraWeights:
    """Injected into the worker, so it has to be a module's function."""
    if ref.name == "broken":
        raise AdapterError("Adapter 'broken' is broken.")
    generator = torch.Generator().manual_seed(ref.uid)
    a, b = torch.randn(2, 64, generator=generator), torch.randn(64, 2, generator=generator)
    return LoraWeights(modules={"model.layers.0.self_attn.q_proj": LoraModule(a=a, b=b)})


def write_adapter(*args) -> None:
    """Injected likewise; no test here trains."""
    raise AssertionError(args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_model(path, "llama", max_position_embeddings=2048)
    return path


def make_client(folder, **cache) -> EngineClient:
    config = EngineConfig(
        model=ModelConfig(base=str(folder), quantization="none", device="cpu"),
        cache=CacheConfig(**{"kv_cache_memory_bytes": 2**24, **cache}),
    )
    return EngineClient(config, folder, load_adapter, write_adapter)


@contextlib.asynccontextmanager
async def started(folder, **cache):
    client = make_client(folder, **cache)
    await client.start()
    process = client._worker.process
    pid = process.pid
    try:
        yield client
    finally:
        await client.stop(0.0)
        assert not is_process(pid)


def is_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def request(request_id: str, max_tokens: int = 8, **fields) -> GenerateRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return GenerateRequest(
        request_id=request_id, prompt_token_ids=(5, 6, 7), params=params, **fields
    )


async def collect(client: EngineClient, asked: GenerateRequest) -> list[RequestDelta]:
    async with asyncio.timeout(TIMEOUT_S):
        return [delta async for delta in client.generate(asked)]


def tokens(deltas: list[RequestDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


async def until(condition) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_worker_serves_cancels_loads_adapters_and_stops(folder):
    client = make_client(folder)
    assert client.state == "loading"
    info = await client.start()
    assert client.state == "ready" and client.info == info
    assert (info.architecture, info.vocab_size, info.device) == ("LlamaForCausalLM", 97, "cpu")
    assert client.progress is not None and client.progress.done == client.progress.total
    pid = client._worker.process.pid

    # Many at once: each gets its own deltas, in order, with one end.
    answers = await asyncio.gather(*(collect(client, request(f"r{i}")) for i in range(10)))
    for deltas in answers:
        assert [d.finish_reason for d in deltas] == [None] * 7 + ["length"]
        assert tokens(deltas) == tokens(answers[0])
    assert client.stats.num_running == 0

    # A refused request is an error delta, not an exception.
    too_long = GenerateRequest(
        request_id="long", prompt_token_ids=(1,) * 3000, params=SamplingParams(max_tokens=1)
    )
    (final,) = await collect(client, too_long)
    assert final.error.code == "context_length_exceeded"

    # Closing a stream early cancels the request; the worker is idle soon after.
    stream = client.generate(request("early", max_tokens=2000))
    await anext(stream)
    await stream.aclose()
    await collect(client, request("after"))
    await until(lambda: client.stats.num_running == 0)

    # One client that does not read delays nobody.
    slow = client.generate(request("slow", max_tokens=50))
    await anext(slow)
    assert len(await collect(client, request("quick", max_tokens=100))) == 100
    assert len([delta async for delta in slow]) == 49

    # Adapters.
    reply = await client.load_adapter(REF)
    assert reply.error is None and reply.num_bytes > 0
    adapted = await collect(client, request("adapted", adapter=REF))
    assert tokens(adapted) != tokens(answers[0])
    assert client.stats.resident_adapters == ((1, 1),)
    with pytest.raises(AdapterError, match="is broken"):
        await client.load_adapter(BROKEN)
    (final,) = await collect(client, request("broken", adapter=BROKEN))
    assert final.error.code == "invalid_adapter"
    await client.unload_adapter(REF)

    # Messages that make no sense are survived on both sides.
    client._send("nonsense")
    client._on_message(client._worker, "nonsense")
    late = RequestDelta(request_id="unknown", token_ids=(1,), finish_reason="stop")
    client._on_message(client._worker, StepOutput(deltas=(late,), stats=EngineStats()))
    assert len(await collect(client, request("still there"))) == 8

    # Stop drains what runs.
    running = asyncio.create_task(collect(client, request("draining", max_tokens=30)))
    await until(lambda: "draining" in client._requests)
    await client.stop(TIMEOUT_S)
    assert (await running)[-1].finish_reason == "length"
    assert client.state == "stopped" and not is_process(pid)
    (final,) = await collect(client, request("too late"))
    assert "shutting down" in final.error.message


def test_what_the_worker_says_of_recordings_reaches_whoever_shows_it(folder):
    client, told = make_client(folder), []
    message = RecordingProgress(num_recorded=1, num_sizes=4, is_recording=True)
    client._on_message(None, message)  # nobody shows it
    client.on_recording = told.append
    client._on_message(None, message)
    assert told == [message]


async def test_a_killed_worker_fails_its_requests_once_and_another_serves_again(folder):
    async with started(folder) as client:
        restarts = []

        async def on_restart() -> None:
            restarts.append(client.state)
            await client.load_adapter(REF)

        client.on_restart = on_restart
        asked = [request(f"r{i}", max_tokens=2000) for i in range(3)]
        tasks = [asyncio.create_task(collect(client, one)) for one in asked]
        await until(lambda: client.stats.num_running == 3)
        os.kill(client._worker.process.pid, signal.SIGKILL)
        for task in tasks:
            deltas = await task
            assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
            error = deltas[-1].error
            assert error.code == "engine_restarting" and "SIGKILL" in error.message
        assert client.state == "restarting"
        (refused,) = await collect(client, request("meanwhile"))
        assert refused.error.code == "engine_restarting"
        await until(lambda: client.state == "ready")
        assert restarts == ["restarting"] and client.num_restarts == 1
        assert len(await collect(client, request("again", adapter=REF))) == 8


async def test_a_command_under_way_fails_when_the_worker_dies(folder):
    async with started(folder) as client:
        os.kill(client._worker.process.pid, signal.SIGSTOP)
        task = asyncio.create_task(client.load_adapter(REF))
        await until(lambda: client._commands)
        os.kill(client._worker.process.pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="SIGKILL"):
            await task


async def test_a_worker_that_keeps_dying_is_given_up(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(engine_client, "MAX_DEATHS", 2)
    monkeypatch.setattr(engine_client, "FIRST_BACKOFF_S", 0.01)
    client = make_client(folder)
    await client.start()
    client._folder = tmp_path / "gone"  # the next worker cannot start
    os.kill(client._worker.process.pid, signal.SIGKILL)
    await until(lambda: client.state == "failed")
    (final,) = await collect(client, request("r"))
    assert "given up" in final.error.message and "gone" in final.error.message
    await client.stop(0.0)


async def test_a_worker_that_cannot_start_tells_why(tmp_path):
    client = make_client(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="missing"):
        await client.start()
    assert client.state == "stopped" and client._worker is None


async def test_a_cache_too_small_for_one_sequence_is_refused_by_name(folder):
    client = make_client(folder, kv_cache_memory_bytes=2**16)
    with pytest.raises(NotEnoughMemory, match=r"--kv-cache-memory-bytes.*--max-model-len"):
        await client.start()


async def test_stop_during_start_ends_both(folder):
    client = make_client(folder)
    starting = asyncio.create_task(client.start())
    await until(lambda: client._worker is not None)
    started_s = time.monotonic()
    await client.stop(0.0)
    with pytest.raises(WorkerDied):
        await starting
    assert client.state == "stopped" and time.monotonic() - started_s < TIMEOUT_S


async def test_the_worker_ignores_ctrl_c(folder):
    async with started(folder) as client:
        os.kill(client._worker.process.pid, signal.SIGINT)
        assert len(await collect(client, request("r"))) == 8


INTERRUPTED = """
import asyncio, signal, sys
from pathlib import Path
from tests.server.test_engine_client import load_adapter, make_client

async def main():
    client = make_client(Path(sys.argv[1]))
    starting = asyncio.create_task(client.start())
    while client._worker is None:
        await asyncio.sleep(0.01)
    print("importing", flush=True)
    try:
        await starting
    finally:
        await client.stop(0.0)

if __name__ == "__main__":
    # As in a terminal: what a shell has started in the background ignores the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def test_ctrl_c_while_the_worker_imports_is_silent(folder, tmp_path):
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # its own process group, as in a terminal
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout.readline() == "importing\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (out, err) == ("interrupted\n", "")


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("a"),
        RequestError("b", "prompt"),
        ContextLengthExceeded(5, 6, 7),
        NotEnoughMemory("c"),
        EngineError("d"),
    ],
)
def test_an_error_survives_the_way_between_the_processes(error):
    again = error_from_info(error.info())
    assert type(again) is type(error)
    assert again.info() == error.info()
