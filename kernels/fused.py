"""The small operations between matrix products: norm, rotary embedding, SiLU times up.

The numbers are transformers', rounding step for rounding step. Each row is computed for itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dispatch import check, dispatch


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide each row by its root mean square, then multiply it by weight.

    Args:
        x:      [..., size]; normalised in float32, rounded to its dtype before weight comes in.
        weight: x's dtype [size].
        eps:    added to the mean square.

    Returns:
        x's shape and dtype.

    Raises:
        ValueError: sizes or dtypes disagree.
    """
    _check_norm_weight(weight, x)
    return dispatch("rms_norm", rms_norm_reference, x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm in plain PyTorch."""
    x32 = x.float()
    mean_square = x32.pow(2).mean(-1, keepdim=True)
    return weight * (x32 * torch.rsqrt(mean_square + eps)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add x to the residual stream and normalise the sum.

    Args:
        x, residual: [num_tokens, size], one dtype.
        weight, eps: as in rms_norm.

    Returns:
        (the normalised sum, the sum).

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    check(residual.shape == x.shape, "residual.shape", tuple(x.shape), tuple(residual.shape))
    check(residual.dtype == x.dtype, "residual.dtype", x.dtype, residual.dtype)
    _check_norm_weight(weight, x)
    return dispatch("add_rms_norm", add_rms_norm_reference, x, residual, weight, eps)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """add_rms_norm in plain PyTorch."""
    residual = residual + x
    return rms_norm_reference(residual, weight, eps), residual


def _check_norm_weight(weight: Tensor, x: Tensor) -> None:
    check(weight.shape == x.shape[-1:], "weight.shape", tuple(x.shape[-1:]), tuple(weight.shape))
    check(weight.dtype == x.dtype, "weight.dtype", x.dtype, weight.dtype)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions; element i pairs with i + head_dim / 2.

    Args:
        q:        [num_tokens, num_heads, head_dim].
        k:        [num_tokens, num_kv_heads, head_dim], q's dtype.
        cos, sin: [num_tokens, head_dim / 2], float32; rounded to q's dtype, then all is in it.

    Returns:
        The rotated q and k, new tensors.

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    num_tokens, _, head_dim = q.shape
    half = (num_tokens, head_dim // 2)
    check(head_dim % 2 == 0, "head_dim", "an even number", head_dim)
    check(k.shape[::2] == q.shape[::2], "k.shape[::2]", (num_tokens, head_dim), tuple(k.shape[::2]))
    check(k.dtype == q.dtype, "k.dtype", q.dtype, k.dtype)
    check(cos.shape == half, "cos.shape", half, tuple(cos.shape))
    check(sin.shape == half, "sin.shape", half, tuple(sin.shape))
    return dispatch("apply_rotary", apply_rotary_reference, q, k, cos, sin)


def apply_rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """apply_rotary in plain PyTorch."""
    cos, sin = cos.to(q.dtype)[:, None], sin.to(q.dtype)[:, None]  # [num_tokens, 1, head_dim / 2]
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SiLU of the first half of each row times the second half.

    Args:
        gate_up: [num_tokens, 2 * size].

    Returns:
        gate_up's dtype [num_tokens, size].

    Raises:
        ValueError: rows of odd length.
    """
    check(gate_up.shape[-1] % 2 == 0, "gate_up.shape[-1]", "an even number", gate_up.shape[-1])
    return dispatch("silu_and_mul", silu_and_mul_reference, gate_up)


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """silu_and_mul in plain PyTorch; SiLU is rounded to the dtype before the product.

    torch's float32 SiLU differs in the last bit at the ragged end of the stretch that each thread
    gets, so a token's result would depend on its place in the batch. Its exp has no such end, and
    the half types round the difference away.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if gate.dtype == torch.float32:
        return gate / (1.0 + torch.exp(-gate)) * up
    return functional.silu(gate) * up
