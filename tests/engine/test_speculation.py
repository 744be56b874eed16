"""Prompt lookup: what is guessed, and that a text never depends on it."""

from __future__ import annotations

import itertools
import json
import random
from types import SimpleNamespace

import pytest
import torch

from engine.api import GenerateRequest, GrammarSpec, SamplingParams
from engine.config import SchedulerConfig, SpeculativeConfig
from engine.errors import GrammarError
from engine.sampler import NOT_REACHED, Sampler
from engine.sequence import Sequence
from engine.speculation import PromptLookup
from tests.engine.fakes import EOS, VOCAB_SIZE, FakeEngine, adapter

CONFIG = json.dumps({"num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1})
REPETITIVE = [5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7, 8, 5, 6]
KINDS = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 0.8, "seed": 3},
    "truncated": {"temperature": 0.9, "seed": 4, "top_k": 5, "top_p": 0.8, "min_p": 0.05},
    "penalties": {
        "temperature": 0.0,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
    },
    "drawn with penalties": {"temperature": 0.6, "seed": 5, "frequency_penalty": 0.3},
    "bias": {"temperature": 0.0, "logit_bias": ((9, 2.0), (10, -3.0))},
    "logprobs": {"temperature": 0.5, "seed": 6, "logprobs": 3},
    "prompt logprobs": {"temperature": 0.0, "prompt_logprobs": 2, "logprobs": 0},
    "eos": {"temperature": 0.7, "seed": 7, "ignore_eos": False},
    "stop tokens": {"temperature": 0.0, "stop_token_ids": (11, 12, 13, 17, 23)},
    "min tokens": {"temperature": 0.0, "min_tokens": 25, "stop_token_ids": tuple(range(3, 40))},
    "one token": {"temperature": 0.0, "max_tokens": 1},
    "five tokens": {"temperature": 0.0, "max_tokens": 5},
}


def engine(speculative_config: str | None = CONFIG, **options) -> FakeEngine:
    fake = FakeEngine(speculative_config=speculative_config, **options)
    fake.model.originality = 0.05
    return fake


def said(fake: FakeEngine, request_id: str) -> tuple:
    """All that a client can see of an answer, but when it came."""
    deltas = fake.deltas[request_id]
    final = fake.final(request_id)
    logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    return (
        fake.text(request_id), logprobs, deltas[0].prompt_logprobs, final.finish_reason,
        final.stop_token_id, final.score, deltas[0].num_cached_tokens,
    )  # fmt: skip


def test_the_tokens_after_the_last_occurrence_of_the_longest_ending_are_proposed():
    lookup = PromptLookup(SpeculativeConfig.from_json(CONFIG))
    tokens = [1, 2, 3, 40, 41, 9, 2, 3, 50, 51, 1, 2, 3]
    assert lookup.propose(sequence(tokens), 2) == [40, 41]  # of 1 2 3, not of 2 3
    assert lookup.propose(sequence([*tokens[:10], 8, 2, 3]), 2) == [50, 51]  # the last 2 3
    assert lookup.propose(sequence([1, 2, 3, 4]), 4) == []


def test_a_short_period_fills_all_drafts():
    lookup = PromptLookup(SpeculativeConfig.from_json(CONFIG))
    assert lookup.propose(sequence([7, 1, 2, 1, 2]), 4) == [1, 2, 1, 2]
    assert lookup.propose(sequence([7, 7]), 3) == [7, 7, 7]


def test_an_ending_shorter_than_prompt_lookup_min_is_not_searched_for():
    config = SpeculativeConfig(num_speculative_tokens=4, prompt_lookup_max=3, prompt_lookup_min=2)
    lookup = PromptLookup(config)
    assert lookup.propose(sequence([1, 2, 3, 9, 3]), 4) == []
    assert lookup.propose(sequence([1, 2, 3, 9, 2, 3]), 4) == [9, 2, 3, 9]


def test_wrong_drafts_are_followed_by_pauses_and_right_ones_by_more():
    lookup = PromptLookup(SpeculativeConfig.from_json(CONFIG))
    own = sequence([1, 2, 1, 2])

    def step(*, num_right: int) -> int:
        """Bring so many of the drafts and another token; returns how many drafts there were."""
        drafts = own.draft_token_ids = lookup.propose(own, 100)
        other = 3 - drafts[num_right] if num_right < len(drafts) else 1
        brought = [*drafts[:num_right], other]
        for token_id in brought:
            own.append(token_id)
        if drafts:
            lookup.learn(own, brought)
        return len(drafts)

    assert [step(num_right=0) for _ in range(10)] == [4, 0, 1, 0, 0, 1, 0, 0, 0, 1]
    assert [step(num_right=0) for _ in range(4)] == [0, 0, 0, 0]
    assert [step(num_right=1) for _ in range(3)] == [1, 3, 3]
    assert step(num_right=2) == 3
    assert step(num_right=4) == 4
    assert (lookup.num_drafts, lookup.num_draft_tokens, lookup.num_accepted_tokens) == (9, 21, 9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", [REPETITIVE, [3, 1, 4, 15, 9, 26]], ids=["repetitive", "not"])
def test_whatever_a_request_asks_for_the_answer_is_the_one_without_drafts(kind, prompt):
    answers = []
    for fake in (engine(None), engine()):
        fake.add("a", prompt, **{"max_tokens": 60, **KINDS[kind]})
        fake.run()
        answers.append(said(fake, "a"))
    assert answers[0] == answers[1]


def test_a_text_that_repeats_itself_takes_fewer_steps():
    num_steps = []
    for fake in (engine(None), engine()):
        fake.add("a", REPETITIVE, max_tokens=60)
        fake.run()
        num_steps.append(len(fake.deltas["a"]))
    assert num_steps[0] == 60 and num_steps[1] < 30
    stats = fake.stats
    assert stats.num_accepted_tokens == 60 - num_steps[1]
    assert stats.num_drafts <= num_steps[1]
    assert stats.num_accepted_tokens < stats.num_draft_tokens <= 4 * stats.num_drafts


def test_a_mixed_batch_with_adapters_says_what_it_says_without_drafts():
    refs = [None, adapter(1), adapter(2), adapter(3)]
    answers = []
    for fake in (engine(None, num_blocks=256), engine(num_blocks=256)):
        for (number, kind), ref in zip(enumerate(KINDS.values()), itertools.cycle(refs)):
            prompt = [*REPETITIVE[number % 4 :], number]
            fake.add(f"r{number}", prompt, adapter=ref, **{"max_tokens": 40, **kind})
        fake.run()
        answers.append([said(fake, f"r{number}")[:4] for number in range(len(KINDS))])
    assert answers[0] == answers[1]
    assert fake.stats.num_accepted_tokens > 50


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_preempted_sequences_say_the_same(enable_prefix_caching):
    answers = []
    for config in (None, CONFIG):
        fake = engine(
            config, num_blocks=14, max_num_seqs=4, enable_prefix_caching=enable_prefix_caching
        )
        for number in range(4):
            fake.add(f"r{number}", [number, *REPETITIVE[:9]], max_tokens=24)
        fake.run()
        assert fake.stats.num_preemptions > 0
        answers.append([fake.text(f"r{number}") for number in range(4)])
    assert answers[0] == answers[1]
    assert fake.stats.num_accepted_tokens > 0


def test_the_prefix_cache_learns_the_same_blocks_and_none_of_a_rejected_draft():
    names = []
    for fake in (engine(None, num_blocks=256), engine(num_blocks=256)):
        for number in range(3):
            fake.add(f"r{number}", [number, *REPETITIVE], max_tokens=40, seed=1, temperature=0.7)
        fake.run()
        names.append(set(fake.engine.blocks._block_of_hash))
    assert names[0] == names[1]
    assert fake.stats.num_accepted_tokens < fake.stats.num_draft_tokens


def test_drafts_take_only_the_room_that_decodes_and_prompts_leave():
    fake = engine(max_num_seqs=4, max_num_batched_tokens=6, num_blocks=256)
    fake.add("a", REPETITIVE, max_tokens=50)
    while len(fake.text("a") if "a" in fake.deltas else []) < 20:
        fake.step()
    assert fake.stats.num_step_tokens > 1, "alone it has drafts"
    fake.add("b", list(range(20)), max_tokens=4)
    for _ in range(4):  # 20 prompt tokens beside a decode, 6 in a step
        fake.step()
        assert fake.stats.num_step_tokens <= 6
        assert len(fake.deltas["a"][-1].token_ids) <= 2
    assert fake.text("b")
    fake.run()


def test_drafts_never_preempt_and_give_their_blocks_back():
    fake = engine(num_blocks=9, block_size=4)  # 36 tokens: all of them in the end
    fake.add("a", REPETITIVE, max_tokens=22)
    while fake.engine.has_work():
        fake.step()  # checks that no block is held beyond the text
    assert fake.stats.num_preemptions == 0 and len(fake.text("a")) == 22
    assert fake.engine.blocks.num_available == 9


@pytest.mark.parametrize("harm", ["fail_on_token", "nan_on_token"])
def test_a_wrong_draft_that_breaks_the_model_harms_nobody(harm):
    trap = 33
    prompt = [token for other in range(VOCAB_SIZE) if other != trap for token in (other, trap)]
    texts = []
    for config in (None, CONFIG):
        fake = engine(config, num_blocks=64, max_num_batched_tokens=256, max_model_len=256)
        fake.add("a", prompt, max_tokens=12)
        fake.step()
        setattr(fake.model, harm, trap)  # after every token the prompt has had a trap
        fake.run()
        texts.append(fake.text("a"))
        assert fake.final("a").finish_reason == "length"
    assert texts[0] == texts[1] and trap not in texts[0]
    assert fake.stats.num_draft_tokens > 0 or harm == "fail_on_token"


@pytest.mark.parametrize("seed", range(4))
def test_a_storm_of_requests_is_answered_as_without_drafts(seed):
    answers = []
    for config in (None, CONFIG):
        dice = random.Random(seed)
        fake = engine(config, num_blocks=40, max_num_seqs=6, max_num_batched_tokens=16)
        kinds = list(KINDS.values())
        expected = {}
        for number in range(40):
            prompt = [dice.randrange(3, 9) for _ in range(dice.randrange(1, 30))]
            options = {"max_tokens": dice.randrange(1, 40), **dice.choice(kinds)}
            options["adapter"] = dice.choice([None, adapter(1), adapter(2), adapter(3)])
            is_cancelled = dice.random() < 0.1
            num_steps = dice.randrange(4)
            fake.add(f"r{number}", prompt, **options)
            for _ in range(num_steps):
                fake.step()
            if is_cancelled:
                fake.engine.cancel(f"r{number}")
            else:
                expected[f"r{number}"] = None
        fake.run()
        answers.append({name: said(fake, name)[:2] for name in expected})
    assert answers[0] == answers[1]
    assert fake.stats.num_accepted_tokens > 0


class Counting:
    """A grammar: 10, 11, 12, ... up to `last`, then eos. Copies are counted."""

    def __init__(self, last: int, state: int = 10) -> None:
        self.last, self.state, self.accepted = last, state, 0

    def copy(self) -> Counting:
        return Counting(self.last, self.state)

    def fill_mask(self, row: torch.Tensor) -> None:
        if self.is_finished():
            raise GrammarError("asked behind the end")
        row.zero_()
        allowed = self.state if self.state <= self.last else EOS
        row[allowed // 32] |= 1 << allowed % 32

    def accept(self, token_id: int) -> None:
        if token_id != (self.state if self.state <= self.last else EOS):
            raise GrammarError("not allowed")
        self.state += 1
        self.accepted += 1

    def is_finished(self) -> bool:
        return self.state == self.last + 2


def sequence(prompt: list[int], drafts: tuple[int, ...] = (), grammar=None, **params) -> Sequence:
    request = GenerateRequest(
        request_id="a",
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(max_tokens=100, **{"temperature": 0.0, **params}),
    )
    own = Sequence.from_request(request, 0, eos_token_ids=frozenset([EOS]), max_len=1000)
    own.draft_token_ids = list(drafts)
    own.grammar = grammar
    return own


@pytest.mark.parametrize(
    ("drafts", "chosen"),
    [
        ((10, 11, 12), [10, 11, 12, 13]),
        ((10, 11, 30), [10, 11, 12]),
        ((30, 11, 12), [10]),
    ],
)
def test_a_grammar_goes_on_by_what_was_chosen_and_no_further(drafts, chosen):
    own = sequence([1], drafts, Counting(last=20))
    tokens = Sampler().sample(torch.zeros(4, VOCAB_SIZE), [own] * 4)
    assert [t.token_id for t in tokens if t is not NOT_REACHED] == chosen
    assert all(t.error is None for t in tokens)
    assert own.grammar.accepted == len(chosen)


def test_nothing_is_chosen_behind_the_end_of_a_grammar():
    own = sequence([1], (10, EOS, 5), Counting(last=10))
    tokens = Sampler().sample(torch.zeros(4, VOCAB_SIZE), [own] * 4)
    assert [t.token_id for t in tokens] == [10, EOS, -1, -1]
    assert own.grammar.is_finished() and tokens[2] is NOT_REACHED


def test_an_engine_with_a_grammar_gives_the_text_without_drafts():
    answers = []
    for fake in (engine(None), engine()):
        fake.add("a", [10, 11, 12, 13, 9], max_tokens=30, grammar=GrammarSpec(kind="regex"))
        fake.compiler.futures[0].set_result(SimpleNamespace(matcher=lambda: Counting(last=13)))
        fake.run()
        answers.append(said(fake, "a"))
        assert fake.text("a") == [10, 11, 12, 13, EOS]
        assert fake.final("a").finish_reason == "stop"
    assert answers[0] == answers[1]
    assert len(fake.deltas["a"]) < 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("4", "a JSON object"),
        ("{", "a JSON object"),
        ('{"method": "eagle", "num_speculative_tokens": 4}', 'method: expected "ngram"'),
        ('{"num_speculative_tokens": 4, "model": "x"}', "got 'model'"),
        ('{"method": "ngram"}', "num_speculative_tokens: expected a positive number, got None"),
        ('{"num_speculative_tokens": true}', "expected a positive number, got True"),
        ('{"num_speculative_tokens": 4, "prompt_lookup_max": 0}', "prompt_lookup_max"),
        (
            '{"num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 3}',
            "prompt_lookup_min: expected at most 2, got 3",
        ),
    ],
)
def test_a_config_that_means_nothing_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        SchedulerConfig(speculative_config=text)


@pytest.mark.parametrize(
    ("given", "longest", "shortest"),
    [({}, 5, 5), ({"prompt_lookup_max": 3}, 3, 3), ({"prompt_lookup_min": 2}, 2, 2)],
)
def test_what_is_left_out_is_as_in_vllm(given, longest, shortest):
    text = json.dumps({"method": "ngram", "num_speculative_tokens": 4, **given})
    config = SchedulerConfig(speculative_config=text).speculation
    assert config == SpeculativeConfig(
        num_speculative_tokens=4, prompt_lookup_max=longest, prompt_lookup_min=shortest
    )
    assert SchedulerConfig().speculation is None
