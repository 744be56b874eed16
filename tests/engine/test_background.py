"""The trainer's own requests beside clients': left out, alone, and the first to give way."""

from __future__ import annotations

from engine.sequence import BACKGROUND
from tests.engine.fakes import FakeEngine, adapter, expected_text

PROMPT = [5, 6, 7]


def add_own(fake: FakeEngine, num: int, **options) -> None:
    for number in range(num):
        fake.add(f"own{number}", [number, *PROMPT], priority=BACKGROUND, **options)


def tokens_of_step(fake: FakeEngine, *args) -> dict[str, int]:
    """Run one step of a group: new tokens by request."""
    output = fake.engine.step(*args)
    fake.engine.check_integrity()
    for delta in output.deltas:
        fake.deltas.setdefault(delta.request_id, []).append(delta)
    return {delta.request_id: len(delta.token_ids) for delta in output.deltas}


def test_a_step_of_the_clients_leaves_the_trainers_requests_where_they_are():
    fake = FakeEngine()
    add_own(fake, 3, max_tokens=20)
    assert set(tokens_of_step(fake)) == {"own0", "own1", "own2"}
    fake.add("client", PROMPT, max_tokens=6)
    for _ in range(6):
        assert tokens_of_step(fake, "clients") == {"client": 1}
    assert set(tokens_of_step(fake)) == {"own0", "own1", "own2"}
    fake.run()
    assert fake.text("own2") == expected_text([2, *PROMPT], 20)


def test_a_step_of_the_trainers_requests_takes_no_more_tokens_than_it_may():
    fake = FakeEngine()
    add_own(fake, 4, max_tokens=20)
    fake.add("client", PROMPT, max_tokens=20)
    assert not tokens_of_step(fake, "background", 4)  # a client waits for its place
    tokens_of_step(fake, "clients")
    assert tokens_of_step(fake, "background", 4) == {"own0": 1}  # a prompt of four tokens
    assert len(tokens_of_step(fake, "background", 5)) == 2
    tokens_of_step(fake, "background", 100)
    assert len(tokens_of_step(fake, "background", 2)) == 2
    assert set(tokens_of_step(fake, "background", 100)) == {f"own{i}" for i in range(4)}
    fake.run()
    assert fake.text("client") == expected_text(PROMPT, 20)
    assert fake.text("own3") == expected_text([3, *PROMPT], 20)


def test_a_client_gets_blocks_that_the_trainers_requests_hold():
    fake = FakeEngine(num_blocks=8, block_size=4, max_model_len=32)
    add_own(fake, 2, max_tokens=10)
    for _ in range(8):
        tokens_of_step(fake)
    prompt = [9] * 22
    fake.add("client", prompt, max_tokens=4)
    for _ in range(8):
        tokens_of_step(fake, "clients")
    assert fake.final("client").finish_reason == "length"
    assert fake.text("client") == expected_text(prompt, 4)
    fake.run()
    assert fake.text("own0") == expected_text([0, *PROMPT], 10)


def test_a_client_gets_the_row_that_only_the_trainers_requests_use():
    fake = FakeEngine(num_rows=1)
    add_own(fake, 2, max_tokens=30, adapter=adapter(1))
    tokens_of_step(fake)
    fake.add("client", PROMPT, max_tokens=3, adapter=adapter(2))
    for _ in range(6):
        tokens_of_step(fake, "clients")
    assert fake.final("client").finish_reason == "length"
    fake.run()
    assert len(fake.text("own1")) == 30


def test_a_client_waits_for_a_row_that_another_client_uses():
    fake = FakeEngine(num_rows=1)
    fake.add("first", PROMPT, max_tokens=5, adapter=adapter(1))
    add_own(fake, 1, max_tokens=5, adapter=adapter(1))
    tokens_of_step(fake)
    fake.add("second", PROMPT, max_tokens=3, adapter=adapter(2))
    tokens_of_step(fake, "clients")
    assert "first" in fake.running and "own0" in fake.running
    fake.run()
    assert len(fake.text("second")) == 3 and len(fake.text("own0")) == 5
