import types

import bitsandbytes as bnb
import pytest
import torch

from engine.errors import EngineError
from engine.train import adamw
from engine.train.config import TrainConfig
from engine.train.optimizer import CHUNK, AdamW, clip_scale


def make_groups(sizes, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [
        types.SimpleNamespace(
            name=f"layers.{index}",
            master=torch.randn(size, generator=generator).to(device),
            grad=torch.zeros(size, device=device),
        )
        for index, size in enumerate(sizes)
    ]


def set_grads(groups, step, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for group in groups:
        group.grad.copy_(torch.randn(group.grad.shape, generator=generator) * scale)


def run(optimizer, groups, steps, rate=1e-2):
    for step in steps:
        set_grads(groups, step)
        for _ in optimizer.update(rate):
            pass


def test_32_bit_equals_torch_adamw():
    groups = make_groups([300, 5000])
    config = TrainConfig(weight_decay=0.1, beta2=0.98)
    optimizer = AdamW(groups, config)
    theirs = [torch.nn.Parameter(group.master.clone()) for group in groups]
    reference = torch.optim.AdamW(
        theirs, lr=1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1, foreach=False
    )
    for step in range(20):
        set_grads(groups, step)
        for parameter, group in zip(theirs, groups, strict=True):
            parameter.grad = group.grad.clone()
        reference.step()
        for _ in optimizer.update(1e-2):
            pass
    for parameter, group in zip(theirs, groups, strict=True):
        torch.testing.assert_close(group.master, parameter.data, rtol=1e-6, atol=1e-7)


def test_8_bit_follows_bitsandbytes_adamw8bit():
    groups = make_groups([8192])
    config = TrainConfig(optimizer="adamw_8bit")
    optimizer = AdamW(groups, config)
    start = groups[0].master.clone()
    theirs = torch.nn.Parameter(start.clone())
    reference = bnb.optim.AdamW8bit([theirs], lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    for step in range(20):
        set_grads(groups, step)
        theirs.grad = groups[0].grad.clone()
        reference.step()
        for _ in optimizer.update(1e-3):
            pass
    ours, others = groups[0].master - start, theirs.data - start
    # Moments that bitsandbytes rounds to zero are the only difference of substance.
    is_close = (ours - others).abs() < 0.02 * others.abs().mean()
    assert is_close.float().mean() > 0.98


def test_8_bit_is_near_32_bit():
    exact, rounded = make_groups([8192]), make_groups([8192])
    start = exact[0].master.clone()
    run(AdamW(exact, TrainConfig()), exact, range(30))
    run(AdamW(rounded, TrainConfig(optimizer="adamw_8bit")), rounded, range(30))
    error = (rounded[0].master - exact[0].master).norm() / (exact[0].master - start).norm()
    assert error < 0.05


@pytest.mark.parametrize("name", adamw.MOMENTS)
def test_a_moment_is_rounded_to_the_nearest_value_of_its_map(name):
    values = adamw.MOMENTS[name]
    midpoints = (values[:-1] + values[1:]) / 2
    around = [midpoints, midpoints.nextafter(torch.tensor(2.0)),
              midpoints.nextafter(torch.tensor(-2.0)), values, -values * 0.999]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    scales = 10.0 ** -torch.randint(0, 9, (100_000,), generator=generator)
    anywhere = (torch.rand(100_000, generator=generator) * 2 - 1) * scales
    moment = torch.cat([*around, anywhere, torch.tensor([-0.0, 0.0, 1e-42, -1e-42])])
    if name == "exp_avg_sq":
        moment = moment.abs()
    moment = torch.nn.functional.pad(moment, (0, -len(moment) % 255)).view(-1, 255)
    ones = torch.ones(len(moment), 1)  # makes every block's absmax 1
    moment = torch.cat([moment, ones], dim=1).flatten()
    codes, absmax = adamw._encode(moment, adamw._tables(name, torch.device("cpu")))
    assert absmax.unique().tolist() == [1.0]
    assert torch.equal(codes.long(), torch.bucketize(moment, midpoints))


def test_8_bit_state_stays_bounded_where_a_gradient_vanishes():
    groups = make_groups([4096])
    optimizer = AdamW(groups, TrainConfig(optimizer="adamw_8bit"))
    groups[0].grad.fill_(1e-4)
    groups[0].grad[0] = 1.0
    list(optimizer.update(1e-3))
    before = groups[0].master.clone()
    groups[0].grad.zero_()
    list(optimizer.update(1e-3))
    assert (groups[0].master - before).abs().max() < 2e-3


def test_small_groups_keep_32_bit_state():
    optimizer = AdamW(make_groups([4095, 4096]), TrainConfig(optimizer="adamw_8bit"))
    state = optimizer.state_dict()
    assert state["layers.0.exp_avg"].dtype == torch.float32
    assert state["layers.1.exp_avg"].dtype == torch.uint8
    assert state["layers.1.exp_avg_absmax"].shape == (16,)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_state_that_is_loaded_goes_on_bit_for_bit(kind):
    config = TrainConfig(optimizer=kind)
    whole = make_groups([100, 5001])
    run(AdamW(whole, config), whole, range(6))
    first = make_groups([100, 5001])
    optimizer = AdamW(first, config)
    run(optimizer, first, range(3))
    state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    second = make_groups([100, 5001], seed=7)
    for group, source in zip(second, first, strict=True):
        group.master.copy_(source.master)
    resumed = AdamW(second, config)
    resumed.load_state_dict(state)
    run(resumed, second, range(3, 6))
    for a, b in zip(whole, second, strict=True):
        assert torch.equal(a.master, b.master)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_pieces_of_a_large_group_are_updated_as_one(kind):
    groups = make_groups([CHUNK + 300])
    tail = make_groups([300])
    tail[0].master.copy_(groups[0].master[CHUNK:])
    optimizer = AdamW(groups, TrainConfig(optimizer=kind))
    set_grads(groups, 0)
    tail[0].grad.copy_(groups[0].grad[CHUNK:])
    list(optimizer.update(1e-2))
    list(AdamW(tail, TrainConfig()).update(1e-2))
    torch.testing.assert_close(groups[0].master[CHUNK:], tail[0].master, rtol=1e-6, atol=1e-7)


def test_the_state_of_another_adapter_is_refused():
    state = AdamW(make_groups([100]), TrainConfig()).state_dict()
    with pytest.raises(EngineError, match="another adapter or another optimizer"):
        AdamW(make_groups([200]), TrainConfig()).load_state_dict(state)


def test_gradients_are_clipped_as_torch_does():
    groups = make_groups([50, 70])
    set_grads(groups, 0)
    optimizer = AdamW(groups, TrainConfig())
    parameters = [torch.nn.Parameter(group.master.clone()) for group in groups]
    for parameter, group in zip(parameters, groups, strict=True):
        parameter.grad = group.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.3)
    assert optimizer.grad_norm() == pytest.approx(norm.item(), rel=1e-6)
    scale = clip_scale(optimizer.grad_norm(), 0.3)
    torch.testing.assert_close(groups[0].grad * scale, parameters[0].grad)


def test_gradients_below_the_limit_or_without_one_are_left_alone():
    assert clip_scale(0.2, 0.3) == 1.0
    assert clip_scale(1e9, 0.0) == 1.0


def test_the_norm_shows_a_gradient_that_is_not_finite():
    groups = make_groups([50, 70])
    groups[1].grad[3] = float("nan")
    assert not AdamW(groups, TrainConfig()).grad_norm() < float("inf")


def test_a_group_is_tried_again_when_memory_runs_out(monkeypatch):
    groups, expected = make_groups([100]), make_groups([100])
    run(AdamW(expected, TrainConfig()), expected, range(1))
    real, failures = torch.empty_like, [1]

    def empty_like(*args):
        if failures:
            failures.pop()
            raise torch.OutOfMemoryError("no room")
        return real(*args)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    run(AdamW(groups, TrainConfig()), groups, range(1))
    assert torch.equal(groups[0].master, expected[0].master)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_paged_state_gives_the_same_bits(kind):
    paged, resident = (make_groups([5000, 70000, 300], device="cuda") for _ in range(2))
    paged_optimizer = AdamW(paged, TrainConfig(optimizer=kind, paged=True))
    run(paged_optimizer, paged, range(5))
    run(AdamW(resident, TrainConfig(optimizer=kind, paged=False)), resident, range(5))
    for a, b in zip(paged, resident, strict=True):
        assert torch.equal(a.master, b.master)
    assert paged_optimizer.state_dict()["layers.1.exp_avg"].is_pinned()
