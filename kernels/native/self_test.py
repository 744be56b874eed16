"""Each native operation on a small random case, against its reference, before it may be used.

A compiler's bug or a processor's should cost speed, not answers. Takes a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import (
    fused,
    int8_linear,
    layout,
    linear,
    lora,
    nf4,
    nf4_linear,
    paged_attention,
    truncation,
)

if TYPE_CHECKING:
    from kernels.native.operations import NativeOperations

DTYPE = torch.bfloat16
NOISE = 2**-6
"""Two bfloat16 roundings, of the largest value."""


def failing_operations(native: NativeOperations) -> list[str]:
    """Names of the operations that do not agree with their references."""
    return failing_cases({name: partial(agrees, native) for name, agrees in _CASES.items()})


def failing_cases(cases: Mapping[str, Callable[[torch.Generator], bool]]) -> list[str]:
    """Names of the cases that say no, or fail, given a generator with a fixed seed."""
    failing = []
    for name, agrees in cases.items():
        try:
            is_right = agrees(torch.Generator().manual_seed(0))
        except Exception:  # whatever it is, the reference is still there
            is_right = False
        if not is_right:
            failing.append(name)
    return failing


def random_values(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers: bfloat16 [*shape]."""
    return torch.randn(*shape, generator=generator).to(DTYPE)


def is_close(actual: Tensor, expected: Tensor) -> bool:
    """Whether two tensors of one shape differ by no more than NOISE."""
    difference = (actual.float() - expected.float()).abs().max()
    return bool(difference <= NOISE * expected.float().abs().max())


def _relayout(native: NativeOperations, generator: torch.Generator) -> bool:
    shape = (19, 128)
    packed = torch.randint(0, 256, (19 * 64,), dtype=torch.uint8, generator=generator)
    ours = native.relayout(packed, shape, "interleaved")
    return torch.equal(ours, layout.relayout_reference(packed, shape, "interleaved")) and (
        torch.equal(native.relayout(ours, shape, "stock"), packed)
    )


def _dequantize_4bit(native: NativeOperations, generator: torch.Generator) -> bool:
    weight = nf4.quantize_4bit(random_values(generator, 19, 128))
    ours = native.dequantize_4bit(native.prepare_weight(weight), DTYPE)
    return torch.equal(ours, nf4.dequantize_4bit_reference(weight, DTYPE))


def _nf4_linear(native: NativeOperations, generator: torch.Generator) -> bool:
    weight = nf4.quantize_4bit(random_values(generator, 19, 128))
    prepared = native.prepare_weight(weight)
    for num_tokens in (1, 5, 40):
        x = random_values(generator, num_tokens, 128)
        actual = native.nf4_linear(x, [prepared], [None])
        if not is_close(actual, nf4_linear.nf4_linear_reference(x, [weight], [None])):
            return False
    return True


def _linear(native: NativeOperations, generator: torch.Generator) -> bool:
    x, weight = random_values(generator, 5, 128), random_values(generator, 19, 128)
    return is_close(native.linear(x, weight, None), linear.linear_reference(x, weight, None))


def _int8_linear(native: NativeOperations, generator: torch.Generator) -> bool:
    x, weight = (
        random_values(generator, 5, 128),
        int8_linear.quantize_int8(random_values(generator, 19, 128)),
    )
    expected = int8_linear.int8_linear_reference(x, weight, None)
    return is_close(native.int8_linear(x, weight, None), expected)


def _rms_norm(native: NativeOperations, generator: torch.Generator) -> bool:
    x, weight = random_values(generator, 3, 72), random_values(generator, 72)
    return is_close(native.rms_norm(x, weight, 1e-5), fused.rms_norm_reference(x, weight, 1e-5))


def _add_rms_norm(native: NativeOperations, generator: torch.Generator) -> bool:
    args = (
        random_values(generator, 3, 72),
        random_values(generator, 3, 72),
        random_values(generator, 72),
        1e-5,
    )
    expected = fused.add_rms_norm_reference(*args)
    return all(map(is_close, native.add_rms_norm(*args), expected))


def _apply_rotary(native: NativeOperations, generator: torch.Generator) -> bool:
    q, k = random_values(generator, 3, 4, 32), random_values(generator, 3, 2, 32)
    angles = torch.randn(3, 16, generator=generator)
    args = q, k, angles.cos(), angles.sin()
    return all(map(is_close, native.apply_rotary(*args), fused.apply_rotary_reference(*args)))


def _silu_and_mul(native: NativeOperations, generator: torch.Generator) -> bool:
    x = random_values(generator, 3, 144)
    return is_close(native.silu_and_mul(x), fused.silu_and_mul_reference(x))


def _write_kv_cache(native: NativeOperations, generator: torch.Generator) -> bool:
    k, v = random_values(generator, 3, 2, 16), random_values(generator, 3, 2, 16)
    slots = torch.tensor([5, -1, 2])
    ours, expected = torch.zeros(2, 2, 4, 2, 16, dtype=DTYPE), torch.zeros(2, 2, 4, 2, 16).to(DTYPE)
    native.write_kv_cache(k, v, ours[0], ours[1], slots)
    paged_attention.write_kv_cache_reference(k, v, expected[0], expected[1], slots)
    return torch.equal(ours, expected)


def _paged_attention(native: NativeOperations, generator: torch.Generator) -> bool:
    q, cache = random_values(generator, 4, 4, 32), random_values(generator, 2 * 24, 4, 2, 32)
    tables = torch.randperm(24, generator=generator).int().view(2, 12)
    lens, bounds = torch.tensor([41, 7]).int(), torch.tensor([0, 1, 4]).int()
    args = q, cache[:24], cache[24:], tables, lens, bounds, 0.2, None
    expected = paged_attention.paged_attention_reference(*args)
    return is_close(native.paged_attention(*args), expected)


def _add_lora(native: NativeOperations, generator: torch.Generator) -> bool:
    y, x = random_values(generator, 4, 24), random_values(generator, 4, 128)
    rows = [(random_values(generator, 5, 128), random_values(generator, 5, 20).t()), None]
    indices, scales = torch.tensor([0, -1, 1, 0]).int(), torch.tensor([1.0, 1.0, 1.0, 0.5])
    expected = y.clone()
    slices = [lora.LoraSlice(4, 24, rows)]
    lora.add_lora_reference(expected, x, slices, indices, scales)
    native.add_lora(y, x, slices, indices, scales)
    return is_close(y, expected)


def _nucleus_floors(native: NativeOperations, generator: torch.Generator) -> bool:
    probs = torch.randn(3, 300, generator=generator).softmax(dim=-1)
    args = probs, torch.tensor([0.1, 0.9, 1.0])
    return torch.equal(native.nucleus_floors(*args), truncation.nucleus_floors_reference(*args))


_CASES: dict[str, Callable[[NativeOperations, torch.Generator], bool]] = {
    "relayout": _relayout,
    "dequantize_4bit": _dequantize_4bit,
    "nf4_linear": _nf4_linear,
    "linear": _linear,
    "int8_linear": _int8_linear,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "apply_rotary": _apply_rotary,
    "silu_and_mul": _silu_and_mul,
    "write_kv_cache": _write_kv_cache,
    "paged_attention": _paged_attention,
    "add_lora": _add_lora,
    "nucleus_floors": _nucleus_floors,
}
