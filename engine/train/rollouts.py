"""grpo's answers: drawn by the engine that serves, scored by the reward adapter on the same base.

The policy is put into the pool of adapters as a new generation for each batch of prompts; its
answers and their scores are requests like any other, of the lowest priority, whose deltas come here
instead of going to a client. While they run the trainer waits. Beside clients they have steps of
their own, which count as the trainer's slices.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from engine.api import (
    AdapterRef,
    ErrorInfo,
    GenerateRequest,
    RequestDelta,
    SamplingParams,
    StepOutput,
)
from engine.errors import EngineError, RequestError
from engine.lora import LoraWeights
from engine.lora_source import LoraSource
from engine.sequence import BACKGROUND
from engine.train.batches import Sample
from engine.train.config import TrainConfig
from engine.train.noise import noise_seed

if TYPE_CHECKING:
    from engine.engine import Engine

STEP_TOKENS = 256
"""In a step of our own at most, without clients: one that comes then waits for no long prompts."""
POLICY_UID = -1
"""Of the policies in the pool; published adapters have positive ones."""
PREFIX = "rollout/"
"""Of the ids of requests that are the trainer's own."""
STD_EPSILON = 1e-4
"""Added to a group's standard deviation, as trl does: answers may all be as good."""


@dataclass(slots=True)
class _Rollout:
    """One answer to one prompt, as far as it has come."""

    prompt: tuple[int, ...]
    token_ids: list[int] = field(default_factory=list)
    """With the token that ended it."""
    is_truncated: bool = False
    """It was still going on at max_completion_tokens."""
    reward: float | None = None


@dataclass(slots=True, eq=False)
class RolloutBatch:
    """All answers to one batch of prompts."""

    samples: list[Sample]
    """num_generations per prompt, in the prompts' order, with advantages."""
    metrics: dict[str, tuple[float, float]]
    """(sum, count) by name: reward, reward_std within the groups, completion_tokens, truncated."""


class EngineRollouts:
    """The trainer's own requests to the engine. One thread calls everything."""

    def __init__(self, engine: Engine, source: LoraSource) -> None:
        """
        Args:
            engine: draws and scores.
            source: where the pool's loader looks for a policy.
        """
        self._engine = engine
        self._source = source
        # Half of the places, so that a client never waits for an answer of ours to end.
        self._max_open = max(1, engine.scheduler.config.max_num_seqs // 2)
        self._generations = itertools.count(1)
        self._numbers = itertools.count(1)
        self._queued: deque[tuple[_Rollout, GenerateRequest]] = deque()
        self._open: dict[str, _Rollout] = {}
        self._reward_adapter: AdapterRef | None = None
        self._error: ErrorInfo | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether answers or scores are still to come."""
        return bool(self._open or self._queued) and self._error is None

    def draw(
        self,
        policy: LoraWeights,
        prompts: Sequence[Sequence[int]],
        *,
        config: TrainConfig,
        reward_adapter: AdapterRef,
        step: int,
        is_evaluation: bool = False,
    ) -> Generator[None, None, RolloutBatch]:
        """Have each prompt answered num_generations times and every answer scored.

        Yields while it waits; is_waiting tells when going on makes sense. The same arguments give
        the same answers.

        Args:
            policy:         what answers.
            prompts:        token ids.
            config:         resolved.
            reward_adapter: what scores.
            step:           of the run; a policy answers the same prompt otherwise in another step.
            is_evaluation:  one answer for each prompt, and other ones than the step's own.

        Raises:
            EngineError: an answer could not be drawn or scored.
        """
        assert not self._open and not self._queued, "answers are being drawn already"
        num_generations = 1 if is_evaluation else config.num_generations
        ref = self._publish(policy)
        self._reward_adapter, self._error = reward_adapter, None
        purpose = "evaluation" if is_evaluation else "training"
        groups = [
            [_Rollout(tuple(map(int, prompt))) for _ in range(num_generations)]
            for prompt in prompts
        ]
        try:
            for index, group in enumerate(groups):
                for number, rollout in enumerate(group):
                    seed = noise_seed(config.seed, purpose, step, index, number)
                    self._queue(rollout, rollout.prompt, self._sampling(rollout, config, seed), ref)
            self._submit()
            while self.is_waiting:
                yield
            if self._error is not None:
                message = f"An answer could not be drawn or scored: {self._error.message}"
                raise EngineError(message)
        finally:
            self._abandon()
            if ref is not None:
                self._engine.adapters.drop(ref)
                self._source.forget(ref)
        return _batch(groups)

    @property
    def are_beside_clients(self) -> bool:
        """Whether clients have requests while we have some."""
        return 0 < len(self._open) < self._engine.num_requests

    def step(self, *, may_run_ahead: bool = True) -> StepOutput:
        """The next step of the engine: of the clients' tokens alone where there are any. Returns
        what is for the clients.

        Args:
            may_run_ahead: whether the device may still run it when this returns.
        """
        if self.are_beside_clients:
            return self._take(self._engine.step("clients"))
        max_num_tokens = STEP_TOKENS if self._open else None
        return self._take(self._engine.step("all", max_num_tokens, may_run_ahead=may_run_ahead))

    def own_step(self, max_num_tokens: int) -> StepOutput:
        """A step of our tokens alone, so many at most; it may bring something for a client."""
        return self._take(self._engine.step("background", max_num_tokens))

    def _take(self, output: StepOutput) -> StepOutput:
        """Keep what a step has to say about our requests; what is left is for the clients."""
        if not any(delta.request_id.startswith(PREFIX) for delta in output.deltas):
            return output
        clients = []
        for delta in output.deltas:
            if delta.request_id.startswith(PREFIX):
                self._take_own(delta)
            else:
                clients.append(delta)
        self._submit()
        return StepOutput(deltas=tuple(clients), stats=output.stats)

    def _take_own(self, delta: RequestDelta) -> None:
        rollout = self._open.get(delta.request_id)
        if rollout is None:
            return  # abandoned
        rollout.token_ids += delta.token_ids
        if delta.finish_reason is None:
            return
        del self._open[delta.request_id]
        if delta.error is not None:
            self._error = delta.error
        elif delta.score is not None:
            rollout.reward = delta.score
        else:
            rollout.is_truncated = delta.finish_reason == "length"
            tokens = (*rollout.prompt, *rollout.token_ids)
            params = SamplingParams(max_tokens=1)
            self._queue(rollout, tokens, params, self._reward_adapter, task="score")

    def _submit(self) -> None:
        """Hand over as many requests as may be open."""
        while self._queued and len(self._open) < self._max_open and self._error is None:
            rollout, request = self._queued.popleft()
            self._open[request.request_id] = rollout
            self._engine.add(request)

    def _abandon(self) -> None:
        """Cancel what is open; its last deltas are dropped when they come."""
        request_ids = list(self._open)
        self._queued.clear()
        self._open.clear()
        for request_id in request_ids:
            self._engine.cancel(request_id)

    def _publish(self, policy: LoraWeights) -> AdapterRef | None:
        """Have the pool's loader find the policy; None: it is the base as long as b is zero."""
        if not any(bool(module.b.any()) for module in policy.modules.values()):
            return None
        generation = next(self._generations)
        ref = AdapterRef(uid=POLICY_UID, generation=generation, name="policy in training", path="")
        self._source.put(ref, policy, keep=True)
        return ref

    def _sampling(self, rollout: _Rollout, config: TrainConfig, seed: int) -> SamplingParams:
        room = self._engine.max_len - len(rollout.prompt)
        if room < 1:
            raise RequestError(
                f"A prompt has {len(rollout.prompt)} tokens and the engine holds "
                f"{self._engine.max_len}: there is no room for an answer. Leave it out.",
                param="max_seq_len",
            )
        return SamplingParams(
            max_tokens=min(config.max_completion_tokens, room),
            temperature=config.temperature,
            seed=seed,
        )

    def _queue(
        self,
        rollout: _Rollout,
        tokens: tuple[int, ...],
        params: SamplingParams,
        adapter: AdapterRef | None,
        task: Literal["generate", "score"] = "generate",
    ) -> None:
        request = GenerateRequest(
            request_id=f"{PREFIX}{next(self._numbers)}",
            prompt_token_ids=tokens,
            params=params,
            adapter=adapter,
            priority=BACKGROUND,
            task=task,
        )
        self._queued.append((rollout, request))


def _batch(groups: list[list[_Rollout]]) -> RolloutBatch:
    """Advantages within each prompt's group, and what there is to report."""
    rollouts = [rollout for group in groups for rollout in group]
    rewards = torch.tensor(
        [[rollout.reward for rollout in group] for group in groups], dtype=torch.float64
    )  # [num_prompts, num_generations]
    has_groups = rewards.shape[1] > 1
    spread = rewards.std(dim=1) if has_groups else torch.zeros(len(rewards))
    advantages = (rewards - rewards.mean(dim=1, keepdim=True)) / (spread[:, None] + STD_EPSILON)
    samples = [
        Sample((_sequence(rollout),), advantage=advantage)
        for rollout, advantage in zip(rollouts, advantages.flatten().tolist(), strict=True)
    ]
    count = float(len(rollouts))
    metrics = {
        "reward": (rewards.sum().item(), count),
        "completion_tokens": (float(sum(len(rollout.token_ids) for rollout in rollouts)), count),
        "truncated": (float(sum(rollout.is_truncated for rollout in rollouts)), count),
    }
    if has_groups:
        metrics["reward_std"] = (spread.sum().item(), float(len(groups)))
    return RolloutBatch(samples, metrics)


def _sequence(rollout: _Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, loss_weights): prompt and answer, of which the answer is learnt from."""
    ids = torch.tensor([*rollout.prompt, *rollout.token_ids], dtype=torch.int32)
    weights = torch.ones(ids.numel())
    weights[: len(rollout.prompt)] = 0.0
    return ids, weights
