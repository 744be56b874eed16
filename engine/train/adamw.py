"""The arithmetic of AdamW on one piece of a group, with 32-bit or block-wise 8-bit moments.

Source   AdamW, arXiv:1711.05101, in the order of operations of torch.optim.AdamW; 8-bit moments,
         arXiv:2110.02861: blocks of 256 values, each with its largest magnitude in float32 and one
         byte per value, an index into the signed (first moment) or unsigned (second) dynamic map.
State    exp_avg, exp_avg_sq: float32 [n]; or uint8 [n] with exp_avg_absmax, exp_avg_sq_absmax
         float32 [ceil(n / 256)].
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.codebooks import DYNAMIC_MAP, UNSIGNED_DYNAMIC_MAP

BLOCK = 256
MOMENTS = {"exp_avg": DYNAMIC_MAP, "exp_avg_sq": UNSIGNED_DYNAMIC_MAP}
"""What the codes of each moment stand for."""


@dataclass(frozen=True, slots=True)
class AdamWSettings:
    """What is the same in every update."""

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float


def zeros_32bit(numel: int, device: torch.device, *, pin_memory: bool) -> dict[str, Tensor]:
    """State of `numel` parameters before the first update."""
    return {name: torch.zeros(numel, device=device, pin_memory=pin_memory) for name in MOMENTS}


def zeros_8bit(numel: int, device: torch.device, *, pin_memory: bool) -> dict[str, Tensor]:
    """State of `numel` parameters before the first update; every absmax is 0, so that a code's
    value does not matter.
    """
    num_blocks = -(-numel // BLOCK)
    state = {}
    for name in MOMENTS:
        state[name] = torch.zeros(numel, dtype=torch.uint8, device=device, pin_memory=pin_memory)
        absmax = torch.zeros(num_blocks, device=device, pin_memory=pin_memory)
        state[f"{name}_absmax"] = absmax
    return state


def update_32bit(
    master: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    *,
    learning_rate: float,
    grad_scale: float,
    num_updates: int,
    settings: AdamWSettings,
) -> None:
    """Update in place; nothing is changed before the one allocation has succeeded.

    Args:
        master:        float32 [n], the parameters.
        grad:          float32 [n]; changed.
        state:         of these parameters.
        learning_rate: of this step.
        grad_scale:    multiplies grad.
        num_updates:   this one included.
        settings:      betas, epsilon, weight decay.
    """
    denominator = torch.empty_like(master)
    if grad_scale != 1.0:
        grad.mul_(grad_scale)
    _adamw(master, grad, state["exp_avg"], state["exp_avg_sq"], denominator, learning_rate,
           num_updates, settings)  # fmt: skip


def update_8bit(
    master: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    *,
    learning_rate: float,
    grad_scale: float,
    num_updates: int,
    settings: AdamWSettings,
) -> None:
    """The same with 8-bit state; everything is computed before anything is changed."""
    tables = {name: _tables(name, master.device) for name in MOMENTS}
    moments = {
        name: _decode(state[name], state[f"{name}_absmax"], tables[name]) for name in MOMENTS
    }
    new_master = master.clone()
    _adamw(new_master, grad * grad_scale, moments["exp_avg"], moments["exp_avg_sq"],
           torch.empty_like(master), learning_rate, num_updates, settings)  # fmt: skip
    encoded = {name: _encode(moments[name], tables[name]) for name in MOMENTS}
    # Rounded to zero, a second moment would leave the update of its first one unbounded.
    encoded["exp_avg_sq"][0].clamp_min_((moments["exp_avg_sq"] > 0).to(torch.uint8))
    for name, (codes, absmax) in encoded.items():
        state[name].copy_(codes)
        state[f"{name}_absmax"].copy_(absmax)
    master.copy_(new_master)


def _adamw(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    denominator: Tensor,
    learning_rate: float,
    num_updates: int,
    settings: AdamWSettings,
) -> None:
    """The update itself, all tensors float32 [n]; master and the moments change in place."""
    master.mul_(1 - learning_rate * settings.weight_decay)
    exp_avg.lerp_(grad, 1 - settings.beta1)
    exp_avg_sq.mul_(settings.beta2).addcmul_(grad, grad, value=1 - settings.beta2)
    correction1 = 1 - settings.beta1**num_updates
    correction2 = math.sqrt(1 - settings.beta2**num_updates)
    torch.sqrt(exp_avg_sq, out=denominator).div_(correction2).add_(settings.epsilon)
    master.addcdiv_(exp_avg, denominator, value=-learning_rate / correction1)


@dataclass(frozen=True, slots=True, eq=False)
class _Tables:
    """How one moment's codes are read and found."""

    values: Tensor
    """float32 [256], sorted: what a code stands for."""
    midpoints: Tensor
    """float32 [256]: code i is nearest up to midpoint i; the last is infinite."""
    first_codes: Tensor
    """uint8 [65536]: by a float's upper 16 bits, the nearest code of the smallest such float. The
    largest one's is the same or the next: no two midpoints share their upper 16 bits."""


@functools.cache
def _tables(name: str, device: torch.device) -> _Tables:
    """Searching 256 values for each parameter takes ten times as long as all else together."""
    values = MOMENTS[name]
    midpoints = (values[:-1] + values[1:]) / 2
    upper = torch.arange(65536, dtype=torch.int32) << 16  # wraps for negative floats, as it should
    smallest = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32)
    first_codes = torch.bucketize(smallest.nan_to_num(), midpoints).to(torch.uint8)
    infinity = torch.tensor([torch.inf])
    return _Tables(
        values.to(device), torch.cat([midpoints, infinity]).to(device), first_codes.to(device)
    )


def _decode(codes: Tensor, absmax: Tensor, tables: _Tables) -> Tensor:
    """float32 [n] of codes uint8 [n] and absmax float32 [ceil(n / BLOCK)]."""
    decoded = tables.values.index_select(0, codes.int())
    blocks = pad(decoded, (0, -codes.numel() % BLOCK)).view(-1, BLOCK)
    return blocks.mul_(absmax[:, None]).flatten()[: codes.numel()]


def _encode(moment: Tensor, tables: _Tables) -> tuple[Tensor, Tensor]:
    """(codes uint8 [n], absmax float32 [ceil(n / BLOCK)]): the nearest value of the map."""
    blocks = pad(moment, (0, -moment.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)  # [num_blocks]
    scaled = blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    scaled = scaled.flatten()[: moment.numel()]
    upper = (scaled.view(torch.int32) >> 16) & 0xFFFF
    codes = tables.first_codes.index_select(0, upper)
    codes += scaled > tables.midpoints.index_select(0, codes.int())
    return codes, absmax
