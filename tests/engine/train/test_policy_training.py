"""The trainer's side of grpo, with answers that a fake draws."""

import dataclasses

import pytest
import torch

from engine.api import AdapterRef, TrainingCheckpoint, TrainingProgress
from engine.errors import RequestError
from tests.engine.tiny_models import save_model
from tests.engine.train.training_jobs import (
    FakeRollouts,
    ended,
    load_base,
    make_job,
    make_trainer,
    metric,
    of,
    read_plain,
    run_job,
)

REWARD = AdapterRef(uid=1, generation=1, name="reward", path="")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_model(folder / "model", "llama")
    return load_base(folder / "model", folder / "cache")


def policy_job(folder, **settings):
    defaults = {
        "method": "grpo", "num_generations": 4, "max_completion_tokens": 8,
        "kl_coefficient": 0.1, "validation": True,
    }  # fmt: skip
    job = make_job(folder, kind="prompt", **{**defaults, **settings})
    return dataclasses.replace(job, reward_adapter=REWARD)


def test_a_policy_is_trained_on_its_answers_and_judged_by_their_reward(tmp_path, model):
    rollouts = FakeRollouts()
    events = run_job(policy_job(tmp_path / "job"), model, rollouts=rollouts)
    assert ended(events).status == "succeeded"
    progress = of(events, TrainingProgress)
    assert len(progress) == 6
    assert all(metric(event, "reward") < 0 for event in progress)
    assert rollouts.drawn == [
        (0, False), (1, False), (2, True), (2, False), (3, False), (4, True), (4, False),
        (5, False), (6, True),
    ]  # fmt: skip
    checkpoints = of(events, TrainingCheckpoint)
    best = max(checkpoints, key=lambda event: metric(event, "valid_reward"))
    assert best.is_best
    result = read_plain(tmp_path / "job" / "final")
    expected = read_plain(tmp_path / "job" / f"checkpoint-{best.step}")
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_policy_training_that_was_cut_off_ends_with_the_same_bits(tmp_path, model):
    run_job(policy_job(tmp_path / "whole"), model, rollouts=FakeRollouts())
    job = policy_job(tmp_path / "cut")
    for event in make_trainer(job, model, rollouts=FakeRollouts()).run():
        if isinstance(event, TrainingProgress) and event.step == 5:
            break
    assert run_job(job, model, rollouts=FakeRollouts())[0].step == 4
    whole, cut = (read_plain(tmp_path / name / "final") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_stopping_while_answers_are_drawn_abandons_them(tmp_path, model):
    rollouts = FakeRollouts(num_slices=10**9)
    trainer = make_trainer(policy_job(tmp_path / "job"), model, rollouts=rollouts)
    events = []
    for event in trainer.run():
        events.append(event)
        if rollouts.is_waiting and trainer.is_waiting:
            trainer.stop("cancelled")
            assert not trainer.is_waiting  # or nobody would let it find out
    assert events[-1].status == "cancelled"
    assert rollouts.was_closed


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(tmp_path, model):
    job = policy_job(tmp_path / "job", max_completion_tokens=60)
    with pytest.raises(RequestError, match="leave no room for an answer of 60 tokens within"):
        run_job(job, model, rollouts=FakeRollouts())
