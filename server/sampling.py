"""From a request's parameters to the engine's SamplingParams: defaults, clamps, seeds, grammars."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from engine.api import EngineInfo, GrammarSpec, SamplingParams
from engine.errors import ContextLengthExceeded
from server.errors import bad_request
from server.message_schemas import StructuredOutputs
from server.schemas import GenerationRequest
from server.tokenizer import Tokenizer
from server.tools import plan_response_format

T = TypeVar("T")
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for max_tokens of /v1/completions."""


def check_text(text: str, tokenizer: Tokenizer, info: EngineInfo, param: str) -> None:
    """Refuse a text that cannot fit before it is tokenised, which takes 0.6 s and 300 MB per MB.

    The factor of two is for tokenizers that shorten a text first (runs of spaces, NFKC).

    Raises:
        ApiError: 400, context_length_exceeded.
    """
    longest = tokenizer.max_token_bytes
    if longest is not None and len(text) > 2 * longest * info.max_model_len:
        raise bad_request(
            f"The prompt has {len(text)} characters, which cannot fit: this model holds "
            f"{info.max_model_len} tokens. Shorten the prompt.",
            param,
            "context_length_exceeded",
        )


def check_prompt(token_ids: list[int], info: EngineInfo, param: str) -> None:
    """Refuse a prompt that is empty, holds ids the model has not, or leaves no room for a token.

    Raises:
        ContextLengthExceeded, ApiError: as said.
    """
    if not token_ids:
        raise bad_request(f"{param}: expected at least one token, got an empty prompt", param)
    largest = max(token_ids)
    if largest >= info.vocab_size:
        raise bad_request(
            f"{param}: token id {largest} is not in the vocabulary of {info.vocab_size}", param
        )
    if len(token_ids) >= info.max_model_len:
        error = ContextLengthExceeded(len(token_ids), 1, info.max_model_len)
        error.param = param
        raise error


def clamp_max_tokens(asked: int | None, num_prompt_tokens: int, info: EngineInfo) -> int:
    """max_tokens is an upper limit: where less fits, the answer ends earlier with reason
    "length"."""
    room = info.max_model_len - num_prompt_tokens
    return room if asked is None else min(asked, room)


def sampling_params(
    body: GenerationRequest,
    *,
    max_tokens: int,
    asked_max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    grammar: GrammarSpec | None,
    info: EngineInfo,
) -> SamplingParams:
    """What the engine is told, for the first choice; `with_seed` makes the others.

    Raises:
        ApiError: values that contradict each other or the vocabulary.
    """
    min_tokens = body.min_tokens or 0
    if asked_max_tokens is not None and min_tokens > asked_max_tokens:
        raise bad_request(
            f"min_tokens: expected at most max_tokens ({asked_max_tokens}), got {min_tokens}",
            "min_tokens",
        )
    bias = tuple((int(token_id), amount) for token_id, amount in (body.logit_bias or {}).items())
    for name, ids in (
        ("logit_bias", [i for i, _ in bias]),
        ("stop_token_ids", body.stop_token_ids),
    ):
        outside = [i for i in ids or () if i >= info.vocab_size]
        if outside:
            raise bad_request(
                f"{name}: token id {outside[0]} is not in the vocabulary of {info.vocab_size}", name
            )
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(min_tokens, max_tokens),
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(_or(body.top_k, 0), 0),
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=bias,
        seed=body.seed,
        stop_token_ids=tuple(dict.fromkeys(body.stop_token_ids or ())),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )


def choice_seed(seed: int | None, index: int) -> int | None:
    """Choice i of a request with a seed is drawn with seed + i, wrapped into 63 bits."""
    return None if seed is None else (seed + index) & (2**63 - 1)


def structure_grammar(structure: StructuredOutputs | None, name: str) -> GrammarSpec | None:
    """vLLM's structured_outputs as a grammar; `name` is the parameter that held it.

    Raises:
        ApiError: json is a text that is no JSON object.
    """
    if structure is None:
        return None
    if structure.regex is not None:
        return GrammarSpec(kind="regex", source=structure.regex)
    if structure.grammar is not None:
        return GrammarSpec(kind="lark", source=structure.grammar)
    if structure.choice is not None:
        options = " | ".join(json.dumps(option) for option in dict.fromkeys(structure.choice))
        return GrammarSpec(kind="lark", source=f"start: {options}")
    schema: Any = structure.json_
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise bad_request(f"{name}: not valid JSON: {error}", name) from error
    wrapped = {
        "type": "json_schema",
        "json_schema": {"name": "structured_outputs", "schema": schema},
    }
    return plan_response_format(wrapped)


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
