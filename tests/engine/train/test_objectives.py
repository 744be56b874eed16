"""Each objective's loss and gradients equal its formula, written out with autograd over peft."""

import pytest
import torch
import torch.nn.functional as F

from engine.errors import AdapterError
from engine.lora import LoraModule, LoraWeights
from engine.train.config import TrainConfig
from engine.train.forward_backward import evaluate_batch, token_logps
from engine.train.objectives import Objective, denominator_of, make_objective
from tests.engine.tiny_models import load, save_model
from tests.engine.train.peft_oracle import (
    assert_grads_close,
    batch_of,
    finish,
    make_peft,
    new_adapter,
    oracle_logps,
    our_grads,
    peft_grads,
    random_sequences,
    run_step,
)

LENGTHS = (11, 7, 9, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(transformers' model, ours)."""
    folder = tmp_path_factory.mktemp("base") / "model"
    source = save_model(folder, "llama")
    return source, load(folder).model


def answer_logps(wrapped, sequences) -> list[torch.Tensor]:
    """Each sequence's log-probabilities of its answer's tokens."""
    return [oracle_logps(wrapped, ids)[weights[1:] > 0] for ids, weights in sequences]


def test_weighted_samples_count_by_their_weights(base):
    source, model = base
    adapter = new_adapter(model)
    sequences = random_sequences(LENGTHS)
    sequences = [(ids, weights * (index + 0.5)) for index, (ids, weights) in enumerate(sequences)]
    (result,) = run_step(model, adapter, [batch_of(sequences)], Objective(method="supervised"))
    wrapped = make_peft(source, model, adapter)
    logps = answer_logps(wrapped, sequences)
    total = sum(float(weights[1:].sum()) for _, weights in sequences)
    loss = -sum((index + 0.5) * part.sum() for index, part in enumerate(logps)) / total
    loss.backward()
    assert result.denominator == pytest.approx(total)
    assert result.loss_sum / total == pytest.approx(loss.item(), rel=1e-5)
    assert_grads_close(our_grads(adapter), peft_grads(wrapped, adapter))


def test_token_accuracy_counts_the_most_probable_tokens(base):
    source, model = base
    adapter = new_adapter(model)
    sequences = random_sequences(LENGTHS)
    wrapped = make_peft(source, model, adapter)
    ids = sequences[0][0]
    with torch.no_grad():
        guess = wrapped(input_ids=ids[None]).logits[0, -2].argmax()
    ids[-1] = guess  # one label at least is the model's own guess
    batch = batch_of(sequences)
    correct = 0
    with torch.no_grad():
        for ids, weights in sequences:
            guesses = wrapped(input_ids=ids[None]).logits[0, :-1].argmax(-1)
            correct += int((guesses == ids[1:])[weights[1:] > 0].sum())
    result = finish(evaluate_batch(model, adapter, batch, Objective(method="supervised")))
    num_labels = sum(int(weights.sum()) for _, weights in sequences)
    assert result.metrics["mean_token_accuracy"] == (correct, num_labels)
    assert correct > 0


def test_reward_is_bradley_terry_at_the_last_token(base):
    source, model = base
    adapter = new_adapter(model, method="reward")
    assert [group.name for group in adapter.groups] == ["layers.0", "layers.1", "score"]
    sequences = random_sequences(LENGTHS)
    batch = batch_of(sequences)
    objective = Objective(method="reward")
    (result,) = run_step(model, adapter, [batch], objective)
    wrapped = make_peft(source, model, adapter)
    head = adapter.score.clone().requires_grad_()
    scores = torch.stack(
        [
            (wrapped.base_model.model.model(input_ids=ids[None])[0][0, -1] @ head.T)[0]
            for ids, _ in sequences
        ]
    )
    loss = -F.logsigmoid(scores[0::2] - scores[1::2]).mean()
    loss.backward()
    assert denominator_of(objective, batch) == result.denominator == 2
    assert result.loss_sum / 2 == pytest.approx(loss.item(), rel=1e-5)
    assert_grads_close(our_grads(adapter), peft_grads(wrapped, adapter))
    torch.testing.assert_close(adapter.score_grad, head.grad, rtol=1e-5, atol=1e-6)
    accuracy = (scores[0::2] > scores[1::2]).float().sum().item()
    assert result.metrics["accuracy"] == (accuracy, 2)
    assert result.metrics["margin"][0] == pytest.approx(
        (scores[0::2] - scores[1::2]).sum().item(), rel=1e-4
    )
    assert result.metrics["mean_reward"] == (pytest.approx(scores.sum().item(), rel=1e-4), 4)
    evaluated = finish(evaluate_batch(model, adapter, batch, objective))
    assert evaluated.loss_sum == pytest.approx(result.loss_sum, rel=1e-6)


def dpo_loss(policy, reference, beta):
    sums = torch.stack([part.sum() for part in policy])
    rewards = beta * (sums - torch.stack([part.sum() for part in reference]))
    return -F.logsigmoid(rewards[0::2] - rewards[1::2]).mean(), rewards


def test_dpo_with_the_base_as_reference(base):
    source, model = base
    adapter = new_adapter(model, method="dpo")
    sequences = random_sequences(LENGTHS)
    batch = batch_of(sequences)
    objective = make_objective(TrainConfig(method="dpo", beta=0.3))
    (result,) = run_step(model, adapter, [batch], objective)
    wrapped = make_peft(source, model, adapter)
    with torch.no_grad(), wrapped.disable_adapter():
        reference = answer_logps(wrapped, sequences)
    loss, rewards = dpo_loss(answer_logps(wrapped, sequences), reference, 0.3)
    loss.backward()
    assert result.denominator == 2
    assert result.loss_sum / 2 == pytest.approx(loss.item(), rel=1e-5)
    assert_grads_close(our_grads(adapter), peft_grads(wrapped, adapter))
    chosen, rejected = rewards[0::2], rewards[1::2]
    expected = {
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "rewards/accuracies": (chosen > rejected).float().sum(),
    }
    for name, value in expected.items():
        assert result.metrics[name] == (pytest.approx(value.item(), rel=1e-4), 2)
    evaluated = finish(evaluate_batch(model, adapter, batch, objective))
    assert evaluated.loss_sum == pytest.approx(result.loss_sum, rel=1e-6)


def test_dpo_with_a_frozen_adapter_as_reference(base):
    source, model = base
    frozen = new_adapter(model, seed=7)
    adapter = new_adapter(model, method="dpo")
    sequences = random_sequences(LENGTHS)
    objective = make_objective(TrainConfig(method="dpo", beta=0.3), frozen.weights())
    (result,) = run_step(model, adapter, [batch_of(sequences)], objective)
    with torch.no_grad():
        reference = answer_logps(make_peft(source, model, frozen), sequences)
    wrapped = make_peft(source, model, adapter)
    loss, _ = dpo_loss(answer_logps(wrapped, sequences), reference, 0.3)
    loss.backward()
    assert result.loss_sum / 2 == pytest.approx(loss.item(), rel=1e-5)
    assert_grads_close(our_grads(adapter), peft_grads(wrapped, adapter))


def test_dpo_pairs_may_be_spread_over_micro_batches(base):
    _, model = base
    adapter = new_adapter(model, method="dpo")
    sequences = random_sequences(LENGTHS)
    objective = make_objective(TrainConfig(method="dpo"))
    run_step(model, adapter, [batch_of(sequences)], objective)
    expected = our_grads(adapter)
    run_step(model, adapter, [batch_of(sequences[:2]), batch_of(sequences[2:])], objective)
    assert_grads_close(our_grads(adapter), expected, 1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kl_coefficient", [0.0, 0.2])
@pytest.mark.parametrize("is_on_policy", [True, False])
def test_grpo_is_the_clipped_policy_gradient(base, is_on_policy, kl_coefficient, temperature):
    source, model = base
    adapter = new_adapter(model, method="grpo")
    sequences = random_sequences(LENGTHS)
    advantages = [1.0, -0.5, 0.7, -1.2]
    drawn_by = new_adapter(model, seed=9)
    old = None
    if not is_on_policy:
        whole = finish(token_logps(model, drawn_by, batch_of(sequences), temperature))
        old = list(whole.split(LENGTHS))
    batch = batch_of(sequences, advantages=advantages, old_logps=old)
    config = TrainConfig(method="grpo", kl_coefficient=kl_coefficient, temperature=temperature)
    objective = make_objective(config)
    (result,) = run_step(model, adapter, [batch], objective)

    wrapped = make_peft(source, model, adapter)

    def logps_at_temperature():
        found = []
        for ids, weights in sequences:
            logits = wrapped(input_ids=ids[None]).logits[0, :-1].float() / temperature
            logps = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            found.append(logps[weights[1:] > 0])
        return found

    with torch.no_grad(), wrapped.disable_adapter():
        reference = logps_at_temperature()
    losses, divergences = [], []
    for index, logps in enumerate(logps_at_temperature()):
        answer = sequences[index][1] > 0
        before = logps.detach() if old is None else old[index][answer]
        ratio = torch.exp(logps - before)
        bounded = torch.clamp(ratio, 0.8, 1.2)
        loss = -torch.min(ratio * advantages[index], bounded * advantages[index])
        gap = reference[index] - logps
        divergence = torch.exp(gap) - gap - 1
        losses.append(loss + kl_coefficient * divergence)
        divergences.append(divergence.detach())
    loss = torch.cat(losses).mean()
    loss.backward()
    assert result.loss_sum / result.denominator == pytest.approx(loss.item(), rel=2e-5, abs=1e-6)
    assert_grads_close(our_grads(adapter), peft_grads(wrapped, adapter), 2e-5)
    if kl_coefficient:
        divergence, count = result.metrics["kl"]
        assert divergence / count == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-4)
    assert (result.metrics["clip_ratio"][0] > 0) is (not is_on_policy)


def test_a_reference_that_is_more_than_low_rank_is_refused():
    module = LoraModule(a=torch.ones(2, 4), b=torch.ones(4, 2), magnitude=torch.ones(4))
    weights = LoraWeights(modules={"model.layers.0.self_attn.q_proj": module})
    with pytest.raises(AdapterError, match="low-rank updates only"):
        make_objective(TrainConfig(method="dpo"), weights)
