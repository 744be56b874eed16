"""Tools: what is refused, what the model sees, what it may write, and what is read from it."""

import itertools
import json
import re

import jsonschema
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.errors import RequestError
from engine.grammar import GrammarCompiler, check_grammar
from server.tool_parser import MAX_FALSE_CALLS
from server.tools import (
    ToolCallParser,
    parse_tool_calls,
    plan_response_format,
    plan_tools,
    template_supports_tools,
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
PING = {"type": "function", "function": {"name": "ping"}}
QWEN_TEMPLATE = "{% if tools %}<tools>…</tools> use <tool_call>{% endif %}{{ messages }}"
USER = [{"role": "user", "content": "How warm is Lima?"}]


def call_text(name: str, arguments: object) -> str:
    written = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{written}\n</tool_call>"


def parse(text: str, *, cuts=(), names=("f", "g"), **options):
    """(content, [(name, arguments)], deltas) of a text pushed in the pieces between the cuts."""
    ids = (f"id{i}" for i in itertools.count())
    parser = ToolCallParser(names, new_id=lambda: next(ids), **options)
    edges = [0, *sorted(cuts), len(text)]
    deltas = [parser.push(text[a:b]) for a, b in itertools.pairwise(edges)]
    deltas.append(parser.finish())
    content = "".join(delta.content for delta in deltas)
    calls: list[list[str]] = []
    for delta in (call for parsed in deltas for call in parsed.tool_calls):
        if delta.name is not None:
            assert delta.index == len(calls) and delta.id == f"id{delta.index}"
            calls.append([delta.name, delta.arguments])
        else:
            assert delta.index == len(calls) - 1 and delta.id is None
            calls[-1][1] += delta.arguments
    assert parser.num_calls == len(calls)
    return content, [tuple(call) for call in calls], deltas


# --- reading calls ---


def test_a_call_between_text_is_read_and_its_markers_never_shown():
    text = "Let me look.\n" + call_text("f", {"x": [1, "}</tool_call>"]}) + "\nDone."
    content, calls, _ = parse(text)
    assert content == "Let me look.\nDone."
    assert calls == [("f", '{"x": [1, "}</tool_call>"]}')]


def test_calls_only_have_no_content():
    text = f" \n{call_text('f', {})}\n{call_text('g', {'a': None})}\n"
    content, calls = parse_tool_calls(ToolCallParser(["f", "g"]), text)
    assert content is None
    assert [(c.name, c.arguments) for c in calls] == [("f", "{}"), ("g", '{"a": null}')]
    assert len({c.id for c in calls}) == 2 and all(c.id.startswith("call_") for c in calls)
    assert calls[1].to_dict() == {
        "id": calls[1].id,
        "type": "function",
        "function": {"name": "g", "arguments": '{"a": null}'},
    }


def test_llama_3s_bare_object_is_a_call_at_the_start_only():
    bare = '{"name": "f", "parameters": {"x": 1}}'
    assert parse(bare)[:2] == ("", [("f", '{"x": 1}')])
    assert parse("\n" + bare)[:2] == ("", [("f", '{"x": 1}')])
    assert parse("So: " + bare)[:2] == ("So: " + bare, [])
    assert parse('{"name": "Bob", "parameters": {}}')[:2] == (
        '{"name": "Bob", "parameters": {}}',
        [],
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  plain text, with < and <tool and {braces}  ",
        '{"name": "f"}',
        '{"answer": {"name": "f", "arguments": {}}}',
        "<tool_call>",
        "<tool_call>\n",
        "<tool_call>no object</tool_call>",
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": }}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>',
        '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": "cut off',
        '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 3000 + "1" + "}" * 3000 + "}",
        '<tool_call>{"name": "f", "arguments": {"n": ' + "9" * 5000 + "}}",
        '  <tool_call> [{"name": "f"}] </tool_call>  ',
        "</tool_call> stray",
    ],
)
def test_what_is_no_call_is_content_unchanged(text):
    assert parse(text)[:2] == (text, [])
    assert parse(text, cuts=range(1, len(text)))[:2] == (text, [])


def test_a_broken_call_does_not_hide_a_good_one():
    broken = '<tool_call>{"name": "f", "arguments": {'
    content, calls, _ = parse(broken + call_text("g", {"y": 2}))
    assert (content, calls) == (broken, [("g", '{"y": 2}')])


def test_small_mistakes_of_models_are_forgiven():
    """No end marker, arguments as text or absent, raw line breaks, other keys."""
    text = '<tool_call>{"id": 1, "name": "f", "arguments": "{\\"x\\": 1}"}'
    assert parse(text)[1] == [("f", '{"x": 1}')]
    assert parse('<tool_call>{"name": "f"}</tool_call>')[1] == [("f", "{}")]
    raw = '<tool_call>{"name": "f", "arguments": {"code": "a\nb"}}</tool_call>'
    assert parse(raw)[1] == [("f", '{"code": "a\\nb"}')]


def test_half_a_surrogate_pair_stays_an_escape():
    text = '<tool_call>{"name": "f", "arguments": {"x": "\\ud83d"}}</tool_call>'
    [(_, arguments)] = parse(text)[1]
    assert arguments.encode() == b'{"x": "\\ud83d"}'


def test_one_call_is_enough_where_calls_are_not_parallel():
    text = call_text("f", {}) + call_text("g", {}) + "more"
    assert parse(text, parallel=False)[:2] == ("", [("f", "{}")])
    parser = ToolCallParser(["f"], parallel=False)
    parser.push('<tool_call>{"name": "f", "arguments": {}')
    assert not parser.is_complete
    parser.push("}")
    assert parser.is_complete


def test_guaranteed_calls_are_streamed_as_they_are_written():
    text = call_text("f", {"x": {"y": [1, 2]}, "z": "}"}) + "\n" + call_text("g", {})
    content, calls, deltas = parse(text, cuts=range(1, len(text)), guaranteed=True)
    assert content == ""
    assert calls == [("f", '{"x": {"y": [1, 2]}, "z": "}"}'), ("g", "{}")]
    assert sum(bool(delta.tool_calls) for delta in deltas) > 20
    first = next(delta for delta in deltas if delta.tool_calls).tool_calls[0]
    assert first.to_dict() == {
        "index": 0,
        "id": "id0",
        "type": "function",
        "function": {"name": "f", "arguments": ""},
    }


def test_a_guaranteed_call_that_is_cut_off_ends_early_and_shows_no_marker():
    text = call_text("f", {"x": 12345})
    for length in range(len(text)):
        content, calls, _ = parse(text[:length], guaranteed=True)
        assert content == ""
        if calls:
            assert '{"x": 12345}'.startswith(calls[0][1])


def test_a_text_full_of_markers_is_read_in_reasonable_time():
    text = '<tool_call>{"' * 5000
    assert parse(text)[:2] == (text, [])
    call = call_text("f", {})
    text = "<tool_call> " * (MAX_FALSE_CALLS - 1) + call
    assert parse(text)[1] == [("f", "{}")]
    text = "<tool_call> " * MAX_FALSE_CALLS + call
    assert parse(text)[:2] == (text, [])


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
CALLS = st.builds(
    call_text,
    st.sampled_from(["f", "g", "unknown"]),
    st.dictionaries(st.text(max_size=4), JSON_VALUES, max_size=3),
)
FRAGMENTS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<tool_", "call>", "<", " ", "\n", "{", "}", '"', "\\", "[",
     "]",
     '{"name": "f", "arguments": ', '{"name": "g", "parameters": {"a": 1}}', '{"name": "', "f", ":",
     "text", "é😀", "null"]
)  # fmt: skip
TEXTS = st.lists(CALLS | FRAGMENTS | st.text(max_size=5), max_size=8).map("".join)


@settings(max_examples=400, deadline=None)
@given(text=TEXTS, data=st.data(), parallel=st.booleans(), guaranteed=st.booleans())
def test_streamed_equals_whole_wherever_the_text_is_cut(text, data, parallel, guaranteed):
    options = {"parallel": parallel, "guaranteed": guaranteed}
    whole = parse(text, **options)[:2]
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    assert parse(text, cuts=cuts, **options)[:2] == whole
    assert parse(text, cuts=range(1, len(text)), **options)[:2] == whole


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
@example("<tool_call> {")
def test_nothing_but_calls_and_the_space_around_them_is_lost(text):
    content, calls, _ = parse(text)
    if not calls:
        assert content == text
    else:
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)
    rest = iter(text)
    assert all(char in rest for char in content), "content is no subsequence of the text"


# --- what the model may write ---


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """Over a tokenizer of single bytes."""
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate([*alphabet, "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    compiler = GrammarCompiler(folder, len(vocab), [256])
    compiler.decode = lambda ids: tokenizer.decode(ids)
    yield compiler
    compiler.close()


def write_noise(compiler, spec, seed: int, max_tokens: int = 4000, prefix: str = "") -> str:
    """Text of a model that picks any allowed token; `prefix` is written first."""
    check_grammar(spec)
    matcher = compiler.submit(spec).result(timeout=60).matcher()
    row = torch.empty(9, dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    forced = [i for char in prefix for i in range(256) if compiler.decode([i]) == char]
    token_ids: list[int] = []
    while not matcher.is_finished() and len(token_ids) < max_tokens:
        matcher.fill_mask(row)
        allowed = [i for i in range(257) if row[i // 32].item() >> i % 32 & 1]
        pick = torch.randint(len(allowed), (), generator=generator).item()
        token_id = forced.pop(0) if forced else allowed[pick]
        if token_id == 256:
            break
        matcher.accept(token_id)
        token_ids.append(token_id)
    return compiler.decode(token_ids)


def check_calls(calls, *tools) -> None:
    schemas = {t["function"]["name"]: t["function"].get("parameters", {}) for t in tools}
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), {"type": "object"} | schemas[name])


def test_a_required_call_is_well_formed_whatever_the_model_prefers(compiler):
    plan = plan_tools(USER, tools=[WEATHER, ADD], tool_choice="required")
    called = set()
    for seed in range(8):
        text = write_noise(compiler, plan.grammar, seed)
        content, calls, _ = parse(text, names=plan.tool_names, guaranteed=plan.is_guaranteed)
        assert content == "" and 1 <= len(calls) <= 16
        check_calls(calls, WEATHER, ADD)
        assert parse(text, names=plan.tool_names)[1] == [
            (name, json.dumps(json.loads(arguments), ensure_ascii=False))
            for name, arguments in calls
        ]
        called |= {name for name, _ in calls}
    assert called == {"get_weather", "add"}


@pytest.mark.parametrize(
    "request_fields",
    [
        {"tool_choice": "required", "parallel_tool_calls": False},
        {"tool_choice": {"type": "function", "function": {"name": "add"}}},
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "required", "tools": [{"type": "function", "function": {"name": "add"}}]}},
         "parallel_tool_calls": False},
    ],
)  # fmt: skip
def test_where_one_call_is_asked_for_there_is_exactly_one(compiler, request_fields):
    plan = plan_tools(USER, tools=[WEATHER, ADD], **request_fields)
    for seed in range(5):
        text = write_noise(compiler, plan.grammar, seed)
        content, calls = parse_tool_calls(plan.parser(), text)
        assert content is None and len(calls) == 1
        assert calls[0].name in plan.tool_names
        assert text.count("<tool_call>") == 1
        check_calls([(calls[0].name, calls[0].arguments)], WEATHER, ADD)


def test_strict_tools_leave_the_choice_but_not_the_form(compiler):
    plan = plan_tools(USER, tools=[WEATHER], tool_choice="auto")
    assert plan.is_guaranteed
    texts = [write_noise(compiler, plan.grammar, seed, max_tokens=60) for seed in range(5)]
    assert any(text and "<tool_call>" not in text for text in texts)
    for seed in range(5):
        text = write_noise(compiler, plan.grammar, seed, max_tokens=300, prefix="Hm. <tool_call>")
        body, end, _ = text.partition("\n</tool_call>")
        assert end and body.startswith('Hm. <tool_call>\n{"name": "get_weather", "arguments": {')
        check_calls(parse(body + end, names=plan.tool_names)[1], WEATHER)


def test_calls_or_an_answer_of_the_given_form(compiler):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
              "additionalProperties": False}  # fmt: skip
    response_format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    plan = plan_tools(USER, tools=[ADD], response_format=response_format)
    seen = set()
    for seed in range(12):
        text = write_noise(compiler, plan.grammar, seed)
        content, calls = parse_tool_calls(plan.parser(), text)
        seen.add(bool(calls))
        if calls:
            assert content is None
            check_calls([(call.name, call.arguments) for call in calls], ADD)
        else:
            jsonschema.validate(json.loads(content), schema)
    assert seen == {True, False}


def test_a_tool_without_parameters_takes_any_object(compiler):
    plan = plan_tools(USER, tools=[PING], tool_choice="required", parallel_tool_calls=False)
    text = write_noise(compiler, plan.grammar, 3, max_tokens=20_000)
    [call] = parse_tool_calls(plan.parser(), text)[1]
    assert isinstance(json.loads(call.arguments), dict)


def test_unsupported_keywords_are_refused_in_strict_tools_only():
    parameters = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}
    for strict in (False, True):
        function = {"name": "f", "parameters": parameters, "strict": strict}
        plan = plan_tools(
            USER, tools=[{"type": "function", "function": function}], tool_choice="required"
        )
        if not strict:
            check_grammar(plan.grammar)
            continue
        with pytest.raises(RequestError, match="uniqueItems"):
            check_grammar(plan.grammar)


def test_auto_without_strictness_costs_no_grammar():
    plan = plan_tools(USER, tools=[ADD, PING])
    assert plan.grammar is None and plan.tool_names == ("add", "ping")
    assert not plan.is_guaranteed and plan.is_parallel


def test_no_tools_or_choice_none_mean_no_parser_and_no_prompt():
    for fields in ({}, {"tools": []}, {"tools": [ADD], "tool_choice": "none"}):
        plan = plan_tools(USER, template=QWEN_TEMPLATE, **fields)
        assert plan.parser() is None and plan.messages == USER
        assert plan.template_kwargs == {} and plan.grammar is None


# --- response formats ---


def test_response_formats_become_grammars():
    assert plan_response_format(None) is None
    assert plan_response_format({"type": "text"}) is None
    assert plan_response_format({"type": "json_object"}).kind == "json_object"
    schema = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}
    wrapper = {"name": "n", "schema": schema}
    lenient = plan_response_format({"type": "json_schema", "json_schema": wrapper})
    check_grammar(lenient)
    strict = plan_response_format(
        {"type": "json_schema", "json_schema": wrapper | {"strict": True}}
    )
    assert json.loads(strict.source) == schema
    with pytest.raises(RequestError, match="uniqueItems"):
        check_grammar(strict)


@pytest.mark.parametrize(
    ("response_format", "param"),
    [
        ({"type": "yaml"}, "response_format.type"),
        ({}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        (
            {"type": "json_schema", "json_schema": {"schema": {}}},
            "response_format.json_schema.name",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": []}},
            "response_format.json_schema.schema",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "strict": 1}},
            "response_format.json_schema.strict",
        ),
    ],
)
def test_malformed_response_formats_are_refused_by_name(response_format, param):
    with pytest.raises(RequestError) as caught:
        plan_response_format(response_format)
    assert caught.value.param == param


# --- validation ---


def function(**fields):
    return {"type": "function", "function": {"name": "f"} | fields}


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([{"type": "custom"}], "tools[0].type"),
        (["f"], "tools[0]"),
        ([{"type": "function"}], "tools[0].function"),
        ([function(name="has space")], "tools[0].function.name"),
        ([function(name="x" * 65)], "tools[0].function.name"),
        ([function(), function()], "tools[1].function.name"),
        ([function(description=5)], "tools[0].function.description"),
        ([function(parameters="x")], "tools[0].function.parameters"),
        ([function(parameters={"type": "array"})], "tools[0].function.parameters.type"),
        ([function(strict="yes")], "tools[0].function.strict"),
        ([function(name=f"f{i}") for i in range(129)], "tools"),
    ],
)
def test_malformed_tools_are_refused_by_name(tools, param):
    with pytest.raises(RequestError, match="expected") as caught:
        plan_tools(USER, tools=tools)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("choice", "tools", "param"),
    [
        ("always", [ADD], "tool_choice"),
        ("required", None, "tool_choice"),
        (5, [ADD], "tool_choice"),
        ({"type": "custom"}, [ADD], "tool_choice"),
        (
            {"type": "function", "function": {"name": "sub"}},
            [ADD],
            "tool_choice.function.name",
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
            [ADD],
            "tool_choice.allowed_tools.tools",
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "never", "tools": [ADD]}},
            [ADD],
            "tool_choice.allowed_tools.mode",
        ),
    ],
)
def test_malformed_choices_are_refused_by_name(choice, tools, param):
    with pytest.raises(RequestError) as caught:
        plan_tools(USER, tools=tools, tool_choice=choice)
    assert caught.value.param == param


# --- what the model sees ---

HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Add "}, {"type": "text", "text": "up"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
            {"id": "2", "type": "function", "function": {"name": "add", "arguments": "not json"}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "one"},
    {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "two"}]},
    {"role": "user", "content": "And now?"},
]  # fmt: skip


def test_a_template_that_knows_tools_gets_them_and_arguments_as_objects():
    plan = plan_tools(HISTORY, tools=[ADD], template=QWEN_TEMPLATE)
    assert plan.template_kwargs == {"tools": [ADD]}
    assistant = plan.messages[2]
    assert assistant["content"] == ""
    arguments = [call["function"]["arguments"] for call in assistant["tool_calls"]]
    assert arguments == [{"a": 1}, "not json"]
    assert plan.messages[3:] == HISTORY[3:] and plan.messages[:2] == HISTORY[:2]
    assert HISTORY[2]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}', "input was changed"


def test_other_templates_get_everything_as_plain_text():
    plan = plan_tools(HISTORY, tools=[ADD], template="{{ messages }}")
    assert plan.template_kwargs == {}
    roles = [message["role"] for message in plan.messages]
    assert roles == ["system", "user", "assistant", "user"]
    system, _, assistant, result = (message["content"] for message in plan.messages)
    assert system.startswith("Be brief.\n\n") and '"name": "add"' in system
    content, calls, _ = parse(assistant, names=["add"])
    assert content.startswith("<tool_call>") and calls == [("add", '{"a": 1}')]
    assert result == (
        "<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response>\nAnd now?"
    )
    assert "tool_calls" not in plan.messages[2]


def test_the_described_format_is_the_one_that_is_read():
    plan = plan_tools(USER, tools=[ADD], template=None)
    section = plan.messages[0]["content"]
    assert plan.messages[0]["role"] == "system" and plan.messages[1:] == USER
    sample = re.search(r"<tool_call>.*?</tool_call>", section, re.DOTALL)[0]
    assert parse(sample, names=["function_name"])[1] == [("function_name", '{"argument": "value"}')]


def test_which_templates_know_tools():
    assert template_supports_tools(QWEN_TEMPLATE)
    llama = '{% if tools %}{"name": function name, "parameters": dictionary}{% endif %}'
    assert template_supports_tools(llama)
    assert not template_supports_tools("{% if tools %}[AVAILABLE_TOOLS]{% endif %}")
    assert not template_supports_tools("{{ messages }} <tool_call>")
    assert not template_supports_tools(None)
