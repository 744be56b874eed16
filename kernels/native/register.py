"""Loads the native kernels, tries each on a small random case, and registers what agrees."""

from __future__ import annotations

import logging

from kernels.dispatch import Implementation, register, unregister
from kernels.native.build import BuildError

logger = logging.getLogger(__name__)

NAME = "native"
OPERATIONS = (
    "relayout", "prepare_weight", "dequantize_4bit", "nf4_linear", "has_int8_activations",
    "linear", "int8_linear", "rms_norm", "add_rms_norm", "apply_rotary", "silu_and_mul",
    "write_kv_cache", "paged_attention", "add_lora", "nucleus_floors", "prepare_decoder",
    "free_scratch",
)  # fmt: skip
TRAINING = (
    "nf4_linear_training", "nf4_linear_backward", "rms_norm_backward", "silu_and_mul_backward",
    "label_logps",
)  # fmt: skip
LAYOUT_NEEDS = {"relayout", "dequantize_4bit", "nf4_linear"}
"""Without all of these a weight keeps the checkpoint's layout."""


def register_native(instruction_set: str) -> None:
    """Register the native operations; where that is impossible, say why once and do without.

    Args:
        instruction_set: as kernels/native/library.py's load takes it.

    Raises:
        ValueError: an instruction set was asked for that this machine has not.
    """
    from kernels.native.library import load
    from kernels.native.operations import NativeOperations
    from kernels.native.self_test import failing_operations
    from kernels.native.training import NativeTraining
    from kernels.native.training_self_test import failing_training_operations

    try:
        library = load(instruction_set)
    except (BuildError, OSError) as error:
        logger.warning("Native CPU kernels are off, PyTorch is used, which is slower: %s", error)
        return
    operations, training = NativeOperations(library), NativeTraining(library)
    for owner, names in ((operations, OPERATIONS), (training, TRAINING)):
        for name in names:
            run, accepts = getattr(owner, name), getattr(owner, f"accepts_{name}")
            register(name, Implementation(NAME, run, accepts))
    failing = {*failing_operations(operations), *failing_training_operations(training, operations)}
    if failing:
        logger.warning(
            "Native CPU kernels disagree with the references and are not used: %s. Please report "
            "this with your processor and compiler.",
            ", ".join(sorted(failing)),
        )
        if failing & LAYOUT_NEEDS:
            failing |= LAYOUT_NEEDS | {"prepare_weight"}
        for name in failing | {"prepare_decoder"}:
            unregister(name, NAME)
