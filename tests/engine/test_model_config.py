"""Reading config.json: both spellings, four architectures, and every refusal named."""

import json

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.errors import CheckpointError
from engine.memory import estimate_weights_bytes
from engine.model_config import ModelSpec
from engine.rope import RopeSpec
from tests.engine.tiny_models import LLAMA3_ROPE, MODELS, make_model

LLAMA2 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
QWEN2 = {
    **LLAMA2,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": 1000,
    "max_window_layers": 30,
}


def read(folder, config: dict, generation: dict | None = None) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelSpec.from_folder(folder)


def test_reads_a_published_llama_config(tmp_path):
    spec = read(tmp_path, LLAMA2)
    assert spec.head_dim == 128
    assert spec.dtype is torch.float16
    assert spec.rope == RopeSpec(theta=10000.0)
    assert spec.sliding_windows == (None,) * 32
    assert spec.eos_token_ids == (2,)
    assert spec.linear_shapes()["model.layers.31.mlp.down_proj"] == (4096, 11008)
    assert spec.linear_shapes()["lm_head"] == (32000, 4096)
    assert len(spec.linear_shapes()) == 32 * 7 + 1


def test_both_spellings_give_the_same_spec(tmp_path):
    rope = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    old = read(tmp_path, {**LLAMA2, "rope_theta": 500.0, "rope_scaling": rope})
    new_config = {**LLAMA2, "rope_parameters": LLAMA3_ROPE, "dtype": "float16"}
    del new_config["torch_dtype"], new_config["rope_scaling"]
    assert read(tmp_path, new_config) == old
    older = {**rope, "type": rope["rope_type"]}
    del older["rope_type"]
    assert read(tmp_path, {**LLAMA2, "rope_theta": 500.0, "rope_scaling": older}) == old


@pytest.mark.parametrize("name", MODELS)
def test_reads_what_transformers_writes(name, tmp_path):
    model = make_model(name)
    model.save_pretrained(tmp_path)
    spec = ModelSpec.from_folder(tmp_path)
    names = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert spec.tensor_shapes() == names
    assert spec.rms_norm_eps == model.config.rms_norm_eps
    inv_freq = spec.rope.inverse_frequencies(spec.head_dim)
    torch.testing.assert_close(inv_freq, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)


def test_llama3_frequencies_equal_transformers_at_full_size():
    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(
        hidden_size=4096, num_attention_heads=32, rope_parameters=parameters
    )
    expected, scale = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    spec = RopeSpec(theta=500000.0, kind="llama3", factor=8.0)
    torch.testing.assert_close(spec.inverse_frequencies(128), expected, rtol=1e-6, atol=0)
    assert scale == 1.0


def test_linear_scaling_stretches_the_context(tmp_path):
    linear = {**LLAMA2, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert read(tmp_path, linear).max_context_len == 16384
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 2048
    # Such configs give the stretched length already.
    assert read(tmp_path, {**LLAMA2, "rope_scaling": llama3}).max_context_len == 4096


def test_windows_follow_the_architecture(tmp_path):
    mistral = {**LLAMA2, "architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    assert read(tmp_path, mistral).sliding_windows == (4096,) * 32
    assert read(tmp_path, {**mistral, "sliding_window": None}).sliding_windows == (None,) * 32
    assert read(tmp_path, QWEN2).sliding_windows == (None,) * 30 + (1000,) * 2
    off = {**QWEN2, "use_sliding_window": False}
    assert read(tmp_path, off).sliding_windows == (None,) * 32
    types = ["sliding_attention", "full_attention"] * 16
    assert read(tmp_path, {**QWEN2, "layer_types": types}).sliding_windows == (1000, None) * 16
    # A Llama config may carry a leftover window: transformers' Llama ignores it.
    assert read(tmp_path, {**LLAMA2, "sliding_window": 7}).sliding_windows == (None,) * 32


def test_biases_follow_the_architecture(tmp_path):
    qwen2 = read(tmp_path, QWEN2)
    assert qwen2.attention_bias and not qwen2.attention_out_bias and not qwen2.mlp_bias
    llama = read(tmp_path, {**LLAMA2, "attention_bias": True})
    assert llama.attention_bias and llama.attention_out_bias and not llama.mlp_bias


def test_end_tokens_of_the_generation_config_win(tmp_path):
    spec = read(tmp_path, LLAMA2, {"eos_token_id": [7, 9, 7], "bos_token_id": 3})
    assert spec.eos_token_ids == (7, 9)
    assert spec.bos_token_id == 1
    without = {key: value for key, value in LLAMA2.items() if not key.endswith("token_id")}
    spec = read(tmp_path, without, {"bos_token_id": 3})
    assert spec.eos_token_ids == () and spec.bos_token_id == 3


def test_the_model_type_stands_in_for_missing_architectures(tmp_path):
    without = {key: value for key, value in LLAMA2.items() if key != "architectures"}
    assert read(tmp_path, without).architecture == "LlamaForCausalLM"
    early = {**LLAMA2, "architectures": ["LLaMAForCausalLM"]}
    assert read(tmp_path, early).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"architectures": ["GPTNeoXForCausalLM"]}, "found GPTNeoXForCausalLM"),
        ({"architectures": ["LlamaForCausalLM", "X"]}, "found LlamaForCausalLM, X"),
        ({"architectures": []}, "found none"),
        ({"architectures": None, "model_type": "gpt2"}, r"found none \(model_type gpt2\)"),
        ({"architectures": "LlamaForCausalLM"}, "found 'LlamaForCausalLM'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ],
)
def test_refuses_other_architectures_by_name(changes, found, tmp_path):
    with pytest.raises(CheckpointError, match=found) as caught:
        read(tmp_path, {**LLAMA2, **changes})
    assert "supported are LlamaForCausalLM, MistralForCausalLM" in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden_size": None}, "hidden_size: expected a whole number of at least 1, found noth"),
        ({"hidden_size": "4096"}, 'hidden_size: expected a whole number .*, found "4096"'),
        ({"hidden_size": True}, "hidden_size: expected a whole number .*, found true"),
        ({"hidden_size": 4100}, r"hidden_size: expected a multiple of num_attention_heads \(32\)"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: .* at least 1, found 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected at most 1000, found 1000"),
        ({"num_key_value_heads": 5}, r"a multiple of num_key_value_heads \(5\), found 32"),
        ({"head_dim": 5}, "head_dim: expected an even number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: expected a number above 0, found 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a number above 0, found NaN"),
        ({"vocab_size": -3}, "vocab_size: .*, found -3"),
        ({"hidden_act": "gelu"}, 'hidden_act: expected silu, found "gelu"'),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false, found 1"),
        ({"torch_dtype": "float8"}, "torch_dtype: expected one of float32, float16, bfloat16"),
        ({"dtype": 16}, "dtype: expected a string, found 16"),
        ({"eos_token_id": "</s>"}, "eos_token_id: expected a token id or a list of token ids"),
        ({"rope_theta": -1}, "rope_theta: expected a number above 0"),
        ({"rope_scaling": [1]}, "rope_scaling: expected an object"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling.type: expected one of"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 'rope_type: .*, found "yarn"'),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor: expected a number above"),
        (
            {"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 0.5}},
            "rope_scaling.high_freq_factor: expected a number above low_freq_factor",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters.full_attention: expected no nested object",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0"),
    ],
)
def test_refuses_wrong_fields_by_name(changes, problem, tmp_path):
    with pytest.raises(CheckpointError, match=problem) as caught:
        read(tmp_path, {**LLAMA2, **changes})
    assert str(tmp_path / "config.json") in str(caught.value)


def test_refuses_wrong_layer_types(tmp_path):
    for wrong in (["full_attention"], ["chunked_attention"] * 32, "full_attention", [[]] * 32):
        with pytest.raises(CheckpointError, match="layer_types: expected a list of 32 names"):
            read(tmp_path, {**QWEN2, "layer_types": wrong})


def test_reports_every_problem_at_once(tmp_path):
    config = {**LLAMA2, "vocab_size": 0, "hidden_act": "relu", "rope_scaling": {"type": "yarn"}}
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, config)
    for name in ("vocab_size", "hidden_act", "rope_scaling.type"):
        assert name in str(caught.value)


def test_refuses_missing_and_broken_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json: no such file"):
        ModelSpec.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not valid JSON"):
        ModelSpec.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config.json: not valid JSON"):
        ModelSpec.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object, found list"):
        ModelSpec.from_folder(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read"):
        ModelSpec.from_folder(tmp_path)
    read(tmp_path, LLAMA2, {})
    (tmp_path / "generation_config.json").write_text("nope")
    with pytest.raises(CheckpointError, match=r"generation_config.json: not valid JSON"):
        ModelSpec.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"generation_config.json describes"):
        read(tmp_path, LLAMA2, {"eos_token_id": -1})


def test_estimates_the_memory_of_published_models(tmp_path):
    spec = read(tmp_path, LLAMA2)
    num_linear = sum(a * b for path, (a, b) in spec.linear_shapes().items() if path != "lm_head")
    dense = estimate_weights_bytes(spec, "none", torch.bfloat16)
    nf4 = estimate_weights_bytes(spec, "nf4", torch.bfloat16)
    assert dense == 2 * 6_738_415_616  # the published number of parameters
    rest = dense - 2 * num_linear
    assert 8 * (nf4 - rest) / num_linear == pytest.approx(4.127, abs=0.001)
