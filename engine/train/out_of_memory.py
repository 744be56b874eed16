"""What the trainer does when memory runs out: smaller micro-batches, the same effective batch."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import torch

from engine.errors import NotEnoughMemory
from engine.train.batches import Sample, pack
from engine.train.run import Run, Slices

T = TypeVar("T")

MEMORY_MESSAGES = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
"""In a plain RuntimeError, they mean that memory ran out."""


def with_smaller_batches(
    run: Run, attempt: Callable[[int], Generator[None, None, T]], samples: Sequence[Sample]
) -> Slices[T]:
    """Repeat an attempt with half the tokens in a micro-batch whenever memory runs out.

    The smaller size stays in run.state.

    Args:
        run:     the job.
        attempt: called with the tokens of a micro-batch at most; undoes what it has done when it is
            begun anew.
        samples: what it runs.

    Raises:
        NotEnoughMemory: memory ran out with one sample in each micro-batch.
    """
    lengths = [sample.num_tokens for sample in samples]
    while True:
        max_tokens = run.state.micro_batch_tokens
        try:
            return (yield from attempt(max_tokens))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error)
        # Outside the except block: the error no longer holds the frames that hold the tensors.
        release_memory()
        plan = pack(lengths, max_tokens, packing=run.config.packing)
        if len(plan) == len(samples):
            raise NotEnoughMemory(
                f"Training ran out of memory with one sample at a time; the longest has "
                f"{max(lengths)} tokens. Leave the longest out, lower max_seq_len or rank, or give "
                f"the server less memory for its KV cache. ({reason})"
            )
        smaller = max(1, sum(lengths[index] for index in plan[0]) // 2)
        run.state = dataclasses.replace(run.state, micro_batch_tokens=smaller)
        yield run.note(
            "warn",
            f"Memory ran out with {max_tokens} tokens in a micro-batch; it has {smaller} from now "
            f"on. The batch of a step is as large as before.",
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that host or device memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_MESSAGES)


def release_memory() -> None:
    """Give back what is no longer used, so that serving finds it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
