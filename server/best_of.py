"""best_of: several candidates are drawn, the preferred ones are returned.

Preferred is what the model itself finds likeliest per token, as in OpenAI's API; or, where the body
names a "reward_adapter", what that one scores highest, on the same base.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from server.message_schemas import Message
from server.schemas import ChatCompletionRequest, GenerationRequest
from server.scoring import (
    completion_tokens,
    conversation_tokens,
    lease_reward_adapter,
    score_prompts,
)
from server.state import Lease, ServerState


@contextmanager
def judge_of(body: GenerationRequest, state: ServerState) -> Iterator[Judge | None]:
    """The reward adapter that the body names, its generation held meanwhile; else None.

    Raises:
        ApiError: it is unknown, or has no score head.
    """
    if body.reward_adapter is None:
        yield None
        return
    # The candidates' places in the queue are free again when they are scored.
    lease = lease_reward_adapter(state, body.reward_adapter, 0, param="reward_adapter")
    try:
        yield Judge(state, lease, body.priority)
    finally:
        lease.release()


@dataclass(frozen=True, slots=True)
class Judge:
    """A reward adapter that scores candidates."""

    state: ServerState
    lease: Lease
    priority: int | None

    async def score_answers(self, body: ChatCompletionRequest, texts: Sequence[str]) -> list[float]:
        """One score per answer to a conversation.

        Raises:
            ApiError: the adapter has no chat template, or the engine failed.
        """
        messages, begun = list(body.messages), ""
        if body.continue_final_message:
            begun = messages.pop().text()
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]

        def tokens(text: str) -> list[int]:
            answer = Message(role="assistant", content=begun + text)
            return conversation_tokens([*messages, answer], self.state, self.lease, tools=tools)

        return await self._score([functools.partial(tokens, text) for text in texts])

    async def score_completions(self, texts: Sequence[tuple[str, str]]) -> list[float]:
        """One score per prompt and completion.

        Raises:
            ApiError: the engine failed.
        """
        return await self._score(
            [functools.partial(completion_tokens, *text, self.state) for text in texts]
        )

    async def _score(self, candidates: Sequence[Callable[[], list[int]]]) -> list[float]:
        # A candidate may fill the model's whole length; with the end token it must not.
        longest = self.state.info().max_model_len - 1
        prompts = await asyncio.to_thread(lambda: [tokens()[:longest] for tokens in candidates])
        return await score_prompts(self.state, self.lease, prompts, priority=self.priority)
