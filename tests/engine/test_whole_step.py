"""All layers in one native call give the bits of the layers one by one, adapters included."""

from __future__ import annotations

import types

import pytest
import torch

from engine.lora import LoraBatch, PlacedModule
from engine.model import CausalLM
from tests.engine.tiny_models import load, random_prompts, run_prompts, save_model

SIZES = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 16}
CASES = [
    ("llama", "nf4", torch.bfloat16),
    ("llama_mha_untied_biases", "nf4", torch.float32),
    ("llama", "none", torch.bfloat16),
    ("mistral_window", "nf4", torch.bfloat16),
    ("qwen3", "fp4", torch.bfloat16),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]} {case[1]}")
def model(request, tmp_path_factory) -> CausalLM:
    name, quantization, dtype = request.param
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, name, dtype, **SIZES)
    loaded = load(folder, folder, quantization=quantization).model
    if loaded._whole_step is None:
        pytest.skip("no native kernels")
    return loaded


def layer_by_layer(model: CausalLM, run):
    """run() without the whole step."""
    whole, model._whole_step = model._whole_step, None
    try:
        return run()
    finally:
        model._whole_step = whole


def test_whole_step_equals_layers_to_the_bit(model):
    prompts = random_prompts()
    expected = layer_by_layer(model, lambda: run_prompts(model, prompts))
    for actual, one in zip(run_prompts(model, prompts), expected, strict=True):
        assert torch.equal(actual, one)


def random_rows(model: CausalLM, *, others: bool = False):
    """Two adapters of different rank, on all projections and on one; with a bias if others."""
    generator = torch.Generator().manual_seed(0)

    def module(path: str, rank: int) -> PlacedModule:
        out_features, in_features = model.spec.linear_shapes()[path]
        a = torch.randn(rank, in_features, generator=generator).to(model.dtype)
        b = torch.randn(out_features, rank, generator=generator).to(model.dtype)
        offset = torch.randn(out_features, generator=generator) if others else None
        return PlacedModule(a=0.1 * a, b=(0.1 * b).t().contiguous().t(), offset=offset)

    layer_paths = [path for path in model.spec.linear_shapes() if path != "lm_head"]
    return [
        {path: module(path, 5) for path in layer_paths},
        None,
        {"model.layers.1.self_attn.k_proj": module("model.layers.1.self_attn.k_proj", 16)},
    ]


def run_with_adapters(model: CausalLM, rows) -> torch.Tensor:
    """Hidden states of 6 decodes of the first token, each with an adapter of its own."""
    indices = [0, -1, 2, 0, 2, 0]
    widths = {path: shape[0] for path, shape in model.spec.linear_shapes().items()}
    scales = torch.tensor([1.0, 1.0, 0.5, 2.0, 1.0, 1.0])
    lora = LoraBatch(rows, {}, widths, indices, torch.tensor(indices, dtype=torch.int32), scales)
    batch = types.SimpleNamespace(
        input_ids=torch.arange(3, 9),
        positions=torch.zeros(6, dtype=torch.int64),
        cu_seqlens_q=torch.arange(7, dtype=torch.int32),
        context_lens=torch.ones(6, dtype=torch.int32),
        block_tables=torch.arange(6, dtype=torch.int32)[:, None],
        slot_mapping=torch.arange(6) * 4,
    )
    shape = (6, 4, model.spec.num_kv_heads, model.spec.head_dim)
    caches = [
        (torch.zeros(shape, dtype=model.dtype), torch.zeros(shape, dtype=model.dtype))
        for _ in range(model.spec.num_layers)
    ]
    with torch.inference_mode():
        return model.forward(batch, caches, lora)


@pytest.mark.parametrize("others", [False, True])
def test_adapters_act_in_the_whole_step(model, others):
    rows = random_rows(model, others=others)
    expected = layer_by_layer(model, lambda: run_with_adapters(model, rows))
    base = run_with_adapters(model, [None, None, None])
    actual = run_with_adapters(model, rows)
    assert torch.equal(actual, expected)
    assert torch.equal(actual[1], base[1]) and not torch.equal(actual[0], base[0])


def test_a_change_of_the_pool_is_seen(model):
    first, second = random_rows(model), random_rows(model)
    second[0] = None
    before = run_with_adapters(model, first)
    after = run_with_adapters(model, second)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(after, layer_by_layer(model, lambda: run_with_adapters(model, second)))
