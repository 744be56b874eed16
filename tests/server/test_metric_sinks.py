"""Weights & Biases and TensorBoard, which are optional: stand-ins take their place."""

import sys
from types import SimpleNamespace

import openai
import pytest

from engine.errors import EngineError
from server.metric_sinks import check_tensorboard
from tests.server.job_fixtures import create, herd, loadable_adapters, until, until_status

WANDB = [{"type": "wandb", "wandb": {"project": "herd", "tags": ["a"]}}]


@pytest.fixture(autouse=True)
def _loadable(monkeypatch):
    loadable_adapters(monkeypatch)


class FakeWandb:
    """The part of the package that is used."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.runs, self.logged, self.fails_at = [], [], fails_at
        self.num_finished = 0

    def init(self, **settings):
        self.runs.append(settings)
        return self

    def log(self, metrics, step):
        if step == self.fails_at:
            raise RuntimeError("no network")
        self.logged.append((step, metrics["train_loss"]))

    def finish(self):
        self.num_finished += 1


@pytest.fixture
def installed(monkeypatch):
    found = ["wandb", "tensorboard"]
    monkeypatch.setattr("server.metric_sinks._is_installed", lambda package: package in found)


@pytest.mark.usefixtures("installed")
async def test_wandb_gets_every_step(monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    async with herd() as h:
        job = await create(h.client, integrations=WANDB)
        done = await until_status(h.client, job.id, "succeeded")
        assert done.integrations[0].wandb.project == "herd"
        await until(lambda: wandb.num_finished)
    [run] = wandb.runs
    assert (run["project"], run["tags"], run["id"]) == ("herd", ["a"], job.id)
    assert run["name"] == done.fine_tuned_model
    assert wandb.logged == [(1, 4.0), (2, 2.0), (3, 4.0 / 3), (4, 1.0)]


@pytest.mark.usefixtures("installed")
async def test_what_goes_wrong_there_does_not_hurt_the_job(monkeypatch):
    wandb = FakeWandb(fails_at=2)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    async with herd() as h:
        job = await create(h.client, integrations=WANDB)
        await until_status(h.client, job.id, "succeeded")

        async def told():
            events = (await h.client.fine_tuning.jobs.list_events(job.id, limit=100)).data
            return [event for event in events if "no network" in event.message]

        [event] = await until(told)
        assert event.level == "warn"
    assert wandb.logged == [(1, 4.0)]


async def test_wandb_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("server.metric_sinks._is_installed", lambda _package: False)
    async with herd() as h:
        with pytest.raises(openai.BadRequestError, match="pip install wandb"):
            await create(h.client, integrations=WANDB)


@pytest.mark.usefixtures("installed")
async def test_tensorboard_gets_every_step(monkeypatch, tmp_path):
    scalars, closed = [], []

    class Writer:
        def __init__(self, log_dir):
            self.log_dir = log_dir

        def add_scalar(self, name, value, step):
            scalars.append((self.log_dir, name, value, step))

        def close(self):
            closed.append(True)

    module = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    async with herd(tensorboard_dir=str(tmp_path)) as h:
        job = await create(h.client)
        await until_status(h.client, job.id, "succeeded")
        await until(lambda: closed)
    losses = [value for _, name, value, _ in scalars if name == "train_loss"]
    assert losses == [4.0, 2.0, 4.0 / 3, 1.0]
    assert {folder for folder, *_ in scalars} == {str(tmp_path / job.id)}


def test_tensorboard_is_refused_where_it_is_not_installed(monkeypatch):
    check_tensorboard(None)
    monkeypatch.setattr("server.metric_sinks._is_installed", lambda _package: False)
    with pytest.raises(EngineError, match="pip install tensorboard"):
        check_tensorboard("/logs")
