"""Whatever stands in a file, prepare answers with a data set or with DatasetErrors."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.datasets.prepare import prepare
from server.datasets.problems import DatasetErrors
from tests.server.datasets.served_models import ROOT, template
from tests.server.fake_engine import EOS, byte_tokenizer

HI = {"role": "user", "content": "Hi"}
YO = {"role": "assistant", "content": "Yo", "weight": 1}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLS = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "x"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
GPT = {"from": "gpt", "value": "Yo"}
RECORDS = [
    {"messages": [HI, CALLS, RESULT, YO], "tools": [TOOL], "parallel_tool_calls": True},
    {"conversations": [{"from": "human", "value": "Hi"}, GPT], "system": "x", "tools": "[]"},
    {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "1"},
            GPT,
        ]
    },
    {"instruction": "a", "input": "b", "output": "c", "system": "d", "history": [["e", "f"]]},
    {"instruction": "a", "instances": [{"input": "b", "output": "c"}]},
    {"prompt": "a", "completion": "b"},
    {"prompt": [HI], "completion": [YO]},
    {"input": "a", "output": "b"},
    {"text": "### Human: a### Assistant: b"},
    {"text": "<human>: a\n<bot>: b"},
    {"text": "plain"},
    {"prompt": "a"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": [HI], "chosen": [YO], "rejected": [{**YO, "content": "No"}]},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"input": {"messages": [HI]}, "preferred_output": [YO], "non_preferred_output": [CALLS]},
    {"instruction": "a", "chosen": "b", "rejected": "c"},
    {"conversations": [{"from": "human", "value": "a"}], "chosen": GPT, "rejected": CALLS},
]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
values = scalars | st.sampled_from(
    ["", " ", "\ud800", "</s>", [], {}, [[]], [None], [HI], [YO], HI, GPT, CALL, "{", "[1]", "[[]]"]
).map(copy.deepcopy)
MANY = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def places(value, path=()):
    """The path of everything inside a record, and of the record itself."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@st.composite
def mutated(draw, record):
    """A record in which something was replaced, removed or added."""
    record = copy.deepcopy(record)
    for _ in range(draw(st.integers(0, 2))):
        path = draw(st.sampled_from(list(places(record))))
        if not path:
            record[draw(st.sampled_from(["messages", "text", "tools", "prompt", "x"]))] = draw(
                values
            )
            continue
        inner = record
        for key in path[:-1]:
            inner = inner[key]
        if draw(st.booleans()):
            inner[path[-1]] = draw(values)
        elif isinstance(inner, dict):
            del inner[path[-1]]
            inner[draw(st.text(max_size=4))] = draw(values)
        else:
            inner.insert(path[-1], draw(values))
    return record


def outcome(path, method, name):
    """What prepare makes of a file; anything but a result or DatasetErrors is a failure."""
    try:
        return prepare(
            path,
            method=method,
            tokenizer=byte_tokenizer(),
            template=template(name),
            eos_token_ids=(EOS,),
            vocab_size=258,
            max_seq_len=700,
        )
    except DatasetErrors as errors:
        assert errors.num_problems >= len(errors.problems) >= 1
        str(errors).encode()
        assert all(problem.message.isprintable() for problem in errors.problems)
        return errors


@MANY
@given(data=st.data())
@pytest.mark.parametrize("name", ["guanaco", "reasoning"])
@pytest.mark.parametrize("method", ["supervised", "dpo", "grpo"])
def test_broken_records_raise_nothing_else(tmp_path, data, name, method):
    first = data.draw(st.sampled_from(RECORDS))
    lines = [json.dumps(data.draw(mutated(first))) for _ in range(data.draw(st.integers(1, 3)))]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    outcome(path, method, name)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_broken_bytes_raise_nothing_else(tmp_path, data):
    records = data.draw(st.lists(st.sampled_from(RECORDS), min_size=1, max_size=3))
    as_array = data.draw(st.booleans())
    text = json.dumps(records) if as_array else "\n".join(map(json.dumps, records))
    content = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content)))
        length = data.draw(st.integers(0, 3))
        content[place : place + length] = data.draw(st.binary(max_size=3))
    path = tmp_path / "data.jsonl"
    path.write_bytes(bytes(content))
    outcome(path, "supervised", "guanaco")


@pytest.mark.parametrize("depth", [200, 900, 5000])
@pytest.mark.parametrize("record", ["messages", "tools", "instruction"])
def test_deeply_nested_records_raise_nothing_else(tmp_path, depth, record):
    deep = '{"x":' * depth + "1" + "}" * depth
    tool = f'{{"type": "function", "function": {{"name": "f", "parameters": {deep}}}}}'
    text = {
        "messages": f'{{"messages": {deep}}}',
        "tools": f'{{"messages": {json.dumps([HI, YO])}, "tools": [{tool}]}}',
        "instruction": f'{{"instruction": "x", "output": "y", "more": {deep}}}',
    }[record]
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    for name in ("guanaco", "reasoning"):
        outcome(path, "supervised", name)


@pytest.mark.parametrize("path", sorted((ROOT / "demo").glob("*.jsonl")))
def test_files_of_this_repository_that_are_no_training_data_are_refused(path):
    assert isinstance(outcome(path, "supervised", "guanaco"), DatasetErrors)
