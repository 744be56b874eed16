"""Host side of the decode kernel: what it takes, and its launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.dispatch import batch_invariant
from kernels.gpu import device as gpu
from kernels.gpu.decode_kernel import STEP, decode_kernel
from kernels.gpu.pair_table import device_table
from kernels.nf4 import QuantizedWeight

MAX_SLICES = 3
ALIGNMENT = 16


def accepts(x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> bool:
    """Whether the decode kernel can take these arguments of nf4_linear."""
    if not gpu.runs_here(x, *(w.packed for w in weights), *biases) or len(weights) > MAX_SLICES:
        return False
    plan, first = gpu.decode_plan(x.device), weights[0]
    if plan is None or (x.dtype == torch.float32 and not gpu.interpreting()):
        return False
    numel = sum(weight.numel for weight in weights)
    few = len(x) <= gpu.max_decode_tokens(plan, numel) or batch_invariant()
    kind = first.quant_type, first.nested_absmax is None
    return few and all(
        w.group_size == 64
        and w.shape[1] % STEP == 0
        and (w.quant_type, w.nested_absmax is None) == kind
        and w.packed.data_ptr() % ALIGNMENT == w.absmax.data_ptr() % ALIGNMENT == 0
        for w in weights
    )


def run(x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> Tensor:
    """nf4_linear for arguments that were accepted."""
    return launch(x, weights, biases)


def launch(
    x: Tensor,
    weights: Sequence[QuantizedWeight],
    biases: Sequence[Tensor | None],
    *,
    residual: Tensor | None = None,
    silu: bool = False,
    plan: gpu.DecodePlan | None = None,
) -> Tensor:
    """Multiply tokens with the slices of a fused projection.

    Args:
        x, weights, biases: as nf4_linear's.
        residual: x's dtype [num_tokens, sum(out_i)], added to the rounded product.
        silu:     two weights of one shape: return SiLU of the first's product times the second's.
        plan:     instead of the device's.

    Returns:
        x's dtype [num_tokens, sum(out_i)], or [num_tokens, out] with silu.
    """
    plan = plan or gpu.decode_plan(x.device)
    assert plan is not None
    num_tokens, row_size = x.shape
    widths = [weight.shape[0] for weight in weights]
    assert not silu or (len(widths) == 2 and widths[0] == widths[1] and residual is None)
    tile_rows = plan.rows // 2 if silu else plan.rows
    tiles = sum(-(-width // tile_rows) for width in (widths[:1] if silu else widths))
    out = x.new_empty(num_tokens, widths[0] if silu else sum(widths))
    if num_tokens == 0:
        return out
    x = x.contiguous()
    tokens = 8 if num_tokens <= 8 else 16 if num_tokens <= 16 else 32
    total_steps = tiles * (row_size // STEP)
    programs = min(plan.programs_per_sm * gpu.num_processors(x.device), total_steps)
    token_tiles = -(-num_tokens // tokens)
    workspace = torch.empty(
        token_tiles * programs * 2 * tokens * plan.rows, dtype=torch.float32, device=x.device
    )
    has_bias = any(bias is not None for bias in biases)
    if has_bias:
        biases = [
            x.new_zeros(width) if bias is None else bias
            for width, bias in zip(widths, biases, strict=True)
        ]
    is_double = weights[0].nested_absmax is not None
    arguments: list[Tensor | int] = []
    for i in range(MAX_SLICES):
        weight = weights[min(i, len(weights) - 1)]
        bias = biases[min(i, len(weights) - 1)]
        arguments += [
            weight.packed,
            weight.absmax,
            weight.absmax if weight.nested_absmax is None else weight.nested_absmax,
            weight.absmax if weight.nested_offset is None else weight.nested_offset,
            x if bias is None else bias,
            weight.shape[0],
        ]
    decode_kernel[(programs, token_tiles)](
        x, out, workspace, gpu.counters(x.device, token_tiles * tiles),
        device_table(weights[0].quant_type, x.dtype, x.device), *arguments,
        x if residual is None else residual.contiguous(),
        num_tokens, row_size, total_steps, out.shape[1],
        NUM_SLICES=len(weights), TOKENS=tokens, ROWS=plan.rows,
        DOUBLE_QUANT=is_double, HAS_BIAS=has_bias, HAS_RESIDUAL=residual is not None,
        SILU=silu, ASM=not gpu.interpreting(), NUM_WARPS=plan.num_warps,
        num_warps=plan.num_warps, num_stages=plan.num_stages - (tokens > 8),
    )  # fmt: skip
    return out
