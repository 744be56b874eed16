"""The values that codes stand for: NF4, FP4 and the 8-bit map of double-quantised scales.

Source  NF4: QLoRA, arXiv:2305.14314, section 3 and appendix E. The released table is made by
        derive_nf4_codebook, not by the paper's equation 4 to the letter.
        8-bit map: arXiv:2110.02861, section 1.3. (The QLoRA paper speaks of an 8-bit float; its
        implementation, bitsandbytes, and so every checkpoint uses this map.)
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from kernels.dispatch import check

QuantType = Literal["nf4", "fp4"]


def derive_nf4_codebook() -> list[float]:
    """NormalFloat: quantiles of N(0, 1), seven negative, zero, eight positive, scaled to [-1, 1].

    The outermost quantile is the mean of 1 - 1/30 and 1 - 1/32. Exact to double precision; the
    published table was made in float32 and differs by up to 2e-7.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    quantile = NormalDist().inv_cdf

    def half(count: int) -> list[float]:
        """Quantiles at `count` equal steps from the outermost towards the median, without it."""
        return [quantile(outermost + (0.5 - outermost) * i / count) for i in range(count)]

    values = sorted([*(-value for value in half(7)), 0.0, *half(8)])
    return [value / quantile(outermost) for value in values]


def derive_dynamic_map(*, is_signed: bool = True) -> list[float]:
    """The dynamic 8-bit map: 256 sorted values, denser for each decade towards 1.

    Decade i of seven has 2**i values of either sign, or 2**(i + 1) where all are positive: the
    midpoints of as many equal intervals of [0.1, 1] times 10**(i - 6). Zero and +1 complete the
    map; there is no -1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade if is_signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float32)
        midpoints = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += midpoints
        if is_signed:
            values += [-value for value in midpoints]
    return sorted(values)


NF4_CODEBOOK = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
     -0.28444138169288635, -0.18477343022833334, -0.09105003625154495, 0.0,
     0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    dtype=torch.float32,
)  # fmt: skip
"""float32 [16], the published numbers, which every checkpoint carries."""

FP4_CODEBOOK = torch.tensor(
    [0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3], dtype=torch.float32
).div_(12)
"""float32 [16], in order of the bit pattern: sign, two bits of exponent, one of fraction."""

DYNAMIC_MAP = torch.tensor(derive_dynamic_map(), dtype=torch.float32)
"""float32 [256], sorted; what the 8-bit code of a scale stands for."""

UNSIGNED_DYNAMIC_MAP = torch.tensor(derive_dynamic_map(is_signed=False), dtype=torch.float32)
"""float32 [256], sorted; for what is never negative, as the second moments of an optimizer."""


def codebook(quant_type: QuantType) -> Tensor:
    """The values of a 4-bit type, indexed by code: float32 [16], on the CPU.

    Raises:
        ValueError: the type is neither nf4 nor fp4.
    """
    check(quant_type in ("nf4", "fp4"), "quant_type", "nf4 or fp4", quant_type)
    return NF4_CODEBOOK if quant_type == "nf4" else FP4_CODEBOOK
