"""CUDA's graphs, as engine/decode_graphs.py wants them. All share one pool of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class CudaGraphBackend:
    """Recordings on one GPU; they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory_pool: Any = None

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record a function, after it has run once: that compiles kernels and sizes buffers.

        Raises:
            RuntimeError: something in it waits for the device.
        """
        current = torch.cuda.current_stream(self._device)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            run()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory_pool):
            run()
        self._memory_pool = graph.pool()
        return graph.replay

    def memory_bytes(self) -> int:
        """Memory in use on the device, by whomever."""
        torch.cuda.empty_cache()
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        return total_bytes - free_bytes
