"""The budget between two steps of the streams, with durations given by hand."""

from __future__ import annotations

import pytest

from engine.train.stall_budget import StallBudget


def run_after_a_step(budget: StallBudget, kind: str, takes_s: float) -> float:
    """Run slices of one kind while they may; returns what they took."""
    budget.earn()
    total_s = 0.0
    while budget.may_run(kind):
        budget.pay(kind, takes_s)
        total_s += takes_s
    return total_s


def test_an_unknown_slice_runs_once_and_alone():
    budget = StallBudget(0.05)
    budget.earn()
    assert budget.may_run("forward")
    budget.pay("forward", 0.01)
    assert budget.may_run("forward")
    assert not budget.may_run("backward")  # it might take all of the budget, and some is spent


def test_slices_fill_the_budget_and_do_not_exceed_it():
    budget = StallBudget(0.05)
    run_after_a_step(budget, "forward", 0.012)
    for _ in range(20):
        assert run_after_a_step(budget, "forward", 0.012) <= 0.05 + 1e-9


def test_what_is_not_used_is_not_saved_up():
    budget = StallBudget(4 / 64)
    for _ in range(100):
        budget.earn()
        budget.may_run("forward")
    assert run_after_a_step(budget, "forward", 1 / 64) == 4 / 64


def test_a_slice_longer_than_the_budget_runs_when_it_has_been_earned():
    budget = StallBudget(0.05)
    stalls = [run_after_a_step(budget, "head", 0.2) for _ in range(200)]
    assert set(stalls) == {0.0, 0.2}
    assert sum(stalls) / len(stalls) == pytest.approx(0.05, rel=0.1)


def test_a_slice_that_overran_is_paid_for_by_later_steps():
    budget = StallBudget(0.05)
    budget.learn("forward", 0.01)
    budget.earn()
    assert budget.may_run("forward")
    budget.pay("forward", 0.12)
    budget.earn()
    assert not budget.may_run("backward")


def test_a_single_long_slice_is_forgotten_after_some_short_ones():
    budget = StallBudget(0.05)
    budget.learn("forward", 0.5)
    for _ in range(20):
        budget.learn("forward", 0.01)
    assert budget.expected_s("forward") < 0.02
