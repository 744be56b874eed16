"""POST /v1/chat/completions over a scripted engine."""

import asyncio
import dataclasses
import json

import pytest

from server.app import create_app
from tests.server.fake_engine import add_adapter

USER = [{"role": "user", "content": "hi"}]
URL = "/v1/chat/completions"


def ask(**fields):
    return {"model": "base", "messages": USER, **fields}


def events(response) -> list:
    """The events of a stream, parsed; the last is [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block[6:]) for block in blocks[:-1]]


def streamed_texts(chunks, num_choices=1) -> list[str]:
    texts = [""] * num_choices
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    return texts


async def test_answers_in_openais_shape(client):
    answer = (await client.post(URL, json=ask())).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "base"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello, wörld!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    num_prompt = len(b"<user>hi\n<assistant>")
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 15,
        "total_tokens": num_prompt + 15,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def test_stream_has_role_text_end_and_done(client):
    chunks = events(await client.post(URL, json=ask(stream=True)))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert streamed_texts(chunks) == ["Hello, wörld!"]
    last = chunks[-1]["choices"][0]
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


async def test_usage_comes_last_when_asked_for(client):
    body = ask(stream=True, stream_options={"include_usage": True})
    chunks = events(await client.post(URL, json=body))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 15
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"n": 3}, {"max_tokens": 8}, {"stop": "wör"}, {"stop": ["!", "o, w"]}, {"stop": "zzz"},
        {"stop_token_ids": [ord("w")]}, {"ignore_eos": True, "max_tokens": 9}, {"stop": "ö"},
    ],
)  # fmt: skip
async def test_streamed_text_is_the_plain_text(client, fields):
    plain = (await client.post(URL, json=ask(**fields))).json()
    chunks = events(await client.post(URL, json=ask(stream=True, **fields)))
    num = fields.get("n", 1)
    assert streamed_texts(chunks, num) == [c["message"]["content"] for c in plain["choices"]]
    reasons = {
        choice["index"]: (choice["finish_reason"], choice["stop_reason"])
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["finish_reason"]
    }
    assert list(reasons.values()) == [
        (c["finish_reason"], c["stop_reason"]) for c in plain["choices"]
    ]


async def test_a_stop_string_ends_the_text_and_the_engines_work(client, engine):
    answer = (await client.post(URL, json=ask(stop=["lo, w", "zz"]))).json()
    choice = answer["choices"][0]
    assert choice["message"]["content"] == "Hel"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "lo, w")
    assert answer["usage"]["completion_tokens"] == 8
    assert engine.cancelled == [engine.requests[0].request_id]


async def test_a_stop_string_never_leaks_into_a_stream(client):
    chunks = events(await client.post(URL, json=ask(stream=True, stop="wörld", logprobs=True)))
    assert streamed_texts(chunks) == ["Hello, "]
    tokens = [
        token["token"]
        for chunk in chunks
        for choice in chunk["choices"]
        for token in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert "".join(tokens) == "Hello, "


async def test_an_unlucky_beginning_of_a_stop_string_is_given_back_at_the_end(client):
    answer = (await client.post(URL, json=ask(stop="!!"))).json()
    assert answer["choices"][0]["message"]["content"] == "Hello, wörld!"


async def test_length_is_the_reason_when_tokens_run_out(client):
    choice = (await client.post(URL, json=ask(max_tokens=3))).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hel", "length")


async def test_a_character_cut_by_the_limit_is_replaced(client):
    choice = (await client.post(URL, json=ask(max_tokens=9))).json()["choices"][0]
    assert choice["message"]["content"] == "Hello, w\ufffd"


async def test_the_newer_name_of_max_tokens_wins(client, engine):
    await client.post(URL, json=ask(max_tokens=50, max_completion_tokens=4))
    assert engine.requests[0].params.max_tokens == 4


async def test_max_tokens_is_clamped_to_what_fits(client, engine):
    num_prompt = len(b"<user>hi\n<assistant>")
    for asked in (None, 10_000):
        await client.post(URL, json=ask(max_tokens=asked))
        assert engine.requests[-1].params.max_tokens == engine.max_model_len - num_prompt


async def test_a_prompt_that_is_too_long_is_refused(client, engine):
    for stream in (False, True):
        body = ask(messages=[{"role": "user", "content": "x" * 600}], stream=stream)
        response = await client.post(URL, json=body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == "messages"
        assert "512" in error["message"]
    assert engine.requests == []


async def test_a_text_that_cannot_fit_is_not_even_tokenised(client, state):
    def never(text, add_special_tokens):
        raise AssertionError((text[:10], add_special_tokens))

    state.tokenizer = dataclasses.replace(state.tokenizer, encode_text=never)
    long = "x" * (2 * 4 * 512 + 1)
    for url, body, param in (
        (URL, ask(messages=[{"role": "user", "content": long}]), "messages"),
        ("/v1/completions", {"model": "base", "prompt": long}, "prompt"),
    ):
        error = (await client.post(url, json=body)).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)


async def test_choices_of_a_seeded_request_have_seeds_in_a_row(client, engine):
    await client.post(URL, json=ask(n=3, seed=40))
    assert sorted(request.params.seed for request in engine.requests) == [40, 41, 42]


async def test_choices_come_in_order(client, engine):
    engine.answer = lambda request: f"seed {request.params.seed}"
    answer = (await client.post(URL, json=ask(n=3, seed=1))).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == ["seed 1", "seed 2", "seed 3"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]


async def test_best_of_keeps_the_likeliest_by_mean(client, engine):
    engine.answer = lambda request: f"seed {request.params.seed}"
    engine.logprob = lambda request, position: -abs(request.params.seed - 2)  # noqa: ARG005
    answer = (await client.post(URL, json=ask(n=2, best_of=4, seed=1))).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts[0] == "seed 2"
    assert texts[1] in ("seed 1", "seed 3")
    assert answer["choices"][0]["logprobs"] is None  # they were not asked for
    assert answer["usage"]["completion_tokens"] == 4 * 7  # all that was generated


async def test_logprobs_have_bytes_that_add_up_to_the_text(client):
    body = ask(logprobs=True, top_logprobs=2)
    content = (await client.post(URL, json=body)).json()["choices"][0]["logprobs"]["content"]
    raw = bytes(byte for entry in content for byte in entry["bytes"])
    assert raw.decode() == "Hello, wörld!"
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert content[0]["token"] == "H"
    assert content[0]["logprob"] == -0.5


async def test_minus_infinity_is_a_number_that_json_has(client, engine):
    engine.logprob = lambda request, position: float("-inf")  # noqa: ARG005
    body = ask(logprobs=True)
    content = (await client.post(URL, json=body)).json()["choices"][0]["logprobs"]["content"]
    assert content[0]["logprob"] == -9999.0


async def test_an_adapter_is_chosen_by_name_and_its_generation_told(client, engine, state):
    add_adapter(state, "ada")
    ref = add_adapter(state, "ada")
    response = await client.post(URL, json=ask(model="ada", lora_scale=0.5, priority=-3))
    assert engine.requests[0].adapter == ref
    assert (engine.requests[0].lora_scale, engine.requests[0].priority) == (0.5, -3)
    assert response.headers["x-herd-adapter-generation"] == "2"
    assert response.json()["system_fingerprint"].endswith("_ada_g2")
    base = await client.post(URL, json=ask())
    assert "x-herd-adapter-generation" not in base.headers


async def test_a_scale_without_an_adapter_is_refused(client, engine):
    for url, body in ((URL, ask(lora_scale=0.5)), ("/v1/completions", {"prompt": "x"})):
        response = await client.post(url, json={**body, "model": "base", "lora_scale": 0.5})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "lora_scale")
    assert engine.requests == []


async def test_an_unknown_model_is_never_the_base(client, engine):
    for model in ("nope", "", "base ", "x" * 10_000):
        response = await client.post(URL, json=ask(model=model))
        assert response.status_code == 404
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert error["type"] == "invalid_request_error"
    assert engine.requests == []


async def test_requests_in_flight_finish_on_their_generation(client, engine, state):
    old = add_adapter(state, "ada")
    engine.gate = asyncio.Event()
    running = asyncio.ensure_future(client.post(URL, json=ask(model="ada")))
    while not engine.requests:
        await asyncio.sleep(0.01)
    new = add_adapter(state, "ada")
    engine.gate.set()
    response = await running
    assert response.headers["x-herd-adapter-generation"] == str(old.generation)
    assert engine.requests[0].adapter == old
    await client.post(URL, json=ask(model="ada"))
    assert engine.requests[1].adapter == new
    assert state.registry.resolve("ada").num_running == 0


async def test_guanaco_adapters_get_their_template_and_stop_string(client, engine, state):
    add_adapter(state, "guanaco-7b", is_guanaco=True)
    engine.answer = lambda request: "Fine.\n### Human: and you?"  # noqa: ARG005
    answer = (await client.post(URL, json=ask(model="guanaco-7b"))).json()
    assert answer["choices"][0]["message"]["content"] == "Fine."
    assert answer["choices"][0]["finish_reason"] == "stop"
    prompt = engine.requests[0].prompt_token_ids
    assert prompt[0] == 256  # the tokenizer's own <s>
    assert bytes(prompt[1:]).decode().endswith("questions. ### Human: hi### Assistant:")


async def test_without_any_template_the_answer_says_what_to_do(client, state):
    state.tokenizer = dataclasses.replace(state.tokenizer, chat_template=None)
    response = await client.post(URL, json=ask())
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "no_chat_template"
    assert "--chat-template" in error["message"]
    assert "/v1/completions" in error["message"]


async def test_continue_final_message_goes_on_where_it_ends(client, engine):
    messages = [*USER, {"role": "assistant", "content": "Well, "}]
    body = ask(messages=messages, continue_final_message=True)
    assert (await client.post(URL, json=body)).status_code == 200
    assert bytes(engine.requests[0].prompt_token_ids) == b"<user>hi\n<assistant>Well, "


async def test_without_generation_prompt(client, engine):
    await client.post(URL, json=ask(add_generation_prompt=False))
    assert bytes(engine.requests[0].prompt_token_ids) == b"<user>hi\n"


async def test_roles_and_parts_reach_the_template(client, engine):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    await client.post(URL, json=ask(messages=messages))
    assert (
        bytes(engine.requests[0].prompt_token_ids) == b"<system>Be brief.\n<user>a\nb\n<assistant>"
    )


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "object"}},
                }
            },
            "json_schema",
        ),
        ({"guided_regex": "[ab]+"}, "regex"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "lark"),
    ],
)
async def test_formats_reach_the_engine_as_grammars(client, engine, fields, kind):
    assert (await client.post(URL, json=ask(**fields))).status_code == 200
    assert engine.requests[0].params.grammar.kind == kind


async def test_a_grammar_that_cannot_be_is_a_400(client, engine):
    response = await client.post(URL, json=ask(guided_regex="(unclosed"))
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_grammar", "guided_regex")
    assert engine.requests == []


TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"x": {}}}},
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'


async def test_tool_calls_are_parsed_and_streamed(client, engine):
    engine.max_model_len = 4096  # the tools are described in the prompt
    engine.answer = lambda request: "Let me see. " + CALL  # noqa: ARG005
    plain = (await client.post(URL, json=ask(tools=[TOOL]))).json()["choices"][0]
    assert plain["finish_reason"] == "tool_calls"
    call = plain["message"]["tool_calls"][0]
    assert (call["type"], call["function"]["name"]) == ("function", "add")
    assert json.loads(call["function"]["arguments"]) == {"x": 1}

    chunks = events(await client.post(URL, json=ask(tools=[TOOL], stream=True)))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    arguments = "".join(
        part["function"].get("arguments", "")
        for delta in deltas
        for part in delta.get("tool_calls", [])
    )
    assert json.loads(arguments) == {"x": 1}
    assert streamed_texts(chunks)[0] == (plain["message"]["content"] or "")
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_calls_marked_by_control_tokens_are_seen(client, engine, state):
    """As a tokenizer has them that declares <tool_call> special."""
    tokenizer = state.tokenizer
    marks = (b"<tool_call>", b"</tool_call>")
    state.tokenizer = dataclasses.replace(
        tokenizer,
        token_bytes=(*tokenizer.token_bytes, *marks),
        special_ids=tokenizer.special_ids | {258, 259},
        vocab_size=260,
    )
    engine.max_model_len = 4096
    body = b'{"name": "add", "arguments": {"x": 1}}'
    engine.answer = lambda request: [258, *body, 259]  # noqa: ARG005
    choice = (await client.post(URL, json=ask(tools=[TOOL]))).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "add"


async def test_required_tools_are_a_grammar(client, engine):
    engine.max_model_len = 4096
    engine.answer = lambda request: CALL  # noqa: ARG005
    answer = (await client.post(URL, json=ask(tools=[TOOL], tool_choice="required"))).json()
    assert engine.requests[0].params.grammar is not None
    assert answer["choices"][0]["message"]["content"] is None


async def test_a_tool_choice_that_is_not_there_is_refused(client):
    choice = {"type": "function", "function": {"name": "subtract"}}
    response = await client.post(URL, json=ask(tools=[TOOL], tool_choice=choice))
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("tool_choice")


async def test_an_error_before_the_first_token_has_its_own_status(client, engine):
    engine.fail_after = 0
    for stream in (False, True):
        response = await client.post(URL, json=ask(stream=stream))
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_restarting"
        assert response.headers["retry-after"]


async def test_an_error_in_mid_stream_is_the_last_event(client, engine):
    engine.fail_after = 5
    response = await client.post(URL, json=ask(stream=True))
    assert response.status_code == 200
    blocks = [json.loads(block[6:]) for block in response.text.strip().split("\n\n")]
    assert blocks[-1]["error"]["code"] == "engine_restarting"
    assert streamed_texts(blocks[:-1]) == ["Hello"]


async def test_one_failing_choice_ends_the_others(client, engine, state):
    engine.fail_after = 2
    response = await client.post(URL, json=ask(n=3))
    assert response.status_code == 503
    assert len(engine.finished) + len(engine.cancelled) == 3
    assert state.num_sequences == 0


async def test_a_fault_of_ours_tells_nothing_of_the_inside(client, engine, state):
    def broken(request):  # noqa: ARG001
        raise ZeroDivisionError("secret")

    engine.answer = broken
    response = await client.post(URL, json=ask())
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert state.num_sequences == 0


async def test_the_queue_is_limited(client, engine, state):
    object.__setattr__(state.config, "max_queued_requests", 2)  # 4 run, 2 wait
    engine.gate = asyncio.Event()
    running = [asyncio.ensure_future(client.post(URL, json=ask(n=3))) for _ in range(2)]
    while len(engine.requests) < 6:
        await asyncio.sleep(0.01)
    refused = await client.post(URL, json=ask(stream=True))
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "queue_full"
    assert refused.headers["retry-after"]
    engine.gate.set()
    assert [(await task).status_code for task in running] == [200, 200]
    assert (await client.post(URL, json=ask())).status_code == 200


@pytest.mark.parametrize(
    ("engine_state", "code"),
    [
        ("loading", "engine_loading"),
        ("restarting", "engine_restarting"),
        ("failed", "engine_stopped"),
    ],
)
async def test_nothing_is_taken_until_the_engine_is_ready(client, engine, engine_state, code):
    engine.state = engine_state
    for response in (await client.post(URL, json=ask()), await client.get("/health")):
        assert response.status_code == 503
        assert response.json()["error"]["code"] == code


async def test_draining_finishes_what_runs_and_takes_no_more(client, engine, state):
    engine.gate = asyncio.Event()
    running = asyncio.ensure_future(client.post(URL, json=ask()))
    while not engine.requests:
        await asyncio.sleep(0.01)
    draining = asyncio.ensure_future(state.drain(30.0))
    await asyncio.sleep(0.01)
    refused = await client.post(URL, json=ask())
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert (await client.get("/health")).status_code == 503
    engine.gate.set()
    assert (await running).status_code == 200
    assert await draining


async def test_what_does_not_finish_in_time_ends_with_an_error(client, engine, state):
    engine.gate = asyncio.Event()
    running = asyncio.ensure_future(client.post(URL, json=ask()))
    while not engine.requests:
        await asyncio.sleep(0.01)
    assert not await state.drain(0.05)
    assert (await running).status_code == 503


def test_apps_are_independent_of_each_other(state):
    from tests.server.fake_engine import build_state

    create_app(state)
    create_app(build_state())
