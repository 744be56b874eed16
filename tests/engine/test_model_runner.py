"""What a step reads off the model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from engine.errors import NotEnoughMemory
from engine.model_runner import launch_logprobs, measure_activation_bytes, read_logprobs

SPEC = SimpleNamespace(num_layers=2, num_kv_heads=1, head_dim=4)


def test_token_logprobs_are_those_of_a_log_softmax():
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    expected = logits.log_softmax(dim=-1)
    for num_top in (0, 4, 50):
        entries = read_logprobs((7, 0, 10), launch_logprobs(logits, (7, 0, 10), num_top))
        for row, (entry, token_id) in enumerate(zip(entries, (7, 0, 10), strict=True)):
            assert entry.token_id == token_id
            assert entry.logprob == expected[row, token_id].item()
            values, ids = expected[row].topk(min(num_top, 11))
            assert entry.top == tuple(zip(ids.tolist(), values.tolist(), strict=True))


class Recorder:
    """A model that notes what it is given."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def __call__(self, batch, kv_caches, lora):
        if self.error is not None:
            raise self.error
        self.batch, self.kv_caches, self.lora = batch, kv_caches, lora
        return torch.zeros(len(batch.input_ids), 8)

    def logits(self, hidden, lora):
        del lora
        return torch.zeros(len(hidden), 50)


@pytest.fixture
def cuda(monkeypatch):
    """The few functions of torch.cuda that are asked, answered on the CPU."""
    allocated = iter([1000, 1500, 1200])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: next(allocated))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 9000)


def measure(model) -> int:
    return measure_activation_bytes(
        model,
        SPEC,
        cache_dtype=torch.float16,
        block_size=4,
        num_tokens=50,
        num_seqs=3,
        max_model_len=20,
        device=torch.device("cpu"),
    )


@pytest.mark.usefixtures("cuda")
def test_activations_are_measured_on_a_full_step():
    model = Recorder()
    measured = measure(model)
    # The peak, less what was there before, the cache and what stays; and the sampler's share.
    assert measured == 9000 - 1500 - 200 + 4 * 50 * 50 * 4
    assert len(model.batch.input_ids) == 50
    # Two that decode at the greatest length, and prompts.
    assert model.batch.context_lens.tolist() == [20, 20, 20, 20, 8]
    assert model.batch.cu_seqlens_q.tolist() == [0, 1, 2, 22, 42, 50]
    assert model.kv_caches[0][0].shape == (5, 4, 1, 4)


@pytest.mark.usefixtures("cuda")
def test_a_step_that_does_not_fit_is_a_named_error():
    with pytest.raises(NotEnoughMemory, match="--max-num-batched-tokens"):
        measure(Recorder(torch.OutOfMemoryError("no")))
