import pytest
import torch

from kernels import dispatch
from kernels.dispatch import Implementation
from kernels.gpu import sampling
from kernels.sampling import apply_bitmask_reference, draw, uniform
from kernels.truncation import kth_largest_reference, nucleus_floors_reference, truncate_reference

VOCAB_SIZES = [1, 40, 128, 1100, 9000]


def distributions(vocab_size, num=6, seed=0):
    """Steep, flat, of equals, of a few tokens and of one."""
    probs = torch.randn(num, vocab_size, generator=torch.Generator().manual_seed(seed))
    probs *= torch.tensor([1.0, 4.0, 0.1, 0.0, 2.0, 1.0])[:num, None]
    probs = probs.softmax(dim=-1)
    probs[4, vocab_size // 3 + 1 :] = 0
    probs[5] = 0
    probs[5, vocab_size // 2] = 1
    return probs


RULES = {
    "top_k": (None, torch.tensor([1, 5, 0, 3, 100, 2]), None),
    "top_p": (None, None, torch.tensor([0.9, 0.5, 0.99, 0.3, 1.0, 0.001])),
    "min_p": (torch.tensor([0.1, 0.0, 1.0, 0.5, 0.01, 0.3]), None, None),
    "all": (
        torch.tensor([0.0, 0.1, 0.0, 0.5, 0.01, 0.3]), torch.tensor([20, 5, 0, 3, 100, 2]),
        torch.tensor([0.9, 0.5, 0.99, 1.0, 0.6, 0.001]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("rules", RULES)
def test_the_same_tokens_pass_to_the_bit(vocab_size, rules, device):
    expected = distributions(vocab_size)
    actual = expected.to(device, copy=True)
    there = [rule if rule is None else rule.to(device) for rule in RULES[rules]]
    assert sampling.accepts_truncate(actual, *there)
    sampling.truncate(actual, *there)
    truncate_reference(expected, *RULES[rules])
    assert torch.equal(actual.cpu(), expected)


def test_bounds_are_those_of_the_plain_references(device):
    probs = distributions(1100, seed=1)
    k, p = torch.tensor([1, 2, 3, 50, 1099, 1]), torch.tensor([0.1, 0.9, 0.5, 0.2, 0.7, 0.4])
    for rules, floors in [
        ((None, k, None), kth_largest_reference(probs, k)),
        ((None, None, p), nucleus_floors_reference(probs, p)),
    ]:
        actual = probs.to(device, copy=True)
        sampling.truncate(actual, *(rule if rule is None else rule.to(device) for rule in rules))
        assert torch.equal(actual.cpu(), probs * (probs >= floors[:, None]))


def test_what_is_drawn_is_what_the_reference_draws(device, monkeypatch):
    monkeypatch.setattr(dispatch, "_implementations", {})
    monkeypatch.setattr(dispatch._registration, "is_done", True)
    num = 8
    logits = torch.randn(num, 1100, generator=torch.Generator().manual_seed(2)) * 3
    seeds = torch.arange(num)
    rules = {
        "min_p": torch.rand(num, generator=torch.Generator().manual_seed(3)) * 0.05,
        "top_k": torch.arange(num) * 23 % 90,
        "top_p": 1 - torch.rand(num, generator=torch.Generator().manual_seed(4)) * 0.5,
    }
    temperature, noise = torch.linspace(0.2, 2, num), uniform(seeds, seeds + 5)
    expected = draw(logits.clone(), temperature, noise, **rules)
    kernel = Implementation("triton", sampling.truncate, sampling.accepts_truncate)
    dispatch.register("truncate", kernel)
    there = {name: rule.to(device) for name, rule in rules.items()}
    actual = draw(logits.to(device), temperature.to(device), noise.to(device), **there)
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("vocab_size", [5, 64, 1030])
def test_a_grammar_s_mask(vocab_size, device):
    logits, rows = torch.randn(4, vocab_size), [3, 0, 1]
    words = torch.randint(-(2**31), 2**31 - 1, (3, (vocab_size + 31) // 32), dtype=torch.int32)
    actual = logits.to(device, copy=True)
    assert sampling.accepts_bitmask(actual, rows, words)
    sampling.apply_bitmask(actual, rows, words)
    apply_bitmask_reference(logits, rows, words)
    assert torch.equal(actual.cpu(), logits)


def test_rows_without_rules_and_empty_batches_are_fine(device):
    probs = distributions(40).to(device)
    before = probs.clone()
    off = torch.zeros(6, dtype=torch.int64, device=device)
    sampling.truncate(probs, None, off, torch.ones(6, device=device))
    assert torch.equal(probs, before)
    sampling.truncate(probs[:0], None, off[:0], None)
    sampling.apply_bitmask(probs, [], torch.zeros(0, 2, dtype=torch.int32))
    assert torch.equal(probs, before)
