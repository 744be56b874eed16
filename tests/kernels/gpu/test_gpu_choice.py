"""Tokens chosen in one operation: the kernels against the functions of kernels/sampling.py."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from bench.aot_choice import VOCAB_SIZE, choice_cases
from kernels.choice import (
    BROKEN,
    MAX_COUNT,
    NO_TOKEN,
    choose_tokens_reference,
)
from kernels.gpu import choice, choice_kernel
from kernels.gpu.selftest_choice import plain_tables, random_batch, tables_on
from kernels.sampling import uniform

VOCAB_SIZES = [1, 127, 128, 129, 1100, 9000]  # around the 128 members of a column


def choose(logits, tables, device):
    """What the kernels choose and what their counts are then, on the CPU."""
    there = tables_on(tables, device)
    chosen = choice.run(logits.to(device), there)
    return chosen.token_ids.cpu().tolist(), there.counts.cpu()


def expect(logits, tables):
    own = tables_on(tables, logits.device)
    return choose_tokens_reference(logits, own).token_ids.tolist(), own.counts


@triton.jit
def noise_kernel(out, seeds, positions):
    """Grid (num_rows); out float64 [num_rows]."""
    row = tl.program_id(0)
    noise = choice_kernel._uniform(tl.load(seeds + row), tl.load(positions + row))
    tl.store(out + row, noise)


def test_noise_is_the_host_s_to_the_bit(device):
    seeds = torch.tensor([0, 1, 2**63 - 1, -1, 123456789, -(2**63)])
    positions = torch.tensor([0, 1, 77, 2**40, 5, 3])
    out = torch.empty(6, dtype=torch.float64, device=device)
    noise_kernel[(6,)](out, seeds.to(device), positions.to(device))
    assert torch.equal(out.cpu(), uniform(seeds, positions))


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_whatever_rows_ask_for_they_get_the_reference_s_tokens(vocab_size, device):
    logits, tables = random_batch(12, vocab_size, seed=vocab_size)
    own, there = tables_on(tables, logits.device), tables_on(tables, device)
    expected = choose_tokens_reference(logits, own)
    assert choice.accepts(logits.to(device), there)
    actual = choice.run(logits.to(device), there)
    assert actual.token_ids.tolist() == expected.token_ids.tolist()
    assert torch.equal(there.counts.cpu(), own.counts)
    assert torch.equal(actual.top_ids.cpu(), expected.top_ids)
    for name in ("logprobs", "top_logprobs"):
        found, wanted = getattr(actual, name).cpu(), getattr(expected, name)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_row_gets_the_same_token_alone_and_logits_stay_as_they_are(device):
    logits, tables = random_batch(12, 1100, seed=3)
    logits = logits.to(device)
    before = logits.clone()
    together = choice.run(logits, tables_on(tables, device)).token_ids.tolist()
    assert torch.equal(logits, before)
    for row in range(2, 12, 3):
        own = tables_on(tables, device)
        one = slice(row, row + 1)
        alone = replace(
            own, floats=own.floats[:, one].contiguous(), ints=own.ints[:, one].contiguous(),
            seeds=own.seeds[one], positions=own.positions[one], num_reported=0,
        )  # fmt: skip
        alone.number("logprobs").fill_(-1)
        assert choice.run(logits[one].contiguous(), alone).token_ids.tolist() == [together[row]]


def test_greedy_rows_take_the_lowest_id_among_equals(device):
    logits = torch.zeros(4, 1100)
    logits[1, [1099, 700, 70]] = 2.0
    logits[2] = -5.0
    logits[2, 1098] = -4.0
    logits[3, :] = -1e30
    assert choose(logits, plain_tables(4, 1100), device)[0] == [0, 70, 1098, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_broken_and_no_other(bad, device):
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    expected = logits.argmax(-1).tolist()
    logits[1, 123] = bad
    tables = plain_tables(3, 300, temperature=torch.tensor([0.0, 1.0, 0.0]), logprobs=[-1, 0, 1])
    tables = replace(tables, num_reported=2, num_top=3)
    tables.number("counts")[:] = torch.tensor([0, 1, 2])
    tables.number("is_counted").fill_(1)
    found, counts = choose(logits, tables, device)
    assert found == [expected[0], BROKEN, expected[2]]
    assert counts.sum(-1).tolist() == [1, 0, 1, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_from_which_everything_is_excluded_has_no_token(temperature, device):
    tables = plain_tables(
        3, 70, temperature=temperature, mask=torch.tensor([0, -1, 1]),
        additions=torch.tensor([0, 0, 1]), additions_end=torch.tensor([0, 1, 2]),
    )  # fmt: skip
    tables.bitmask[0] = 0
    tables.bitmask[1] = torch.tensor([0, 1 << 5, 0])  # 37 alone, which an addition forbids
    tables.addition_ids[:2] = torch.tensor([7, 37])
    tables.amounts[:2] = -torch.inf
    logits = torch.zeros(3, 70)
    logits[1, 8] = 100.0
    assert choose(logits, tables, device)[0] == [NO_TOKEN, 8, NO_TOKEN]


def test_additions_hold_below_their_position(device):
    tables = plain_tables(3, 70, additions_end=1)
    tables.addition_ids[0], tables.amounts[0], tables.until[0] = 9, -torch.inf, 2
    tables.positions[:] = torch.tensor([0, 1, 2])
    logits = torch.zeros(3, 70)
    logits[:, 9], logits[:, 33] = 5.0, 4.0
    assert choose(logits, tables, device)[0] == [33, 33, 9]


def test_temperatures_from_nearly_none_to_huge(device):
    generator = torch.Generator().manual_seed(1)
    temperature = torch.tensor([9e-6, 1e-5, 1e-3, 1.0, 1e3, 1e6])
    logits = torch.randn(1, 1100, generator=generator).repeat(6, 1) * 3
    tables = plain_tables(6, 1100, temperature=temperature, top_p=0.9)
    found, _ = choose(logits, tables, device)
    assert found == expect(logits, tables)[0]
    assert found[:3] == [int(logits[0].argmax())] * 3


def test_what_underflows_to_zero_is_never_drawn(device):
    logits = torch.full((3, 500), -1e30)
    logits[:, 432] = 1e30
    tables = plain_tables(3, 500, temperature=1.0, top_k=torch.tensor([0, 5, 0]))
    tables.number("top_p")[2] = 0.5
    assert choose(logits, tables, device)[0] == [432] * 3


def test_equals_at_the_border_are_all_kept(device):
    """Two of three equals are within top-k: all three may be drawn, and no other token."""
    num_rows = 12
    logits = torch.full((num_rows, 300), -3.0)
    logits[:, 7] = 1.0
    logits[:, [20, 150, 299]] = 0.5
    tables = plain_tables(num_rows, 300, temperature=1.0, top_k=2)
    found, _ = choose(logits, tables, device)
    assert set(found) <= {7, 20, 150, 299} and len(set(found)) > 2
    assert found == expect(logits, tables)[0]


@pytest.mark.parametrize("rule", [{"top_k": 200}, {"top_p": 0.999}, {"top_p": 0.3}, {"min_p": 1.0}])
def test_flat_distributions_are_truncated_too(rule, device):
    """More tokens than columns, so that no bound is known beforehand; all of them; the equals."""
    logits = torch.linspace(0, 1, 1100).repeat(6, 1)
    if "min_p" in rule:
        logits[:, 100:103] = 1.0
    tables = plain_tables(6, 1100, temperature=1.0, **rule)
    assert choose(logits, tables, device)[0] == expect(logits, tables)[0]


def test_tokens_are_counted_where_rows_say_so_and_never_beyond_16_bits(device):
    logits = torch.zeros(3, 40)
    logits[:, 7] = 9.0
    tables = plain_tables(3, 40, counts=torch.tensor([0, 1, 2]), is_counted=torch.tensor([1, 0, 1]))
    tables.counts[2, 7] = MAX_COUNT
    found, counts = choose(logits, tables, device)
    assert found == [7] * 3 and counts[:3, 7].tolist() == [1, 0, MAX_COUNT]


def test_batches_without_rows_are_fine(device):
    tables = plain_tables(0, 40)
    assert choose(torch.zeros(0, 40), tables, device)[0] == []


def test_logits_that_the_kernels_cannot_read_are_declined(device):
    tables = tables_on(plain_tables(2, 40), device)
    logits = torch.zeros(2, 40, device=device)
    assert choice.accepts(logits, tables)
    assert not choice.accepts(logits.half(), tables)
    assert not choice.accepts(torch.zeros(40, 2, device=device).T, tables)
    assert not choice.accepts(torch.zeros(1, 600_000, device=device), None)


class Recorder:
    """Takes a kernel's place and keeps the types of what it is launched with."""

    def __init__(self, kernel) -> None:
        self.names = kernel.arg_names
        self.seen: list[dict[str, object]] = []

    def __getitem__(self, grid):
        def launch(*arguments, **options) -> None:
            types = [TYPES.get(getattr(x, "dtype", int), "i32") for x in arguments]
            known = dict(zip(self.names, types, strict=False))
            self.seen.append(known | {name: options[name] for name in options if name.isupper()})

        return launch


TYPES = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.int16: "*i16", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip


def test_every_batch_launches_what_is_compiled_once_and_counted(monkeypatch):
    """Another type would be another compilation, while requests wait; see bench/aot_choice.py."""
    cases = {case.kernel.arg_names[0]: case for case in choice_cases()}
    recorders = {}
    for name in ("scan_kernel", "weigh_kernel", "choose_kernel", "report_kernel"):
        recorders[name] = Recorder(getattr(choice, name))
        monkeypatch.setattr(choice, name, recorders[name])
    for numbers in ({}, {"temperature": 1.0}, {"logprobs": torch.arange(3)}):
        choice.run(torch.zeros(3, VOCAB_SIZE), plain_tables(3, VOCAB_SIZE, **numbers))
    assert [len(recorder.seen) for recorder in recorders.values()] == [3, 1, 3, 1]
    for recorder in recorders.values():
        case = cases[recorder.names[0]]
        for seen in recorder.seen:
            assert seen == case.types | case.constants
