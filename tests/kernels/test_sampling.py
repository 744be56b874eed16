"""The operators that choose tokens, against their definitions and transformers' processors."""

import math

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kernels.sampling import (
    apply_bitmask,
    apply_penalties,
    draw,
    greedy,
    top_logprobs,
    uniform,
)
from kernels.truncation import (
    _kth_largest,
    _nucleus_floors,
    _nucleus_floors_by_row,
    kth_largest_reference,
    nucleus_floors_reference,
    truncate,
)

VOCAB_SIZES = [1, 2, 127, 128, 129, 1000, 4099]  # around the tree's 128 members, and beyond


def random_logits(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * scale


def splitmix64(seed: int, index: int) -> float:
    """Output number `index` of the generator that starts at the hash of the seed, in integers."""
    mask, gamma = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    start = mix((seed + gamma) & mask)
    return (mix((start + (index + 1) * gamma) & mask) >> 11) * 2.0**-53


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Standard deviations by which counts differ more than chance; beyond 5 is no chance."""
    statistic = ((counts.double() - expected) ** 2 / expected).sum().item()
    freedom = len(counts) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_noise_is_splitmix64_of_seed_and_position():
    seeds = [0, 1, 2**63 - 1, -1, 123456789, -(2**63)]
    positions = [0, 1, 77, 2**40, 5, 3]
    actual = uniform(torch.tensor(seeds), torch.tensor(positions)).tolist()
    assert actual == [splitmix64(s % 2**64, i) for s, i in zip(seeds, positions, strict=True)]


@pytest.mark.parametrize("varies", ["position", "seed", "both"])
def test_noise_is_uniform_and_neighbours_do_not_correlate(varies):
    index = torch.arange(200_000)
    fixed = torch.full_like(index, 42)
    noise = uniform(fixed if varies == "position" else index, fixed if varies == "seed" else index)
    assert noise.dtype == torch.float64 and noise.min() >= 0.0 and noise.max() < 1.0
    counts = torch.bincount((noise * 1000).long(), minlength=1000)
    assert abs(chi_square(counts, torch.full((1000,), 200.0))) < 5
    low_bits = (noise * 2**53).long() % 64
    assert abs(chi_square(torch.bincount(low_bits, minlength=64), torch.full((64,), 3125.0))) < 5
    correlation = torch.corrcoef(torch.stack((noise[:-1], noise[1:])))[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(200_000)


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.zeros(3, 1000)
    logits[1, [700, 70, 7]] = 2.0
    logits[2] = -torch.inf
    logits[2, 999] = -5.0
    assert greedy(logits).tolist() == [0, 7, 999]


@pytest.mark.parametrize("vocab_size", [5, 300])
def test_tokens_are_drawn_as_often_as_they_are_likely(vocab_size):
    num_draws = 100_000
    logits = random_logits(1, vocab_size, scale=1.0)
    noise = uniform(torch.full((num_draws,), 7), torch.arange(num_draws))
    temperature = torch.full((1000,), 0.7)
    counts = torch.zeros(vocab_size)
    for part in noise.split(1000):
        drawn = draw(logits.repeat(1000, 1), temperature, part)
        counts += torch.bincount(drawn, minlength=vocab_size)
    expected = torch.softmax(logits[0].double() / 0.7, dim=-1) * num_draws
    assert abs(chi_square(counts, expected)) < 5


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_what_is_masked_is_never_drawn(vocab_size):
    num_rows = 64
    logits = random_logits(num_rows, vocab_size, seed=vocab_size)
    generator = torch.Generator().manual_seed(1)
    logits[torch.rand(logits.shape, generator=generator) < 0.9] = -torch.inf
    kept = torch.randint(vocab_size, (num_rows,), generator=generator)
    logits[torch.arange(num_rows), kept] = 0.0
    extremes = torch.tensor([0.0, 2.0**-53, 0.5, 1.0 - 2.0**-53], dtype=torch.float64)
    for noise in (extremes.repeat(num_rows // 4), torch.rand(num_rows, dtype=torch.float64)):
        drawn = draw(logits.clone(), torch.full((num_rows,), 1.5), noise)
        assert logits[torch.arange(num_rows), drawn].isfinite().all()


def test_what_underflows_to_zero_is_never_drawn():
    logits = torch.full((1, 5000), -1e30)
    logits[0, 4321] = 1e30
    for noise in (0.0, 1.0 - 2.0**-53):
        drawn = draw(logits.clone(), torch.ones(1), torch.tensor([noise], dtype=torch.float64))
        assert drawn.tolist() == [4321]


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_a_row_draws_the_same_alone_and_among_others(vocab_size):
    num_rows = 33
    logits = random_logits(num_rows, vocab_size, seed=3)
    noise = uniform(torch.arange(num_rows), torch.arange(num_rows) * 3)
    temperature = torch.linspace(0.2, 2.0, num_rows)
    options = {
        "min_p": torch.linspace(0.0, 0.3, num_rows),
        "top_k": torch.arange(num_rows) * 5 % 90,
        "top_p": torch.linspace(0.1, 1.0, num_rows),
    }
    together = draw(logits.clone(), temperature, noise, **options)
    for row in range(num_rows):
        one = slice(row, row + 1)
        own = {name: values[one] for name, values in options.items()}
        alone = draw(logits[one].clone(), temperature[one], noise[one], **own)
        assert alone == together[row]


def test_probabilities_are_the_same_bits_alone_and_among_others():
    logits = random_logits(32, 32_003, seed=4)
    together = torch.softmax(logits, dim=-1)
    alone = torch.cat([torch.softmax(row[None], dim=-1) for row in logits])
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    ("min_p", "top_k", "top_p"),
    [
        (0.05, 0, 1.0),
        (0.0, 1, 1.0),
        (0.0, 40, 1.0),
        (0.0, 3000, 1.0),
        (0.0, 0, 0.5),
        (0.0, 0, 0.95),
        (0.0, 0, 0.9999),
        (0.02, 50, 0.9),
        (0.001, 700, 0.99),
    ],
)
@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])  # nearly flat (a wide nucleus) to peaked
def test_truncation_keeps_what_transformers_keeps(min_p, top_k, top_p, scale):
    logits = random_logits(8, 2000, seed=5, scale=scale)
    temperature = 0.8
    scores = TemperatureLogitsWarper(temperature)(None, logits.double())
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    probs = torch.softmax(logits / temperature, dim=-1)
    truncate(
        probs,
        min_p=torch.full((8,), min_p),
        top_k=torch.full((8,), top_k),
        top_p=torch.full((8,), top_p),
    )
    differing = ((probs > 0) != scores.isfinite()).sum().item()
    # A share that float32 cannot tell from top_p may be decided either way, once a row at most.
    assert differing <= (8 if top_p == 0.9999 else 0)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 4.0, 100.0])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_floors_on_the_cpu_are_those_of_the_reference(vocab_size, scale):
    num_rows = 40
    probs = torch.softmax(random_logits(num_rows, vocab_size, seed=9, scale=scale), dim=-1)
    probs[::3] *= probs[::3] > probs[::3].mean(dim=-1, keepdim=True) * 0.5  # as after min_p
    top_p = torch.linspace(1e-6, 1.0, num_rows)
    top_p[-2] = 1.0 - 2.0**-24
    expected = nucleus_floors_reference(probs, top_p)
    assert torch.equal(_nucleus_floors(probs, top_p), expected)
    assert torch.equal(_nucleus_floors_by_row(probs, top_p), expected)
    k = torch.arange(num_rows) * vocab_size // num_rows + 1
    assert torch.equal(_kth_largest(probs, k), kth_largest_reference(probs, k))


def test_every_row_has_its_own_truncation():
    probs = torch.softmax(random_logits(4, 500, seed=6), dim=-1)
    before = probs.clone()
    truncate(
        probs,
        min_p=torch.zeros(4),
        top_k=torch.tensor([0, 3, 500, 9999]),
        top_p=torch.tensor([1.0, 1.0, 1.0, 1e-6]),
    )
    assert (probs > 0).sum(-1).tolist() == [500, 3, 500, 1]
    assert torch.equal(probs[0], before[0]) and torch.equal(probs[2], before[2])


def test_equals_at_the_border_are_all_kept():
    probs = torch.tensor([[0.4, 0.1, 0.2, 0.1, 0.1, 0.1]])
    by_rank, by_share = probs.clone(), probs.clone()
    truncate(by_rank, top_k=torch.tensor([3]))
    truncate(by_share, top_p=torch.tensor([0.65]))
    assert (by_rank > 0).all() and (by_share > 0).all()


def test_a_flat_distribution_keeps_its_share_of_distinct_probabilities():
    probs = torch.linspace(1.0, 2.0, 10_000)[None]
    probs = probs / probs.sum()
    top_p = torch.tensor([0.5])
    kept = probs.clone()
    truncate(kept, top_p=top_p)
    ranked = probs[0].double().sort(descending=True).values
    expected = int((ranked.cumsum(0) < 0.5 * ranked.sum()).sum()) + 1
    assert abs(int((kept > 0).sum()) - expected) <= 1


def test_repetition_penalty_is_that_of_transformers():
    logits = random_logits(1, 50)
    seen = torch.tensor([[3, 7, 7, 21]])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(seen, logits.clone())
    token_ids = seen[0].unique()
    zeros = torch.zeros(3)
    rows = torch.zeros(3, dtype=torch.int64)
    apply_penalties(logits, rows, token_ids, zeros, torch.full((3,), 1.3), zeros, zeros)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_presence_counts_once_and_frequency_each_time_in_the_output_only():
    logits = torch.zeros(2, 10)
    apply_penalties(
        logits,
        rows=torch.tensor([1, 1, 1]),
        token_ids=torch.tensor([2, 5, 9]),
        counts=torch.tensor([1.0, 3.0, 0.0]),
        repetition=torch.ones(3),
        presence=torch.full((3,), 0.5),
        frequency=torch.full((3,), 0.25),
    )
    assert not logits[0].any()
    assert logits[1].tolist() == [0, 0, -0.75, 0, 0, -1.25, 0, 0, 0, 0]


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 100])
def test_a_bitmask_forbids_what_its_zeros_say(vocab_size):
    allowed = torch.rand(2, vocab_size, generator=torch.Generator().manual_seed(0)) < 0.5
    bitmask = torch.zeros(2, (vocab_size + 31) // 32, dtype=torch.int64)
    for row, token_id in allowed.nonzero().tolist():
        bitmask[row, token_id // 32] |= 1 << token_id % 32
    logits = torch.zeros(3, vocab_size)
    apply_bitmask(logits, [2, 0], bitmask.to(torch.int32))
    assert torch.equal(logits[2].isfinite(), allowed[0])
    assert torch.equal(logits[0].isfinite(), allowed[1])
    assert logits[1].isfinite().all()


def test_rejects_a_bitmask_of_another_vocabulary():
    with pytest.raises(ValueError, match=r"bitmask.shape: expected \(1, 4\), got \(1, 3\)"):
        apply_bitmask(torch.zeros(1, 100), [0], torch.zeros(1, 3, dtype=torch.int32))


def test_logprobs_are_those_of_the_logits_best_first():
    logits = random_logits(3, 200, seed=8)
    token_ids = torch.tensor([5, 0, 199])
    chosen, values, ids = top_logprobs(logits, token_ids, 4)
    reference = torch.log_softmax(logits.double(), dim=-1)
    torch.testing.assert_close(chosen.double(), reference[range(3), token_ids], rtol=0, atol=1e-5)
    assert torch.equal(ids, reference.topk(4).indices)
    torch.testing.assert_close(values.double(), reference.topk(4).values, rtol=0, atol=1e-5)
    assert top_logprobs(logits, token_ids, 0)[2].shape == (3, 0)
