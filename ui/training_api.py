"""The API's side of training as the page sees it: files, feedback, jobs, adapters.

Public   File, Adapter, Job, Runs
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from ui.api_types import ApiError, Visitor
from ui.client import Client

MAX_FILES = 100
MAX_JOBS = 50
ALL_EVENTS, NEW_EVENTS = 1000, 50
"""Asked for at once, at first and at each poll."""
MAX_HISTORIES = 16
HAS_ENDED = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file that can be learnt from."""

    id: str
    name: str
    num_bytes: int

    @property
    def title(self) -> str:
        size_kb = max(self.num_bytes / 1000, 1)
        size = f"{size_kb:.0f} kB" if size_kb < 1000 else f"{size_kb / 1000:.1f} MB"
        return f"{self.name} · {size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter with what training needs to know of it."""

    name: str
    generation: int
    generations: list[int]
    """That can be made current."""
    scores: bool
    """It has a score head: it judges and does not chat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training run."""

    id: str
    status: str
    is_paused: bool
    model: str
    """It starts from this one."""
    result: str | None
    """Name of the trained adapter, once it answers."""
    method: str
    created_at: int
    suffix: str | None = None
    step: int = 0
    num_steps: int | None = None
    finish_at: int | None = None
    """Unix time."""
    error: str | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in HAS_ENDED

    @property
    def title(self) -> str:
        name = self.suffix or self.id.removeprefix("ftjob-")[:8]
        return f"{name} · {self.method} from {self.model}"


@dataclass(slots=True)
class History:
    """What a run has told so far."""

    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    """By step; a step that was done again after a restart holds its last values."""
    notes: list[str] = field(default_factory=list)
    """Its messages, oldest first."""
    last_id: str | None = None


class Runs:
    """Calls of the API; what runs have told is kept, so that each poll asks for the news only."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._histories: OrderedDict[str, History] = OrderedDict()

    async def files(self, visitor: Visitor) -> list[File]:
        """Training files, newest first.

        Raises:
            ApiError: the API refuses; so for all below.
        """
        params = {"purpose": "fine-tune", "limit": MAX_FILES}
        reply = await self._client.call("GET", "/v1/files", visitor, params=params)
        return [
            File(id=entry["id"], name=entry["filename"], num_bytes=entry["bytes"])
            for entry in reply["data"]
        ]

    async def feedback(self, visitor: Visitor) -> dict[str, int]:
        """How many samples the collected feedback makes, by format."""
        reply = await self._client.call("GET", "/v1/feedback/summary", visitor)
        return {name: reply[f"num_{name}_samples"] for name in ("supervised", "preference")}

    async def export_feedback(self, kind: str, visitor: Visitor) -> str:
        """Make a training file of the collected feedback; gives its id."""
        reply = await self._client.call(
            "POST", "/v1/feedback/export", visitor, body={"format": kind}
        )
        return str(reply["id"])

    async def adapters(self, visitor: Visitor) -> list[Adapter]:
        """All adapters that are loaded."""
        reply = await self._client.call("GET", "/v1/adapters", visitor)
        return [
            Adapter(
                name=entry["name"],
                generation=entry["generation"],
                generations=entry["generations"],
                scores=entry["has_score_head"],
            )
            for entry in reply["data"]
        ]

    async def create(self, body: dict[str, Any], visitor: Visitor) -> Job:
        """Start a run."""
        return _job(await self._client.call("POST", "/v1/fine_tuning/jobs", visitor, body=body))

    async def jobs(self, visitor: Visitor) -> list[Job]:
        """Runs, newest first."""
        reply = await self._client.call(
            "GET", "/v1/fine_tuning/jobs", visitor, params={"limit": MAX_JOBS}
        )
        return [_job(entry) for entry in reply["data"]]

    async def job(self, job_id: str, visitor: Visitor) -> Job:
        """One run."""
        return _job(await self._client.call("GET", _path(job_id), visitor))

    async def act(self, job_id: str, action: str, visitor: Visitor) -> Job:
        """Pause, resume or cancel a run."""
        path = _path(job_id, action)
        return _job(await self._client.call("POST", path, visitor))

    async def history(self, job_id: str, visitor: Visitor) -> History:
        """What a run has told so far."""
        history = self._histories.setdefault(job_id, History())
        self._histories.move_to_end(job_id)
        while len(self._histories) > MAX_HISTORIES:
            self._histories.popitem(last=False)
        last_id = history.last_id
        news, is_known = await self._news(job_id, last_id, visitor)
        if self._histories.get(job_id) is not history or history.last_id != last_id:
            return self._histories.get(job_id, history)  # another visitor's poll was quicker
        if not is_known:  # the run has gone back to a checkpoint: what came after it is gone
            self._histories[job_id] = history = History()
        for event in reversed(news):
            _note(history, event)
        return history

    async def _news(
        self, job_id: str, last_id: str | None, visitor: Visitor
    ) -> tuple[list[dict[str, Any]], bool]:
        """Events after the last one, newest first, and whether that one is still there."""
        news: list[dict[str, Any]] = []
        params: dict[str, Any] = {"limit": ALL_EVENTS if last_id is None else NEW_EVENTS}
        while True:
            path = _path(job_id, "events")
            reply = await self._client.call("GET", path, visitor, params=params)
            for event in reply["data"]:
                if event["id"] == last_id:
                    return news, True
                news.append(event)
            if not reply["has_more"]:
                return news, last_id is None
            params["after"] = reply["last_id"]

    async def put_in_place(self, result: str, name: str, visitor: Visitor) -> None:
        """Publish a run's result as the next generation of an adapter."""
        body = {"lora_name": name, "lora_path": result, "load_inplace": True}
        await self._client.send("POST", "/v1/load_lora_adapter", visitor, body=body)

    async def roll_back(self, name: str, visitor: Visitor) -> Adapter:
        """Make an adapter's generation before the current one current again."""
        await self._client.call("POST", f"/v1/adapters/{quote(name, safe='')}/rollback", visitor)
        return next(adapter for adapter in await self.adapters(visitor) if adapter.name == name)


def _path(job_id: str, *rest: str) -> str:
    """Of a run. Its id comes from the browser, so it must not lead elsewhere."""
    return "/".join(("/v1/fine_tuning/jobs", quote(job_id, safe=""), *rest))


def _note(history: History, event: dict[str, Any]) -> None:
    history.last_id = event["id"]
    data = event.get("data") or {}
    if event.get("type") != "metrics" or "step" not in data:
        history.notes.append(str(event["message"]))
        return
    values = {
        name: float(value)
        for name, value in data.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    history.metrics.setdefault(int(data["step"]), {}).update(values)


def _job(entry: dict[str, Any]) -> Job:
    try:
        return Job(
            id=entry["id"],
            status=entry["status"],
            is_paused=bool(entry.get("paused")),
            model=entry["model"],
            result=entry.get("fine_tuned_model"),
            method=(entry.get("method") or {}).get("type", "supervised"),
            created_at=entry["created_at"],
            suffix=entry.get("user_provided_suffix"),
            step=entry.get("step") or 0,
            num_steps=entry.get("total_steps"),
            finish_at=entry.get("estimated_finish"),
            error=(entry.get("error") or {}).get("message"),
        )
    except (KeyError, TypeError) as error:
        raise ApiError("The server's reply is not a fine-tuning job.") from error
