"""Request bodies. A parameter that is not here is refused by name; so is one that we cannot honour.

Strict types, as in OpenAI's API: "5" is no number and true is no 1. null means: not given.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_LOGPROBS = 20
INT64 = 2**63 - 1


def unsupported(reason: str) -> AfterValidator:
    """For a parameter that OpenAI knows and Herd cannot honour: null or a refusal."""

    def refuse(value: Any) -> None:
        if value is not None:
            raise PydanticCustomError("unsupported_parameter", "{reason}", {"reason": reason})

    return AfterValidator(refuse)


def only(*allowed: Any, reason: str) -> AfterValidator:
    """For a parameter of which only some values ask nothing that Herd cannot do."""

    def check(value: Any) -> Any:
        if value is not None and value not in allowed:
            text = f"{reason}; only {' or '.join(map(repr, allowed))} is supported, got {{value}}"
            raise PydanticCustomError("unsupported_parameter", text, {"value": repr(value)[:80]})
        return value

    return AfterValidator(check)


def _unicode(text: str) -> str:
    """Half a surrogate pair is legal JSON but no text: it has no UTF-8 and no tokens."""
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("the text holds half a surrogate pair, which is not valid Unicode")
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Stop = Annotated[Text, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Body(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), frozen=True
    )


# --- messages ---


class ContentPart(Body):
    type: str
    text: Text | None = None
    refusal: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in ("text", "refusal"):
            raise PydanticCustomError(
                "unsupported_content",
                "content parts of type '{kind}' are not supported: the model reads text only; "
                "send parts of type 'text'",
                {"kind": kind[:40]},
            )
        return part

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type '{self.type}' needs the field '{self.type}'")
        return self


class FunctionCall(Body):
    name: Text
    arguments: Text
    """JSON text."""


class ToolCall(Body):
    id: Text
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None
    """Present where a client sends back a streamed call; without meaning here."""


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[ContentPart] | None = None
    name: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None
    refusal: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    annotations: Any = None
    """OpenAI's answers carry it, clients send it back; it asks nothing."""
    audio: Annotated[
        Any, unsupported("audio is not supported: the model reads and writes text only")
    ] = None
    function_call: Annotated[
        Any, unsupported("function_call is deprecated and not supported; use tool_calls")
    ] = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.role == "assistant":
            if self.content is None and not self.tool_calls and self.refusal is None:
                raise ValueError("an assistant message needs content or tool_calls")
        elif self.content is None:
            raise ValueError(f"a message of role '{self.role}' needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to messages of role 'assistant'")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of role 'tool' needs the tool_call_id that it answers")
        return self

    def text(self) -> str:
        """The content as one text; parts are joined by line breaks, as vLLM does."""
        if isinstance(self.content, list):
            return "\n".join((part.text or part.refusal or "") for part in self.content)
        return self.content or self.refusal or ""


# --- tools and formats ---


class FunctionDefinition(Body):
    """Names and shapes are checked in server/tools.py."""

    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionDefinition


class JsonSchema(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type 'json_schema' and the field json_schema belong together")
        return self


class StructuredOutputs(Body):
    """vLLM's extra: exactly one of the four."""

    json_: dict[str, Any] | Text | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1)] | None = None
    grammar: Text | None = None
    """In Lark's notation."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [x for x in (self.json_, self.regex, self.choice, self.grammar) if x is not None]
        if len(given) != 1:
            raise ValueError(
                f"expected exactly one of json, regex, choice, grammar, got {len(given)}"
            )
        return self


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
    priority: Annotated[int, Field(ge=-INT64 - 1, le=INT64)] | None = None
    lora_scale: Annotated[float, Field(ge=-10, le=10)] | None = None
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
        extras = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
        given = [
            name for name in ("structured_outputs", *extras) if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: cannot be combined with {given[0]}")
        return self

    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(dict.fromkeys(self.stop))

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
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise ValueError(
                    "continue_final_message: cannot be combined with add_generation_prompt"
                )
            if self.messages[-1].role != "assistant":
                raise ValueError("continue_final_message: the last message must be the assistant's")
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


# --- the other routes ---


class ScoreRequest(Body):
    model: str
    input: Text | list[Text] | list[Message] | None = None
    messages: list[Message] | None = None
    lora_scale: Annotated[float, Field(ge=-10, le=10)] | None = None
    priority: Annotated[int, Field(ge=-INT64 - 1, le=INT64)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    user: Text | None = None

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise ValueError("input: expected either input or messages")
        if self.input == [] or self.messages == []:
            raise ValueError("input: expected at least one text or message, got an empty list")
        return self


class TokenizeRequest(Body):
    """vLLM's: a text, or messages through the chat template."""

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: expected either prompt or messages")
        return self


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[TokenId]


AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:\-]{0,127}$")]


class LoadAdapterRequest(Body):
    lora_name: AdapterName
    lora_path: Annotated[Text, Field(min_length=1)] | None = None
    load_inplace: bool | None = None
    pinned: bool | None = None
    expected_generation: Annotated[int, Field(ge=0)] | None = None
    """Load only if this generation is current; 0: only if there is no adapter of that name."""


class UnloadAdapterRequest(Body):
    lora_name: str
    lora_int_id: Any = None
    """vLLM's clients may send it; names are enough here."""


class RollbackRequest(Body):
    generation: Annotated[int, Field(ge=1)] | None = None
