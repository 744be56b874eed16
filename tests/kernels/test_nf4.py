import dataclasses
import platform

import bitsandbytes.functional as bnb
import pytest
import torch

from kernels import nf4
from kernels.codebooks import DYNAMIC_MAP, NF4_CODEBOOK, codebook
from kernels.nf4 import (
    GROUP_SIZES,
    QuantizedWeight,
    decode_absmax,
    dequantize_4bit,
    quantize_4bit,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {
    "random": randn(128, 192) * 0.02,
    "many blocks of scales": randn(300, 256) * 0.02,
    "constant": torch.full((64, 64), 0.3),
    "all zero": torch.zeros(64, 64),
    "zero in places": randn(64, 64) * (torch.arange(64) < 32)[:, None],
    "odd number of elements": randn(33, 37),
    "zero in a partial last group": torch.zeros(3, 37),
    "one element": randn(1, 1),
    "rows of 80": randn(50, 80),
    "huge": randn(64, 128) * 1e30,
    "tiny": randn(64, 128) * 1e-30,
    "denormal": randn(64, 128) * 1e-40,
    "one outlier": randn(64, 64) * 0.01 + 50.0 * (torch.arange(4096) == 77).view(64, 64),
}


def assert_same_scale_codes(ours: torch.Tensor, bitsandbytes: torch.Tensor) -> None:
    """Equal; elsewhere than on x86-64, where compilers may fuse the multiplication and the addition
    that find the grid point, one code in a thousand may be a neighbour."""
    if platform.machine() == "x86_64":
        assert torch.equal(ours, bitsandbytes)
    else:
        difference = (ours.int() - bitsandbytes.int()).abs()
        assert difference.max().item() <= 1
        assert difference.sum().item() <= 1 + len(ours) // 1000


def plain_formula(weight: QuantizedWeight) -> torch.Tensor:
    """Dequantise element by element, in float32, straight from the definition of the format."""
    index = torch.arange(weight.numel)
    byte = weight.packed[index // 2].long()
    codes = torch.where(index % 2 == 0, byte >> 4, byte & 15)
    scales = weight.absmax
    if weight.nested_absmax is not None:
        group = torch.arange(weight.num_groups)
        scales = DYNAMIC_MAP[scales.long()] * weight.nested_absmax[group // 256]
        scales = scales + weight.nested_offset
    values = codebook(weight.quant_type)[codes] * scales[index // weight.group_size]
    return values.view(weight.shape)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, t) for n, w in WEIGHTS.items() for t in DTYPES if bool(w.to(t).isfinite().all())],
)
def test_every_byte_equals_bitsandbytes(name, dtype):
    weight = WEIGHTS[name].to(dtype)
    for quant_type in ("nf4", "fp4"):
        for group_size in (32, 64, 256, 4096):
            ours = quantize_4bit(weight, quant_type=quant_type, group_size=group_size)
            packed, state = bnb.quantize_4bit(
                weight, blocksize=group_size, compress_statistics=True, quant_type=quant_type
            )
            assert torch.equal(ours.packed, packed.view(-1))
            assert_same_scale_codes(ours.absmax, state.absmax)
            assert torch.equal(ours.nested_absmax, state.state2.absmax)
            assert torch.equal(ours.nested_offset, state.offset)
            assert torch.equal(DYNAMIC_MAP, state.state2.code)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_codes_and_scales_equal_bitsandbytes_without_double_quantisation(name, group_size):
    weight = WEIGHTS[name]
    ours = quantize_4bit(weight, group_size=group_size, double_quant=False)
    packed, state = bnb.quantize_4bit(weight, blocksize=group_size, quant_type="nf4")
    assert torch.equal(ours.packed, packed.view(-1))
    assert torch.equal(ours.absmax, state.absmax)
    assert ours.nested_absmax is None
    assert ours.nested_offset is None


def test_8_bit_codes_of_a_hundred_thousand_scales_equal_bitsandbytes():
    scales = randn(100_000).abs() * 0.05
    centred = scales - scales.mean()
    codes, nested_absmax = nf4._quantize_scales(centred)
    expected, state = bnb.quantize_blockwise(centred, blocksize=256)
    assert_same_scale_codes(codes, expected)
    assert torch.equal(nested_absmax, state.absmax)


def test_8_bit_codes_are_nearest_save_within_the_grid_of_a_midpoint():
    centred = randn(50_000, seed=1)
    codes, nested_absmax = nf4._quantize_scales(centred)
    normalised = centred / nested_absmax.repeat_interleave(256)[: len(centred)]
    error = (DYNAMIC_MAP[codes.long()] - normalised).abs()
    nearest = (DYNAMIC_MAP - normalised[:, None]).abs().amin(dim=1)
    assert (error - nearest).max().item() <= 2 * 1.6e-5  # half a grid step on either side


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_chunks_do_not_show_in_the_result(quant_type, monkeypatch):
    weight = randn(131, 257)
    whole = quantize_4bit(weight, quant_type=quant_type)
    monkeypatch.setattr(nf4, "CHUNK", 4096)
    chunked = quantize_4bit(weight, quant_type=quant_type)
    for field in ("packed", "absmax", "nested_absmax", "nested_offset"):
        assert torch.equal(getattr(chunked, field), getattr(whole, field))
    expanded = dequantize_4bit(chunked)
    monkeypatch.undo()
    assert torch.equal(expanded, dequantize_4bit(whole))


def test_a_weight_that_is_not_contiguous_or_requires_grad_is_quantised_like_its_copy():
    weight = randn(96, 64).t().requires_grad_()
    assert torch.equal(quantize_4bit(weight).packed, quantize_4bit(weight.detach().clone()).packed)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 36 * 37 + 36])  # in a full group and in the partial last one
def test_a_weight_that_is_not_finite_is_refused(bad, place):
    weight = randn(37, 37)
    weight.view(-1)[place] = bad
    with pytest.raises(ValueError, match="weight: expected finite numbers"):
        quantize_4bit(weight)


def test_scales_whose_mean_overflows_are_refused_with_double_quantisation_only():
    weight = torch.full((64, 64), 3e38)
    with pytest.raises(ValueError, match="double_quant=False"):
        quantize_4bit(weight)
    assert torch.equal(dequantize_4bit(quantize_4bit(weight, double_quant=False)), weight)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.zeros(64), {}, "weight.shape"),
        (torch.zeros(0, 64), {}, "weight.shape"),
        (torch.zeros(2, 64, dtype=torch.float64), {}, "weight.dtype"),
        (torch.zeros(2, 64, dtype=torch.int8), {}, "weight.dtype"),
        (torch.zeros(2, 64), {"group_size": 48}, "group_size"),
        (torch.zeros(2, 64), {"group_size": 16}, "group_size"),
        (torch.zeros(2, 64), {"quant_type": "int4"}, "quant_type"),
    ],
)
def test_wrong_arguments_of_quantise_are_named(weight, options, message):
    with pytest.raises(ValueError, match=message):
        quantize_4bit(weight, **options)


def test_the_high_nibble_is_the_first_element():
    weight = QuantizedWeight(
        packed=torch.full((32,), 0xF0, dtype=torch.uint8),  # codes 15, 0, 15, 0, ...
        absmax=torch.tensor([2.0]), shape=(1, 64), dtype=torch.float32,
    )  # fmt: skip
    values = dequantize_4bit(weight)
    assert values[0, 0].item() == 2.0 * NF4_CODEBOOK[15].item()
    assert values[0, 1].item() == 2.0 * NF4_CODEBOOK[0].item()


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantising_equals_the_plain_formula_rounded_once(name, double_quant, quant_type):
    for group_size in (32, 64, 1024):
        weight = quantize_4bit(
            WEIGHTS[name], quant_type=quant_type, group_size=group_size, double_quant=double_quant
        )
        expected = plain_formula(weight)
        for dtype in DTYPES:
            actual = dequantize_4bit(weight, dtype)
            assert torch.equal(actual, expected.to(dtype))


@pytest.mark.parametrize("shape", [(128, 192), (64, 64), (32, 1024)])  # widths it gets right
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_dequantising_equals_bitsandbytes_where_rows_hold_whole_groups(shape, dtype, double_quant):
    for quant_type in ("nf4", "fp4"):
        weight = (randn(*shape) * 0.02).to(dtype)
        packed, state = bnb.quantize_4bit(
            weight, blocksize=64, compress_statistics=double_quant, quant_type=quant_type
        )
        ours = quantize_4bit(weight, quant_type=quant_type, double_quant=double_quant)
        assert torch.equal(dequantize_4bit(ours), bnb.dequantize_4bit(packed, state))


def test_the_default_dtype_is_the_original_weights():
    assert dequantize_4bit(quantize_4bit(randn(4, 64).half())).dtype == torch.float16


def test_groups_that_straddle_rows_use_the_scale_of_their_first_element_on():
    weight = torch.ones(2, 96)
    weight[1] = 3.0  # group 1 spans the end of row 0 and the beginning of row 1: absmax 3
    quantised = quantize_4bit(weight, double_quant=False)
    assert quantised.absmax.tolist() == [1.0, 3.0, 3.0]
    third = 3.0 * NF4_CODEBOOK[11].item()  # 1/3 is nearest to 0.3379
    values = dequantize_4bit(quantised)
    assert values[0, :64].tolist() == [1.0] * 64
    assert values[0, 64:].tolist() == pytest.approx([third] * 32)
    assert values[1].tolist() == [3.0] * 96


def test_double_quantisation_keeps_the_scales_within_a_percent():
    weight = randn(256, 512) * 0.02
    exact = decode_absmax(quantize_4bit(weight, double_quant=False))
    coded = decode_absmax(quantize_4bit(weight))
    assert ((coded - exact).abs() / exact).max().item() < 0.01


def test_a_double_quantised_nf4_weight_takes_4_127_bits():
    weight = quantize_4bit(randn(512, 1024))
    assert weight.num_bytes * 8 / weight.numel == pytest.approx(4.127, abs=1e-3)


def test_dequantising_to_an_integer_type_is_refused():
    with pytest.raises(ValueError, match="dtype: expected"):
        dequantize_4bit(quantize_4bit(randn(2, 64)), torch.int8)


def test_moving_a_weight_keeps_every_field():
    for double_quant in (True, False):
        weight = quantize_4bit(randn(8, 64), quant_type="fp4", double_quant=double_quant)
        moved = weight.to("cpu")
        assert moved.shape == weight.shape
        assert (moved.quant_type, moved.dtype, moved.group_size) == ("fp4", torch.float32, 64)
        assert torch.equal(dequantize_4bit(moved), dequantize_4bit(weight))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packed": torch.zeros(127, dtype=torch.uint8)}, r"packed.shape: expected \(128,\)"),
        ({"packed": torch.zeros(128, dtype=torch.int8)}, "packed.dtype: expected torch.uint8"),
        ({"packed": torch.zeros(256, dtype=torch.uint8)[::2]}, "packed.stride"),
        ({"absmax": torch.zeros(3, dtype=torch.uint8)}, r"absmax.shape: expected \(4,\)"),
        ({"absmax": torch.zeros(4)}, "absmax.dtype: expected torch.uint8"),
        ({"nested_absmax": torch.zeros(2)}, r"nested_absmax.shape: expected \(1,\)"),
        ({"nested_offset": torch.zeros(1)}, r"nested_offset.shape: expected \(\)"),
        ({"nested_offset": None}, "nested_absmax and nested_offset: expected both or neither"),
        ({"nested_absmax": None, "nested_offset": None}, "absmax.dtype: expected torch.float32"),
        ({"shape": (4, 65)}, "packed.shape"),
        ({"shape": (256,)}, "shape: expected"),
        ({"dtype": torch.int8}, "dtype: expected"),
        ({"group_size": 63}, "group_size: expected"),
        ({"quant_type": "nf3"}, "quant_type: expected"),
    ],
)
def test_a_weight_whose_fields_disagree_cannot_be_made(changes, message):
    weight = quantize_4bit(randn(4, 64))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(weight, **changes)
