"""Feedback: an answer is judged by its id, kept, and becomes a training file."""

import asyncio
import json

import httpx
import openai
import pytest

from server import feedback as feedback_module
from server.app import create_app
from tests.server.fake_engine import add_adapter, build_state

CHAT = "/v1/chat/completions"


def ask(*contents, **fields):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"model": "base", "messages": messages, **fields}


async def answer(client, engine, text, *contents, **fields):
    """The id of a response whose answer is that text."""
    engine.answer = lambda request: text  # noqa: ARG005
    response = await client.post(CHAT, json=ask(*contents or ("hi",), **fields))
    assert response.status_code == 200, response.text
    return response.json()["id"]


async def judge(client, response_id, **fields):
    response = await client.post("/v1/feedback", json={"response_id": response_id, **fields})
    assert response.status_code == 200, response.text
    return response.json()


async def export(client, **fields):
    file = (await client.post("/v1/feedback/export", json=fields)).json()
    content = await client.get(f"/v1/files/{file['id']}/content")
    return file, [json.loads(line) for line in content.text.splitlines()]


async def test_a_judgement_is_kept_with_what_it_is_about(client, engine, state):
    add_adapter(state, "ada")
    response_id = await answer(client, engine, "yo", "hi", model="ada")
    found = await judge(client, response_id, rating="up", comment="nice")
    assert found.pop("id").startswith("feedback-") and found.pop("created_at") > 0
    assert found == {
        "object": "feedback",
        "response_id": response_id,
        "choice": 0,
        "model": "ada",
        "generation": 1,
        "rating": "up",
        "comment": "nice",
        "preferred": None,
        "answer": "yo",
        "messages": [{"role": "user", "content": "hi"}],
    }


async def test_a_second_judgement_changes_only_what_it_names(client, engine):
    response_id = await answer(client, engine, "yo")
    first = await judge(client, response_id, rating="up", comment="nice")
    second = await judge(client, response_id, rating="down")
    assert second == first | {"rating": "down"}
    assert (await judge(client, response_id, rating="none"))["rating"] is None
    assert (await client.get("/v1/feedback")).json()["data"] == [second | {"rating": None}]


async def test_judgements_of_one_answer_at_once_are_one(client, engine):
    response_id = await answer(client, engine, "yo")
    await asyncio.gather(*(judge(client, response_id, comment=f"number {i}") for i in range(8)))
    assert len((await client.get("/v1/feedback")).json()["data"]) == 1


async def test_streamed_answers_and_further_choices_can_be_judged(client, engine):
    engine.answer = lambda request: f"seed {request.params.seed}"
    body = ask("hi", stream=True, n=2, seed=1)
    events = (await client.post(CHAT, json=body)).text
    response_id = json.loads(events.split("\n")[0].removeprefix("data: "))["id"]
    assert (await judge(client, response_id, choice=1, rating="up"))["answer"] == "seed 2"
    refused = await client.post(
        "/v1/feedback", json={"response_id": response_id, "choice": 2, "rating": "up"}
    )
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "choice")


async def test_the_choices_that_best_of_kept_are_those_that_are_judged(client, engine):
    engine.answer = lambda request: f"seed {request.params.seed}"
    engine.logprob = lambda request, position: -abs(request.params.seed - 3)  # noqa: ARG005
    response = (await client.post(CHAT, json=ask("hi", best_of=4, seed=1))).json()
    assert (await judge(client, response["id"], rating="up"))["answer"] == "seed 3"


async def test_an_unknown_response_is_a_404(client):
    for response_id in ("chatcmpl-nothing", "x"):
        body = {"response_id": response_id, "rating": "up"}
        response = await client.post("/v1/feedback", json=body)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (404, "response_not_found")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rating": "great"},
        {"preferred": ""},
        {"rating": "up", "stars": 5},
        {"choice": -1, "rating": "up"},
    ],
)
async def test_what_says_nothing_is_refused(client, engine, fields):
    response_id = await answer(client, engine, "yo")
    response = await client.post("/v1/feedback", json={"response_id": response_id, **fields})
    assert response.status_code == 400
    assert (await client.get("/v1/feedback")).json()["data"] == []


async def test_only_the_newest_answers_are_remembered(client, engine, monkeypatch):
    monkeypatch.setattr(feedback_module, "MAX_REMEMBERED", 2)
    ids = [await answer(client, engine, f"answer {i}") for i in range(3)]
    gone = await client.post("/v1/feedback", json={"response_id": ids[0], "rating": "up"})
    assert gone.status_code == 404
    for response_id in ids[1:]:
        await judge(client, response_id, rating="up")
    monkeypatch.setattr(feedback_module, "MAX_REMEMBERED_CHARS", 200)
    last = await answer(client, engine, "x" * 90)
    await judge(client, last, rating="up")
    # What was judged once can be judged again, remembered or not.
    assert (await judge(client, ids[2], rating="down"))["answer"] == "answer 2"


async def test_no_judgement_no_trace(client, engine, state):
    await answer(client, engine, "secret")
    assert (await client.get("/v1/feedback")).json()["data"] == []
    response_id = await answer(client, engine, "secret")
    kept = await judge(client, response_id, rating="up")
    deleted = await client.delete(f"/v1/feedback/{kept['id']}")
    assert deleted.json() == {"id": kept["id"], "object": "feedback", "deleted": True}
    for path in (f"/v1/feedback/{kept['id']}", "/v1/feedback/none"):
        assert (await client.get(path)).status_code == 404
    again = await client.post("/v1/feedback", json={"response_id": response_id, "rating": "up"})
    assert again.status_code == 404
    assert state.feedback._num_chars == sum(chars for _, chars in state.feedback._recent.values())


async def test_a_server_without_feedback_remembers_nothing(engine):
    state = build_state(engine, feedback=False)
    transport = httpx.ASGITransport(create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        response_id = await answer(client, engine, "yo")
        refused = await client.post(
            "/v1/feedback", json={"response_id": response_id, "rating": "up"}
        )
        assert refused.json()["error"]["code"] == "feedback_disabled"
        assert not state.feedback._recent


async def test_lists_come_a_page_at_a_time(client, engine):
    ids = []
    for i in range(3):
        response_id = await answer(client, engine, f"answer {i}")
        ids.append((await judge(client, response_id, rating="up"))["id"])
    page = (await client.get("/v1/feedback", params={"limit": 2})).json()
    assert [entry["id"] for entry in page["data"]] == [ids[2], ids[1]]
    assert page["has_more"] is True
    rest = (await client.get("/v1/feedback", params={"after": page["last_id"]})).json()
    assert [entry["id"] for entry in rest["data"]] == [ids[0]]
    assert (await client.get("/v1/feedback", params={"after": "x"})).status_code == 400


# --- export ---


async def test_a_preferred_alternative_becomes_a_preference(client, engine):
    response_id = await answer(client, engine, "bad", "hi", "hello", "and now?")
    await judge(client, response_id, preferred="good")
    file, lines = await export(client)
    assert (file["purpose"], file["num_samples"]) == ("fine-tune", 1)
    assert file["filename"] == "feedback-preference.jsonl"
    assert lines == [
        {
            "input": {"messages": ask("hi", "hello", "and now?")["messages"]},
            "preferred_output": [{"role": "assistant", "content": "good"}],
            "non_preferred_output": [{"role": "assistant", "content": "bad"}],
        }
    ]


async def test_thumbs_up_and_down_on_the_same_question_are_a_preference(client, engine):
    for text, rating in (("a", "up"), ("b", "down"), ("c", "down")):
        await judge(client, await answer(client, engine, text, "same"), rating=rating)
    await judge(client, await answer(client, engine, "d", "other"), rating="down")
    _, lines = await export(client, format="preference")
    pairs = [
        (line["preferred_output"][0]["content"], line["non_preferred_output"][0]["content"])
        for line in lines
    ]
    assert pairs == [("a", "b"), ("a", "c")]


async def test_good_answers_become_supervised_samples(client, engine):
    response_id = await answer(client, engine, "so so", "hi", "hello", "and now?")
    await judge(client, response_id, rating="down", preferred="better")
    await judge(client, await answer(client, engine, "fine", "hi"), rating="up")
    await judge(client, await answer(client, engine, "fine", "hi"), rating="up")  # once is enough
    file, lines = await export(client, format="supervised", filename="mine.jsonl")
    assert (file["filename"], file["num_samples"]) == ("mine.jsonl", 2)
    assert lines[0]["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello", "weight": 0},
        {"role": "user", "content": "and now?"},
        {"role": "assistant", "content": "better"},
    ]
    assert lines[1]["messages"][-1] == {"role": "assistant", "content": "fine"}


async def test_judgements_that_contradict_each_other_teach_nothing(client, engine):
    for rating in ("up", "down"):
        await judge(client, await answer(client, engine, "a"), rating=rating)
    await judge(client, await answer(client, engine, "x", "q"), preferred="y")
    await judge(client, await answer(client, engine, "y", "q"), preferred="x")
    for format in ("preference", "supervised"):
        response = await client.post("/v1/feedback/export", json={"format": format})
        if format == "preference":
            assert response.json()["error"]["code"] == "no_feedback"


async def test_tools_go_with_the_conversation(client, engine):
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    response_id = await answer(client, engine, "no", tools=[tool])
    await judge(client, response_id, preferred="yes")
    _, lines = await export(client)
    assert lines[0]["input"]["tools"] == [tool]


async def test_an_export_of_nothing_says_what_is_missing(client, engine):
    for format in ("preference", "supervised"):
        response = await client.post("/v1/feedback/export", json={"format": format})
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "no_feedback")
        assert "thumbs up" in error["message"]
    await judge(client, await answer(client, engine, "a"), rating="up")
    summary = (await client.get("/v1/feedback/summary")).json()
    assert summary == {
        "object": "feedback.summary",
        "num_up": 1,
        "num_down": 0,
        "num_preferred": 0,
        "num_preference_samples": 0,
        "num_supervised_samples": 1,
    }


async def test_what_was_collected_survives_a_restart(client, engine, state):
    await judge(client, await answer(client, engine, "a"), rating="up")
    new_engine_state = build_state(engine)
    new_engine_state.feedback._database = state.feedback._database
    transport = httpx.ASGITransport(create_app(new_engine_state))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as again:
        assert len((await again.get("/v1/feedback")).json()["data"]) == 1


async def test_the_openai_clients_own_answer_carries_the_id(client, engine):
    engine.answer = lambda request: "yo"  # noqa: ARG005
    async with openai.AsyncOpenAI(
        base_url="http://localhost:8000/v1", api_key="none", http_client=client
    ) as speaking:
        completion = await speaking.chat.completions.create(**ask("hi"))
        body = {"response_id": completion.id, "rating": "up"}
        kept = await speaking.post("/feedback", body=body, cast_to=object)
    assert kept["answer"] == completion.choices[0].message.content == "yo"
