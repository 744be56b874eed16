"""The worker's loop with a real engine and a real trainer on one tiny 4-bit base."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from adapters.format import read_ref
from adapters.writer import write_trained
from engine.api import (
    AdapterRef,
    AdapterReply,
    GenerateRequest,
    LoadAdapter,
    RequestDelta,
    SamplingParams,
    StartTraining,
    StepOutput,
    StopTraining,
    TrainingCheckpoint,
    TrainingEnded,
    TrainingEvent,
    TrainingJob,
    TrainingNote,
    TrainingProgress,
)
from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.lora import LoraWeights
from engine.lora_source import LoraSource
from engine.startup import create_engine, create_runner
from engine.train.config import TrainConfig
from engine.train.out_of_memory import with_smaller_batches
from engine.train.slices import is_inside
from engine.train.token_dataset import make_dataset, save_dataset
from engine.worker import serve
from tests.engine.tiny_models import save_model
from tests.engine.train.training_jobs import make_job

WAIT_S = 120.0
REWARD = AdapterRef(uid=7, generation=1, name="reward", path="")
HEADLESS = AdapterRef(uid=8, generation=1, name="headless", path="")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_model(path, "llama")
    return path


def load_adapter(ref: AdapterRef, spec) -> LoraWeights:
    """A score head by name; everything else is in ref.path."""
    if ref == REWARD:
        generator = torch.Generator().manual_seed(1)
        head = torch.randn(1, 64, generator=generator)
        return LoraWeights(modules={}, replaced={"score.weight": head})
    return read_ref(ref, spec)


class Worker:
    """serve() in a thread, and the parent's end of its pipe."""

    def __init__(self, folder, cache, **scheduler) -> None:
        config = EngineConfig(
            model=ModelConfig(base="x", device="cpu", quantized_cache_dir=str(cache)),
            cache=CacheConfig(kv_cache_memory_bytes=2**24),
            scheduler=SchedulerConfig(**scheduler),
        )
        self.num_disk_reads = 0
        source = LoraSource(self._read)
        self.engine, self.info = create_engine(config, folder, source, lambda *_: None)
        self.spec = self.engine.model.spec
        write = functools.partial(write_trained, base_model="tiny")
        self.runner = create_runner(config, self.engine, self.info, source, write)
        self.conn, self._child = multiprocessing.Pipe()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _read(self, ref: AdapterRef) -> LoraWeights:
        self.num_disk_reads += 1
        return load_adapter(ref, self.spec)

    def _serve(self) -> None:
        try:
            serve(self._child, self.engine, self.runner)
        except (EOFError, OSError):
            pass
        finally:
            self._child.close()

    def close(self) -> None:
        self.conn.close()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        self.engine.check_integrity()
        self.engine.close()

    def until(self, is_last) -> list:
        """Messages up to the one that is waited for; steps' deltas one by one."""
        found: list = []
        while True:
            assert self.conn.poll(WAIT_S), "no message came"
            message = self.conn.recv()
            found += message.deltas if isinstance(message, StepOutput) else [message]
            if any(is_last(item) for item in found):
                return found

    def train(self, job: TrainingJob) -> list[TrainingEvent]:
        self.conn.send(StartTraining(job=job))
        found = self.until(lambda item: isinstance(item, TrainingEnded))
        return [item for item in found if isinstance(item, TrainingEvent)]


@pytest.fixture
def worker(folder, tmp_path_factory):
    worker = Worker(folder, tmp_path_factory.getbasetemp() / "quantized")
    yield worker
    worker.close()


def request(request_id: str, max_tokens: int = 40, **fields) -> GenerateRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=3, ignore_eos=True)
    number = int(request_id.removeprefix("r"))
    prompt = tuple(range(5 + number, 15 + number))
    return GenerateRequest(request_id=request_id, prompt_token_ids=prompt, params=params, **fields)


def tokens_of(messages: list, request_id: str) -> list[int]:
    deltas = [m for m in messages if isinstance(m, RequestDelta) and m.request_id == request_id]
    return [token for delta in deltas for token in delta.token_ids]


def is_end_of(*request_ids: str):
    waiting = set(request_ids)

    def is_last(message) -> bool:
        if isinstance(message, RequestDelta) and message.finish_reason is not None:
            assert message.finish_reason != "error", message
            waiting.discard(message.request_id)
        return not waiting

    return is_last


def serve_all(worker: Worker) -> dict[str, list[int]]:
    names = [f"r{number}" for number in range(4)]
    for name in names:
        worker.conn.send(request(name))
    messages = worker.until(is_end_of(*names))
    return {name: tokens_of(messages, name) for name in names}


def test_streams_get_the_same_tokens_while_an_adapter_is_trained(worker, tmp_path):
    alone = serve_all(worker)
    job = make_job(tmp_path / "job", max_steps=200)
    worker.conn.send(StartTraining(job=job))
    worker.until(lambda item: isinstance(item, TrainingProgress))
    names = list(alone)
    for name in names:
        worker.conn.send(request(name))
    messages = worker.until(is_end_of(*names))
    assert {name: tokens_of(messages, name) for name in names} == alone
    worker.conn.send(StopTraining(job_id="job", status="cancelled"))
    ended = worker.until(lambda item: isinstance(item, TrainingEnded))[-1]
    assert ended.status == "cancelled" and 0 < ended.step < 200


def test_training_gets_the_same_bits_while_streams_run(worker, tmp_path):
    quiet = worker.train(make_job(tmp_path / "quiet"))[-1]
    worker.conn.send(StartTraining(job=make_job(tmp_path / "busy")))
    for number in range(8):
        worker.conn.send(request(f"r{number}", max_tokens=60))
    busy = worker.until(lambda item: isinstance(item, TrainingEnded))[-1]
    assert_same_adapter(quiet.path, busy.path)
    assert quiet.trained_tokens == busy.trained_tokens


def assert_same_adapter(path: str, other: str) -> None:
    first, second = (load_file(f"{p}/adapter_model.safetensors") for p in (path, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def load(worker: Worker, ref: AdapterRef, from_training: str | None) -> AdapterReply:
    worker.conn.send(LoadAdapter(command_id=ref.uid, ref=ref, from_training=from_training))
    return worker.until(lambda item: isinstance(item, AdapterReply))[-1]


def test_a_result_published_from_memory_is_the_one_on_disk(worker, tmp_path):
    events = worker.train(make_job(tmp_path / "job", learning_rate=2e-2, max_steps=10, alpha=6.0))
    final = events[-1].path
    checkpoints = [event.path for event in events if isinstance(event, TrainingCheckpoint)]
    memory = AdapterRef(uid=1, generation=1, name="memory", path="/nowhere")
    disk = AdapterRef(uid=2, generation=1, name="disk", path=final)
    assert load(worker, memory, final).error is None
    assert worker.num_disk_reads == 0
    assert load(worker, disk, None).error is None
    assert worker.num_disk_reads == 1
    texts = []
    for number, adapter in enumerate((None, memory, disk)):
        name = f"r{number}"
        asked = request("r0", adapter=adapter)
        worker.conn.send(
            GenerateRequest(
                request_id=name,
                prompt_token_ids=asked.prompt_token_ids,
                params=asked.params,
                adapter=adapter,
            )
        )
        texts.append(tokens_of(worker.until(is_end_of(name)), name))
    assert texts[1] == texts[2] != texts[0]
    # Older checkpoints are read from where they are.
    older = AdapterRef(uid=3, generation=1, name="older", path=checkpoints[-3])
    assert load(worker, older, checkpoints[-3]).error is None
    assert worker.num_disk_reads == 2


def grpo_job(folder, **settings) -> TrainingJob:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 90, (4, 5), generator=generator).tolist()
    save_dataset(folder / "data", make_dataset("prompt", [(ids, [0.0] * 5) for ids in prompts]))
    defaults = {
        "method": "grpo", "rank": 8, "learning_rate": 0.02, "batch_size": 4, "max_steps": 14,
        "num_generations": 12, "max_completion_tokens": 4, "dropout": 0.0, "max_grad_norm": 1.0,
        "warmup_ratio": 0.0, "save_every_steps": 5,
    }  # fmt: skip
    return TrainingJob(
        job_id="grpo",
        folder=str(folder),
        data_path=str(folder / "data"),
        config=TrainConfig(**{**defaults, **settings}),
        reward_adapter=REWARD,
    )


def rewards(events: list) -> list[float]:
    return [dict(e.metrics)["reward"] for e in events if isinstance(e, TrainingProgress)]


def test_a_policy_learns_to_answer_what_the_reward_adapter_likes(worker, tmp_path):
    events = worker.train(grpo_job(tmp_path / "job"))
    assert events[-1].status == "succeeded", events[-1]
    found = rewards(events)
    assert sum(found[-3:]) / 3 > found[0] + 2.0
    metrics = dict(next(e for e in events if isinstance(e, TrainingProgress)).metrics)
    assert metrics["reward_std"] > 0
    assert 1 <= metrics["completion_tokens"] <= 4 and 0 <= metrics["truncated"] <= 1
    # The pool holds no policy any more.
    assert [uid for uid, _ in worker.engine.step().stats.resident_adapters] == [REWARD.uid]


def test_rollouts_are_drawn_beside_streams_and_nobody_sees_them(worker, tmp_path):
    quiet = worker.train(grpo_job(tmp_path / "quiet", max_steps=3))
    alone = serve_all(worker)
    worker.conn.send(StartTraining(job=grpo_job(tmp_path / "busy", max_steps=3)))
    names = list(alone)
    for name in names:
        worker.conn.send(request(name))
    seen_all, seen_end = is_end_of(*names), []

    def is_over(item) -> bool:
        seen_end.append(isinstance(item, TrainingEnded))
        return seen_all(item) and any(seen_end)

    messages = worker.until(is_over)
    assert {name: tokens_of(messages, name) for name in names} == alone
    assert rewards(messages) == rewards(quiet)
    others = {m.request_id for m in messages if isinstance(m, RequestDelta)} - set(names)
    assert not others


def test_a_stopped_job_abandons_its_rollouts(worker, tmp_path):
    job = grpo_job(tmp_path / "job", max_completion_tokens=100, num_generations=40)
    worker.conn.send(StartTraining(job=job))
    deadline = time.monotonic() + WAIT_S
    while not worker.engine.has_work():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worker.conn.send(StopTraining(job_id="grpo", status="paused"))
    ended = worker.until(lambda item: isinstance(item, TrainingEnded))[-1]
    assert (ended.status, ended.step) == ("paused", 0)
    assert serve_all(worker)


def test_a_reward_adapter_without_a_score_head_fails_the_job_and_says_why(worker, tmp_path):
    trained = worker.train(make_job(tmp_path / "first"))[-1]
    headless = AdapterRef(uid=8, generation=1, name="headless", path=trained.path)
    job = grpo_job(tmp_path / "job")
    ended = worker.train(dataclasses.replace(job, reward_adapter=headless))[-1]
    assert ended.status == "failed" and "headless" in ended.error.message
    assert serve_all(worker)


def test_an_idle_worker_rests_after_a_job_and_before_one(worker, tmp_path):
    worker.train(make_job(tmp_path / "job", max_steps=2))
    time.sleep(0.1)
    started_s = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - started_s < 0.2


def test_training_gives_its_memory_to_a_step_that_finds_none(worker, tmp_path):
    call, failed = worker.engine.model.forward, []

    def forward(*args):
        if not failed and is_inside(with_smaller_batches, worker.runner._slices):
            failed.append(1)
            raise torch.OutOfMemoryError("no room")
        return call(*args)

    worker.conn.send(StartTraining(job=make_job(tmp_path / "job", max_steps=100_000)))
    worker.until(lambda item: isinstance(item, TrainingProgress))
    worker.engine.model.forward = forward
    try:
        worker.conn.send(request("r0"))
        messages = worker.until(is_end_of("r0"))
    finally:
        worker.engine.model.forward = call
    assert failed and len(tokens_of(messages, "r0")) == 40
    worker.conn.send(StopTraining(job_id="job", status="cancelled"))
    messages += worker.until(lambda item: isinstance(item, TrainingEnded))
    notes = [item.message for item in messages if isinstance(item, TrainingNote)]
    assert any("Memory ran out" in note for note in notes)
    assert messages[-1].status == "cancelled"
