import pytest
import torch

from kernels.codebooks import NF4_CODEBOOK
from kernels.gpu import codec
from kernels.nf4 import dequantize_4bit_reference, quantize_4bit, quantize_groups_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (7, 37), (16, 48), (33, 80), (8, 512), (3, 1365)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantising_gives_the_reference_s_bits(dtype, quant_type, double_quant, shape, device):
    weight = quantize_4bit(randn(*shape), quant_type=quant_type, double_quant=double_quant)
    expected = dequantize_4bit_reference(weight, dtype)
    actual = codec.dequantize(weight.to(device), dtype)
    if dtype == torch.bfloat16 and device.type == "cpu":  # the interpreter truncates
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=0)
    else:
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("group_size", [32, 256, 4096])
def test_dequantising_other_groups(group_size, device):
    weight = quantize_4bit(randn(9, 1111), group_size=group_size)
    actual = codec.dequantize(weight.to(device), torch.float32)
    assert_same_bits(actual, dequantize_4bit_reference(weight, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantising_gives_the_reference_s_bytes(dtype, quant_type, shape, device):
    weight = randn(*shape, seed=1).to(dtype)
    expected = quantize_groups_reference(weight, quant_type, 64)
    actual = codec.quantize_groups(weight.to(device), quant_type, 64)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("group_size", [32, 128, 4096])
def test_quantising_other_groups(group_size, device):
    weight = randn(5, 2000, seed=1)
    actual = codec.quantize_groups(weight.to(device), "nf4", group_size)
    expected = quantize_groups_reference(weight, "nf4", group_size)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same_bits(ours, theirs)


def test_quantising_values_on_every_midpoint_and_its_neighbours(device):
    values = NF4_CODEBOOK.sort().values
    midpoints = (values[:-1] + values[1:]) / 2
    infinity = torch.tensor(torch.inf)
    near = [midpoints, midpoints.nextafter(infinity), midpoints.nextafter(-infinity)]
    weight = torch.cat([torch.ones(1), *near, torch.zeros(18)]).view(1, 64)
    actual = codec.quantize_groups(weight.to(device), "nf4", 64)
    for ours, theirs in zip(actual, quantize_groups_reference(weight, "nf4", 64), strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_group_that_is_not_finite_has_a_scale_that_is_not(bad, device):
    weight = randn(4, 64)
    weight[2, 17] = bad
    _, absmax = codec.quantize_groups(weight.to(device), "nf4", 64)
    assert absmax.isfinite().tolist() == [True, True, False, True]


def test_groups_of_zeros_and_of_tiny_numbers(device):
    weight = torch.zeros(3, 100)
    weight[1] = 1e-40
    weight[2, :64] = 1e-30
    actual = codec.quantize_groups(weight.to(device), "nf4", 64)
    for ours, theirs in zip(actual, quantize_groups_reference(weight, "nf4", 64), strict=True):
        assert_same_bits(ours, theirs)
