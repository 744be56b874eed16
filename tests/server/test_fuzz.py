"""Well-formed JSON of any content never makes a 5xx."""

import asyncio
import json

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from server.app import create_app
from tests.server.fake_engine import FakeEngine, build_state

TEXT = st.text(max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-2, 2) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
KEYWORDS = st.sampled_from(["type", "properties", "items", "enum", "anyOf", "$ref", "pattern", "x"])
TYPES = st.sampled_from(["object", "array", "string", "integer", "null", "any"])
SCHEMA = st.recursive(
    st.fixed_dictionaries({"type": TYPES}) | JSON,
    lambda inner: st.dictionaries(
        KEYWORDS, inner | st.dictionaries(TEXT, inner, max_size=2), max_size=3
    ),
    max_leaves=6,
)
FUNCTION = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "g"]) | TEXT}, optional={"parameters": SCHEMA, "strict": JSON}
)
TOOL = st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION}) | JSON
CHOICE = (
    st.sampled_from(["none", "auto", "required"])
    | st.fixed_dictionaries({"type": st.just("function"), "function": st.just({"name": "f"})})
    | JSON
)
CALL = st.fixed_dictionaries(
    {
        "id": TEXT,
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": TEXT, "arguments": TEXT | JSON.map(json.dumps)}),
    }
)
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}), max_size=2)
MESSAGE = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user"]), "content": TEXT | PARTS},
        optional={"name": TEXT},
    ),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": TEXT},
        optional={"tool_calls": st.lists(CALL, max_size=2), "reasoning": TEXT},
    ),
    st.fixed_dictionaries({"role": st.just("tool"), "content": TEXT, "tool_call_id": TEXT}),
)
FORMAT = st.fixed_dictionaries(
    {"type": st.just("json_schema")},
    optional={
        "json_schema": st.fixed_dictionaries({"name": st.just("n")}, optional={"schema": SCHEMA})
    },
)
BODY = st.fixed_dictionaries(
    {"model": st.just("base"), "messages": st.lists(MESSAGE, min_size=1, max_size=3)},
    optional={
        "tools": st.lists(TOOL, max_size=2),
        "tool_choice": CHOICE,
        "parallel_tool_calls": st.booleans(),
        "response_format": FORMAT | JSON,
        "guided_regex": st.text(alphabet="ab(*)[]\\+?{}1,", max_size=8),
        "guided_grammar": st.just("start: ") | TEXT,
        "guided_json": SCHEMA,
        "chat_template_kwargs": st.dictionaries(TEXT, JSON, max_size=2),
        "continue_final_message": st.booleans(),
        "add_generation_prompt": st.booleans(),
        "stop": st.lists(st.text(min_size=1, max_size=4), max_size=3),
        "logit_bias": st.dictionaries(
            st.integers(0, 400).map(str), st.floats(-100, 100), max_size=2
        ),
        "stream": st.booleans(),
        "n": st.integers(1, 3),
        "max_tokens": st.integers(1, 5),
        "min_tokens": st.integers(0, 5),
    },
)
STATE = build_state(FakeEngine(max_model_len=100_000))
APP = create_app(STATE)


async def post(body: object) -> httpx.Response:
    transport = httpx.ASGITransport(app=APP)  # exceptions of the app are raised here
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.post("/v1/chat/completions", json=body)


@settings(max_examples=300, deadline=None)
@given(body=BODY)
def test_no_chat_request_makes_a_5xx(body):
    response = asyncio.run(post(body))
    assert response.status_code in (200, 400), (response.text, json.dumps(body))
    if response.status_code == 400:
        error = response.json()["error"]
        assert error["message"]
        assert isinstance(error["code"], str)
    assert STATE.num_sequences == 0


def test_a_panic_inside_the_grammar_library_is_a_400():
    """llguidance 1.9.1 cuts long values in its messages between two bytes of one character."""
    fields = {"model": "base", "messages": [{"role": "user", "content": "x"}]}
    for pad in range(4):
        schema = {"$ref": {"x" * (80 + pad): "\U000bea82" * 20}, "type": "object"}
        response = asyncio.run(post(fields | {"guided_json": schema}))
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "invalid_grammar"
