"""The model's numbers equal transformers', whatever the architecture and the way it is batched."""

import types

import pytest
import torch

from kernels.nf4 import QuantizedWeight
from tests.engine.tiny_models import (
    MODELS,
    load,
    oracle_logits,
    random_prompts,
    run_prompts,
    save_model,
)


@pytest.mark.parametrize("name", MODELS)
def test_float32_logits_equal_transformers(name, tmp_path):
    oracle = save_model(tmp_path / "model", name)
    model = load(tmp_path / "model", quantization="none").model
    prompts = random_prompts()
    actual, expected = run_prompts(model, prompts), oracle_logits(oracle, prompts)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama3_tied", "mistral_window", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_equal_transformers_within_rounding(name, dtype, tmp_path):
    oracle = save_model(tmp_path / "model", name, dtype)
    flag = str(dtype).removeprefix("torch.")
    model = load(tmp_path / "model", quantization="none", dtype=flag).model
    assert model.dtype is dtype
    prompts = random_prompts()
    exact = oracle_logits(oracle.float(), prompts)
    theirs = oracle_logits(oracle.to(dtype), prompts)
    for actual, other, reference in zip(run_prompts(model, prompts), theirs, exact, strict=True):
        noise = (other - reference).abs().max().item()
        assert (actual - reference).abs().max().item() <= 2 * noise


def test_chunks_and_decodes_equal_the_whole_prompt(tmp_path):
    save_model(tmp_path / "model", "mistral_window")
    model = load(tmp_path / "model", quantization="none").model
    prompt = random_prompts()[0]
    whole = run_prompts(model, [prompt])[0]
    spec, num_blocks = model.spec, 5
    shape = (num_blocks, 4, spec.num_kv_heads, spec.head_dim)
    caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(spec.num_layers)]
    pieces, start = [], 0
    for size in (7, 1, 1, 5, 3):
        stop = start + size
        batch = types.SimpleNamespace(
            input_ids=torch.tensor(prompt[start:stop]),
            positions=torch.arange(start, stop),
            cu_seqlens_q=torch.tensor([0, size], dtype=torch.int32),
            context_lens=torch.tensor([stop], dtype=torch.int32),
            block_tables=torch.tensor([[3, 0, 4, 1, 2]], dtype=torch.int32),
            slot_mapping=torch.tensor(
                [[3, 0, 4, 1, 2][i // 4] * 4 + i % 4 for i in range(start, stop)]
            ),
        )
        with torch.inference_mode():
            pieces.append(model.logits(model(batch, caches, None), None))
        start = stop
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=1e-5)


class RecordingLora:
    """Stands in for LoraBatch: records the calls and changes nothing."""

    def __init__(self):
        self.calls: list[tuple[tuple[str, ...], int, int]] = []
        self.embedded: list[tuple[int, ...]] = []

    def linear(self, paths, x, y):
        self.calls.append((tuple(paths), x.shape[1], y.shape[1]))
        return y

    def embedding(self, input_ids, hidden):
        self.embedded.append((*input_ids.shape, *hidden.shape))
        return hidden


def test_every_projection_asks_the_adapters(tmp_path):
    save_model(tmp_path / "model", "llama")
    model = load(tmp_path / "model").model
    lora = RecordingLora()
    batch = types.SimpleNamespace(
        input_ids=torch.tensor([5, 6]),
        positions=torch.arange(2),
        cu_seqlens_q=torch.tensor([0, 2], dtype=torch.int32),
        context_lens=torch.tensor([2], dtype=torch.int32),
        block_tables=torch.tensor([[0]], dtype=torch.int32),
        slot_mapping=torch.arange(2),
    )
    shape = (1, 16, 2, 16)
    caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(2)]
    with torch.inference_mode():
        hidden = model(batch, caches, lora)
        logits = model.logits(hidden[1:], lora)
    assert logits.shape == (1, 97) and logits.dtype is torch.float32
    assert lora.embedded == [(2, 2, 64)]
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    assert lora.calls[4:] == [
        ((f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"), 64, 128),
        ((f"{attention}.o_proj",), 64, 64),
        ((f"{mlp}.gate_proj", f"{mlp}.up_proj"), 64, 224),
        ((f"{mlp}.down_proj",), 112, 64),
        (("lm_head",), 64, 97),
    ]


def test_base_linear_gives_weight_and_bias_by_path(tmp_path):
    oracle = save_model(tmp_path / "model", "llama_mha_untied_biases")
    dense = load(tmp_path / "model", quantization="none").model
    for path in dense.spec.linear_shapes():
        part, expected = dense.base_linear(path), oracle.get_submodule(path)
        assert torch.equal(part.weight, expected.weight)
        assert (part.bias is None) == (expected.bias is None)
        if part.bias is not None:
            assert torch.equal(part.bias, expected.bias)
    quantized = load(tmp_path / "model").model
    assert isinstance(quantized.base_linear("model.layers.0.mlp.up_proj").weight, QuantizedWeight)
    assert isinstance(quantized.base_linear("lm_head").weight, torch.Tensor)


def test_a_tied_head_is_the_embedding(tmp_path):
    save_model(tmp_path / "model", "qwen2")
    model = load(tmp_path / "model").model
    assert model.base_linear("lm_head").weight is model.embed_tokens


def test_dense_projections_are_stacked_once(tmp_path):
    save_model(tmp_path / "model", "llama")
    model = load(tmp_path / "model", quantization="none").model
    fused = model.layers[0].qkv_proj
    assert {part.weight.untyped_storage().data_ptr() for part in fused.slices} == {
        fused.weight.untyped_storage().data_ptr()
    }
