import pytest
import torch
import transformers

from engine.train.config import TrainConfig
from engine.train.schedule import learning_rate


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.5])
def test_rates_equal_those_of_transformers(schedule, warmup_ratio):
    num_steps = 40
    config = TrainConfig(learning_rate=2e-4, lr_schedule=schedule, warmup_ratio=warmup_ratio)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    arguments = transformers.TrainingArguments(
        output_dir="unused", warmup_steps=warmup_ratio, use_cpu=True
    )
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = transformers.get_scheduler(
        name, optimizer, arguments.get_warmup_steps(num_steps), num_steps
    )
    for step in range(num_steps):
        assert learning_rate(config, step, num_steps) == pytest.approx(
            theirs.get_last_lr()[0], rel=1e-12
        )
        optimizer.step()
        theirs.step()


def test_a_run_that_is_all_warm_up_rises_to_the_end():
    config = TrainConfig(learning_rate=1.0, warmup_ratio=1.0, lr_schedule="linear")
    assert [learning_rate(config, step, 4) for step in range(4)] == [0.0, 0.25, 0.5, 0.75]


def test_a_run_of_one_step_learns_something():
    for schedule in ("constant", "linear", "cosine"):
        config = TrainConfig(learning_rate=1.0, lr_schedule=schedule)
        assert learning_rate(config, 0, 1) == 1.0
