import gc

import pytest
import torch

from kernels.gpu import lora
from kernels.lora import LoraSlice, add_lora_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NOISE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(rank, width, seed, dtype, in_features, device):
    a = randn(rank, in_features, seed=seed, dtype=dtype) * in_features**-0.5
    return a.to(device), randn(width, rank, seed=seed + 1, dtype=dtype).to(device)


def make_slices(dtype, device, in_features=96):
    """Four pool rows: small ranks, no second slice, a free row, a large rank."""
    make = lambda rank, width, seed: pair(rank, width, seed, dtype, in_features, device)  # noqa: E731
    return [
        LoraSlice(0, 32, [make(1, 32, 1), make(8, 32, 2), None, make(17, 32, 3)]),
        LoraSlice(32, 41, [make(6, 9, 4), None, None, make(64, 9, 5)]),
        LoraSlice(41, 141, [None, make(16, 100, 6), None, make(3, 100, 7)]),
    ]


def check(y, x, slices, indices, scales, tolerance):
    expected = y.cpu().float()
    cpu = [
        LoraSlice(s.start, s.stop, [r and tuple(t.cpu() for t in r) for r in s.rows])
        for s in slices
    ]
    wide = [
        LoraSlice(s.start, s.stop, [r and tuple(t.float() for t in r) for r in s.rows]) for s in cpu
    ]
    add_lora_reference(expected, x.cpu().float(), wide, indices.cpu(), scales.cpu())
    arguments = y, x, slices, indices.to(y.device), scales.to(y.device)
    assert lora.accepts(*arguments)
    lora.run(*arguments)
    error = (y.cpu().float() - expected).abs().max()
    assert error <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 7, 33])
def test_adapters_ranks_and_targets_mix_in_a_batch(dtype, num_tokens, device):
    x = randn(num_tokens, 96, seed=1, dtype=dtype).to(device)
    y = randn(num_tokens, 141, seed=2, dtype=dtype).to(device)
    indices = (torch.arange(num_tokens) * 7 % 5 - 1).int()
    check(y, x, make_slices(dtype, device), indices, randn(num_tokens, seed=3), NOISE[dtype])


@pytest.mark.parametrize("in_features", [1, 37, 1500])  # the last is split
def test_inputs_of_any_width(in_features, device):
    x, y = randn(5, in_features, seed=1).to(device), randn(5, 141).to(device)
    slices = make_slices(torch.float32, device, in_features)
    check(y, x, slices, torch.tensor([3, 0, -1, 1, 3]).int(), torch.ones(5), 1e-5)


def test_the_adapter_s_dtype_may_differ_from_the_model_s(device):
    x, y = randn(3, 96, seed=1).half().to(device), randn(3, 141).half().to(device)
    slices = make_slices(torch.float32, device)
    check(y, x, slices, torch.tensor([3, 0, 1]).int(), torch.ones(3), 2e-3)


def test_tokens_of_the_base_are_left_alone_to_the_bit(device):
    x, y = randn(4, 96).half().to(device), randn(4, 141).half().to(device)
    before = y.clone()
    indices = torch.tensor([-1, 2, -1, 0]).int().to(device)  # 2: a free row
    lora.run(y, x, make_slices(torch.float16, device), indices, torch.ones(4, device=device))
    assert torch.equal(y[:3], before[:3])
    assert not torch.equal(y[3], before[3])


@pytest.mark.parametrize("num_tokens", [9, 33])
def test_a_token_has_the_same_bits_alone_and_in_company(num_tokens, device):
    slices = make_slices(torch.float16, device)
    x = randn(num_tokens, 96, seed=1).half().to(device)
    y = randn(num_tokens, 141, seed=2).half().to(device)
    indices = (torch.arange(num_tokens) * 3 % 5 - 1).int().to(device)
    scales = randn(num_tokens, seed=3).to(device)
    together = y.clone()
    lora.run(together, x, slices, indices, scales)
    for place in (0, 3, num_tokens - 1):
        alone = y[place : place + 1].clone()
        one = slice(place, place + 1)
        lora.run(alone, x[one], slices, indices[one].contiguous(), scales[one].contiguous())
        assert torch.equal(alone[0], together[place])


def test_columns_outside_the_slices_stay(device):
    slices = make_slices(torch.float32, device)[1:2]
    x, y = randn(2, 96).to(device), randn(2, 141).to(device)
    before = y.clone()
    indices = torch.tensor([0, 3]).int().to(device)
    lora.run(y, x, slices, indices, torch.ones(2, device=device))
    assert torch.equal(y[:, :32], before[:, :32])
    assert torch.equal(y[:, 41:], before[:, 41:])
    assert not torch.equal(y[:, 32:41], before[:, 32:41])


def test_tables_are_made_once_and_go_with_their_slices(device):
    slices = make_slices(torch.float32, device)
    tables = lora.tables_of(slices, device)
    assert lora.tables_of(slices, device) is tables
    assert lora.tables_of([slices[0]], device) is not tables  # other slices, other tables
    count = len(lora._tables)
    del slices, tables
    gc.collect()
    assert len(lora._tables) < count


@pytest.mark.parametrize("what", ["dtypes", "rank", "strides", "nothing"])
def test_what_the_kernels_are_not_made_for_is_declined(what, device):
    rows = {
        "dtypes": [
            pair(4, 8, 1, torch.float16, 96, device),
            pair(4, 8, 1, torch.float32, 96, device),
        ],
        "rank": [pair(300, 8, 1, torch.float32, 96, device)],
        "strides": [(randn(96, 4).T.to(device), randn(8, 4).to(device))],
        "nothing": [None],
    }[what]
    x, y = torch.zeros(1, 96, device=device), torch.zeros(1, 8, device=device)
    indices, scales = torch.zeros(1, device=device).int(), torch.ones(1, device=device)
    assert not lora.accepts(y, x, [LoraSlice(0, 8, rows)], indices, scales)
