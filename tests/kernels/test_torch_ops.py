import pytest
import torch

from kernels.nf4 import dequantize_4bit, quantize_4bit
from kernels.nf4_autograd import nf4_linear_backward, nf4_linear_trainable
from kernels.nf4_linear import nf4_linear, nf4_linear_add, nf4_linear_silu
from kernels.torch_ops import _nf4_linear, traced_nf4_linear


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(double_quant=True):
    sizes = ((24, 1), (8, 2))
    return [quantize_4bit(randn(r, 64, seed=s), double_quant=double_quant) for r, s in sizes]


@pytest.mark.parametrize("double_quant", [True, False])
def test_torch_compile_takes_the_projection_whole(double_quant):
    both, x = weights(double_quant), randn(5, 64)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def layer(x):
        return nf4_linear(x * 2, both, [None, None]).relu()

    expected = nf4_linear(x * 2, both, [None, None]).relu()
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


def test_the_operator_keeps_pytorch_s_rules():
    both = weights()
    arguments = (
        randn(3, 64).requires_grad_(), [w.packed for w in both], [w.absmax for w in both],
        [w.nested_absmax for w in both], [w.nested_offset for w in both], [None, randn(8)],
        [24, 8], "nf4", 64,
    )  # fmt: skip
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_nf4_linear, arguments, test_utils=tests)


@pytest.mark.parametrize("call", [nf4_linear_trainable, traced_nf4_linear])
def test_the_gradient_goes_to_x_alone(call):
    both, x = weights(), randn(5, 64).requires_grad_()
    bias = randn(8, seed=3).requires_grad_()
    grad = randn(5, 32, seed=4)
    call(x, both, [None, bias]).backward(grad)
    dense = torch.cat([dequantize_4bit(w, torch.float32) for w in both])
    torch.testing.assert_close(x.grad, grad @ dense)
    assert bias.grad is None


def test_there_is_nothing_to_differentiate_where_x_needs_no_gradient():
    bias = randn(8, seed=3).requires_grad_()
    assert not nf4_linear_trainable(randn(5, 64), weights(), [None, bias]).requires_grad


def test_silu_and_residual_are_what_separate_operations_give():
    both = [weights()[1], quantize_4bit(randn(8, 64, seed=7))]
    x, residual = randn(3, 64), randn(3, 16, seed=5)
    y = nf4_linear(x, both, [None, None])
    gate, up = y.chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(nf4_linear_silu(x, both, [None, None]), expected)
    assert torch.equal(nf4_linear_add(x, both, [None, None], residual), y + residual)


def test_wrong_arguments_are_named():
    both, x = weights(), randn(5, 64)
    with pytest.raises(ValueError, match=r"grad.shape\[1\]: expected 32, got 64"):
        nf4_linear_backward(x, both)
    with pytest.raises(ValueError, match="weights: expected two of one shape"):
        nf4_linear_silu(x, both, [None, None])
    with pytest.raises(ValueError, match=r"residual.shape: expected \(5, 32\), got \(5, 64\)"):
        nf4_linear_add(x, both, [None, None], x)
    with pytest.raises(ValueError, match=r"residual.dtype"):
        nf4_linear_add(x, both, [None, None], randn(5, 32).half())
