"""Storms over steps launched ahead: passes and choices that fail, and a device that runs behind."""

from __future__ import annotations

import random

import pytest
import torch

from engine.sequence import BACKGROUND
from tests.engine.choosing import choose_at_once
from tests.engine.fakes import FakeEngine, adapter
from tests.engine.test_decode_graphs import Recorder
from tests.engine.test_in_flight import Late, add
from tests.engine.test_speculation import KINDS, said

NUM_REQUESTS = 25


def options_of(dice: random.Random) -> dict:
    """An engine that is short of one thing or another."""
    return {
        "num_blocks": dice.choice([14, 24, 60]),
        "max_num_seqs": dice.choice([2, 4, 8]),
        "max_num_batched_tokens": dice.choice([8, 16, 64]),
        "max_model_len": 32,
        "load_steps": dice.choice([0, 2]),
        "enable_prefix_caching": dice.random() < 0.8,
    }


def answers(fake: FakeEngine, step, seed: int, kinds: list[dict], priorities: list[int]) -> dict:
    """What everyone is told who is not cancelled, `step` being how the engine steps."""
    dice = random.Random(seed)
    cancelled = set()
    for number in range(NUM_REQUESTS):
        prompt = [dice.randrange(3, 9) for _ in range(dice.randrange(1, 16))]
        params = {"max_tokens": dice.randrange(1, 24), "seed": number, **dice.choice(kinds)}
        ref = dice.choice([None, None, adapter(1), adapter(2), adapter(3, name="reward")])
        if ref is not None and ref.name == "reward" and dice.random() < 0.7:
            params = {"task": "score"}
        grammar = 0 if "task" in params or dice.random() < 0.8 else dice.randrange(1, 9)
        if grammar:  # whose tokens nothing else may exclude
            params = {"temperature": 0.5, "seed": number, "max_tokens": 8}
        priority = dice.choice(priorities)
        add(fake, f"r{number}", prompt, grammar, adapter=ref, priority=priority, **params)
        for _ in range(dice.choice((0, 1, 3, 10))):
            step()
        if dice.random() < 0.15:
            victim = f"r{dice.randrange(number + 1)}"
            fake.engine.cancel(victim)
            cancelled.add(victim)
    for _ in range(3000):
        if fake.engine.has_work():
            step()
    assert not fake.engine.has_work() and fake.stats.kv_cache_usage == 0
    everyone = {f"r{number}" for number in range(NUM_REQUESTS)}
    assert all(fake.final(name) for name in everyone)  # exactly one
    return {name: said(fake, name)[:6] for name in everyone - cancelled}


@pytest.mark.parametrize("seed", range(8))
def test_what_fails_for_several_and_not_alone_changes_no_answer(seed, monkeypatch):
    """Before or after the device has done it, in steps of all and of one group, with and without
    launching ahead."""
    if seed % 2:
        choose_at_once(monkeypatch)
    options = options_of(random.Random(seed))
    found = []
    for mode in ("off", "on"):
        backend = Recorder() if seed % 4 > 1 else None
        fake = FakeEngine(async_scheduling=mode, graph_backend=backend, **options)
        fake.model.originality = 0.3
        chaos = random.Random(f"{seed} {mode}")
        run, launch = fake.engine._runner.run, fake.engine._sampler.launch

        def fails(num_sequences: int, chaos=chaos) -> bool:
            return num_sequences > 1 and chaos.random() < 0.1

        def run_or_fail(items, last=None, chaos=chaos, run=run, fails=fails):
            if fails(len(items)):
                if chaos.random() < 0.5:
                    run(items, last)
                raise chaos.choice([torch.OutOfMemoryError("no room"), RuntimeError("no")])
            return run(items, last)

        def launch_or_fail(logits, sequences, chaos=chaos, launch=launch, fails=fails):
            if fails(len(sequences)):
                if chaos.random() < 0.5:
                    launch(logits, sequences)
                raise RuntimeError("no")
            return launch(logits, sequences)

        def step(fake=fake, chaos=chaos) -> None:
            kind = chaos.random()
            if kind < 0.1:
                fake.step("clients")
            elif kind < 0.2:
                fake.step("background", chaos.choice([1, 4, None]))
            else:
                fake.step(may_run_ahead=kind > 0.3)

        fake.engine._runner.run, fake.engine._sampler.launch = run_or_fail, launch_or_fail
        fake.engine.make_room = lambda chaos=chaos: chaos.random() < 0.5
        kinds = list(KINDS.values())
        found.append(answers(fake, step, seed, kinds, [0, 0, 1, BACKGROUND]))
    assert found[0] == found[1]


@pytest.mark.parametrize("seed", range(4))
def test_a_storm_on_a_device_that_runs_behind_reads_and_overwrites_nothing_early(
    seed, monkeypatch, caplog
):
    options = options_of(random.Random(seed))
    # top_k and top_p have kernels of their own there, and their references wait.
    kinds = [kind for name, kind in KINDS.items() if name != "truncated"]
    plain = FakeEngine(**options)
    plain.model.originality = 0.3
    expected = answers(plain, plain.step, seed, kinds, [0, 0, 1])
    backend = Recorder() if seed % 4 else None
    late = Late(monkeypatch, at_once=seed % 2 == 0, graph_backend=backend, **options)
    assert answers(late.fake, late.step, seed, kinds, [0, 0, 1]) == expected
    assert not caplog.records, "a step failed and was repeated"
