"""Tokens chosen in one operation, from tables and counts on the device: the same texts."""

import random

import pytest
import torch

from engine.sampler import Sampler
from engine.token_tables import TokenCounts
from kernels.choice import IN_PROMPT, MAX_COUNT
from tests.engine.choosing import choose_at_once
from tests.engine.fakes import FakeEngine, adapter
from tests.engine.test_sampler import VOCAB_SIZE, make_sequence, random_logits
from tests.engine.test_speculation import CONFIG, KINDS, REPETITIVE, engine, said

PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.5}


@pytest.mark.parametrize("config", [None, CONFIG], ids=["plain", "drafts"])
def test_every_kind_of_request_gets_the_answer_that_the_operators_give(config, monkeypatch):
    def answers() -> list[tuple]:
        fake = engine(config, num_blocks=256)
        for number, kind in enumerate(KINDS.values()):
            prompt = [*REPETITIVE[number % 4 :], number]
            fake.add(f"r{number}", prompt, **{"max_tokens": 40, **kind})
        fake.run()
        assert config is None or fake.stats.num_accepted_tokens > 50
        return [said(fake, f"r{number}")[:4] for number in range(len(KINDS))]

    expected = answers()
    choose_at_once(monkeypatch)
    assert answers() == expected


@pytest.mark.parametrize("seed", range(6))
def test_a_storm_with_penalties_preemptions_and_cancellations_is_answered_alike(seed, monkeypatch):
    """With drafts, step by step, and with a step launched before the last one's tokens are read."""

    def answers() -> dict[str, tuple]:
        dice = random.Random(seed)
        fake = engine(
            CONFIG if seed % 3 == 1 else None, num_blocks=30, max_num_seqs=6,
            max_num_batched_tokens=16, async_scheduling="on" if seed % 3 == 2 else "off",
        )  # fmt: skip
        kinds = [*KINDS.values(), PENALTIES, PENALTIES | {"temperature": 0.0}]
        left = []
        for number in range(40):
            prompt = [dice.randrange(3, 9) for _ in range(dice.randrange(1, 30))]
            options = {"max_tokens": dice.randrange(1, 40), "seed": number, **dice.choice(kinds)}
            options["adapter"] = dice.choice([None, adapter(1)])
            fake.add(f"r{number}", prompt, **options)
            for _ in range(dice.randrange(4)):
                fake.step()
            if dice.random() < 0.2:
                fake.engine.cancel(f"r{dice.randrange(number + 1)}")
            left.append(f"r{number}")
        fake.run()
        assert fake.stats.num_preemptions > 0
        return {name: said(fake, name)[:4] for name in left}

    expected = answers()
    choose_at_once(monkeypatch)
    assert answers() == expected


def test_a_step_that_failed_and_is_repeated_counts_its_tokens_once(monkeypatch):
    def answers() -> list[list[int]]:
        fake = FakeEngine(num_blocks=256)
        launch, numbers = Sampler.launch, iter(range(1000))

        def fail(self, logits, sequences):
            pending = launch(self, logits, sequences)
            if next(numbers) % 7 == 5:
                raise RuntimeError("after the device has chosen")
            return pending

        with monkeypatch.context() as patch:
            patch.setattr(Sampler, "launch", fail)
            for number in range(3):
                fake.add(f"r{number}", [number, 5, 6], max_tokens=30, **PENALTIES, temperature=0.0)
            for _ in range(100):
                fake.step()
        return [fake.text(f"r{number}") for number in range(3)]

    expected = answers()
    choose_at_once(monkeypatch)
    assert answers() == expected and len(expected[0]) > 5


def held(counts: TokenCounts, sequence) -> dict[int, int]:
    """Token id -> what its count says."""
    row = counts.bring_up_to_date()[counts.row(sequence)]
    return {int(i): int(row[i]) for i in row.nonzero().squeeze(1)}


def test_rows_of_counts_follow_their_sequences():
    cpu = torch.device("cpu")
    counts = TokenCounts()
    first, second, third = (make_sequence(i, prompt=(9, 9, i), **PENALTIES) for i in range(3))
    first.output_token_ids += [4, 4, 9]
    counts.keep([first], 10, cpu)
    assert held(counts, first) == {0: IN_PROMPT, 4: 2, 9: IN_PROMPT + 1}
    counts.keep([second, first], 10, cpu)
    first.output_token_ids.append(0)
    assert held(counts, first) == {0: IN_PROMPT + 1, 4: 2, 9: IN_PROMPT + 1}
    assert held(counts, second) == {1: IN_PROMPT, 9: IN_PROMPT}
    counts.keep([second, third], 10, cpu)  # the third takes the first's row
    assert held(counts, third) == {2: IN_PROMPT, 9: IN_PROMPT}
    assert len(counts.bring_up_to_date()) == 2
    counts.keep([], 10, cpu)
    assert len(counts.bring_up_to_date()) == 0


def test_a_prompt_is_marked_only_for_the_repetition_penalty():
    counts, sequence = TokenCounts(), make_sequence(prompt=(1, 2), presence_penalty=1.0)
    counts.keep([sequence], 10, torch.device("cpu"))
    assert held(counts, sequence) == {}


def test_counts_end_at_the_largest_that_16_bits_hold():
    counts, sequence = TokenCounts(), make_sequence(prompt=(3,), **PENALTIES)
    sequence.output_token_ids += [3] * (MAX_COUNT + 10)
    counts.keep([sequence], 10, torch.device("cpu"))
    assert held(counts, sequence) == {3: IN_PROMPT + MAX_COUNT}
    sequence.output_token_ids.append(3)
    assert held(counts, sequence) == {3: IN_PROMPT + MAX_COUNT}


def test_the_chosen_token_is_counted_where_it_is_chosen(monkeypatch):
    choose_at_once(monkeypatch)
    sampler, sequence = Sampler(), make_sequence(prompt=(1,), temperature=0.0, **PENALTIES)
    for step in range(20):
        logits = random_logits(1, seed=step % 3)
        sequence.append(sampler.sample(logits, [sequence])[0].token_id)
        place = sampler._counts._places[sequence]
        assert place.num_counted == len(sequence.output_token_ids), "nothing is left for the host"
    expected = {i: sequence.output_token_ids.count(i) for i in set(sequence.output_token_ids)}
    found = held(sampler._counts, sequence)
    assert found.pop(1) == IN_PROMPT + expected.pop(1, 0)
    assert found == expected
    assert sampler._counts.bring_up_to_date().shape == (1, VOCAB_SIZE)
