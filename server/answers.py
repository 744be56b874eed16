"""Pieces of generated text as OpenAI's JSON: log-probabilities, usage, and the running totals of a
request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.api import TokenLogprobs
from server.generation import Piece, TokenInfo
from server.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0
"""JSON has no infinity; vLLM writes this number too."""


@dataclass(slots=True, kw_only=True)
class Usage:
    """Tokens of one HTTP request, over all its sequences."""

    num_prompt_tokens: int
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0

    def add(self, piece: Piece, num_choices: int) -> None:
        self.num_completion_tokens += piece.num_tokens
        if piece.index % num_choices == 0:  # the prompt is counted once, whatever n is
            self.num_cached_tokens += piece.num_cached_tokens

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


def finite(logprob: float) -> float:
    """A log-probability that JSON can say."""
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB


def chat_logprobs(tokens: Sequence[TokenInfo], tokenizer: Tokenizer) -> dict[str, Any]:
    """The chat form: one entry per token with its bytes, so that split characters can be put
    together."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        piece = tokenizer.piece(token_id)
        return {
            "token": piece.decode("utf-8", "replace"),
            "logprob": finite(logprob),
            "bytes": list(piece),
        }

    content = [
        entry(token.logprobs.token_id, token.logprobs.logprob)
        | {"top_logprobs": [entry(*top) for top in token.logprobs.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


@dataclass(slots=True)
class LegacyLogprobs:
    """The completions form: four parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    @classmethod
    def empty(cls) -> LegacyLogprobs:
        return cls([], [], [], [])

    def add(self, tokens: Sequence[TokenInfo], tokenizer: Tokenizer, start: int) -> None:
        """Tokens of the answer; `start` is where the answer begins in the choice's text."""
        for token in tokens:
            self.add_one(token.logprobs, tokenizer, start + token.offset)

    def add_one(self, token: TokenLogprobs, tokenizer: Tokenizer, offset: int) -> None:
        self.tokens.append(_name(token.token_id, tokenizer))
        self.token_logprobs.append(finite(token.logprob))
        self.top_logprobs.append(_top(token, tokenizer))
        self.text_offset.append(offset)

    def add_first(self, token_id: int, tokenizer: Tokenizer) -> None:
        """The first token of a prompt, which nothing predicts."""
        self.tokens.append(_name(token_id, tokenizer))
        self.token_logprobs.append(None)
        self.top_logprobs.append(None)
        self.text_offset.append(0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }


def _top(token: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, float]:
    """Text -> log-probability, the chosen token included; of tokens that look alike the
    likeliest."""
    entries: dict[str, float] = {}
    for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
        name = _name(token_id, tokenizer)
        entries[name] = max(finite(logprob), entries.get(name, -math.inf))
    return entries


def _name(token_id: int, tokenizer: Tokenizer) -> str:
    """A token's text; bytes that are no character as OpenAI writes them."""
    piece = tokenizer.piece(token_id)
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
