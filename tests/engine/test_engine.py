"""The engine over a fake model: exact texts, ends, cancellation, errors, and a seeded storm."""

from __future__ import annotations

import random

import pytest
import torch

from engine.api import GrammarSpec, LoadAdapter, UnloadAdapter
from engine.errors import GrammarError
from tests.engine.fakes import EOS, VOCAB_SIZE, FakeEngine, adapter, expected_text

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]
REGEX = GrammarSpec(kind="regex", source="a*")


def salt_of(ref, scale: float = 1.0) -> int:
    return 1 + 100 * ref.uid + 10 * ref.generation + round(1e6 * scale)


def test_a_text_is_what_the_model_says_given_all_that_went_before():
    fake = FakeEngine()
    fake.add("a", PROMPT, max_tokens=20)
    fake.run()
    assert fake.text("a") == expected_text(PROMPT, 20)
    assert fake.final("a").finish_reason == "length"
    assert [len(delta.token_ids) for delta in fake.deltas["a"]] == [1] * 20


@pytest.mark.parametrize("max_num_batched_tokens", [1, 2, 3, 7, 64])
def test_a_prompt_in_chunks_gives_the_same_text(max_num_batched_tokens):
    fake = FakeEngine(max_num_seqs=1, max_num_batched_tokens=max_num_batched_tokens)
    fake.add("a", PROMPT * 3, max_tokens=10)
    fake.run()
    assert fake.text("a") == expected_text(PROMPT * 3, 10)


def test_sixteen_sequences_at_once_say_what_each_says_alone():
    fake = FakeEngine(max_num_seqs=16, max_num_batched_tokens=20, num_blocks=256)
    prompts = {
        f"r{i}": [i % VOCAB_SIZE, *PROMPT[: 1 + i % 9], 3 * i % VOCAB_SIZE] for i in range(16)
    }
    for request_id, prompt in prompts.items():
        fake.add(request_id, prompt, max_tokens=15)
    fake.run()
    for request_id, prompt in prompts.items():
        assert fake.text(request_id) == expected_text(prompt, 15)


def test_a_preempted_sequence_says_the_same_and_streams_no_token_twice():
    fake = FakeEngine(num_blocks=12, max_num_seqs=4)
    prompts = {f"r{i}": [i, *PROMPT] for i in range(4)}
    for request_id, prompt in prompts.items():
        fake.add(request_id, prompt, max_tokens=20)
    fake.run()
    assert fake.stats.num_preemptions > 0
    for request_id, prompt in prompts.items():
        assert fake.text(request_id) == expected_text(prompt, 20)


def test_preemption_without_prefix_cache_recomputes_exactly():
    fake = FakeEngine(num_blocks=12, max_num_seqs=4, enable_prefix_caching=False)
    for i in range(4):
        fake.add(f"r{i}", [i, *PROMPT], max_tokens=20)
    fake.run()
    assert fake.stats.num_preemptions > 0
    for i in range(4):
        assert fake.text(f"r{i}") == expected_text([i, *PROMPT], 20)


def test_a_shared_beginning_is_run_once_and_reported_in_the_first_delta():
    fake = FakeEngine()
    fake.add("first", PROMPT, max_tokens=4)
    fake.run()
    num_before = fake.model.num_tokens_run
    fake.add("second", [*PROMPT, 1], max_tokens=4)
    fake.run()
    assert fake.model.num_tokens_run - num_before == 2 + 3  # two prompt tokens, three decodes
    assert [delta.num_cached_tokens for delta in fake.deltas["second"]] == [8, 0, 0, 0]
    assert fake.deltas["first"][0].num_cached_tokens == 0
    assert fake.text("second") == expected_text([*PROMPT, 1], 4)
    assert (fake.stats.prefix_cache_queries, fake.stats.prefix_cache_hits) == (19, 8)


def test_a_new_generation_of_an_adapter_never_sees_the_old_ones_cache():
    fake = FakeEngine(num_rows=2)
    old, new = adapter(1, generation=1), adapter(1, generation=2)
    for request_id, ref, scale in [("o", old, 1.0), ("n", new, 1.0), ("half", new, 0.5)]:
        fake.add(request_id, PROMPT, adapter=ref, lora_scale=scale)
        fake.run()
        assert fake.deltas[request_id][0].num_cached_tokens == 0
        assert fake.text(request_id) == expected_text(PROMPT, 8, salt_of(ref, scale))
    fake.add("again", PROMPT, adapter=old)
    fake.run()
    assert fake.deltas["again"][0].num_cached_tokens == 8
    assert fake.text("again") == fake.text("o")


def test_the_queue_time_is_in_the_first_delta_only():
    fake = FakeEngine(max_num_seqs=1)
    fake.add("a")
    fake.add("b")
    fake.run()
    for request_id in "ab":
        assert fake.deltas[request_id][0].queued_s > 0
        assert all(delta.queued_s == 0 for delta in fake.deltas[request_id][1:])


# Ends.


def test_an_eos_token_ends_the_text_and_is_reported():
    text = expected_text(PROMPT, 40)
    assert EOS in text, "choose another prompt"
    fake = FakeEngine()
    fake.add("a", PROMPT, max_tokens=60, ignore_eos=False)
    fake.run()
    final = fake.final("a")
    assert fake.text("a") == text[: text.index(EOS) + 1]
    assert (final.finish_reason, final.stop_token_id, final.token_ids) == ("stop", EOS, (EOS,))


def test_ignore_eos_goes_on_but_minds_the_requests_own_stop_tokens():
    text = expected_text(PROMPT, 40)
    stop = text[text.index(EOS) + 3]
    fake = FakeEngine()
    fake.add("a", PROMPT, max_tokens=60, ignore_eos=True, stop_token_ids=(stop,))
    fake.run()
    assert fake.text("a") == text[: text.index(stop) + 1]
    assert fake.final("a").stop_token_id == stop


def test_no_stop_token_ends_a_text_before_min_tokens():
    text = expected_text(PROMPT, 40)
    at = text.index(EOS)
    fake = FakeEngine()
    fake.add("a", PROMPT, max_tokens=at + 5, ignore_eos=False, min_tokens=at + 1)
    fake.run()
    assert len(fake.text("a")) > at + 1


def test_a_stop_token_as_the_last_allowed_token_counts_as_a_stop():
    text = expected_text(PROMPT, 40)
    at = text.index(EOS)
    fake = FakeEngine()
    fake.add("a", PROMPT, max_tokens=at + 1, ignore_eos=False)
    fake.run()
    assert fake.final("a").finish_reason == "stop"


def test_max_tokens_is_clamped_to_what_the_model_holds():
    fake = FakeEngine(max_model_len=12)
    fake.add("a", PROMPT, max_tokens=100)
    fake.run()
    assert len(fake.text("a")) == 3
    assert fake.final("a").finish_reason == "length"


def test_max_tokens_is_clamped_to_what_the_cache_holds():
    fake = FakeEngine(num_blocks=3, block_size=4, max_model_len=100)
    fake.add("a", PROMPT, max_tokens=100)
    fake.run()
    assert len(fake.text("a")) == 3


@pytest.mark.parametrize(
    "prompt, options, code, words",
    [
        ([], {}, "invalid_request", "empty"),
        ([1, VOCAB_SIZE], {}, "invalid_request", f"token id {VOCAB_SIZE}"),
        ([1, -1], {}, "invalid_request", "token id -1"),
        ([1] * 128, {}, "context_length_exceeded", "128"),
        ([1], {"task": "score"}, "invalid_request", "reward adapter"),
    ],
)
def test_a_request_that_cannot_be_served_ends_at_once_with_an_error(prompt, options, code, words):
    fake = FakeEngine(max_model_len=128)
    fake.add("a", prompt, **options)
    assert fake.engine.has_work()
    fake.run()
    error = fake.final("a").error
    assert error.code == code and words in error.message
    assert fake.model.num_tokens_run == 0


def test_a_second_request_of_the_same_id_is_refused_and_leaves_the_first_alone():
    fake = FakeEngine()
    fake.add("a", PROMPT)
    with pytest.raises(ValueError, match="request_id"):
        fake.add("a", PROMPT)
    fake.run()
    assert fake.text("a") == expected_text(PROMPT, 8)


# Cancellation.


def test_a_running_request_is_cancelled_within_one_step_and_frees_its_blocks():
    fake = FakeEngine(enable_prefix_caching=False)
    fake.add("a", PROMPT, max_tokens=50)
    fake.step()
    fake.engine.cancel("a")
    output = fake.step()
    assert [delta.finish_reason for delta in output.deltas] == ["cancelled"]
    assert output.stats.kv_cache_usage == 0 and not fake.engine.has_work()


def test_a_request_in_the_middle_of_its_prompt_can_be_cancelled():
    fake = FakeEngine(max_num_seqs=2, max_num_batched_tokens=4)
    fake.add("a", PROMPT)
    fake.step()
    fake.engine.cancel("a")
    fake.run()
    assert fake.final("a").finish_reason == "cancelled" and fake.text("a") == []


def test_a_waiting_request_and_one_whose_grammar_compiles_can_be_cancelled():
    fake = FakeEngine(max_num_seqs=1)
    fake.add("running", PROMPT, max_tokens=5)
    fake.add("waiting", PROMPT)
    fake.add("compiling", PROMPT, grammar=REGEX)
    fake.step()
    fake.engine.cancel("waiting")
    fake.engine.cancel("compiling")
    fake.run()
    assert fake.compiler.futures[0].cancelled()
    for request_id in ("waiting", "compiling"):
        assert fake.final(request_id).finish_reason == "cancelled"
    assert fake.final("running").finish_reason == "length"


def test_a_preempted_request_and_one_whose_adapter_loads_can_be_cancelled():
    fake = FakeEngine(num_blocks=6, max_num_seqs=2, load_steps=1000)
    fake.add("loading", PROMPT, adapter=adapter(1))
    fake.add("kept", PROMPT, max_tokens=10)
    fake.add("preempted", PROMPT, max_tokens=10)
    while fake.stats is None or fake.stats.num_preemptions == 0:
        fake.step()
    num_tokens = len(fake.text("preempted"))
    for request_id in ("preempted", "loading"):
        fake.engine.cancel(request_id)
    fake.step()
    assert fake.final("loading").finish_reason == "cancelled"
    assert fake.final("preempted").finish_reason == "cancelled"
    assert len(fake.text("preempted")) == num_tokens
    fake.pool.load_steps, fake.pool.loading = 0, {}
    fake.run()
    assert fake.text("kept") == expected_text(PROMPT, 10)


def test_unknown_and_ended_requests_are_cancelled_in_silence():
    fake = FakeEngine()
    fake.engine.cancel("never seen")
    fake.add("a", PROMPT)
    fake.run()
    fake.engine.cancel("a")
    assert not fake.engine.has_work()


# Adapters and grammars.


def test_a_sequence_whose_adapter_is_being_loaded_waits_and_others_pass():
    fake = FakeEngine(load_steps=4)
    fake.add("cold", PROMPT, adapter=adapter(1), max_tokens=4)
    fake.add("base", PROMPT, max_tokens=4)
    fake.run()
    ends = {name: len(fake.deltas[name]) for name in ("cold", "base")}
    assert ends == {"cold": 4, "base": 4}
    assert fake.deltas["cold"][0].queued_s > fake.deltas["base"][0].queued_s
    assert fake.text("cold") == expected_text(PROMPT, 4, salt_of(adapter(1)))


def test_an_adapter_that_cannot_be_loaded_ends_its_requests_and_no_others():
    fake = FakeEngine(broken=("bad",))
    fake.add("a", PROMPT, adapter=adapter(1, name="bad"))
    fake.add("b", PROMPT, adapter=adapter(1, name="bad"))
    fake.add("c", PROMPT)
    fake.run()
    for request_id in "ab":
        assert fake.final(request_id).error.code == "invalid_adapter"
    assert fake.text("c") == expected_text(PROMPT, 8)


def test_a_score_request_runs_the_prompt_once_and_reports_the_head():
    fake = FakeEngine(max_num_seqs=2, max_num_batched_tokens=4)
    fake.add("s", PROMPT, adapter=adapter(1, name="reward"), task="score")
    fake.run()
    final = fake.final("s")
    assert final.finish_reason == "stop" and final.score > 0 and final.token_ids == ()
    assert len(fake.deltas["s"]) == 1


def test_a_score_request_without_a_score_head_ends_with_an_error():
    fake = FakeEngine()
    fake.add("s", PROMPT, adapter=adapter(1, name="chat"), task="score")
    fake.add("t", PROMPT)
    fake.run()
    assert fake.final("s").error.code == "invalid_adapter"
    assert fake.text("t") == expected_text(PROMPT, 8)


def test_load_and_unload_are_answered_and_an_adapter_in_use_is_unloaded_later():
    fake = FakeEngine()
    ref = adapter(1)
    fake.engine.adapters.load(LoadAdapter(command_id=1, ref=ref))
    fake.step()
    assert fake.replies == [1]
    fake.add("a", PROMPT, adapter=ref)
    fake.step()
    fake.engine.adapters.unload(UnloadAdapter(command_id=2, ref=ref))
    fake.step()
    assert fake.replies == [1] and fake.pool.unloaded == []
    fake.run()
    assert fake.replies == [1, 2]
    assert fake.pool.unloaded == [ref]


class CountingMatcher:
    """A grammar of exactly three tokens."""

    def __init__(self) -> None:
        self.num_accepted = 0

    def matcher(self):
        return self

    def fill_mask(self, row: torch.Tensor) -> None:
        row.fill_(-1)

    def accept(self, token_id: int) -> None:
        del token_id
        self.num_accepted += 1

    def is_finished(self) -> bool:
        return self.num_accepted >= 3


def test_a_sequence_waits_for_its_grammar_off_the_step_and_ends_with_it():
    fake = FakeEngine()
    fake.add("a", PROMPT, grammar=REGEX, max_tokens=9)
    fake.add("b", PROMPT, max_tokens=9)
    for _ in range(3):
        fake.step()
    assert "a" not in fake.deltas and len(fake.deltas["b"]) == 3
    fake.compiler.futures[0].set_result(CountingMatcher())
    fake.run()
    assert fake.text("a") == expected_text(PROMPT, 3)
    assert fake.final("a").finish_reason == "stop"


@pytest.mark.parametrize("error", [GrammarError("bad pattern"), MemoryError("bad pattern")])
def test_a_grammar_that_cannot_be_compiled_ends_its_request(error):
    fake = FakeEngine()
    fake.add("a", PROMPT, grammar=REGEX)
    fake.compiler.futures[0].set_exception(error)
    fake.run()
    assert fake.final("a").error.code == "invalid_grammar"
    assert "bad pattern" in fake.final("a").error.message


# Failures.


def test_a_forward_pass_that_raises_ends_the_sequence_at_fault_and_no_other():
    fake = FakeEngine()
    fake.model.fail_on_token = 63
    fake.add("good", PROMPT)
    fake.add("poison", [1, 63, 1])
    fake.run()
    assert fake.final("poison").error.code == "engine_error"
    assert "a kernel failed" in fake.final("poison").error.message
    assert fake.text("good")[:4] == expected_text(PROMPT, 8)[:4]
    fake.model.fail_on_token = None
    fake.add("later", [1, 63, 1])
    fake.run()
    assert fake.text("later") == expected_text([1, 63, 1], 8)


def test_non_finite_logits_end_one_sequence_and_poison_no_cache():
    fake = FakeEngine()
    prompt = [*PROMPT, 62]
    fake.model.nan_on_token = 62
    fake.add("nan", prompt)
    fake.add("good", PROMPT[:3], max_tokens=2)
    fake.run()
    assert "not finite" in fake.final("nan").error.message
    assert fake.text("good") == expected_text(PROMPT[:3], 2)
    fake.model.nan_on_token = None
    fake.add("again", prompt)
    fake.run()
    assert fake.deltas["again"][0].num_cached_tokens == 0
    assert fake.text("again") == expected_text(prompt, 8)


def test_a_lost_device_is_not_survived():
    fake = FakeEngine()
    fake.model.fatal = True
    fake.add("a", PROMPT)
    with pytest.raises(torch.AcceleratorError):
        fake.step()


class Panic(BaseException):
    """What a native library's panic looks like from Python."""


class PanickingMatcher(CountingMatcher):
    def fill_mask(self, row: torch.Tensor) -> None:
        del row
        raise Panic("assertion failed")


def test_a_panic_in_a_native_library_ends_the_request_that_met_it_and_no_other():
    fake = FakeEngine()
    for request_id in ("compiles not", "follows not"):
        fake.add(request_id, PROMPT, grammar=REGEX)
    fake.compiler.futures[0].set_exception(Panic("assertion failed"))
    fake.compiler.futures[1].set_result(PanickingMatcher())
    fake.add("good", PROMPT)
    fake.run()
    for request_id in ("compiles not", "follows not"):
        assert "assertion failed" in fake.final(request_id).error.message
    assert fake.text("good") == expected_text(PROMPT, 8)


def test_a_sampler_that_fails_is_asked_again_for_each_alone():
    fake = FakeEngine()
    fake.add("grammar", PROMPT, grammar=REGEX)
    fake.compiler.futures[0].set_result(CountingMatcher())
    fake.add("plain", PROMPT)
    fake.step()
    launch = fake.engine._sampler.launch

    def fail(logits, sequences):
        pending = launch(logits, sequences)
        if len(sequences) > 1:
            raise RuntimeError("half way")
        return pending

    fake.engine._sampler.launch = fail
    fake.run()
    assert fake.text("grammar") == expected_text(PROMPT, 3)
    assert fake.text("plain") == expected_text(PROMPT, 8)


def test_tokens_that_cannot_be_read_end_their_requests_and_no_others():
    fake = FakeEngine(max_num_seqs=2)
    for name in ("a", "b", "later"):
        fake.add(name, PROMPT)
    fake.step()
    finish = fake.engine._sampler.finish

    def fail(pending):
        fake.engine._sampler.finish = finish
        finish(pending)
        raise RuntimeError("unreadable")

    fake.engine._sampler.finish = fail
    fake.run()
    for name in "ab":
        assert "unreadable" in fake.final(name).error.message
    assert fake.text("later") == expected_text(PROMPT, 8)
    assert fake.deltas["later"][0].num_cached_tokens == 0


# Prompt log-probabilities.


def test_prompt_logprobs_have_one_entry_per_token_whatever_the_chunks():
    answers = []
    for budget in (3, 64):
        fake = FakeEngine(max_num_seqs=2, max_num_batched_tokens=budget)
        fake.add("warm", PROMPT)
        fake.run()
        fake.add("a", PROMPT, prompt_logprobs=2, max_tokens=2)
        fake.run()
        first, second = fake.deltas["a"]
        assert first.num_cached_tokens == 0 and second.prompt_logprobs is None
        assert len(first.prompt_logprobs) == len(PROMPT)
        assert first.prompt_logprobs[0] is None
        for entry, token in zip(first.prompt_logprobs[1:], PROMPT[1:], strict=True):
            assert entry.token_id == token and len(entry.top) == 2
            assert entry.logprob <= entry.top[0][1]
        answers.append(first.prompt_logprobs)
    assert answers[0] == answers[1]


def test_prompt_logprobs_of_a_one_token_prompt_are_none():
    fake = FakeEngine()
    fake.add("a", [5], prompt_logprobs=0, max_tokens=1)
    fake.run()
    assert fake.final("a").prompt_logprobs == (None,)


# A storm.


@pytest.mark.parametrize("seed", range(8))
def test_every_request_ends_in_exactly_one_final_delta_whatever_happens(seed):
    rng = random.Random(seed)
    fake = FakeEngine(
        num_blocks=rng.choice([10, 16, 40]),
        max_num_seqs=rng.choice([1, 3, 8]),
        max_num_batched_tokens=rng.choice([8, 17, 64]),
        max_model_len=36,
        num_rows=2,
        load_steps=rng.choice([0, 3]),
        broken=("broken",),
        enable_prefix_caching=rng.random() < 0.8,
    )
    fake.model.fail_on_token = 63 if rng.random() < 0.5 else None
    adapters = [None, adapter(1), adapter(1, 2), adapter(2), adapter(3), adapter(4, name="broken")]
    requests: dict[str, tuple[list[int], object]] = {}
    cancelled: set[str] = set()
    pending = []
    for _ in range(250):
        if rng.random() < 0.4 and len(requests) < 60:
            request_id = f"r{len(requests)}"
            prompt = [rng.randrange(4) + 5 for _ in range(rng.randrange(0, 30))]
            if rng.random() < 0.05:
                prompt.append(63)
            ref = rng.choice(adapters)
            options = {"grammar": REGEX} if rng.random() < 0.1 else {}
            num_futures = len(fake.compiler.futures)
            fake.add(
                request_id, prompt, adapter=ref, priority=rng.choice([0, 0, 1]),
                max_tokens=rng.randrange(1, 12), **options,
            )  # fmt: skip
            requests[request_id] = (prompt, ref)
            pending += fake.compiler.futures[num_futures:]
        if rng.random() < 0.15 and requests:
            victim = rng.choice(list(requests))
            cancelled.add(victim)
            fake.engine.cancel(victim)
        if pending and rng.random() < 0.3:
            future = pending.pop()
            if not future.cancelled():
                future.set_result(CountingMatcher())
        fake.step()
    for future in pending:
        if not future.cancelled():
            future.set_result(CountingMatcher())
    fake.run()
    for request_id, (prompt, ref) in requests.items():
        final = fake.final(request_id)
        if final.finish_reason == "cancelled":
            assert request_id in cancelled
        text = fake.text(request_id)
        salt = 0 if ref is None else salt_of(ref)
        assert text == expected_text(prompt, len(text), salt)
    assert fake.stats.num_running == fake.stats.num_waiting == 0
    assert fake.stats.kv_cache_usage == 0


def test_a_step_without_memory_is_repeated_when_room_has_been_made():
    fake = FakeEngine()
    fake.add("a", max_tokens=4)
    fake.step()
    call = type(fake.model).__call__
    num_asked = 0

    class Full(type(fake.model)):
        def __call__(self, *args):
            if num_asked == 0:
                raise torch.OutOfMemoryError("no room")
            return call(self, *args)

    def make_room() -> bool:
        nonlocal num_asked
        num_asked += 1
        return num_asked == 1

    fake.model.__class__ = Full
    fake.engine.make_room = make_room
    fake.run()
    assert num_asked == 1
    assert fake.text("a") == expected_text([5, 6, 7], 4)
