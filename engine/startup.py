"""From flags and a folder to an engine: load the model, size the KV cache, join the parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.api import AdapterRef, EngineInfo, RecordingProgress, TrainingJob
from engine.config import EngineConfig, ModelConfig
from engine.cuda_graphs import CudaGraphBackend
from engine.decode_graphs import DecodeGraphs
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
from engine.lora_source import LoraSource
from engine.memory import format_bytes
from engine.memory_plan import graph_reserve, lora_reserve
from engine.model import CausalLM
from engine.model_config import ModelSpec
from engine.model_runner import ModelRunner, measure_activation_bytes
from engine.sampler import Sampler
from engine.train.config import TrainConfig
from engine.train.rollouts import EngineRollouts
from engine.train.runner import JobRunner
from engine.train.trainer import Trainer
from engine.weights import LoadedModel, load_model
from kernels.threads import set_num_threads

LoadAdapterFiles = Callable[[AdapterRef], LoraWeights]
WriteAdapterFiles = Callable[[Path, LoraWeights, TrainConfig, str | None], None]
"""Writes the PEFT folder of an adapter that is being trained, with its chat template if it has its
own. Raises OSError."""
Progress = Callable[[str, int, int], None]


def create_engine(
    config: EngineConfig,
    folder: Path,
    load_adapter: LoadAdapterFiles,
    progress: Progress,
    report_recording: Callable[[RecordingProgress], None] = lambda _: None,
) -> tuple[Engine, EngineInfo]:
    """Load the model, size the KV cache and put the engine together.

    Args:
        config:           all flags.
        folder:           of the base model.
        load_adapter:     reads an adapter.
        progress:         told how far loading is.
        report_recording: told, later on, when a decode step is being recorded.

    Raises:
        CheckpointError: the model's folder cannot be loaded.
        NotEnoughMemory: weights or the KV cache of one sequence do not fit.
        EngineError: --device or --max-model-len asks for what there is not.
    """
    started_s = time.perf_counter()
    spec = ModelSpec.from_folder(folder)
    max_model_len = _max_model_len(config, spec.max_context_len)
    if config.cache.kv_cache_memory_bytes is not None:
        # Known beforehand: refuse before minutes of loading, not after.
        _num_blocks(config, spec, spec.dtype, max_model_len, 0, "")
    loaded = load_base(config.model, folder, progress)
    spec, model, device = loaded.spec, loaded.model, loaded.model.device
    pool = LoraPool(
        config.lora,
        model,
        load_adapter,
        fingerprint=loaded.fingerprint,
        device=device,
        dtype=model.dtype,
        budget_bytes=lora_reserve(spec, config.lora, model.dtype)
        if device.type == "cuda"
        else None,
    )
    block_size = config.cache.block_size
    cache_dtype = kv_cache_dtype(config.cache, model.dtype)
    reserves = _reserves(config, loaded, device, cache_dtype, max_model_len)
    free_bytes, free_means = _free_for_cache(config, device, sum(reserves.values()))
    num_blocks = _num_blocks(config, spec, model.dtype, max_model_len, free_bytes, free_means)
    progress("allocating the KV cache", 0, 1)
    kv_caches = allocate_kv_caches(
        spec, num_blocks=num_blocks, block_size=block_size, dtype=cache_dtype, device=device
    )
    progress("allocating the KV cache", 1, 1)
    graphs = None
    if device.type == "cuda" and not config.scheduler.enforce_eager:
        graphs = DecodeGraphs(
            model,
            kv_caches,
            pool,
            CudaGraphBackend(device),
            sizes=config.scheduler.graph_sizes,
            block_size=block_size,
            max_num_blocks=-(-max_model_len // block_size),
            device=device,
            budget_bytes=reserves["graphs"],
            report=report_recording,
        )
    sampler = Sampler()
    if device.type != "cpu":
        sampler.warm_up(spec.vocab_size, device)
    engine = Engine(
        config,
        ModelRunner(model, kv_caches, pool, block_size=block_size, device=device, graphs=graphs),
        sampler,
        GrammarCompiler(config.model.tokenizer or folder, spec.vocab_size, spec.eos_token_ids),
        pool,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        vocab_size=spec.vocab_size,
        eos_token_ids=spec.eos_token_ids,
    )
    kv_cache_bytes = num_blocks * block_bytes(spec, block_size, cache_dtype)
    memory = {"weights": loaded.weights_bytes, "KV cache": kv_cache_bytes, **reserves}
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
        kv_cache_bytes=kv_cache_bytes,
        memory=tuple(memory.items()),
        base_fingerprint=loaded.fingerprint,
        load_s=time.perf_counter() - started_s,
        quantization=loaded.quantization,
        notes=tuple(loaded.notes),
    )
    return engine, info


def create_runner(
    config: EngineConfig,
    engine: Engine,
    info: EngineInfo,
    source: LoraSource,
    write_adapter: WriteAdapterFiles,
) -> JobRunner:
    """What trains beside an engine, on the same base.

    Args:
        config:        of the engine.
        engine:        draws the answers of grpo.
        info:          about the engine.
        source:        what the engine reads adapters with.
        write_adapter: writes the folder of an adapter that is being trained.
    """
    model = engine.model
    assert isinstance(model, CausalLM)
    rollouts = EngineRollouts(engine, source)

    def make_trainer(job: TrainingJob) -> Trainer:
        return Trainer(
            job,
            model,
            base_fingerprint=info.base_fingerprint,
            max_model_len=info.max_model_len,
            load_adapter=source,
            write_adapter=lambda path, weights, settings: write_adapter(
                path, weights, settings, job.chat_template
            ),
            rollouts=rollouts,
        )

    runner = JobRunner(
        make_trainer,
        rollouts,
        source,
        max_stall_s=config.scheduler.train_max_stall_ms / 1e3,
        device=model.device,
    )
    engine.make_room = runner.make_room
    return runner


def load_base(config: ModelConfig, folder: Path, progress: Progress) -> LoadedModel:
    """Load the model where --device says, with as many threads as --threads says.

    Raises:
        CheckpointError: the model's folder cannot be loaded.
        NotEnoughMemory: the weights do not fit.
        EngineError: --device asks for what there is not.
    """
    device = _device(config)
    if device.type == "cpu":
        set_num_threads(config.threads)
    return load_model(config, folder, device, progress)


def _device(config: ModelConfig) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise EngineError(
            "--device cuda: this PyTorch finds no GPU. Use --device cpu, or a PyTorch built "
            "for your driver."
        )
    return torch.device("cuda" if has_cuda and config.device != "cpu" else "cpu")


def _max_model_len(config: EngineConfig, trained_len: int) -> int:
    asked = config.model.max_model_len
    if asked is not None and asked > trained_len:
        raise EngineError(
            f"--max-model-len {asked}: this model was made for {trained_len} tokens "
            f"(max_position_embeddings, times the factor of a linear rope scaling). "
            f"Ask for at most {trained_len}."
        )
    return asked or trained_len


def _num_blocks(
    config: EngineConfig,
    spec: ModelSpec,
    model_dtype: torch.dtype,
    max_model_len: int,
    free_bytes: int,
    free_means: str,
) -> int:
    """choose_num_blocks for this model; raises NotEnoughMemory."""
    cache_dtype = kv_cache_dtype(config.cache, model_dtype)
    return choose_num_blocks(
        config.cache,
        bytes_per_block=block_bytes(spec, config.cache.block_size, cache_dtype),
        max_model_len=max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        free_bytes=free_bytes,
        free_means=free_means,
    )


def _reserves(
    config: EngineConfig,
    loaded: LoadedModel,
    device: torch.device,
    cache_dtype: torch.dtype,
    max_model_len: int,
) -> dict[str, int]:
    """What a GPU has to keep free beside weights and KV cache, by name; nothing on the CPU."""
    if device.type == "cpu":
        return {}
    spec, dtype = loaded.spec, loaded.model.dtype
    activation_bytes = measure_activation_bytes(
        loaded.model,
        spec,
        cache_dtype=cache_dtype,
        block_size=config.cache.block_size,
        num_tokens=config.scheduler.max_num_batched_tokens,
        num_seqs=config.scheduler.max_num_seqs,
        max_model_len=max_model_len,
        device=device,
    )
    reserves = {
        "activations": activation_bytes,
        "adapters": lora_reserve(spec, config.lora, dtype),
        "graphs": graph_reserve(spec, config, dtype),
        "training": config.cache.training_memory_bytes or 0,
    }
    return {name: num_bytes for name, num_bytes in reserves.items() if num_bytes}


def _free_for_cache(
    config: EngineConfig, device: torch.device, reserved_bytes: int
) -> tuple[int, str]:
    """(bytes, where that number comes from)."""
    if device.type == "cpu":
        return default_cpu_bytes(), "half of the free memory, at most 4 GiB"
    utilization = config.cache.gpu_memory_utilization
    free_bytes = default_cuda_bytes(device, utilization, reserved_bytes)
    means = (
        f"--gpu-memory-utilization {utilization} less weights and {format_bytes(reserved_bytes)} "
        f"for activations, adapters (--max-loras), graphs (--enforce-eager) and training"
    )
    return free_bytes, means


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
