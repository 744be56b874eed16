"""Random numbers that can be drawn again: a function of where they are used, not of a state."""

from __future__ import annotations

import hashlib

import torch


def noise_seed(*parts: int | str) -> int:
    """A seed for one place: (run's seed, step, micro-batch), then layer, module."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes 63 bits of any sign alike


def dropout_mask(
    shape: tuple[int, ...], dropout: float, seed: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """dtype [*shape]: 0 with probability dropout, else 1 / (1 - dropout)."""
    generator = torch.Generator(device).manual_seed(seed)
    mask = torch.empty(shape, dtype=dtype, device=device)
    return mask.bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
