"""A model without weights, a pool without adapters, and an engine around them. Not a test module.

HistoryModel's logits are a hash of the tokens, adapters and scales that it reads back from the KV
cache through the
block tables: whatever the scheduler, the block manager or the batch get wrong about the past
changes the text.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

import torch

from engine.api import (
    AdapterRef,
    GenerateRequest,
    RecordingProgress,
    RequestDelta,
    SamplingParams,
)
from engine.config import CacheConfig, EngineConfig, LoraConfig, SchedulerConfig
from engine.decode_graphs import DecodeGraphs, GraphBackend
from engine.engine import Engine
from engine.errors import AdapterError
from engine.model_runner import Model, ModelRunner
from engine.sampler import Sampler

VOCAB_SIZE = 64
EOS = 2
MODULUS = 2**31 - 1
UNWRITTEN = -1
CPU = torch.device("cpu")


@dataclass(frozen=True)
class FakeStaticLoraBatch:
    """Looks its rows up when it is asked."""

    pool: FakePool
    lora_indices: torch.Tensor
    lora_scales: torch.Tensor

    @property
    def salts(self) -> list[int]:
        return self.pool.salts(self.lora_indices.tolist(), self.lora_scales.tolist())


@dataclass(frozen=True)
class FakeLoraBatch:
    salts: list[int]

    def select(self, rows: list[int]) -> FakeLoraBatch:
        return FakeLoraBatch([self.salts[row] for row in rows])


class HistoryModel:
    """Next token = a hash of everything before it, as read from the cache."""

    def __init__(self) -> None:
        self.num_tokens_run = 0
        self.fail_on_token: int | None = None
        self.nan_on_token: int | None = None
        self.fatal = False
        self.originality = 1.0
        """Share of the tokens that depend on everything before; the others on the last one."""

    def __call__(self, batch, kv_caches, lora) -> torch.Tensor:
        self.num_tokens_run += len(batch.input_ids)
        if self.fatal:
            raise torch.AcceleratorError("the device is lost")
        if self.fail_on_token is not None and self.fail_on_token in batch.input_ids.tolist():
            raise RuntimeError("a kernel failed")
        ids = batch.input_ids
        assert ((ids >= 0) & (ids < VOCAB_SIZE)).all(), "a GPU would be lost over such a token"
        cache = kv_caches[0][0]
        block_size = cache.shape[1]
        flat = cache.view(-1)
        salts = lora.salts if lora is not None else [0] * len(batch.input_ids)
        is_stored = batch.slot_mapping >= 0
        entries = batch.input_ids + VOCAB_SIZE * torch.tensor(salts)
        flat[batch.slot_mapping[is_stored]] = entries[is_stored]
        hidden = []
        cu_seqlens = batch.cu_seqlens_q.tolist()
        for index, context_len in enumerate(batch.context_lens.tolist()):
            num_new = cu_seqlens[index + 1] - cu_seqlens[index]
            if context_len == 0:  # a row that fills up a step
                hidden.append([0, 0])
                continue
            positions = torch.arange(context_len)
            blocks = batch.block_tables[index].long()[positions // block_size]
            assert (blocks >= 0).all()
            history = flat[blocks * block_size + positions % block_size].tolist()
            assert UNWRITTEN not in history, "a slot was read before it was written"
            rows = slice(cu_seqlens[index], cu_seqlens[index + 1])
            assert batch.positions[rows].tolist() == list(range(context_len))[-num_new:]
            value = 1
            for position, entry in enumerate(history):
                value = (value * 1_000_003 + entry + 7) % MODULUS
                if position >= context_len - num_new:
                    is_original = value % 1009 < 1009 * self.originality
                    said = value if is_original else 1_000_003 * (entry + 7) % MODULUS
                    hidden.append([said, entry % VOCAB_SIZE])
        return torch.tensor(hidden, dtype=torch.float64)

    def logits(self, hidden: torch.Tensor, lora: object) -> torch.Tensor:
        del lora
        values = hidden[:, :1].long() * (2 * torch.arange(VOCAB_SIZE) + 1) * 40_503
        logits = (values % MODULUS % 8191).float() / 1000
        if self.nan_on_token is not None:
            logits[hidden[:, 1].long() == self.nan_on_token] = float("nan")
        return logits


class FakePool:
    """Rows for adapters that take `load_steps` polls to arrive; names in `broken` never do."""

    def __init__(self, num_rows: int, load_steps: int = 0, broken: tuple[str, ...] = ()) -> None:
        self.load_steps = load_steps
        self.broken = broken
        self.rows: list[AdapterRef | None] = [None] * num_rows
        self.users: Counter[AdapterRef] = Counter()
        self.loading: dict[AdapterRef, int] = {}
        self.host: set[AdapterRef] = set()
        self.unloaded: list[AdapterRef] = []
        self.pinned: set[AdapterRef] = set()
        self.not_low_rank: set[str] = set()
        self.version = 0
        self.num_loads = self.num_evictions = 0
        self.load_s = 0.0

    def acquire(self, ref: AdapterRef) -> int | None:
        if ref.name in self.broken:
            raise AdapterError(f"Adapter {ref.name!r} is broken.")
        if ref not in self.rows and not self._place(ref):
            return None
        self.users[ref] += 1
        return self.rows.index(ref)

    def _place(self, ref: AdapterRef) -> bool:
        """Like the real pool: to host memory in the background, to a row when asked for."""
        if ref not in self.host:
            self.loading.setdefault(ref, self.load_steps)
            if self.load_steps:
                return False
            self.poll()
        idle = [row for row, held in enumerate(self.rows) if held is None] or [
            row for row, held in enumerate(self.rows) if held and self._may_go(held)
        ]
        if idle:
            self.rows[idle[0]] = ref
            self.version += 1
        return bool(idle)

    def _may_go(self, ref: AdapterRef) -> bool:
        return not self.users[ref] and ref not in self.pinned

    def poll(self) -> None:
        for ref in list(self.loading):
            self.loading[ref] -= 1
            if self.loading[ref] <= 0:
                del self.loading[ref]
                self.host.add(ref)
                self.num_loads += 1

    def release(self, ref: AdapterRef) -> None:
        assert self.users[ref] > 0
        self.users[ref] -= 1

    def preload(self, ref, *, pinned, done) -> None:
        if pinned:
            self.pinned.add(ref)
        self._place(ref)
        done(error=None, load_s=0.5, num_bytes=7)

    def unload(self, ref: AdapterRef) -> None:
        assert not self.users[ref]
        self.unloaded.append(ref)

    def batch(self, rows: list[int], scales: list[float]) -> FakeLoraBatch | None:
        salts = self.salts(rows, scales)
        return FakeLoraBatch(salts) if any(salts) else None

    def salts(self, rows: list[int], scales: list[float]) -> list[int]:
        refs = [self.rows[row] if row >= 0 else None for row in rows]
        return [
            0
            if ref is None or scale == 0.0
            else 1 + 100 * ref.uid + 10 * ref.generation + round(1e6 * scale)
            for ref, scale in zip(refs, scales, strict=True)
        ]

    def may_be_recorded(self, rows: list[int]) -> bool:
        refs = [self.rows[row] for row in rows if row >= 0]
        return not any(ref is not None and ref.name in self.not_low_rank for ref in refs)

    def static_batch(self, lora_indices, lora_scales) -> FakeStaticLoraBatch | None:
        if not any(self.rows):
            return None
        return FakeStaticLoraBatch(self, lora_indices, lora_scales)

    def score(self, row: int, hidden: torch.Tensor) -> torch.Tensor:
        assert self.rows[row] is not None
        if "reward" not in self.rows[row].name:
            raise AdapterError("no score head")
        return hidden[0]

    def check_integrity(self) -> None:
        assert all(ref in self.rows for ref, count in self.users.items() if count)

    def close(self) -> None:
        pass

    @property
    def is_loading(self) -> bool:
        return bool(self.loading)

    @property
    def resident(self) -> tuple[tuple[int, int], ...]:
        return tuple((ref.uid, ref.generation) for ref in self.rows if ref is not None)


class ManualCompiler:
    """Futures that the test completes."""

    def __init__(self) -> None:
        self.futures: list[Future] = []

    def submit(self, spec: object) -> Future:
        del spec
        self.futures.append(Future())
        return self.futures[-1]

    def close(self) -> None:
        pass


class FakeEngine:
    """An engine over fakes, its deltas collected by request, its books checked after every step."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_model_len: int = 128,
        enable_prefix_caching: bool = True,
        num_rows: int = 2,
        load_steps: int = 0,
        broken: tuple[str, ...] = (),
        speculative_config: str | None = None,
        async_scheduling: Literal["auto", "on", "off"] = "auto",
        graph_backend: GraphBackend | None = None,
        graph_sizes: tuple[int, ...] = (1, 2, 4, 8),
        model: Model | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.recordings: list[RecordingProgress] = []
        config = EngineConfig(
            cache=CacheConfig(block_size=block_size, enable_prefix_caching=enable_prefix_caching),
            scheduler=SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                speculative_config=speculative_config,
                async_scheduling=async_scheduling,
            ),
            lora=LoraConfig(max_loras=num_rows),
        )
        self.model = HistoryModel() if model is None else model
        self.pool = FakePool(num_rows, load_steps, broken)
        self.compiler = ManualCompiler()
        shape = (num_blocks, block_size, 1, 1)
        cache = torch.full(shape, UNWRITTEN, dtype=torch.int64)
        self.graphs = None
        if graph_backend is not None:
            self.graphs = DecodeGraphs(
                self.model,
                [(cache, cache)],
                self.pool,
                graph_backend,
                sizes=graph_sizes,
                block_size=block_size,
                max_num_blocks=-(-max_model_len // block_size),
                device=device,
                report=self.recordings.append,
            )
        runner = ModelRunner(
            self.model,
            [(cache, cache)],
            self.pool,
            block_size=block_size,
            device=device,
            graphs=self.graphs,
        )
        self.engine = Engine(
            config,
            runner,
            Sampler(),
            self.compiler,
            self.pool,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=[EOS],
        )
        self.deltas: dict[str, list[RequestDelta]] = {}
        self.replies: list[int] = []
        self.stats = None

    def add(self, request_id: str, prompt: list[int] | tuple[int, ...] = (5, 6, 7), **options):
        """Add a request; options of GenerateRequest by name, all others are SamplingParams."""
        fields = ("adapter", "lora_scale", "priority", "task")
        own = {name: options.pop(name) for name in fields if name in options}
        params = SamplingParams(
            **{"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, **options}
        )
        request = GenerateRequest(
            request_id=request_id, prompt_token_ids=tuple(prompt), params=params, **own
        )
        self.engine.add(request)

    def step(self, *args, **options):
        output = self.engine.step(*args, **options)
        self.engine.check_integrity()
        self.stats = output.stats
        self.replies += [reply.command_id for reply in self.engine.adapters.take_replies()]
        for delta in output.deltas:
            earlier = self.deltas.setdefault(delta.request_id, [])
            assert not earlier or earlier[-1].finish_reason is None, "a delta after the final one"
            assert (delta.error is not None) == (delta.finish_reason == "error")
            earlier.append(delta)
        return output

    def run(self, max_steps: int = 2000) -> None:
        """Step until there is nothing left to do."""
        for _ in range(max_steps):
            if not self.engine.has_work():
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def text(self, request_id: str) -> list[int]:
        return [token for delta in self.deltas[request_id] for token in delta.token_ids]

    def final(self, request_id: str) -> RequestDelta:
        finals = [delta for delta in self.deltas[request_id] if delta.finish_reason is not None]
        assert len(finals) == 1
        return finals[0]

    @property
    def running(self) -> list[str]:
        return [sequence.request_id for sequence in self.engine.scheduler.running]


def adapter(uid: int, generation: int = 1, name: str | None = None) -> AdapterRef:
    return AdapterRef(
        uid=uid, generation=generation, name=name or f"adapter-{uid}", path=f"/adapters/{uid}"
    )


def expected_text(prompt: list[int], num_tokens: int, salt: int = 0) -> list[int]:
    """What HistoryModel says, computed without an engine: from the tokens alone."""
    model, history = HistoryModel(), list(prompt)
    for _ in range(num_tokens):
        value = 1
        for token in history:
            value = (value * 1_000_003 + token + VOCAB_SIZE * salt + 7) % MODULUS
        logits = model.logits(torch.tensor([[value, 0]], dtype=torch.float64), None)
        history.append(int(logits.argmax()))
    return history[len(prompt) :]
