"""Turning a 16-bit checkpoint into a 4-bit one in bitsandbytes' format, tensor by tensor.

transformers loads what is written here, as if it had quantised and saved the model itself: linear
layers but the head in 4 bits, embeddings, norms, biases and the head as they were. Peak memory is
one output file (1 GB) and one tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from engine.bnb_format import StoredWeight
from engine.checkpoint import Checkpoint
from engine.errors import CheckpointError
from engine.json_fields import read_json_object
from engine.memory import estimate_weights_bytes
from engine.model_config import ModelSpec, declared_dtype
from engine.quantized_folder import QuantizedFolder, QuantSettings
from engine.shard_writer import MAX_SHARD_BYTES
from engine.tensor_plan import EMBEDDING, TensorPlan, plan_tensors
from kernels.codebooks import QuantType
from kernels.nf4 import QuantizedWeight, quantize_4bit

Progress = Callable[[str, int, int], None]
"""(stage, bytes done, bytes in total)."""


def stored_quantization(config_path: Path, config: dict[str, Any]) -> bool:
    """Whether config.json says that the weights are 4-bit.

    Raises:
        CheckpointError: they are quantised in a way that is not supported.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return False
    remedy = "Take the 16-bit original, or a bitsandbytes 4-bit checkpoint."
    if not isinstance(settings, dict):
        raise CheckpointError(f"{config_path}: quantization_config: expected an object. {remedy}")
    is_4bit = settings.get("load_in_4bit", settings.get("_load_in_4bit", False))
    is_8bit = settings.get("load_in_8bit", settings.get("_load_in_8bit", False))
    # Early files have no quant_method: then load_in_4bit or load_in_8bit names bitsandbytes.
    method = settings.get("quant_method", "bitsandbytes" if is_4bit or is_8bit else None)
    if method == "bitsandbytes" and not is_4bit and not is_8bit:
        return False  # left behind in a copy that was dequantised
    if method != "bitsandbytes" or is_8bit:
        found = f"{method} with load_in_8bit" if is_8bit else str(method)
        raise CheckpointError(
            f"{config_path}: quantization_config: found quant_method {found}; supported is "
            f"bitsandbytes with load_in_4bit (nf4 or fp4). {remedy}"
        )
    return True


def read_tensors(
    checkpoint: Checkpoint,
    plan: TensorPlan,
    settings: QuantSettings | None,
    *,
    stage: str,
    progress: Progress,
) -> Iterator[tuple[str, torch.Tensor | QuantizedWeight]]:
    """The model's tensors one after another, dense ones quantised where settings say so.

    Raises:
        CheckpointError: a tensor cannot be read, or not be quantised.
    """
    total = sum(plan.stored_bytes(checkpoint, name) for name in plan.sources)
    quantizable = plan.spec.quantizable_weights() if settings is not None else frozenset()
    done = 0
    progress(stage, 0, total)
    for name, source in plan.sources.items():
        value: torch.Tensor | QuantizedWeight
        if isinstance(source, StoredWeight):
            value = source.read(checkpoint)
        else:
            value = checkpoint.read(source)
            if settings is not None and name in quantizable:
                value = _quantize(checkpoint, source, value, settings)
        yield name, value
        del value  # the caller decides how long it lives
        done += plan.stored_bytes(checkpoint, name)
        progress(stage, done, total)


def _quantize(
    checkpoint: Checkpoint, name: str, weight: torch.Tensor, settings: QuantSettings
) -> QuantizedWeight:
    try:
        return quantize_4bit(
            weight, quant_type=settings.quant_type, double_quant=settings.double_quant
        )
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.tensors[name].file}: tensor {name} cannot be quantised: {error}. "
            f"The checkpoint is damaged; download it again."
        ) from error


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    quant_type: QuantType = "nf4",
    double_quant: bool = True,
    progress: Progress = lambda *_: None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a 4-bit copy of a 16- or 32-bit model folder.

    Args:
        src: folder in Hugging Face format.
        dst: where to; must not exist, or be empty. It appears at once, when everything is written.
        quant_type: nf4 or fp4.
        double_quant: store the scales in 8 bits.
        progress: called as (stage, bytes done, bytes in total).
        max_shard_bytes: weights are split into files of about this size.

    Raises:
        CheckpointError: src is no supported 16-bit checkpoint, or dst is in use or cannot be
            written.
        ValueError: quant_type is unknown.
    """
    src, dst = Path(src), Path(dst).absolute()
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type: expected nf4 or fp4, got {quant_type!r}")
    settings = QuantSettings(quant_type=quant_type, double_quant=double_quant)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise CheckpointError(
            f"{dst} exists and is not an empty folder. Choose another destination or remove it."
        )
    spec = ModelSpec.from_folder(src)
    config = read_json_object(src / "config.json")
    with Checkpoint(src) as checkpoint:
        plan = plan_tensors(checkpoint, spec)
        if stored_quantization(src / "config.json", config) or plan.quantized:
            raise CheckpointError(
                f"{src} holds 4-bit weights already; quantising twice would lose accuracy. "
                f"Serve it as it is, or quantise the 16-bit original."
            )
        dtype = declared_dtype(config) or checkpoint_dtype(checkpoint, plan)
        partial = dst.with_name(f".{dst.name}.partial-{os.getpid()}")
        try:
            with QuantizedFolder(src, partial, settings, dtype, max_shard_bytes) as folder:
                folder.check_space(estimate_weights_bytes(plan.spec, quant_type, dtype))
                for name, value in read_tensors(
                    checkpoint,
                    plan,
                    settings,
                    stage=f"Quantising to {quant_type.upper()}",
                    progress=progress,
                ):
                    folder.add(name, value)
                folder.publish(dst)
        except OSError as error:
            raise CheckpointError(
                f"{dst}: cannot be written: {error}. Free some space or choose another destination."
            ) from error


def checkpoint_dtype(checkpoint: Checkpoint, plan: TensorPlan) -> torch.dtype:
    """The type of the stored embedding, for a config.json that names none."""
    source = plan.sources[EMBEDDING]
    assert isinstance(source, str)
    codes = {"F16": torch.float16, "BF16": torch.bfloat16}
    return codes.get(checkpoint.tensors[source].dtype, torch.float32)
