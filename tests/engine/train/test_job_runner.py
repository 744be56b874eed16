"""The worker's job: slices between steps, events in order, failures that end the job only."""

from __future__ import annotations

import threading

import pytest
import torch

from engine.api import (
    AdapterRef,
    LoadAdapter,
    TrainingCheckpoint,
    TrainingEnded,
    TrainingNote,
    TrainingProgress,
    TrainingStarted,
)
from engine.errors import EngineError
from engine.train.checkpoint_keeper import in_thread
from tests.engine.fakes import FakeEngine
from tests.engine.train.fake_trainers import Runner, ScriptedTrainer, job

REF = AdapterRef(uid=1, generation=1, name="tuned", path="/copy")


def test_a_job_runs_to_its_end_when_nothing_else_does():
    runner = Runner(num_steps=2)
    runner.runner.start(job())
    events = runner.run_idle()
    assert [type(event) for event in events] == [
        TrainingStarted, TrainingProgress, TrainingCheckpoint, TrainingProgress, TrainingCheckpoint,
        TrainingEnded,
    ]  # fmt: skip
    assert events[-1].status == "succeeded"
    assert not runner.runner.is_running and not runner.runner.has_work


def test_an_idle_machine_runs_one_slice_at_a_time_so_that_the_pipe_is_looked_at():
    runner = Runner(num_steps=5, save_every=100)
    runner.runner.start(job())
    for expected in range(5):
        runner.runner.advance(has_streams=False)
        assert runner.trainers[0].num_slices == expected


def test_streams_wait_no_longer_than_the_budget_between_two_steps():
    runner = Runner(num_steps=200, forward_s=0.007, backward_s=0.016, max_stall_s=0.05)
    runner.runner.start(job())
    stalls = []
    for _ in range(60):
        before_s = runner.clock.now_s
        runner.runner.advance(has_streams=True)
        stalls.append(runner.clock.now_s - before_s)
    assert max(stalls) <= 0.05 + 1e-9
    assert sum(stalls) / len(stalls) >= 0.035  # and the budget is used


def test_slices_longer_than_the_budget_still_run_and_the_owner_is_told_once():
    runner = Runner(num_steps=100, forward_s=0.2, backward_s=0.2, max_stall_s=0.05)
    runner.runner.start(job())
    events, num_steps = [], 80
    for _ in range(num_steps):
        events += runner.runner.advance(has_streams=True)
    assert runner.clock.now_s == pytest.approx(num_steps * 0.05, rel=0.15)
    (note,) = [event for event in events if isinstance(event, TrainingNote)]
    assert note.level == "warn" and "200 ms" in note.message and "50" in note.message


def test_no_step_is_in_flight_when_slices_run_so_that_their_time_is_their_own():
    fake = FakeEngine(async_scheduling="on")
    runner = Runner(fake, num_steps=4)
    fake.add("stream", max_tokens=40)
    runner.runner.step()
    assert fake.engine._in_flight is not None
    runner.runner.start(job())
    while runner.runner.is_running:
        runner.runner.step()
        assert fake.engine._in_flight is None
        runner.runner.advance(has_streams=True)
    runner.runner.step()
    assert fake.engine._in_flight is not None


def test_a_second_job_fails_and_the_first_goes_on():
    runner = Runner()
    runner.runner.start(job("first"))
    runner.runner.start(job("second"))
    events = runner.run_idle()
    ended = {event.job_id: event for event in events if isinstance(event, TrainingEnded)}
    assert ended["first"].status == "succeeded"
    assert ended["second"].status == "failed" and "first" in ended["second"].error.message


def test_a_job_that_is_stopped_says_how_it_ended_and_another_may_start():
    runner = Runner(num_steps=50)
    runner.runner.start(job())
    runner.runner.stop("another", "cancelled")
    runner.runner.advance(has_streams=False)
    runner.runner.stop("job", "paused")
    assert runner.run_idle()[-1].status == "paused"
    runner.script["num_steps"] = 1
    runner.runner.start(job())
    assert runner.run_idle()[-1].status == "succeeded"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (EngineError("the data are gone"), "engine_error", "the data are gone"),
        (RuntimeError("a bug"), "engine_error", "RuntimeError: a bug"),
        (torch.OutOfMemoryError("no room"), "not_enough_memory", "out of memory: no room"),
        (MemoryError(), "not_enough_memory", "out of memory"),
    ],
)
def test_an_error_ends_the_job_and_not_the_worker(error, code, message):
    runner = Runner(error=error)
    runner.runner.start(job())
    ended = runner.run_idle()[-1]
    assert (ended.status, ended.error.code) == ("failed", code)
    assert message in ended.error.message
    assert runner.trainers[0].is_closed and not runner.runner.is_running


def test_an_error_before_the_first_slice_fails_the_job():
    runner = Runner(nonsense=1)
    runner.runner.start(job())
    (ended,) = runner.run_idle()
    assert ended.status == "failed" and "nonsense" in ended.error.message


def test_a_lost_device_is_not_the_jobs_failure():
    runner = Runner(error=torch.AcceleratorError("the device is lost"))
    runner.runner.start(job())
    with pytest.raises(torch.AcceleratorError):
        runner.run_idle()


def test_a_trainer_that_waits_for_the_engine_is_left_alone():
    runner = Runner()
    runner.runner.start(job())
    runner.trainers[0].is_waiting = True
    assert runner.runner.is_running and not runner.runner.has_work
    assert runner.runner.advance(has_streams=True) == []
    assert runner.runner.advance(has_streams=False) == []
    runner.trainers[0].is_waiting = False
    assert runner.run_idle()[-1].status == "succeeded"


def test_streams_do_not_wait_for_what_a_thread_does():
    gate = threading.Event()

    class Preparing(ScriptedTrainer):
        def run(self):
            yield from in_thread(lambda: gate.wait(60))
            yield from super().run()

    runner = Runner(trainer_class=Preparing)  # its clock stands: slices cost nothing
    runner.runner.start(job())
    for _ in range(3):
        assert runner.runner.advance(has_streams=True) == []
    gate.set()
    assert runner.run_idle()[-1].status == "succeeded"


def test_closing_abandons_the_job_without_a_word():
    runner = Runner()
    runner.runner.start(job())
    runner.runner.advance(has_streams=False)
    runner.runner.close()
    assert runner.trainers[0].is_closed and not runner.runner.is_running
    assert runner.runner.advance(has_streams=False) == []


def publish(runner: Runner, path: str) -> float | None:
    """The value of the weights that the pool's loader finds; None where it reads the disk."""
    command = LoadAdapter(command_id=1, ref=REF, from_training=path)
    runner.runner.publish(command)
    found = runner.source(REF)
    if found is None:
        return None
    (module,) = found.modules.values()
    return module.b[0, 0].item()


def test_the_newest_checkpoint_is_published_from_memory_and_older_ones_from_disk():
    runner = Runner(num_steps=3)
    runner.runner.start(job())
    events = runner.run_idle()
    paths = [event.path for event in events if isinstance(event, TrainingCheckpoint)]
    assert publish(runner, paths[-1]) == 3.0
    assert runner.read == []
    assert publish(runner, paths[0]) is None
    assert runner.read == [REF]


def test_weights_for_one_load_are_read_from_disk_when_loaded_again():
    runner = Runner(num_steps=1)
    runner.runner.start(job())
    events = runner.run_idle()
    assert publish(runner, events[-2].path) == 1.0
    runner.source(REF)
    assert runner.read == [REF]


def test_a_single_long_slice_is_not_worth_a_note():
    runner = Runner(num_steps=200, forward_s=0.01, backward_s=0.01)
    runner.runner.start(job())
    runner.runner.advance(has_streams=True)
    runner.trainers[0].forward_s = 1.0
    events = runner.runner.advance(has_streams=True)
    runner.trainers[0].forward_s = 0.01
    for _ in range(100):
        events += runner.runner.advance(has_streams=True)
    assert not [event for event in events if isinstance(event, TrainingNote)]
    assert len([event for event in events if isinstance(event, TrainingProgress)]) > 100
