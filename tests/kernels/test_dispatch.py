import pytest
import torch

from kernels import dispatch
from kernels.attention_input import rotate_and_cache
from kernels.dispatch import Implementation, check
from kernels.fused import add_rms_norm, apply_rotary, rms_norm, silu_and_mul
from kernels.linear import linear
from kernels.lora import add_lora
from kernels.nf4 import dequantize_4bit, quantize_4bit
from kernels.nf4_linear import nf4_linear
from kernels.paged_attention import paged_attention, write_kv_cache
from kernels.sampling import apply_bitmask
from kernels.truncation import truncate


@pytest.fixture(autouse=True)
def no_implementations(monkeypatch):
    """Leave what is really registered alone, and read HERD_KERNELS afresh."""
    monkeypatch.setattr(dispatch, "_implementations", {})
    monkeypatch.delenv("HERD_KERNELS", raising=False)
    dispatch._choice.cache_clear()
    yield
    dispatch._choice.cache_clear()


def double(x):
    return "reference", 2 * x


def small_only():
    return Implementation("small", lambda x: ("small", 2 * x), lambda x: x < 10)


def test_the_reference_runs_where_nothing_is_registered():
    assert dispatch.dispatch("double", double, 3) == ("reference", 6)


def test_an_implementation_runs_where_it_accepts_and_the_reference_where_it_declines():
    dispatch.register("double", small_only())
    assert dispatch.dispatch("double", double, 3) == ("small", 6)
    assert dispatch.dispatch("double", double, 30) == ("reference", 60)


def test_the_implementation_registered_first_is_asked_first():
    dispatch.register("double", small_only())
    dispatch.register("double", Implementation("any", lambda x: ("any", 2 * x), lambda _: True))
    assert dispatch.dispatch("double", double, 3) == ("small", 6)
    assert dispatch.dispatch("double", double, 30) == ("any", 60)


def test_a_withdrawn_implementation_runs_no_more():
    dispatch.register("double", small_only())
    dispatch.unregister("double", "small")
    assert dispatch.dispatch("double", double, 3) == ("reference", 6)


def test_the_environment_can_ask_for_references_alone(monkeypatch):
    dispatch.register("double", small_only())
    monkeypatch.setenv("HERD_KERNELS", "reference")
    assert dispatch.dispatch("double", double, 3) == ("reference", 6)


def test_a_meaningless_environment_is_refused(monkeypatch):
    dispatch.register("double", small_only())
    monkeypatch.setenv("HERD_KERNELS", "fast")
    message = "HERD_KERNELS: expected auto, reference or invariant, got fast"
    with pytest.raises(ValueError, match=message):
        dispatch.dispatch("double", double, 3)


X, HEADS, CACHE = torch.ones(2, 64), torch.ones(2, 4, 16), torch.ones(1, 16, 4, 16)
WEIGHT = quantize_4bit(torch.ones(8, 64))
INDICES = torch.zeros(2, dtype=torch.int32)
CACHE8, SCALES = CACHE.to(torch.float8_e4m3fn), torch.ones(1, 16, 4, dtype=torch.uint8)
OPERATIONS = {
    "dequantize_4bit": lambda: dequantize_4bit(WEIGHT),
    "linear": lambda: linear(X, torch.ones(8, 64)),
    "nf4_linear": lambda: nf4_linear(X, [WEIGHT], [None]),
    "add_lora": lambda: add_lora(X.clone(), X, [], INDICES, torch.ones(2)),
    "write_kv_cache": lambda: write_kv_cache(HEADS, HEADS, CACHE, CACHE, torch.arange(2)),
    "paged_attention": lambda: paged_attention(
        HEADS, CACHE, CACHE, INDICES[:1, None], INDICES[:1] + 2, INDICES + torch.tensor([0, 2]),
        scale=1.0,
    ),
    "rms_norm": lambda: rms_norm(X, torch.ones(64), 1e-6),
    "add_rms_norm": lambda: add_rms_norm(X, X, torch.ones(64), 1e-6),
    "apply_rotary": lambda: apply_rotary(HEADS, HEADS, torch.ones(2, 8), torch.ones(2, 8)),
    "silu_and_mul": lambda: silu_and_mul(X),
    "rotate_and_cache": lambda: rotate_and_cache(
        HEADS, HEADS, HEADS, torch.ones(2, 8), torch.ones(2, 8), CACHE, CACHE, torch.arange(2)
    ),
    "write_fp8_cache": lambda: write_kv_cache(
        HEADS, HEADS, CACHE8, CACHE8, torch.arange(2), (SCALES, SCALES)
    ),
    "paged_attention_fp8": lambda: paged_attention(
        HEADS, CACHE8, CACHE8, INDICES[:1, None], INDICES[:1] + 2, INDICES + torch.tensor([0, 2]),
        scale=1.0, kv_scales=(SCALES, SCALES),
    ),
    "truncate": lambda: truncate(X, top_k=torch.ones(2).long()),
    "apply_bitmask": lambda: apply_bitmask(X.clone(), [1], torch.zeros(1, 2).int()),
}  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_can_be_taken_over(operation):
    runs = []
    declines = Implementation("declines", lambda *_: runs.append("declines"), lambda *_: False)
    accepts = Implementation("accepts", lambda *_: runs.append("accepts"), lambda *_: True)
    dispatch.register(operation, declines)
    OPERATIONS[operation]()
    assert runs == []
    dispatch.register(operation, accepts)
    OPERATIONS[operation]()
    assert runs == ["accepts"]


def test_check_says_what_was_expected_and_what_was_found():
    check(True, "x.shape", (2, 3), (2, 3))
    with pytest.raises(ValueError, match=r"x.shape: expected \(2, 3\), got \(3, 2\)"):
        check(False, "x.shape", (2, 3), tuple(torch.empty(3, 2).shape))
