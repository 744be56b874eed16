"""Random numbers that can be drawn again: a function of where they are used, not of a state."""

from __future__ import annotations

import hashlib

import torch


def noise_seed(*parts: int | str) -> int:
    """A seed for one place: (run's seed, step, micro-batch), then layer and module."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes 63 bits on every device


def dropout_mask(x: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """x's shape, dtype and device: 0 with probability dropout, which is rounded to
    1 / 65536, else 1 / (1 - dropout).
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    # 16 bits for each element, drawn four at a time: a CPU's generator is slow.
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()]
    is_kept = bits.view(x.shape) >= round(dropout * 2**16) - 2**15
    return is_kept.to(x.dtype).div_(1 - dropout)


def uniform_noise(x: torch.Tensor, scales: torch.Tensor, seed: int) -> torch.Tensor:
    """x's shape and dtype: uniform between -scale and scale, one scale for each row of x."""
    generator = torch.Generator(x.device).manual_seed(seed)
    noise = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    noise.uniform_(-1, 1, generator=generator)
    return noise.mul_(scales[:, None]).to(x.dtype)
