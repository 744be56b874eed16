"""What a run has told: read once, then only the news."""

import asyncio

from ui import training_api
from ui.api_types import Visitor
from ui.client import Client
from ui.training_api import Runs

NOBODY = Visitor()


class Events:
    """A client whose API has one job; counts the events that it hands out."""

    def __init__(self):
        self.events = []
        self.num_sent = 0

    def tell(self, *steps):
        for step in steps:
            self.events.append(
                {
                    "id": f"e{len(self.events)}-{step}",
                    "type": "metrics",
                    "message": f"Step {step}",
                    "data": {"step": step, "train_loss": float(len(self.events))},
                }
            )

    async def call(self, method, path, visitor, *, params):
        assert (method, path, visitor) == ("GET", "/v1/fine_tuning/jobs/job%2F1/events", NOBODY)
        newest = self.events[::-1]
        if "after" in params:
            newest = newest[[event["id"] for event in newest].index(params["after"]) + 1 :]
        await asyncio.sleep(0)
        page = newest[: params["limit"]]
        self.num_sent += len(page)
        has_more = len(newest) > len(page)
        return {"data": page, "has_more": has_more, "last_id": page[-1]["id"] if page else None}


def runs_of(events) -> Runs:
    runs = Runs(Client("http://127.0.0.1:9"))
    runs._client = events
    return runs


async def test_a_long_history_is_read_in_pages_and_only_once(monkeypatch):
    monkeypatch.setattr(training_api, "ALL_EVENTS", 10)
    monkeypatch.setattr(training_api, "NEW_EVENTS", 3)
    events = Events()
    events.tell(*range(1, 26))
    runs = runs_of(events)
    history = await runs.history("job/1", NOBODY)
    assert list(history.metrics) == list(range(1, 26))
    events.num_sent = 0
    events.tell(*range(26, 31))
    history = await runs.history("job/1", NOBODY)
    assert list(history.metrics) == list(range(1, 31))
    assert events.num_sent <= 6
    assert await runs.history("job/1", NOBODY) is history


async def test_steps_that_are_done_again_after_a_restart_replace_the_old_ones():
    events = Events()
    events.tell(1, 2, 3, 4)
    events.events.insert(0, {"id": "n", "type": "message", "message": "started", "data": None})
    runs = runs_of(events)
    assert len((await runs.history("job/1", NOBODY)).metrics) == 4
    del events.events[-2:]  # the worker died; its last checkpoint was at step 2
    events.tell(3)
    history = await runs.history("job/1", NOBODY)
    assert list(history.metrics) == [1, 2, 3]
    assert history.notes == ["started"]


async def test_two_visitors_who_look_at_once_note_everything_once():
    events = Events()
    events.events.append({"id": "n", "type": "message", "message": "started", "data": None})
    runs = runs_of(events)
    await asyncio.gather(*(runs.history("job/1", NOBODY) for _ in range(3)))
    assert (await runs.history("job/1", NOBODY)).notes == ["started"]


async def test_only_the_last_runs_are_kept(monkeypatch):
    monkeypatch.setattr(training_api, "MAX_HISTORIES", 1)
    events = Events()
    events.tell(1)
    runs = runs_of(events)
    first = await runs.history("job/1", NOBODY)
    runs._histories["another"] = first
    await runs.history("job/1", NOBODY)
    assert list(runs._histories) == ["job/1"]
