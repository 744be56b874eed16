import peft
import pytest
import torch

from kernels.lora import LoraSlice, add_lora

IN = 48


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(rank, out, seed, dtype=torch.float32):
    return randn(rank, IN, seed=seed, dtype=dtype) / 7, randn(out, rank, seed=seed + 1, dtype=dtype)


def mixed_slices(dtype=torch.float32):
    """Two slices, three adapters: ranks differ, and adapter 1 has nothing for the second slice."""
    return [
        LoraSlice(0, 32, [pair(r, 32, r, dtype) for r in (1, 8, 17)]),
        LoraSlice(32, 40, [pair(6, 8, 50, dtype), None, pair(64, 8, 60, dtype)]),
    ]


def token_by_token(y, x, slices, lora_indices, lora_scales):
    """The definition, in float64."""
    out = y.double().clone()
    for token, index in enumerate(lora_indices.tolist()):
        for part in slices:
            row = part.rows[index] if index >= 0 else None
            if row is not None:
                update = row[1].double() @ (row[0].double() @ x[token].double())
                out[token, part.start : part.stop] += lora_scales[token].item() * update
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_every_token_gets_its_own_adapter_and_scale(dtype, adapter_dtype):
    slices = mixed_slices(adapter_dtype)
    y, x = randn(23, 40, dtype=dtype), randn(23, IN, seed=1, dtype=dtype)
    indices = torch.randint(-1, 3, (23,), generator=torch.Generator().manual_seed(2)).int()
    scales = torch.rand(23, generator=torch.Generator().manual_seed(3)) * 2
    expected = token_by_token(y, x, slices, indices, scales)
    add_lora(y, x, slices, indices, scales)
    exact = dtype == adapter_dtype == torch.float32
    tolerance = 2e-5 if exact else 6e-2
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)


def test_tokens_of_the_base_model_and_columns_outside_the_slices_keep_their_bits():
    y, x = randn(6, 44), randn(6, IN, seed=1)
    before = y.clone()
    indices = torch.tensor([-1, 0, -1, 1, -1, -1]).int()
    add_lora(y, x, mixed_slices(), indices, torch.ones(6))
    assert torch.equal(y[indices < 0], before[indices < 0])
    assert torch.equal(y[:, 40:], before[:, 40:])
    assert torch.equal(y[3, 32:], before[3, 32:])  # adapter 1 has no second slice
    assert not torch.equal(y[3, :32], before[3, :32])


def test_scale_zero_is_the_base_model():
    y, x = randn(4, 40), randn(4, IN, seed=1)
    before = y.clone()
    add_lora(y, x, mixed_slices(), torch.tensor([0, 1, 2, 0]).int(), torch.zeros(4))
    assert torch.equal(y, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_alone_and_among_other_adapters(dtype):
    slices = mixed_slices(dtype)
    y, x = randn(50, 40, dtype=dtype), randn(50, IN, seed=1, dtype=dtype)
    indices = torch.randint(-1, 3, (50,), generator=torch.Generator().manual_seed(2)).int()
    scales = torch.rand(50, generator=torch.Generator().manual_seed(3))
    together = y.clone()
    add_lora(together, x, slices, indices, scales)
    for token in range(50):
        one = slice(token, token + 1)
        alone = y[one].clone()
        add_lora(alone, x[one], slices, indices[one], scales[one])
        assert torch.equal(alone[0], together[token])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_pefts(dtype):
    base = torch.nn.Sequential(torch.nn.Linear(IN, 32, bias=False)).to(dtype)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    assert a.dtype == dtype
    x = randn(19, IN, dtype=dtype)
    with torch.no_grad():
        expected, y = model(x), layer.base_layer(x)
    add_lora(y, x, [LoraSlice(0, 32, [(a, 2 * b)])], torch.zeros(19).int(), torch.ones(19))
    noise = 1e-5 if dtype is torch.float32 else 1.6e-2
    torch.testing.assert_close(y, expected, rtol=noise, atol=noise)


def test_an_empty_batch_is_left_alone():
    empty = torch.zeros(0).int()
    add_lora(torch.zeros(0, 40), torch.zeros(0, IN), mixed_slices(), empty, torch.zeros(0))


@pytest.mark.parametrize(
    ("y", "lora_indices", "lora_scales", "message"),
    [
        (torch.zeros(3, 40), 2, 2, r"y.shape\[0\]: expected 2, got 3"),
        (torch.zeros(2, 40), 3, 2, r"len\(lora_indices\): expected 2, got 3"),
        (torch.zeros(2, 40), 2, 1, r"len\(lora_scales\): expected 2, got 1"),
        (torch.zeros(2, 39), 2, 2, "slice.stop: expected at most 39, got 40"),
    ],
)
def test_wrong_arguments_are_named(y, lora_indices, lora_scales, message):
    x = torch.zeros(2, IN)
    with pytest.raises(ValueError, match=message):
        add_lora(y, x, mixed_slices(), torch.zeros(lora_indices).int(), torch.ones(lora_scales))


@pytest.mark.parametrize(
    ("start", "stop", "row", "message"),
    [
        (4, 4, None, "slice: expected 0 <= start < stop"),
        (-1, 4, None, "slice: expected 0 <= start < stop"),
        (0, 8, (torch.zeros(IN), torch.zeros(8, 2)), r"a.dim\(\): expected 2, got 1"),
        (0, 8, (torch.zeros(2, IN), torch.zeros(1, 2)), r"b.shape: expected \(8, 2\)"),
        (0, 8, (torch.zeros(2, IN), torch.zeros(8, 3)), r"b.shape: expected \(8, 2\)"),
        (0, 8, (torch.zeros(2, IN), torch.zeros(8, 2).half()), "b.dtype: expected torch.float32"),
    ],
)
def test_a_slice_whose_adapters_do_not_fit_cannot_be_made(start, stop, row, message):
    with pytest.raises(ValueError, match=message):
        LoraSlice(start, stop, [None, row])
