"""Scores in vLLM's shapes, and best_of by a reward adapter."""

import json
import math
from collections import Counter

import pytest

from engine.api import ErrorInfo, RequestDelta
from server.datasets.samples import Pair, conversation
from server.datasets.sequences import sequences_of
from server.datasets.served_model import served_model
from server.errors import ApiError
from server.limits import parse
from server.prompts import template_for
from server.schemas import ChatCompletionRequest, CompletionRequest
from tests.server.fake_engine import BOS, EOS, add_adapter

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def judge(state):
    return add_adapter(state, "judge", has_score_head=True)


def byte_sum(text: str) -> float:
    """What the stand-in engine scores a conversation: the sum of its token ids."""
    return float(sum(text.encode()))


def pair(question: str, answer: str) -> float:
    """Question and answer as training sees them: the answer ends in the end token."""
    return byte_sum(f"<user>{question}\n<assistant>{answer}") + EOS


async def scores(client, path="/v1/score", **body):
    response = await client.post(path, json={"model": "judge", **body})
    assert response.status_code == 200, response.text
    return [entry.get("score", entry.get("data")) for entry in response.json()["data"]]


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("text_1", "text_2"),
        ("queries", "documents"),
        ("queries", "items"),
        ("data_1", "data_2"),
    ],
)
async def test_a_pair_is_a_question_and_its_answer(client, path, first, second):
    assert await scores(client, path, **{first: "q", second: "a"}) == [pair("q", "a")]
    one_to_many = await scores(client, path, **{first: "q", second: ["a", "b"]})
    assert one_to_many == [pair("q", "a"), pair("q", "b")]
    each = await scores(client, path, **{first: ["p", "q"], second: ["a", "b"]})
    assert each == [pair("p", "a"), pair("q", "b")]


@pytest.mark.parametrize(
    "body",
    [
        {"text_1": "a"},
        {"text_1": "a", "documents": "b"},
        {"text_1": "a", "text_2": "b", "input": "c"},
        {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]},
        {"text_1": ["a", "b"], "text_2": "c"},
        {"text_1": [], "text_2": []},
        {"input": []},
        {"input": [[]]},
        {"input": "a", "messages": USER},
        {"input": "a", "truncate_prompt_tokens": 5},
        {"input": "a", "encoding_format": "base64"},
        {},
    ],
)
async def test_what_cannot_be_scored_is_refused_before_anything_runs(client, engine, body):
    response = await client.post("/v1/score", json={"model": "judge", **body})
    assert response.status_code == 400
    assert response.json()["error"]["param"]
    assert engine.requests == []


async def test_a_pair_needs_the_same_number_on_both_sides(client):
    body = {"model": "judge", "queries": ["a", "b"], "documents": ["c"]}
    error = (await client.post("/v1/score", json=body)).json()["error"]
    assert error["message"] == "queries: expected 1 entry or as many as documents has (1), got 2"


@pytest.mark.parametrize("path", ["/v1/rewards", "/pooling"])
async def test_rewards_have_the_shape_of_pooling(client, path, state):
    answer = (await client.post(path, json={"model": "judge", "input": ["a", "b"]})).json()
    assert answer["data"] == [
        {"index": 0, "object": "pooling", "data": [BOS + 97.0]},
        {"index": 1, "object": "pooling", "data": [BOS + 98.0]},
    ]
    assert answer["object"] == "list" and answer["model"] == "judge"
    assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    assert state.num_sequences == 0


async def test_an_input_may_be_texts_token_ids_or_conversations(client):
    assert await scores(client, input=[65, 66]) == [131.0]
    assert await scores(client, input=[[65], [66, 1]]) == [65.0, 67.0]
    talk = [*USER, {"role": "assistant", "content": "yo"}]
    assert await scores(client, messages=talk) == [pair("hi", "yo")]
    assert await scores(client, input=talk) == [pair("hi", "yo")]
    assert await scores(client, input=[talk, USER]) == [pair("hi", "yo"), byte_sum("<user>hi\n")]


async def test_an_activation_maps_scores_into_0_to_1(client, engine):
    async def deltas(request):
        yield RequestDelta(
            request_id=request.request_id,
            score=float(request.prompt_token_ids[0]) - 66,
            finish_reason="stop",
        )

    engine._deltas = deltas
    assert await scores(client, input=[[66], [67]]) == [0.0, 1.0]
    mapped = await scores(client, input=[[66], [67]], use_activation=True)
    assert mapped == pytest.approx([0.5, 1 / (1 + math.exp(-1))])


async def test_rewards_need_a_score_head(client, state):
    add_adapter(state, "chat")
    for model in ("base", "chat"):
        response = await client.post("/v1/rewards", json={"model": model, "input": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "no_score_head")
    assert state.num_sequences == 0


# --- best_of with a reward adapter ---


def drawn(request):
    """The stand-in's candidates: seed 1 -> "b", seed 2 -> "c" ..."""
    return chr(97 + request.params.seed)


async def test_best_of_returns_what_the_reward_adapter_prefers(client, state, engine, judge):
    engine.answer = drawn
    body = {"model": "base", "messages": USER, "seed": 0, "best_of": 4, "n": 2}
    answer = (
        await client.post("/v1/chat/completions", json={**body, "reward_adapter": "judge"})
    ).json()
    found = [(choice["message"]["content"], choice["reward"]) for choice in answer["choices"]]
    assert found == [("d", pair("hi", "d")), ("c", pair("hi", "c"))]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 4 * 2  # all that were drawn
    asked = [request for request in engine.requests if request.task == "score"]
    assert {request.adapter for request in asked} == {judge}
    drawn_requests = [request for request in engine.requests if request.task == "generate"]
    assert {request.params.logprobs for request in drawn_requests} == {None}
    assert state.num_sequences == 0
    assert state.registry.resolve("judge").num_running == 0


async def test_best_of_completions_choose_for_each_prompt(client, state, engine):
    engine.answer = drawn
    body = {
        "model": "base",
        "prompt": ["x", "y"],
        "seed": 0,
        "best_of": 3,
        "reward_adapter": "judge",
    }
    answer = (await client.post("/v1/completions", json=body)).json()
    found = [(choice["text"], choice["reward"]) for choice in answer["choices"]]
    assert found == [("c", BOS + byte_sum("xc") + EOS), ("c", BOS + byte_sum("yc") + EOS)]
    body |= {"prompt": [120]}
    answer = (await client.post("/v1/completions", json=body)).json()
    assert answer["choices"][0]["reward"] == BOS + byte_sum("xc") + EOS
    assert state.num_sequences == 0


async def test_a_single_answer_may_be_scored_too(client, engine):
    engine.answer = drawn
    body = {"model": "base", "messages": USER, "seed": 0, "best_of": 1, "reward_adapter": "judge"}
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    assert [choice["reward"] for choice in answer["choices"]] == [pair("hi", "a")]


async def test_an_empty_candidate_has_a_score_too(client, engine):
    engine.answer = lambda request: "x" * request.params.seed
    body = {"seed": 0, "best_of": 2, "n": 2, "reward_adapter": "judge", "model": "base"}
    answer = (await client.post("/v1/chat/completions", json={**body, "messages": USER})).json()
    found = [(choice["message"]["content"], choice["reward"]) for choice in answer["choices"]]
    assert found == [("x", pair("hi", "x")), ("", byte_sum("<user>hi\n<assistant>\n"))]
    answer = (await client.post("/v1/completions", json={**body, "prompt": "p"})).json()
    found = [(choice["text"], choice["reward"]) for choice in answer["choices"]]
    assert found == [("x", BOS + byte_sum("px") + EOS), ("", BOS + byte_sum("p"))]


async def test_a_conversation_has_the_tokens_of_its_training_pair(client, state, engine):
    talk = [*USER, {"role": "assistant", "content": "yo"}]
    await scores(client, messages=talk)
    model = served_model(
        tokenizer=state.tokenizer,
        template=template_for(state, None, "base"),
        eos_token_ids=(EOS,),
        vocab_size=258,
        max_seq_len=512,
    )
    better = conversation([("user", "hi"), ("assistant", "yo")])
    worse = conversation([("user", "hi"), ("assistant", "no")])
    (learnt, _), _ = sequences_of(
        model, Pair(chosen=better, rejected=worse), "preference", Counter()
    )
    assert list(engine.requests[0].prompt_token_ids) == learnt


async def test_a_message_that_is_continued_is_scored_whole(client, engine):
    engine.answer = drawn
    body = {
        "model": "base",
        "messages": [*USER, {"role": "assistant", "content": "so "}],
        "continue_final_message": True,
        "add_generation_prompt": False,
        "seed": 0,
        "best_of": 1,
        "reward_adapter": "judge",
    }
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    assert [choice["reward"] for choice in answer["choices"]] == [pair("hi", "so a")]


async def test_a_candidate_that_fills_the_models_length_is_scored_up_to_it(client, engine):
    engine.max_model_len, engine.answer = 40, lambda request: "z" * 100  # noqa: ARG005
    body = {"model": "base", "messages": USER, "best_of": 2, "reward_adapter": "judge"}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    asked = [request for request in engine.requests if request.task == "score"]
    assert [len(request.prompt_token_ids) for request in asked] == [39, 39]


@pytest.mark.parametrize("name", ["chat", "base"])
async def test_an_adapter_without_score_head_cannot_choose(client, state, engine, name):
    add_adapter(state, "chat")
    body = {"model": "base", "messages": USER, "best_of": 2, "reward_adapter": name}
    response = await client.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        400,
        "no_score_head",
        "reward_adapter",
    )
    assert engine.requests == []  # nothing is drawn in vain
    assert state.num_sequences == 0


async def test_an_unknown_reward_adapter_is_a_404_that_names_the_parameter(client, state):
    body = {"model": "base", "messages": USER, "best_of": 2, "reward_adapter": "nobody"}
    response = await client.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (404, "reward_adapter")
    assert state.num_sequences == 0


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (ChatCompletionRequest, {"messages": USER}),
        (ChatCompletionRequest, {"messages": USER, "best_of": 2, "stream": True}),
        (ChatCompletionRequest, {"messages": USER, "best_of": 1, "stream": True}),
        (CompletionRequest, {"prompt": "a", "best_of": 1, "echo": True}),
    ],
)
def test_a_reward_adapter_needs_candidates_and_no_stream(model, body):
    raw = json.dumps({"model": "m", "reward_adapter": "judge", **body}).encode()
    with pytest.raises(ApiError) as caught:
        parse(model, raw)
    assert caught.value.param in ("reward_adapter", "best_of")


async def test_an_engine_that_dies_while_scoring_is_a_503(client, state, engine):
    generate = engine._deltas

    async def deltas(request):
        if request.task == "generate":
            async for delta in generate(request):
                yield delta
            return
        error = ErrorInfo(code="engine_restarting", message="The engine worker ended.")
        yield RequestDelta(request_id=request.request_id, finish_reason="error", error=error)

    engine._deltas = deltas
    body = {"model": "base", "messages": USER, "best_of": 2, "reward_adapter": "judge"}
    response = await client.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_restarting")
    assert state.num_sequences == 0


async def test_model_cards_say_who_scores_loaded_or_not(client, state, tmp_path):
    add_adapter(state, "chat")
    for name, task in (("ft:judge", "SEQ_CLS"), ("ft:chat", "CAUSAL_LM"), ("ft:broken", None)):
        folder = tmp_path / task if task else tmp_path
        folder.mkdir(exist_ok=True)
        if task:
            (folder / "adapter_config.json").write_text(json.dumps({"task_type": task}))
        state.adapters.fine_tuned[name] = folder
    cards = (await client.get("/v1/models")).json()["data"]
    found = {card["id"] for card in cards if card.get("has_score_head")}
    assert found == {"judge", "ft:judge"}
    assert len(cards) == 6
