"""Blocks: who holds them, what is shared, what is evicted."""

from __future__ import annotations

import pytest

from engine.api import AdapterRef, GenerateRequest, SamplingParams
from engine.block_manager import BlockManager
from engine.sequence import Sequence
from tests.engine.fakes import adapter

BLOCK_SIZE = 4


def make_sequence(tokens, ref: AdapterRef | None = None, scale: float = 1.0, **params) -> Sequence:
    request = GenerateRequest(
        request_id="r",
        prompt_token_ids=tuple(tokens),
        params=SamplingParams(max_tokens=8, **params),
        adapter=ref,
        lora_scale=scale,
    )
    return Sequence.from_request(request, 1, eos_token_ids=frozenset(), max_len=1000)


def compute(blocks: BlockManager, sequence: Sequence) -> None:
    """As if a step had run all tokens."""
    sequence.num_computed_tokens = sequence.num_tokens
    blocks.commit(sequence)


def admit_and_compute(blocks: BlockManager, sequence: Sequence) -> Sequence:
    assert blocks.admit(sequence, num_spare=0)
    compute(blocks, sequence)
    blocks.check_integrity([sequence])
    return sequence


def test_a_sequence_gets_exactly_the_blocks_its_tokens_need():
    blocks = BlockManager(8, BLOCK_SIZE)
    sequence = make_sequence(range(9))
    assert blocks.admit(sequence, num_spare=0)
    assert len(sequence.block_table) == 3
    assert blocks.usage == 3 / 8
    blocks.check_integrity([sequence])
    blocks.release(sequence)
    blocks.check_integrity([])
    assert blocks.num_available == 8


def test_admission_leaves_the_spare_blocks_alone():
    blocks = BlockManager(4, BLOCK_SIZE)
    sequence = make_sequence(range(9))
    assert not blocks.admit(sequence, num_spare=2)
    assert sequence.block_table == [] and blocks.num_available == 4
    assert blocks.admit(sequence, num_spare=1)


def test_an_equal_beginning_shares_the_same_blocks():
    blocks = BlockManager(8, BLOCK_SIZE)
    first = admit_and_compute(blocks, make_sequence([1, 2, 3, 4, 5, 6, 7, 8, 9]))
    second = make_sequence([1, 2, 3, 4, 5, 6, 7, 8, 60, 61])
    assert blocks.admit(second, num_spare=0)
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    assert second.num_computed_tokens == 8
    blocks.check_integrity([first, second])
    assert (blocks.prefix_cache_queries, blocks.prefix_cache_hits) == (19, 8)


def test_the_last_prompt_token_is_always_left_to_compute():
    blocks = BlockManager(8, BLOCK_SIZE)
    admit_and_compute(blocks, make_sequence(range(8)))
    again = make_sequence(range(8))
    assert blocks.admit(again, num_spare=0)
    assert again.num_computed_tokens == 4


def test_blocks_that_are_not_computed_yet_are_not_shared():
    blocks = BlockManager(8, BLOCK_SIZE)
    first, second = make_sequence(range(9)), make_sequence(range(9))
    assert blocks.admit(first, num_spare=0) and blocks.admit(second, num_spare=0)
    assert second.num_computed_tokens == 0
    compute(blocks, first)
    compute(blocks, second)  # twins: the second's blocks stay nameless
    blocks.check_integrity([first, second])
    blocks.release(first)
    blocks.release(second)
    blocks.check_integrity([])


@pytest.mark.parametrize(
    "ref, scale",
    [
        (None, 1.0),
        (adapter(1, generation=2), 1.0),
        (adapter(2, generation=1), 1.0),
        (adapter(1, generation=1), 0.5),
    ],
    ids=["base", "other generation", "other adapter", "other scale"],
)
def test_nothing_is_shared_across_adapters_generations_and_scales(ref, scale):
    blocks = BlockManager(8, BLOCK_SIZE)
    admit_and_compute(blocks, make_sequence(range(9), adapter(1, generation=1)))
    other = make_sequence(range(9), ref, scale)
    assert blocks.admit(other, num_spare=0)
    assert other.num_computed_tokens == 0


def test_the_same_generation_and_scale_share_whatever_the_name():
    blocks = BlockManager(8, BLOCK_SIZE)
    admit_and_compute(blocks, make_sequence(range(9), adapter(1, name="old name"), 0.5))
    other = make_sequence(range(9), adapter(1, name="new name"), 0.5)
    assert blocks.admit(other, num_spare=0)
    assert other.num_computed_tokens == 8


def test_the_base_at_any_scale_is_the_base():
    blocks = BlockManager(8, BLOCK_SIZE)
    admit_and_compute(blocks, make_sequence(range(9), None, 1.0))
    other = make_sequence(range(9), None, 0.5)
    assert blocks.admit(other, num_spare=0)
    assert other.num_computed_tokens == 8


def test_a_request_for_prompt_logprobs_reads_no_cache_but_feeds_it():
    blocks = BlockManager(16, BLOCK_SIZE)
    admit_and_compute(blocks, make_sequence(range(9)))
    asking = make_sequence(range(9), prompt_logprobs=0)
    assert blocks.admit(asking, num_spare=0)
    assert asking.num_computed_tokens == 0
    assert blocks.prefix_cache_queries == 9  # the first one's only


def test_released_blocks_are_found_again_until_their_space_is_needed():
    blocks = BlockManager(4, BLOCK_SIZE)
    first = admit_and_compute(blocks, make_sequence(range(9)))
    blocks.release(first)
    assert blocks.num_available == 4
    again = make_sequence(range(9))
    assert blocks.admit(again, num_spare=0)
    assert again.num_computed_tokens == 8
    blocks.release(again)
    other = admit_and_compute(blocks, make_sequence(range(40, 55)))  # takes all four blocks
    blocks.check_integrity([other])
    blocks.release(other)
    last = make_sequence(range(9))
    assert blocks.admit(last, num_spare=0)
    assert last.num_computed_tokens == 0


def test_the_least_recently_used_text_is_evicted_first_and_its_end_before_its_beginning():
    blocks = BlockManager(6, BLOCK_SIZE)
    for start in (0, 100, 200):
        blocks.release(admit_and_compute(blocks, make_sequence(range(start, start + 8))))
    # All six blocks are cached, two per text; three new ones evict the oldest text and one end.
    newcomer = admit_and_compute(blocks, make_sequence(range(300, 312)))
    found = {}
    for start in (0, 100, 200):
        probe = make_sequence([*range(start, start + 8), 1])
        found[start] = len(blocks._find_shared(probe))
    assert found == {0: 0, 100: 1, 200: 2}
    blocks.check_integrity([newcomer])


def test_admission_counts_shared_blocks_that_have_to_be_revived():
    blocks = BlockManager(3, BLOCK_SIZE)
    blocks.release(admit_and_compute(blocks, make_sequence(range(8))))
    longer = make_sequence(range(13))  # 4 blocks: 2 shared + 2 new, but there are 3 in all
    assert not blocks.admit(longer, num_spare=0)
    blocks.check_integrity([longer])


def test_generated_tokens_are_shared_too():
    blocks = BlockManager(8, BLOCK_SIZE)
    sequence = admit_and_compute(blocks, make_sequence(range(3)))
    for token in (50, 51):
        sequence.append(token)
        assert blocks.extend(sequence)
        compute(blocks, sequence)
    follow_up = make_sequence([0, 1, 2, 50, 51])
    assert blocks.admit(follow_up, num_spare=0)
    assert follow_up.num_computed_tokens == 4
    blocks.check_integrity([sequence, follow_up])


def test_extend_takes_a_block_only_when_one_is_full_and_says_when_there_is_none():
    blocks = BlockManager(2, BLOCK_SIZE)
    sequence = admit_and_compute(blocks, make_sequence(range(4)))
    for expected in (2, 2, 2, 2):
        sequence.append(0)
        assert blocks.extend(sequence)
        assert len(sequence.block_table) == expected
    sequence.append(0)
    assert not blocks.extend(sequence)
    blocks.check_integrity([sequence])


def test_a_forgotten_sequence_leaves_nothing_to_share():
    blocks = BlockManager(8, BLOCK_SIZE)
    sequence = admit_and_compute(blocks, make_sequence(range(9)))
    blocks.forget(sequence)
    blocks.check_integrity([sequence])
    blocks.release(sequence)
    blocks.check_integrity([])
    again = make_sequence(range(9))
    assert blocks.admit(again, num_spare=0)
    assert again.num_computed_tokens == 0


def test_nothing_is_shared_when_prefix_caching_is_off():
    blocks = BlockManager(8, BLOCK_SIZE, enable_prefix_caching=False)
    admit_and_compute(blocks, make_sequence(range(9)))
    again = make_sequence(range(9))
    assert blocks.admit(again, num_spare=0)
    assert again.num_computed_tokens == 0


def test_the_integrity_check_finds_a_leak():
    blocks = BlockManager(8, BLOCK_SIZE)
    admit_and_compute(blocks, make_sequence(range(9)))
    with pytest.raises(AssertionError, match="references"):
        blocks.check_integrity([])
