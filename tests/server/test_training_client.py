"""Training through the client of a real worker: events, one job at a time, kill -9 and resume."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from adapters.format import read_ref
from adapters.writer import write_trained
from engine.api import (
    AdapterRef,
    GenerateRequest,
    SamplingParams,
    TrainingCheckpoint,
    TrainingEnded,
    TrainingJob,
    TrainingProgress,
    TrainingStarted,
)
from engine.config import CacheConfig, EngineConfig, ModelConfig
from engine.errors import EngineError
from engine.lora import LoraWeights
from engine.model_config import ModelSpec
from engine.train.config import TrainConfig
from engine.train.token_dataset import make_dataset, save_dataset
from server.engine_client import EngineClient
from tests.engine.tiny_models import save_model
from tests.engine.train.training_jobs import make_job

TIMEOUT_S = 120.0
REWARD = AdapterRef(uid=7, generation=1, name="reward", path="")


def load_adapter(ref: AdapterRef, spec: ModelSpec) -> LoraWeights:
    """A score head by name; everything else is in ref.path."""
    if ref == REWARD:
        head = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
        return LoraWeights(modules={}, replaced={"score.weight": head})
    return read_ref(ref, spec)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_model(path, "llama")
    return path


class Trained:
    """A client, and what it said about training."""

    def __init__(self, folder, cache) -> None:
        config = EngineConfig(
            model=ModelConfig(
                base=str(folder), device="cpu", threads=1, quantized_cache_dir=str(cache)
            ),
            cache=CacheConfig(kv_cache_memory_bytes=2**24),
        )
        self.client = EngineClient(
            config,
            folder,
            functools.partial(load_adapter, spec=ModelSpec.from_folder(folder)),
            functools.partial(write_trained, base_model="tiny"),
        )
        self.events: list = []
        self.client.on_training_event = self._note
        self._came = asyncio.Event()

    def _note(self, event) -> None:
        self.events.append(event)
        self._came.set()

    async def until(self, kind: type, num: int = 1):
        """Until so many events of a kind have come; the last of them."""
        async with asyncio.timeout(TIMEOUT_S):
            while len(found := [e for e in self.events if isinstance(e, kind)]) < num:
                self._came.clear()
                await self._came.wait()
        return found[-1]

    def kill_worker(self) -> None:
        os.kill(self.client._worker.process.pid, signal.SIGKILL)


@contextlib.asynccontextmanager
async def started(folder, tmp_path):
    trained = Trained(folder, tmp_path / "quantized")
    await trained.client.start()
    try:
        yield trained
    finally:
        await trained.client.stop(0.0)


def same_adapter(path: str, other: str) -> bool:
    first, second = (load_file(f"{p}/adapter_model.safetensors") for p in (path, other))
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


async def test_a_job_is_told_of_and_its_result_is_served_at_once(folder, tmp_path):
    async with started(folder, tmp_path) as trained:
        job = make_job(tmp_path / "job", learning_rate=2e-2)
        trained.client.start_training(job)
        ended = await trained.until(TrainingEnded)
        assert ended.status == "succeeded"
        assert isinstance(trained.events[0], TrainingStarted)
        ref = AdapterRef(uid=1, generation=1, name="tuned", path=ended.path)
        reply = await trained.client.load_adapter(ref, from_training=ended.path)
        assert reply.num_bytes > 0
        asked = GenerateRequest(
            request_id="r",
            prompt_token_ids=(5, 6, 7),
            params=SamplingParams(max_tokens=4, ignore_eos=True),
            adapter=ref,
        )
        deltas = [delta async for delta in trained.client.generate(asked)]
        assert deltas[-1].finish_reason == "length"


async def test_a_killed_worker_resumes_the_job_and_ends_with_the_same_adapter(folder, tmp_path):
    async with started(folder, tmp_path) as trained:
        settings = {"max_steps": 30, "save_every_steps": 5}
        whole = make_job(tmp_path / "whole", **settings)
        trained.client.start_training(whole)
        expected = await trained.until(TrainingEnded)

        job = make_job(tmp_path / "killed", **settings)
        trained.events.clear()

        async def go_on() -> None:
            trained.client.start_training(job)

        trained.client.on_restart = go_on
        trained.client.start_training(job)
        await trained.until(TrainingCheckpoint, num=2)
        trained.kill_worker()
        lost = await trained.until(TrainingEnded)
        assert (lost.status, lost.error.code) == ("failed", "engine_restarting")
        ended = await trained.until(TrainingEnded, num=2)
        assert ended.status == "succeeded"
        resumed = [e for e in trained.events if isinstance(e, TrainingStarted)][-1]
        assert 10 <= resumed.step < 30
        assert same_adapter(expected.path, ended.path)
        assert ended.trained_tokens == expected.trained_tokens


async def test_a_killed_worker_resumes_a_policy_with_the_same_rollouts(folder, tmp_path):
    prompts = torch.randint(3, 90, (6, 5), generator=torch.Generator().manual_seed(0)).tolist()
    save_dataset(tmp_path / "data", make_dataset("prompt", [(ids, [0.0] * 5) for ids in prompts]))

    def grpo_job(name: str) -> TrainingJob:
        return TrainingJob(
            job_id=name,
            folder=str(tmp_path / name),
            data_path=str(tmp_path / "data"),
            config=TrainConfig(
                method="grpo",
                rank=4,
                learning_rate=0.02,
                batch_size=2,
                max_steps=8,
                num_generations=4,
                max_completion_tokens=4,
                save_every_steps=2,
                warmup_ratio=0.0,
                kl_coefficient=0.01,
            ),
            reward_adapter=REWARD,
        )

    async with started(folder, tmp_path) as trained:
        trained.client.start_training(grpo_job("whole"))
        expected = await trained.until(TrainingEnded)
        assert expected.status == "succeeded", expected
        trained.events.clear()

        async def go_on() -> None:
            trained.client.start_training(grpo_job("killed"))

        trained.client.on_restart = go_on
        trained.client.start_training(grpo_job("killed"))
        await trained.until(TrainingCheckpoint, num=2)
        trained.kill_worker()
        ended = await trained.until(TrainingEnded, num=2)
        assert ended.status == "succeeded", ended
        assert same_adapter(expected.path, ended.path)


async def test_jobs_are_paused_and_a_second_one_is_refused(folder, tmp_path):
    async with started(folder, tmp_path) as trained:
        job = make_job(tmp_path / "job", max_steps=100_000)
        trained.client.start_training(job)
        await trained.until(TrainingProgress, num=2)
        other = make_job(tmp_path / "other")
        trained.client.start_training(
            TrainingJob(job_id="other", folder=other.folder, data_path=other.data_path)
        )
        refused = await trained.until(TrainingEnded)
        assert (refused.job_id, refused.status) == ("other", "failed")
        trained.client.stop_training("job", "paused")
        ended = await trained.until(TrainingEnded, num=2)
        assert (ended.job_id, ended.status) == ("job", "paused") and ended.step >= 2


async def test_stopping_the_client_ends_the_job_for_now(folder, tmp_path):
    async with started(folder, tmp_path) as trained:
        trained.client.start_training(make_job(tmp_path / "job", max_steps=100_000))
        await trained.until(TrainingProgress)
    ended = await trained.until(TrainingEnded)
    assert (ended.status, ended.error.code) == ("failed", "engine_restarting")
    with pytest.raises(EngineError, match="shutting down"):
        trained.client.start_training(make_job(tmp_path / "job"))
