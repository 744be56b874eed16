"""The heart: requests in, steps, deltas out. It starts no process and no thread.

Every accepted request ends in exactly one final delta: all ways out lead through `_finish`. A
forward pass that raises is repeated sequence by sequence, so that only who is at fault ends with an
error; a lost device is fatal and left to the worker.

A step may be in flight between two calls of step(), which tells what it has brought a call later:
engine/in_flight.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

import torch

from engine.acceptance import as_engine_error, attempt, check_request
from engine.adapter_commands import AdapterCommands
from engine.api import (
    EngineStats,
    FinishReason,
    GenerateRequest,
    RequestDelta,
    StepOutput,
    TokenLogprobs,
)
from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.deltas import append_tokens, make_delta
from engine.errors import AdapterError, EngineError, RequestError
from engine.grammar_queue import GrammarQueue
from engine.in_flight import StepInFlight, launch_choice
from engine.model_runner import Model, ModelRunner
from engine.scheduler import Group, Scheduler
from engine.sequence import Sequence

if TYPE_CHECKING:
    from engine.grammar import GrammarCompiler
    from engine.lora_pool import LoraPool
    from engine.sampler import SampledToken, Sampler

logger = logging.getLogger(__name__)


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
        self._in_flight: StepInFlight | None = None
        mode = config.scheduler.async_scheduling
        is_wanted = mode == "on" or (mode == "auto" and runner.device.type != "cpu")
        self._may_run_ahead = is_wanted and self.scheduler.speculation is None

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
        is_busy = self._in_flight is not None or self.adapters.has_work
        return bool(self._sequences or self._outbox or is_busy)

    @property
    def num_requests(self) -> int:
        """Those that have not ended."""
        return len(self._sequences)

    def step(
        self,
        group: Group = "all",
        max_num_tokens: int | None = None,
        *,
        may_run_ahead: bool = True,
    ) -> StepOutput:
        """Run one step, or launch it and end the one before; tell what the ended ones added. With
        nothing to run, deliver what is pending.

        Args:
            group:          whose tokens to run.
            max_num_tokens: how many at most; None: as many as --max-num-batched-tokens says.
            may_run_ahead:  whether the step may be in flight when this returns, where --async-
                            scheduling allows it and the group is all.
        """
        started_s = time.perf_counter()
        deltas, self._outbox = self._outbox, []
        self._pool.poll()
        for sequence, failure in self._compiling.take_done():
            if failure is None:
                self.scheduler.add(sequence)
            else:
                deltas.append(self._finish(sequence, "error", error=failure, is_queued=False))
        if self._in_flight is not None and (group != "all" or not self.scheduler.has_room()):
            self._end_step(deltas)  # some sequence may be preempted: no token of it is in flight
        items = self._schedule(group, max_num_tokens, started_s, deltas)
        if not items and self._in_flight is not None:
            self._end_step(deltas)  # those that end make room for others
            items = self._schedule(group, max_num_tokens, started_s, deltas)
        if items:
            self._run(items, deltas)
        if not (self._may_run_ahead and may_run_ahead and group == "all"):
            self._end_step(deltas)
        num_tokens = sum(num_new_tokens for _, num_new_tokens in items)
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
        flying = {s for s, _ in self._in_flight.items} if self._in_flight is not None else set()
        assert all(s in flying for s in sequences if s.num_pending_tokens), "a token is lost"
        self.adapters.check_integrity([s.adapter for s in sequences if s.adapter is not None])

    def close(self) -> None:
        """Stop the threads that load adapters and compile grammars."""
        self._pool.close()
        self._compiling.close()

    # One step.

    def _schedule(
        self,
        group: Group,
        max_num_tokens: int | None,
        started_s: float,
        deltas: list[RequestDelta],
    ) -> list[tuple[Sequence, int]]:
        schedule = self.scheduler.schedule(group, max_num_tokens)
        for sequence, error in schedule.failed:
            deltas.append(self._finish(sequence, "error", error=error, is_queued=False))
        for sequence, _ in schedule.items:
            if sequence.first_scheduled_s is None:
                sequence.first_scheduled_s = started_s
                sequence.num_cached_tokens = sequence.num_computed_tokens
        return schedule.items

    @torch.inference_mode()
    def _run(self, items: list[tuple[Sequence, int]], deltas: list[RequestDelta]) -> None:
        """Launch a step, end the one before, and leave the new one in flight; after an error find
        out whose it is by running each sequence alone. The order is that of engine/in_flight.py."""
        last = self._in_flight.last_tokens if self._in_flight is not None else None
        result, error = attempt(lambda: self._runner.run(items, last))
        self._end_step(deltas)
        was_alone = len(items) == 1
        items = [(sequence, count) for sequence, count in items if not sequence.has_ended]
        pending = None
        if result is not None:
            pending, error = attempt(lambda: launch_choice(self._sampler, result))
        if error is not None:
            self._repeat(items, error, deltas, was_alone=was_alone, has_run=result is not None)
            error.__traceback__ = None  # it would keep this frame, and the step's tensors
            return
        assert result is not None
        self._runner.prepare_next()
        for sequence, num_new_tokens in items:
            # Of drafts nothing is known yet: append_tokens counts those that were right.
            sequence.num_computed_tokens += num_new_tokens - len(sequence.draft_token_ids)
        for sequence in pending.sequences if pending is not None else ():
            sequence.num_pending_tokens = 1
        self._in_flight = StepInFlight(
            items, pending, result.prompt_logprobs, result.scored, result.scores
        )

    def _repeat(
        self,
        items: list[tuple[Sequence, int]],
        error: BaseException,
        deltas: list[RequestDelta],
        *,
        was_alone: bool,
        has_run: bool,
    ) -> None:
        """Run a step's sequences again, after an error: each alone, or all where memory was short
        and there is more now.

        Args:
            items:     those that have not ended meanwhile; nothing of them has been noted, and no
                step is in flight.
            error:     what was raised.
            deltas:    gets what there is to tell.
            was_alone: whether the step had one sequence only.
            has_run:   whether they have gone through the model.
        """
        if isinstance(error, torch.OutOfMemoryError):
            error.__traceback__ = None  # its frames hold the step's activations
            has_more = self.make_room()
            torch.cuda.empty_cache()
            if has_more and not has_run and items:
                self._run(items, deltas)
                return
        if was_alone and items and not items[0][0].draft_token_ids:
            if not isinstance(error, RequestError | AdapterError):
                logger.error("A forward pass failed.", exc_info=error)
            deltas.append(self._finish_failed(items[0][0], as_engine_error(error)))
            return
        logger.warning("A step failed (%r); repeating it one sequence at a time.", error)
        for sequence, num_new_tokens in items:
            num_drafts = len(sequence.draft_token_ids)  # they may be what is at fault
            self.scheduler.drop_drafts(sequence)
            self._run([(sequence, num_new_tokens - num_drafts)], deltas)
            self._end_step(deltas)

    def _end_step(self, deltas: list[RequestDelta]) -> None:
        """Wait for the step in flight, where there is one, and take what it has brought."""
        step, self._in_flight = self._in_flight, None
        if step is None:
            return
        for sequence, _ in step.items:
            sequence.num_pending_tokens = 0
        living = [sequence for sequence, _ in step.items if not sequence.has_ended]
        brought, error = attempt(lambda: step.wait(self._sampler))
        if error is not None:  # nobody knows what the device has computed
            logger.error("A step's results could not be read.", exc_info=error)
            failure = as_engine_error(error)
            deltas += [self._finish_failed(sequence, failure) for sequence in living]
            return
        assert brought is not None
        for sequence in living:
            self.blocks.commit(sequence)
        for sequence, entries in brought.prompt_logprobs:
            sequence.prompt_logprobs += entries
        for sequence, own_rows in groupby(brought.tokens, key=itemgetter(0)):
            if not sequence.has_ended:
                deltas += self._advance(sequence, [token for _, token in own_rows])
        for sequence, score in brought.scores:
            if not sequence.has_ended:
                deltas.append(self._finish(sequence, "stop", score=score))

    def _advance(self, sequence: Sequence, tokens: list[SampledToken]) -> list[RequestDelta]:
        """Append the tokens that a text comes to and say so, with the end where there is one; drop
        its drafts."""
        added = append_tokens(sequence, tokens)
        if sequence.draft_token_ids:
            self.blocks.commit(sequence)  # with the keys and values of drafts that were right
            self.scheduler.settle_drafts(sequence, added.token_ids)
        if added.reason is not None:
            final = self._finish(
                sequence,
                added.reason,
                token_ids=added.token_ids,
                logprobs=added.logprobs,
                stop_token_id=added.stop_token_id,
            )
            return [final]
        deltas = []
        if added.token_ids:
            deltas.append(make_delta(sequence, added.token_ids, added.logprobs))
        if added.error is not None:
            deltas.append(self._finish_failed(sequence, added.error))
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
        sequence.has_ended = True
        if is_queued and not self._compiling.remove(sequence):
            self.scheduler.remove(sequence)
        self.adapters.end_use(sequence.adapter)
        return make_delta(
            sequence,
            token_ids,
            logprobs,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            score=score,
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
