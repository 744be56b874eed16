import logging
import subprocess
import sys

import pytest
import torch

from kernels import dispatch
from kernels.dispatch import Implementation
from kernels.gpu import decode, dense, portable, register, selftest
from kernels.nf4 import quantize_4bit
from kernels.nf4_linear import nf4_linear


@pytest.fixture(autouse=True)
def no_implementations(monkeypatch):
    """Leave what is really registered alone."""
    monkeypatch.setattr(dispatch, "_implementations", {})
    monkeypatch.setattr(dispatch._registration, "is_done", True)


def registered():
    return {
        operation: [implementation.name for implementation in implementations]
        for operation, implementations in dispatch._implementations.items()
    }


def test_every_kernel_agrees_with_its_reference_and_is_registered(device, caplog):
    register.register_what_agrees(device)
    assert caplog.records == []
    assert registered() == {
        "nf4_linear": ["decode", "portable", "dense"],
        "linear": ["library"],
        "nf4_linear_add": ["decode"],
        "nf4_linear_silu": ["decode"],
        "nf4_linear_backward": ["dense"],
        "dequantize_4bit": ["triton"],
        "quantize_groups": ["triton"],
        "add_lora": ["triton"],
        "paged_attention": ["triton"],
        "paged_attention_fp8": ["triton"],
        "rotate_and_cache": ["triton"],
        "rms_norm": ["triton"],
        "add_rms_norm": ["triton"],
        "silu_and_mul": ["triton"],
        "rms_norm_backward": ["triton"],
        "silu_and_mul_backward": ["triton"],
        "truncate": ["triton"],
        "apply_bitmask": ["triton"],
        "choose_tokens": ["triton"],
    }


def test_a_kernel_that_is_wrong_or_fails_is_left_out_with_a_warning(device, caplog, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of resources")

    wrong = Implementation("decode", lambda *a: decode.run(*a) * 1.1, decode.accepts)
    failing = Implementation("fails", fails, lambda *_: True)
    fine = Implementation("portable", portable.run, portable.accepts)
    candidates = [
        ("nf4_linear", wrong, selftest.linear_few),
        ("nf4_linear_add", failing, selftest.add),
        ("nf4_linear", fine, selftest.linear_few),
    ]
    monkeypatch.setattr(register, "_candidates", lambda: candidates)
    with caplog.at_level(logging.WARNING):
        register.register_what_agrees(device)
    assert registered() == {"nf4_linear": ["portable"]}
    assert "'decode' is off, a slower one runs instead: results are" in caplog.text
    assert "RuntimeError: out of resources" in caplog.text


def test_the_operation_runs_what_was_registered(device):
    weight = quantize_4bit(torch.randn(40, 256)).to(device)
    x = torch.randn(3, 256).half().to(device)
    expected = nf4_linear(x, [weight], [None])
    dispatch.register("nf4_linear", Implementation("decode", decode.run, decode.accepts))
    actual = nf4_linear(x, [weight], [None])
    assert torch.equal(actual, decode.run(x, [weight], [None]))
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)


def test_kernels_import_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import kernels.nf4_linear, kernels.nf4_autograd, kernels.torch_ops, kernels.lora\n"
        "import kernels.gpu.register as r, logging; logging.basicConfig(); r.register_gpu()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Triton is not installed" in done.stderr


def test_where_the_batch_must_not_show_the_library_s_products_are_left_out(device, monkeypatch):
    weight = quantize_4bit(torch.randn(8, 256)).to(device)
    x, none = torch.randn(70, 256).half().to(device), [None]
    assert not decode.accepts(x, [weight], none)
    assert dense.accepts(x, [weight], none)
    assert dense.accepts_linear(x, x, None)
    for module in (decode, portable, dense):
        monkeypatch.setattr(module, "batch_invariant", lambda: True)
    assert decode.accepts(x, [weight], none)
    assert portable.accepts(x, [weight], none)
    assert not dense.accepts(x, [weight], none)
    assert not dense.accepts_linear(x, x, None)
