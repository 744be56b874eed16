"""Adapters written by peft give peft's logits here, kind by kind, alone and mixed in one batch."""

import pytest
import torch

from tests.adapters.tiny_bases import oracle_logits, ref_to, run, wait_until_placed

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

KINDS = {
    "two layers": ("plain", {}),
    "all linear": ("plain", {"target_modules": "all-linear", "r": 8}),
    "rank 1": ("plain", {"r": 1, "target_modules": LINEAR}),
    "mixed ranks": (
        "plain",
        {"target_modules": LINEAR, "rank_pattern": {"q_proj": 2, r"model\.layers\.1\.mlp\..*": 7}},
    ),
    "mixed alphas": (
        "plain",
        {
            "target_modules": LINEAR,
            "alpha_pattern": {"layers.0.mlp.up_proj": 1, "^model.*v_proj": 40},
        },
    ),
    "rank-stabilised": ("plain", {"use_rslora": True, "rank_pattern": {"v_proj": 9}}),
    "full paths": (
        "plain",
        {"target_modules": ["model.layers.1.self_attn.k_proj", "layers.0.mlp.up_proj"]},
    ),
    "regular expression": (
        "plain",
        {"target_modules": r"model\.layers\.[01]\.(mlp|self_attn)\.(up|o)_proj"},
    ),
    "some layers": ("plain", {"target_modules": LINEAR, "layers_to_transform": [1]}),
    "one layer by number": (
        "plain",
        {"target_modules": LINEAR, "layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    "excluded": (
        "plain",
        {"target_modules": LINEAR, "exclude_modules": ["layers.0.self_attn.q_proj", "up_proj"]},
    ),
    "excluded by expression": (
        "plain",
        {"target_modules": LINEAR, "exclude_modules": r".*\.0\..*"},
    ),
    "head": ("plain", {"target_modules": ["q_proj", "lm_head"]}),
    "tied head": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": ("plain", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied embedding": ("tied", {"target_modules": ["embed_tokens"]}),
    "embedding and head kept tied": (
        "tied",
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "saved head": ("plain", {"modules_to_save": ["lm_head"]}),
    "saved embedding": ("plain", {"modules_to_save": ["embed_tokens"]}),
    "saved head and embedding": ("plain", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved tied head": ("tied", {"modules_to_save": ["lm_head"]}),
    "saved tied embedding": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "saved and kept tied": (
        "tied",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "saved linear layer": ("biased", {"target_modules": ["k_proj"], "modules_to_save": ["q_proj"]}),
    "biased base": ("biased", {"target_modules": LINEAR}),
    "trained biases": ("biased", {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    "all biases": ("biased", {"target_modules": ["q_proj"], "bias": "all"}),
    "lora_bias": ("plain", {"target_modules": LINEAR, "lora_bias": True}),
    "lora_bias on biases": (
        "biased",
        {"target_modules": LINEAR, "lora_bias": True, "bias": "lora_only"},
    ),
    "dora": ("plain", {"target_modules": LINEAR, "use_dora": True}),
    "dora, rank-stabilised": (
        "plain",
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 9}},
    ),
    "dora on biases": ("biased", {"target_modules": LINEAR, "use_dora": True}),
    "dora with trained biases": (
        "biased",
        {"target_modules": LINEAR, "use_dora": True, "bias": "lora_only"},
    ),
    "dora on head and embedding": (
        "plain",
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "use_dora": True},
    ),
    "dora on tied head": ("tied", {"target_modules": ["lm_head", "v_proj"], "use_dora": True}),
    "orthogonal": ("plain", {"init_lora_weights": "orthogonal"}),
    "mistral": ("mistral", {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}),
    "qwen2": ("qwen2", {"target_modules": LINEAR, "use_dora": True, "bias": "lora_only"}),
    "qwen3": ("qwen3", {"target_modules": [*LINEAR, "lm_head"], "lora_bias": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_peft(kind, base_of, peft_adapter, make_pool):
    base_kind, options = KINDS[kind]
    base = base_of(base_kind)
    folder, oracle = peft_adapter(base.oracle, task_type="CAUSAL_LM", **options)
    pool = make_pool(base)
    row = wait_until_placed(pool, ref_to(folder))
    actual = torch.cat(run(base, pool, [row] * 3))
    expected = torch.cat(oracle_logits(oracle))
    assert (expected - torch.cat(oracle_logits(base.oracle))).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    pool.release(ref_to(folder))
