"""Messages to one prompt text, by the Jinja template of the server, the adapter or the model.

Order: --chat-template, the adapter's own, Guanaco's when the adapter is Guanaco-like, the base
folder's; none of these is a clear 400. Templates run in transformers' sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from adapters.registry import AdapterRecord
from engine.errors import CheckpointError
from server.errors import ApiError, bad_request
from server.tokenizer import ChatTemplateSource

GUANACO_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions."
)
# The format of the OASST1 data that Guanaco was trained on (QLoRA, arXiv:2305.14314).
# No space after the last colon: the answer's first token brings its own.
GUANACO_TEMPLATE = (
    "{%- if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{%- set rest = messages[1:] %}"
    "{%- else %}" + GUANACO_SYSTEM + "{%- set rest = messages %}{%- endif %}"
    "{%- for message in rest %}"
    "{%- if message.role == 'user' %}{{ ' ' if loop.first }}### Human: {{ message.content }}"
    "{%- elif message.role == 'assistant' %}### Assistant: {{ message.content }}"
    "{%- else %}{{ raise_exception('the Guanaco template knows a first system message, user and "
    "assistant, not ' ~ message.role) }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}### Assistant:{%- endif %}"
)
# Some write the next turn on a new line; the line break is not part of the answer either.
GUANACO_STOPS = ("### Human:", "\n### Human:")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A template and what goes with it."""

    source: str | Mapping[str, str]
    """Jinja text, or several by name (default, tool_use), as some folders have."""
    origin: str
    """Where it comes from, for error messages."""
    stops: tuple[str, ...] = ()
    """Stop strings that belong to the format."""
    adds_special_tokens: bool = False
    """The text carries no <s>: the tokenizer adds it."""

    def text(self, *, with_tools: bool) -> str:
        if isinstance(self.source, str):
            return self.source
        first = "tool_use" if with_tools else "default"
        return (
            self.source.get(first) or self.source.get("default") or next(iter(self.source.values()))
        )


GUANACO = ChatTemplate(
    source=GUANACO_TEMPLATE,
    origin="the Guanaco template",
    stops=GUANACO_STOPS,
    adds_special_tokens=True,
)


def load_override(value: str) -> ChatTemplate:
    """--chat-template: a file, or Jinja text itself.

    Raises:
        CheckpointError: no such file, or the template is not valid Jinja.
    """
    is_text = "{%" in value or "{{" in value
    path = Path(value)
    if not is_text and not path.is_file():
        raise CheckpointError(f"--chat-template: {value} is neither a file nor a Jinja template")
    source = value if is_text else path.read_text(encoding="utf-8")
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)  # transformers' own tag
        )
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"--chat-template: line {error.lineno}: {error.message}") from error
    return ChatTemplate(source=source, origin="--chat-template", stops=_stops(source))


def choose_template(
    override: ChatTemplate | None,
    *,
    adapter: AdapterRecord | None,
    folder_template: ChatTemplateSource,
) -> ChatTemplate | None:
    """The template of a request, None when there is none.

    Args:
        override: --chat-template.
        adapter: the one that answers; None is the base.
        folder_template: of the base model.
    """
    if override is not None:
        return override
    if adapter is not None and adapter.info.chat_template:
        origin = f"the template of adapter {adapter.name}"
        return stored_template(adapter.info.chat_template, origin)
    if adapter is not None and adapter.info.is_guanaco:
        return GUANACO
    if folder_template:
        stops = _stops(folder_template) if isinstance(folder_template, str) else ()
        return ChatTemplate(source=folder_template, origin="the base model's template", stops=stops)
    return None


def stored_template(source: str, origin: str) -> ChatTemplate:
    """The template in an adapter's folder, with what goes with it."""
    return ChatTemplate(source=source, origin=origin, stops=_stops(source))


def _stops(source: str) -> tuple[str, ...]:
    """A template in Guanaco's format has its stop strings: the format has no end token."""
    return GUANACO_STOPS if GUANACO_STOPS[0] in source else ()


# Its own refusals, and what Python raises inside one that these messages do not suit.
_TEMPLATE_FAILURES = (
    jinja2.TemplateError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError,
    RecursionError,
)  # fmt: skip
_OWN_ARGUMENTS = {
    "conversations", "messages", "tools", "chat_template", "add_generation_prompt",
    "continue_final_message", "return_assistant_tokens_mask",
}  # fmt: skip


def render(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The prompt text.

    Raises:
        ApiError: 400, the template refuses these messages or fails on them.
    """
    from transformers.utils.chat_template_utils import render_jinja_template  # slow to import

    own = _OWN_ARGUMENTS & (template_kwargs or {}).keys()
    if own:
        names = ", ".join(sorted(own))
        raise bad_request(
            f"chat_template_kwargs: {names} cannot be set here; it has a parameter of its own or "
            f"belongs to the server",
            "chat_template_kwargs",
        )
    arguments = {**special_tokens, **(template_kwargs or {})}
    try:
        rendered: Any = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            tools=[dict(tool) for tool in tools] if tools else None,
            chat_template=template.text(with_tools=bool(tools)),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **arguments,
        )
    except _TEMPLATE_FAILURES as error:
        raise _template_error(template, error) from error
    return str(rendered[0][0])


def _template_error(template: ChatTemplate, error: Exception) -> ApiError:
    message = str(error).strip() or type(error).__name__
    return bad_request(
        f"These messages do not fit {template.origin}: {message[:500]}",
        "messages",
        "chat_template_error",
    )


def no_template(model: str) -> ApiError:
    return bad_request(
        f"'{model}' has no chat template, so messages cannot be put before it. Use "
        f"/v1/completions, or start the server with --chat-template FILE.",
        "messages",
        "no_chat_template",
    )
