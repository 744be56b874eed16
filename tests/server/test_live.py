"""Real sockets: the openai client, disconnects, pings, bodies that no well-behaved client sends."""

import asyncio
import json
import shutil
import subprocess
import threading

import httpx
import openai
import pytest

from tests.server.fake_engine import FakeEngine, add_adapter, build_state
from tests.server.live import connect, read_answer, request_bytes, serving, wait_until

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def state():
    return build_state(api_key=("secret",), max_request_bytes=100_000)


@pytest.fixture
def port(state):
    with serving(state) as port:
        yield port


@pytest.fixture
def open_state():
    return build_state(sse_ping_interval_s=0.05, max_request_bytes=100_000)


@pytest.fixture
def open_port(open_state):
    with serving(open_state) as port:
        yield port


@pytest.fixture
def client(port):
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0
    ) as c:
        yield c


# --- the openai client ---


def test_openai_client_chats(client):
    answer = client.chat.completions.create(
        model="base", messages=USER, logprobs=True, top_logprobs=1
    )
    assert answer.choices[0].message.content == "Hello, wörld!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 15
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.choices[0].logprobs.content[0].token == "H"


def test_openai_client_streams(client):
    stream = client.chat.completions.create(
        model="base", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello, wörld!"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 15


def test_openai_clients_own_stream_helper_understands_us(client):
    with client.chat.completions.stream(model="base", messages=USER) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Hello, wörld!"


def test_openai_client_completes(client):
    answer = client.completions.create(model="base", prompt=["a", "b"], echo=True, logprobs=1)
    assert [choice.text for choice in answer.choices] == ["aHello, wörld!", "bHello, wörld!"]
    assert answer.choices[0].logprobs.tokens[:2] == ["<s>", "a"]
    stream = client.completions.create(model="base", prompt="a", stream=True, max_tokens=5)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello"


def test_openai_client_lists_and_retrieves_models(client, state):
    add_adapter(state, "ada")
    assert [model.id for model in client.models.list()] == ["base", "ada"]
    assert client.models.retrieve("ada").parent == "base"
    assert client.models.delete("ada").deleted


def test_openai_client_uses_tools(client, state):
    state.engine.max_model_len = 4096
    state.engine.answer = lambda request: (  # noqa: ARG005
        '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
    )
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    answer = client.chat.completions.create(
        model="base", messages=USER, tools=[tool], tool_choice="required"
    )
    message = answer.choices[0].message
    assert message.tool_calls[0].function.name == "add"
    # What the client got it may send back.
    reply = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "2"}
    history = [*USER, message.model_dump(), reply]
    assert client.chat.completions.create(model="base", messages=history, tools=[tool]).choices


@pytest.mark.parametrize(
    ("fields", "error", "code"),
    [
        ({"model": "nope"}, openai.NotFoundError, "model_not_found"),
        ({"temperature": 5}, openai.BadRequestError, "invalid_value"),
        ({"extra_body": {"nonsense": 1}}, openai.BadRequestError, "unknown_parameter"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, openai.BadRequestError,
         "context_length_exceeded"),
    ],
)  # fmt: skip
def test_openai_client_reads_our_errors(client, fields, error, code):
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": "base", "messages": USER, **fields})
    assert caught.value.code == code
    assert caught.value.type == "invalid_request_error"


def test_openai_client_reads_errors_of_keys_and_of_streams(client, port, state):
    stranger = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="no")
    with stranger, pytest.raises(openai.AuthenticationError) as caught:
        stranger.models.list()
    assert caught.value.code == "invalid_api_key"
    state.engine.fail_after = 4
    stream = client.chat.completions.create(model="base", messages=USER, stream=True)
    with pytest.raises(openai.APIError) as broken:
        list(stream)
    assert broken.value.code == "engine_restarting"


def test_curl_chats(port):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = json.dumps({"model": "base", "messages": USER, "stream": True})
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    command = ["curl", "-sN", url, "-H", "Authorization: Bearer secret", "-d", body]
    out = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    assert out.endswith("data: [DONE]\n\n")


# --- clients that go away ---


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 3])
@pytest.mark.parametrize("fields", [{}, {"n": 2}])
def test_a_disconnect_frees_the_request(open_port, open_state, stream, num_tokens, fields):
    engine = open_state.engine
    engine.gate, engine.tokens_before_gate = asyncio.Event(), num_tokens
    add_adapter(open_state, "ada")
    body = {"model": "ada", "messages": USER, "stream": stream, **fields}
    connection = connect(open_port)
    connection.sendall(request_bytes("/v1/chat/completions", json.dumps(body).encode()))
    num = fields.get("n", 1)
    wait_until(lambda: len(engine.requests) == num)
    if stream and num_tokens:
        assert connection.recv(10)
    connection.close()
    wait_until(lambda: len(engine.cancelled) == num)
    wait_until(lambda: open_state.num_sequences == 0)
    assert open_state.registry.resolve("ada").num_running == 0
    assert engine.finished == []


def test_a_disconnect_frees_completions_and_scores(open_port, open_state):
    engine = open_state.engine
    add_adapter(open_state, "reward", has_score_head=True)
    never = asyncio.Event()
    engine.gate = never
    original = FakeEngine._deltas

    async def waits(request):
        await never.wait()
        async for delta in original(engine, request):
            yield delta

    engine._deltas = waits
    for path, fields in (
        ("/v1/completions", {"model": "base", "prompt": ["a", "b"]}),
        ("/v1/score", {"model": "reward", "input": ["a", "b"]}),
    ):
        engine.requests.clear()
        engine.cancelled.clear()
        connection = connect(open_port)
        connection.sendall(request_bytes(path, json.dumps(fields).encode()))
        wait_until(lambda: len(engine.requests) == 2)
        connection.close()
        wait_until(lambda: len(engine.cancelled) == 2)
        wait_until(lambda: open_state.num_sequences == 0)


def test_a_client_that_ends_normally_cancels_nothing(open_port, open_state):
    body = json.dumps({"model": "base", "messages": USER}).encode()
    with connect(open_port) as connection:
        for _ in range(3):  # one connection, kept alive
            connection.sendall(request_bytes("/v1/chat/completions", body))
            status, answer = read_answer(connection)
            assert (status, answer["choices"][0]["finish_reason"]) == (200, "stop")
    assert len(open_state.engine.finished) == 3
    assert open_state.engine.cancelled == []


def test_a_client_that_leaves_in_the_middle_of_its_body(open_port, open_state):
    connection = connect(open_port)
    connection.sendall(request_bytes("/v1/completions", b"x" * 1000)[:-500])
    connection.close()
    with connect(open_port) as other:
        other.sendall(request_bytes("/health", b"", method="GET"))
        assert read_answer(other)[0] == 200
    assert open_state.num_sequences == 0


def test_silence_is_filled_with_pings(open_port, open_state):
    engine = open_state.engine
    engine.gate, engine.tokens_before_gate = asyncio.Event(), 2
    body = json.dumps({"model": "base", "messages": USER, "stream": True}).encode()
    with connect(open_port) as connection:
        connection.sendall(request_bytes("/v1/chat/completions", body, "Connection: close"))
        received = b""
        while received.count(b": ping\n\n") < 2:
            received += connection.recv(4096)
        assert b'"He"' in received or b'"H"' in received
        engine.gate._loop.call_soon_threadsafe(engine.gate.set)
        while chunk := connection.recv(4096):
            received += chunk
    assert b"data: [DONE]\n\n" in received


def test_a_slow_first_token_does_not_hold_the_headers_back(open_port, open_state):
    engine = open_state.engine
    engine.gate = asyncio.Event()
    body = json.dumps({"model": "base", "messages": USER, "stream": True}).encode()
    with connect(open_port) as connection:
        connection.sendall(request_bytes("/v1/chat/completions", body))
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


# --- bodies ---


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff\xfe\x00", b'{"model": NaN}', b"[" * 90_000, b'{"a":' * 18_000, b"null",
        b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "base", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b'{"model": "base", "prompt": "x", "seed": ' + b"9" * 50_000 + b"}",
        b'{"model": "base", "prompt": "x", "temperature": 1e400}',
        b'{"model": "base", "prompt": [[[[1]]]]}', b'{"model": "' + b"a" * 90_000 + b'"}',
    ],
)  # fmt: skip
def test_no_body_makes_a_5xx(open_port, body):
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/score",
                 "/v1/load_lora_adapter", "/v1/adapters/x/rollback"):  # fmt: skip
        if path.endswith("rollback") and not body:
            continue
        with connect(open_port) as connection:
            connection.sendall(request_bytes(path, body))
            status, answer = read_answer(connection)
        assert status in (400, 404), (path, answer)
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert isinstance(answer["error"]["code"], str)
        assert len(json.dumps(answer)) < 2000


def test_a_body_over_the_limit_is_a_413_announced_or_not(open_port):
    with connect(open_port) as connection:
        head = request_bytes("/v1/completions", b"").replace(b"Length: 0", b"Length: 999999999")
        connection.sendall(head)  # refused before it is sent
        status, answer = read_answer(connection)
        assert (status, answer["error"]["code"]) == (413, "request_too_large")
    with connect(open_port) as connection:
        head = request_bytes("/v1/completions", b"").replace(
            b"Content-Length: 0", b"Transfer-Encoding: chunked"
        )
        connection.sendall(head)
        chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
        for _ in range(4):
            connection.sendall(chunk)
        status, answer = read_answer(connection)
        assert (status, answer["error"]["code"]) == (413, "request_too_large")


def test_a_client_that_sends_all_of_a_refused_body_reads_the_answer(open_port):
    """Closing while it still sends would reset the connection, and the answer would be lost."""
    url = f"http://127.0.0.1:{open_port}/v1/completions"
    big = b" " * 20_000_000
    for body in (big, iter([big])):  # announced, chunked
        answer = httpx.post(url, content=body, timeout=60)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"


def test_a_huge_body_within_the_limit_does_not_stop_the_others(open_port, open_state):
    object.__setattr__(open_state.config, "max_request_bytes", 100_000)
    big = json.dumps({"model": "base", "prompt": "x" * 90_000}).encode()
    answers = []

    def ask(body):
        with connect(open_port) as connection:
            connection.sendall(request_bytes("/v1/completions", body))
            answers.append(read_answer(connection)[0])

    small = json.dumps({"model": "base", "prompt": "x"}).encode()
    threads = [threading.Thread(target=ask, args=(body,)) for body in (big, small, big, small)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200, 200, 400, 400]


def test_garbage_on_the_wire_harms_nobody(open_port):
    for junk in (b"\x00" * 100, b"GET / HTTP/9\r\n\r\n", b"POST\r\n\r\n", b"\x16\x03\x01\x02\x00"):
        with connect(open_port) as connection:
            connection.sendall(junk)
            connection.recv(4096)
    with connect(open_port) as connection:
        connection.sendall(request_bytes("/health", b"", method="GET"))
        assert read_answer(connection)[0] == 200


def test_many_streams_at_once_are_each_complete(open_port):
    body = json.dumps({"model": "base", "messages": USER, "stream": True}).encode()
    connections = [connect(open_port) for _ in range(40)]
    for connection in connections:
        connection.sendall(request_bytes("/v1/chat/completions", body, "Connection: close"))
    for connection in connections:
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        connection.close()
        assert received.count(b'"delta"') == 1 + 13 + 1  # role, 13 characters, end
        assert b"[DONE]" in received
