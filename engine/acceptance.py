"""What the engine refuses before it runs, and how it names what fails while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from engine.api import GenerateRequest
from engine.errors import ContextLengthExceeded, EngineError, NotEnoughMemory, RequestError

T = TypeVar("T")

FATAL = (torch.AcceleratorError, KeyboardInterrupt, SystemExit)
"""After these nothing can be repeated. All else is a request's fault, even a panic in a native
library, which is a BaseException."""


def check_request(request: GenerateRequest, *, vocab_size: int, max_len: int) -> None:
    """Refuse what would break a batch or could never run.

    Args:
        request: as it came through the pipe.
        vocab_size: rows of the embedding; token ids are below it.
        max_len: longest prompt plus output that model and KV cache hold.

    Raises:
        RequestError: no prompt, an unknown token id, or a score asked of the base model.
        ContextLengthExceeded: the prompt leaves no room for a new token.
    """
    tokens = request.prompt_token_ids
    if not tokens:
        raise RequestError("The prompt is empty; at least one token is needed.", "prompt")
    if not 0 <= min(tokens) <= max(tokens) < vocab_size:
        bad = next(token for token in tokens if not 0 <= token < vocab_size)
        raise RequestError(
            f"The prompt holds token id {bad}; this model knows 0 to {vocab_size - 1}.", "prompt"
        )
    num_new_tokens = 0 if request.task == "score" else 1
    if len(tokens) + num_new_tokens > max_len:
        raise ContextLengthExceeded(len(tokens), request.params.max_tokens, max_len)
    if request.task == "score" and request.adapter is None:
        raise RequestError("The base model has no score head; name a reward adapter.", "model")


def as_engine_error(error: BaseException) -> EngineError:
    """Name whatever a forward pass or the sampler raised."""
    if isinstance(error, EngineError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return NotEnoughMemory(
            "The device ran out of memory on this request. Lower --gpu-memory-utilization or "
            "--max-num-batched-tokens so that activations fit."
        )
    return EngineError(f"The model failed on this request: {type(error).__name__}: {error}")


def attempt(run: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """What a call returns, or what it raises: the boundary of requests, of which only those at
    fault end. FATAL goes on."""
    try:
        return run(), None
    except FATAL:
        raise
    except BaseException as error:
        return None, error
