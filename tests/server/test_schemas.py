"""What a body may say: everything else is refused by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import ApiError
from server.limits import parse
from server.routes.adapters import LoadAdapterRequest
from server.schemas import ChatCompletionRequest, CompletionRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}


def refusal(body, model=ChatCompletionRequest) -> ApiError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as caught:
        parse(model, raw)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "f"}]), ("function_call", "auto"), ("audio", {"voice": "x"}),
        ("prediction", {"type": "content", "content": "x"}), ("web_search_options", {}),
        ("reasoning_effort", "high"), ("store", True), ("modalities", ["text", "audio"]),
        ("service_tier", "priority"), ("verbosity", "low"),
        ("stream_options", {"include_obfuscation": True}),
    ],
)  # fmt: skip
def test_what_openai_knows_and_herd_cannot_do_is_refused_by_name(name, value):
    error = refusal({**CHAT, "stream": True, name: value})
    assert error.param is not None and error.param.startswith(name)
    assert error.code == "unsupported_parameter"
    assert "support" in error.message or "only" in error.message


def test_suffix_is_refused_with_the_reason():
    error = refusal({**COMPLETION, "suffix": "end"}, CompletionRequest)
    assert (error.param, error.code) == ("suffix", "unsupported_parameter")
    assert "gap" in error.message


@pytest.mark.parametrize(
    "extra",
    [
        {"store": False}, {"service_tier": "auto"}, {"prompt_cache_key": "k"}, {"user": "u"},
        {"safety_identifier": "s"}, {"metadata": {"a": "b"}}, {"modalities": ["text"]},
        {"functions": None, "audio": None, "prediction": None},
        {"temperature": None, "stop": None, "tools": None}, {"reasoning_effort": "none"},
        {"response_format": {"type": "text"}}, {"tools": []}, {"seed": -5}, {"top_k": -1},
    ],
)  # fmt: skip
def test_what_asks_nothing_of_us_is_accepted(extra):
    parse(ChatCompletionRequest, json.dumps({**CHAT, **extra}).encode())


def test_unknown_parameters_are_named_at_any_depth():
    assert refusal({**CHAT, "tempreature": 1}).param == "tempreature"
    message = {"role": "user", "content": "x", "colour": 1}
    error = refusal({**CHAT, "messages": [message]})
    assert (error.param, error.code) == ("messages[0].colour", "unknown_parameter")
    assert "colour" in error.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.1), ("temperature", -0.1), ("temperature", "1"), ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2), ("min_p", 1.5), ("presence_penalty", 3), ("frequency_penalty", -3),
        ("repetition_penalty", 0), ("n", 0), ("n", 129), ("n", True), ("max_tokens", 0),
        ("max_completion_tokens", 0), ("max_tokens", 1.5), ("min_tokens", -1), ("seed", 2**63),
        ("seed", 1.5), ("stop", 5), ("stop", ["a"] * 17), ("stop", ""), ("stop_token_ids", [-1]),
        ("logit_bias", {"a": 1}), ("logit_bias", {"1": 101}), ("logprobs", 3), ("top_logprobs", 21),
        ("priority", "high"), ("lora_scale", 11), ("user", 5), ("metadata", {"a": 1}),
        ("stream", "yes"),
        ("messages", []), ("messages", "hi"), ("model", 5), ("chat_template_kwargs", []),
        ("response_format", {"type": "xml"}), ("response_format", {"type": "json_schema"}),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(name, value):
    error = refusal({**CHAT, name: value})
    assert error.param is not None and error.param.startswith(name)
    assert error.code == "invalid_value"


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ],
)
def test_contradictions_name_the_parameter(extra, param):
    assert refusal({**CHAT, **extra}).param == param


def test_arms_of_a_union_that_complain_alike_are_said_once():
    message = refusal({"model": "x", "prompt": None}, CompletionRequest).message
    assert message.count("valid array") == 1


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_content_parts_that_are_no_text_are_refused(kind):
    parts = [{"type": "text", "text": "look"}, {"type": kind, kind: {"url": "data:"}}]
    error = refusal({**CHAT, "messages": [{"role": "user", "content": parts}]})
    assert (error.param, error.code) == ("messages[0].content[1]", "unsupported_content")
    assert "text only" in error.message


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {**CHAT, "messages": [{"role": "user", "content": parts}]}
    request = parse(ChatCompletionRequest, json.dumps(body).encode())
    assert request.messages[0].text() == "a\nb"


def test_what_the_openai_client_sends_back_is_accepted():
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = {
        "role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None,
        "function_call": None, "tool_calls": [call],
    }  # fmt: skip
    result = {"role": "tool", "tool_call_id": "call_1", "content": "5"}
    parse(ChatCompletionRequest, json.dumps({**CHAT, "messages": [answer, result]}).encode())


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"}, {"role": "robot", "content": "x"}, {"role": "assistant", "content": None},
        {"role": "tool", "content": "x"}, {"role": "user", "content": "x", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}]},
    ],
)  # fmt: skip
def test_incomplete_messages_are_refused(message):
    assert refusal({**CHAT, "messages": [message]}).param.startswith("messages[0]")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]),
        ("", [""]),
    ],
)  # fmt: skip
def test_prompts_of_every_shape(prompt, expected):
    body = parse(CompletionRequest, json.dumps({"model": "m", "prompt": prompt}).encode())
    assert body.prompts() == expected


@pytest.mark.parametrize("prompt", [[], [1, "a"], 5, {"a": 1}, [-1], [[1.5]], None])
def test_prompts_of_no_shape(prompt):
    assert refusal({"model": "m", "prompt": prompt}, CompletionRequest).param.startswith("prompt")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[1]", b"nul", b"\xff\xfe", b'{"model": "\xff"}', b'{"model": "\\ud800"}',
        b'{"model": "m", "messages": ' + b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b'{"model": "m", "messages": 1e999}',
        b'{"model": "m", "seed": ' + b"9" * 100_000 + b"}", b"\x00", b'"' + b"a" * 1000,
    ],
)  # fmt: skip
def test_bodies_that_are_no_json_or_no_object(body):
    refusal(body)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_numbers_that_are_none_are_refused(number):
    body = json.dumps(CHAT).encode()[:-1] + b', "temperature": ' + number + b"}"
    assert refusal(body).param == "temperature"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = [*ChatCompletionRequest.model_fields, "suffix", "nonsense"]


@given(extra=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3))
def test_any_values_are_accepted_or_refused_but_never_crash(extra):
    for model, base in ((ChatCompletionRequest, CHAT), (CompletionRequest, COMPLETION)):
        try:
            parse(model, json.dumps({**base, **extra}).encode())
        except ApiError as error:
            assert error.status == 400
            assert error.message


@given(st.binary(max_size=200))
def test_any_bytes_are_accepted_or_refused_but_never_crash(raw):
    refusal(raw)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", "é", "-a", "x" * 129])
def test_adapter_names_are_plain(name):
    error = refusal({"lora_name": name, "lora_path": "x"}, LoadAdapterRequest)
    assert error.param == "lora_name"
