"""Trainers by script for the runner's tests, and a clock that only their slices move."""

from __future__ import annotations

import torch

from engine.api import (
    TrainingCheckpoint,
    TrainingEnded,
    TrainingJob,
    TrainingProgress,
    TrainingStarted,
)
from engine.lora import LoraModule, LoraWeights
from engine.lora_source import LoraSource
from engine.train.config import TrainConfig
from engine.train.rollouts import EngineRollouts
from engine.train.runner import JobRunner
from tests.engine.fakes import FakeEngine


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def job(job_id: str = "job", **fields) -> TrainingJob:
    return TrainingJob(job_id=job_id, folder="/jobs/" + job_id, data_path="/data", **fields)


def weights(value: float) -> LoraWeights:
    module = LoraModule(a=torch.full((1, 4), value), b=torch.full((4, 1), value))
    return LoraWeights(modules={"model.layers.0.self_attn.q_proj": module})


class ScriptedTrainer:
    """Each step is a forward and a backward slice and an event; a checkpoint every `save_every`."""

    def __init__(
        self, job, *, num_steps=3, clock=None, forward_s=0.0, backward_s=0.0, save_every=1,
        error=None,
    ):  # fmt: skip
        self.job, self.clock = job, clock
        self.num_steps, self.save_every = num_steps, save_every
        self.forward_s, self.backward_s = forward_s, backward_s
        self.error = error
        self.is_waiting = False
        self.saved = {}
        self.stop_status = None
        self.num_slices = 0
        self.is_closed = False

    def stop(self, status):
        self.stop_status = status

    def weights_at(self, path):
        return self.saved.get(path)

    def _spend(self, seconds):
        self.num_slices += 1
        if self.clock is not None:
            self.clock.now_s += seconds

    def run(self):
        job_id = self.job.job_id
        try:
            yield TrainingStarted(
                job_id=job_id, config=TrainConfig(), num_steps=self.num_steps, num_samples=1
            )
            for step in range(1, self.num_steps + 1):
                self._spend(self.forward_s)
                yield None
                self._spend(self.backward_s)
                if self.error is not None:
                    raise self.error
                yield TrainingProgress(
                    job_id=job_id, step=step, num_steps=self.num_steps, trained_tokens=step,
                    metrics=(), remaining_s=0.0,
                )  # fmt: skip
                if step % self.save_every == 0:
                    path = f"{self.job.folder}/checkpoint-{step}"
                    self.saved = {path: weights(step)}
                    yield TrainingCheckpoint(job_id=job_id, step=step, path=path, metrics=())
                if self.stop_status is not None:
                    yield TrainingEnded(job_id=job_id, status=self.stop_status, step=step)
                    return
            yield TrainingEnded(
                job_id=job_id, status="succeeded", step=self.num_steps, path=self.job.folder
            )
        finally:
            self.is_closed = True


class Runner:
    """A JobRunner over a fake engine; keeps the trainers that it made."""

    def __init__(
        self,
        fake: FakeEngine | None = None,
        *,
        max_stall_s=0.05,
        clock=None,
        trainer_class=ScriptedTrainer,
        **script,
    ):
        self.fake = fake or FakeEngine()
        self.clock = clock or FakeClock()
        self.script = {"clock": self.clock, **script}
        self.trainers = []
        self._trainer_class = trainer_class
        self.read = []
        self.source = LoraSource(self.read.append)
        self.rollouts = EngineRollouts(self.fake.engine, self.source)
        self.runner = JobRunner(
            self._make,
            self.rollouts,
            self.source,
            max_stall_s=max_stall_s,
            device=torch.device("cpu"),
            clock=self.clock,
        )

    def _make(self, job):
        self.trainers.append(self._trainer_class(job, **self.script))
        return self.trainers[-1]

    def run_idle(self, max_slices=1000):
        """Every event of a job that has the machine to itself."""
        events = []
        for _ in range(max_slices):
            if not self.runner.is_running and not self.runner.has_work:
                return events
            events += self.runner.advance(has_streams=False)
        raise AssertionError("the job does not end")
