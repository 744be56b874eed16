"""Tries each Triton kernel on a small random case at start, and registers what agrees."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kernels.dispatch import Implementation, register

logger = logging.getLogger(__name__)


def register_gpu() -> None:
    """Register the kernels that work here; where Triton is missing, say so once."""
    try:
        import triton  # noqa: F401
    except ImportError:
        logger.warning("Triton is not installed: the GPU runs PyTorch references, which is slow.")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    register_what_agrees(device)


def register_what_agrees(device: torch.device) -> None:
    """Register each kernel that passes its self-test on this device."""
    for operation, implementation, test in _candidates():
        problem = find_problem(partial(test, implementation.run, implementation.accepts, device))
        if problem is None:
            register(operation, implementation)
        else:
            logger.warning(
                "%s: the kernel %r is off, a slower one runs instead: %s",
                operation, implementation.name, problem,
            )  # fmt: skip


def find_problem(test: Callable[[], str | None]) -> str | None:
    """What a self-test found, exceptions included: compiling and launching can fail in any way."""
    try:
        return test()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _candidates() -> list[tuple[str, Implementation, Callable[..., str | None]]]:
    """(operation, implementation, self-test), the fastest of an operation first."""
    from kernels.gpu import (
        attention,
        choice,
        codec,
        decode,
        dense,
        epilogues,
        lora,
        portable,
        rotary,
        rows,
        rows_backward,
        sampling,
        selftest,
        selftest_choice,
        selftest_training,
    )
    from kernels.gpu import selftest_layers as layers

    def entry(operation: str, name: str, run: Any, accepts: Any, test: Any) -> Any:
        return operation, Implementation(name, run, accepts), test

    return [
        entry("nf4_linear", "decode", decode.run, decode.accepts, selftest.linear),
        entry("nf4_linear", "portable", portable.run, portable.accepts, selftest.linear_few),
        entry("nf4_linear", "dense", dense.run, dense.accepts, selftest.linear_many),
        entry("linear", "library", dense.run_linear, dense.accepts_linear, selftest.plain),
        entry("nf4_linear_add", "decode", epilogues.run_add, epilogues.accepts_add, selftest.add),
        entry(
            "nf4_linear_silu", "decode", epilogues.run_silu, epilogues.accepts_silu, selftest.silu
        ),
        entry(
            "nf4_linear_backward", "dense", dense.run_backward, dense.accepts_backward,
            selftest.backward,
        ),
        entry(
            "dequantize_4bit", "triton", codec.dequantize, codec.accepts_dequantize,
            selftest.dequantize,
        ),
        entry(
            "quantize_groups", "triton", codec.quantize_groups, codec.accepts_quantize,
            selftest.quantize,
        ),
        entry("add_lora", "triton", lora.run, lora.accepts, selftest.lora),
        entry("paged_attention", "triton", attention.run, attention.accepts, layers.attention),
        entry(
            "paged_attention_fp8", "triton", attention.run, attention.accepts,
            layers.attention_fp8,
        ),
        entry("rotate_and_cache", "triton", rotary.run, rotary.accepts, layers.rotary),
        entry("rms_norm", "triton", rows.rms_norm, rows.accepts_rms_norm, layers.rms_norm),
        entry(
            "add_rms_norm", "triton", rows.add_rms_norm, rows.accepts_add_rms_norm,
            layers.add_rms_norm,
        ),
        entry(
            "silu_and_mul", "triton", rows.silu_and_mul, rows.accepts_silu_and_mul,
            layers.silu_and_mul,
        ),
        entry(
            "rms_norm_backward", "triton", rows_backward.rms_norm_backward,
            rows_backward.accepts_rms_norm_backward, selftest_training.rms_norm_backward,
        ),
        entry(
            "silu_and_mul_backward", "triton", rows_backward.silu_and_mul_backward,
            rows_backward.accepts_silu_and_mul_backward, selftest_training.silu_and_mul_backward,
        ),
        entry(
            "truncate", "triton", sampling.truncate, sampling.accepts_truncate, layers.truncate
        ),
        entry(
            "apply_bitmask", "triton", sampling.apply_bitmask, sampling.accepts_bitmask,
            layers.bitmask,
        ),
        entry(
            "choose_tokens", "triton", choice.run, choice.accepts, selftest_choice.choose_tokens
        ),
    ]  # fmt: skip
