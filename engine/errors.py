"""Named errors of the engine, which knows no HTTP: server/errors.py maps them to status codes."""

from __future__ import annotations

from engine.api import ErrorInfo


class EngineError(Exception):
    """Base class; `code` is stable and machine-readable, the message is for people."""

    code = "engine_error"
    param: str | None = None

    def info(self) -> ErrorInfo:
        """The error as a message for the other process."""
        return ErrorInfo(code=self.code, message=str(self), param=self.param)


class RequestError(EngineError):
    """The request cannot be served as it is; the client must change it."""

    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthExceeded(RequestError):
    """The prompt leaves no room for a single new token."""

    code = "context_length_exceeded"

    def __init__(self, num_prompt_tokens: int, max_tokens: int, max_model_len: int) -> None:
        super().__init__(
            f"The prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}, "
            f"{num_prompt_tokens + max_tokens} in total, but this model holds {max_model_len}. "
            f"Shorten the prompt or lower max_tokens.",
            param="messages",
        )


class GrammarError(RequestError):
    """A schema, regular expression or grammar that cannot be compiled."""

    code = "invalid_grammar"


class CheckpointError(EngineError):
    """A model folder that cannot be loaded; the message names file, tensor and remedy."""

    code = "invalid_checkpoint"


class NotEnoughMemory(EngineError):
    """Computed before loading: what is needed and what there is."""

    code = "not_enough_memory"


class AdapterError(EngineError):
    """An adapter that cannot be served on this base; the message lists every problem found."""

    code = "invalid_adapter"


class AdapterNotFound(EngineError):
    """No adapter of that name is loaded."""

    code = "model_not_found"


class WorkerDied(EngineError):
    """The engine worker ended while the request was running; a new worker is being started."""

    code = "engine_restarting"
