"""Loading a base model: what is asked for, what the folder has, what fits; then tensor by tensor.

A 16-bit folder is quantised while it streams in and its 4-bit copy kept
(engine/quantized_cache.py); a bitsandbytes 4-bit folder is taken as it is. Peak host memory is the
loaded model and the largest single tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.checkpoint import Checkpoint
from engine.config import ModelConfig
from engine.embedding import can_stay
from engine.errors import CheckpointError
from engine.fingerprint import Fingerprint
from engine.head import HeadDtype, check_head, extra_head_bytes
from engine.json_fields import read_json_object
from engine.memory import (
    available_device_bytes,
    available_host_bytes,
    check_memory,
    estimate_weights_bytes,
    return_freed_memory,
)
from engine.model import CausalLM
from engine.model_config import DTYPES, ModelSpec, declared_dtype
from engine.quantize import checkpoint_dtype, read_tensors, stored_quantization
from engine.quantized_cache import CacheWriter, cached_folder, default_cache_dir, open_cached
from engine.quantized_folder import QuantSettings
from engine.tensor_plan import EMBEDDING, HEAD, TensorPlan, plan_tensors
from kernels.nf4 import QuantizedWeight, dequantize_4bit
from kernels.nf4_linear import has_int8_activations, takes_int8_activations


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run."""

    model: CausalLM
    spec: ModelSpec
    """With the dtype that the model runs in."""
    fingerprint: str
    """Hash of the base's weights (engine/fingerprint.py)."""
    weights_bytes: int
    """Memory that the weights take on the device."""
    quantization: str
    """nf4, fp4 or none: how the linear layers are held."""
    notes: tuple[str, ...]
    """For the operator: where a copy was cached, why a type was chosen."""


def load_model(
    config: ModelConfig,
    folder: Path,
    device: torch.device | str,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> LoadedModel:
    """Load a Hugging Face model folder.

    Args:
        config: dtype, quantization, cpu_activations, lm_head_dtype and quantized_cache_dir are
            used here.
        folder: with config.json and safetensors files.
        device: where the model is to run.
        progress: called as (stage, bytes done, bytes in total).

    Raises:
        CheckpointError: the folder cannot be served; the message names file, tensor and remedy.
        NotEnoughMemory: computed before any weight is read.
    """
    device = torch.device(device)
    notes: list[str] = []
    spec = ModelSpec.from_folder(folder)
    raw_config = read_json_object(folder / "config.json")
    says_4bit = stored_quantization(folder / "config.json", raw_config)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint(folder))
        plan = plan_tensors(checkpoint, spec)
        if says_4bit and not plan.quantized:
            raise CheckpointError(
                f"{folder / 'config.json'}: quantization_config announces 4-bit weights, but no "
                f"tensor has a quant_state. Download the folder again, or remove "
                f"quantization_config if the weights are 16-bit."
            )
        quantization = _choose_quantization(config.quantization, plan, folder)
        stored_dtype = declared_dtype(raw_config) or checkpoint_dtype(checkpoint, plan)
        dtype = _choose_dtype(config.dtype, stored_dtype, device, notes)
        if config.cpu_activations == "int8":
            _check_int8_activations(quantization, device)
        settings = None
        if quantization != "none" and not plan.quantized:
            settings = QuantSettings(quant_type=quantization)  # type: ignore[arg-type]
        cache: Path | None = None
        if settings is not None:
            cache_dir = config.quantized_cache_dir
            root = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
            cache = cached_folder(root, folder, checkpoint, settings)
            opened = open_cached(cache, plan.spec, notes)
            if opened is not None:
                checkpoint, plan = stack.enter_context(opened[0]), opened[1]
                settings = None
        quantized_sizes = {name: weight.num_bytes for name, weight in plan.quantized.items()}
        weights_bytes = estimate_weights_bytes(
            plan.spec, quantization, dtype, quantized=quantized_sizes or None
        )
        head_dtype = check_head(
            config.lm_head_dtype, {name: w.quant_type for name, w in plan.quantized.items()}
        )
        weights_bytes += extra_head_bytes(plan.spec, dtype, head_dtype)
        table = _table_to_leave(checkpoint, plan, head_dtype, device)
        if table is not None:
            weights_bytes -= math.prod(plan.spec.embedding_shape) * dtype.itemsize
        _check_memory(folder, checkpoint, plan, quantization, weights_bytes, device)
        writer = None
        if settings is not None and cache is not None:
            disk_bytes = estimate_weights_bytes(plan.spec, quantization, stored_dtype)
            writer = CacheWriter(cache, folder, settings, stored_dtype, disk_bytes, notes)
            stack.callback(writer.close)
        model = CausalLM(dataclasses.replace(plan.spec, dtype=dtype), device=device, dtype=dtype)
        fingerprint = Fingerprint()
        stage = "Loading weights" if settings is None else f"Quantising to {quantization.upper()}"
        takes_int8: list[bool] = []
        for name, value in read_tensors(checkpoint, plan, settings, stage=stage, progress=progress):
            fingerprint.add(name, value)
            if writer is not None:
                writer.add(name, value)
            if isinstance(value, QuantizedWeight) and quantization == "none":
                value = dequantize_4bit(value, dtype)
            elif (
                isinstance(value, QuantizedWeight)
                and config.cpu_activations == "int8"
                and name != HEAD
            ):
                takes_int8.append(takes_int8_activations(value))
                value = dataclasses.replace(value, int8_activations=takes_int8[-1])
            if name == EMBEDDING and table is not None:
                model.embed_tokens = checkpoint.table(table, dtype)
            else:
                model.set_tensor(name, value)
            del value
        model.finish(head_dtype)
        if head_dtype != "auto":
            notes.append(f"The output head is held in {head_dtype} (--lm-head-dtype).")
        if takes_int8:
            notes.append(_int8_activations_note(takes_int8))
        if writer is not None:
            writer.finish()
    return_freed_memory()
    return LoadedModel(
        model=model,
        spec=model.spec,
        fingerprint=fingerprint.hexdigest(),
        weights_bytes=weights_bytes,
        quantization=quantization,
        notes=tuple(notes),
    )


def _choose_quantization(asked: str, plan: TensorPlan, folder: Path) -> str:
    """nf4, fp4 or none.

    Raises:
        CheckpointError: a 4-bit checkpoint would have to be converted to the other 4-bit type.
    """
    stored = sorted({weight.quant_type for weight in plan.quantized.values()})
    if not stored:
        return "nf4" if asked == "auto" else asked
    if asked in ("nf4", "fp4") and stored != [asked]:
        raise CheckpointError(
            f"{folder}: --quantization {asked} was asked for, but the checkpoint is "
            f"{' and '.join(stored)}; converting would lose accuracy twice. "
            f"Use --quantization auto, or take the 16-bit original."
        )
    # Where a checkpoint has both, most weights decide the name; each runs as it is stored.
    types = [weight.quant_type for weight in plan.quantized.values()]
    return "none" if asked == "none" else max(stored, key=types.count)


def _choose_dtype(
    asked: str, stored: torch.dtype, device: torch.device, notes: list[str]
) -> torch.dtype:
    """The type to run in. On a CPU float16 is slow: 15 times bfloat16's time for 256 tokens,
    measured with torch 2.13 on a Zen 5 core.
    """
    if asked != "auto":
        return DTYPES[asked]
    if device.type == "cpu" and stored is torch.float16:
        notes.append(
            "This float16 model runs in bfloat16, as float16 is slow on CPUs; --dtype overrides."
        )
        return torch.bfloat16
    return stored


def _table_to_leave(
    checkpoint: Checkpoint, plan: TensorPlan, head_dtype: HeadDtype, device: torch.device
) -> str | None:
    """The embedding's name in the checkpoint, if its rows shall be read from there.

    A step reads the whole of a head, so one that is the embedding has to be in memory.
    """
    source = plan.sources[EMBEDDING]
    assert isinstance(source, str), "an embedding is dense"
    is_head = plan.spec.tie_word_embeddings and head_dtype == "auto"
    stays = device.type == "cpu" and not is_head and can_stay(checkpoint.tensors[source])
    return source if stays else None


def _check_int8_activations(quantization: str, device: torch.device) -> None:
    """Raises CheckpointError where --cpu-activations int8 would have no effect."""
    problem = None
    if device.type != "cpu":
        problem = "the model runs on a GPU, whose kernels multiply 16-bit activations"
    elif quantization == "none":
        problem = "only 4-bit weights are multiplied so, and --quantization none has none"
    elif not has_int8_activations():
        problem = (
            "this processor has no AVX-512 VNNI and BF16, or the native kernels are off (the log "
            "says why)"
        )
    if problem is not None:
        raise CheckpointError(f"--cpu-activations int8: {problem}. Leave the flag out.")


def _int8_activations_note(takes: list[bool]) -> str:
    """What --cpu-activations int8 comes to; raises CheckpointError where it is nothing."""
    if not any(takes):
        raise CheckpointError(
            "--cpu-activations int8: no weight of this model has rows of whole groups of 64. Leave "
            "the flag out."
        )
    which = "all" if all(takes) else f"{sum(takes)} of {len(takes)}"
    return f"Activations are rounded to 8 bits for {which} 4-bit layers (--cpu-activations int8)."


def _check_memory(
    folder: Path,
    checkpoint: Checkpoint,
    plan: TensorPlan,
    quantization: str,
    weights_bytes: int,
    device: torch.device,
) -> None:
    """Raises NotEnoughMemory when the weights, or what passes through the host, will not fit."""
    largest = max(plan.stored_bytes(checkpoint, name) for name in plan.sources)
    remedy = "Free memory or choose a smaller base model."
    if quantization == "none":
        remedy = "Use --quantization nf4, free memory or choose a smaller base model."
    what = f"Loading {folder.name} ({quantization if quantization != 'none' else 'not quantised'})"
    host_bytes = largest + (weights_bytes if device.type == "cpu" else 0)
    if device.type != "cpu":
        check_memory(
            what,
            weights_bytes,
            available_device_bytes(device),
            where=f"memory on {device}",
            remedy=remedy,
        )
    check_memory(what, host_bytes, available_host_bytes(), where="host memory", remedy=remedy)
