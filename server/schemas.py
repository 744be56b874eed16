"""Bodies of /v1/chat/completions and /v1/completions: what is honoured and what is refused."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from server.message_schemas import (
    Body,
    Message,
    Priority,
    ResponseFormat,
    Scale,
    StructuredOutputs,
    Text,
    TokenId,
    Tool,
    check_continuation,
    only,
    unsupported,
)

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_LOGPROBS = 20
INT64 = 2**63 - 1
STRUCTURES = (
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
Stop = Annotated[Text, Field(min_length=1, max_length=1000)]


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Annotated[
        Any, only(False, reason="padding against traffic analysis is not done")
    ] = None


# --- what chat and completions share ---


class GenerationRequest(Body):
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    reward_adapter: Text | None = None
    """Chooses among best_of candidates; without it the model's own log-probability does."""
    min_tokens: Annotated[int, Field(ge=0, le=INT64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128)] | None = None
    ignore_eos: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT64)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^\d{1,9}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=1024),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-INT64 - 1, le=INT64)] | None = None
    user: Text | None = None
    metadata: dict[str, str] | None = None
    priority: Priority | None = None
    lora_scale: Scale | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | Text | None = None
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], Field(min_length=1)] | None = None
    guided_grammar: Text | None = None
    # They ask nothing of us.
    service_tier: Annotated[
        Any, only("auto", "default", reason="there is one class of service")
    ] = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed with stream=true")
        num_choices = self.n or 1
        if self.best_of is not None:
            if self.best_of < num_choices:
                raise ValueError(
                    f"best_of: expected at least n ({num_choices}), got {self.best_of}"
                )
            if self.stream and self.best_of > num_choices:
                raise ValueError("best_of: cannot be streamed, the best is known at the end only")
        if self.reward_adapter is not None:
            if self.best_of is None:
                raise ValueError("reward_adapter: only allowed with best_of, from which it chooses")
            if self.stream:
                raise ValueError(
                    "reward_adapter: cannot be streamed, the best is known at the end only"
                )
        given = [name for name in STRUCTURES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: cannot be combined with {given[0]}")
        return self

    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(dict.fromkeys(self.stop))

    def structure_name(self) -> str:
        """Which of vLLM's parameters asks for structured output, for error messages."""
        given = (name for name in STRUCTURES if getattr(self, name) is not None)
        return next(given, "structured_outputs")

    def structure(self) -> StructuredOutputs | None:
        """vLLM's older guided_* parameters and structured_outputs as one."""
        if self.structured_outputs is not None:
            return self.structured_outputs
        parts = {
            "json": self.guided_json,
            "regex": self.guided_regex,
            "choice": self.guided_choice,
            "grammar": self.guided_grammar,
        }
        given = {name: value for name, value in parts.items() if value is not None}
        return StructuredOutputs.model_validate(given) if given else None


class ChatCompletionRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Text | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    store: Annotated[Any, only(False, reason="answers are not stored")] = None
    modalities: Annotated[Any, only(["text"], reason="the model writes text only")] = None
    audio: Annotated[
        Any, unsupported("audio is not supported: the model reads and writes text only")
    ] = None
    functions: Annotated[
        Any, unsupported("functions is deprecated and not supported; use tools")
    ] = None
    function_call: Annotated[
        Any, unsupported("function_call is deprecated and not supported; use tool_choice")
    ] = None
    prediction: Annotated[
        Any, unsupported("predicted outputs are not supported; leave the parameter out")
    ] = None
    web_search_options: Annotated[
        Any, unsupported("web search is not supported: the server calls no outside host")
    ] = None
    reasoning_effort: Annotated[
        Any,
        only(
            "none",
            reason="the server cannot set a model's reasoning effort; its chat template may "
            "(chat_template_kwargs)",
        ),
    ] = None
    verbosity: Annotated[
        Any, only("medium", reason="the server cannot set a model's verbosity")
    ] = None
    moderation: Annotated[
        Any, unsupported("moderation is not supported; leave the parameter out")
    ] = None

    @model_validator(mode="after")
    def _consistent_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only allowed with logprobs=true")
        check_continuation(self.messages, self.continue_final_message, self.add_generation_prompt)
        if self.parallel_tool_calls is not None and not self.tools:
            raise ValueError("parallel_tool_calls: only allowed with tools")
        return self


class CompletionRequest(GenerationRequest):
    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(ge=0, le=INT64)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    response_format: ResponseFormat | None = None
    suffix: Annotated[
        Any,
        unsupported("suffix is not supported: the model continues a prompt and cannot fill a gap"),
    ] = None

    @model_validator(mode="after")
    def _consistent_completion(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 is only allowed with echo=true")
        if self.echo and (self.best_of or 1) > (self.n or 1):
            raise ValueError("best_of: cannot be combined with echo")
        if self.echo and self.reward_adapter is not None:
            raise ValueError("reward_adapter: cannot be combined with echo")
        if not self.prompt and not isinstance(self.prompt, str):
            raise ValueError("prompt: expected at least one prompt, got an empty list")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Text or token ids, one entry per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(entry, int) for entry in self.prompt):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]
