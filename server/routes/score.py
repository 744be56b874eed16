"""POST /v1/score and /v1/rewards: what a reward adapter's score head says of texts, of
conversations, or of question and answer.

The bodies are vLLM's: pairs for /score, one input for /pooling, which are served as well. Beyond
vLLM, /v1/score takes an input, too, and an input may hold several conversations.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Depends, Request
from pydantic import Field, model_validator
from starlette.responses import Response

from server.errors import json_response
from server.message_schemas import Body as RequestBody
from server.message_schemas import Message, Priority, Scale, Text, TokenId, only
from server.sampling import check_prompt
from server.scoring import conversation_tokens, lease_reward_adapter, score_prompts, text_tokens
from server.state import Lease, ServerState, awake_body_of, state_of
from server.streaming import until_gone

router = APIRouter()
PAIRS = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
"""vLLM's names for what is asked and what answers it."""
Input = (
    Text
    | list[Text]
    | list[Message]
    | list[TokenId]
    | list[list[TokenId]]
    | list[Annotated[list[Message], Field(min_length=1)]]
)
Texts = Text | Annotated[list[Text], Field(min_length=1)]
NO_TRUNCATION = "texts are scored whole: the end of one is what its score depends on"


class RewardsRequest(RequestBody):
    model: str
    input: Input | None = None
    messages: list[Message] | None = None
    use_activation: bool | None = None
    """Map scores into 0..1 by the logistic function. vLLM does by default; Herd gives the head's
    own numbers, whose differences are what reward training has learnt."""
    task: Literal["classify", "score", "reward"] | None = None
    encoding_format: Annotated[Any, only("float", reason="scores are JSON numbers")] = None
    truncate_prompt_tokens: Annotated[Any, only(reason=NO_TRUNCATION)] = None
    lora_scale: Scale | None = None
    priority: Priority | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    user: Text | None = None

    @model_validator(mode="after")
    def _checked(self) -> Self:
        self.check_input()
        return self

    def check_input(self) -> None:
        """Exactly one way of giving what is to be scored.

        Raises:
            ValueError: none or both are used, or the list is empty.
        """
        if (self.input is None) == (self.messages is None):
            raise ValueError("input: expected either input or messages")
        if [] in (self.input, self.messages):
            raise ValueError("input: expected at least one text or message, got an empty list")

    def entries(self) -> list[str | list[int] | list[Message]]:
        """What gets a score each: a text, token ids, or a conversation."""
        given: Any = self.messages if self.input is None else self.input
        if isinstance(given, str) or isinstance(given[0], int | Message):
            return [given]
        return list(given)


class ScoreRequest(RewardsRequest):
    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None

    def check_input(self) -> None:
        """The same, pairs being a third way; a single question goes with every answer.

        Raises:
            ValueError: see above; or the two sides of the pairs do not go together.
        """
        sides = {name for pair in PAIRS for name in pair if getattr(self, name) is not None}
        pair = next((pair for pair in PAIRS if sides == set(pair)), None)
        if not sides:
            super().check_input()
            return
        if pair is None or self.input is not None or self.messages is not None:
            raise ValueError(
                "input: expected input, messages, or one pair of " + ", ".join(map("+".join, PAIRS))
            )
        first, second = (len(side) for side in self._sides())
        if first not in (1, second):
            raise ValueError(
                f"{pair[0]}: expected 1 entry or as many as {pair[1]} has ({second}), got {first}"
            )

    def entries(self) -> list[str | list[int] | list[Message]]:
        first, second = self._sides()
        if not second:
            return super().entries()
        return [
            [Message(role="user", content=asked), Message(role="assistant", content=answer)]
            for asked, answer in zip(first * (len(second) // len(first)), second, strict=True)
        ]

    def _sides(self) -> tuple[list[str], list[str]]:
        """Both sides of the pairs as lists; empty where there are none."""
        for names in PAIRS:
            first, second = (getattr(self, name) for name in names)
            if first is not None and second is not None:
                return _as_list(first), _as_list(second)
        return [], []


def _as_list(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


ScoreBody = Annotated[ScoreRequest, Depends(awake_body_of(ScoreRequest))]
RewardsBody = Annotated[RewardsRequest, Depends(awake_body_of(RewardsRequest))]


@router.post("/score")
@router.post("/v1/score")
async def score(request: Request, body: ScoreBody) -> Response:
    """One score per text, conversation, or pair of question and answer."""
    return await _answer(
        request, body, lambda index, value: {"index": index, "object": "score", "score": value}
    )


@router.post("/pooling")
@router.post("/v1/rewards")
async def rewards(request: Request, body: RewardsBody) -> Response:
    """The same numbers in the shape of vLLM's pooling."""
    return await _answer(
        request, body, lambda index, value: {"index": index, "object": "pooling", "data": [value]}
    )


async def _answer(
    request: Request, body: RewardsRequest, entry: Callable[[int, float], dict[str, Any]]
) -> Response:
    state = state_of(request)
    entries = body.entries()
    lease = lease_reward_adapter(state, body.model, len(entries))
    try:
        prompts = await asyncio.to_thread(_prompts, entries, body, state, lease)
        work = score_prompts(
            state, lease, prompts, lora_scale=body.lora_scale, priority=body.priority
        )
        scores = await until_gone(request, work)
        if body.use_activation:
            scores = [_logistic(value) for value in scores]
        num_tokens = sum(map(len, prompts))
        answer = {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": state.fingerprint(lease.ref),
            "data": [entry(index, value) for index, value in enumerate(scores)],
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
        return json_response(answer, headers=lease.headers())
    finally:
        lease.release()


def _prompts(
    entries: Sequence[str | list[int] | list[Message]],
    body: RewardsRequest,
    state: ServerState,
    lease: Lease,
) -> list[list[int]]:
    prompts = []
    for entry in entries:
        messages = [part for part in entry if isinstance(part, Message)]
        token_ids = [part for part in entry if isinstance(part, int)]
        if isinstance(entry, str):
            token_ids = text_tokens(entry, state)
        elif messages:
            kwargs = body.chat_template_kwargs
            token_ids = conversation_tokens(messages, state, lease, template_kwargs=kwargs)
        check_prompt(token_ids, state.info(), "input")
        prompts.append(token_ids)
    return prompts


def _logistic(value: float) -> float:
    """1 / (1 + exp(-value)) that never overflows."""
    return 0.5 * (1.0 + math.tanh(0.5 * value))
