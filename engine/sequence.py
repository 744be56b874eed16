"""The state of one request inside the engine.

A sequence is its prompt and the tokens generated so far. `num_computed_tokens` says how many of
them have keys and values in the cache; the rest are what the next steps must run. That one number
is all there is to prefill, chunked prefill, decoding (one token is missing) and recomputation after
a preemption (all are missing again).
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.api import AdapterRef, GenerateRequest, SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from engine.grammar import GrammarMatcher

BACKGROUND = 2**63
"""Priority of the trainer's own requests, below any client's."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One request while it lives; scheduler, block manager and sampler keep their parts here."""

    request: GenerateRequest
    arrival: int
    """Order of arrival in the engine; unique."""
    stop_token_ids: frozenset[int] = frozenset()
    """The tokens that end this text: the request's, and the model's eos unless it ignores them."""
    max_tokens: int = 0
    """The request's max_tokens, clamped to what the model and the cache hold."""
    seed: int = 0
    """The request's seed, or one drawn at random, below 2**63."""
    arrival_s: float = field(default_factory=time.perf_counter)

    token_ids: list[int] = field(default_factory=list)
    """Prompt and output."""
    output_token_ids: list[int] = field(default_factory=list)
    num_pending_tokens: int = 0
    """1 while a step that chooses the next token is in flight: it counts, and only the device knows
    it; see engine/in_flight.py."""
    num_computed_tokens: int = 0
    """With those that a step in flight computes."""
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hash of each full block of token_ids; stays valid, because tokens only grow."""
    num_committed_blocks: int = 0
    """How many blocks of block_table have been offered to the prefix cache."""
    lora_row: int = -1
    """Row of the LoRA pool while scheduled; -1: the base model, or not scheduled."""
    grammar: GrammarMatcher | None = None
    """Set before the sequence is first scheduled, when the request asks for a grammar."""
    sampler_state: Any = None
    """Owned by the sampler: whatever it keeps between the steps of one sequence."""

    draft_token_ids: list[int] = field(default_factory=list)
    """During a step: guesses that run behind the last token; see engine/speculation.py."""
    lookup: Any = None
    """Owned by engine/speculation.py: its index of this text."""

    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when the sequence was first scheduled."""
    first_scheduled_s: float | None = None
    has_sent_delta: bool = False
    has_ended: bool = False
    """Its final delta has been made; what a step in flight brings for it is thrown away."""
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    """One entry per computed prompt token, where the request asked for them."""

    @classmethod
    def from_request(
        cls, request: GenerateRequest, arrival: int, *, eos_token_ids: frozenset[int], max_len: int
    ) -> Sequence:
        """Start an accepted request; `max_len` is the longest prompt plus output, in tokens."""
        params = request.params
        stop = frozenset(params.stop_token_ids)
        return cls(
            request=request,
            arrival=arrival,
            stop_token_ids=stop if params.ignore_eos else stop | eos_token_ids,
            max_tokens=min(params.max_tokens, max_len - len(request.prompt_token_ids)),
            seed=secrets.randbits(63) if params.seed is None else params.seed % 2**63,
            token_ids=list(request.prompt_token_ids),
        )

    @property
    def is_background(self) -> bool:
        return self.request.priority >= BACKGROUND

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def adapter(self) -> AdapterRef | None:
        return self.request.adapter

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self.request.prompt_token_ids

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_missing_tokens(self) -> int:
        """Tokens whose keys and values are not in the cache yet; 1 while decoding."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def has_output(self) -> bool:
        """Whether a token has been generated, be it in flight."""
        return self.num_tokens > self.num_prompt_tokens

    @property
    def is_at_its_end(self) -> bool:
        """Whether the token in flight is the last one that it may have."""
        num_tokens = len(self.output_token_ids) + self.num_pending_tokens
        return self.num_pending_tokens > 0 and num_tokens >= self.max_tokens

    @property
    def order(self) -> tuple[int, int]:
        """Sorts sequences from the one to keep longest to the one to preempt first."""
        return (self.request.priority, self.arrival)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """True until the prompt's log-probabilities have been sent."""
        return self.request.params.prompt_logprobs is not None and not self.has_sent_delta

    def append(self, token_id: int) -> None:
        """Add one generated token."""
        self.token_ids.append(token_id)
        self.output_token_ids.append(token_id)

    def forget_computed(self) -> None:
        """Start over: all tokens must be run again. The tokens themselves stay."""
        self.num_computed_tokens = 0
        self.num_committed_blocks = 0
        if not self.has_sent_delta:
            self.prompt_logprobs.clear()
