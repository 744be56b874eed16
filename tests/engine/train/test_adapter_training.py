"""Gradients of an adapter equal those of transformers + peft, whatever the model."""

import pytest
import torch

from engine.errors import RequestError
from engine.train.objectives import Objective
from kernels.int8_linear import Int8Weight
from kernels.nf4 import QuantizedWeight
from tests.engine.tiny_models import MODELS, load, save_model
from tests.engine.train.peft_oracle import (
    assert_grads_close,
    batch_of,
    make_peft,
    new_adapter,
    oracle_logps,
    our_grads,
    peft_grads,
    random_sequences,
    run_step,
)

SUPERVISED = Objective(method="supervised")


def compare_with_peft(source, model, adapter, lengths=(11, 5, 9), rtol=1e-5):
    """Loss and gradients of one supervised batch, ours and peft's."""
    sequences = random_sequences(lengths)
    (result,) = run_step(model, adapter, [batch_of(sequences)], SUPERVISED)
    wrapped = make_peft(source, model, adapter)
    weights = torch.cat([weights[1:] for _, weights in sequences])
    logps = torch.cat([oracle_logps(wrapped, ids) for ids, _ in sequences])
    loss = -(weights * logps).sum() / weights.sum()
    loss.backward()
    assert result.denominator == weights.sum()
    assert result.loss_sum / result.denominator == pytest.approx(loss.item(), rel=1e-5)
    assert_grads_close(our_grads(adapter), peft_grads(wrapped, adapter), rtol)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_on_4_bit_weights_equal_pefts(name, tmp_path):
    source = save_model(tmp_path / "model", name)
    model = load(tmp_path / "model").model
    assert isinstance(model.base_linear("model.layers.0.mlp.up_proj").weight, QuantizedWeight)
    compare_with_peft(source, model, new_adapter(model))


@pytest.mark.parametrize("name", ["llama_mha_untied_biases", "qwen3"])
def test_gradients_on_dense_weights_equal_pefts(name, tmp_path):
    source = save_model(tmp_path / "model", name)
    model = load(tmp_path / "model", quantization="none").model
    compare_with_peft(source, model, new_adapter(model))


@pytest.mark.parametrize("head", ["int8", "nf4"])
def test_gradients_through_a_quantised_head_equal_pefts(head, tmp_path):
    source = save_model(tmp_path / "model", "llama")
    model = load(tmp_path / "model", lm_head_dtype=head).model
    kind = Int8Weight if head == "int8" else QuantizedWeight
    assert isinstance(model.base_linear("lm_head").weight, kind)
    compare_with_peft(source, model, new_adapter(model))


def test_weights_made_in_inference_mode_can_be_trained_on(tmp_path):
    source = save_model(tmp_path / "model", "qwen3_biased")
    with torch.inference_mode():
        model = load(tmp_path / "model", quantization="none").model
    assert model.norm.is_inference()
    compare_with_peft(source, model, new_adapter(model))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ("q_proj", "mlp.down_proj")},
        {"target_modules": (r"model\.layers\.1\..*_proj",)},
        {"use_rslora": True, "rank": 3},
    ],
)
def test_gradients_of_some_layers_and_of_another_scaling_equal_pefts(settings, tmp_path):
    source = save_model(tmp_path / "model", "llama")
    model = load(tmp_path / "model").model
    compare_with_peft(source, model, new_adapter(model, **settings))


def test_a_slice_that_the_checkpoint_keeps_dense_is_trained_on_too(tmp_path):
    source = save_model(tmp_path / "model", "llama")
    model = load(tmp_path / "model").model
    dense = load(tmp_path / "model", quantization="none").model
    layer = model.layers[0]
    part = layer.qkv_proj.slices[1]
    part.weight = dense.base_linear(part.path).weight.clone()
    layer.qkv_proj.weights = []
    layer.qkv_proj.finish()
    compare_with_peft(source, model, new_adapter(model))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lm_head", "the head or the embedding"),
        ("embed_tokens", "the head or the embedding"),
        ("query", "matches no linear layer"),
        ("[", "neither a layer's name nor a regular expression"),
    ],
)
def test_targets_that_cannot_be_trained_are_named(name, told, tmp_path):
    save_model(tmp_path / "model", "llama")
    model = load(tmp_path / "model").model
    with pytest.raises(RequestError, match=told):
        new_adapter(model, target_modules=(name,))
