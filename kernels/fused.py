"""The small operations between the matrix products: norm, rotary embedding, SiLU times up. Numbers as in transformers."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import check, dispatch


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide each row by its root mean square, then multiply with weight.

    Args:
        x:      [..., size], any float dtype; the norm is taken in float32 and rounded to x's dtype before weight.
        weight: [size].

    Returns:
        x's shape.

    Raises:
        ValueError: the last dimensions differ.
    """
    check(x.shape[-1:] == weight.shape, "weight.shape", tuple(x.shape[-1:]), tuple(weight.shape))
    return dispatch("rms_norm", rms_norm_reference, x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm in plain PyTorch."""
    x32 = x.float()
    variance = x32.pow(2).mean(-1, keepdim=True)
    return weight * (x32 * torch.rsqrt(variance + eps)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add x to the residual stream, then normalise it: (rms_norm(residual + x), residual + x).

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    check(x.shape == residual.shape, "residual.shape", tuple(x.shape), tuple(residual.shape))
    check(x.dtype == residual.dtype, "residual.dtype", x.dtype, residual.dtype)
    check(x.shape[-1:] == weight.shape, "weight.shape", tuple(x.shape[-1:]), tuple(weight.shape))
    return dispatch("add_rms_norm", add_rms_norm_reference, x, residual, weight, eps)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """add_rms_norm in plain PyTorch."""
    residual = residual + x
    return rms_norm_reference(residual, weight, eps), residual


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions; element i pairs with i + head_dim / 2.

    Args:
        q:        [num_tokens, num_heads, head_dim].
        k:        [num_tokens, num_kv_heads, head_dim], q's dtype.
        cos, sin: float32 [num_tokens, head_dim / 2]; rounded to q's dtype, in which all is computed.

    Returns:
        New q and k.

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    half = (len(q), q.shape[-1] // 2)
    check(q.dim() == 3 and q.shape[-1] % 2 == 0, "q.shape", "(num_tokens, num_heads, even head_dim)", tuple(q.shape))
    check(k.dim() == 3 and k.shape[::2] == q.shape[::2], "k.shape", f"(num_tokens, num_kv_heads, head_dim) as q's {tuple(q.shape)}", tuple(k.shape))
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
    """SiLU of the first half of each row times the second half: [num_tokens, 2 * n] -> [num_tokens, n].

    Raises:
        ValueError: rows of odd length.
    """
    check(gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0, "gate_up.shape", "(num_tokens, an even number)", tuple(gate_up.shape))
    return dispatch("silu_and_mul", silu_and_mul_reference, gate_up)


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """silu_and_mul in plain PyTorch; each factor rounded to the dtype as transformers does."""
    gate, up = gate_up.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up
