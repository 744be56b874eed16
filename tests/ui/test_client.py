import asyncio

import pytest

from ui.answer import Answer, Question, answer_together
from ui.api_types import ApiError, ModelCard, Piece, Sampling
from ui.client import Client


def question(text, model="guanaco"):
    messages = [{"role": "user", "content": text}]
    return Question(model=model, messages=messages, sampling=Sampling())


async def collect(stream):
    return [piece async for piece in stream]


async def ask(served_api, text, model="guanaco"):
    answer = Answer(model=model)
    asked = [question(text, model)]
    num_draws = 0
    async for _ in answer_together(Client(served_api.url), asked, [answer], asyncio.Event()):
        num_draws += 1
    return answer, num_draws


@pytest.mark.usefixtures("api")
async def test_models_come_base_first_and_with_generations(served_api):
    cards = await Client(served_api.url + "/").models(None)
    assert cards == [
        ModelCard(name="herd-demo", max_model_len=512),
        ModelCard(name="guanaco", parent="herd-demo", max_model_len=512, generation=3),
        ModelCard(name="pirate", parent="herd-demo", max_model_len=512, generation=3),
    ]
    assert [card.title for card in cards] == [
        "herd-demo (base)",
        "guanaco · gen 3",
        "pirate · gen 3",
    ]


async def test_a_key_is_sent_with_each_call_and_kept_by_none(api, served_api):
    api.required_key = "secret"
    client = Client(served_api.url)
    assert await client.models("secret")
    for key in (None, "wrong", "schlüssel\n"):
        with pytest.raises(ApiError) as refusal:
            await client.models(key)
        assert refusal.value.wants_key and refusal.value.code == "invalid_api_key"


async def test_health_says_why_requests_are_not_taken(api, served_api):
    client = Client(served_api.url)
    assert await client.why_not_ready() is None
    api.is_ready = False
    assert "being loaded" in await client.why_not_ready()


@pytest.mark.usefixtures("api")
async def test_a_chat_streams_pieces_then_the_count(served_api):
    messages = [{"role": "user", "content": "hi"}]
    pieces = await collect(Client(served_api.url).chat("guanaco", messages, Sampling(), None))
    assert pieces[0] == Piece(generation=4)
    assert "".join(piece.text for piece in pieces) == "guanaco says: hi"
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]
    assert pieces[-1].num_tokens == 3


async def test_nobody_there_is_an_error_that_names_the_address():
    client = Client("http://127.0.0.1:9")
    with pytest.raises(ApiError, match=r"No server answers at http://127.0.0.1:9"):
        await client.why_not_ready()
    with pytest.raises(ApiError, match="No server answers"):
        await collect(client.complete("guanaco", "x", Sampling(), None))


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("fail", "engine_restarting", r"restarting\. \(Try again in 2 s\.\)"),
        ("long", "context_length_exceeded", "holds 512"),
        ("break", "engine_restarting", "worker died"),
        ("cut", None, "ended in the middle"),
        ("garbage", None, "not JSON"),
    ],
)
async def test_every_failure_becomes_the_answers_error(served_api, text, code, message):
    answer, _ = await ask(served_api, text)
    assert answer.is_done and not answer.is_stopped
    assert answer.error is not None and answer.error.code == code
    with pytest.raises(ApiError, match=message):
        raise answer.error


async def test_without_chat_template_the_last_message_is_continued(api, served_api):
    answer, _ = await ask(served_api, "Once", model="herd-demo")
    assert (answer.text, answer.is_continuation, answer.error) == ("and so on", True, None)
    assert api.bodies[-1]["prompt"] == "Once"


@pytest.mark.usefixtures("api")
async def test_a_burst_of_pieces_is_drawn_few_times(served_api):
    answer, num_draws = await ask(served_api, "burst")
    assert answer.num_pieces == 2000
    assert num_draws < 200


@pytest.mark.parametrize("how", ["stop", "close"])
async def test_an_answer_that_nobody_wants_closes_its_connection(api, served_api, how):
    answers = [Answer(model="guanaco"), Answer(model="pirate")]
    questions = [question("slow"), question("slow", "pirate")]
    stop = asyncio.Event()
    drawing = answer_together(Client(served_api.url), questions, answers, stop)
    async for _ in drawing:
        if all(answer.text for answer in answers):
            if how == "close":
                await drawing.aclose()
            stop.set()
    assert all(answer.is_stopped and answer.text and answer.error is None for answer in answers)
    async with asyncio.timeout(10):
        while api.num_disconnects < 2:
            await asyncio.sleep(0.02)


def test_unset_seeds_are_left_out_of_the_body():
    assert "seed" not in Sampling().fields()
    assert Sampling(seed=0).fields()["seed"] == 0
