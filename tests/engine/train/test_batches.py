import pytest
import torch

from engine.train.batches import (
    epoch_batches,
    join,
    micro_batches,
    pack,
    read_sample,
    sample_lengths,
)
from engine.train.token_dataset import make_dataset

LENGTHS = torch.randint(3, 90, (103,), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def batches(**changes):
    options = {"batch_size": 8, "seed": 1, "epoch": 1, "group_by_length": False} | changes
    return epoch_batches(LENGTHS, **options)


@pytest.mark.parametrize("group_by_length", [False, True])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_has_every_sample_once(group_by_length, epoch):
    found = batches(group_by_length=group_by_length, epoch=epoch)
    assert sorted(index for batch in found for index in batch) == list(range(103))
    assert len(found) == 13


def test_the_order_is_a_function_of_seed_and_epoch():
    assert batches() == batches()
    assert batches() != batches(epoch=2)
    assert batches() != batches(seed=2)


@pytest.mark.parametrize("group_by_length", [False, True])
def test_the_longest_sample_is_in_the_first_step_of_the_run(group_by_length):
    first = batches(epoch=0, group_by_length=group_by_length)[0]
    assert int(LENGTHS.argmax()) in first


def test_samples_of_like_length_come_together_in_random_order():
    found = [LENGTHS[batch] for batch in batches(group_by_length=True)]
    spread = torch.stack([(lengths.max() - lengths.min()).float() for lengths in found]).mean()
    assert spread < 15  # 87 if they were not grouped
    means = torch.tensor([lengths.float().mean().item() for lengths in found])
    assert not torch.equal(means, means.sort().values)
    assert not torch.equal(means, means.sort(descending=True).values)


def test_micro_batches_hold_as_much_as_they_may():
    lengths = [30, 10, 60, 25, 5, 70]
    plan = pack(lengths, 70, packing=True)
    assert sorted(index for members in plan for index in members) == list(range(6))
    filled = [sum(lengths[index] for index in members) for members in plan]
    assert filled == sorted(filled, reverse=True)
    assert max(filled) == 70
    assert len(plan) == 3


def test_a_sample_longer_than_a_micro_batch_has_one_to_itself():
    assert pack([100, 5, 5], 50, packing=True) == [[0], [1, 2]]


def test_without_packing_every_sample_is_alone():
    assert pack([5, 7, 6], 50, packing=False) == [[1], [2], [0]]


def test_the_two_of_a_pair_stay_together():
    sequences = [([1] * n, [0.0] + [1.0] * (n - 1)) for n in (4, 3, 9, 8, 2, 2)]
    dataset = make_dataset("preference", sequences)
    assert sample_lengths(dataset).tolist() == [7, 17, 4]
    samples = [read_sample(dataset, index) for index in range(3)]
    found = micro_batches(samples, 12, packing=True, device=CPU)
    assert [batch.lengths for batch in found] == [(9, 8), (4, 3, 2, 2)] or [
        batch.lengths for batch in found
    ] == [(9, 8), (4, 3), (2, 2)]


def test_joined_samples_keep_their_tokens_weights_and_advantages():
    dataset = make_dataset("supervised", [([5, 6, 7], [1.0, 0.0, 1.0]), ([8, 9], [0.0, 0.5])])
    batch = join([read_sample(dataset, 1), read_sample(dataset, 0)], CPU)
    assert batch.input_ids.tolist() == [8, 9, 5, 6, 7]
    assert batch.positions.tolist() == [0, 1, 0, 1, 2]
    assert batch.loss_weights.tolist() == [0.0, 0.5, 0.0, 0.0, 1.0]
    assert batch.advantages is None
