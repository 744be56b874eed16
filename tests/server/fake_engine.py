"""Stand-ins: a tokenizer of bytes, an engine that answers by script, adapters without files."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from adapters.format import AdapterInfo
from adapters.registry import Generation
from engine.api import (
    AdapterRef,
    AdapterReply,
    EngineInfo,
    EngineStats,
    ErrorInfo,
    GenerateRequest,
    LoadProgress,
    RequestDelta,
    TokenLogprobs,
    TrainingEvent,
    TrainingJob,
)
from engine.errors import AdapterError
from server.adapters import Adapters
from server.config import ServerConfig
from server.data_folder import DataFolder
from server.database import Database
from server.datasets.prepare import Prepared, prepare
from server.feedback import Feedback
from server.files import Files
from server.job_data import Workshop
from server.jobs import Jobs
from server.metrics import Metrics
from server.state import ServerState
from server.tokenizer import Tokenizer

LINEAR_LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "lm_head")
BOS, EOS = 256, 257
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHATML) -> Tokenizer:
    """One token per byte, <s> and </s>."""

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    return Tokenizer(
        encode_text=encode,
        token_bytes=(*(bytes([i]) for i in range(256)), b"<s>", b"</s>"),
        vocab_size=258,
        max_token_bytes=4,
        special_ids=frozenset((BOS, EOS)),
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        bos_token_id=BOS,
        chat_template=chat_template,
    )


@dataclass
class FakeEngine:
    """Answers every request with `answer(request)`, one token per delta, then the end token."""

    answer: Callable[[GenerateRequest], str | bytes | list[int]] = lambda request: "Hello, wörld!"  # noqa: ARG005
    state: str = "ready"
    stats: EngineStats = field(default_factory=EngineStats)
    progress: LoadProgress | None = None
    num_restarts: int = 0
    max_model_len: int = 512
    base_fingerprint: str = "0123456789abcdef"
    gate: asyncio.Event | None = None
    """Where set, requests wait for it after `tokens_before_gate` tokens."""
    tokens_before_gate: int = 0
    fail_after: int | None = None
    """Die after so many tokens."""
    logprob: Callable[[GenerateRequest, int], float] = lambda request, position: -0.5  # noqa: ARG005
    adapter_error: str | None = None
    requests: list[GenerateRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    loaded: list[tuple[AdapterRef, bool]] = field(default_factory=list)
    unloaded: list[AdapterRef] = field(default_factory=list)
    from_training: list[str | None] = field(default_factory=list)
    train: Callable[[TrainingJob], Sequence[TrainingEvent]] = lambda job: ()  # noqa: ARG005
    """What a started job says at once."""
    training: list[TrainingJob] = field(default_factory=list)
    stopped_training: list[tuple[str, str]] = field(default_factory=list)
    on_training_event: Callable[[TrainingEvent], None] | None = None

    @property
    def info(self) -> EngineInfo | None:
        if self.state == "loading":
            return None
        return EngineInfo(
            architecture="LlamaForCausalLM", vocab_size=258, max_model_len=self.max_model_len,
            eos_token_ids=(EOS,), num_kv_blocks=64, block_size=16, dtype="float32",
            kv_cache_dtype="float32", device="cpu", weights_bytes=1, kv_cache_bytes=1,
            base_fingerprint=self.base_fingerprint,
        )  # fmt: skip

    async def generate(self, request: GenerateRequest) -> AsyncIterator[RequestDelta]:
        self.requests.append(request)
        try:
            async for delta in self._deltas(request):
                if delta.finish_reason is not None:
                    self.finished.append(request.request_id)
                yield delta
        finally:
            if request.request_id not in self.finished:
                self.cancelled.append(request.request_id)

    async def _deltas(self, request: GenerateRequest) -> AsyncIterator[RequestDelta]:
        request_id, params = request.request_id, request.params
        if request.task == "score":
            total = float(sum(request.prompt_token_ids))
            yield RequestDelta(request_id=request_id, score=total, finish_reason="stop")
            return
        text = self.answer(request)
        token_ids = list(text.encode() if isinstance(text, str) else text)
        if not params.ignore_eos:
            token_ids.append(EOS)
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            prompt_logprobs = (
                None,
                *(TokenLogprobs(i, -1.0, ((i, -1.0),)) for i in request.prompt_token_ids[1:]),
            )
        for position, token_id in enumerate(token_ids[: params.max_tokens]):
            if self.gate is not None and position >= self.tokens_before_gate:
                await self.gate.wait()
                if self.state == "stopped":
                    yield RequestDelta(request_id=request_id, finish_reason="cancelled")
                    return
            await asyncio.sleep(0)
            if position == self.fail_after:
                error = ErrorInfo(code="engine_restarting", message="The engine worker ended.")
                yield RequestDelta(request_id=request_id, finish_reason="error", error=error)
                return
            is_eos = token_id == EOS and not params.ignore_eos
            is_stop = is_eos or token_id in params.stop_token_ids
            is_last = position + 1 == params.max_tokens
            logprobs = None
            if params.logprobs is not None:
                value = self.logprob(request, position)
                top = tuple((min(token_id + k, 255), value - k) for k in range(params.logprobs))
                logprobs = (TokenLogprobs(token_id, value, top),)
            yield RequestDelta(
                request_id=request_id,
                token_ids=(token_id,),
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs if position == 0 else None,
                num_cached_tokens=3 if position == 0 else 0,
                finish_reason="stop" if is_stop else "length" if is_last else None,
                stop_token_id=token_id if is_stop else None,
            )
            if is_stop:
                return

    async def stop(self, timeout_s: float) -> None:  # noqa: ARG002
        self.state = "stopped"
        if self.gate is not None:
            self.gate.set()

    async def load_adapter(
        self, ref: AdapterRef, pinned: bool = False, from_training: str | None = None
    ) -> AdapterReply:
        self.from_training.append(from_training)
        if self.adapter_error is not None:
            raise AdapterError(self.adapter_error)
        self.loaded.append((ref, pinned))
        return AdapterReply(command_id=1)

    async def unload_adapter(self, ref: AdapterRef) -> None:
        self.unloaded.append(ref)

    def start_training(self, job: TrainingJob) -> None:
        self.training.append(job)
        for event in self.train(job):
            self.say(event)

    def stop_training(self, job_id: str, status: str) -> None:
        self.stopped_training.append((job_id, status))

    def say(self, event: TrainingEvent) -> None:
        """Something that the trainer tells the jobs' owner."""
        assert self.on_training_event is not None
        self.on_training_event(event)


def adapter_info(**changes: object) -> AdapterInfo:
    fields: dict[str, object] = {
        "rank": 8, "alpha": 16.0, "targets": ("q_proj",), "num_bytes": 100,
        "task_type": "CAUSAL_LM", "base_model": "base", "has_score_head": False,
        "chat_template": None, "fingerprint": None, "is_guanaco": False,
    }  # fmt: skip
    return AdapterInfo(**{**fields, **changes})  # type: ignore[arg-type]


def build_state(
    engine: FakeEngine | None = None,
    *,
    data_dir: Path | None = None,
    database_url: str | None = None,
    prepare: Callable[..., Prepared] = prepare,
    **config: object,
) -> ServerState:
    engine = engine or FakeEngine()
    metrics = Metrics("base")
    spec: Any = SimpleNamespace(
        tensor_shapes=dict, dtype=torch.float32, hidden_size=8, intermediate_size=8, num_layers=1,
        linear_shapes=lambda: dict.fromkeys(LINEAR_LAYERS, (8, 8)),
        layer_linear_shapes=lambda: {"self_attn.q_proj": (8, 8)},
    )  # fmt: skip
    adapters = Adapters(spec, engine, metrics, reserved_names=("base",))
    server_config = ServerConfig(**config)  # type: ignore[arg-type]
    if data_dir is None:
        temporary = tempfile.TemporaryDirectory(prefix="herd-test-")
        _folders.append(temporary)
        data_dir = Path(temporary.name)
    data = DataFolder(data_dir)
    database = Database(database_url or data.database_url(), lock_timeout_s=0.2)
    files = Files(database, data)
    tokenizer = byte_tokenizer()
    shop = Workshop(
        database=database,
        folder=data,
        files=files,
        engine=engine,
        adapters=adapters,
        tokenizer=tokenizer,
        spec=spec,
        prepare=prepare,
        model_names=("base",),
        tensorboard_dir=server_config.tensorboard_dir,
    )
    return ServerState(
        config=server_config,
        engine=engine,
        registry=adapters.registry,
        adapters=adapters,
        tokenizer=tokenizer,
        model_names=("base",),
        base_path="/models/base",
        max_num_seqs=4,
        metrics=metrics,
        files=files,
        feedback=Feedback(database, files, is_on=server_config.feedback),
        jobs=Jobs(shop),
    )


_folders: list[tempfile.TemporaryDirectory] = []
"""Gone when the tests end."""


def add_adapter(state: ServerState, name: str, **info: object) -> AdapterRef:
    """Publish an adapter that has no files; the next generation where the name is taken."""
    registry = state.registry
    generation, uid = 1, 100 + len(registry.names())
    if name in registry.names():
        current = registry.resolve(name)
        uid, generation = current.ref.uid, max(current.generations) + 1
    ref = AdapterRef(uid=uid, generation=generation, name=name, path=f"/nowhere/{uid}-{generation}")
    registry.commit(
        Generation(
            ref=ref, info=adapter_info(**info), source=f"/adapters/{name}", created_at=time.time()
        )
    )
    return ref
