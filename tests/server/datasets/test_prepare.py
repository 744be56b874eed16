"""Files to data sets: formats are recognised, and all that is wrong is said at once."""

import json

import pytest
import torch

from engine.train.token_dataset import load_dataset, save_dataset
from server.chat_template import GUANACO, GUANACO_SYSTEM, ChatTemplate
from server.datasets.prepare import prepare
from server.datasets.problems import MAX_SHOWN, DatasetErrors
from tests.server.fake_engine import EOS, byte_tokenizer

HI = {"role": "user", "content": "Hi"}
YO = {"role": "assistant", "content": "Yo"}
NO = {"role": "assistant", "content": "No"}
QUESTION = {"from": "human", "value": "Hi"}
HH = "\n\nHuman: Hi\n\nAssistant: "


@pytest.fixture
def run(tmp_path):
    """Write records (or bytes) to a file and prepare it."""

    def run_(content, method="supervised", *, name="data.jsonl", template=GUANACO, **arguments):
        path = tmp_path / name
        if not isinstance(content, bytes):
            content = "".join(json.dumps(record) + "\n" for record in content).encode()
        path.write_bytes(content)
        given = {"max_seq_len": 1000, "vocab_size": 258, "eos_token_ids": (EOS,), **arguments}
        return prepare(path, method=method, tokenizer=byte_tokenizer(), template=template, **given)

    return run_


@pytest.fixture
def problems(run):
    """The problems of a file that must have some: [(line, message)]."""

    def problems_(content, method="supervised", **arguments):
        with pytest.raises(DatasetErrors) as caught:
            run(content, method, **arguments)
        return [(problem.line, problem.message) for problem in caught.value.problems]

    return problems_


def texts(prepared):
    """(what precedes the answer, what is learnt) of each sequence, as text."""
    tokenizer, dataset = byte_tokenizer(), prepared.dataset
    found = []
    for index in range(dataset.offsets.numel() - 1):
        ids, weights = dataset.sequence(index)
        learnt = weights > 0
        start = int(learnt.nonzero()[0]) if learnt.any() else len(ids)
        assert bool(learnt[start:].all())
        parts = (ids[:start].tolist(), ids[start:].tolist())
        found.append(tuple(tokenizer.decode(ids, skip_special_tokens=False) for ids in parts))
    return found


ASKED = f"<s>{GUANACO_SYSTEM} ### Human: Hi### Assistant:"
SUPERVISED = {
    "chat": {"messages": [HI, YO]},
    "sharegpt": {"conversations": [QUESTION, {"from": "gpt", "value": "Yo"}]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Yo"},
    "self-instruct": {"instruction": "Hi", "instances": [{"input": "", "output": "Yo"}]},
    "oasst1": {"text": "### Human: Hi### Assistant: Yo"},
    "chip2": {"text": "<human>: Hi\n<bot>: Yo"},
    "prompt-completion": {"prompt": [HI], "completion": [YO]},
}


@pytest.mark.parametrize("name", SUPERVISED)
def test_conversations_of_every_format_become_what_is_served(run, name):
    prepared = run([SUPERVISED[name]] * 12)
    assert prepared.format == name
    assert prepared.num_samples == 12
    assert prepared.warnings == ()
    assert texts(prepared) == [(ASKED, " Yo</s>")] * 12
    assert prepared.num_label_tokens == 12 * 4
    assert prepared.num_tokens == 12 * prepared.max_length == prepared.dataset.input_ids.numel()
    assert prepared.summary().startswith(f"12 samples, format {name}, ")


@pytest.mark.parametrize(
    ("record", "name", "prompt", "learnt"),
    [
        ({"prompt": "Hi", "completion": " Yo"}, "prompt-completion", "<s>Hi", " Yo</s>"),
        ({"input": "Hi", "output": " Yo"}, "input-output", "<s>Hi", " Yo</s>"),
        ({"text": "Hi Yo"}, "text", "<s>", "Hi Yo</s>"),
    ],
)
def test_plain_texts_stay_as_they_are(run, record, name, prompt, learnt):
    prepared = run([record] * 12, template=None)
    assert prepared.format == name
    assert texts(prepared)[0] == (prompt, learnt)
    assert any("/v1/completions" in warning for warning in prepared.warnings)


PREFERENCES = {
    "openai-preference": {
        "input": {"messages": [HI]},
        "preferred_output": [YO],
        "non_preferred_output": [NO],
    },
    "alpaca-preference": {"instruction": "Hi", "chosen": "Yo", "rejected": "No"},
    "sharegpt-preference": {
        "conversations": [QUESTION],
        "chosen": {"from": "gpt", "value": "Yo"},
        "rejected": {"from": "gpt", "value": "No"},
    },
    "hh-rlhf": {"chosen": HH + "Yo", "rejected": HH + "No"},
    "preference": {"prompt": [HI], "chosen": [YO], "rejected": [NO]},
}
MORE_PREFERENCES = [
    {"chosen": [HI, YO], "rejected": [HI, NO]},
    {"prompt": "Hi", "chosen": [HI, YO], "rejected": [HI, NO]},
    {"prompt": "Hi", "chosen": [YO], "rejected": [NO]},
]


@pytest.mark.parametrize("method", ["dpo", "reward"])
@pytest.mark.parametrize("record", [*PREFERENCES.values(), *MORE_PREFERENCES])
def test_preferences_of_every_format_become_pairs(run, record, method):
    prepared = run([record] * 10, method)
    assert PREFERENCES.get(prepared.format) == record or prepared.format == "preference"
    assert texts(prepared) == [(ASKED, " Yo</s>"), (ASKED, " No</s>")] * 10
    assert prepared.dataset.kind == "preference"
    assert prepared.num_samples == prepared.dataset.num_samples == 10
    assert prepared.warnings == ()


@pytest.mark.parametrize("prompt", [{"prompt": "Hi you:"}, {}])
def test_plain_preferences_share_what_both_begin_with(run, prompt):
    sides = {"chosen": " Yo A", "rejected": " Yo B"} if prompt else {}
    sides = sides or {"chosen": "Hi you: Yo A", "rejected": "Hi you: Yo B"}
    prepared = run([{**prompt, **sides}] * 10, "dpo", template=None)
    expected = ("<s>Hi you:", " Yo A</s>") if prompt else ("<s>Hi you: Yo", " A</s>")
    assert texts(prepared)[0] == expected


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [HI], "reference": 7},
        {"messages": [HI, YO]},
        {"prompt": [HI]},
        *SUPERVISED.values(),
        *PREFERENCES.values(),
    ],
)
def test_prompts_are_taken_from_any_format(run, record):
    prepared = run([record] * 10, "grpo")
    assert texts(prepared) == [(ASKED, "")] * 10
    assert prepared.dataset.kind == "prompt"
    assert prepared.num_label_tokens == 0
    assert "learnt" not in prepared.summary()


def test_weights_choose_what_is_learnt(run):
    first = {"role": "assistant", "content": "One", "weight": 0}
    second = {"role": "assistant", "content": "Two", "weight": 0.5}
    prepared = run([{"messages": [HI, first, HI, second]}])
    assert texts(prepared) == [(f"{ASKED} One### Human: Hi### Assistant:", " Two</s>")]
    assert prepared.dataset.loss_weights.unique().tolist() == [0.0, 0.5]


def test_messages_behind_the_last_answer_are_not_read(run):
    assert texts(run([{"messages": [HI, YO, HI]}])) == [(ASKED, " Yo</s>")]


def test_alpaca_has_input_system_and_history(run):
    record = {
        "instruction": "Add.",
        "input": "1 2",
        "output": "3",
        "system": "Be brief.",
        "history": [["Hi", "Yo"]],
    }
    one, two = texts(run([record]))
    assert one == ("<s>Be brief. ### Human: Hi### Assistant:", " Yo</s>")
    head = "<s>Be brief. ### Human: Hi### Assistant: Yo### Human: Add.\n\n1 2### Assistant:"
    assert two == (head, " 3</s>")


def test_sharegpt_calls_become_tool_calls(run):
    record = {
        "system": "Be brief.",
        "tools": json.dumps([{"name": "add", "parameters": {"type": "object"}}]),
        "conversations": [
            QUESTION,
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "Two."},
        ],
    }
    (first_prompt, call), (second_prompt, answer) = texts(run([record]))
    assert '{"name": "add", "parameters": {"type": "object"}}' in first_prompt
    assert call == ' <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call></s>'
    assert "<tool_response>\n2\n</tool_response>" in second_prompt
    assert answer == " Two.</s>"


def test_a_sample_of_seed_tasks_becomes_one_per_instance(run):
    instances = [{"input": "1", "output": "Yo"}, {"input": "2", "output": "No"}]
    prepared = run([{"instruction": "Hi", "instances": instances, "name": "x"}])
    assert prepared.num_samples == 2
    assert "fields without a meaning here, not used: name" in prepared.warnings


def test_the_format_that_serves_the_method_is_chosen(run):
    record = {"messages": [HI, YO], "chosen": [HI, YO], "rejected": [HI, NO]}
    assert run([record]).format == "chat"
    assert run([record], "dpo").format == "preference"


@pytest.mark.parametrize("method", ["supervised", "dpo", "grpo"])
def test_a_prepared_data_set_survives_the_disk(run, tmp_path, method):
    record = {"messages": [HI, YO], "chosen": [HI, YO], "rejected": [HI, NO]}
    dataset = run([record], method).dataset
    save_dataset(tmp_path / "tokens", dataset)
    loaded = load_dataset(tmp_path / "tokens")
    assert loaded.kind == dataset.kind
    assert torch.equal(loaded.input_ids, dataset.input_ids)
    assert torch.equal(loaded.loss_weights, dataset.loss_weights)


# --- what is wrong ---


def test_all_problems_are_listed_together_with_their_lines(problems):
    good = json.dumps({"messages": [HI, YO]}).encode()
    lines = [
        good,
        b"{broken",
        b"",
        b'{"messages": []}',
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b"[1]",
        json.dumps({"messages": [HI]}).encode(),
        json.dumps({"messages": [HI, {"role": "assistant", "content": " "}]}).encode(),
        json.dumps({"messages": [HI, {"role": "bot", "content": "x"}]}).encode(),
        json.dumps({"messages": [HI, {**YO, "wieght": 1}]}).encode(),
        json.dumps({"messages": [{**HI, "weight": 1}, YO]}).encode(),
        json.dumps({"messages": [HI, {**YO, "weight": True}]}).encode(),
        json.dumps({"messages": [HI, {**YO, "weight": 0}]}).encode(),
        json.dumps({"messages": [YO]}).encode(),
        json.dumps({"messages": [HI, {**YO, "content": "x" * 2000}]}).encode(),
        json.dumps({"messages": [HI, YO], "functions": []}).encode(),
        json.dumps({"messages": [HI, {"role": "tool", "content": "x"}]}).encode(),
        b'{"messages": [], "messages": []}',
        b'{"messages": NaN}',
        json.dumps({"instruction": "x", "output": "y"}).encode(),
        json.dumps({"a": 1, "b": 2}).encode(),
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        good,
    ]  # fmt: skip
    expected = [
        (2, "not valid JSON: Expecting property name"),
        (4, "messages: expected a list with at least one object, got []"),
        (5, "not valid UTF-8: byte 0xff at 44"),
        (6, "expected a JSON object, got an array"),
        (7, "nothing to learn: no message of the assistant has a weight above 0"),
        (8, "message 1: the answer is empty. Remove it, or give it the weight 0"),
        (9, "messages[1]: role: Input should be 'system', 'developer', 'user'"),
        (10, "messages[1]: Unknown parameter: 'wieght'"),
        (11, "messages[0].weight: expected a weight on the assistant's messages only, got 1"),
        (12, "messages[1].weight: expected a number from 0 to 1, got True"),
        (13, "nothing to learn"),
        (14, "message 0 is an answer that nobody asked for"),
        (15, "tokens, but 1,000 is the most that fits"),
        (16, "functions: expected no such field: it is deprecated, use tools"),
        (17, "messages[1]: a message of role 'tool' needs the tool_call_id"),
        (18, "the field 'messages' is given twice"),
        (19, "NaN is no JSON"),
        (20, "expected format chat (messages) as in the lines before, got format alpaca"),
        (21, "got the fields 'a', 'b'. A file holds one format; split it"),
        (22, "half a surrogate pair"),
    ]
    found = problems(b"\n".join(lines))
    assert [line for line, _ in found] == [line for line, _ in expected]
    for (_, message), (_, part) in zip(found, expected, strict=True):
        assert part in message


def test_errors_can_be_printed_and_sent(run):
    with pytest.raises(DatasetErrors) as caught:
        run(b"x\n" * (MAX_SHOWN + 3), file_name="mine.jsonl")
    error = caught.value
    assert str(error).startswith("mine.jsonl: 53 problems\n  line 1: not valid JSON: Expecting")
    assert str(error).endswith("\n  and 3 more")
    assert (error.num_problems, error.problems[0].line) == (MAX_SHOWN + 3, 1)
    assert error.info().code == "invalid_training_data"


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf", b"[]", b" [ ] "])
def test_an_empty_file_is_said_to_be_empty(problems, content):
    ((line, message),) = problems(content)
    assert line is None
    assert "the file is empty" in message


@pytest.mark.parametrize(
    ("records", "method", "message"),
    [
        ([PREFERENCES["preference"]], "supervised", "no data for method 'supervised'. Use method"),
        ([{"messages": [HI, YO]}], "dpo", "format chat is no data for method 'dpo'"),
        ([{"prompt": "x"}], "reward", "no data for method 'reward'. Use method grpo"),
        ([{"prompt": "x"}], "supervised", "Use method grpo"),
    ],
)
def test_data_for_another_method_are_refused_once(problems, records, method, message):
    ((line, found),) = problems(records * 20, method)
    assert line is None
    assert message in found


def test_conversations_need_a_chat_template(problems):
    ((_, message),) = problems([{"messages": [HI, YO]}] * 3, template=None)
    assert "the model has no chat template" in message


THINKS_FIRST = (
    "{{ messages[0].content }}{% if add_generation_prompt %}<think>{% endif %}"
    "{{ messages[1].content if messages | length > 1 }}"
)


def test_a_template_that_writes_answers_unlike_its_prompts_is_said_once(run, problems):
    template = ChatTemplate(source=THINKS_FIRST, origin="the base model's template")
    ((line, message),) = problems([{"messages": [HI, YO]}] * 3, template=template)
    assert line is None
    assert "the base model's template does not write answers, or not as" in message
    assert texts(run([{"messages": [HI, YO]}], "grpo", template=template)) == [("Hi<think>", "")]


def test_a_model_without_end_token_cannot_be_trained(problems):
    ((_, message),) = problems([{"messages": [HI, YO]}], eos_token_ids=())
    assert "could never learn to end" in message


def test_a_token_that_the_model_lacks_is_named(problems):
    ((line, message),) = problems([{"messages": [HI, YO]}], vocab_size=257)
    assert line == 1
    assert "the token '</s>' (257) is not in the model's vocabulary" in message


@pytest.mark.parametrize(
    ("record", "method", "message"),
    [
        (
            {"prompt": "x", "completion": "y", "label": True},
            "supervised",
            "label: answers that are",
        ),
        ({"prompt": "x", "completion": ""}, "supervised", "the answer is empty"),
        ({"prompt": "x", "completion": 5}, "supervised", "completion: expected a text, got 5"),
        ({"prompt": "", "completion": "\ud800"}, "supervised", "half a surrogate"),
        ({"prompt": ""}, "grpo", "the prompt is empty"),
        ({"messages": [YO]}, "grpo", "no prompt before the answer"),
        (
            {"instruction": "x", "output": "y", "history": "z"},
            "supervised",
            "history: expected a l",
        ),
        ({"instruction": "x", "output": "y", "history": ["z"]}, "supervised", "history[0]"),
        ({"conversations": [{"from": "x", "value": "y"}]}, "supervised", "from: expected one of"),
        ({"conversations": [{"from": "human"}]}, "supervised", "value: expected a text, got noth"),
        ({"conversations": ["x"]}, "supervised", "conversations[0]: expected an object"),
        (
            {"conversations": [{"from": "function_call", "value": "x"}]},
            "supervised",
            "expected JSON text",
        ),
        (
            {"conversations": [{"from": "observation", "value": "x"}]},
            "supervised",
            "expected a function_call before it",
        ),
        ({"messages": [HI, YO], "tools": "{"}, "supervised", "tools: expected JSON text"),
        ({"messages": [HI, YO], "tools": [{}]}, "supervised", "tools[0]: Missing required"),
        ({"chosen": HH + "Yo", "rejected": HH + "Yo"}, "dpo", "are the same"),
        ({"chosen": HH + "Yo", "rejected": "No"}, "dpo", "expected turns of a conversation"),
        ({"chosen": [HI], "rejected": [HI, YO]}, "dpo", "must end in a message of the assistant"),
        ({"chosen": "a", "rejected": 1}, "reward", "rejected: expected a text"),
        ({"chosen": [HI, YO], "rejected": "x"}, "reward", "rejected: expected a list"),
        ({**PREFERENCES["openai-preference"], "input": "x"}, "dpo", "input: expected an object"),
        ({"prompt": "x" * 5000, "completion": "y"}, "supervised", "is the most that fits"),
        ({"prompt": "x" * 50000, "completion": "y"}, "supervised", "50,000 characters cannot fit"),
        ({"prompt": "x" * 1000}, "grpo", "1,001 tokens, but 999 is the most"),
        ({"x": 1}, "supervised", "no known format: the fields are 'x'. Known are openai-pref"),
        ({}, "supervised", "no known format: the fields are none"),
    ],
)
def test_a_bad_record_is_named(problems, record, method, message):
    ((line, found),) = problems([record], method)
    assert line == 1
    assert message in found
    assert found.endswith(".")


def test_the_templates_refusal_is_the_lines_problem(problems):
    record = {
        "messages": [{"role": "system", "content": "x"}, HI, {"role": "system", "content": "y"}, YO]
    }
    ((line, message),) = problems([{"messages": [HI, YO]}, record])
    assert line == 2
    assert "the Guanaco template knows a first system message, user and assistant" in message


def test_no_sequence_is_kept_once_a_problem_is_known(run, monkeypatch):
    kept = []
    monkeypatch.setattr(
        "server.datasets.prepare.make_dataset", lambda _, sequences: kept.extend(sequences)
    )
    with pytest.raises(DatasetErrors):
        run([{"messages": [HI, YO]}, {"x": 1}, {"messages": [HI, YO]}])
    assert len(kept) == 1


@pytest.mark.parametrize("name", ["\ud800", "a\0b", "a\nb", "x" * 100_000])
def test_messages_are_one_line_that_can_be_written_anywhere(run, problems, name):
    ((_, message),) = problems([{"messages": [{**HI, name: 1}, YO]}])
    prepared = run([{"messages": [HI, YO], name: 1}])
    for text in (message, *prepared.warnings):
        assert text.isprintable()
        assert len(text) <= 1000
        text.encode()


def test_a_warning_lists_some_of_many_unused_fields(run):
    records = [{"text": "x" * 20, f"field-{index}": 1} for index in range(1000)]
    (warning, *_) = run(records).warnings
    assert warning.endswith(" …") and warning.count("field-") == 10
