"""POST /v1/completions over a scripted engine."""

import json

import pytest

URL = "/v1/completions"


def ask(prompt="Once", **fields):
    return {"model": "base", "prompt": prompt, **fields}


def chunks_of(response) -> list:
    blocks = response.text.strip().split("\n\n")
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block[6:]) for block in blocks[:-1]]


async def test_answers_in_openais_shape(client, engine):
    answer = (await client.post(URL, json=ask(max_tokens=5))).json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "text": "Hello",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"]["total_tokens"] == 5 + 5
    assert engine.requests[0].prompt_token_ids == (256, *b"Once")


async def test_the_default_is_sixteen_tokens(client, engine):
    engine.answer = lambda request: "x" * 100  # noqa: ARG005
    answer = (await client.post(URL, json=ask())).json()
    assert answer["choices"][0]["text"] == "x" * 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [(256, 97, 98)]), (["a", "b"], [(256, 97), (256, 98)]), ([97, 98], [(97, 98)]),
        ([[97], [98]], [(97,), (98,)]), ("", [(256,)]),
    ],
)  # fmt: skip
async def test_prompts_of_every_shape(client, engine, prompt, expected):
    answer = (await client.post(URL, json=ask(prompt, n=2))).json()
    assert [request.prompt_token_ids for request in engine.requests] == [
        ids for ids in expected for _ in range(2)
    ]
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(expected)))
    assert answer["usage"]["prompt_tokens"] == sum(
        map(len, expected)
    )  # counted once, not per choice


@pytest.mark.parametrize("prompt", [[258], [[97], [300]]])
async def test_token_ids_that_the_model_has_not_are_refused(client, engine, prompt):
    response = await client.post(URL, json=ask(prompt))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"
    assert engine.requests == []


async def test_without_special_tokens(client, engine):
    await client.post(URL, json=ask(add_special_tokens=False))
    assert engine.requests[0].prompt_token_ids == tuple(b"Once")


@pytest.mark.parametrize("prompt", ["Ön", [*"Ön".encode()]])
async def test_echo_puts_the_prompt_first(client, prompt):
    answer = (await client.post(URL, json=ask(prompt, echo=True, max_tokens=2))).json()
    assert answer["choices"][0]["text"] == "ÖnHe"


async def test_echo_and_logprobs_cover_the_prompt(client):
    body = ask("Ön", echo=True, logprobs=1, max_tokens=2)
    logprobs = (await client.post(URL, json=body)).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["<s>", "bytes:\\xc3", "bytes:\\x96", "n", "H", "e"]
    assert logprobs["token_logprobs"] == [None, -1.0, -1.0, -1.0, -0.5, -0.5]
    assert logprobs["text_offset"] == [0, 0, 0, 1, 2, 3]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][3] == {"n": -1.0}


async def test_scoring_a_prompt_without_generating(client, engine):
    """As evaluation harnesses do it: echo, max_tokens 0, logprobs."""
    body = ask("Once", echo=True, logprobs=0, max_tokens=0)
    answer = (await client.post(URL, json=body)).json()
    choice = answer["choices"][0]
    assert choice["text"] == "Once"
    assert choice["logprobs"]["tokens"] == ["<s>", "O", "n", "c", "e"]
    assert (choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 0)
    assert engine.requests[0].params.prompt_logprobs == 0
    refused = await client.post(URL, json=ask(max_tokens=0))
    assert refused.json()["error"]["param"] == "max_tokens"


async def test_legacy_logprobs_are_parallel_lists(client):
    body = ask(logprobs=2, max_tokens=3)
    logprobs = (await client.post(URL, json=body)).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["H", "e", "l"]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["top_logprobs"][0] == {"H": -0.5, "I": -1.5}


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"n": 2, "max_tokens": 6}, {"echo": True}, {"stop": "ll"},
        {"logprobs": 1, "echo": True}, {"prompt": ["a", "bc"], "n": 2, "echo": True},
        {"max_tokens": 0, "echo": True, "logprobs": 1},
        {"max_tokens": 9, "logprobs": 0},
    ],
)  # fmt: skip
async def test_streamed_is_plain(client, fields):
    body = ask() | fields
    plain = (await client.post(URL, json=body)).json()
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    chunks = chunks_of(await client.post(URL, json=body))
    assert chunks[-1]["choices"] == []
    usage = chunks.pop()["usage"]
    assert usage == plain["usage"]
    for expected in plain["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
        assert "".join(choice["text"] for choice in own) == expected["text"]
        assert own[-1]["finish_reason"] == expected["finish_reason"]
        if expected["logprobs"] is not None:
            for name, values in expected["logprobs"].items():
                assert [x for choice in own for x in choice["logprobs"][name]] == values


async def test_best_of_is_per_prompt(client, engine):
    def answer(request):
        return f"{bytes(request.prompt_token_ids[1:]).decode()}{request.params.seed}"

    engine.answer = answer
    engine.logprob = lambda request, position: -float(request.params.seed)  # noqa: ARG005
    body = ask(["a", "b"], n=1, best_of=3, seed=5)
    answer = (await client.post(URL, json=body)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["a5", "b5"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]


async def test_a_prompt_that_is_too_long_is_refused(client):
    response = await client.post(URL, json=ask("x" * 600, max_tokens=1))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        400,
        "context_length_exceeded",
        "prompt",
    )


async def test_a_response_format_is_a_grammar(client, engine):
    await client.post(URL, json=ask(response_format={"type": "json_object"}))
    assert engine.requests[0].params.grammar.kind == "json_object"
