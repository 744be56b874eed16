"""A base that transformers and bitsandbytes quantised, with peft's adapters: their logits here.

The oracle runs bitsandbytes' own layers, in train mode: in eval mode some CPUs repack the weights
in place.
"""

import copy

import pytest
import torch
import transformers

from engine.config import ModelConfig
from engine.weights import load_model
from kernels.nf4 import QuantizedWeight
from tests.adapters.tiny_bases import Base, oracle_logits, ref_to, run, wait_until_placed

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "all linear": {"target_modules": "all-linear", "r": 8},
    "mixed ranks and alphas": {
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"up_proj": 40},
        "use_rslora": True,
    },
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "dora with trained biases": {"target_modules": LINEAR, "use_dora": True, "bias": "lora_only"},
    "all biases and lora_bias": {"target_modules": LINEAR, "bias": "all", "lora_bias": True},
    "saved head and embedding": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "head and embedding": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, base_of):
    """(transformers' 4-bit model, ours) of one folder, written by transformers."""
    folder = tmp_path_factory.mktemp("nf4")
    biased = base_of("biased")
    options = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    dense = type(biased.oracle)(
        transformers.LlamaConfig(**{**biased.oracle.config.to_dict(), **options, "head_dim": 16})
    )
    generator = torch.Generator().manual_seed(5)
    for parameter in dense.parameters():
        centre = 1.0 if parameter.dim() == 1 else 0.0
        parameter.data = centre + 0.1 * torch.randn(parameter.shape, generator=generator)
    dense.save_pretrained(folder / "dense")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "dense", quantization_config=settings, dtype=torch.float32
    ).train()
    oracle.save_pretrained(folder / "nf4")
    loaded = load_model(ModelConfig(), folder / "nf4", "cpu")
    weight = loaded.model.base_linear("model.layers.0.self_attn.q_proj").weight
    assert isinstance(weight, QuantizedWeight)
    return oracle, loaded.model


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_peft_on_bitsandbytes(kind, quantized, peft_adapter, make_pool):
    oracle_base, model = quantized
    base = Base(oracle_base, model, None)
    folder, oracle = peft_adapter(oracle_base, task_type="CAUSAL_LM", **KINDS[kind])
    pool = make_pool(base)
    row = wait_until_placed(pool, ref_to(folder))
    actual = torch.cat(run(base, pool, [row] * 3))
    expected = torch.cat(oracle_logits(oracle.train()))
    unchanged = torch.cat(oracle_logits(copy.deepcopy(oracle_base)))
    assert (expected - unchanged).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
