"""/v1/fine_tuning/jobs with the unmodified openai client; the trainer follows a script."""

import asyncio
import csv
import io
import shutil
import sqlite3
import time
from pathlib import Path

import openai
import pytest

from engine.api import ErrorInfo, TrainingEnded
from engine.errors import AdapterError
from server.datasets.problems import DatasetErrors, Problem
from tests.server.fake_engine import add_adapter
from tests.server.job_fixtures import (
    SAMPLE,
    checkpoint,
    create,
    fake_prepare,
    herd,
    loadable_adapters,
    progress,
    save_adapter,
    started,
    succeeded,
    training_engine,
    until,
    until_status,
    upload,
    whole_run,
)

QUESTION = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def _loadable(monkeypatch):
    loadable_adapters(monkeypatch)


async def test_from_a_file_to_an_answer_of_the_new_model():
    async with herd() as h:
        file_id = await upload(h.client)
        job = await h.client.fine_tuning.jobs.create(
            model="base", training_file=file_id, suffix="support", seed=7, metadata={"who": "me"}
        )
        assert job.id.startswith("ftjob-")
        assert (job.object, job.model, job.seed) == ("fine_tuning.job", "base", 7)
        assert job.status in ("validating_files", "queued", "running", "succeeded")
        assert (job.method.type, job.metadata, job.error) == ("supervised", {"who": "me"}, None)
        done = await until_status(h.client, job.id, "succeeded")
        assert done.fine_tuned_model == f"ft:base:herd:support:{job.id[-8:]}"
        assert done.trained_tokens == 40
        assert abs(done.finished_at - time.time()) < 60
        assert done.hyperparameters.n_epochs == 3
        assert done.hyperparameters.batch_size == 2
        assert done.hyperparameters.learning_rate_multiplier == 1.0
        answer = await h.client.chat.completions.create(
            model=done.fine_tuned_model, messages=QUESTION
        )
        assert answer.choices[0].message.content == "Hello, wörld!"
        # The engine took the weights from the trainer's memory.
        [(ref, _)] = h.engine.loaded
        assert ref.name == done.fine_tuned_model
        assert h.engine.from_training == [f"{h.engine.training[0].folder}/final"]
        assert h.engine.requests[-1].adapter == ref


async def test_the_history_the_checkpoints_and_the_results_file():
    async with herd() as h:
        job = await create(h.client)
        done = await until_status(h.client, job.id, "succeeded")
        events = [e async for e in await h.client.fine_tuning.jobs.list_events(job.id, limit=4)]
        assert len({event.id for event in events}) == len(events) > 10
        messages = [event.message for event in events][::-1]
        assert messages[0] == f"Created fine-tuning job: {job.id}"
        assert "3 samples, format input-output" in messages[2]
        assert messages[-1] == "The job has successfully completed"
        warned = [event.message for event in events if event.level == "warn"]
        assert warned == ["step 3 was skipped", "data.jsonl: one of them is short"]
        steps = [event for event in events if event.type == "metrics"]
        assert [event.data["step"] for event in steps] == [4, 3, 2, 1]
        assert steps[0].data["train_loss"] == 1.0
        assert steps[0].message == "Step 4/4: training loss=1"

        found = [c async for c in await h.client.fine_tuning.jobs.checkpoints.list(job.id, limit=1)]
        assert [c.step_number for c in found] == [4, 2]
        assert found[0].fine_tuned_model_checkpoint == f"{done.fine_tuned_model}:ckpt-step-4"
        assert found[0].metrics.train_loss == 1.0
        assert found[0].fine_tuning_job_id == job.id

        [file_id] = done.result_files
        file = await h.client.files.retrieve(file_id)
        assert file.purpose == "fine-tune-results"
        text = (await h.client.files.content(file_id)).read().decode()
        rows = list(csv.DictReader(io.StringIO(text)))
        assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
        assert [row["valid_loss"] for row in rows] == ["", "1.0", "", ""]
        assert rows[3]["train_accuracy"] == "0.5"


async def test_each_checkpoint_is_a_model_that_is_loaded_when_it_is_used():
    async with herd() as h:
        job = await create(h.client)
        done = await until_status(h.client, job.id, "succeeded")
        name = f"{done.fine_tuned_model}:ckpt-step-2"
        assert len(h.engine.loaded) == 1
        assert name not in [model.id async for model in h.client.models.list()]
        answer = await h.client.chat.completions.create(model=name, messages=QUESTION)
        assert answer.model == name
        assert h.engine.loaded[-1][0].name == name
        assert name in [model.id async for model in h.client.models.list()]
        with pytest.raises(openai.NotFoundError):
            await h.client.chat.completions.create(
                model=name.replace("step-2", "step-3"), messages=QUESTION
            )


async def test_jobs_are_listed_a_page_at_a_time():
    async with herd() as h:
        file_id = await upload(h.client)
        ids = []
        for number in range(5):
            metadata = {"parity": "odd" if number % 2 else "even"}
            job = await create(h.client, training_file=file_id, metadata=metadata)
            ids.append(job.id)
        jobs = h.client.fine_tuning.jobs
        assert [job.id async for job in await jobs.list(limit=2)] == ids[::-1]
        page = await jobs.list(limit=2)
        assert (len(page.data), page.has_more) == (2, True)
        query = {"metadata[parity]": "odd"}
        assert [job.id async for job in await jobs.list(extra_query=query)] == [ids[3], ids[1]]
        with pytest.raises(openai.BadRequestError, match="after"):
            await jobs.list(after="ftjob-none")
        with pytest.raises(openai.NotFoundError):
            await jobs.retrieve("ftjob-none")
        with pytest.raises(openai.NotFoundError):
            await jobs.list_events("ftjob-none")
        with pytest.raises(openai.NotFoundError):
            await jobs.cancel("ftjob-none")


async def test_one_job_runs_at_a_time_and_the_others_wait_their_turn():
    async with herd(training_engine(lambda job: [started(job)])) as h:
        first = await create(h.client)
        second = await create(h.client)
        await until(lambda: h.engine.training)
        waiting = await until_status(h.client, second.id, "queued")
        assert waiting.estimated_finish is None
        running = h.engine.training[0]
        assert running.job_id == first.id
        h.engine.say(progress(running, 1))

        async def is_estimated():
            return (await h.client.fine_tuning.jobs.retrieve(first.id)).estimated_finish

        finish = await until(is_estimated)
        assert finish == pytest.approx(time.time() + 300, abs=10)
        assert len(h.engine.training) == 1
        h.engine.say(succeeded(running, 1))
        await until(lambda: len(h.engine.training) == 2)
        assert h.engine.training[1].job_id == second.id


async def test_what_the_trainer_is_told():
    async with herd() as h:
        given = {
            "n_epochs": 2,
            "batch_size": 8,
            "learning_rate_multiplier": "auto",
            "rank": 16,
            "target_modules": ["q_proj", "v_proj"],
            "learning_rate": 1e-3,
        }
        method = {"type": "supervised", "supervised": {"hyperparameters": given}}
        validation = await upload(h.client, 2, "validation.jsonl")
        job = await create(h.client, method=method, validation_file=validation, seed=5)
        done = await until_status(h.client, job.id, "succeeded")
        [told] = h.engine.training
        config = told.config
        assert (config.num_epochs, config.batch_size, config.rank) == (2.0, 8, 16)
        assert (config.target_modules, config.learning_rate) == (("q_proj", "v_proj"), 1e-3)
        assert (config.method, config.seed) == ("supervised", 5)
        assert told.validation_path.endswith("/validation.safetensors")
        assert (told.start_from, told.reference, told.reward_adapter) == (None, None, None)
        assert done.method.supervised.hyperparameters.n_epochs == 2
        assert done.method.supervised.hyperparameters.model_extra["rank"] == 16
        assert done.validation_file == validation


async def test_the_old_place_of_hyperparameters_and_the_multiplier():
    async with herd() as h:
        job = await create(h.client, hyperparameters={"learning_rate_multiplier": 0.5})
        done = await until_status(h.client, job.id, "succeeded")
        assert h.engine.training[0].config.learning_rate == pytest.approx(1e-4)
        assert done.hyperparameters.learning_rate_multiplier == 0.5


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "nothing"}, "model"),
        ({"training_file": "file-none"}, "training_file"),
        ({"validation_file": "file-none"}, "validation_file"),
        ({"suffix": "s" * 65}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {str(i): "v" for i in range(17)}}, "metadata"),
        ({"extra_body": {"epochs": 3}}, "epochs"),
        ({"method": {"type": "magic"}}, "method.type"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised"),
        ({"method": {"type": "reinforcement"}}, "method.reinforcement"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
        (
            {
                "method": {
                    "type": "reinforcement",
                    "reinforcement": {"grader": {"type": "python", "source": "x"}},
                }
            },
            "method.reinforcement.grader.source",
        ),
        (
            {
                "method": {
                    "type": "reinforcement",
                    "reinforcement": {"grader": {"type": "score_model", "model": "ada"}},
                }
            },
            "method.reinforcement.grader.model",
        ),
    ],
)
async def test_a_job_that_cannot_be_is_refused(fields, param):
    async with herd() as h:
        add_adapter(h.state, "ada")
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
            await create(h.client, **fields)
        assert caught.value.param == param
        assert (await h.client.fine_tuning.jobs.list()).data == []


@pytest.mark.parametrize(
    ("method", "given", "name", "text"),
    [
        ("supervised", {"epochs": 3}, "epochs", "There are: .*n_epochs"),
        ("supervised", {"num_epochs": 3}, "num_epochs", "n_epochs"),
        ("supervised", {"beta": 0.1}, "beta", "only the method 'dpo'"),
        ("dpo", {"num_generations": 4}, "num_generations", "only the method 'reinforcement'"),
        ("dpo", {"beta": 0}, "beta", "positive"),
        ("supervised", {"rank": 0}, "rank", "positive"),
        ("supervised", {"rank": "8"}, "rank", "valid integer"),
        ("supervised", {"rank": 8.5}, "rank", "valid integer"),
        ("supervised", {"n_epochs": 0}, "n_epochs", "n_epochs: expected a positive"),
        ("supervised", {"target_modules": ["magic_proj"]}, "target_modules", "matches no linear"),
        ("supervised", {"target_modules": ["lm_head"]}, "target_modules", "is the head"),
        ("reward", {"target_modules": ["("]}, "target_modules", "regular expression"),
        ("dpo", {"early_stopping_patience": 2}, "early_stopping_patience", "validation_file"),
        ("supervised", {"max_seq_len": 513}, "max_seq_len", "512"),
        ("supervised", {"learning_rate_multiplier": 0}, "learning_rate_multiplier", "more than 0"),
        ("supervised", {"n_epochs": 1e300}, "n_epochs", "less than 2147483648"),
        ("supervised", {"batch_size": 2**31}, "batch_size", "less than 2147483648"),
        ("supervised", {"optimizer": "sgd"}, "optimizer", "adamw"),
        ("supervised", {"seed": 1}, "seed", "of the job itself"),
        ("supervised", {"packing": 1}, "packing", "boolean"),
        (
            "supervised",
            {"learning_rate": 1e-4, "learning_rate_multiplier": 2.0},
            "learning_rate_multiplier",
            "one of them",
        ),
    ],
)
async def test_hyperparameters_are_checked_by_name_and_value(method, given, name, text):
    async with herd() as h:
        body = {"type": method, method: {"hyperparameters": given}}
        with pytest.raises(openai.BadRequestError, match=text) as caught:
            await create(h.client, method=body)
        assert caught.value.param == f"method.{method}.hyperparameters.{name}"


@pytest.mark.parametrize("name", ["learning_rate", "learning_rate_multiplier", "neftune_alpha"])
@pytest.mark.parametrize("number", ["1e400", "NaN"])
async def test_numbers_that_json_cannot_show_again_are_refused(name, number):
    async with herd() as h:
        body = (
            f'{{"model": "base", "training_file": "{await upload(h.client)}", '
            f'"hyperparameters": {{"{name}": {number}}}}}'
        )
        response = await h.http.post("/v1/fine_tuning/jobs", content=body)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"].endswith(name)
        assert (await h.client.fine_tuning.jobs.list()).data == []


async def test_a_file_of_another_purpose_is_refused():
    async with herd() as h:
        file = await h.client.files.create(file=SAMPLE, purpose="batch")
        with pytest.raises(openai.BadRequestError, match="purpose 'batch'"):
            await create(h.client, training_file=file.id)


async def test_bad_data_fail_the_job_with_every_problem_named():
    def prepare(_path, **settings):
        problems = tuple(Problem(message=f"no answer in {n}", line=n) for n in (3, 9))
        raise DatasetErrors(settings["file_name"], problems, 2)

    async with herd(prepare=prepare) as h:
        job = await create(h.client, validation_file=await upload(h.client, 2, "held-out.jsonl"))
        failed = await until_status(h.client, job.id, "failed")
        assert failed.error.code == "invalid_training_data"
        assert failed.error.param == "training_file"
        for text in (
            "data.jsonl: 2 problems",
            "line 3: no answer in 3",
            "line 9",
            "held-out.jsonl",
        ):
            assert text in failed.error.message
        assert failed.finished_at is not None
        assert h.engine.training == []
        [event, *_] = (await h.client.fine_tuning.jobs.list_events(job.id)).data
        assert (event.level, event.message) == ("error", failed.error.message)


async def test_a_file_may_be_deleted_once_the_job_is_queued():
    async with herd(training_engine(lambda job: [started(job)])) as h:
        await create(h.client)
        file_id = await upload(h.client)
        second = await create(h.client, training_file=file_id)
        await until_status(h.client, second.id, "queued")
        await h.client.files.delete(file_id)
        h.engine.train = whole_run
        h.engine.say(succeeded(h.engine.training[0], 1))
        assert (await until_status(h.client, second.id, "succeeded", "failed")).error is None


async def test_a_file_that_goes_before_it_is_read_fails_the_job(tmp_path):
    engine = training_engine()
    async with herd(engine, data_dir=tmp_path) as h:
        await h.state.jobs.runner.stop()
        file_id = await upload(h.client)
        h.state.jobs.runner.is_in_charge = True
        job = await create(h.client, training_file=file_id)
        await h.client.files.delete(file_id)
    async with herd(engine, data_dir=tmp_path) as h:
        failed = await until_status(h.client, job.id, "failed")
        assert (failed.error.code, failed.error.param) == ("file_not_found", "training_file")


async def test_cancel_ends_a_running_job_and_the_next_one_begins():
    async with herd(training_engine(lambda job: [started(job), checkpoint(job, 2)])) as h:
        first, second = await create(h.client), await create(h.client)
        await until(lambda: h.engine.training)
        cancelled = await h.client.fine_tuning.jobs.cancel(first.id)
        assert cancelled.status == "cancelled"
        assert cancelled.fine_tuned_model is None
        assert cancelled.finished_at is not None
        assert h.engine.stopped_training == [(first.id, "cancelled")]
        assert len(h.engine.training) == 1  # the engine is still at its step
        h.engine.say(TrainingEnded(job_id=first.id, status="cancelled", step=2, trained_tokens=20))
        await until(lambda: len(h.engine.training) == 2)
        again = await h.client.fine_tuning.jobs.retrieve(first.id)
        assert (again.status, again.trained_tokens) == ("cancelled", 20)
        [found] = (await h.client.fine_tuning.jobs.checkpoints.list(first.id)).data
        answer = await h.client.chat.completions.create(
            model=found.fine_tuned_model_checkpoint, messages=QUESTION
        )
        assert answer.choices
        await h.client.fine_tuning.jobs.cancel(second.id)
        for call in ("cancel", "pause", "resume"):
            with pytest.raises(openai.BadRequestError, match="cancelled already"):
                await getattr(h.client.fine_tuning.jobs, call)(second.id)


async def test_a_queued_job_can_be_cancelled_before_it_runs():
    async with herd(training_engine(lambda job: [started(job)])) as h:
        await create(h.client)
        second = await create(h.client)
        await until_status(h.client, second.id, "queued")
        assert (await h.client.fine_tuning.jobs.cancel(second.id)).status == "cancelled"
        h.engine.say(succeeded(h.engine.training[0], 1))
        third = await create(h.client)
        await until(lambda: len(h.engine.training) == 2)
        assert h.engine.training[1].job_id == third.id


async def test_a_paused_job_lets_others_pass_and_goes_on_when_it_is_resumed():
    async with herd(training_engine(lambda job: [started(job)])) as h:
        first = await create(h.client)
        await until(lambda: h.engine.training)
        paused = await h.client.fine_tuning.jobs.pause(first.id)
        assert paused.status == "queued"
        assert paused.model_extra["paused"] is True
        assert h.engine.stopped_training == [(first.id, "paused")]
        with pytest.raises(openai.BadRequestError, match="paused already"):
            await h.client.fine_tuning.jobs.pause(first.id)
        h.engine.say(TrainingEnded(job_id=first.id, status="paused", step=1))
        h.engine.train = whole_run
        second = await create(h.client)
        await until_status(h.client, second.id, "succeeded")
        assert (await h.client.fine_tuning.jobs.retrieve(first.id)).status == "queued"
        resumed = await h.client.fine_tuning.jobs.resume(first.id)
        assert resumed.model_extra["paused"] is False
        await until_status(h.client, first.id, "succeeded")
        assert [job.job_id for job in h.engine.training] == [first.id, second.id, first.id]
        assert h.engine.training[0].folder == h.engine.training[2].folder
        with pytest.raises(openai.BadRequestError, match="succeeded"):
            await h.client.fine_tuning.jobs.resume(first.id)


async def test_a_job_that_is_resumed_before_the_engine_has_stopped_goes_on_then():
    async with herd(training_engine(lambda job: [started(job)])) as h:
        job = await create(h.client)
        await until(lambda: h.engine.training)
        await h.client.fine_tuning.jobs.pause(job.id)
        await h.client.fine_tuning.jobs.resume(job.id)
        assert len(h.engine.training) == 1
        h.engine.say(TrainingEnded(job_id=job.id, status="paused", step=1))
        await until(lambda: len(h.engine.training) == 2)
        await until_status(h.client, job.id, "running")


async def test_a_failed_job_says_why():
    def train(job):
        error = ErrorInfo(code="invalid_request", message="no layer q_porj", param="target_modules")
        return [TrainingEnded(job_id=job.job_id, status="failed", error=error)]

    async with herd(training_engine(train)) as h:
        job = await create(h.client)
        failed = await until_status(h.client, job.id, "failed")
        assert failed.error.message == "no layer q_porj"
        assert failed.error.param == "target_modules"
        assert failed.fine_tuned_model is None


async def test_training_goes_on_after_the_workers_death_without_a_step_twice():
    lives = []

    def train(job):
        lives.append(job)
        if len(lives) == 1:
            return [started(job), progress(job, 1), checkpoint(job, 1), progress(job, 2), died(job)]
        again = [started(job, step=1), checkpoint(job, 1)]
        return [*again, *[progress(job, n) for n in (2, 3, 4)], succeeded(job)]

    async with herd(training_engine(train)) as h:
        job = await create(h.client)
        await until_status(h.client, job.id, "succeeded")
        assert lives[0] == lives[1] or lives[0].folder == lives[1].folder
        events = (await h.client.fine_tuning.jobs.list_events(job.id, limit=100)).data
        steps = [event.data["step"] for event in events if event.type == "metrics"]
        assert steps == [4, 3, 2, 1]
        messages = [event.message for event in events]
        assert "Training goes on from step 1 of 4" in messages
        assert sum(message.startswith("Checkpoint created") for message in messages) == 1


async def test_a_job_that_kills_every_worker_fails():
    async with herd(training_engine(lambda job: [started(job), died(job)])) as h:
        job = await create(h.client)
        failed = await until_status(h.client, job.id, "failed")
        assert failed.error.code == "worker_died"
        assert len(h.engine.training) == 3


async def test_a_job_waits_while_a_new_worker_is_started():
    def prepare(path, **settings):
        engine.state = "restarting"
        return fake_prepare(path, **settings)

    engine = training_engine()
    async with herd(engine, prepare=prepare) as h:
        job = await create(h.client)
        await until_status(h.client, job.id, "running")
        await asyncio.sleep(0.3)
        assert engine.training == []
        engine.state = "ready"
        await until_status(h.client, job.id, "succeeded")


async def test_a_new_server_goes_on_with_the_jobs_of_the_old_one(tmp_path):
    async with herd(training_engine(lambda job: [started(job), checkpoint(job, 2)]),
                    data_dir=tmp_path) as h:  # fmt: skip
        first, second, third = [await create(h.client) for _ in range(3)]
        await until(lambda: h.engine.training)
        await until_status(h.client, third.id, "queued")
        await h.client.fine_tuning.jobs.pause(third.id)
    async with herd(data_dir=tmp_path) as h:
        await until_status(h.client, second.id, "succeeded")
        assert [job.job_id for job in h.engine.training] == [first.id, second.id]
        still = await h.client.fine_tuning.jobs.retrieve(third.id)
        assert (still.status, still.model_extra["paused"]) == ("queued", True)


async def test_a_new_server_lists_the_models_and_loads_them_when_they_are_used(tmp_path):
    async with herd(data_dir=tmp_path) as h:
        job = await create(h.client)
        done = await until_status(h.client, job.id, "succeeded")
    async with herd(data_dir=tmp_path) as h:
        name = done.fine_tuned_model
        assert name in [model.id async for model in h.client.models.list()]
        assert (await h.client.models.retrieve(name)).id == name
        assert h.engine.loaded == []
        answers = [
            h.client.chat.completions.create(model=name, messages=QUESTION) for _ in range(3)
        ]
        assert all(answer.choices for answer in await asyncio.gather(*answers))
        assert [ref.name for ref, _ in h.engine.loaded] == [name]
        checkpoint_name = f"{name}:ckpt-step-2"
        await h.client.completions.create(model=checkpoint_name, prompt="x")
        assert len(h.engine.loaded) == 2
        deleted = await h.client.models.delete(name)
        assert deleted.deleted
        assert not list(tmp_path.glob("jobs/*/final"))
        with pytest.raises(openai.NotFoundError):
            await h.client.chat.completions.create(model=name, messages=QUESTION)
    async with herd(data_dir=tmp_path) as h:
        assert name not in [model.id async for model in h.client.models.list()]
        await h.client.completions.create(model=checkpoint_name, prompt="x")


async def test_jobs_of_another_base_wait_for_theirs(tmp_path):
    async with herd(data_dir=tmp_path) as h:
        job = await create(h.client)
        done = await until_status(h.client, job.id, "succeeded")
    other = training_engine()
    other.base_fingerprint = "fedcba9876543210"
    async with herd(other, data_dir=tmp_path) as h:
        assert done.fine_tuned_model not in [model.id async for model in h.client.models.list()]
        assert (await h.client.fine_tuning.jobs.retrieve(job.id)).status == "succeeded"


async def test_two_servers_do_not_run_the_same_jobs(tmp_path, monkeypatch):
    monkeypatch.setattr("server.job_runner.LOCK_POLL_S", 0.02)
    async with herd(data_dir=tmp_path) as first, herd(data_dir=tmp_path) as second:
        with pytest.raises(openai.ConflictError, match="Another server"):
            await create(second.client)
        job = await create(first.client)
        await until_status(first.client, job.id, "succeeded")
        assert second.engine.training == []
        await first.state.jobs.stop()
        await until(lambda: second.state.jobs.runner.is_in_charge)
        await until_status(second.client, (await create(second.client)).id, "succeeded")


async def test_a_locked_database_delays_a_job_and_loses_nothing(monkeypatch):
    monkeypatch.setattr("server.job_rows.RETRY_S", 0.05)
    async with herd(training_engine(lambda job: [started(job)])) as h:
        job = await create(h.client)
        await until(lambda: h.engine.training)
        await until_status(h.client, job.id, "running")
        other = sqlite3.connect(h.state.jobs.shop.database.engine.url.database)
        other.execute("BEGIN IMMEDIATE")
        for event in whole_run(h.engine.training[0])[1:]:
            h.engine.say(event)
        with pytest.raises(openai.InternalServerError, match="locked"):
            await h.client.fine_tuning.jobs.cancel(job.id)
        assert (await h.client.fine_tuning.jobs.retrieve(job.id)).status == "running"
        other.rollback()
        other.close()
        done = await until_status(h.client, job.id, "succeeded")
        events = (await h.client.fine_tuning.jobs.list_events(job.id, limit=100)).data
        steps = [event.data["step"] for event in events if event.type == "metrics"]
        assert steps == [4, 3, 2, 1]
        assert done.trained_tokens == 40


async def test_a_full_disk_costs_the_results_file_and_not_the_job(monkeypatch):
    async with herd(training_engine(lambda job: [started(job)])) as h:
        job = await create(h.client)
        await until(lambda: h.engine.training)

        def full(_self, _content):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pathlib.Path.write_bytes", full)
        for event in whole_run(h.engine.training[0])[1:]:
            h.engine.say(event)
        done = await until_status(h.client, job.id, "succeeded")
        assert done.result_files == []
        events = (await h.client.fine_tuning.jobs.list_events(job.id)).data
        assert any("results file could not be written" in event.message for event in events)


async def test_a_copy_that_finds_no_room_costs_no_job(monkeypatch):
    async with herd() as h:

        def full(*_args, **_options):
            raise AdapterError("cannot be copied") from OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(h.state.registry, "prepare", full)
            job = await create(h.client)
            done = await until_status(h.client, job.id, "succeeded")
        events = [e.message async for e in await h.client.fine_tuning.jobs.list_events(job.id)]
        assert any("will be loaded when it is first used" in message for message in events)
        await h.client.chat.completions.create(model=done.fine_tuned_model, messages=QUESTION)


async def test_what_only_a_running_job_needs_goes_when_it_ends(tmp_path):
    def run(job):
        saved = checkpoint(job, 2)
        Path(saved.path, "trainer_state.safetensors").touch()
        return [started(job), saved, succeeded(job)]

    async with herd(training_engine(run), data_dir=tmp_path) as h:
        job = await create(h.client)
        done = await until_status(h.client, job.id, "succeeded")
        folder = tmp_path / "jobs" / job.id
        await until(lambda: not (folder / "train.safetensors").exists())
        await until(lambda: not list(folder.glob("*/trainer_state.safetensors")))
        name = f"{done.fine_tuned_model}:ckpt-step-2"
        await h.client.completions.create(model=name, prompt="x")
        await h.client.models.delete(name)
        assert sorted(path.name for path in folder.iterdir()) == ["final"]


async def test_no_room_for_the_tokens_fails_the_job_clearly():
    def prepare(_path, **_settings):
        raise OSError(28, "No space left on device")

    async with herd(prepare=prepare) as h:
        job = await create(h.client)
        failed = await until_status(h.client, job.id, "failed")
        assert failed.error.code == "storage_unavailable"
        assert "No space left" in failed.error.message


async def test_a_fault_of_ours_fails_one_job_and_the_next_one_runs():
    def prepare(_path, **_settings):
        raise RuntimeError("a secret of the inside")

    async with herd(prepare=prepare) as h:
        failed = await until_status(h.client, (await create(h.client)).id, "failed")
        assert failed.error.code == "internal_error"
        assert "secret" not in failed.error.message
        assert h.state.jobs.runner.is_in_charge
        failed = await until_status(h.client, (await create(h.client)).id, "failed")


async def test_a_fault_of_ours_in_mid_job_stops_the_engine_before_the_next_job(monkeypatch):
    async with herd(training_engine(lambda job: [started(job)])) as h:
        job, second = await create(h.client), await create(h.client)
        await until_status(h.client, second.id, "queued")
        await until(lambda: h.engine.training)
        monkeypatch.setattr("server.job_training.record", lambda *_: 1 / 0)
        h.engine.say(progress(h.engine.training[0], 1))
        await until(lambda: h.engine.stopped_training == [(job.id, "cancelled")])
        assert len(h.engine.training) == 1
        monkeypatch.undo()
        loadable_adapters(monkeypatch)
        h.engine.train = whole_run
        h.engine.say(TrainingEnded(job_id=job.id, status="cancelled", step=1))
        failed = await until_status(h.client, job.id, "failed")
        assert failed.error.code == "internal_error"
        await until_status(h.client, second.id, "succeeded")


async def test_training_goes_on_from_an_adapter_as_it_was_then(tmp_path):
    async with herd() as h:
        record = await h.state.adapters.load_at_start("ada", save_adapter(tmp_path / "ada"))
        job = await create(h.client, model="ada", method={"type": "dpo"})
        await until_status(h.client, job.id, "succeeded")
        [told] = h.engine.training
        assert told.start_from == told.reference
        assert told.start_from.uid < 0
        assert told.start_from.path.startswith(told.folder)
        await until(lambda: not Path(told.start_from.path).exists())  # nobody needs it any more
        assert told.config.rank == record.info.rank
        assert told.config.target_modules == ("q_proj",)
        method = {"type": "supervised", "supervised": {"hyperparameters": {"rank": 3}}}
        with pytest.raises(openai.BadRequestError, match="whose rank is 8"):
            await create(h.client, model="ada", method=method)


async def test_answers_are_scored_by_a_reward_adapter(tmp_path):
    async with herd() as h:
        folder = save_adapter(tmp_path / "judge", score=True)
        await h.state.adapters.load_at_start("judge", folder)
        grader = {"type": "score_model", "name": "j", "model": "judge"}
        given = {"num_generations": 4, "eval_interval": 5}
        method = {"grader": grader, "hyperparameters": given}
        job = await create(h.client, method={"type": "reinforcement", "reinforcement": method})
        done = await until_status(h.client, job.id, "succeeded")
        [told] = h.engine.training
        assert (told.config.method, told.config.num_generations) == ("grpo", 4)
        assert told.config.eval_every_steps == 5
        assert told.reward_adapter.path.startswith(told.folder)
        assert told.reward_adapter in [ref for ref, _ in h.engine.loaded]
        assert told.reward_adapter in h.engine.unloaded
        assert done.method.reinforcement.grader.model == "judge"
        with pytest.raises(openai.BadRequestError, match="reward adapter"):
            await create(h.client, model="judge")


async def test_a_reward_job_makes_a_model_that_scores():
    async with herd() as h:
        job = await create(h.client, method={"type": "reward"})
        done = await until_status(h.client, job.id, "succeeded")
        assert h.engine.training[0].config.method == "reward"
        assert h.state.registry.resolve(done.fine_tuned_model).info.has_score_head


async def test_a_fine_tuned_model_becomes_the_next_generation_of_an_adapter(tmp_path):
    async with herd() as h:
        await h.state.adapters.load_at_start("ada", save_adapter(tmp_path / "ada"))
        job = await create(h.client)
        done = await until_status(h.client, job.id, "succeeded")
        body = {"lora_name": "ada", "lora_path": done.fine_tuned_model, "load_inplace": True}
        response = await h.http.post("/v1/load_lora_adapter", json=body)
        assert response.status_code == 200, response.text
        assert h.state.registry.resolve("ada").ref.generation == 2
        back = await h.http.post("/v1/adapters/ada/rollback")
        assert back.json()["generation"] == 1
        taken = {"lora_name": "ft:base:herd::x", "lora_path": "ada"}
        response = await h.http.post("/v1/load_lora_adapter", json=taken)
        assert response.status_code == 400
        assert "ft:" in response.json()["error"]["message"]


async def test_an_adapter_that_cannot_be_served_fails_its_job():
    async with herd() as h:
        h.engine.adapter_error = "changes nothing"
        failed = await until_status(h.client, (await create(h.client)).id, "failed")
        assert failed.error.message == "changes nothing"
        assert failed.error.code == "invalid_adapter"


async def test_conversations_without_a_template_are_trained_in_guanacos_and_keep_it():
    seen = []

    def prepare(path, **settings):
        seen.append(settings["template"])
        return fake_prepare(path, **settings)

    async with herd(prepare=prepare) as h:
        shop = h.state.jobs.shop
        object.__setattr__(shop.tokenizer, "chat_template", None)
        done = await until_status(h.client, (await create(h.client)).id, "succeeded")
        assert "### Human" in seen[0].source
        await h.client.chat.completions.create(model=done.fine_tuned_model, messages=QUESTION)
        prompt = bytes(t for t in h.engine.requests[-1].prompt_token_ids if t < 256)
        assert prompt.endswith(b"### Human: hi### Assistant:")
        checkpoint_name = f"{done.fine_tuned_model}:ckpt-step-4"
        await h.client.chat.completions.create(model=checkpoint_name, messages=QUESTION)
        again = bytes(t for t in h.engine.requests[-1].prompt_token_ids if t < 256)
        assert again == prompt


async def test_checkpoints_that_the_trainer_has_removed_are_not_offered():
    def train(job):
        events = [started(job), checkpoint(job, 1), checkpoint(job, 2), checkpoint(job, 3)]
        shutil.rmtree(events[1].path)
        return [*events, succeeded(job)]

    async with herd(training_engine(train)) as h:
        job = await create(h.client)
        done = await until_status(h.client, job.id, "succeeded")
        found = (await h.client.fine_tuning.jobs.checkpoints.list(job.id)).data
        assert [c.step_number for c in found] == [3, 2]
        with pytest.raises(openai.NotFoundError):
            await h.client.completions.create(
                model=f"{done.fine_tuned_model}:ckpt-step-1", prompt="x"
            )


async def test_changing_jobs_needs_the_admin_key():
    async with herd(api_key=("user",), admin_api_key="root") as h:
        user, root = h.client.with_options(api_key="user"), h.client.with_options(api_key="root")
        file_id = await upload(root)
        with pytest.raises(openai.AuthenticationError):
            await create(user, training_file=file_id)
        job = await create(root, training_file=file_id)
        assert (await user.fine_tuning.jobs.retrieve(job.id)).id == job.id
        for call in (user.fine_tuning.jobs.cancel, user.fine_tuning.jobs.pause):
            with pytest.raises(openai.AuthenticationError):
                await call(job.id)
        with pytest.raises(openai.AuthenticationError):
            await h.client.fine_tuning.jobs.list()


def died(job):
    error = ErrorInfo(code="engine_restarting", message="The engine worker was killed.")
    return TrainingEnded(job_id=job.job_id, status="failed", error=error)
