"""best_of: several candidates are drawn, the preferred ones are returned.

Preferred is what the model itself finds likeliest per token, as in OpenAI's API; or, where the body
names a "reward_adapter", what that one scores highest, on the same base.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from server.prompts import ChatJob
from server.schemas import ChatCompletionRequest, GenerationRequest
from server.scoring import conversation_tokens, lease_reward_adapter, score_prompts, text_tokens
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

    async def score_answers(
        self, body: ChatCompletionRequest, chat: ChatJob, texts: Sequence[str]
    ) -> list[float]:
        """One score per answer to a conversation.

        Raises:
            ApiError: the adapter has no chat template, or the engine failed.
        """
        tools = chat.plan.template_kwargs.get("tools")

        def tokens(text: str) -> list[int]:
            messages: list[dict[str, Any]] = list(chat.plan.messages)
            if body.continue_final_message:
                text = messages.pop()["content"] + text
            messages.append({"role": "assistant", "content": text})
            return conversation_tokens(messages, self.state, self.lease, tools=tools)

        return await self._score(tokens, texts)

    async def score_texts(self, texts: Sequence[str]) -> list[float]:
        """One score per text: a prompt with its completion.

        Raises:
            ApiError: the engine failed.
        """
        return await self._score(lambda text: text_tokens(text, self.state, "prompt"), texts)

    async def _score(self, tokens: Callable[[str], list[int]], texts: Sequence[str]) -> list[float]:
        # A candidate may fill the model's whole length; what its template puts behind it may not.
        longest = self.state.info().max_model_len - 1
        prompts = await asyncio.to_thread(lambda: [tokens(text)[:longest] for text in texts])
        return await score_prompts(self.state, self.lease, prompts, priority=self.priority)
