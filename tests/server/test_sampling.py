import json

import pytest

from engine.errors import ContextLengthExceeded
from server.errors import ApiError
from server.message_schemas import StructuredOutputs
from server.sampling import check_prompt, choice_seed, sampling_params, structure_grammar
from server.schemas import CompletionRequest
from tests.server.fake_engine import FakeEngine

INFO = FakeEngine(max_model_len=100).info


def params(**fields):
    body = CompletionRequest(model="m", prompt="x", **fields)
    return sampling_params(
        body, max_tokens=10, asked_max_tokens=fields.get("max_tokens"), logprobs=None,
        prompt_logprobs=None, grammar=None, info=INFO,
    )  # fmt: skip


def test_defaults_are_openais():
    found = params()
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (1.0, 1.0, 0, 0.0)
    assert (found.presence_penalty, found.frequency_penalty) == (0.0, 0.0)
    assert (found.repetition_penalty, found.seed, found.logit_bias) == (1.0, None, ())


def test_everything_said_reaches_the_engine():
    found = params(
        temperature=0.0, top_p=0.5, top_k=7, min_p=0.1, presence_penalty=-1.0,
        frequency_penalty=1.5, repetition_penalty=1.2, seed=3, ignore_eos=True, min_tokens=2,
        stop_token_ids=[5, 6, 5], logit_bias={"7": -100.0},
    )  # fmt: skip
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.0, 0.5, 7, 0.1)
    assert (found.presence_penalty, found.frequency_penalty) == (-1.0, 1.5)
    assert (found.repetition_penalty, found.seed, found.ignore_eos) == (1.2, 3, True)
    assert (found.min_tokens, found.stop_token_ids) == (2, (5, 6))
    assert found.logit_bias == ((7, -100.0),)


def test_vllms_minus_one_is_no_top_k():
    assert params(top_k=-1).top_k == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"258": 1.0}}, "logit_bias"),
        ({"stop_token_ids": [258]}, "stop_token_ids"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ],
)
def test_what_the_model_has_not_is_refused(fields, param):
    with pytest.raises(ApiError) as caught:
        params(**fields)
    assert caught.value.param == param


def test_seeds_of_choices_differ_and_stay_in_range():
    assert [choice_seed(7, i) for i in range(3)] == [7, 8, 9]
    assert choice_seed(None, 3) is None
    assert 0 <= choice_seed(-1, 0) < 2**63
    assert 0 <= choice_seed(2**63 - 1, 5) < 2**63


def test_prompts_that_cannot_run():
    check_prompt([1] * 99, INFO, "prompt")
    with pytest.raises(ContextLengthExceeded) as caught:
        check_prompt([1] * 100, INFO, "prompt")
    assert caught.value.param == "prompt"
    with pytest.raises(ApiError, match="258"):
        check_prompt([1, 258], INFO, "prompt")
    with pytest.raises(ApiError, match="empty"):
        check_prompt([], INFO, "prompt")


def test_structured_outputs_become_grammars():
    def grammar(**fields):
        return structure_grammar(StructuredOutputs.model_validate(fields), "guided_json")

    assert grammar(regex="a+").kind == "regex"
    assert grammar(choice=['a"b', "c"]).source == 'start: "a\\"b" | "c"'
    assert grammar(grammar='start: "x"').kind == "lark"
    schema = {"type": "object"}
    for value in (schema, json.dumps(schema)):
        found = grammar(json=value)
        assert found.kind == "json_schema"
        assert json.loads(found.source)["type"] == "object"
    assert structure_grammar(None, "guided_json") is None
    with pytest.raises(ApiError, match="guided_json: not valid JSON") as caught:
        grammar(json="{")
    assert caught.value.param == "guided_json"
