"""Streams whose client goes away at every possible moment; the generator is always closed."""

import asyncio

import pytest
from starlette.requests import Request

from server.errors import ApiError
from server.streaming import ClientGone, event, open_stream, until_gone

SCOPE = {
    "type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b"",
    "asgi": {"spec_version": "2.3"},
}  # fmt: skip


class Client:
    """The other end of one request: disconnects when told to, keeps what it was sent."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.sent: list[bytes] = []

    async def receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message.get("body", b""))
        await asyncio.sleep(0)

    @property
    def request(self) -> Request:
        return Request(SCOPE, self.receive)

    @property
    def text(self) -> str:
        return b"".join(self.sent).decode()


class Source:
    """A generator of events that tells whether it was closed."""

    def __init__(self, count, *, before=None, error=None, client=None, leave_at=None) -> None:
        self.count, self.before, self.error = count, before, error
        self.client, self.leave_at = client, leave_at
        self.is_closed = False

    async def events(self):
        try:
            for number in range(self.count):
                if self.client is not None and number == self.leave_at:
                    self.client.gone.set()
                if self.before is not None:
                    await self.before.wait()
                yield {"n": number}
                await asyncio.sleep(0)
            if self.error is not None:
                raise self.error
        finally:
            await asyncio.sleep(0)  # closing takes a step, as freeing a request does
            self.is_closed = True


async def settle(source) -> bool:
    for _ in range(50):
        await asyncio.sleep(0)
    return source.is_closed


async def test_events_then_done():
    client, source = Client(), Source(3)
    response = await open_stream(client.request, source.events(), ping_interval_s=10)
    await response(SCOPE, client.receive, client.send)
    assert client.text == "".join(event({"n": n}) for n in range(3)) + "data: [DONE]\n\n"
    assert source.is_closed


async def test_no_events_is_a_stream_of_nothing():
    client, source = Client(), Source(0)
    response = await open_stream(client.request, source.events(), ping_interval_s=10)
    await response(SCOPE, client.receive, client.send)
    assert client.text == "data: [DONE]\n\n"
    assert source.is_closed


@pytest.mark.parametrize("leave_at", range(6))
async def test_a_client_that_leaves_while_an_event_is_made(leave_at):
    client = Client()
    source = Source(6, client=client, leave_at=leave_at)
    try:
        response = await open_stream(client.request, source.events(), ping_interval_s=10)
        await response(SCOPE, client.receive, client.send)
    except ClientGone:
        assert leave_at == 0
    del client
    assert await settle(source)


@pytest.mark.parametrize("num_steps", range(12))
async def test_a_client_that_leaves_between_two_steps_of_the_loop(num_steps):
    client, source = Client(), Source(5)

    async def leave():
        for _ in range(num_steps):
            await asyncio.sleep(0)
        client.gone.set()

    leaving = asyncio.ensure_future(leave())
    try:
        response = await open_stream(client.request, source.events(), ping_interval_s=10)
        await response(SCOPE, client.receive, client.send)
        del response
    except ClientGone:
        pass
    await leaving
    assert await settle(source)


async def test_a_client_that_has_left_before_the_answer_begins():
    client, source = Client(), Source(5)
    response = await open_stream(client.request, source.events(), ping_interval_s=10)
    client.gone.set()
    await asyncio.sleep(0)
    await response(SCOPE, client.receive, client.send)
    del response
    assert await settle(source)


async def test_a_first_event_that_never_comes():
    client, source = Client(), Source(1, before=asyncio.Event())
    response = await open_stream(client.request, source.events(), ping_interval_s=0.01)
    sending = asyncio.ensure_future(response(SCOPE, client.receive, client.send))
    while client.text.count(": ping") < 3:
        await asyncio.sleep(0.005)
    client.gone.set()
    await sending
    assert await settle(source)


async def test_events_that_came_while_the_client_was_slow_go_out_together():
    client, source, may_read = Client(), Source(5), asyncio.Event()

    async def send_slowly(message):
        await may_read.wait()
        await client.send(message)

    response = await open_stream(client.request, source.events(), ping_interval_s=10)
    sending = asyncio.ensure_future(response(SCOPE, client.receive, send_slowly))
    assert await settle(source)  # nobody has read anything yet
    may_read.set()
    await sending
    assert client.text == "".join(event({"n": n}) for n in range(5)) + "data: [DONE]\n\n"
    assert len(client.sent) < 5 + 2  # the start and the end are messages, too


async def test_an_error_comes_after_all_events_before_it():
    client, source = Client(), Source(3, error=ApiError(503, "gone", code="engine_restarting"))
    response = await open_stream(client.request, source.events(), ping_interval_s=10)
    assert await settle(source)
    await response(SCOPE, client.receive, client.send)
    *events, last, end = client.text.split("\n\n")
    assert events == [event({"n": n}).strip() for n in range(3)]
    assert "engine_restarting" in last and end == ""


@pytest.mark.parametrize("is_known", [True, False])
async def test_an_error_in_the_middle_is_the_last_event(is_known):
    error = ApiError(503, "gone", code="engine_restarting") if is_known else KeyError("secret")
    client, source = Client(), Source(1, error=error)
    response = await open_stream(client.request, source.events(), ping_interval_s=10)
    await response(SCOPE, client.receive, client.send)
    assert ("engine_restarting" if is_known else "internal_error") in client.text.split("\n\n")[1]
    assert "secret" not in client.text
    assert "[DONE]" not in client.text
    assert source.is_closed


async def test_an_error_before_the_first_event_is_raised():
    client, source = Client(), Source(0, error=ApiError(503, "gone", code="x"))
    with pytest.raises(ApiError):
        await open_stream(client.request, source.events(), ping_interval_s=10)
    assert source.is_closed


async def test_work_is_cancelled_when_its_client_goes():
    client, cancelled = Client(), []

    async def work():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    asyncio.get_running_loop().call_later(0.01, client.gone.set)
    with pytest.raises(ClientGone):
        await until_gone(client.request, work())
    assert cancelled


async def test_work_that_ends_first_gives_its_result_or_error():
    client = Client()

    async def work(result):
        if isinstance(result, Exception):
            raise result
        return result

    assert await until_gone(client.request, work(5)) == 5
    with pytest.raises(KeyError):
        await until_gone(client.request, work(KeyError("x")))
