"""Answers drawn and scored by a fake engine: what comes back, who waits, and what streams feel."""

from __future__ import annotations

import pytest
import torch

from engine.api import RequestDelta
from engine.errors import EngineError
from engine.lora_source import LoraSource
from engine.train.config import TrainConfig
from engine.train.rollouts import POLICY_UID, EngineRollouts
from tests.engine.fakes import FakeEngine, adapter
from tests.engine.train.fake_trainers import FakeClock, Runner, job, weights

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
REWARD = adapter(7, name="reward")
CONFIG = TrainConfig(
    method="grpo", num_generations=4, max_completion_tokens=6, temperature=1.0, seed=1
)


def make(fake: FakeEngine) -> EngineRollouts:
    return EngineRollouts(fake.engine, LoraSource(lambda ref: pytest.fail(f"{ref} was read")))


def draw(rollouts: EngineRollouts, policy=None, **options):
    """A draw's generator; settings by name."""
    arguments = {"config": CONFIG, "reward_adapter": REWARD, "step": 3, **options}
    return rollouts.draw(policy or weights(1.0), PROMPTS, **arguments)


def finish(fake: FakeEngine, rollouts: EngineRollouts, slices) -> tuple:
    """(the draw's result, deltas that went to clients)."""
    seen: list[RequestDelta] = []
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return end.value, seen
        while rollouts.is_waiting:
            seen += rollouts.step().deltas
            if rollouts.are_beside_clients:
                seen += rollouts.own_step(3).deltas
            fake.engine.check_integrity()


def ids_of(batch) -> list[list[int]]:
    return [sample.sequences[0][0].tolist() for sample in batch.samples]


def test_each_prompt_gets_its_answers_scores_and_advantages():
    fake = FakeEngine()
    rollouts = make(fake)
    batch, seen = finish(fake, rollouts, draw(rollouts))
    assert not seen and not fake.engine.has_work()
    assert len(batch.samples) == 12
    for index, sample in enumerate(batch.samples):
        ((ids, loss_weights),) = sample.sequences
        prompt = PROMPTS[index // 4]
        assert ids[: len(prompt)].tolist() == prompt
        assert 1 <= len(ids) - len(prompt) <= 6
        assert loss_weights.tolist() == [0.0] * len(prompt) + [1.0] * (len(ids) - len(prompt))
    advantages = torch.tensor([sample.advantage for sample in batch.samples]).view(3, 4)
    torch.testing.assert_close(advantages.sum(dim=1), torch.zeros(3), atol=1e-4, rtol=0.0)
    torch.testing.assert_close(advantages.std(dim=1), torch.ones(3), atol=1e-2, rtol=0.0)
    assert batch.metrics["reward"][1] == 12 and batch.metrics["reward_std"][1] == 3
    assert batch.metrics["truncated"][0] <= 12
    assert [ref.uid for ref in fake.pool.unloaded] == [POLICY_UID]


def test_answers_depend_on_seed_and_step_and_not_on_who_else_runs():
    fresh = weights(0.0)  # a policy that is still the base: no adapter is published
    quiet = FakeEngine()
    rollouts = make(quiet)
    alone, _ = finish(quiet, rollouts, draw(rollouts, fresh, is_evaluation=True))
    again, _ = finish(quiet, rollouts, draw(rollouts, fresh, is_evaluation=True))
    later, _ = finish(quiet, rollouts, draw(rollouts, fresh, is_evaluation=True, step=4))
    assert ids_of(alone) == ids_of(again) != ids_of(later)
    assert len(alone.samples) == 3  # one answer for each prompt
    expected, _ = finish(quiet, rollouts, draw(rollouts, fresh))
    busy = FakeEngine(max_num_batched_tokens=16)
    rollouts = make(busy)
    busy.add("client", [1, 2, 3], max_tokens=40)
    found, seen = finish(busy, rollouts, draw(rollouts, fresh))
    assert ids_of(found) == ids_of(expected)
    assert {delta.request_id for delta in seen} == {"client"}
    assert not quiet.pool.unloaded


def test_half_of_the_places_are_left_to_clients():
    fake = FakeEngine(max_num_seqs=4)
    rollouts = make(fake)
    slices = draw(rollouts)
    next(slices)
    for _ in range(10):
        rollouts.step()
        assert len(fake.engine.scheduler.running) <= 2
    slices.close()
    assert not fake.engine.scheduler.running


def test_what_is_abandoned_is_cancelled_and_its_last_words_are_dropped():
    fake = FakeEngine()
    rollouts = make(fake)
    slices = draw(rollouts)
    next(slices)
    rollouts.step()
    slices.close()
    assert not rollouts.is_waiting
    assert not rollouts.step().deltas and not fake.engine.has_work()
    finish(fake, rollouts, draw(rollouts))


def test_an_adapter_that_cannot_score_is_an_error():
    fake = FakeEngine()
    rollouts = make(fake)
    with pytest.raises(EngineError, match=r"could not be drawn or scored.*no score head"):
        finish(fake, rollouts, draw(rollouts, reward_adapter=adapter(8)))
    assert not rollouts.step().deltas and not fake.engine.has_work()


def test_a_prompt_that_leaves_no_room_is_an_error():
    fake = FakeEngine(max_model_len=4)
    rollouts = make(fake)
    with pytest.raises(EngineError, match="4 tokens and the engine holds 4"):
        next(draw(rollouts))
    assert not fake.engine.has_work()


def test_streams_wait_for_rollouts_no_longer_than_the_budget():
    """A token takes 4 ms here, whoever asks for it."""
    clock = FakeClock()
    fake = FakeEngine(max_num_seqs=16, num_blocks=200)
    call = fake.model.__class__.__call__

    class SlowModel(fake.model.__class__):
        def __call__(self, batch, kv_caches, lora):
            clock.now_s += 0.004 * len(batch.input_ids)
            return call(self, batch, kv_caches, lora)

    fake.model.__class__ = SlowModel
    runner = Runner(fake, clock=clock, max_stall_s=0.02)
    runner.runner.start(job())
    runner.trainers[0].is_waiting = True
    slices = draw(runner.rollouts)
    next(slices)
    fake.add("client", [1, 2, 3], max_tokens=60)
    stalls = []
    while runner.rollouts.are_beside_clients:
        assert runner.runner.step().stats.num_step_tokens
        before_s = clock.now_s
        said = runner.runner.advance(has_streams=True)
        assert not said
        stalls.append(clock.now_s - before_s)
    assert max(stalls[8:]) <= 0.02 + 1e-9  # the first ones have to find out
    assert sum(stalls[8:]) / len(stalls[8:]) > 0.01
    slices.close()


def test_steps_that_cost_nothing_do_not_make_the_next_ones_larger_without_end():
    fake = FakeEngine(max_num_seqs=16, num_blocks=200)
    runner = Runner(fake)
    runner.runner.start(job())
    runner.trainers[0].is_waiting = True
    slices = draw(runner.rollouts)
    next(slices)
    fake.add("client", [1, 2, 3], max_tokens=60)
    while runner.rollouts.are_beside_clients:
        runner.runner.step()
        runner.runner.advance(has_streams=True)
    assert runner.runner._max_rollout_tokens <= 64
    slices.close()
