"""Steps launched ahead: the answers are those without, and nothing is read or waited for too early.

On the CPU, where a call has computed when it returns, and over a device that runs behind the host
(late_device.py).
"""

from __future__ import annotations

import random

import pytest
import torch

from engine.api import GrammarSpec, LoadAdapter, UnloadAdapter
from engine.sequence import BACKGROUND
from engine.transfers import copy_to_host, to_device
from tests.engine.choosing import choose_at_once
from tests.engine.fakes import EOS, VOCAB_SIZE, FakeEngine, adapter, expected_text
from tests.engine.late_device import DEVICE, LateDevice, LateModel, LateTensor
from tests.engine.test_decode_graphs import Recorder
from tests.engine.test_speculation import CONFIG, KINDS, said

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]
REGEX = GrammarSpec(kind="regex", source="a*")


class ThirdsMatcher:
    """What may follow depends on the last token: their sum is a multiple of three."""

    def __init__(self, num_tokens: int) -> None:
        self.last = 0
        self.num_left = num_tokens

    def matcher(self):
        return self

    def copy(self):
        own = ThirdsMatcher(self.num_left)
        own.last = self.last
        return own

    def fill_mask(self, row: torch.Tensor) -> None:
        assert self.num_left > 0, "asked behind its end"
        row.zero_()
        for token_id in range(VOCAB_SIZE):
            if (token_id + self.last) % 3 == 0:
                bit = 1 << token_id % 32
                row[token_id // 32] |= bit - (1 << 32 if bit == 1 << 31 else 0)

    def accept(self, token_id: int) -> None:
        assert (token_id + self.last) % 3 == 0 and self.num_left > 0
        self.last = token_id
        self.num_left -= 1

    def is_finished(self) -> bool:
        return self.num_left <= 0


def add(fake: FakeEngine, request_id: str, prompt=PROMPT, grammar: int = 0, **options) -> None:
    """Add a request; with a grammar of so many tokens, which is there at once."""
    fake.add(request_id, prompt, grammar=REGEX if grammar else None, **options)
    if grammar:
        fake.compiler.futures[-1].set_result(ThirdsMatcher(grammar))


def ahead(**options) -> FakeEngine:
    return FakeEngine(**{"num_blocks": 256, "async_scheduling": "on", **options})


# The same answers.


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["eager", "recorded", "guessing", "chosen at once"])
def test_a_storm_of_requests_is_answered_to_the_bit_as_without(kind, seed, monkeypatch):
    """Chunked prompts, few blocks, stop tokens, cancels, adapters that come and go, grammars."""
    if kind == "chosen at once":
        choose_at_once(monkeypatch)
    dice = random.Random(seed)
    options = {
        "num_blocks": dice.choice([14, 24, 100]),
        "max_num_seqs": dice.choice([2, 5, 8]),
        "max_num_batched_tokens": dice.choice([8, 17, 64]),
        "max_model_len": 48,
        "num_rows": 2,
        "load_steps": dice.choice([0, 3]),
        "broken": ("broken",),
        "enable_prefix_caching": dice.random() < 0.8,
        "speculative_config": CONFIG if kind == "guessing" else None,
    }
    refs = [None, None, adapter(1), adapter(1, 2), adapter(2), adapter(3, name="reward")]
    answers, num_preemptions = [], []
    for mode in ("off", "on"):
        backend = Recorder() if kind == "recorded" else None
        fake = FakeEngine(async_scheduling=mode, graph_backend=backend, **options)
        fake.model.originality = 0.3
        dice = random.Random(100 + seed)
        cancelled = set()
        for number in range(40):
            prompt = [dice.randrange(3, 9) for _ in range(dice.randrange(1, 24))]
            params = {"max_tokens": dice.randrange(1, 30), **dice.choice(list(KINDS.values()))}
            ref = dice.choice(refs)
            if ref is not None and ref.name == "reward" and dice.random() < 0.7:
                params = {"task": "score"}
            grammar = 0 if "task" in params or dice.random() < 0.8 else dice.randrange(1, 9)
            if grammar:  # whose tokens nothing else may exclude
                params = {"temperature": 0.5, "seed": number, "max_tokens": 12}
            if dice.random() < 0.05:
                ref = adapter(9, name="broken")
            add(fake, f"r{number}", prompt, grammar, adapter=ref,
                priority=dice.choice([0, 0, 1]), **params)  # fmt: skip
            for _ in range(dice.choice((0, 1, 3, 10))):
                fake.step()
            if dice.random() < 0.15:
                victim = f"r{dice.randrange(number + 1)}"
                fake.engine.cancel(victim)
                cancelled.add(victim)
        fake.run()
        assert fake.stats.kv_cache_usage == 0 and not fake.engine.has_work()
        everyone = {f"r{number}" for number in range(40)}
        answers.append({name: said(fake, name)[:6] for name in everyone - cancelled})
        for name in cancelled:
            assert fake.final(name)  # exactly one
        num_preemptions.append(fake.stats.num_preemptions)
    assert answers[0] == answers[1]
    assert options["num_blocks"] > 14 or min(num_preemptions) > 0


def test_a_step_tells_what_the_one_before_has_brought():
    fake = ahead()
    fake.add("a", PROMPT, max_tokens=4)
    told = [len(fake.step().deltas) for _ in range(5)]
    assert told == [0, 1, 1, 1, 1] and not fake.engine.has_work()
    assert fake.text("a") == expected_text(PROMPT, 4)


@pytest.mark.parametrize(
    "mode, device, config, is_ahead",
    [
        ("auto", "cpu", None, False),
        ("auto", "cuda", None, True),
        ("on", "cpu", None, True),
        ("off", "cuda", None, False),
        ("auto", "cuda", CONFIG, False),  # guesses begin with the last token
    ],
)
def test_auto_is_on_where_the_device_runs_beside_the_host(mode, device, config, is_ahead):
    fake = FakeEngine(async_scheduling=mode, device=torch.device(device), speculative_config=config)
    assert fake.engine._may_run_ahead == is_ahead


# Ends.


def test_no_step_is_launched_behind_max_tokens():
    fake = ahead()
    fake.add("a", PROMPT, max_tokens=5)
    fake.run()
    assert fake.model.num_tokens_run == len(PROMPT) + 4


def test_a_stop_token_is_noticed_a_step_late_and_what_came_behind_it_is_thrown_away():
    text = expected_text(PROMPT, 40)
    fake = ahead()
    fake.add("a", PROMPT, max_tokens=60, ignore_eos=False)
    fake.add("b", PROMPT[:4], max_tokens=60)
    fake.run()
    at = text.index(EOS)
    assert fake.text("a") == text[: at + 1] and fake.final("a").stop_token_id == EOS
    assert fake.text("b") == expected_text(PROMPT[:4], 60)
    assert fake.model.num_tokens_run == len(PROMPT) + at + 1 + 4 + 59


def test_what_was_computed_behind_an_end_serves_nobody():
    """The blocks of a text that has ended go to the next while its last row is still written."""
    text = expected_text(PROMPT, 40)
    fake = ahead(num_blocks=8, max_num_seqs=2, max_model_len=32)
    for number in range(6):
        fake.add(f"r{number}", PROMPT, max_tokens=23, stop_token_ids=(text[number + 1],))
        fake.add(f"s{number}", [number, *PROMPT], max_tokens=8 + number)
    fake.run()
    for number in range(6):
        at = text.index(text[number + 1])
        assert fake.text(f"r{number}") == text[: at + 1]
        assert fake.text(f"s{number}") == expected_text([number, *PROMPT], 8 + number)


def test_blocks_are_offered_to_others_when_their_step_has_been_read():
    fake = ahead()
    fake.add("first", PROMPT, max_tokens=9)
    fake.step()
    fake.add("too early", PROMPT, max_tokens=9)
    fake.step()
    fake.add("later", PROMPT, max_tokens=9)
    fake.run()
    cached = {name: found[0].num_cached_tokens for name, found in fake.deltas.items()}
    assert cached == {"first": 0, "too early": 0, "later": 8}
    assert fake.text("first") == fake.text("too early") == fake.text("later")


def test_a_request_is_cancelled_while_its_step_is_in_flight():
    fake = ahead(enable_prefix_caching=False)
    fake.add("a", PROMPT, max_tokens=50)
    fake.add("b", PROMPT, max_tokens=9)
    for _ in range(3):
        fake.step()
    fake.engine.cancel("a")
    fake.add("a", [1, *PROMPT], max_tokens=9)  # the id is free again
    fake.deltas["old"] = fake.deltas.pop("a") + list(fake.engine._outbox)
    fake.engine._outbox.clear()
    fake.run()
    assert fake.final("old").finish_reason == "cancelled" and len(fake.text("old")) == 2
    assert fake.text("a") == expected_text([1, *PROMPT], 9)
    assert fake.text("b") == expected_text(PROMPT, 9)


def test_nothing_is_left_in_flight_when_all_are_cancelled():
    fake = ahead()
    fake.add("a", PROMPT)
    fake.step()
    fake.engine.cancel_all()
    output = fake.step()
    assert [delta.finish_reason for delta in output.deltas] == ["cancelled"]
    assert not fake.engine.has_work()


# Errors.


def test_a_row_that_is_not_finite_ends_alone_and_harms_no_later_one(caplog):
    prompt = [*PROMPT, 62]
    fake = ahead()
    fake.model.nan_on_token = 62
    fake.add("nan", prompt)
    fake.add("good", PROMPT, max_tokens=20)
    fake.run()
    assert "not finite" in fake.final("nan").error.message
    assert fake.text("good") == expected_text(PROMPT, 20)
    assert not caplog.records, "its row behind the end made a step fail"
    fake.model.nan_on_token = None
    fake.add("again", prompt)
    fake.run()
    assert fake.deltas["again"][0].num_cached_tokens == 0
    assert fake.text("again") == expected_text(prompt, 8)


def test_a_pass_that_fails_behind_one_in_flight_loses_none_of_its_tokens():
    fake = ahead()
    fake.add("good", PROMPT, max_tokens=20)
    for _ in range(4):
        fake.step()
    fake.model.fail_on_token = 63
    fake.add("poison", [1, 63, 1])
    fake.step()
    assert len(fake.text("good")) == 5  # the failed step was repeated at once, for each alone
    assert "a kernel failed" in fake.final("poison").error.message
    fake.run()
    assert fake.text("good") == expected_text(PROMPT, 20)


@pytest.mark.parametrize("who_fails", ["the row behind an end", "both rows together"])
def test_who_is_left_of_a_pass_that_failed_is_tried_alone(who_fails):
    """A text ends in the step whose successor, with both in it, has failed."""
    text = expected_text(PROMPT, 4)
    fake = ahead()
    fake.add("ends", PROMPT, max_tokens=60, stop_token_ids=(text[3],))
    fake.add("goes on", PROMPT[:4], max_tokens=12)
    assert text[3] not in expected_text(PROMPT[:4], 12)
    for _ in range(4):
        fake.step()
    assert fake.text("ends") == text[:3]
    if who_fails == "the row behind an end":
        fake.model.fail_on_token = text[3]
    else:
        run = fake.engine._runner.run

        def fail(items, last=None):
            if len(items) > 1:
                raise torch.OutOfMemoryError("no room for two")
            return run(items, last)

        fake.engine._runner.run = fail
    fake.run()
    assert fake.text("ends") == text and fake.final("ends").finish_reason == "stop"
    assert fake.final("goes on").error is None
    assert fake.text("goes on") == expected_text(PROMPT[:4], 12)


def test_a_choice_that_fails_is_repeated_for_each_alone():
    fake = ahead()
    for number in range(3):
        add(fake, f"r{number}", [number, *PROMPT], grammar=9 if number == 1 else 0, max_tokens=9)
    expected = FakeEngine(num_blocks=256)
    for number in range(3):
        add(expected, f"r{number}", [number, *PROMPT], 9 if number == 1 else 0, max_tokens=9)
    expected.run()
    launch, num_failed = fake.engine._sampler.launch, 0

    def fail(logits, sequences):
        nonlocal num_failed
        if len(sequences) > 1 and len(sequences[0].output_token_ids) % 2:
            num_failed += 1
            raise RuntimeError("no")
        return launch(logits, sequences)

    fake.engine._sampler.launch = fail
    fake.run()
    assert num_failed > 2
    for number in range(3):
        assert said(fake, f"r{number}") == said(expected, f"r{number}")


def test_a_step_without_memory_is_repeated_when_room_has_been_made():
    class Full(type(FakeEngine().model)):
        num_full = 2

        def __call__(self, *args):
            if self.num_tokens_run > 20 and self.num_full:
                self.num_full -= 1
                raise torch.OutOfMemoryError("no room")
            return super().__call__(*args)

    fake = ahead(model=Full())
    fake.engine.make_room = lambda: True
    for number in range(2):
        fake.add(f"r{number}", [number, *PROMPT], max_tokens=9)
    fake.run()
    assert not fake.model.num_full
    for number in range(2):
        assert fake.text(f"r{number}") == expected_text([number, *PROMPT], 9)


def test_a_device_that_is_lost_while_its_tokens_are_waited_for_is_not_survived():
    fake = ahead()
    fake.add("a", PROMPT)
    fake.step()

    def lost(_):
        raise torch.AcceleratorError("the device is lost")

    fake.engine._sampler.finish = lost
    with pytest.raises(torch.AcceleratorError):
        fake.step()


# What waits.


def test_no_sequence_is_preempted_while_its_token_is_in_flight():
    fake = ahead(num_blocks=12, max_num_seqs=4)
    preempt = fake.engine.scheduler._preempt

    def checked(sequence) -> None:
        assert fake.engine._in_flight is None and not sequence.num_pending_tokens
        preempt(sequence)

    fake.engine.scheduler._preempt = checked
    for number in range(4):
        fake.add(f"r{number}", [number, *PROMPT], max_tokens=20, prompt_logprobs=1)
    fake.run()
    assert fake.stats.num_preemptions > 0
    for number in range(4):
        assert fake.text(f"r{number}") == expected_text([number, *PROMPT], 20)


def test_a_place_that_becomes_free_is_taken_in_the_same_call():
    """A worker that finds nothing to run sleeps: it must not while somebody waits for a place."""
    fake = ahead(max_num_seqs=1)
    for name in "abc":
        fake.add(name, PROMPT, max_tokens=3)
    num_tokens = []
    while fake.engine.has_work():
        num_tokens.append(fake.step().stats.num_step_tokens)
    assert all(num_tokens[:-1]) and num_tokens[-1] == 0


def test_steps_of_one_group_and_steps_beside_training_leave_nothing_in_flight():
    fake = ahead()
    fake.add("own", [1, *PROMPT], priority=BACKGROUND, max_tokens=30)
    fake.add("client", PROMPT, max_tokens=30)
    for group in ("clients", "background"):
        fake.step()
        assert fake.engine._in_flight is not None
        fake.step(group)
        assert fake.engine._in_flight is None
    fake.step()
    assert len(fake.step(may_run_ahead=False).deltas) == 4
    assert fake.engine._in_flight is None
    fake.run()
    assert fake.text("own") == expected_text([1, *PROMPT], 30)
    assert fake.text("client") == expected_text(PROMPT, 30)


def test_an_adapter_is_unloaded_when_its_last_step_has_been_launched_and_read():
    fake = ahead()
    ref = adapter(1)
    fake.engine.adapters.load(LoadAdapter(command_id=1, ref=ref))
    fake.step()
    fake.add("a", PROMPT, adapter=ref, max_tokens=2)
    fake.step()
    fake.engine.adapters.unload(UnloadAdapter(command_id=2, ref=ref))
    fake.step()
    assert fake.pool.unloaded == []
    fake.run()
    assert fake.pool.unloaded == [ref] and fake.replies == [1, 2]


# A device that runs behind.


class Late:
    """An engine over such a device."""

    def __init__(self, monkeypatch, *, at_once: bool = False, **options) -> None:
        self.device = LateDevice()
        self.device.patch(monkeypatch, at_once=at_once)
        with self.device, torch.inference_mode():
            self.fake = ahead(model=LateModel(self.device), device=DEVICE, **options)
        self.device.is_starting = False
        self.fake.model.inner.originality = 0.3

    def run(self) -> None:
        with self.device, torch.inference_mode():
            self.fake.run()

    def step(self):
        with self.device, torch.inference_mode():
            return self.fake.step()


MIX = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "seed": 3},
    "stopped": {"temperature": 0.8, "seed": 4, "stop_token_ids": tuple(range(8, 20))},
    "told": {"temperature": 0.5, "seed": 5, "logprobs": 3, "prompt_logprobs": 2},
    "penalised": {"repetition_penalty": 1.2, "frequency_penalty": 0.2},
    "biased": {"logit_bias": ((9, 2.0), (10, -3.0))},
    "bound": {"grammar": 12},
    "patient": {"min_tokens": 9, "stop_token_ids": tuple(range(3, 40))},
    "waiting": {"min_tokens": 9, "stop_token_ids": tuple(range(3, 40))},
    "adapted": {"adapter": adapter(1), "logprobs": 0},
    "scored": {"adapter": adapter(2, name="reward"), "task": "score"},
}


def add_mix(fake: FakeEngine) -> None:
    for number, (name, options) in enumerate(MIX.items()):
        add(fake, name, [number, *PROMPT], **{"max_tokens": 18 + number, **options})


@pytest.mark.parametrize("at_once", [False, True], ids=["by-operators", "at-once"])
@pytest.mark.parametrize("is_recorded", [False, True], ids=["eager", "recorded"])
def test_nothing_is_read_early_and_no_host_memory_is_overwritten(
    monkeypatch, caplog, is_recorded, at_once
):
    options = {"max_num_seqs": 10, "num_rows": 3, "graph_sizes": (1, 2, 4, 8, 10)}
    plain = FakeEngine(num_blocks=256, **options)
    plain.model.originality = 0.3
    add_mix(plain)
    plain.run()
    backend = Recorder() if is_recorded else None
    late = Late(monkeypatch, at_once=at_once, graph_backend=backend, **options)
    add_mix(late.fake)
    late.run()
    assert {name: said(late.fake, name) for name in MIX} == {
        name: said(plain, name) for name in MIX
    }
    assert not caplog.records, "a step failed and was repeated"
    assert not is_recorded or backend.num_replayed > 5


@pytest.mark.parametrize("is_recorded", [False, True], ids=["eager", "recorded"])
def test_the_next_step_is_launched_before_the_tokens_of_the_last_are_waited_for(
    monkeypatch, is_recorded
):
    late = Late(monkeypatch, graph_backend=Recorder() if is_recorded else None)
    late.fake.add("a", PROMPT, max_tokens=20)
    late.fake.add("b", [1, *PROMPT], max_tokens=20, temperature=0.7, seed=1, logprobs=2)
    late.run()
    log = "".join(entry[0] for entry in late.device.log if entry != "logits")
    if is_recorded:  # a recording runs what it records once before
        log = log[:2] + log[2:].replace("ll", "l")
    assert log == "l" + 19 * "lw" + "w"
    assert len(late.fake.text("a")) == len(late.fake.text("b")) == 20


def test_without_launching_ahead_every_step_is_waited_for(monkeypatch):
    late = Late(monkeypatch, async_scheduling="off")
    late.fake.add("a", PROMPT, max_tokens=5)
    late.run()
    assert late.device.log == ["layers", "logits", "wait"] * 5


def test_the_device_that_runs_behind_catches_what_it_is_there_for(monkeypatch):
    device = LateDevice()
    device.patch(monkeypatch)
    device.is_starting = False
    host = torch.arange(3)
    with device:
        tensor = to_device(host, DEVICE)
        assert isinstance(tensor, LateTensor)
        for read in (tensor.tolist, tensor[0].item, tensor.numpy, tensor.cpu):
            with pytest.raises((AssertionError, RuntimeError)):
                read()
        copy = copy_to_host(tensor + 1)
        assert (copy._tensors[0] < 0).all(), "what has not arrived is poison"
        assert copy.wait()[0].tolist() == [1, 2, 3] and device.log == ["wait"]
        tensor.copy_(host, non_blocking=True)
        copy = copy_to_host(tensor)
        host[1] = 7
        with pytest.raises(AssertionError, match="overwritten"):
            copy.wait()
