"""The adapter in training: how it begins, what it is made of, how it leaves and comes back."""

import math
import types

import pytest
import torch

from engine.errors import AdapterError
from engine.lora import LoraBatch, LoraModule, LoraWeights
from engine.lora_placement import pack_adapter
from engine.model_config import ModelSpec
from engine.train.adapter import TrainableAdapter
from engine.train.config import TrainConfig
from engine.train.forward_backward import token_logps
from tests.engine.tiny_models import load, make_model, save_model
from tests.engine.train.peft_oracle import batch_of, finish, new_adapter, random_sequences


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(folder, "llama")
    return load(folder).model


def create(spec: ModelSpec, **settings) -> TrainableAdapter:
    config = TrainConfig(**{"rank": 4, "alpha": 8.0, "dropout": 0.0, **settings})
    return TrainableAdapter.create(spec, config, "cpu")


def test_a_new_adapter_begins_as_pefts_and_changes_nothing(model):
    adapter = create(model.spec)
    for path, module in adapter.modules.items():
        bound = 1 / math.sqrt(model.spec.linear_shapes()[path][1])  # kaiming with a = sqrt(5)
        assert 0.8 * bound < module.a.abs().max().item() <= bound
        assert not module.b.any()
    batch = batch_of(random_sequences((9, 6)))
    base = finish(token_logps(model, None, batch))
    assert torch.equal(finish(token_logps(model, adapter, batch)), base)


def test_the_seed_decides_how_it_begins(model):
    values = [create(model.spec, seed=seed).groups[1].master for seed in (1, 1, 2)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_a_group_is_a_layer_and_the_matrices_are_views_into_it(model):
    adapter = create(model.spec, method="reward")
    assert [group.name for group in adapter.groups] == ["layers.0", "layers.1", "score"]
    shapes = model.spec.layer_linear_shapes().values()
    numel = 4 * sum(rows + columns for rows, columns in shapes)
    assert [group.master.numel() for group in adapter.groups] == [numel, numel, 64]
    assert adapter.num_parameters == 2 * numel + 64
    for group in adapter.groups:
        group.master.fill_(3.0)
        group.grad.fill_(2.0)
    tensors = [
        tensor
        for module in adapter.modules.values()
        for tensor in (module.a, module.b, module.a_grad, module.b_grad)
    ]
    assert {tensor.unique().item() for tensor in tensors} == {2.0, 3.0}
    assert adapter.score.unique().item() == 3.0
    adapter.zero_grads()
    assert not any(module.b_grad.any() for module in adapter.modules.values())


def served_logps(model, weights: LoraWeights, batch) -> torch.Tensor:
    """float32 [num_labels], as the engine would compute it with the adapter in its pool."""
    spec, num_tokens = model.spec, batch.num_tokens
    placed = pack_adapter(weights, model, model.dtype, pin_memory=False).place("cpu")
    widths = {path: shape[0] for path, shape in spec.linear_shapes().items()}
    rows = torch.zeros(num_tokens, dtype=torch.int32)
    lora = LoraBatch([placed], {}, widths, [0] * num_tokens, rows, torch.ones(num_tokens))
    step = types.SimpleNamespace(
        input_ids=batch.input_ids,
        positions=batch.positions,
        cu_seqlens_q=batch.cu_seqlens,
        context_lens=torch.tensor(batch.lengths, dtype=torch.int32),
        block_tables=torch.arange(batch.num_sequences, dtype=torch.int32)[:, None],
        slot_mapping=torch.cat(
            [index * 16 + torch.arange(length) for index, length in enumerate(batch.lengths)]
        ),
    )
    shape = (batch.num_sequences, 16, spec.num_kv_heads, spec.head_dim)
    caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(spec.num_layers)]
    with torch.inference_mode():
        logits = model.logits(model.forward(step, caches, lora), None)
    predicting = batch.label_indices - 1
    labels = batch.input_ids[batch.label_indices]
    return logits[predicting].log_softmax(-1).gather(1, labels[:, None])[:, 0]


def test_its_copy_is_served_as_it_was_trained(model):
    adapter = new_adapter(model, use_rslora=True)
    batch = batch_of(random_sequences((9, 6)))
    weights = adapter.weights("fingerprint")
    assert weights.base_fingerprint == "fingerprint"
    ours = finish(token_logps(model, adapter, batch))[batch.label_indices]
    torch.testing.assert_close(served_logps(model, weights, batch), ours, rtol=0, atol=1e-5)
    base = finish(token_logps(model, None, batch))[batch.label_indices]
    assert (ours - base).abs().max() > 1e-2
    for group in adapter.groups:
        group.master.zero_()
    assert all(module.a.any() for module in weights.modules.values())


def test_it_goes_on_from_another_adapter_of_any_scale_and_a_smaller_rank(model):
    source = new_adapter(model, rank=2, alpha=5.0, method="reward")
    adapter = create(model.spec, rank=4, alpha=16.0, method="reward")
    before = adapter.modules["model.layers.0.mlp.up_proj"].a.clone()
    adapter.load_weights(source.weights())
    batch = batch_of(random_sequences((9, 6)))
    expected = finish(token_logps(model, source, batch))
    actual = finish(token_logps(model, adapter, batch))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert torch.equal(adapter.score, source.score)
    module = adapter.modules["model.layers.0.mlp.up_proj"]
    assert torch.equal(module.a[2:], before[2:]) and not module.b[:, 2:].any()


def test_layers_that_the_other_does_not_change_begin_afresh(model):
    source = new_adapter(model, target_modules=("q_proj",))
    adapter = create(model.spec)
    adapter.load_weights(source.weights())
    assert adapter.modules["model.layers.1.self_attn.q_proj"].b.any()
    assert not adapter.modules["model.layers.1.self_attn.k_proj"].b.any()


def test_what_training_could_not_go_on_from_is_listed_whole(model):
    q, up = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
    k, v = "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"
    dora = LoraModule(a=torch.ones(2, 64), b=torch.ones(64, 2), magnitude=torch.ones(64))
    weights = LoraWeights(
        modules={
            q: dora,
            k: LoraModule(a=torch.ones(9, 64), b=torch.ones(32, 9)),
            v: LoraModule(a=torch.ones(2, 64), b=torch.ones(99, 2)),
            up: LoraModule(a=torch.ones(2, 64), b=torch.ones(112, 2)),
        },
        replaced={"lm_head.weight": torch.ones(97, 64)},
    )
    adapter = create(model.spec, target_modules=("q_proj", "k_proj", "v_proj"))
    with pytest.raises(AdapterError) as raised:
        adapter.load_weights(weights)
    told = str(raised.value)
    for expected in (
        f"{q}: DoRA", f"{k}: rank 9, more than the run's rank 4", f"{v}: its shapes",
        f"{up}: it is adapted there", "lm_head.weight: a replaced tensor",
    ):  # fmt: skip
        assert expected in told
    assert not any(module.b.any() for module in adapter.modules.values())


def test_pefts_own_initialisation_has_the_same_distribution(model):
    import peft

    wrapped = peft.get_peft_model(
        make_model("llama"), peft.LoraConfig(r=4, target_modules=["up_proj"])
    )
    theirs = wrapped.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    a = theirs.lora_A["default"].weight
    ours = create(model.spec).modules["model.layers.0.mlp.up_proj"].a
    assert a.shape == ours.shape
    assert a.std().item() == pytest.approx(ours.std().item(), rel=0.15)
