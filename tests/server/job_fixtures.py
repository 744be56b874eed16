"""What tests of fine-tuning jobs share: a server's state over a data folder, a script for the
trainer, and OpenAI's client for the app in this process."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import torch

from adapters.format import AdapterInfo
from adapters.writer import write_adapter
from engine.api import (
    TrainingCheckpoint,
    TrainingEnded,
    TrainingEvent,
    TrainingJob,
    TrainingNote,
    TrainingProgress,
    TrainingStarted,
)
from engine.lora import LoraModule, LoraWeights
from engine.train.token_dataset import make_dataset
from server.app import create_app
from server.datasets.prepare import Prepared
from tests.server.fake_engine import FakeEngine, adapter_info, build_state

SAMPLE = b'{"prompt": "a", "completion": "b"}\n'


def fake_prepare(path: Path, **settings: Any) -> Prepared:
    """As many samples as there are lines."""
    lines = path.read_bytes().splitlines()
    assert settings["template"] is not None
    return Prepared(
        dataset=make_dataset("supervised", [([1, 2, 3], [0.0, 1.0, 1.0])] * len(lines)),
        format="input-output",
        num_samples=len(lines),
        num_tokens=3 * len(lines),
        num_label_tokens=2 * len(lines),
        max_length=3,
        warnings=("one of them is short",),
    )


def save_adapter(path: str | Path, score: bool = False) -> Path:
    """A PEFT folder with one layer."""
    lora = LoraModule(a=torch.ones(2, 4), b=torch.ones(4, 2))
    name = "model.layers.0.self_attn.q_proj"
    replaced = {"score.weight": torch.ones(1, 4)} if score else {}
    weights = LoraWeights(modules={name: lora}, replaced=replaced)
    write_adapter(path, weights, base_model="base", task_type="SEQ_CLS" if score else "CAUSAL_LM")
    return Path(path)


def started(job: TrainingJob, num_steps: int = 4, step: int = 0) -> TrainingStarted:
    config = dataclasses.replace(
        job.config,
        batch_size=job.config.batch_size or 2,
        num_epochs=job.config.num_epochs or 3.0,
        learning_rate=job.config.learning_rate or 2e-4,
        dropout=0.1,
    )
    return TrainingStarted(
        job_id=job.job_id,
        config=config,
        num_steps=num_steps,
        num_samples=3,
        step=step,
        num_trainable_parameters=10,
    )


def progress(job: TrainingJob, step: int, num_steps: int = 4, **metrics: float) -> TrainingProgress:
    found = {"train_loss": 4.0 / step, "train_mean_token_accuracy": 0.5, **metrics}
    return TrainingProgress(
        job_id=job.job_id,
        step=step,
        num_steps=num_steps,
        trained_tokens=10 * step,
        metrics=tuple(found.items()),
        remaining_s=100.0 * (num_steps - step),
    )


def checkpoint(job: TrainingJob, step: int) -> TrainingCheckpoint:
    path = save_adapter(Path(job.folder) / f"checkpoint-{step}")
    metrics = (("train_loss", 4.0 / step), ("valid_loss", 1.0))
    return TrainingCheckpoint(job_id=job.job_id, step=step, path=str(path), metrics=metrics)


def succeeded(job: TrainingJob, step: int = 4) -> TrainingEnded:
    path = save_adapter(Path(job.folder) / "final", score=job.config.method == "reward")
    return TrainingEnded(
        job_id=job.job_id,
        status="succeeded",
        step=step,
        trained_tokens=10 * step,
        path=str(path),
    )


def whole_run(job: TrainingJob) -> list[TrainingEvent]:
    """All that a job of four steps says."""
    return [
        started(job),
        progress(job, 1),
        progress(job, 2, valid_loss=1.0),
        checkpoint(job, 2),
        TrainingNote(job_id=job.job_id, level="warn", message="step 3 was skipped"),
        progress(job, 3),
        progress(job, 4),
        checkpoint(job, 4),
        succeeded(job),
    ]


def training_engine(
    train: Callable[[TrainingJob], list[TrainingEvent]] = whole_run,
) -> FakeEngine:
    engine = FakeEngine()
    engine.train = train
    return engine


@contextlib.asynccontextmanager
async def herd(engine: FakeEngine | None = None, **options: Any) -> AsyncIterator[SimpleNamespace]:
    """A server in this process whose jobs run."""
    engine = engine or training_engine()
    options = {"prepare": fake_prepare, **options}
    state = build_state(engine, **options)
    await state.jobs.start(engine.info)
    transport = httpx2.ASGITransport(app=create_app(state))
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http:
        client = openai.AsyncOpenAI(
            base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=http
        )
        try:
            yield SimpleNamespace(client=client, engine=engine, state=state, http=http)
        finally:
            await state.jobs.stop()
            state.registry.close()


async def upload(client: openai.AsyncOpenAI, num_lines: int = 3, name: str = "data.jsonl") -> str:
    file = (name, SAMPLE * num_lines)
    return (await client.files.create(file=file, purpose="fine-tune")).id


async def create(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    fields = {"model": "base", **fields}
    if "training_file" not in fields:
        fields["training_file"] = await upload(client)
    return await client.fine_tuning.jobs.create(**fields)


async def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    """Wait for what a condition, perhaps asynchronous, finds."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, "it never came"
        await asyncio.sleep(0.01)


async def until_status(client: openai.AsyncOpenAI, job_id: str, *statuses: str) -> Any:
    async def look() -> Any:
        job = await client.fine_tuning.jobs.retrieve(job_id)
        return job if job.status in statuses else None

    return await until(look)


def loadable_adapters(monkeypatch: Any) -> None:
    """Have adapters in files accepted without a look at the base, which is not there."""

    def inspect(folder: Path, _spec: object, label: str) -> AdapterInfo:
        template = folder / "chat_template.jinja"
        return adapter_info(
            chat_template=template.read_text() if template.exists() else None,
            has_score_head="SEQ_CLS" in (folder / "adapter_config.json").read_text(),
            base_model=label,
        )

    monkeypatch.setattr("adapters.generations.inspect_adapter", inspect)
