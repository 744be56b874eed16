"""The pool of adapters: loading off the step, rows, users, eviction, pins, failures."""

import random
import threading
import types

import pytest
import torch

from engine.api import AdapterRef
from engine.config import LoraConfig
from engine.errors import AdapterError, NotEnoughMemory
from engine.lora import LoraModule, LoraWeights
from engine.lora_pool import LoraPool

Q = "model.layers.0.self_attn.q_proj"
SPEC = types.SimpleNamespace(linear_shapes=lambda: {Q: (4, 8)}, tie_word_embeddings=False)


class FakeModel:
    """One dense linear layer without bias."""

    spec = SPEC
    embed_tokens = torch.ones(5, 8)

    def base_linear(self, path: str) -> types.SimpleNamespace:
        assert path == Q
        return types.SimpleNamespace(weight=torch.ones(4, 8), bias=None)


class Disk:
    """Adapters by name; a load can be held up, and is counted."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.errors: dict[str, Exception] = {}
        self.fingerprints: dict[str, str] = {}
        self.magnitude: torch.Tensor | None = None
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, ref: AdapterRef) -> LoraWeights:
        self.gate.wait(10)
        self.loads.append(ref.name)
        if ref.name in self.errors:
            raise self.errors[ref.name]
        generator = torch.Generator().manual_seed(ref.uid)
        rank = ref.uid
        module = LoraModule(
            a=torch.randn(rank, 8, generator=generator),
            b=torch.randn(4, rank, generator=generator),
            magnitude=self.magnitude,
        )
        return LoraWeights(modules={Q: module}, base_fingerprint=self.fingerprints.get(ref.name))


def ref(uid: int, generation: int = 1) -> AdapterRef:
    return AdapterRef(uid=uid, generation=generation, name=f"a{uid}", path=f"/a{uid}")


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def make_pool(disk):
    pools = []

    def make(fingerprint: str | None = "base", **config) -> LoraPool:
        pool = LoraPool(
            LoraConfig(**config),
            FakeModel(),
            disk,
            fingerprint=fingerprint,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        pools.append(pool)
        return pool

    yield make
    disk.gate.set()
    for pool in pools:
        pool.check_integrity()
        pool.close()


def settle(pool: LoraPool) -> None:
    """Wait for the loader, then poll."""
    for future in list(pool._loader._loading.values()):
        future.exception(timeout=10)
    pool.poll()
    pool.check_integrity()


def acquired(pool: LoraPool, *refs: AdapterRef) -> list[int | None]:
    """acquire each, its load awaited; None where no row is free."""
    rows = []
    for one in refs:
        row = pool.acquire(one)
        if row is None:
            settle(pool)
            row = pool.acquire(one)
        rows.append(row)
    return rows


class Answers(list):
    """What preloads were answered."""

    def __call__(self, *, error, load_s, num_bytes) -> None:
        self.append((error, load_s, num_bytes))


def test_the_first_acquire_starts_loading_and_a_later_one_gets_the_row(make_pool, disk):
    pool = make_pool()
    disk.gate.clear()
    assert pool.acquire(ref(1)) is None
    assert pool.acquire(ref(1)) is None  # one load, however often it is asked for
    pool.poll()
    assert pool.is_loading
    assert pool.acquire(ref(1)) is None
    disk.gate.set()
    settle(pool)
    assert pool.acquire(ref(1)) == 0
    assert pool.acquire(ref(1)) == 0
    assert disk.loads == ["a1"]
    assert pool.num_loads == 1
    assert pool.load_s > 0
    assert pool.resident == ((1, 1),)
    assert not pool.is_loading


def test_the_least_recently_used_idle_adapter_gives_way(make_pool):
    pool = make_pool(max_loras=2)
    assert acquired(pool, ref(1), ref(2)) == [0, 1]
    pool.release(ref(1))
    pool.release(ref(2))
    acquired(pool, ref(1))
    pool.release(ref(1))
    assert acquired(pool, ref(3)) == [1]  # 2 was used before 1
    assert pool.num_evictions == 1
    assert set(pool.resident) == {(1, 1), (3, 1)}


def test_an_adapter_in_use_never_gives_way(make_pool):
    pool = make_pool(max_loras=1)
    acquired(pool, ref(1))
    assert acquired(pool, ref(2)) == [None]
    pool.release(ref(1))
    assert pool.acquire(ref(2)) == 0


def test_a_return_to_the_device_needs_no_disk(make_pool, disk):
    pool = make_pool(max_loras=1)
    for one in (ref(1), ref(2), ref(1), ref(2)):
        assert acquired(pool, one) == [0]
        pool.release(one)
    assert disk.loads == ["a1", "a2"]
    assert pool.num_evictions == 3


def test_host_memory_keeps_the_most_recently_used(make_pool, disk):
    pool = make_pool(max_loras=1, max_cpu_loras=2)
    for one in (ref(1), ref(2), ref(3), ref(1)):
        acquired(pool, one)
        pool.release(one)
    assert disk.loads == ["a1", "a2", "a3", "a1"]


def test_adapters_that_wait_do_not_push_each_other_out_of_host_memory(make_pool, disk):
    pool = make_pool(max_loras=1, max_cpu_loras=2)
    acquired(pool, ref(1))
    for _ in range(5):
        assert acquired(pool, ref(2), ref(3), ref(4)) == [None, None, None]
    assert disk.loads == ["a1", "a2"]


def test_generations_of_one_adapter_are_different_adapters(make_pool):
    pool = make_pool(max_loras=2)
    assert acquired(pool, ref(1, 1), ref(1, 2)) == [0, 1]
    assert pool.resident == ((1, 1), (1, 2))


# Failures.


def test_a_failed_load_is_told_to_all_who_ask_until_it_is_unloaded(make_pool, disk):
    pool = make_pool()
    disk.errors["a1"] = AdapterError("a1 is broken")
    assert pool.acquire(ref(1)) is None
    settle(pool)
    for _ in range(2):
        with pytest.raises(AdapterError, match="a1 is broken"):
            pool.acquire(ref(1))
    assert disk.loads == ["a1"]
    pool.unload(ref(1))
    del disk.errors["a1"]
    assert acquired(pool, ref(1)) == [0]


def test_an_unforeseen_failure_is_that_adapters_failure(make_pool, disk):
    pool = make_pool()
    disk.errors["a1"] = FileNotFoundError("gone")
    assert pool.acquire(ref(1)) is None
    assert acquired(pool, ref(2)) == [0]
    settle(pool)
    with pytest.raises(AdapterError, match="'a1' could not be loaded: FileNotFoundError: gone"):
        pool.acquire(ref(1))


def test_an_adapter_of_another_base_is_refused(make_pool, disk):
    pool = make_pool(fingerprint="base")
    disk.fingerprints = {"a1": "other", "a2": "base"}
    pool.acquire(ref(1))
    settle(pool)
    with pytest.raises(AdapterError, match="names fingerprint other, this base has base"):
        pool.acquire(ref(1))
    assert acquired(pool, ref(2), ref(3)) == [0, 1]


def test_max_lora_rank_refuses_larger_ranks(make_pool):
    pool = make_pool(max_lora_rank=2)
    assert acquired(pool, ref(2)) == [0]
    pool.acquire(ref(3))
    settle(pool)
    with pytest.raises(AdapterError, match=r"'a3' has rank 3, --max-lora-rank is 2"):
        pool.acquire(ref(3))


def test_a_device_without_room_first_drops_idle_adapters_then_says_so(make_pool, monkeypatch):
    pool = make_pool(max_loras=3)
    acquired(pool, ref(1), ref(2))
    pool.release(ref(1))
    room = [2]

    def place(_packed, _device):
        if len(pool.resident) >= room[0]:
            raise torch.OutOfMemoryError("no room")
        return {}

    monkeypatch.setattr("engine.lora_placement.PackedAdapter.place", place)
    assert acquired(pool, ref(3)) == [2]
    assert pool.resident == ((2, 1), (3, 1))
    room[0] = 0
    assert pool.acquire(ref(4)) is None
    settle(pool)
    with pytest.raises(NotEnoughMemory, match=r"'a4' needs \d+ bytes"):
        pool.acquire(ref(4))
    pool.check_integrity()


# Commands of the server.


def test_a_preload_is_answered_when_the_adapter_is_placed(make_pool):
    pool = make_pool()
    answers = Answers()
    pool.preload(ref(2), pinned=False, done=answers)
    assert not answers
    settle(pool)
    [(error, load_s, num_bytes)] = answers
    assert error is None
    assert load_s > 0
    assert num_bytes >= (2 * 8 + 4 * 2) * 4
    assert pool.resident == ((2, 1),)


def test_a_preload_of_a_resident_adapter_is_answered_at_the_next_poll(make_pool, disk):
    pool = make_pool()
    acquired(pool, ref(1))
    answers = Answers()
    pool.preload(ref(1), pinned=False, done=answers)
    pool.poll()
    assert len(answers) == 1
    assert disk.loads == ["a1"]


def test_a_preload_with_every_row_in_use_ends_in_host_memory(make_pool, disk):
    pool = make_pool(max_loras=1)
    acquired(pool, ref(1))
    answers = Answers()
    pool.preload(ref(2), pinned=False, done=answers)
    settle(pool)
    assert [error for error, _, _ in answers] == [None]
    assert pool.resident == ((1, 1),)
    pool.release(ref(1))
    assert pool.acquire(ref(2)) == 0  # at once
    assert disk.loads == ["a1", "a2"]


def test_more_preloads_than_host_memory_holds_are_all_answered(make_pool, disk):
    pool = make_pool(max_loras=1, max_cpu_loras=2)
    disk.gate.clear()
    answers = Answers()
    for uid in range(1, 8):
        pool.preload(ref(uid), pinned=False, done=answers)
    disk.gate.set()
    settle(pool)
    assert [error for error, _, _ in answers] == [None] * 7


def test_a_failed_preload_is_answered_with_the_error_and_can_be_repeated(make_pool, disk):
    pool = make_pool()
    disk.errors["a1"] = AdapterError("broken")
    answers = Answers()
    pool.preload(ref(1), pinned=False, done=answers)
    settle(pool)
    assert answers[0][0].code == "invalid_adapter"
    assert answers[0][0].message == "broken"
    del disk.errors["a1"]
    pool.preload(ref(1), pinned=False, done=answers)
    settle(pool)
    assert answers[1][0] is None


def test_a_pinned_adapter_keeps_its_row_while_idle(make_pool):
    pool = make_pool(max_loras=2)
    pool.preload(ref(1), pinned=True, done=Answers())
    settle(pool)
    for uid in (2, 3, 4):
        assert acquired(pool, ref(uid)) == [1]
        pool.release(ref(uid))
    assert (1, 1) in pool.resident
    pool.unload(ref(1))
    assert (1, 1) not in pool.resident


def test_a_pin_waits_for_a_row_and_then_takes_it(make_pool):
    pool = make_pool(max_loras=2)
    acquired(pool, ref(1), ref(2))
    pool.preload(ref(3), pinned=True, done=Answers())
    settle(pool)
    assert (3, 1) not in pool.resident
    pool.release(ref(2))
    pool.poll()
    assert (3, 1) in pool.resident


def test_the_last_row_cannot_be_pinned(make_pool):
    pool = make_pool(max_loras=2)
    answers = Answers()
    pool.preload(ref(1), pinned=True, done=answers)
    settle(pool)
    pool.preload(ref(2), pinned=True, done=answers)
    settle(pool)
    assert answers[0][0] is None
    assert "1 of 2 rows are pinned and one must stay free" in answers[1][0].message
    assert acquired(pool, ref(2)) == [1]  # not pinned, and not held against it


def test_unloading_waits_for_the_last_user(make_pool, disk):
    pool = make_pool()
    acquired(pool, ref(1), ref(1))
    pool.unload(ref(1))
    pool.release(ref(1))
    assert pool.resident == ((1, 1),)
    pool.release(ref(1))
    assert pool.resident == ()
    assert acquired(pool, ref(1)) == [0]
    assert disk.loads == ["a1", "a1"]


def test_unloading_during_the_load_answers_the_preload_and_keeps_nothing(make_pool, disk):
    pool = make_pool()
    disk.gate.clear()
    answers = Answers()
    pool.preload(ref(1), pinned=True, done=answers)
    pool.unload(ref(1))
    assert "unloaded while it was loaded" in answers[0][0].message
    disk.gate.set()
    assert acquired(pool, ref(2)) == [0]
    assert pool.resident == ((2, 1),)


# Batches.


def test_rows_hold_exactly_what_an_adapter_needs(make_pool):
    pool = make_pool()
    acquired(pool, ref(1), ref(3))
    assert pool._rows.placed[0][Q].a.shape == (1, 8)
    assert pool._rows.placed[1][Q].a.shape == (3, 8)


def test_a_batch_follows_the_rows_when_adapters_change(make_pool, disk):
    pool = make_pool(max_loras=1)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for uid in (1, 2):
        assert acquired(pool, ref(uid)) == [0]
        lora = pool.batch([0, -1, 0], [1.0, 1.0, 0.5])
        y = lora.linear((Q,), x, torch.zeros(3, 4))
        module = disk(ref(uid)).modules[Q]
        delta = x @ module.a.T @ module.b.T
        expected = torch.stack([delta[0], torch.zeros(4), 0.5 * delta[2]])
        torch.testing.assert_close(y, expected)
        pool.release(ref(uid))


def test_a_batch_of_base_tokens_is_none(make_pool):
    pool = make_pool()
    acquired(pool, ref(1))
    assert pool.batch([-1, -1], [1.0, 2.0]) is None
    assert pool.batch([0, -1], [0.0, 1.0]) is None  # scale 0 is the base


def test_a_recorded_step_finds_its_rows_in_static_tensors(make_pool, disk):
    pool = make_pool(max_loras=3)
    lora_indices = torch.tensor([0, -1], dtype=torch.int32)
    lora_scales = torch.tensor([1.0, 1.0])
    assert pool.static_batch(lora_indices, lora_scales) is None
    version = pool.version
    acquired(pool, ref(1))
    assert pool.version > version
    batch = pool.static_batch(lora_indices, lora_scales)
    x = torch.ones(2, 8)
    for row in (0, 1):  # which token has the adapter is only known when the step runs
        lora_indices.copy_(torch.where(torch.arange(2) == row, 0, -1))
        changed = batch.linear((Q,), x, torch.zeros(2, 4)).any(dim=1)
        assert changed.tolist() == [row == 0, row == 1]
    assert pool.may_be_recorded([-1, 0, 0]) and not pool.may_be_recorded([0, 1])
    disk.magnitude = torch.ones(4)
    acquired(pool, ref(2))
    assert pool.may_be_recorded([0]) and not pool.may_be_recorded([1]), "DoRA looks at its rows"
    for one in (ref(1), ref(2)):
        pool.release(one)


def test_releasing_more_often_than_acquiring_is_a_bug_that_shows(make_pool):
    pool = make_pool()
    acquired(pool, ref(1))
    pool.release(ref(1))
    with pytest.raises(AssertionError, match="more often than acquired"):
        pool.release(ref(1))


@pytest.mark.parametrize("seed", range(8))
def test_the_books_agree_after_any_sequence_of_calls(make_pool, disk, seed):
    choose = random.Random(seed)
    pool = make_pool(max_loras=choose.randint(1, 3), max_cpu_loras=choose.randint(3, 5))
    disk.errors["a6"] = AdapterError("broken")
    held: list[AdapterRef] = []
    answers, num_asked = Answers(), 0
    for _ in range(400):
        one = ref(choose.randint(1, 7), choose.randint(1, 2))
        call = choose.choice(["acquire"] * 4 + ["release"] * 4 + ["preload", "unload", "settle"])
        if call == "acquire":
            try:
                row = pool.acquire(one)
            except AdapterError:
                assert one.name == "a6"
                row = None
            if row is not None:
                held.append(one)
                expected = pool._rows.rows[row]
                assert expected is not None and expected.ref == one
        elif call == "release" and held:
            pool.release(held.pop(choose.randrange(len(held))))
        elif call == "preload":
            num_asked += 1
            pool.preload(one, pinned=choose.random() < 0.3, done=answers)
        elif call == "unload":
            pool.unload(one)
        else:
            settle(pool)
        pool.check_integrity()
        assert {(one.uid, one.generation) for one in held} <= set(pool.resident)
    while held:
        pool.release(held.pop())
    while pool.is_loading:
        settle(pool)
    assert len(answers) == num_asked
