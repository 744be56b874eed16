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
            torch.AcceleratorError: the device is lost.
        """
        try:
            return self._capture(run)
        except torch.AcceleratorError as error:
            torch.cuda.synchronize(self._device)  # raises where it was more than a recording
            raise RuntimeError(str(error)) from error

    def _capture(self, run: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream(self._device)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            run()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Meanwhile the thread that loads adapters may pin memory, which another mode would forbid.
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=self._memory_pool, capture_error_mode=mode):
            run()
        self._memory_pool = graph.pool()
        return graph.replay

    def memory_bytes(self) -> int:
        """Memory in use on the device, by whomever."""
        torch.cuda.empty_cache()
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        return total_bytes - free_bytes
