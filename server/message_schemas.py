"""The parts of request bodies that several routes share: messages, tools, formats of an answer.

Strict types, as in OpenAI's API: "5" is no number and true is no 1. null means: not given. What is
not here is refused by name; so is what we cannot honour.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


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
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Scale = Annotated[float, Field(ge=-10, le=10)]
"""lora_scale: 0 is the base, 1 the adapter as trained."""
Priority = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


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


def check_continuation(
    messages: list[Message], continues: bool | None, add_generation_prompt: bool | None
) -> None:
    """continue_final_message leaves the last message open for the model to go on.

    Raises:
        ValueError: there is nothing of the assistant's to go on with.
    """
    if not continues:
        return
    if add_generation_prompt:
        raise ValueError("continue_final_message: cannot be combined with add_generation_prompt")
    if messages[-1].role != "assistant":
        raise ValueError("continue_final_message: the last message must be the assistant's")


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
