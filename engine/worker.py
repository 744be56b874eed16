"""The engine in its own process: commands in over a pipe, one message out per step.

The loop blocks on the pipe while there is nothing to do. It ends on Shutdown, when the pipe closes, and with the
parent process, whatever became of that. Ctrl-C is the parent's to handle: the worker ignores it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from engine.api import (
    AdapterRef,
    CancelRequest,
    Command,
    EngineInfo,
    ErrorInfo,
    GenerateRequest,
    LoadAdapter,
    LoadProgress,
    Reply,
    Shutdown,
    UnloadAdapter,
    WorkerFailed,
)
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineError
from engine.grammar import GrammarCompiler
from engine.kv_cache import (
    allocate_kv_caches,
    block_bytes,
    choose_num_blocks,
    default_cpu_bytes,
    default_cuda_bytes,
    kv_cache_dtype,
)
from engine.lora import LoraWeights
from engine.lora_pool import LoraPool
from engine.model_runner import ModelRunner, measure_activation_bytes
from engine.sampler import Sampler
from engine.weights import LoadedModel, load_model

logger = logging.getLogger(__name__)

LoadAdapterFiles = Callable[[AdapterRef], LoraWeights]
Progress = Callable[[str, int, int], None]

LOADING_POLL_S = 0.002
"""How often to look for a finished adapter or grammar while no sequence can run."""

PROGRESS_S = 0.1
"""Least time between two progress messages of one stage."""


def run_worker(
    conn: Connection, config: EngineConfig, folder: Path, load_adapter: LoadAdapterFiles
) -> None:
    """Entry point of the worker process.

    Args:
        conn: commands come in, replies go out; its end is the order to stop.
        config: all flags.
        folder: of the base model.
        load_adapter: reads and checks an adapter; injected, because the engine does not import adapters.
    """
    _ignore_interrupts()
    _die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker %(levelname)s %(message)s")
    try:
        engine, info = create_engine(config, folder, load_adapter, _progress_sender(conn))
        conn.send(info)
        try:
            serve(conn, engine)
        finally:
            engine.close()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has gone or has closed the pipe: nobody is left to tell
    except EngineError as error:
        _send_failure(conn, error.info())
    except Exception as error:  # the process boundary
        logger.exception("The engine worker failed.")
        message = f"The engine worker failed: {type(error).__name__}: {error}"
        _send_failure(conn, ErrorInfo(code=EngineError.code, message=message))


def create_engine(
    config: EngineConfig, folder: Path, load_adapter: LoadAdapterFiles, progress: Progress
) -> tuple[Engine, EngineInfo]:
    """Load the model, size the KV cache and put the engine together.

    Raises:
        CheckpointError: the model's folder cannot be loaded.
        NotEnoughMemory: weights or the KV cache of one sequence do not fit.
        EngineError: --device or --max-model-len asks for what there is not.
    """
    started_s = time.perf_counter()
    device = _device(config)
    loaded = load_model(config.model, folder, device, progress)
    spec, model = loaded.spec, loaded.model
    max_model_len = _max_model_len(config, spec.max_position_embeddings)
    pool = LoraPool(
        config.lora,
        model,
        load_adapter,
        fingerprint=loaded.fingerprint,
        device=device,
        dtype=model.dtype,
    )
    block_size = config.cache.block_size
    cache_dtype = kv_cache_dtype(config.cache, model.dtype)
    bytes_per_block = block_bytes(spec, block_size, cache_dtype)
    free_bytes, free_means = _free_for_cache(config, loaded, device, cache_dtype, max_model_len)
    num_blocks = choose_num_blocks(
        config.cache,
        bytes_per_block=bytes_per_block,
        max_model_len=max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        free_bytes=free_bytes,
        free_means=free_means,
    )
    progress("allocating the KV cache", 0, 1)
    kv_caches = allocate_kv_caches(
        spec, num_blocks=num_blocks, block_size=block_size, dtype=cache_dtype, device=device
    )
    progress("allocating the KV cache", 1, 1)
    engine = Engine(
        config,
        ModelRunner(model, kv_caches, pool, block_size=block_size, device=device),
        Sampler(),
        GrammarCompiler(config.model.tokenizer or folder, spec.vocab_size, spec.eos_token_ids),
        pool,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        vocab_size=spec.vocab_size,
        eos_token_ids=spec.eos_token_ids,
    )
    info = EngineInfo(
        architecture=spec.architecture,
        vocab_size=spec.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=tuple(spec.eos_token_ids),
        num_kv_blocks=num_blocks,
        block_size=block_size,
        dtype=_name(model.dtype),
        kv_cache_dtype=_name(cache_dtype),
        device=str(device),
        weights_bytes=loaded.weights_bytes,
        kv_cache_bytes=num_blocks * bytes_per_block,
        base_fingerprint=loaded.fingerprint,
        load_s=time.perf_counter() - started_s,
        quantization=loaded.quantization,
        notes=tuple(loaded.notes),
    )
    return engine, info


def serve(conn: Connection, engine: Engine) -> None:
    """Take commands and run steps until Shutdown.

    Raises:
        EOFError, OSError: the pipe is closed.
    """
    has_run = True
    while True:
        timeout_s = None if not engine.has_work() else (0.0 if has_run else LOADING_POLL_S)
        while conn.poll(timeout_s):
            command: Command = conn.recv()
            if isinstance(command, Shutdown):
                engine.cancel_all()
                _send_step(conn, engine)
                return
            _handle(engine, command)
            timeout_s = 0.0
        has_run = _send_step(conn, engine)


def _handle(engine: Engine, command: Command) -> None:
    """Pass one command on; a nonsensical one is logged and dropped, for the worker outlives its parent's mistakes."""
    try:
        if isinstance(command, GenerateRequest):
            engine.add(command)
        elif isinstance(command, CancelRequest):
            engine.cancel(command.request_id)
        elif isinstance(command, LoadAdapter):
            engine.load_adapter(command)
        elif isinstance(command, UnloadAdapter):
            engine.unload_adapter(command)
        else:
            logger.error("A message of unknown type was dropped: %r", type(command))
    except Exception:  # the process boundary
        logger.exception("A command was dropped: %r", command)


def _send_step(conn: Connection, engine: Engine) -> bool:
    """Run one step and send what it has to say; whether it ran any token."""
    output = engine.step()
    replies: list[Reply] = list(engine.take_replies())
    if output.deltas or output.stats.num_step_tokens or replies:
        conn.send(output)
    for reply in replies:
        conn.send(reply)
    return output.stats.num_step_tokens > 0


def _device(config: EngineConfig) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if config.model.device == "cuda" and not has_cuda:
        raise EngineError(
            "--device cuda: this PyTorch finds no GPU. Use --device cpu, or install a PyTorch built for your driver."
        )
    return torch.device("cuda" if has_cuda and config.model.device != "cpu" else "cpu")


def _max_model_len(config: EngineConfig, trained_len: int) -> int:
    asked = config.model.max_model_len
    if asked is not None and asked > trained_len:
        raise EngineError(
            f"--max-model-len {asked}: this model was made for {trained_len} tokens (max_position_embeddings). "
            f"Ask for at most {trained_len}."
        )
    return asked or trained_len


def _free_for_cache(
    config: EngineConfig,
    loaded: LoadedModel,
    device: torch.device,
    cache_dtype: torch.dtype,
    max_model_len: int,
) -> tuple[int, str]:
    """(bytes, where that number comes from)."""
    if device.type == "cpu":
        return default_cpu_bytes(), "half of the free memory, at most 4 GiB"
    activation_bytes = measure_activation_bytes(
        loaded.model,
        loaded.spec,
        cache_dtype=cache_dtype,
        block_size=config.cache.block_size,
        num_tokens=config.scheduler.max_num_batched_tokens,
        num_seqs=config.scheduler.max_num_seqs,
        max_model_len=max_model_len,
        device=device,
    )
    utilization = config.cache.gpu_memory_utilization
    free_bytes = default_cuda_bytes(device, utilization, activation_bytes)
    return free_bytes, f"--gpu-memory-utilization {utilization} less weights and activations"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _progress_sender(conn: Connection) -> Progress:
    """Sends progress, but no more often than a person can read: loading may report each tensor."""
    last_stage, last_s = "", 0.0

    def send(stage: str, done: int, total: int) -> None:
        nonlocal last_stage, last_s
        now_s = time.monotonic()
        if stage != last_stage or done >= total or now_s - last_s > PROGRESS_S:
            last_stage, last_s = stage, now_s
            conn.send(LoadProgress(stage=stage, done=done, total=total))

    return send


def _send_failure(conn: Connection, error: ErrorInfo) -> None:
    try:
        conn.send(WorkerFailed(error=error))
    except OSError:
        logger.error("%s", error.message)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches the whole process group; the parent started us with SIGINT blocked until we can ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _die_with_parent() -> None:
    """End at once when the parent has ended, even in the middle of a long step or of loading."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
