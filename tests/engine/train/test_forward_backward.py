"""A step's gradients do not depend on how the batch is cut, packed, sliced or interleaved."""

import math

import pytest
import torch

from engine.train.forward_backward import evaluate_batch, forward_backward, token_logps
from engine.train.layer import activation_bytes
from engine.train.layer_pass import embed
from engine.train.noise import dropout_mask, noise_seed
from engine.train.objectives import Objective, denominator_of
from engine.train.updates import training_updates
from tests.engine.tiny_models import load, run_prompts, save_model
from tests.engine.train.peft_oracle import (
    assert_grads_close,
    batch_of,
    finish,
    new_adapter,
    our_grads,
    random_sequences,
    run_step,
)

SUPERVISED = Objective(method="supervised")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(folder, "mistral_window")
    return load(folder).model


def flat_grads(adapter) -> torch.Tensor:
    return torch.cat([group.grad for group in adapter.groups]).clone()


def test_micro_batches_give_the_gradients_of_one_batch(model):
    adapter = new_adapter(model)
    sequences = random_sequences((13, 4, 9, 9, 2))
    whole = run_step(model, adapter, [batch_of(sequences)], SUPERVISED)
    expected = our_grads(adapter)
    parts = [batch_of(sequences[:1]), batch_of(sequences[1:4]), batch_of(sequences[4:])]
    cut = run_step(model, adapter, parts, SUPERVISED)
    assert_grads_close(our_grads(adapter), expected, 1e-6)
    assert sum(r.loss_sum for r in cut) == pytest.approx(whole[0].loss_sum, rel=1e-6)
    assert sum(r.denominator for r in cut) == whole[0].denominator
    assert sum(r.num_tokens for r in cut) == whole[0].num_tokens == 37


def test_packed_sequences_are_as_good_as_separate_ones(model):
    sequences = random_sequences((13, 4, 9, 9, 2, 12))
    packed = finish(token_logps(model, new_adapter(model), batch_of(sequences)))
    alone = [
        finish(token_logps(model, new_adapter(model), batch_of([sequence])))
        for sequence in sequences
    ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-5)
    assert packed.count_nonzero() == sum(int(weights.sum()) for _, weights in sequences)


def test_log_probabilities_are_those_that_serving_gives(model):
    sequences = random_sequences((13, 4, 9), prompt=1)
    ours = finish(token_logps(model, None, batch_of(sequences)))
    served = run_prompts(model, [ids.tolist() for ids, _ in sequences])
    expected = []
    for (ids, _), logits in zip(sequences, served, strict=True):
        logps = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        expected += [torch.zeros(1), logps]
    torch.testing.assert_close(ours, torch.cat(expected), rtol=0, atol=1e-5)


def test_dropout_in_the_recomputation_is_that_of_the_forward_pass(model):
    """With masks that differed between the two, gradients would not be the loss's slope."""
    adapter = new_adapter(model, dropout=0.3)
    batch = batch_of(random_sequences((13, 9)))

    def loss() -> float:
        return run_step(model, adapter, [batch], SUPERVISED, seed=5)[0].loss_sum

    loss()
    gradient = flat_grads(adapter)
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(group.master.shape, generator=generator) for group in adapter.groups]
    slope = float(torch.cat(directions) @ gradient) * float(batch.loss_weights.sum())
    losses = []
    for step in (1e-3, -2e-3):
        for group, direction in zip(adapter.groups, directions, strict=True):
            group.master.add_(direction, alpha=step)
        losses.append(loss())
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(slope, rel=1e-2)


def test_activations_kept_instead_of_computed_again_change_no_bit(model):
    adapter = new_adapter(model, dropout=0.3)
    batch = batch_of(random_sequences((13, 9)))
    results, grads = [], []
    one_layer = activation_bytes(model, batch, training_updates(adapter, seed=0, denominator=1.0))
    for kept_bytes in (0, one_layer, 10 * one_layer):
        results.append(run_step(model, adapter, [batch], SUPERVISED, kept_bytes=kept_bytes))
        grads.append(flat_grads(adapter))
    assert results[0] == results[1] == results[2]
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_the_seed_decides_the_masks(model):
    adapter = new_adapter(model, dropout=0.5)
    batch = batch_of(random_sequences((13, 9)))
    grads = []
    for seed in (5, 5, 6):
        run_step(model, adapter, [batch], SUPERVISED, seed=seed)
        grads.append(flat_grads(adapter))
    assert torch.equal(grads[0], grads[1])
    assert not torch.allclose(grads[0], grads[2], rtol=1e-2)


def test_a_mask_keeps_its_share_and_its_mean():
    mask = dropout_mask(torch.empty(1000, 64), 0.25, noise_seed(1, 2, "model.layers.0"))
    assert mask.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert mask.mean().item() == pytest.approx(1.0, abs=0.01)


def test_neftune_noise_stays_within_its_bound_and_only_in_training(model):
    adapter = new_adapter(model, neftune_alpha=5.0)
    batch = batch_of(random_sequences((13, 9)))
    noisy = run_step(model, adapter, [batch], SUPERVISED)[0].loss_sum
    plain = run_step(model, new_adapter(model), [batch], SUPERVISED)[0].loss_sum
    quiet = finish(evaluate_batch(model, adapter, batch, SUPERVISED)).loss_sum
    assert quiet == pytest.approx(plain, rel=1e-6)
    assert noisy != pytest.approx(plain, rel=1e-4)
    change = embed(model, batch, 5.0, 0) - embed(model, batch, 0.0, 0)
    for part, length in zip(change.split([13, 9]), (13, 9), strict=True):
        bound = 5.0 / math.sqrt(length * model.spec.hidden_size)
        assert 0.9 * bound < part.abs().max().item() <= 1.001 * bound


def test_an_evaluation_without_dropout_gives_the_training_loss_and_touches_no_gradient(model):
    adapter = new_adapter(model)
    batch = batch_of(random_sequences((13, 4, 9)))
    trained = run_step(model, adapter, [batch], SUPERVISED)[0]
    before = flat_grads(adapter)
    evaluated = finish(evaluate_batch(model, adapter, batch, SUPERVISED))
    assert evaluated.loss_sum == pytest.approx(trained.loss_sum, rel=1e-6)
    assert evaluated.metrics == trained.metrics
    assert torch.equal(flat_grads(adapter), before)


def test_a_slice_is_half_a_layer_and_holds_no_state_of_the_thread(model):
    adapter = new_adapter(model)
    batch = batch_of(random_sequences((13, 9)))
    expected = run_step(model, adapter, [batch], SUPERVISED)
    grads = flat_grads(adapter)
    adapter.zero_grads()
    denominator = denominator_of(SUPERVISED, batch)
    running = forward_backward(
        model, adapter, batch, SUPERVISED, denominator=denominator, seed=0, kept_bytes=0
    )
    num_slices = 0
    while True:
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        with torch.inference_mode():  # serving in between
            run_prompts(model, [[5, 6, 7]])
        try:
            next(running)
        except StopIteration as stop:
            assert stop.value == expected[0]
            break
        num_slices += 1
    # Each layer: two halves forward, two again, two back; the head there and back, and the turn.
    assert num_slices == 6 * model.spec.num_layers + 3
    assert torch.equal(flat_grads(adapter), grads)


def test_layers_below_the_lowest_adapted_one_are_not_run_again(model):
    adapter = new_adapter(model, target_modules=(r"model\.layers\.1\..*",))
    batch = batch_of(random_sequences((13, 9)))
    running = forward_backward(
        model, adapter, batch, SUPERVISED, denominator=1.0, seed=0, kept_bytes=0
    )
    assert sum(1 for _ in running) == 2 * model.spec.num_layers + 4 + 3
    assert [group.name for group in adapter.groups] == ["layers.1"]


def test_training_leaves_the_model_as_it_was(model):
    before = run_prompts(model, [[5, 6, 7, 8]])[0]
    run_step(model, new_adapter(model), [batch_of(random_sequences((13, 9)))], SUPERVISED)
    assert torch.equal(run_prompts(model, [[5, 6, 7, 8]])[0], before)


def test_a_micro_batch_without_labels_adds_nothing(model):
    adapter = new_adapter(model)
    ids, weights = random_sequences((5,))[0]
    batch = batch_of([(ids, torch.zeros_like(weights))])
    running = forward_backward(model, adapter, batch, SUPERVISED, denominator=7.0, seed=0)
    assert finish(running).loss_sum == 0.0
    assert not flat_grads(adapter).any()


def test_bfloat16_gradients_are_those_of_float32_within_rounding(tmp_path):
    save_model(tmp_path / "model", "llama", torch.bfloat16)
    exact = load(tmp_path / "model", dtype="float32").model
    rounded = load(tmp_path / "model", dtype="bfloat16").model
    batch = batch_of(random_sequences((13, 9)))
    grads = []
    for model in (exact, rounded):
        adapter = new_adapter(model)
        run_step(model, adapter, [batch], SUPERVISED)
        grads.append(flat_grads(adapter))
        assert grads[-1].dtype is torch.float32
    cosine = torch.nn.functional.cosine_similarity(*grads, dim=0).item()
    assert cosine > 0.999


def test_float16_gradients_do_not_vanish_in_a_large_batch(tmp_path):
    save_model(tmp_path / "model", "llama", torch.float16)
    model = load(tmp_path / "model", dtype="float16").model
    adapter = new_adapter(model)
    batch = batch_of(random_sequences((13, 9)))
    run_step(model, adapter, [batch], SUPERVISED)
    expected = flat_grads(adapter) * denominator_of(SUPERVISED, batch)
    adapter.zero_grads()
    running = forward_backward(model, adapter, batch, SUPERVISED, denominator=1e6, seed=0)
    finish(running)
    torch.testing.assert_close(flat_grads(adapter) * 1e6, expected, rtol=1e-5, atol=1e-7)
