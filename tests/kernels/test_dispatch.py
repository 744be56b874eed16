import pytest
import torch

from kernels import dispatch
from kernels.dispatch import Implementation, check


@pytest.fixture(autouse=True)
def no_implementations(monkeypatch):
    """Leave what is really registered alone, and read HERD_KERNELS afresh."""
    monkeypatch.setattr(dispatch, "_implementations", {})
    monkeypatch.delenv("HERD_KERNELS", raising=False)
    dispatch.reference_only.cache_clear()
    yield
    dispatch.reference_only.cache_clear()


def double(x):
    return "reference", 2 * x


def small_only():
    return Implementation("small", lambda x: ("small", 2 * x), lambda x: x < 10)


def test_the_reference_runs_where_nothing_is_registered():
    assert dispatch.dispatch("double", double, 3) == ("reference", 6)


def test_an_implementation_runs_where_it_accepts_and_the_reference_where_it_declines():
    dispatch.register("double", small_only())
    assert dispatch.dispatch("double", double, 3) == ("small", 6)
    assert dispatch.dispatch("double", double, 30) == ("reference", 60)


def test_the_implementation_registered_first_is_asked_first():
    dispatch.register("double", small_only())
    dispatch.register("double", Implementation("any", lambda x: ("any", 2 * x), lambda _: True))
    assert dispatch.dispatch("double", double, 3) == ("small", 6)
    assert dispatch.dispatch("double", double, 30) == ("any", 60)


def test_a_withdrawn_implementation_runs_no_more():
    dispatch.register("double", small_only())
    dispatch.unregister("double", "small")
    assert dispatch.dispatch("double", double, 3) == ("reference", 6)


def test_the_environment_can_ask_for_references_alone(monkeypatch):
    dispatch.register("double", small_only())
    monkeypatch.setenv("HERD_KERNELS", "reference")
    assert dispatch.dispatch("double", double, 3) == ("reference", 6)


def test_a_meaningless_environment_is_refused(monkeypatch):
    dispatch.register("double", small_only())
    monkeypatch.setenv("HERD_KERNELS", "fast")
    with pytest.raises(ValueError, match="HERD_KERNELS: expected auto or reference, got fast"):
        dispatch.dispatch("double", double, 3)


def test_check_says_what_was_expected_and_what_was_found():
    check(True, "x.shape", (2, 3), (2, 3))
    with pytest.raises(ValueError, match=r"x.shape: expected \(2, 3\), got \(3, 2\)"):
        check(False, "x.shape", (2, 3), tuple(torch.empty(3, 2).shape))
