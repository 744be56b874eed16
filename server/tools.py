"""Tool calling and response formats, the same for every model.

For the chat route:

    plan = plan_tools(messages, tools=…, tool_choice=…, parallel_tool_calls=…, response_format=…,
                      template=…)
        # raises RequestError (a 400) whose param names the field at fault
    text = render(template, plan.messages, **plan.template_kwargs)
    check_grammar(plan.grammar)    # if not None; then SamplingParams(grammar=plan.grammar)
    parser = plan.parser()         # one per choice; None: all text is content

    streaming       for each piece: delta = parser.push(piece), at the end parser.finish():
                    delta.content (str, may be empty), [call.to_dict() for call in delta.tool_calls]
    not streaming   content, calls = parse_tool_calls(parser, text);
                    message.tool_calls = [call.to_dict() for call in calls], absent where empty
    finish_reason   "tool_calls" where the engine says "stop" and parser.num_calls > 0
    is_complete     the parser has the one allowed call: the request may be cancelled then, and
                    the finish_reason is "tool_calls"

Messages and tools are plain dicts of OpenAI's shapes (model_dump(exclude_none=True) of the request
body), with content a string, a list of text parts or None; roles are those the template gets, so
"developer" is already "system".

How tools reach the model: a chat template that speaks one of the two formats of
server/tool_parser.py gets them as `tools=`. For any other model a section of the system message
lists them and asks for the <tool_call> format, earlier calls and results are rewritten in that
format, and results become user messages.

What can go wrong on any model: nothing, where tool_choice is "required" or names a function, or a
tool says strict=true: a grammar admits well-formed calls only. Otherwise ("auto") malformed calls
come out as content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.api import GrammarSpec
from server.tool_messages import add_to_system, native_messages, plain_messages, tool_prompt
from server.tool_parser import (
    CALL_BEGIN,
    CALL_END,
    ParsedDelta,
    ToolCall,
    ToolCallDelta,
    ToolCallParser,
    parse_tool_calls,
)
from server.tool_request import NAME, Choice, read_choice, read_tools, require

__all__ = [
    "ParsedDelta",
    "ToolCall",
    "ToolCallDelta",
    "ToolCallParser",
    "ToolPlan",
    "parse_tool_calls",
    "plan_response_format",
    "plan_tools",
    "template_supports_tools",
]

MAX_PARALLEL_CALLS = 16
"""Where a grammar admits several calls; a model that cannot stop must not call for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolPlan:
    """What to render, how to constrain and how to read the answer of one chat request."""

    messages: list[dict[str, Any]]
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of the chat template: tools, where the template knows them."""
    grammar: GrammarSpec | None = None
    tool_names: tuple[str, ...] = ()
    """Tools the model may call; empty: the answer is not searched for calls."""
    is_guaranteed: bool = False
    """The grammar makes every call well-formed, so they are streamed as they are written."""
    is_parallel: bool = True

    def parser(self) -> ToolCallParser | None:
        """A fresh parser for one generated text; None where all of it is content."""
        if not self.tool_names:
            return None
        return ToolCallParser(
            self.tool_names, guaranteed=self.is_guaranteed, parallel=self.is_parallel
        )


def plan_tools(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel_tool_calls: bool | None = None,
    response_format: Mapping[str, Any] | None = None,
    template: str | None = None,
) -> ToolPlan:
    """Everything a chat request says about tools and the form of the answer, resolved.

    Args:
        messages: the conversation, as the module's docstring says.
        tools, tool_choice, parallel_tool_calls, response_format: the request's fields; None where
        absent.
        template: source of the model's chat template (Jinja), to see whether it knows tools.

    Raises:
        RequestError: a field has a shape or value that is not allowed; param names it.
    """
    functions = read_tools(tools)
    choice = read_choice(tool_choice, functions)
    answer = plan_response_format(response_format)
    is_native = template_supports_tools(template)
    rendered = [dict(message) for message in messages]
    rendered = native_messages(rendered) if is_native else plain_messages(rendered)
    if not choice.functions:
        return ToolPlan(messages=rendered, grammar=answer)

    is_parallel = parallel_tool_calls is not False and not choice.is_single
    is_strict = any(function.get("strict") for function in choice.functions)
    grammar = None
    if choice.is_required or is_strict or answer is not None:
        grammar = _call_grammar(choice, is_parallel=is_parallel, answer=answer)
    kwargs: dict[str, Any] = {}
    if is_native:
        kwargs["tools"] = [
            {"type": "function", "function": function} for function in choice.functions
        ]
    else:
        rendered = add_to_system(rendered, tool_prompt(choice.functions))
    return ToolPlan(
        messages=rendered,
        template_kwargs=kwargs,
        grammar=grammar,
        tool_names=tuple(function["name"] for function in choice.functions),
        is_guaranteed=grammar is not None,
        is_parallel=is_parallel,
    )


def template_supports_tools(template: str | None) -> bool:
    """Does a chat template put `tools` before the model in a call format that the parser reads?"""
    if not template or not re.search(r"\btools\b", template):
        return False
    return CALL_BEGIN in template or '"parameters"' in template


def plan_response_format(response_format: Mapping[str, Any] | None) -> GrammarSpec | None:
    """The grammar that response_format asks for; None for free text.

    A schema that is not strict is followed as far as the grammar library can; keywords it does not
    know are then ignored. With strict=true they are refused (by check_grammar).

    Raises:
        RequestError: an unknown type or a malformed json_schema.
    """
    if response_format is None:
        return None
    require(isinstance(response_format, Mapping), "response_format", "an object", response_format)
    kind = response_format.get("type")
    require(
        kind in ("text", "json_object", "json_schema"),
        "response_format.type",
        '"text", "json_object" or "json_schema"',
        kind,
    )
    if kind == "text":
        return None
    if kind == "json_object":
        return GrammarSpec(kind="json_object")
    where = "response_format.json_schema"
    wrapper = response_format.get("json_schema")
    require(isinstance(wrapper, Mapping), where, 'an object {"name": …, "schema": {…}}', wrapper)
    assert isinstance(wrapper, Mapping)
    name, strict = wrapper.get("name"), wrapper.get("strict")
    require(
        isinstance(name, str) and NAME.fullmatch(name),
        f"{where}.name",
        "1 to 64 letters, digits, underscores or hyphens",
        name,
    )
    require(strict is None or isinstance(strict, bool), f"{where}.strict", "true or false", strict)
    schema = wrapper.get("schema", {"type": "object"})
    require(isinstance(schema, Mapping), f"{where}.schema", "a JSON schema object", schema)
    return GrammarSpec(kind="json_schema", source=_schema_text(schema, is_strict=strict is True))


def _schema_text(schema: Mapping[str, Any], *, is_strict: bool, **options: object) -> str:
    """A schema as text, with options for the grammar library under its key "x-guidance"."""
    if not is_strict:
        options = {"lenient": True, "coerce_one_of": True, **options}
    own = {key: value for key, value in schema.items() if key != "x-guidance"}
    return json.dumps(own | {"x-guidance": options} if options else own)


def _call_grammar(choice: Choice, *, is_parallel: bool, answer: GrammarSpec | None) -> GrammarSpec:
    """Lark grammar of llguidance: calls only, calls or an answer of the given format, or text with
    calls."""
    calls = f'call ("\\n" call){{0,{MAX_PARALLEL_CALLS - 1}}}' if is_parallel else "call"
    rules: list[str] = []
    if choice.is_required:
        rules.append(f"start: {calls}")
        begin = json.dumps(CALL_BEGIN)
    elif answer is not None:
        schema = answer.source or '{"type": "object"}'
        rules += [f"start: {calls} | answer", f"answer: %json {schema}"]
        begin = json.dumps(CALL_BEGIN)
    else:
        most = MAX_PARALLEL_CALLS if is_parallel else 1
        rules += [f"start: call{{0,{most}}} rest", "rest: TEXT", "TEXT: /(.|\\n)*/"]
        rules.append(f"begin[lazy]: TEXT {json.dumps(CALL_BEGIN)}")
        begin = "begin"
    options = " | ".join(f"call_{index}" for index in range(len(choice.functions)))
    rules.append(f'call: {begin} "\\n" ({options}) "\\n" {json.dumps(CALL_END)}')
    for index, function in enumerate(choice.functions):
        opening = json.dumps('{"name": "' + function["name"] + '", "arguments": ')
        schema = _schema_text(
            {"type": "object", **(function.get("parameters") or {})},
            is_strict=function.get("strict") is True,
            whitespace_flexible=False,
            item_separator=", ",
            key_separator=": ",
        )
        rules.append(f'call_{index}: {opening} arguments_{index} "}}"')
        rules.append(f"arguments_{index}: %json {schema}")
    return GrammarSpec(kind="lark", source="\n".join(rules) + "\n")
