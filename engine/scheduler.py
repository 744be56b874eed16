"""What runs in the next step: one flat batch of decodes and prompt chunks.

Order     decodes first, so a long prompt never stalls running streams; then started prompts and
          new admissions, by priority, under max_num_batched_tokens and max_num_seqs.
Blocks    a sequence is admitted when all blocks its present tokens need are there and every running
          sequence could still grow by one. When a decode finds no block, the sequence of the lowest
          priority, the newest first, is preempted: its blocks go back, its tokens stay, it is
          recomputed later.
Rows      an adapter's row of the LoRA pool is held from admission to end or preemption. A sequence
          whose adapter is not ready waits, others pass. When all rows are in use and an adapter
          waits for one, the adapter that has held its row longest admits nobody more until the
          waiting one has got a row: rows go round.
Fairness  between adapters: engine/waiting_queue.py.
Drafts    come last (engine/speculation.py): what room and blocks are left then would be idle.
Trainer   its own requests, of priority BACKGROUND, may be left out of a step, or have one to
          themselves. They give up blocks and rows as soon as a client's request needs them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, Protocol

from engine.api import AdapterRef
from engine.block_manager import BlockManager
from engine.config import SchedulerConfig
from engine.errors import EngineError
from engine.sequence import Sequence
from engine.speculation import PromptLookup
from engine.waiting_queue import AdapterKey, WaitingQueue

Group = Literal["all", "clients", "background"]
"""Whose tokens a step runs."""


class AdapterRows(Protocol):
    """What the scheduler needs of the LoRA pool."""

    def acquire(self, ref: AdapterRef) -> int | None: ...

    def release(self, ref: AdapterRef) -> None: ...

    @property
    def resident(self) -> tuple[tuple[int, int], ...]: ...


@dataclass(slots=True)
class Schedule:
    """One step: (sequence, number of its tokens to run, drafts included), decodes first; and who
    cannot run."""

    items: list[tuple[Sequence, int]] = field(default_factory=list)
    failed: list[tuple[Sequence, EngineError]] = field(default_factory=list)
    """Taken out of the queue: their adapter could not be loaded."""
    num_preempted: int = 0


@dataclass(slots=True)
class _Drain:
    """One adapter stops admitting until another has got a row."""

    victim: AdapterRef
    beneficiary: AdapterRef


class Scheduler:
    """Decides; owns the waiting and the running sequences, their blocks and their rows."""

    def __init__(
        self, config: SchedulerConfig, blocks: BlockManager, rows: AdapterRows, num_rows: int
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.pinned: set[AdapterRef] = set()
        """Adapters that keep their row while idle; the engine keeps this up to date."""
        self.num_preemptions = 0
        self.speculation = PromptLookup(config.speculation) if config.speculation else None
        self._rows = rows
        self._num_rows = num_rows
        self._num_running: Counter[AdapterKey] = Counter()
        self._row_since: dict[AdapterRef, int] = {}  # insertion order: longest held first
        self._drain: _Drain | None = None

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, new or preempted."""
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended, running or waiting; free its blocks and its row."""
        if sequence.block_table:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self, group: Group = "all", max_num_tokens: int | None = None) -> Schedule:
        """Choose the next step's tokens. Blocks for all of them are allocated when this returns.

        The step before may still be in flight, where the group is all and there is room.

        Args:
            group:          whose.
            max_num_tokens: how many at most; None: max_num_batched_tokens.
        """
        schedule = Schedule()
        self.running.sort(key=_order)
        budget = self._place_decodes(schedule, group, max_num_tokens)
        started = [s for s in self.running if s.num_missing_tokens > 1 and _is_of(group, s)]
        # What a preemption has freed is for those that run; admitting now would preempt again soon.
        may_admit = schedule.num_preempted == 0
        passed_over: set[AdapterKey] = set()
        blocked: list[AdapterRef] = []
        if self._drain is not None:
            passed_over.add(self._drain.victim)
        while budget > 0:
            sequence = None
            if may_admit and len(self.running) < self.config.max_num_seqs:
                sequence = self.waiting.next(self._num_running, passed_over)
                if sequence is not None and not _is_of(group, sequence):
                    sequence = None
            if started and (
                sequence is None or started[0].request.priority <= sequence.request.priority
            ):
                sequence = started.pop(0)
            elif sequence is None:
                break
            elif not self._acquire_row(sequence, schedule, passed_over, blocked):
                continue
            elif not self._admit(sequence):
                if group != "clients" or not self._preempt_background():
                    may_admit = False  # nobody overtakes a long prompt that waits for blocks
                continue
            num_new_tokens = min(sequence.num_missing_tokens, budget)
            schedule.items.append((sequence, num_new_tokens))
            budget -= num_new_tokens
        if len(self.running) >= self.config.max_num_seqs:
            self._prepare_next(passed_over, blocked)
        self._rotate_rows(group, blocked)
        if self.speculation is not None:
            self._place_drafts(self.speculation, schedule, budget)
        return schedule

    def has_room(self) -> bool:
        """Whether all that run can go on by a token and none of them would be preempted."""
        num_missing = sum(
            self.blocks.num_blocks_for(sequence.num_tokens) - len(sequence.block_table)
            for sequence in self.running
            if sequence.num_missing_tokens == 1 and not sequence.is_at_its_end
        )
        return num_missing <= self.blocks.num_available

    def settle_drafts(self, sequence: Sequence, token_ids: tuple[int, ...]) -> None:
        """The step is over and has brought these tokens: note which drafts they are, forget all."""
        assert self.speculation is not None
        self.speculation.learn(sequence, token_ids)
        self.drop_drafts(sequence)

    def drop_drafts(self, sequence: Sequence) -> None:
        """Forget a running sequence's drafts, and what they hold."""
        sequence.draft_token_ids = []
        self.blocks.trim(sequence)

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, blocks and row counts agree."""
        waiting = list(self.waiting)
        assert len(waiting) == len(self.waiting), "the queue has lost count"
        assert not set(map(id, waiting)) & set(map(id, self.running)), "a sequence waits and runs"
        for sequence in waiting:
            assert not sequence.block_table and sequence.lora_row == -1, (
                "a waiting sequence holds resources"
            )
            assert sequence.num_computed_tokens == 0
        for sequence in self.running:
            capacity = len(sequence.block_table) * self.blocks.block_size
            assert sequence.num_computed_tokens <= capacity, "computed tokens without a block"
            is_scored = sequence.request.task == "score" and not sequence.num_missing_tokens
            assert is_scored or sequence.num_missing_tokens >= 1, (
                "a running sequence has nothing to do"
            )
            assert not sequence.draft_token_ids, "drafts outlive their step"
            needed = self.blocks.num_blocks_for(sequence.num_tokens)
            assert len(sequence.block_table) <= needed, "a block that no token needs"
            assert (sequence.adapter is None) == (sequence.lora_row == -1), (
                "a row without an adapter"
            )
        running = Counter(sequence.adapter for sequence in self.running)
        assert running == +self._num_running, f"{running} run, {self._num_running} were counted"
        assert set(self._row_since) == {ref for ref in running if ref is not None}
        assert len(self.running) <= self.config.max_num_seqs
        self.blocks.check_integrity(self.running)

    def _place_decodes(self, schedule: Schedule, group: Group, max_num_tokens: int | None) -> int:
        """One token for each sequence that lacks one, blocks permitting; returns what is left."""
        budget = self.config.max_num_batched_tokens if max_num_tokens is None else max_num_tokens
        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            index += 1
            if sequence.num_missing_tokens != 1 or not _is_of(group, sequence):
                continue  # a prompt has had its blocks since its admission
            if sequence.is_at_its_end:
                continue
            while not self.blocks.extend(sequence):
                victim = self.running[-1]  # sorted: the lowest priority, the newest
                self._preempt(victim)
                schedule.num_preempted += 1
                if victim is sequence:
                    break
            if sequence.block_table:
                schedule.items.append((sequence, 1))
                budget -= 1
        return budget

    def _place_drafts(self, speculation: PromptLookup, schedule: Schedule, budget: int) -> None:
        """Run along what may follow, where sequences decode."""
        for index, (sequence, _) in enumerate(schedule.items):
            if sequence.num_missing_tokens != 1 or not sequence.output_token_ids:
                continue
            # The last token of all is never run.
            num_left = sequence.max_tokens - len(sequence.output_token_ids) - 1
            drafts = speculation.propose(sequence, min(num_left, budget))
            if drafts and self.blocks.extend(sequence, len(drafts)):
                sequence.draft_token_ids = drafts
                schedule.items[index] = (sequence, 1 + len(drafts))
                budget -= len(drafts)

    def _acquire_row(
        self,
        sequence: Sequence,
        schedule: Schedule,
        passed_over: set[AdapterKey],
        blocked: list[AdapterRef],
    ) -> bool:
        """Get the pool row a sequence needs; False when it must wait or has failed."""
        ref = sequence.adapter
        if ref is None:
            return True
        if len(blocked) >= self._num_rows and not self._is_resident(ref):
            passed_over.add(ref)  # enough are being loaded; more would only push each other out
            return False
        try:
            row = self._rows.acquire(ref)
        except EngineError as error:
            self.waiting.remove(sequence)
            schedule.failed.append((sequence, error))
            return False
        if row is None:
            passed_over.add(ref)
            blocked.append(ref)
            return False
        sequence.lora_row = row
        return True

    def _prepare_next(self, passed_over: set[AdapterKey], blocked: list[AdapterRef]) -> None:
        """All places are taken: load for whose turn is next, so that it need not wait twice."""
        sequence = self.waiting.next(self._num_running, passed_over)
        ref = sequence.adapter if sequence is not None else None
        if ref is None or ref in self._row_since:
            return
        try:
            row = self._rows.acquire(ref)
        except EngineError:
            return  # told when its turn comes
        if row is None:
            blocked.append(ref)
        else:
            self._rows.release(ref)

    def _admit(self, sequence: Sequence) -> bool:
        if not self.blocks.admit(sequence, num_spare=len(self.running)):
            self._release_row(sequence)
            return False
        self.waiting.take_turn(sequence)
        self.running.append(sequence)
        self._num_running[sequence.adapter] += 1
        if sequence.adapter is not None:
            self._row_since.setdefault(sequence.adapter, sequence.arrival)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        assert not sequence.num_pending_tokens, "its next token is in flight"
        self._stop(sequence)
        sequence.forget_computed()
        self.waiting.add(sequence)
        self.num_preemptions += 1

    def _preempt_background(self) -> bool:
        """Make room for a client's sequence; whether there was one to take it from."""
        victim = next((s for s in reversed(self.running) if s.is_background), None)
        if victim is not None:
            self._preempt(victim)
        return victim is not None

    def _stop(self, sequence: Sequence) -> None:
        """Take a sequence out of the running ones and free what it holds."""
        self.running.remove(sequence)
        self.blocks.release(sequence)
        self._release_row(sequence)
        self._num_running[sequence.adapter] -= 1
        if not self._num_running[sequence.adapter]:
            del self._num_running[sequence.adapter]
            if sequence.adapter is not None:
                del self._row_since[sequence.adapter]

    def _release_row(self, sequence: Sequence) -> None:
        if sequence.lora_row != -1:
            assert sequence.adapter is not None
            self._rows.release(sequence.adapter)
            sequence.lora_row = -1

    def _rotate_rows(self, group: Group, blocked: list[AdapterRef]) -> None:
        """Start, keep or end a drain; `blocked` found no row in this step, in turn order."""
        drain = self._drain
        if drain is not None:
            has_row = drain.beneficiary in self._row_since
            lost_the_race = drain.victim not in self._row_since and self._all_rows_in_use()
            if not has_row and not lost_the_race and self._may_drain(drain):
                return
            self._drain = None
        if blocked and self._all_rows_in_use():
            if group == "clients" and self._yield_row():
                return
            candidates = (_Drain(ref, blocked[0]) for ref in self._row_since)
            self._drain = next(filter(self._may_drain, candidates), None)

    def _yield_row(self) -> bool:
        """Preempt all that runs on an adapter of the trainer's own; whether there was one."""
        for ref in self._row_since:
            sequences = [sequence for sequence in self.running if sequence.adapter == ref]
            if all(sequence.is_background for sequence in sequences):
                for sequence in sequences:
                    self._preempt(sequence)
                return True
        return False

    def _may_drain(self, drain: _Drain) -> bool:
        """Whether somebody still waits for the row, and nobody more urgent for who has it."""
        urgency = self.waiting.best_priority(drain.beneficiary)
        if urgency is None or drain.victim in self.pinned:
            return False
        other = self.waiting.best_priority(drain.victim)
        return other is None or urgency <= other

    def _all_rows_in_use(self) -> bool:
        num_idle_pinned = sum(1 for ref in self.pinned if ref not in self._row_since)
        return len(self._row_since) + num_idle_pinned >= self._num_rows

    def _is_resident(self, ref: AdapterRef) -> bool:
        return (ref.uid, ref.generation) in self._rows.resident


def _is_of(group: Group, sequence: Sequence) -> bool:
    return group == "all" or sequence.is_background == (group == "background")


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
