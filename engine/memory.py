"""Memory, before it is taken: what a model's weights need and what the host and the device have."""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from engine.errors import NotEnoughMemory
from engine.model_config import ModelSpec
from kernels.nf4 import NESTED_BLOCK

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC_ROOT = Path("/proc")


def quantized_bytes(numel: int, *, double_quant: bool = True, group_size: int = 64) -> int:
    """Bytes of a 4-bit weight, codes and scales: 4.127 bits per element if double-quantised."""
    num_groups = -(-numel // group_size)
    scales = num_groups + 4 * -(-num_groups // NESTED_BLOCK) + 4 if double_quant else 4 * num_groups
    return -(-numel // 2) + scales


def estimate_weights_bytes(
    spec: ModelSpec,
    quantization: str,
    dtype: torch.dtype,
    *,
    quantized: Mapping[str, int] | None = None,
) -> int:
    """Bytes that the weights will take on the device.

    Args:
        spec: the model.
        quantization: nf4 or fp4: linear layers but the head in 4 bits; none: all dense.
        dtype: of everything that is not 4-bit.
        quantized: bytes of a 4-bit checkpoint's 4-bit weights by name, instead of those which
            quantising would make.
    """
    shapes = spec.tensor_shapes()
    if quantization == "none":
        quantized = {}
    elif quantized is None:
        names = spec.quantizable_weights()
        quantized = {name: quantized_bytes(math.prod(shapes[name])) for name in names}
    return sum(
        quantized.get(name, math.prod(shape) * dtype.itemsize) for name, shape in shapes.items()
    )


def available_host_bytes() -> int | None:
    """What can be taken without swapping, within all control groups; None where unknown."""
    limits = [_meminfo_available(), *_cgroup_available()]
    known = [limit for limit in limits if limit is not None]
    return max(0, min(known)) if known else None


def available_device_bytes(device: torch.device) -> int | None:
    """Free memory of a CUDA device; the host's for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_host_bytes()


def check_memory(
    what: str, needed_bytes: int, available_bytes: int | None, *, where: str, remedy: str
) -> None:
    """Refuse before anything is loaded.

    Raises:
        NotEnoughMemory: more is needed than there is. Where the latter is unknown nothing is
            refused.
    """
    if available_bytes is not None and needed_bytes > available_bytes:
        raise NotEnoughMemory(
            f"{what} needs {format_bytes(needed_bytes)} of {where}, but only "
            f"{format_bytes(available_bytes)} is available. {remedy}"
        )


def return_freed_memory() -> None:
    """Give the system back what has been freed; glibc keeps blocks below 32 MB, where it can."""
    with contextlib.suppress(
        OSError, AttributeError
    ):  # another C library needs or has no such call
        ctypes.CDLL(None).malloc_trim(0)


def format_bytes(count: int) -> str:
    """1234567 -> "1.2 MB" (powers of ten)."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _meminfo_available() -> int | None:
    text = _read(PROC_ROOT / "meminfo") or ""
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_available() -> list[int]:
    """What is left under each limit that applies to this process; page cache counts as free."""
    found = []
    for line in (_read(PROC_ROOT / "self" / "cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = CGROUP_ROOT, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = CGROUP_ROOT / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the process's group is often mounted as the root itself.
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            left = _group_available(group, *names)
            if left is not None:
                found.append(left)
            if group == root:
                break
    return found


def _group_available(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    limit, usage = _read(group / limit_name), _read(group / usage_name)
    if limit is None or usage is None or not limit.strip().isdigit():
        return None  # "max": no limit
    cache = 0
    for line in (_read(group / "memory.stat") or "").splitlines():
        key, _, value = line.partition(" ")
        if key == cache_name:
            cache = int(value)
    return int(limit) - int(usage) + cache


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
