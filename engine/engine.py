"""The synchronous heart: requests in, steps, deltas out. It starts no process and no thread.

Every accepted request ends in exactly one final delta: all ways out lead through `_finish`. A
forward pass that raises is repeated sequence by sequence, so that only who is at fault ends with an
error; a lost device is fatal and left to the worker.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

import torch

from engine.acceptance import as_engine_error, check_request
from engine.adapter_commands import AdapterCommands
from engine.api import (
    EngineStats,
    ErrorInfo,
    FinishReason,
    GenerateRequest,
    RequestDelta,
    StepOutput,
    TokenLogprobs,
)
from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.errors import AdapterError, EngineError, RequestError
from engine.grammar_queue import GrammarQueue
from engine.model_runner import Model, ModelRunner
from engine.sampler import NOT_REACHED
from engine.scheduler import Group, Scheduler
from engine.sequence import Sequence

if TYPE_CHECKING:
    from engine.grammar import GrammarCompiler
    from engine.lora_pool import LoraPool
    from engine.sampler import SampledToken, Sampler

logger = logging.getLogger(__name__)

FATAL = (torch.AcceleratorError, KeyboardInterrupt, SystemExit)
"""After these nothing can be repeated. All else is a request's fault, even a panic in a native
library, which is a BaseException."""


class Engine:
    """All requests of one worker. Not thread-safe: one thread calls everything."""

    def __init__(
        self,
        config: EngineConfig,
        runner: ModelRunner,
        sampler: Sampler,
        compiler: GrammarCompiler,
        lora_pool: LoraPool,
        *,
        num_blocks: int,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: Iterable[int],
    ) -> None:
        self.blocks = BlockManager(
            num_blocks,
            config.cache.block_size,
            enable_prefix_caching=config.cache.enable_prefix_caching,
        )
        self.scheduler = Scheduler(
            config.scheduler, self.blocks, lora_pool, num_rows=config.lora.max_loras
        )
        self.adapters = AdapterCommands(lora_pool, self.scheduler.pinned)
        self.make_room: Callable[[], bool] = lambda: False
        """Asked when a step finds no memory: has some been given back, so that it may be repeated?
        """
        self._runner = runner
        self._sampler = sampler
        self._pool = lora_pool
        self.max_len = min(max_model_len, num_blocks * config.cache.block_size)
        """Longest prompt plus output."""
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._sequences: dict[str, Sequence] = {}
        self._compiling = GrammarQueue(compiler)
        self._outbox: list[RequestDelta] = []
        self._num_arrivals = 0

    @property
    def model(self) -> Model:
        """What runs the steps; training reads the same tensors."""
        return self._runner.model

    # Requests.

    def add(self, request: GenerateRequest) -> None:
        """Accept a request; one that cannot be served ends with an error in the next deltas.

        Raises:
            ValueError: a request of that id is running; nothing is changed.
        """
        if request.request_id in self._sequences:
            raise ValueError(f"request_id: expected a new one, got {request.request_id!r} again")
        try:
            check_request(request, vocab_size=self._vocab_size, max_len=self.max_len)
        except RequestError as error:
            self._outbox.append(
                RequestDelta(
                    request_id=request.request_id, finish_reason="error", error=error.info()
                )
            )
            return
        self._num_arrivals += 1
        sequence = Sequence.from_request(
            request, self._num_arrivals, eos_token_ids=self._eos_token_ids, max_len=self.max_len
        )
        self._sequences[sequence.request_id] = sequence
        self.adapters.begin_use(request.adapter)
        grammar = request.params.grammar
        if grammar is None or request.task == "score":
            self.scheduler.add(sequence)
        else:
            self._compiling.add(sequence, grammar)

    def cancel(self, request_id: str) -> None:
        """Free a request at once, whatever its state; unknown and ended ones are ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._outbox.append(self._finish(sequence, "cancelled"))

    def cancel_all(self) -> None:
        """Cancel every request that lives."""
        for request_id in list(self._sequences):
            self.cancel(request_id)

    def has_work(self) -> bool:
        """Whether step() has, or soon will have, anything to do or to say."""
        return bool(self._sequences or self._outbox or self.adapters.has_work)

    @property
    def num_requests(self) -> int:
        """Those that have not ended."""
        return len(self._sequences)

    def step(self, group: Group = "all", max_num_tokens: int | None = None) -> StepOutput:
        """Run one step and tell what it added; with nothing to run, deliver what is pending.

        Args:
            group:          whose tokens to run.
            max_num_tokens: how many at most; None: as many as --max-num-batched-tokens says.
        """
        started_s = time.perf_counter()
        deltas, self._outbox = self._outbox, []
        self._pool.poll()
        for sequence, failure in self._compiling.take_done():
            if failure is None:
                self.scheduler.add(sequence)
            else:
                deltas.append(self._finish(sequence, "error", error=failure, is_queued=False))
        schedule = self.scheduler.schedule(group, max_num_tokens)
        for sequence, error in schedule.failed:
            deltas.append(self._finish(sequence, "error", error=error, is_queued=False))
        for sequence, _ in schedule.items:
            if sequence.first_scheduled_s is None:
                sequence.first_scheduled_s = started_s
                sequence.num_cached_tokens = sequence.num_computed_tokens
        if schedule.items:
            self._run(schedule.items, deltas)
        num_tokens = sum(num_new_tokens for _, num_new_tokens in schedule.items)
        return StepOutput(
            deltas=tuple(deltas), stats=self._stats(time.perf_counter() - started_s, num_tokens)
        )

    # Health.

    def check_integrity(self) -> None:
        """Raise AssertionError unless all books agree; for tests and idle moments."""
        self.scheduler.check_integrity()
        self._pool.check_integrity()
        sequences = self._sequences.values()
        compiling = set(self._compiling)
        queued = {*self.scheduler.waiting, *self.scheduler.running}
        assert set(sequences) == compiling | queued, "a sequence is lost"
        assert not compiling & queued, "a sequence runs without its grammar"
        self.adapters.check_integrity([s.adapter for s in sequences if s.adapter is not None])

    def close(self) -> None:
        """Stop the threads that load adapters and compile grammars."""
        self._pool.close()
        self._compiling.close()

    # One step.

    @torch.inference_mode()
    def _run(self, items: list[tuple[Sequence, int]], deltas: list[RequestDelta]) -> None:
        """Run and sample; after an error find out whose it is by running each sequence alone."""
        result = None
        try:
            result = self._runner.run(items)
            self._runner.prepare_next()
            tokens = self._sampler.sample(result.logits, result.sampled) if result.sampled else []
        except FATAL:
            raise
        except BaseException as error:  # a request's boundary: only those at fault end
            if isinstance(error, torch.OutOfMemoryError):
                error.__traceback__ = None  # its frames hold the step's activations
                has_more = self.make_room()
                torch.cuda.empty_cache()
                if has_more and result is None:
                    self._run(items, deltas)
                    return
            if len(items) == 1 and not items[0][0].draft_token_ids:
                if not isinstance(error, RequestError | AdapterError):
                    logger.exception("A forward pass failed.")
                deltas.append(self._finish_failed(items[0][0], as_engine_error(error)))
                return
            logger.warning("A step failed (%r); repeating it one sequence at a time.", error)
            for sequence, num_new_tokens in items:
                if result is not None and sequence.grammar is not None:
                    # The sampler may have moved this grammar on: it cannot choose that token again.
                    deltas.append(self._finish_failed(sequence, as_engine_error(error)))
                else:
                    num_drafts = len(sequence.draft_token_ids)  # they may be what is at fault
                    self.scheduler.drop_drafts(sequence)
                    self._run([(sequence, num_new_tokens - num_drafts)], deltas)
            return
        self.scheduler.complete(items)
        for sequence, entries in result.prompt_logprobs:
            sequence.prompt_logprobs += entries
        rows = zip(result.sampled, tokens, strict=True)
        for sequence, own_rows in groupby(rows, key=itemgetter(0)):
            deltas += self._advance(sequence, [token for _, token in own_rows])
        deltas += [self._finish(s, "stop", score=score) for s, score in result.scores]

    def _advance(self, sequence: Sequence, tokens: list[SampledToken]) -> list[RequestDelta]:
        """Append the tokens that a text comes to and say so, with the end where there is one.

        Args:
            sequence: its drafts are dropped.
            tokens: of its next position, and of those behind its drafts.
        """
        reached = [token for token in tokens if token is not NOT_REACHED]
        appended: list[SampledToken] = []
        reason: FinishReason | None = None
        is_stop_token = False
        for token in reached:
            if token.error is not None:
                break
            if appended:  # so the draft in front of this token was right
                self.scheduler.complete_tokens(sequence, 1)
            sequence.append(token.token_id)
            appended.append(token)
            reason, is_stop_token = _end(sequence, is_last=token is reached[-1])
            if reason is not None:
                break
        token_ids = tuple(token.token_id for token in appended)
        if sequence.draft_token_ids:
            self.scheduler.settle_drafts(sequence, token_ids)
        logprobs = None
        if sequence.params.logprobs is not None:
            logprobs = tuple(token.logprobs for token in appended if token.logprobs is not None)
        if reason is not None:
            stop_token_id = token_ids[-1] if is_stop_token else None
            final = self._finish(
                sequence,
                reason,
                token_ids=token_ids,
                logprobs=logprobs,
                stop_token_id=stop_token_id,
            )
            return [final]
        deltas = [self._delta(sequence, token_ids, logprobs)] if appended else []
        error = reached[-1].error
        if error is not None:
            deltas.append(self._finish_failed(sequence, error))
        return deltas

    def _finish_failed(self, sequence: Sequence, error: EngineError) -> RequestDelta:
        """End a sequence whose keys and values may be wrong: no later prompt may share them."""
        self.blocks.forget(sequence)
        return self._finish(sequence, "error", error=error)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] | None = None,
        stop_token_id: int | None = None,
        score: float | None = None,
        error: EngineError | None = None,
        is_queued: bool = True,
    ) -> RequestDelta:
        """The only way out: forget the sequence, free what it holds, return its final delta."""
        del self._sequences[sequence.request_id]
        if is_queued and not self._compiling.remove(sequence):
            self.scheduler.remove(sequence)
        self.adapters.end_use(sequence.adapter)
        return self._delta(
            sequence,
            token_ids,
            logprobs,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            score=score,
            error=error.info() if error is not None else None,
        )

    def _delta(
        self,
        sequence: Sequence,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...] | None,
        *,
        finish_reason: FinishReason | None = None,
        stop_token_id: int | None = None,
        score: float | None = None,
        error: ErrorInfo | None = None,
    ) -> RequestDelta:
        """A delta; the first of a sequence also tells how it got here."""
        prompt_logprobs = None
        num_cached_tokens, queued_s = 0, 0.0
        if not sequence.has_sent_delta:
            first_s = sequence.first_scheduled_s
            queued_s = (time.perf_counter() if first_s is None else first_s) - sequence.arrival_s
            num_cached_tokens = sequence.num_cached_tokens
            if sequence.wants_prompt_logprobs and finish_reason not in ("error", "cancelled"):
                prompt_logprobs = tuple(sequence.prompt_logprobs)
            sequence.has_sent_delta = True
        return RequestDelta(
            request_id=sequence.request_id,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=num_cached_tokens,
            queued_s=queued_s,
            score=score,
            finish_reason=finish_reason,
            stop_token_id=stop_token_id,
            error=error,
        )

    def _stats(self, step_s: float, num_step_tokens: int) -> EngineStats:
        speculation = self.scheduler.speculation
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting) + len(self._compiling),
            kv_cache_usage=self.blocks.usage,
            num_preemptions=self.scheduler.num_preemptions,
            prefix_cache_queries=self.blocks.prefix_cache_queries,
            prefix_cache_hits=self.blocks.prefix_cache_hits,
            step_s=step_s,
            num_step_tokens=num_step_tokens,
            resident_adapters=self._pool.resident,
            num_adapter_loads=self._pool.num_loads,
            num_adapter_evictions=self._pool.num_evictions,
            adapter_load_s=self._pool.load_s,
            num_drafts=speculation.num_drafts if speculation else 0,
            num_draft_tokens=speculation.num_draft_tokens if speculation else 0,
            num_accepted_tokens=speculation.num_accepted_tokens if speculation else 0,
        )


def _end(sequence: Sequence, *, is_last: bool) -> tuple[FinishReason | None, bool]:
    """Why a text ends with the token just appended, if it does, and whether that is a stop token.

    Args:
        is_last: no other token of this step follows. The sampler has moved the grammar on by all of
            them, and none stands behind its end.
    """
    num_output_tokens = len(sequence.output_token_ids)
    is_stop_token = sequence.output_token_ids[-1] in sequence.stop_token_ids
    if is_stop_token and num_output_tokens > sequence.params.min_tokens:
        return "stop", True
    if is_last and sequence.grammar is not None and sequence.grammar.is_finished():
        return "stop", False
    if num_output_tokens >= sequence.max_tokens:
        return "length", False
    return None, False
