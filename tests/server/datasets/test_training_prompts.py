"""What is trained is what is served: every answer follows exactly the prompt that the server would
build, and ends in the end token."""

import json
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.chat_template import GUANACO, GUANACO_SYSTEM, ChatTemplate
from server.datasets.chat_records import read_chat
from server.datasets.problems import BadRecord
from server.datasets.samples import Pair, Plain
from server.datasets.sequences import SPLIT, Notes, sequences_of
from server.datasets.served_model import template_input
from server.datasets.training_template import SAVED_GUANACO, WITHOUT_TEMPLATE, training_template
from server.datasets.turns import scored_conversation
from server.scoring import conversation_tokens
from server.state import Lease
from tests.server.datasets.served_models import (
    TEMPLATES,
    TOKENIZERS,
    make_model,
    make_tokenizer,
    published_template,
    served_chat_prompt,
    served_prompt,
    server_state,
    template,
)
from tests.server.fake_engine import add_adapter

FEW = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
letters = st.sampled_from("abeo. ,!?\n'\"<>|#:{}019 éß日🦙")
# SentencePiece reads U+2581 as a space.
letters = letters | st.characters(codec="utf-8", exclude_characters="▁")
words = st.text(letters, min_size=1, max_size=12).filter(str.strip)
texts = words | st.lists(words, min_size=1, max_size=4).map(" ".join)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
        },
    }
]


@st.composite
def conversations(draw):
    """Messages in turn, the assistant's with weights, the last one learnt."""
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    num_turns = draw(st.integers(1, 4))
    for turn in range(num_turns):
        messages.append({"role": "user", "content": draw(texts)})
        weight = 1 if turn + 1 == num_turns else draw(st.sampled_from([None, 0, 1, 0.5]))
        answer = {"role": "assistant", "content": draw(texts)}
        messages.append(answer | ({} if weight is None else {"weight": weight}))
    return messages


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request, tmp_path_factory):
    return make_tokenizer(request.param, tmp_path_factory.mktemp("tokenizer"))


def runs(weights):
    """[start, end) of each run of tokens with a weight."""
    borders = [i for i, (a, b) in enumerate(pairwise([0.0, *weights, 0.0])) if (a > 0) != (b > 0)]
    return list(zip(borders[::2], borders[1::2], strict=True))


def without_weights(messages):
    return [{k: v for k, v in message.items() if k != "weight"} for message in messages]


def check_prompts(model, record, notes=None):
    """Every learnt answer stands behind the prompt that the server builds, and has one end token.

    Returns:
        The sequences, and (message, learnt tokens) of each answer.
    """
    messages = without_weights(record["messages"])
    notes = Notes() if notes is None else notes
    sequences = sequences_of(model, read_chat(record), "supervised", notes)
    found = [
        (ids[:start], ids[start:end], weights[start])
        for ids, weights in sequences
        for start, end in runs(weights)
    ]
    learnt = [
        (index, message.get("weight", 1))
        for index, message in enumerate(record["messages"])
        if message["role"] == "assistant" and message.get("weight", 1)
    ]
    assert len(found) == len(learnt)
    for (prompt, answer, weight), (index, given_weight) in zip(found, learnt, strict=True):
        assert prompt == served_chat_prompt(model, messages[:index], record.get("tools"))
        assert weight == given_weight
        assert answer[-1] in model.eos_token_ids
        assert not set(answer[:-1]) & set(model.eos_token_ids)
    return sequences, [(messages[i], found[n][1]) for n, (i, _) in enumerate(learnt)]


def check_answers(model, record, notes=None):
    """As check_prompts; and the learnt tokens say what the message says."""
    sequences, answers = check_prompts(model, record, notes)
    for message, token_ids in answers:
        said = model.tokenizer.decode(token_ids, skip_special_tokens=True)
        said = said.replace("<think>\n\n</think>\n\n", "").strip()
        assert said.startswith((message.get("content") or "").strip())
    return sequences


@pytest.mark.parametrize("name", TEMPLATES)
@FEW
@given(messages=conversations())
def test_answers_follow_the_prompts_that_the_server_builds(tokenizer, name, messages):
    model = make_model(*tokenizer, template(name))
    check_answers(model, {"messages": messages})


@FEW
@given(messages=conversations(), town=texts)
@pytest.mark.parametrize("name", ["guanaco", "chatml", "reasoning"])
def test_tools_and_calls_stand_in_the_prompt_as_when_served(tokenizer, name, messages, town):
    arguments = json.dumps({"town": town}, ensure_ascii=False)
    call = {
        "id": "call_0",
        "type": "function",
        "function": {"name": "weather", "arguments": arguments},
    }
    messages = [
        *messages,
        {"role": "user", "content": "And the weather?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": town},
        {"role": "assistant", "content": town},
    ]
    model = make_model(*tokenizer, template(name))
    check_answers(model, {"messages": messages, "tools": TOOLS})


@FEW
@given(messages=conversations(), other=texts)
@pytest.mark.parametrize("name", ["guanaco", "llama-2"])
def test_both_answers_of_a_pair_follow_the_served_prompt(tokenizer, name, messages, other):
    model = make_model(*tokenizer, template(name))
    chosen = read_chat({"messages": messages})
    rejected = read_chat({"messages": [*messages[:-1], {"role": "assistant", "content": other}]})
    pair = Pair(chosen=chosen, rejected=rejected)
    prompt = served_chat_prompt(model, without_weights(messages)[:-1])
    for ids, weights in sequences_of(model, pair, "preference", Notes()):
        assert ids[: len(prompt)] == prompt
        assert weights == [0.0] * len(prompt) + [1.0] * (len(ids) - len(prompt))
        assert ids[-1] in model.eos_token_ids
    ((ids, weights),) = sequences_of(model, pair, "prompt", Notes())
    assert ids == prompt
    assert not any(weights)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=texts | st.just(""), answer=texts)
def test_plain_texts_continue_the_prompt_of_completions(tokenizer, prompt, answer):
    model = make_model(*tokenizer, None)
    sample = Plain(prompt=prompt, answer=answer)
    ((ids, weights),) = sequences_of(model, sample, "supervised", Notes())
    served = served_prompt(model, prompt) if prompt or model.tokenizer.bos_token_id else []
    assert ids[: len(served)] == served
    assert weights == [0.0] * len(served) + [1.0] * (len(ids) - len(served))
    decoded = model.tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded == (prompt + answer).removeprefix(" " * (decoded[:1] != " "))
    assert ids[-1] in model.eos_token_ids


TWO_TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Fine."},
]


@pytest.mark.parametrize(
    ("name", "num_sequences"),
    [("zephyr", 1), ("llama-2", 1), ("without-template", 1), ("guanaco", 2), ("reasoning", 2)],
)
def test_a_conversation_is_one_sequence_where_the_template_keeps_what_was_generated(
    tokenizer, name, num_sequences
):
    model = make_model(*tokenizer, template(name))
    notes = Notes()
    sequences = check_answers(model, {"messages": TWO_TURNS}, notes)
    assert len(sequences) == num_sequences
    assert notes[SPLIT] == (num_sequences > 1)


PUBLISHED = (
    "llama3_1", "qwen2_5", "qwen3", "qwen3_instruct_2507", "gemma3", "phi3_5", "cohere2", "lfm2",
    "glm4moe", "gptoss",
)  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_templates_of_published_models_can_be_trained_with(tokenizer, name):
    model = make_model(*tokenizer, published_template(name))
    call = {"name": "weather", "arguments": '{"town": "Rome"}'}
    calls = [{"id": "call_0", "type": "function", "function": call}]
    conversation = [
        *TWO_TURNS,
        {"role": "user", "content": "The weather?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_0", "content": "sun"},
        {"role": "assistant", "content": "Sun."},
    ]
    check_prompts(model, {"messages": conversation, "tools": TOOLS})
    check_prompts(model, {"messages": TWO_TURNS})


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "nemotron_3_nano", "smolvlm"])
def test_published_templates_that_nothing_can_be_learnt_with_are_refused(tokenizer, name):
    model = make_model(*tokenizer, published_template(name))
    with pytest.raises(BadRecord, match="does not write answers, or not as its prompts begin them"):
        sequences_of(model, read_chat({"messages": TWO_TURNS}), "supervised", Notes())


def test_an_answer_that_begins_with_the_prompts_last_characters_is_tokenised_behind_it(tokenizer):
    model = make_model(*tokenizer, template("chatml"))
    messages = [TWO_TURNS[0], {"role": "assistant", "content": "\n\n\nYes"}]
    check_answers(model, {"messages": messages})


def test_a_template_that_writes_an_answer_unlike_its_prompt_is_refused(tokenizer):
    source = "{{ messages[0].content }}{% if add_generation_prompt %}<think>{% endif %}"
    source += "{{ messages[1].content if messages | length > 1 }}"
    model = make_model(*tokenizer, ChatTemplate(source=source, origin="the test's template"))
    with pytest.raises(BadRecord, match="message 1: the test's template does not write answers"):
        sequences_of(model, read_chat({"messages": TWO_TURNS[:2]}), "supervised", Notes())


@pytest.mark.parametrize("ending", ["", "<eos>", "<eos><eos>", "<eos>\n"])
def test_an_answer_ends_in_one_end_token_whatever_the_file_writes(tokenizer, ending):
    loaded, eos_token_ids = tokenizer
    eos = loaded.piece(eos_token_ids[0]).decode()
    answer = "Yes" + ending.replace("<eos>", eos)
    model = make_model(*tokenizer, template("zephyr"))
    plain = Plain(prompt="Really?\n", answer=answer)
    chat = read_chat({"messages": [TWO_TURNS[0], {"role": "assistant", "content": answer}]})
    for sample in (plain, chat):
        ((ids, weights),) = sequences_of(model, sample, "supervised", Notes())
        learnt = [i for i, weight in zip(ids, weights, strict=True) if weight]
        assert loaded.decode(learnt, skip_special_tokens=True).strip() == "Yes"
        assert learnt.count(eos_token_ids[0]) == 1
        assert learnt[-1] == eos_token_ids[0]


def test_an_answer_that_goes_on_behind_an_end_token_is_refused(tokenizer):
    loaded, eos_token_ids = tokenizer
    eos = loaded.piece(eos_token_ids[0]).decode()
    model = make_model(*tokenizer, template("zephyr"))
    sample = Plain(prompt="Really?", answer=f" Yes{eos} No")
    with pytest.raises(BadRecord, match="the answer goes on behind"):
        sequences_of(model, sample, "supervised", Notes())


def test_a_new_adapter_is_trained_with_a_template_that_can_be_saved(tokenizer):
    own = template("chatml")
    assert training_template(own) is own
    assert training_template(None) is WITHOUT_TEMPLATE
    assert training_template(GUANACO) is SAVED_GUANACO
    for chosen in (WITHOUT_TEMPLATE, SAVED_GUANACO):
        saved = ChatTemplate(source=chosen.source, origin="the adapter's")  # as loaded again
        prompt = served_chat_prompt(make_model(*tokenizer, saved), TWO_TURNS[:1])
        bos = tokenizer[0].bos_token_id
        assert prompt[:1] == [bos] or bos is None
        text = tokenizer[0].decode(prompt, skip_special_tokens=True)
        assert text.strip() == f"{GUANACO_SYSTEM} ### Human: Hi### Assistant:"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_scored_as_the_reward_adapter_was_trained(tokenizer, name):
    model = make_model(*tokenizer, template(name))
    chosen = read_chat({"messages": TWO_TURNS})
    rejected = read_chat({"messages": [*TWO_TURNS[:3], {"role": "assistant", "content": "No."}]})
    trained, _ = sequences_of(model, Pair(chosen=chosen, rejected=rejected), "preference", Notes())
    state = server_state(model)
    add_adapter(state, "judge", has_score_head=True)
    lease = Lease(state, 1, state.registry.resolve("judge"), None)
    assert conversation_tokens(chosen.messages, state, lease) == trained[0]


def test_a_conversation_without_an_answer_is_scored_as_it_is(tokenizer):
    model = make_model(*tokenizer, template("zephyr"))
    given = template_input(model.template, read_chat({"messages": TWO_TURNS[:3]}).messages, ())
    text = model.tokenizer.decode(scored_conversation(model, given), skip_special_tokens=False)
    assert text.strip().endswith("How are you?" + model.tokenizer.special_tokens["eos_token"])
