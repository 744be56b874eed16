"""What a batch's adapters do to a layer: low rank, element-wise, dense; else nothing."""

import types

import pytest
import torch

import engine.lora
from engine.errors import AdapterError
from engine.lora import EMBEDDING, LoraBatch, LoraModule, LoraWeights, PlacedModule, plan_layer
from engine.lora_placement import dora_ratio, is_finite, pack_adapter
from kernels.nf4 import dequantize_4bit, quantize_4bit

WIDTHS = {"q": 4, "k": 2, "lm_head": 5}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch(adapters: list, rows: list[int], scales: list[float] | None = None) -> LoraBatch:
    return LoraBatch(
        adapters,
        {},
        WIDTHS,
        rows,
        torch.tensor(rows, dtype=torch.int32),
        torch.tensor(scales or [1.0] * len(rows)),
    )


def low_rank(path: str, rank: int, seed: int = 0) -> PlacedModule:
    return PlacedModule(a=random(rank, 8, seed=seed), b=random(WIDTHS[path], rank, seed=seed + 1))


def test_a_layer_that_no_adapter_of_the_batch_touches_costs_nothing(monkeypatch):
    monkeypatch.setattr(engine.lora, "add_lora", None)  # calling it would fail
    monkeypatch.setattr(engine.lora, "linear", None)
    adapters = [{"q": low_rank("q", 2)}, {"k": PlacedModule(gain=torch.ones(2))}, None]
    y = random(2, 6)
    assert batch(adapters, [1, -1]).linear(("q",), random(2, 8), y) is y
    assert batch(adapters, [0, -1]).linear(("k",), random(2, 8), y) is y
    assert torch.equal(y, random(2, 6))
    assert batch(adapters, [0, 1]).embedding(torch.tensor([1, 2]), y) is y


def test_a_plan_has_only_the_slices_that_some_row_adapts():
    adapters = [{"k": low_rank("k", 3)}, None, {"k": PlacedModule(offset=torch.ones(2))}]
    plan = plan_layer(adapters, ("q", "k"), (4, 2))
    assert [(s.start, s.stop) for s in plan.slices] == [(4, 6)]
    assert plan.low_rank_rows == {0}
    assert [(row, start, stop) for row, start, stop, _ in plan.others] == [(2, 4, 6)]


def test_slices_of_a_fused_projection_get_their_own_columns():
    q, k = low_rank("q", 3), low_rank("k", 2, seed=5)
    x, y = random(3, 8, seed=9), random(3, 6, seed=10)
    expected = y.clone()
    expected[0, :4] += x[0] @ q.a.T @ q.b.T
    expected[0, 4:] += x[0] @ k.a.T @ k.b.T
    expected[2, 4:] += x[2] @ k.a.T @ k.b.T * 0.5
    result = batch([{"q": q, "k": k}, {"k": k}], [0, -1, 1], [1.0, 1.0, 0.5]).linear(
        ("q", "k"), x, y
    )
    torch.testing.assert_close(result, expected)


def test_gain_and_offset_are_scaled_between_base_and_adapted():
    gain, offset = torch.tensor([1.0, 0.5, 0.0, -1.0]), torch.tensor([0.0, 1.0, 2.0, 3.0])
    y = random(2, 4)
    expected = y + torch.tensor([[1.0], [0.25]]) * (gain * y + offset)
    lora = batch([{"q": PlacedModule(gain=gain, offset=offset)}], [0, 0], [1.0, 0.25])
    torch.testing.assert_close(lora.linear(("q",), random(2, 8), y.clone()), expected)


def test_a_dense_layer_at_scale_one_has_the_bits_of_the_replacement():
    weight, x = random(5, 8), random(3, 8, seed=1)
    y = random(3, 5, seed=2) * 1e6
    lora = batch([{"lm_head": PlacedModule(dense=weight)}], [0, -1, 0], [1.0, 1.0, 0.5])
    result = lora.linear(("lm_head",), x, y.clone())
    replaced = engine.lora.linear(x, weight)
    assert torch.equal(result[0], replaced[0])
    assert torch.equal(result[1], y[1])
    torch.testing.assert_close(result[2], 0.5 * y[2] + 0.5 * replaced[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_keep_the_models_dtype(dtype):
    module = PlacedModule(
        a=random(2, 8).to(dtype), b=random(4, 2).to(dtype), gain=random(4), offset=random(4)
    )
    y = batch([{"q": module}], [0]).linear(("q",), random(1, 8).to(dtype), random(1, 4).to(dtype))
    assert y.dtype is dtype
    hidden = PlacedModule(
        a=random(9, 2).to(dtype), b=random(8, 2).to(dtype), dense=random(9, 8).to(dtype)
    )
    result = batch([{EMBEDDING: hidden}], [0]).embedding(torch.tensor([3]), random(1, 8).to(dtype))
    assert result.dtype is dtype


# Placement.


class FourBitModel:
    """One NF4 layer with a bias; its groups straddle rows."""

    def __init__(self) -> None:
        self.spec = types.SimpleNamespace(tie_word_embeddings=False)
        self.embed_tokens = random(7, 24)
        self.weight = quantize_4bit(random(10, 24, seed=3))
        self.bias = random(10, seed=4)

    def base_linear(self, path: str) -> types.SimpleNamespace:
        assert path == "q"
        return types.SimpleNamespace(weight=self.weight, bias=self.bias)


def test_dora_on_a_4_bit_base_is_relative_to_the_dequantised_weight():
    model = FourBitModel()
    module = LoraModule(
        a=random(3, 24), b=random(10, 3, seed=1), magnitude=random(10, seed=2).abs()
    )
    placed = pack_adapter(
        LoraWeights(modules={"q": module}), model, torch.float32, pin_memory=False
    )
    placed = placed.place(torch.device("cpu"))["q"]
    x = random(4, 24, seed=6)
    base = dequantize_4bit(model.weight)
    adapted = base + module.b @ module.a
    adapted = adapted * (module.magnitude / adapted.norm(dim=1))[:, None]
    y = x @ base.T + model.bias
    found = y + placed.gain * y + placed.offset + x @ placed.a.T @ placed.b.T
    torch.testing.assert_close(found, x @ adapted.T + model.bias, rtol=1e-4, atol=1e-4)


def test_norms_of_a_large_layer_are_computed_in_pieces():
    weight = random(2500, 4)
    module = LoraModule(a=random(2, 4), b=random(2500, 2), magnitude=torch.ones(2500))
    expected = 1 / (weight + module.b @ module.a).norm(dim=1)
    torch.testing.assert_close(dora_ratio(module, weight, "q"), expected)


def test_a_dora_row_without_direction_is_refused():
    module = LoraModule(a=torch.zeros(1, 24), b=torch.zeros(10, 1), magnitude=torch.ones(10))
    with pytest.raises(AdapterError, match=r"q: DoRA divides by the norm"):
        dora_ratio(module, torch.zeros(10, 24), "q")


@pytest.mark.parametrize("kind", ["dora", "bias"])
def test_an_adapter_that_is_all_as_in_the_base_is_refused(kind):
    model = FourBitModel()
    magnitude = dequantize_4bit(model.weight).norm(dim=1)
    module = LoraModule(
        a=random(3, 24), b=torch.zeros(10, 3), magnitude=magnitude if kind == "dora" else None
    )
    weights = LoraWeights(
        modules={"q": module}, replaced={"q.bias": model.bias} if kind == "bias" else {}
    )
    with pytest.raises(AdapterError, match="changes nothing on this base"):
        pack_adapter(weights, model, torch.float32, pin_memory=False)


def test_values_too_large_for_float16_are_refused():
    module = LoraModule(a=torch.full((1, 24), 7e4), b=torch.ones(10, 1))
    with pytest.raises(AdapterError, match=r"q lora_A: a value is too large for torch.float16"):
        pack_adapter(
            LoraWeights(modules={"q": module}), FourBitModel(), torch.float16, pin_memory=False
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found_anywhere(dtype, value):
    for position in (0, 1000, 2047):
        tensor = random(2, 1024).to(dtype)
        assert is_finite(tensor)
        tensor.view(-1)[position] = value
        assert not is_finite(tensor)


def test_tensors_in_the_buffer_are_aligned():
    weights = LoraWeights(
        modules={"q": LoraModule(a=random(3, 24), b=random(10, 3), bias=random(10))},
        replaced={"score.weight": random(1, 24)},
    )
    packed = pack_adapter(weights, FourBitModel(), torch.bfloat16, pin_memory=False)
    assert packed.has_score_head
    placed = packed.place(torch.device("cpu"))
    assert torch.equal(placed["q"].a, weights.modules["q"].a.bfloat16())
    assert torch.equal(placed["score"].dense, weights.replaced["score.weight"])
    start = packed.buffer.data_ptr()
    for module in placed.values():
        for tensor in (module.a, module.b, module.gain, module.offset, module.dense):
            assert tensor is None or (tensor.data_ptr() - start) % 64 == 0
