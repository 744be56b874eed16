"""A short hash of a base's weights, so that an adapter trained on another base can be refused.

Cheap: scales in full, codes and dense tensors by samples from beginning, middle and end. Stable:
taken of the tensors as stored, so it depends neither on --dtype nor on the device, and a 16-bit
folder quantised at start has the fingerprint of its saved 4-bit copy.
"""

from __future__ import annotations

import hashlib

import torch

from kernels.nf4 import QuantizedWeight

SAMPLE_BYTES = 4096


class Fingerprint:
    """Collects tensors in any order; tensors are on the CPU."""

    def __init__(self) -> None:
        self._digests: dict[str, bytes] = {}

    def add(self, name: str, value: torch.Tensor | QuantizedWeight) -> None:
        """Take one tensor by its name in the model."""
        digest = hashlib.blake2b(digest_size=16)
        if isinstance(value, QuantizedWeight):
            digest.update(f"{value.quant_type} {value.group_size} {list(value.shape)}".encode())
            for scales in (value.absmax, value.nested_absmax, value.nested_offset):
                if scales is not None:
                    digest.update(_bytes_of(scales))
            _update_with_samples(digest, value.packed)
        else:
            digest.update(f"{value.dtype} {list(value.shape)}".encode())
            _update_with_samples(digest, value)
        self._digests[name] = digest.digest()

    def hexdigest(self) -> str:
        """32 hexadecimal digits for all tensors so far."""
        digest = hashlib.blake2b(digest_size=16)
        for name, value in sorted(self._digests.items()):
            digest.update(name.encode() + value)
        return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _update_with_samples(digest: hashlib.blake2b, tensor: torch.Tensor) -> None:
    data = _bytes_of(tensor)
    middle = max(0, (len(data) - SAMPLE_BYTES) // 2)
    for start in (0, middle, max(0, len(data) - SAMPLE_BYTES)):
        digest.update(data[start : start + SAMPLE_BYTES])
