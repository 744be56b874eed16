"""Who runs in a step: order, budget, preemption, and fairness in places and in pool rows."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.engine.fakes import FakeEngine, adapter, expected_text

PROMPT = [5, 6, 7, 8, 9]


def scheduled(fake: FakeEngine) -> list[tuple[str, int]]:
    """Run one step and tell what was in it."""
    seen = []
    run = fake.engine._runner.run

    def spy(items, last):
        seen.extend((sequence.request_id, count) for sequence, count in items)
        return run(items, last)

    fake.engine._runner.run = spy
    try:
        fake.step()
    finally:
        fake.engine._runner.run = run
    return seen


def test_a_long_prompt_does_not_stall_running_decodes():
    fake = FakeEngine(max_num_batched_tokens=10, max_num_seqs=4)
    fake.add("a", PROMPT, max_tokens=20)
    fake.add("b", PROMPT, max_tokens=20)
    fake.step()
    fake.add("long", [i % 60 for i in range(40)])
    for expected_chunk in (8, 8, 8, 8, 8):
        assert scheduled(fake) == [("a", 1), ("b", 1), ("long", expected_chunk)]
    assert scheduled(fake) == [("a", 1), ("b", 1), ("long", 1)]


def test_a_step_never_holds_more_tokens_or_sequences_than_allowed():
    fake = FakeEngine(max_num_batched_tokens=12, max_num_seqs=5, num_blocks=200)
    for i in range(20):
        fake.add(f"r{i}", [i, *PROMPT * (1 + i % 5)], max_tokens=1 + i % 7)
    while fake.engine.has_work():
        items = scheduled(fake)
        assert len(items) <= 5 and sum(count for _, count in items) <= 12


def test_a_lower_priority_value_runs_first_and_equals_in_order_of_arrival():
    fake = FakeEngine(max_num_seqs=1)
    for request_id, priority in [("a", 1), ("b", 0), ("c", 1), ("d", -1), ("e", 0)]:
        fake.add(request_id, PROMPT, priority=priority, max_tokens=2)
    fake.run()
    assert list(fake.deltas) == ["d", "b", "e", "a", "c"]


def test_an_urgent_prompt_goes_before_the_rest_of_a_long_one():
    fake = FakeEngine(max_num_batched_tokens=8, max_num_seqs=4)
    fake.add("long", [i % 60 for i in range(40)], priority=1)
    assert scheduled(fake) == [("long", 8)]
    fake.add("urgent", PROMPT, priority=0)
    assert scheduled(fake) == [("urgent", 5), ("long", 3)]


def test_the_lowest_priority_and_then_the_newest_is_preempted():
    fake = FakeEngine(num_blocks=10, block_size=4, max_num_seqs=4, enable_prefix_caching=False)
    # Two blocks each, full after three tokens: the eleventh block is missing.
    for request_id, priority in [("low", 1), ("old", 0), ("new", 0)]:
        fake.add(request_id, PROMPT, priority=priority, max_tokens=20)
    while fake.stats is None or fake.stats.num_preemptions == 0:
        fake.step()
    assert fake.running == ["old", "new"]
    while fake.stats.num_preemptions == 1:
        fake.step()
    assert fake.running == ["old"]
    fake.run()
    for request_id in ("low", "old", "new"):
        assert fake.text(request_id) == expected_text(PROMPT, 20)


def test_a_preempted_sequence_keeps_its_place_in_the_queue():
    fake = FakeEngine(num_blocks=6, block_size=4, max_num_seqs=2, enable_prefix_caching=False)
    fake.add("a", PROMPT, max_tokens=16)
    fake.add("b", PROMPT, max_tokens=12)
    while fake.stats is None or fake.stats.num_preemptions == 0:
        fake.step()
    fake.add("c", [1], max_tokens=1)
    fake.run()
    ends = [name for name in fake.deltas if fake.deltas[name][-1].finish_reason]
    assert ends.index("b") < ends.index("c")


def test_nobody_overtakes_a_prompt_that_waits_for_blocks():
    fake = FakeEngine(num_blocks=10, block_size=4, max_num_seqs=4, max_model_len=40)
    fake.add("running", PROMPT, max_tokens=10)
    fake.step()
    fake.add("large", [i % 60 for i in range(36)], max_tokens=2)
    fake.add("small", [1], max_tokens=2)
    fake.step()
    assert fake.running == ["running"]
    fake.run()
    assert fake.final("small").queued_s >= 0
    assert fake.deltas["large"][0].queued_s <= fake.deltas["small"][0].queued_s + 1


def test_one_sequence_can_use_the_whole_cache():
    fake = FakeEngine(num_blocks=4, block_size=4, max_model_len=100)
    fake.add("a", [1, 2, 3], max_tokens=100)
    fake.add("b", [1, 2, 3], max_tokens=100)
    fake.run()
    for request_id in "ab":
        assert fake.text(request_id) == expected_text([1, 2, 3], 13)


# Fairness between adapters.


def first_schedules(fake: FakeEngine, max_steps: int = 3000) -> list[str]:
    """Run to the end; request ids in the order in which they first produced a token."""
    for _ in range(max_steps):
        if not fake.engine.has_work():
            return list(fake.deltas)
        fake.step()
    raise AssertionError("the engine does not come to an end")


def test_a_newcomer_gets_the_first_free_place_before_a_hot_adapters_queue():
    fake = FakeEngine(max_num_seqs=4, num_blocks=400, num_rows=4)
    for i in range(200):
        fake.add(f"hot{i}", PROMPT, adapter=adapter(1), max_tokens=4)
    fake.step()
    for i in range(3):
        fake.add(f"cool{i}", PROMPT, adapter=adapter(2), max_tokens=4)
    fake.add("base", PROMPT, max_tokens=4)
    order = first_schedules(fake)
    # Four were running when they came; the next places are the newcomers', shared with the hot one.
    assert {order.index("cool0"), order.index("base")} == {4, 5}
    assert order.index("cool1") < 10 and order.index("cool2") < 14


def test_places_are_shared_evenly_between_adapters_that_all_have_a_queue():
    fake = FakeEngine(max_num_seqs=6, num_blocks=400, num_rows=4)
    for i in range(60):
        fake.add(f"hot{i}", PROMPT, adapter=adapter(1), max_tokens=6)
    for uid in (2, 3):
        for i in range(20):
            fake.add(f"cool{uid}-{i}", PROMPT, adapter=adapter(uid), max_tokens=6)
    for _ in range(40):
        fake.step()
        running = Counter(s.adapter.uid for s in fake.engine.scheduler.running)
        assert max(running.values(), default=0) <= 2


def test_with_one_place_adapters_take_turns():
    fake = FakeEngine(max_num_seqs=1, num_rows=4)
    for i in range(6):
        fake.add(f"hot{i}", PROMPT, adapter=adapter(1), max_tokens=2)
    for i in range(3):
        fake.add(f"cool{i}", PROMPT, adapter=adapter(2), max_tokens=2)
    order = first_schedules(fake)
    assert order[:6] == ["hot0", "cool0", "hot1", "cool1", "hot2", "cool2"]


def test_clients_that_always_come_back_do_not_starve_a_queue():
    # Two light adapters each keep one request in the queue for ever; the hot one must still move.
    fake = FakeEngine(max_num_seqs=1, num_rows=4)
    fake.add("hot", PROMPT, adapter=adapter(1), max_tokens=2)
    for i in range(40):
        for uid in (2, 3):
            fake.add(f"light{uid}-{i}", PROMPT, adapter=adapter(uid), max_tokens=2)
        fake.step()
        fake.step()
    order = [*fake.deltas]
    assert "hot" in order and order.index("hot") <= 3


@pytest.mark.parametrize("load_steps", [0, 3])
def test_an_adapter_gets_a_row_though_hot_adapters_hold_them_all(load_steps):
    fake = FakeEngine(max_num_seqs=4, num_blocks=400, num_rows=2, load_steps=load_steps)
    for i in range(150):
        fake.add(f"hot{i}", PROMPT, adapter=adapter(1), max_tokens=4)
        fake.add(f"warm{i}", PROMPT, adapter=adapter(2), max_tokens=4)
    for _ in range(8):
        fake.step()
    fake.add("cool", PROMPT, adapter=adapter(3), max_tokens=4)
    order = first_schedules(fake)
    assert order.index("cool") < 30
    assert len(order) == 301


def test_rows_go_round_among_more_hot_adapters_than_rows():
    fake = FakeEngine(max_num_seqs=4, num_blocks=400, num_rows=2, load_steps=2)
    for i in range(40):
        for uid in range(1, 6):
            fake.add(f"{uid}-{i}", PROMPT, adapter=adapter(uid), max_tokens=3)
    order = first_schedules(fake)
    first_turn = {uid: min(order.index(f"{uid}-{i}") for i in range(40)) for uid in range(1, 6)}
    assert max(first_turn.values()) < 60
    assert len(order) == 200


def test_a_pinned_adapter_is_not_asked_for_its_row_and_the_others_still_go_round():
    fake = FakeEngine(max_num_seqs=4, num_blocks=400, num_rows=2)
    pinned = adapter(1)
    fake.pool.pinned.add(pinned)
    fake.pool._place(pinned)
    fake.engine.scheduler.pinned.add(pinned)
    for i in range(60):
        fake.add(f"pinned{i}", PROMPT, adapter=pinned, max_tokens=3)
        fake.add(f"hot{i}", PROMPT, adapter=adapter(2), max_tokens=3)
    fake.step()
    fake.add("cool", PROMPT, adapter=adapter(3), max_tokens=3)
    order = first_schedules(fake)
    assert order.index("cool") < 40
    assert fake.pool.resident[0] == (1, 1)


def test_a_less_urgent_adapter_does_not_take_a_more_urgent_ones_row():
    fake = FakeEngine(max_num_seqs=2, num_blocks=400, num_rows=1)
    for i in range(20):
        fake.add(f"urgent{i}", PROMPT, adapter=adapter(1), max_tokens=3, priority=0)
    fake.add("patient", PROMPT, adapter=adapter(2), max_tokens=3, priority=5)
    order = first_schedules(fake)
    assert order[-1] == "patient"


def test_an_adapter_whose_turn_is_next_is_loaded_while_all_places_are_taken():
    fake = FakeEngine(max_num_seqs=1, num_rows=2, load_steps=2)
    fake.add("running", PROMPT, max_tokens=10)
    fake.step()
    fake.add("cold", PROMPT, adapter=adapter(1), max_tokens=2)
    for _ in range(5):
        fake.step()
    assert fake.pool.resident == ((1, 1),)
    fake.run()
    assert len(fake.text("cold")) == 2


def test_the_base_and_resident_adapters_pass_while_cold_ones_load():
    fake = FakeEngine(max_num_seqs=8, num_blocks=400, num_rows=2, load_steps=10)
    for uid in range(1, 8):
        fake.add(f"cold{uid}", PROMPT, adapter=adapter(uid), max_tokens=2)
    fake.add("base", PROMPT, max_tokens=2)
    fake.step()
    assert fake.running == ["base"]
    fake.run()
    assert len(fake.deltas) == 8
