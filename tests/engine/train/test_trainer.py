import dataclasses

import pytest
import torch

from engine.api import TrainingCheckpoint, TrainingProgress, TrainingStarted
from engine.errors import EngineError, NotEnoughMemory, RequestError
from engine.train import accumulation, evaluation, preparation
from engine.train.objectives import make_objective
from engine.train.out_of_memory import is_out_of_memory
from engine.train.token_dataset import make_dataset, save_dataset
from tests.engine.tiny_models import save_model
from tests.engine.train.training_jobs import (
    checkpoint_steps,
    ended,
    load_base,
    make_job,
    make_trainer,
    metric,
    notes,
    of,
    read_plain,
    run_job,
    write_plain,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_model(folder / "model", "llama")
    return load_base(folder / "model", folder / "cache")


def same_adapter(a, b):
    one, two = read_plain(a), read_plain(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def run_until(trainer, step):
    """Run to the progress event of a step, and no further; the events up to there."""
    events = []
    for event in trainer.run():
        if event is not None:
            events.append(event)
        if isinstance(event, TrainingProgress) and event.step == step:
            break
    return events


def test_a_job_tells_what_it_does_and_learns(tmp_path, model):
    events = run_job(make_job(tmp_path / "job", max_steps=30, save_every_steps=15), model)
    started = events[0]
    assert isinstance(started, TrainingStarted)
    assert (started.num_steps, started.num_samples, started.step) == (30, 24, 0)
    assert started.num_trainable_parameters > 0
    assert None not in (started.config.paged, started.config.max_seq_len)
    progress = of(events, TrainingProgress)
    assert [event.step for event in progress] == list(range(1, 31))
    assert metric(progress[-1], "train_loss") < 0.8 * metric(progress[0], "train_loss")
    assert progress[-1].trained_tokens == 5 * started_tokens(tmp_path)
    assert progress[-1].remaining_s == 0.0
    assert all(metric(event, "tokens_per_s") > 0 for event in progress)
    assert metric(progress[11], "epoch") == 2.0
    assert checkpoint_steps(events) == [15, 30]
    assert ended(events).status == "succeeded"
    assert ended(events).path == str(tmp_path / "job" / "final")
    assert same_adapter(tmp_path / "job" / "final", tmp_path / "job" / "checkpoint-30")


def started_tokens(tmp_path):
    from engine.train.token_dataset import load_dataset

    return load_dataset(tmp_path / "supervised.data").input_ids.numel()


def test_the_same_job_gives_the_same_bits(tmp_path, model):
    for name in ("one", "two"):
        run_job(make_job(tmp_path / name), model)
    assert same_adapter(tmp_path / "one" / "final", tmp_path / "two" / "final")


def test_slices_come_between_events(tmp_path, model):
    trainer = make_trainer(make_job(tmp_path / "job", max_steps=1), model)
    kinds = ["slice" if event is None else "event" for event in trainer.run()]
    assert kinds.count("slice") > 8  # two layers, in halves, there and back


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("packing", [True, False])
def test_a_job_that_was_cut_off_ends_with_the_same_bits(tmp_path, model, optimizer, packing):
    settings = {"optimizer": optimizer, "packing": packing, "validation": True}
    whole = run_job(make_job(tmp_path / "whole", **settings), model)
    job = make_job(tmp_path / "cut", **settings)
    run_until(make_trainer(job, model), 5)
    events = run_job(job, model)
    assert events[0].step == 4
    assert "Going on from checkpoint-4" in notes(events)
    assert checkpoint_steps(events) == [4, 6]  # the first may not have been heard of
    assert same_adapter(tmp_path / "whole" / "final", tmp_path / "cut" / "final")
    assert ended(events).trained_tokens == ended(whole).trained_tokens
    assert losses(events) == losses(whole)[4:]


def losses(events):
    return [metric(event, "train_loss") for event in of(events, TrainingProgress)]


def test_a_job_cut_off_before_its_first_checkpoint_begins_anew(tmp_path, model):
    run_job(make_job(tmp_path / "whole"), model)
    job = make_job(tmp_path / "cut")
    run_until(make_trainer(job, model), 1)
    run_job(job, model)
    assert same_adapter(tmp_path / "whole" / "final", tmp_path / "cut" / "final")


@pytest.mark.parametrize("status", ["paused", "cancelled"])
def test_a_stopped_job_keeps_its_last_whole_step_and_goes_on_from_it(tmp_path, model, status):
    run_job(make_job(tmp_path / "whole"), model)
    job = make_job(tmp_path / "stopped")
    trainer = make_trainer(job, model)
    events = []
    for event in trainer.run():
        events.append(event)
        if isinstance(event, TrainingProgress) and event.step == 3:
            trainer.stop(status)
    events = [event for event in events if event is not None]
    assert ended(events).status == status
    assert ended(events).step == 3
    assert checkpoint_steps(events) == [2, 3]
    assert run_job(job, model)[0].step == 3
    assert same_adapter(tmp_path / "whole" / "final", tmp_path / "stopped" / "final")


def test_a_job_stopped_before_it_began_leaves_nothing(tmp_path, model):
    trainer = make_trainer(make_job(tmp_path / "job"), model)
    trainer.stop("paused")
    events = [event for event in trainer.run() if event is not None]
    assert ended(events).status == "paused"
    assert checkpoint_steps(events) == []


def test_stopping_in_an_evaluation_repeats_it_later(tmp_path, model):
    whole = run_job(make_job(tmp_path / "whole", validation=True), model)
    job = make_job(tmp_path / "stopped", validation=True)
    trainer = make_trainer(job, model)
    seen = []
    for event in trainer.run():
        seen.append(event)
        if len(of(seen, TrainingProgress)) == 1 and event is None:
            trainer.stop("paused")  # in step 2, or in the evaluation after it
    events = run_job(job, model)
    assert (
        of(events, TrainingCheckpoint)[-1].metrics[-2:]
        == of(whole, TrainingCheckpoint)[-1].metrics[-2:]
    )
    assert same_adapter(tmp_path / "whole" / "final", tmp_path / "stopped" / "final")


def script_losses(monkeypatch, *losses):
    """Have the evaluations find these losses, one after another."""
    remaining = list(losses)

    def found(_run, _check_stop):
        yield
        return {"loss": remaining.pop(0)}

    monkeypatch.setattr(evaluation, "_losses", found)


def test_the_result_is_the_best_checkpoint(tmp_path, model, monkeypatch):
    script_losses(monkeypatch, 3.0, 1.0, 2.0)
    events = run_job(make_job(tmp_path / "job", validation=True), model)
    assert [event.is_best for event in of(events, TrainingCheckpoint)] == [True, True, False]
    assert same_adapter(tmp_path / "job" / "final", tmp_path / "job" / "checkpoint-4")
    assert not same_adapter(tmp_path / "job" / "final", tmp_path / "job" / "checkpoint-6")


def test_a_better_evaluation_makes_a_checkpoint_of_its_own(tmp_path, model, monkeypatch):
    script_losses(monkeypatch, 3.0, 2.0, 2.5)
    job = make_job(tmp_path / "job", validation=True, save_every_steps=6)
    assert checkpoint_steps(run_job(job, model)) == [2, 4, 6]


def test_a_loss_that_is_not_a_number_is_never_the_best(tmp_path, model, monkeypatch):
    script_losses(monkeypatch, float("nan"), 2.0, float("nan"))
    events = run_job(make_job(tmp_path / "job", validation=True), model)
    assert [event.is_best for event in of(events, TrainingCheckpoint)] == [False, True, False]


def test_only_the_newest_and_the_best_checkpoint_are_kept(tmp_path, model, monkeypatch):
    script_losses(monkeypatch, 1.0, 2.0, 3.0, 4.0)
    job = make_job(tmp_path / "job", validation=True, max_steps=8, keep_checkpoints=2)
    run_job(job, model)
    kept = sorted(path.name for path in (tmp_path / "job").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]


def test_training_ends_early_when_nothing_gets_better(tmp_path, model, monkeypatch):
    script_losses(monkeypatch, 2.0, 1.0, 1.5, 1.0)
    job = make_job(
        tmp_path / "job", validation=True, max_steps=60, save_every_steps=60,
        early_stopping_patience=2,
    )  # fmt: skip
    events = run_job(job, model)
    assert ended(events).status == "succeeded"
    assert ended(events).step == 8
    assert same_adapter(tmp_path / "job" / "final", tmp_path / "job" / "checkpoint-4")
    again = run_job(job, model)
    assert ended(again).step == 8
    assert of(again, TrainingProgress) == []


def test_a_finished_job_that_is_started_again_only_says_so(tmp_path, model):
    job = make_job(tmp_path / "job")
    run_job(job, model)
    events = run_job(job, model)
    assert of(events, TrainingProgress) == []
    assert ended(events).status == "succeeded"
    assert ended(events).step == 6


def test_a_finished_job_goes_on_when_it_is_given_more_steps(tmp_path, model):
    run_job(make_job(tmp_path / "job"), model)
    events = run_job(make_job(tmp_path / "job", max_steps=8), model)
    assert [event.step for event in of(events, TrainingProgress)] == [7, 8]


def test_weights_of_the_last_checkpoints_are_in_memory(tmp_path, model):
    trainer = make_trainer(make_job(tmp_path / "job", validation=True), model)
    events = [event for event in trainer.run() if event is not None]
    for path in (of(events, TrainingCheckpoint)[-1].path, ended(events).path):
        weights = trainer.weights_at(path)
        write_plain(tmp_path / "memory", weights, events[0].config)
        assert same_adapter(tmp_path / "memory", tmp_path / "job" / path.split("/")[-1])
        assert weights.base_fingerprint == "base"
    assert trainer.weights_at("elsewhere") is None


@pytest.mark.parametrize("method", ["reward", "dpo"])
def test_preferences_are_learnt(tmp_path, model, method):
    job = make_job(
        tmp_path / "job", kind="preference", method=method, max_steps=12, validation=True,
        learning_rate=1e-2, eval_every_steps=12, save_every_steps=12,
    )  # fmt: skip
    events = run_job(job, model)
    progress = of(events, TrainingProgress)
    assert metric(progress[-1], "train_loss") < 0.5 * metric(progress[0], "train_loss")
    assert {"valid_loss"} <= dict(progress[-1].metrics).keys()


def test_a_frozen_reference_is_where_the_model_is(tmp_path, model, monkeypatch):
    devices = []

    def noted(config, reference, device):
        devices.append(device)
        return make_objective(config, reference, device)

    monkeypatch.setattr(preparation, "make_objective", noted)
    run_job(make_job(tmp_path / "job", kind="preference", method="dpo", max_steps=1), model)
    assert devices == [model.device]


# What goes wrong.


class Breaking:
    """forward_backward that fails as a test says, in the calls that it says."""

    def __init__(self, monkeypatch, on_call):
        self.num_tokens = []
        self.on_call = on_call
        self.real = accumulation.forward_backward
        monkeypatch.setattr(accumulation, "forward_backward", self)

    def __call__(self, model, adapter, batch, objective, **options):
        self.num_tokens.append(batch.num_tokens)
        result = yield from self.real(model, adapter, batch, objective, **options)
        return self.on_call(self, adapter, batch, result)


def test_a_step_that_is_not_finite_is_skipped_counted_and_told(tmp_path, model, monkeypatch):
    def on_call(fake, adapter, _batch, result):
        if len(fake.num_tokens) == 3:
            adapter.groups[0].grad[5] = float("inf")
        return result

    Breaking(monkeypatch, on_call)
    job = make_job(tmp_path / "job", micro_batch_tokens=1000)
    events = run_job(job, model)
    third, fourth = of(events, TrainingProgress)[2:4]
    assert metric(third, "skipped_steps") == metric(fourth, "skipped_steps") == 1
    assert "grad_norm" not in dict(third.metrics)
    assert "Step 3 was skipped" in notes(events)
    assert ended(events).status == "succeeded"
    assert all(
        tensor.isfinite().all() for tensor in read_plain(tmp_path / "job" / "final").values()
    )


def test_a_loss_that_is_not_finite_skips_the_step_too(tmp_path, model, monkeypatch):
    def on_call(fake, _adapter, _batch, result):
        is_bad = len(fake.num_tokens) == 2
        return dataclasses.replace(result, loss_sum=float("nan")) if is_bad else result

    Breaking(monkeypatch, on_call)
    events = run_job(make_job(tmp_path / "job", micro_batch_tokens=1000), model)
    assert "its loss is nan" in notes(events)
    assert "train_loss" not in dict(of(events, TrainingProgress)[1].metrics)


def test_a_run_without_finite_numbers_fails(tmp_path, model, monkeypatch):
    Breaking(monkeypatch, lambda _f, _a, _b, result: dataclasses.replace(
        result, loss_sum=float("nan")))  # fmt: skip
    with pytest.raises(EngineError, match="10 in a row are too many: lower learning_rate"):
        run_job(make_job(tmp_path / "job", max_steps=20), model)


@pytest.mark.parametrize(("error", "expected"), [
    (torch.OutOfMemoryError("CUDA out of memory"), True),
    (MemoryError(), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
    (RuntimeError("shapes differ"), False),
    (OSError("No space left on device"), False),
])  # fmt: skip
def test_what_means_that_memory_ran_out(error, expected):
    assert is_out_of_memory(error) is expected


def test_out_of_memory_halves_the_micro_batch_and_repeats_the_step(tmp_path, model, monkeypatch):
    def on_call(_fake, _adapter, batch, result):
        if batch.num_tokens > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    fake = Breaking(monkeypatch, on_call)
    settings = {"dropout": 0.0, "neftune_alpha": 0.0}
    events = run_job(make_job(tmp_path / "job", micro_batch_tokens=1000, **settings), model)
    assert "Memory ran out with 1000 tokens" in notes(events)
    assert len(of(events, TrainingProgress)) == 6
    assert fake.num_tokens[0] > 30
    monkeypatch.undo()
    calm = run_job(make_job(tmp_path / "calm", micro_batch_tokens=1000, **settings), model)
    assert losses(events) == pytest.approx(losses(calm), rel=1e-4)
    assert ended(events).trained_tokens == ended(calm).trained_tokens


def test_memory_that_is_short_for_one_sample_is_an_error_that_says_so(tmp_path, model, monkeypatch):
    def on_call(_fake, _adapter, _batch, _result):
        raise torch.OutOfMemoryError("no room")

    Breaking(monkeypatch, on_call)
    with pytest.raises(NotEnoughMemory, match="one sample at a time; the longest has 20 tokens"):
        run_job(make_job(tmp_path / "job"), model)


def test_the_smaller_micro_batch_is_kept_when_the_job_goes_on(tmp_path, model, monkeypatch):
    def on_call(_fake, _adapter, batch, result):
        if batch.num_tokens > 30:
            raise MemoryError
        return result

    Breaking(monkeypatch, on_call)
    job = make_job(tmp_path / "job", micro_batch_tokens=1000)
    run_until(make_trainer(job, model), 4)
    assert "Memory ran out" not in notes(run_job(job, model))


def test_a_full_disk_is_told_and_the_next_checkpoint_is_tried(tmp_path, model):
    attempts = []

    def write(path, weights, config):
        attempts.append(path.name)
        write_plain(path, weights, config)
        if len(attempts) == 1:
            raise OSError(28, "No space left on device")

    events = run_job(make_job(tmp_path / "job"), model, write_adapter=write)
    assert "checkpoint of step 2 could not be written" in notes(events)
    assert "No space left on device" in notes(events)
    assert checkpoint_steps(events) == [4, 6]
    assert ended(events).status == "succeeded"
    names = sorted(path.name for path in (tmp_path / "job").iterdir())
    assert names == ["checkpoint-4", "checkpoint-6", "final"]


def test_a_best_checkpoint_that_could_not_be_written_is_not_the_best(tmp_path, model, monkeypatch):
    def write(path, weights, config):
        if path.name == ".checkpoint-4.unfinished":
            raise OSError(28, "No space left on device")
        write_plain(path, weights, config)

    script_losses(monkeypatch, 3.0, 1.0, 2.0)
    events = run_job(make_job(tmp_path / "job", validation=True), model, write_adapter=write)
    assert [event.is_best for event in of(events, TrainingCheckpoint)] == [True, True]
    assert same_adapter(tmp_path / "job" / "final", tmp_path / "job" / "checkpoint-6")


def test_a_disk_that_is_full_at_the_end_is_waited_for(tmp_path, model, monkeypatch):
    naps = []
    monkeypatch.setattr("engine.train.checkpoint_keeper.time.sleep", naps.append)

    def write(path, weights, config):
        if len(naps) < 15:
            raise OSError(28, "No space left on device")
        write_plain(path, weights, config)

    script_losses(monkeypatch, 3.0, 2.0, 1.0)
    events = run_job(make_job(tmp_path / "job", validation=True), model, write_adapter=write)
    assert notes(events).count("The result could not be written") == 1
    assert [(event.step, event.is_best) for event in of(events, TrainingCheckpoint)] == [(6, True)]
    assert ended(events).status == "succeeded"
    assert same_adapter(tmp_path / "job" / "final", tmp_path / "job" / "checkpoint-6")


def test_a_job_that_waits_for_the_disk_can_be_stopped_and_resumed(tmp_path, model, monkeypatch):
    monkeypatch.setattr("engine.train.checkpoint_keeper.time.sleep", lambda _seconds: None)

    def write(_path, _weights, _config):
        raise OSError(28, "No space left on device")

    trainer = make_trainer(make_job(tmp_path / "job"), model, write_adapter=write)
    events = []
    for event in trainer.run():
        if event is not None:
            events.append(event)
        if "The result could not be written" in notes(events):
            trainer.stop("paused")
    assert ended(events).status == "paused"
    assert list((tmp_path / "job").iterdir()) == []
    assert ended(run_job(make_job(tmp_path / "job"), model)).status == "succeeded"


def test_an_adapter_that_the_host_cannot_hold_is_refused_before_it_is_made(
    tmp_path, model, monkeypatch
):
    monkeypatch.setattr("engine.train.preparation.available_host_bytes", lambda: 10_000_000)
    with pytest.raises(NotEnoughMemory, match=r"rank 4000 .*Lower rank"):
        run_job(make_job(tmp_path / "job", rank=4000), model)
    assert ended(run_job(make_job(tmp_path / "job"), model)).status == "succeeded"


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "state"])
def test_a_damaged_checkpoint_is_passed_over_with_a_note(tmp_path, model, damage):
    run_job(make_job(tmp_path / "whole"), model)
    job = make_job(tmp_path / "job")
    run_until(make_trainer(job, model), 5)
    path = tmp_path / "job" / "checkpoint-4"
    file = path / ("trainer_state.json" if damage == "state" else "trainer_state.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        content[-3] ^= 1
        file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    events = run_job(job, model)
    assert "checkpoint-4 is damaged and was passed over" in notes(events)
    assert events[0].step == 2
    assert same_adapter(tmp_path / "whole" / "final", tmp_path / "job" / "final")


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path, model):
    job = make_job(tmp_path / "job")
    run_until(make_trainer(job, model), 3)
    (tmp_path / "job" / ".checkpoint-4.unfinished").mkdir()
    assert run_job(job, model)[0].step == 2
    assert not list((tmp_path / "job").glob(".*"))


def test_other_settings_or_data_do_not_go_on_from_a_checkpoint(tmp_path, model):
    run_job(make_job(tmp_path / "job"), model)
    with pytest.raises(EngineError, match="batch_size was 4 and is now 2"):
        run_job(make_job(tmp_path / "job", batch_size=2), model)
    with pytest.raises(EngineError, match="the base model is another"):
        run_job(make_job(tmp_path / "job"), model, base_fingerprint="other")
    job = dataclasses.replace(make_job(tmp_path / "job"), data_path=str(tmp_path / "other"))
    save_dataset(job.data_path, make_dataset("supervised", [([4, 5, 6], [0.0, 1.0, 1.0])] * 24))
    with pytest.raises(EngineError, match="the training data are others"):
        run_job(job, model)


@pytest.mark.parametrize(("sequences", "expected"), [
    ([], "training data are empty"),
    ([([4, 5], [0.0, 1.0]), ([4, 5], [1.0, 0.0])], "samples 2 have no token to learn from"),
    ([([4] * 65, [1.0] * 65)], "samples 1 are longer than max_seq_len, 64 tokens"),
])  # fmt: skip
def test_data_that_cannot_be_learnt_are_refused_before_anything_runs(
    tmp_path, model, sequences, expected
):
    job = make_job(tmp_path / "job")
    save_dataset(job.data_path, make_dataset("supervised", sequences))
    with pytest.raises(RequestError, match=expected):
        run_job(job, model)


def test_data_of_another_kind_are_refused(tmp_path, model):
    job = make_job(tmp_path / "job", kind="preference")
    with pytest.raises(RequestError, match="are of kind preference, but the method supervised"):
        run_job(job, model)


def test_a_job_that_cannot_run_names_every_reason(tmp_path, model):
    job = make_job(tmp_path / "job", kind="prompt", method="grpo", early_stopping_patience=2)
    with pytest.raises(RequestError, match=r"needs validation data.*needs a reward adapter"):
        run_job(job, model)
