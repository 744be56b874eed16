import functools
from dataclasses import replace

import pytest
import torch

from kernels.codebooks import codebook
from kernels.fused import silu_and_mul_reference
from kernels.gpu import decode, dense, epilogues, portable
from kernels.gpu import device as gpu
from kernels.nf4 import decode_absmax, quantize_4bit
from kernels.nf4_autograd import nf4_linear_backward_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding to the type; of sums in bfloat16 under the interpreter, which truncates, two.
NOISE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@functools.cache
def weight_of(rows, columns, quant_type="nf4", double_quant=True, group_size=64, device="cpu"):
    return quantize_4bit(
        randn(rows, columns, seed=rows) * 0.1,
        quant_type=quant_type, double_quant=double_quant, group_size=group_size,
    ).to(device)  # fmt: skip


def exact(weight, dtype=None):
    """The weight in float64: codebook (rounded to dtype, if given) times scale."""
    values = codebook(weight.quant_type)
    values = (values if dtype is None else values.to(dtype)).double()
    packed = weight.packed.cpu().long()
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1)[: weight.numel]
    scales = decode_absmax(weight).cpu().double().repeat_interleave(weight.group_size)
    return (values[codes] * scales[: weight.numel]).view(weight.shape)


def product(x, weights, biases, dtype=None):
    parts = [
        x.cpu().double() @ exact(w, dtype).T + (0 if b is None else b.cpu().double())
        for w, b in zip(weights, biases, strict=True)
    ]
    return torch.cat(parts, dim=1)


def assert_close(actual, expected, dtype):
    limit = NOISE[dtype] * expected.abs().max()
    assert (actual.cpu().double() - expected).abs().max() <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_decode_multiplies_with_what_the_codes_stand_for(
    dtype, quant_type, double_quant, num_tokens, device
):
    if dtype == torch.float32 and device.type == "cuda":
        pytest.skip("float32 is for the interpreter")
    weight = weight_of(45, 512, quant_type, double_quant, device=device)
    x = randn(num_tokens, 512, seed=1, dtype=dtype).to(device)
    assert decode.accepts(x, [weight], [None])
    actual = decode.run(x, [weight], [None])
    assert actual.dtype == dtype
    assert_close(actual, product(x, [weight], [None], dtype), dtype)


@pytest.mark.parametrize("num_tokens", [1, 12, 33])
def test_slices_with_their_own_offsets_and_biases_in_one_launch(num_tokens, device):
    weights = [weight_of(rows, 768, device=device) for rows in (64, 1, 33)]
    biases = [randn(64).half().to(device), None, randn(33).half().to(device)]
    x = randn(num_tokens, 768, seed=1).half().to(device)
    actual = decode.run(x, weights, biases)
    assert_close(actual, product(x, weights, biases, torch.float16), torch.float16)


@pytest.mark.parametrize("rows", [1, 31, 32, 100])
def test_one_row_and_ragged_tiles(rows, device):
    weight, x = weight_of(rows, 256, device=device), randn(2, 256, seed=1).half().to(device)
    actual = decode.run(x, [weight], [None])
    assert_close(actual, product(x, [weight], [None], torch.float16), torch.float16)


@pytest.mark.parametrize("programs_per_sm", [1, 2, 5, 100])
def test_work_dealt_out_in_any_way_gives_the_sum(programs_per_sm, device):
    plan = replace(gpu.decode_plan(device), programs_per_sm=programs_per_sm)
    weight, x = weight_of(100, 1280, device=device), randn(3, 1280, seed=1).half().to(device)
    actual = decode.launch(x, [weight], [None], plan=plan)
    assert_close(actual, product(x, [weight], [None], torch.float16), torch.float16)


def test_the_counters_are_zero_again_after_a_launch(device):
    weight, x = weight_of(100, 512, device=device), randn(40, 512).half().to(device)
    decode.run(x, [weight], [None])
    assert not gpu.counters(device, 1).any()


def test_counters_that_a_graph_uses_stay_where_they_are(monkeypatch):
    monkeypatch.setattr(gpu, "_zeros", {})
    monkeypatch.setattr(gpu, "_outgrown", [])
    cpu = torch.device("cpu")
    first = gpu.counters(cpu, 5)
    monkeypatch.setattr(gpu, "_is_capturing", lambda _: True)
    assert gpu.counters(cpu, len(first)) is first, "no launch to clear others"
    many = 2 * len(first)
    assert gpu.counters(cpu, many) is not gpu.counters(cpu, many), "of each launch's own"
    monkeypatch.setattr(gpu, "_is_capturing", lambda _: False)
    assert gpu.counters(cpu, many) is gpu.counters(cpu, many)
    assert gpu._outgrown[0] is first, "a graph may still use them"


@pytest.mark.parametrize("num_tokens", [8, 9, 16, 17, 33])
def test_a_token_has_the_same_bits_alone_and_in_company(num_tokens, device):
    weights = [weight_of(rows, 512, device=device) for rows in (40, 24)]
    x = randn(num_tokens, 512, seed=1).half().to(device)
    together = decode.run(x, weights, [None, None])
    for place in (0, num_tokens - 1):
        alone = decode.run(x[place : place + 1], weights, [None, None])
        assert torch.equal(alone[0], together[place])


def test_silu_of_the_gate_times_the_up_is_what_separate_kernels_give(device):
    weights = [weight_of(45, 512, device=device), weight_of(45, 512, "nf4", device=device)]
    weights[1] = quantize_4bit(randn(45, 512, seed=9) * 0.1).to(device)
    biases = [randn(45, seed=3).half().to(device), None]
    x = randn(5, 512, seed=1).half().to(device)
    expected = silu_and_mul_reference(decode.run(x, weights, biases))
    actual = epilogues.run_silu(x, weights, biases)
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("num_tokens", [3, 40])
def test_the_residual_is_added_to_the_rounded_product(num_tokens, device):
    weight, x = weight_of(45, 512, device=device), randn(num_tokens, 512).half().to(device)
    residual = randn(num_tokens, 45, seed=2).half().to(device)
    expected = decode.run(x, [weight], [None]) + residual
    actual = epilogues.run_add(x, [weight], [None], residual)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (7, 72), (33, 200), (5, 1056)])
def test_portable_takes_rows_of_any_multiple_of_eight(
    dtype, quant_type, double_quant, rows, columns, device
):
    weight = weight_of(rows, columns, quant_type, double_quant, device=device)
    x = randn(3, columns, seed=1, dtype=dtype).to(device)
    assert portable.accepts(x, [weight], [None])
    actual = portable.run(x, [weight], [None])
    assert_close(actual, product(x, [weight], [None]), dtype)


@pytest.mark.parametrize("group_size", [32, 128, 256])
def test_portable_takes_other_groups_and_slices_with_biases(group_size, device):
    weights = [weight_of(r, 264, group_size=group_size, device=device) for r in (9, 4)]
    biases, x = [None, randn(4).to(device)], randn(2, 264, seed=1).to(device)
    actual = portable.run(x, weights, biases)
    assert_close(actual, product(x, weights, biases), torch.float32)


def test_a_token_of_the_portable_kernel_has_the_same_bits_in_company(device):
    weight, x = weight_of(9, 264, device=device), randn(4, 264).to(device)
    together = portable.run(x, [weight], [None])
    assert torch.equal(portable.run(x[2:3], [weight], [None])[0], together[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 80), (7, 37), (16, 48)])  # groups that straddle rows
def test_many_tokens_meet_the_expanded_weights(dtype, shape, device):
    weights = [weight_of(*shape, device=device), weight_of(5, shape[1], "fp4", device=device)]
    biases = [None, randn(5, dtype=dtype).to(device)]
    x = randn(21, shape[1], seed=1, dtype=dtype).to(device)
    actual = dense.run(x, weights, biases)
    assert_close(actual, product(x, weights, biases), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_x_is_the_product_with_the_expanded_weights(dtype, device):
    weights = [weight_of(33, 80, device=device), weight_of(5, 80, device=device)]
    grad = randn(6, 38, dtype=dtype).to(device)
    on_cpu = [weight.to("cpu") for weight in weights]
    expected = nf4_linear_backward_reference(grad.cpu().float(), on_cpu)
    assert_close(dense.run_backward(grad, weights), expected.double(), torch.bfloat16)


def test_tokens_that_are_not_contiguous(device):
    weight = weight_of(45, 512, device=device)
    x = randn(512, 3, seed=1).half().to(device).T
    for kernel in (decode, portable, dense):
        actual = kernel.run(x, [weight], [None])
        assert_close(actual, product(x, [weight], [None], torch.float16), torch.bfloat16)


def test_the_scratch_buffer_is_used_again(device):
    large, small = gpu.scratch(device, torch.float16, 5000), gpu.scratch(device, torch.float16, 7)
    assert large.data_ptr() == small.data_ptr()
    assert len(small) == 7


def test_an_empty_batch_gives_an_empty_result(device):
    weight, x = weight_of(45, 512, device=device), torch.empty(0, 512, device=device).half()
    for implementation in (decode, portable, dense):
        assert implementation.run(x, [weight], [None]).shape == (0, 45)


@pytest.mark.parametrize(
    "weights",
    [
        [(8, 192, "nf4", True, 64)],  # not a multiple of 256
        [(8, 256, "nf4", True, 128)],  # another group size
        [(8, 256, "nf4", True, 64), (8, 256, "fp4", True, 64)],  # two tables
        [(8, 256, "nf4", True, 64), (8, 256, "nf4", False, 64)],
        [(8, 256, "nf4", True, 64)] * 4,
    ],
)
def test_decode_declines_what_it_is_not_made_for(weights, device):
    weights = [weight_of(*what, device=device) for what in weights]
    x = torch.zeros(1, weights[0].shape[1], device=device).half()
    assert not decode.accepts(x, weights, [None] * len(weights))


def test_decode_leaves_many_tokens_to_the_dense_product(device):
    weight = weight_of(8, 256, device=device)
    assert decode.accepts(torch.zeros(64, 256, device=device).half(), [weight], [None])
    assert not decode.accepts(torch.zeros(65, 256, device=device).half(), [weight], [None])
