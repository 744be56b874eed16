import bitsandbytes.functional as bnb
import pytest
import torch

from kernels.codebooks import (
    DYNAMIC_MAP,
    FP4_CODEBOOK,
    NF4_CODEBOOK,
    codebook,
    derive_dynamic_map,
    derive_nf4_codebook,
)


def test_nf4_is_derived_from_normal_quantiles_to_within_float32_noise():
    derived = torch.tensor(derive_nf4_codebook(), dtype=torch.float64)
    assert (derived - NF4_CODEBOOK.double()).abs().max().item() < 2e-7


def test_nf4_has_seven_negative_values_an_exact_zero_and_eight_positive_values():
    assert NF4_CODEBOOK[7].item() == 0.0
    assert NF4_CODEBOOK[0].item() == -1.0
    assert NF4_CODEBOOK[15].item() == 1.0
    assert bool((NF4_CODEBOOK.diff() > 0).all())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bit_codebooks_equal_the_published_tables_bit_for_bit(quant_type):
    published = bnb.get_4bit_type(quant_type, device="cpu")
    assert torch.equal(codebook(quant_type).view(torch.int32) & 0x7FFFFFFF,
                       published.view(torch.int32) & 0x7FFFFFFF)  # fmt: skip
    assert torch.equal(codebook(quant_type), published)  # so that only a zero's sign may differ


def test_fp4_codes_are_sign_and_magnitude():
    assert torch.equal(FP4_CODEBOOK[8:], -FP4_CODEBOOK[:8])


def test_the_dynamic_map_is_derived_bit_for_bit():
    derived = torch.tensor(derive_dynamic_map(), dtype=torch.float32)
    assert torch.equal(derived, bnb.create_dynamic_map(signed=True))
    assert torch.equal(derived, DYNAMIC_MAP)


def test_the_dynamic_map_has_256_values_and_no_minus_one():
    assert len(DYNAMIC_MAP) == len(DYNAMIC_MAP.unique()) == 256
    assert DYNAMIC_MAP.max().item() == 1.0
    assert DYNAMIC_MAP.min().item() == pytest.approx(-0.99296874)


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="quant_type: expected nf4 or fp4, got int4"):
        codebook("int4")
