"""Recorded decode steps, over a backend that records on the CPU: the texts are those without."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch

from engine.batch import make_batch
from engine.block_manager import BlockManager
from engine.cuda_graphs import CudaGraphBackend
from engine.decode_graphs import SETTLED_STEPS
from engine.decode_inputs import DecodeInputs
from tests.engine.fakes import FakeEngine, adapter
from tests.engine.test_speculation import CONFIG, KINDS, said, sequence

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]


class Recorder:
    """Keeps what is captured, and runs it again on demand."""

    def __init__(self, *, error: Exception | None = None, bytes_each: int = 0) -> None:
        self.error = error
        self.bytes_each = bytes_each
        self.num_captured = self.num_replayed = self.num_alive = 0

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        if self.error is not None:
            raise self.error
        run()
        self.num_captured += 1
        self.num_alive += 1

        def replay() -> None:
            self.num_replayed += 1
            run()

        return replay

    def forget(self) -> None:
        self.num_alive = 0

    def memory_bytes(self) -> int:
        return self.num_alive * self.bytes_each


def both(**options) -> tuple[FakeEngine, FakeEngine, Recorder]:
    """An engine without graphs, one with, and what the latter records with."""
    backend = Recorder()
    return FakeEngine(**options), FakeEngine(graph_backend=backend, **options), backend


def test_a_recorded_step_says_what_an_eager_one_says():
    plain, fake, backend = both()
    for engine in (plain, fake):
        engine.add("a", PROMPT, max_tokens=60)
        engine.run()
    assert said(fake, "a") == said(plain, "a")
    assert backend.num_captured == 1
    assert backend.num_replayed == 59 - SETTLED_STEPS


def test_a_batch_in_between_is_filled_up_with_rows_that_nobody_sees():
    plain, fake, backend = both(num_blocks=256, max_num_seqs=8)
    for engine in (plain, fake):
        for number in range(5):
            engine.add(f"r{number}", [number, *PROMPT], max_tokens=20 + 5 * number)
        engine.run()
    for number in range(5):
        assert said(fake, f"r{number}") == said(plain, f"r{number}")
    # 5 sequences run as 8, 4 as 4, 3 as 4, 2 as 2, 1 as 1.
    assert set(fake.graphs._replays) == {1, 2, 4, 8}
    assert backend.num_captured == 4


def test_more_sequences_than_the_largest_size_run_as_they_always_did():
    plain, fake, backend = both(num_blocks=256, max_num_seqs=8)
    fake.graphs._sizes = (1, 2, 4)
    for engine in (plain, fake):
        for number in range(6):
            engine.add(f"r{number}", [number, *PROMPT], max_tokens=30)
        engine.run()
    assert [fake.text(f"r{i}") for i in range(6)] == [plain.text(f"r{i}") for i in range(6)]
    assert backend.num_captured == 0


def test_prompts_run_eagerly_beside_which_nothing_is_replayed():
    plain, fake, backend = both(num_blocks=256, max_num_batched_tokens=16)
    for engine in (plain, fake):
        engine.add("a", PROMPT, max_tokens=50)
        for _ in range(20):
            engine.step()
        engine.add("b", PROMPT * 5, max_tokens=30)
        before = backend.num_replayed
        engine.step()
        assert backend.num_replayed == before
        engine.run()
    assert said(fake, "a") == said(plain, "a") and said(fake, "b") == said(plain, "b")


def test_one_set_serves_base_and_adapters_and_is_recorded_again_when_the_pool_changes():
    plain, fake, backend = both(num_blocks=256, num_rows=3)
    for engine in (plain, fake):
        engine.add("base", PROMPT, max_tokens=60)
        engine.add("one", PROMPT, max_tokens=60, adapter=adapter(1))
        engine.add("half", PROMPT, max_tokens=60, adapter=adapter(1), lora_scale=0.5)
        engine.add("off", PROMPT, max_tokens=60, adapter=adapter(1), lora_scale=0.0)
        for _ in range(25):
            engine.step()
    assert backend.num_captured == 1
    for engine in (plain, fake):
        engine.add("two", PROMPT, max_tokens=60, adapter=adapter(2))
        engine.step()
        engine.step()
    assert not fake.graphs._replays, "what read the old rows is gone"
    for engine in (plain, fake):
        engine.run()
    for name in ("base", "one", "half", "off", "two"):
        assert said(fake, name) == said(plain, name)
    assert fake.text("base") != fake.text("one") != fake.text("half")


def test_adapters_with_more_than_low_rank_parts_run_eagerly():
    plain, fake, backend = both(num_blocks=256)
    for engine in (plain, fake):
        engine.pool.not_low_rank.add("adapter-1")
        engine.add("a", PROMPT, max_tokens=30, adapter=adapter(1))
        engine.run()
    assert backend.num_captured == 0
    for engine in (plain, fake):
        engine.add("b", PROMPT, max_tokens=30)
        engine.run()
    assert backend.num_captured == 1
    assert said(fake, "a") == said(plain, "a") and said(fake, "b") == said(plain, "b")


def test_a_backend_that_cannot_record_is_asked_once_and_harms_nobody(caplog):
    backend = Recorder(error=RuntimeError("operation not permitted when stream is capturing"))
    plain, fake = FakeEngine(), FakeEngine(graph_backend=backend)
    for engine in (plain, fake):
        engine.add("a", PROMPT, max_tokens=40)
        engine.run()
    assert said(fake, "a") == said(plain, "a")
    assert caplog.text.count("not permitted") == 1


def test_each_recording_is_told_of_before_and_after_with_how_many_there_are():
    _, fake, _ = both(num_blocks=256)
    for number in range(2):
        fake.add(f"r{number}", [number, *PROMPT], max_tokens=20 + 15 * number)
    fake.run()
    told = [(p.num_recorded, p.num_sizes, p.is_recording) for p in fake.recordings]
    assert told == [(0, 4, True), (1, 4, False), (1, 4, True), (2, 4, False)]


def test_a_recording_that_fails_is_over_too_and_counts_for_nothing():
    fake = FakeEngine(graph_backend=Recorder(error=RuntimeError("not permitted")))
    fake.add("a", PROMPT, max_tokens=40)
    fake.run()
    assert [(p.num_recorded, p.is_recording) for p in fake.recordings] == [(0, True), (0, False)]


def test_a_device_that_is_lost_while_recording_is_not_survived():
    fake = FakeEngine(graph_backend=Recorder(error=torch.AcceleratorError("lost")))
    fake.add("a", PROMPT, max_tokens=40)
    with pytest.raises(torch.AcceleratorError):
        fake.run()


class FakeCuda:
    """torch.cuda's streams and graphs as far as they are used, and which pool was entered where."""

    def __init__(self, monkeypatch) -> None:
        self.entered: list[tuple[object, object]] = []
        self.replayed: list[object] = []
        self.stream_now: object = "current"
        self.ran_on: list[object] = []
        made = iter(range(100))
        fake = self

        class Graph:
            def __init__(self) -> None:
                self.own = f"pool {next(made)}"

            def pool(self) -> object:
                return self.own

            def replay(self) -> None:
                fake.replayed.append(self)

        class Stream:
            def wait_stream(self, _: object) -> None:
                pass

        @contextmanager
        def on(stream: object):
            before, fake.stream_now = fake.stream_now, stream
            yield
            fake.stream_now = before

        @contextmanager
        def graph(made: Graph, *, pool: object, stream: object, capture_error_mode: str):
            assert capture_error_mode == "thread_local"
            made.own = pool or made.own
            fake.entered.append((pool, stream))
            with on(stream):
                yield

        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream())
        monkeypatch.setattr(torch.cuda, "stream", on)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", graph)

    def run(self) -> None:
        self.ran_on.append(self.stream_now)


def test_recordings_share_a_pool_while_they_live_and_a_stream_for_ever(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    backend = CudaGraphBackend(torch.device("cuda"))
    for _ in range(2):
        backend.capture(cuda.run)
    backend.forget()
    backend.capture(cuda.run)
    # A pool whose graphs are gone must not be entered again: the allocator refuses.
    assert [pool for pool, _ in cuda.entered] == [None, "pool 0", None]
    # The run before is on the same stream as the recording.
    assert len(set(cuda.ran_on)) == 1 and cuda.ran_on[0] is cuda.entered[0][1]
    assert len(cuda.ran_on) == 6


@pytest.mark.parametrize("is_lost", [False, True])
def test_what_cuda_cannot_record_is_told_from_a_lost_device(monkeypatch, is_lost):
    def fail(*_: object) -> None:
        raise torch.AcceleratorError("operation not permitted when stream is capturing")

    backend = CudaGraphBackend(torch.device("cuda"))
    monkeypatch.setattr(backend, "_capture", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", fail if is_lost else lambda _: None)
    with pytest.raises(RuntimeError, match="not permitted") as raised:
        backend.capture(lambda: None)
    assert isinstance(raised.value, torch.AcceleratorError) == is_lost


def test_recordings_that_take_more_than_is_kept_for_them_are_the_last():
    backend = Recorder(bytes_each=600)
    fake = FakeEngine(graph_backend=backend, num_blocks=256)
    fake.graphs._budget_bytes = 1000
    for number in range(4):
        fake.add(f"r{number}", [number, *PROMPT], max_tokens=20 + 15 * number)
    fake.run()
    assert fake.graphs.num_bytes == 1200 and backend.num_captured == 2


def test_what_was_thrown_away_no_longer_counts():
    backend = Recorder(bytes_each=600)
    fake = FakeEngine(graph_backend=backend, num_blocks=256, num_rows=3)
    fake.graphs._budget_bytes = 1000
    for uid in (1, 2, 3):  # each changes the pool
        fake.add(f"r{uid}", PROMPT, max_tokens=20, adapter=adapter(uid))
        fake.run()
    assert backend.num_captured == 3
    assert fake.graphs.num_bytes == 600


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_preempted_sequences_come_back_to_other_blocks(enable_prefix_caching):
    plain, fake, backend = both(
        num_blocks=17, max_num_seqs=4, enable_prefix_caching=enable_prefix_caching
    )
    for engine in (plain, fake):
        for number in range(4):
            engine.add(f"r{number}", [number, *PROMPT], max_tokens=40)
        engine.run()
        assert engine.stats.num_preemptions > 0
    assert [said(fake, f"r{i}") for i in range(4)] == [said(plain, f"r{i}") for i in range(4)]
    assert backend.num_replayed > 20


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("speculative_config", [None, CONFIG], ids=["plain", "guessing"])
def test_a_storm_of_requests_is_answered_as_without_graphs(seed, speculative_config):
    answers = []
    for fake in both(
        num_blocks=48, max_num_seqs=8, num_rows=3, speculative_config=speculative_config
    )[:2]:
        fake.model.originality = 0.2
        dice = random.Random(seed)
        names = []
        for number in range(40):
            prompt = [dice.randrange(3, 12) for _ in range(dice.randrange(1, 30))]
            options = {"max_tokens": dice.randrange(1, 60), **dice.choice(list(KINDS.values()))}
            refs = [None, None, adapter(1), adapter(2), adapter(3), adapter(4)]
            fake.add(f"r{number}", prompt, adapter=dice.choice(refs), **options)
            num_steps = dice.choice((0, 1, 3, 20))
            is_cancelled = dice.random() < 0.1
            for _ in range(num_steps):
                fake.step()
            if is_cancelled:
                fake.engine.cancel(f"r{number}")
            else:
                names.append(f"r{number}")
        fake.run()
        answers.append({name: said(fake, name)[:2] for name in names})
    assert answers[0] == answers[1]


def decoding(num_tokens: int, table: list[int], lora_row: int = -1):
    """A sequence that lacks its last token."""
    own = sequence(list(range(num_tokens)))
    own.num_computed_tokens = num_tokens - 1
    own.block_table = table
    own.lora_row = lora_row
    return own


def inputs() -> DecodeInputs:
    return DecodeInputs(8, block_size=4, max_num_blocks=6, device=torch.device("cpu"))


def assert_holds(made: DecodeInputs, sequences: list, size: int) -> None:
    """The static tensors hold what make_batch gives, then rows of nobody."""
    batch = made.batch(size)
    lora_indices, lora_scales = made.lora(size)
    items = [(one, 1 + len(one.draft_token_ids)) for one in sequences]
    expected = make_batch(items, block_size=4, device=torch.device("cpu"))
    num_rows = len(expected.input_ids)
    for name in ("input_ids", "positions", "slot_mapping"):
        found = getattr(batch, name)
        assert found.dtype == getattr(expected, name).dtype
        assert found[:num_rows].tolist() == getattr(expected, name).tolist(), name
    assert batch.context_lens.dtype == expected.context_lens.dtype
    assert batch.context_lens[:num_rows].tolist() == (expected.positions + 1).tolist()
    assert batch.cu_seqlens_q.tolist() == list(range(size + 1))
    tables = [one.block_table for one, count in items for _ in range(count)]
    for row, table in enumerate(tables):
        assert batch.block_tables[row, : len(table)].tolist() == table
    assert lora_indices[:num_rows].tolist() == expected.lora_indices
    assert lora_scales[:num_rows].tolist() == expected.lora_scales
    assert batch.context_lens[num_rows:].eq(0).all() and batch.slot_mapping[num_rows:].eq(-1).all()
    assert lora_indices[num_rows:].eq(-1).all() and batch.block_tables[num_rows:].eq(-1).all()


def test_static_tensors_hold_the_step_and_stay_where_they_are():
    made = inputs()
    places = [made.batch(4).input_ids.data_ptr(), made.batch(4).block_tables.data_ptr()]
    many = [decoding(3, [5]), decoding(9, [1, 0, 7], lora_row=1), decoding(5, [2, 3])]
    made.load(many, 4)
    assert_holds(made, many, 4)
    made.load(many[:1], 2)
    assert_holds(made, many[:1], 2)
    assert [made.batch(4).input_ids.data_ptr(), made.batch(4).block_tables.data_ptr()] == places


def test_guessed_tokens_are_rows_that_see_what_stands_before_them():
    made = inputs()
    guessing, other = decoding(6, [1, 0, 4], lora_row=1), decoding(3, [5])
    made.load([guessing, other], 4)
    made.prepare_next()
    guessing.draft_token_ids = [11, 12, 13]
    assert made.load([guessing, other], 8) == 5
    assert_holds(made, [guessing, other], 8)
    made.prepare_next()
    guessing.draft_token_ids = []
    assert made.load([guessing, other], 2) == 2
    assert_holds(made, [guessing, other], 2)


def test_guessing_is_recorded_too():
    plain, fake, backend = both(speculative_config=CONFIG)
    for engine in (plain, fake):
        engine.model.originality = 0.05
        engine.add("a", [5, 6, 7, 8] * 3, max_tokens=90)
        engine.run()
    assert said(fake, "a") == said(plain, "a")
    assert fake.stats.num_accepted_tokens > 40 and backend.num_replayed > 10
    assert len(fake.deltas["a"]) == len(plain.deltas["a"])


def test_one_token_of_a_text_that_is_recomputed_is_no_decode():
    graphs = FakeEngine(graph_backend=Recorder()).graphs
    own = decoding(6, [1, 0])
    own.append(7)
    own.num_computed_tokens = 6
    assert graphs._size_for([(own, 1)]) == 1
    own.num_computed_tokens = 3  # a preempted sequence, in a step with room for one token
    assert graphs._size_for([(own, 1)]) is None


def test_what_was_prepared_is_completed_and_what_has_changed_is_corrected():
    made = inputs()
    going, leaving = decoding(4, [5], lora_row=2), decoding(6, [1, 0])
    made.load([going, leaving], 2)
    for _ in range(12):  # over the end of blocks, in both sets of host memory
        made.prepare_next()
        for one, block in ((going, 8), (leaving, 9)):
            one.append(len(one.token_ids) % 60)
            one.num_computed_tokens += 1
            if one.num_computed_tokens % 4 == 0:
                one.block_table.append(block)
        made.load([going, leaving], 2)
        assert_holds(made, [going, leaving], 2)
    made.prepare_next()
    made.load([going], 1)
    assert_holds(made, [going], 1)
    made.prepare_next()
    going.block_table = [4, 3, 2, 1]  # preempted, and back in other blocks
    made.load([going, decoding(2, [0])], 4)
    assert made.batch(1).block_tables[0, :4].tolist() == [4, 3, 2, 1]


def test_blocks_of_rejected_drafts_are_not_taken_for_those_that_follow_them():
    """A table that has shrunk and grown again is as long as before, and another."""
    made, blocks = inputs(), BlockManager(6, 4)
    own = sequence(list(range(6)))
    assert blocks.admit(own, num_spare=0)
    own.num_computed_tokens = 5
    for _ in range(2):
        own.draft_token_ids = [11, 12, 13]  # the last of them is in a block that is theirs alone
        assert blocks.extend(own, 3) and len(own.block_table) == 3
        made.load([own], 4)
        assert_holds(made, [own], 4)
        made.prepare_next()
        own.append(40)
        own.num_computed_tokens += 1
        own.draft_token_ids = []
        blocks.trim(own)
