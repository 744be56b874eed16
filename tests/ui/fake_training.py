"""A stand-in for the API's files, feedback and fine-tuning jobs. A job does five steps each time
somebody looks at it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

NUM_STEPS = 20
STEPS_PER_LOOK = 5


@dataclass
class FakeTraining:
    """Files, jobs and generations, in memory; the forwarded addresses of who asked."""

    files: list[dict[str, Any]] = field(default_factory=list)
    uploads: list[bytes] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {"supervised": 2, "preference": 1})
    generations: dict[str, list[int]] = field(
        default_factory=lambda: {"guanaco": [3], "pirate": [3]}
    )
    current: dict[str, int] = field(default_factory=lambda: {"guanaco": 3, "pirate": 3})
    judges: list[str] = field(default_factory=list)
    loads: list[dict[str, Any]] = field(default_factory=list)
    addresses: set[str | None] = field(default_factory=set)
    keys: set[str | None] = field(default_factory=set)
    """Authorization of uploads."""
    refusal: str | None = None
    """Why the next job is refused."""
    fails: bool = False
    """Jobs end in failure."""

    def add_routes(self, app: FastAPI) -> None:
        app.add_api_route("/v1/files", self.list_files)
        app.add_api_route("/v1/files", self.upload, methods=["POST"])
        app.add_api_route("/v1/feedback/summary", self.summary)
        app.add_api_route("/v1/feedback/export", self.export, methods=["POST"])
        app.add_api_route("/v1/adapters", self.adapters)
        app.add_api_route("/v1/adapters/{name}/rollback", self.rollback, methods=["POST"])
        app.add_api_route("/v1/load_lora_adapter", self.load, methods=["POST"])
        path = "/v1/fine_tuning/jobs"
        app.add_api_route(path, self.list_jobs)
        app.add_api_route(path, self.create, methods=["POST"])
        app.add_api_route(path + "/{job_id}", self.retrieve)
        app.add_api_route(path + "/{job_id}/events", self.list_events)
        app.add_api_route(path + "/{job_id}/{action}", self.act, methods=["POST"])

    async def list_files(self) -> Response:
        return page(self.files[::-1])

    async def upload(self, request: Request) -> Response:
        self.keys.add(request.headers.get("authorization"))
        form = await request.form()
        file = form["file"]
        content = await file.read()
        if not content.startswith(b"{"):
            return refuse("This is not JSON.")
        self.uploads.append(content)
        return JSONResponse(self._add_file(file.filename, len(content)))

    async def summary(self) -> Response:
        return JSONResponse({f"num_{name}_samples": n for name, n in self.counts.items()})

    async def export(self, request: Request) -> Response:
        kind = (await request.json())["format"]
        return JSONResponse(self._add_file(f"feedback-{kind}.jsonl", 100))

    async def adapters(self) -> Response:
        return page(
            [
                {
                    "name": name,
                    "generation": self.current[name],
                    "generations": generations,
                    "has_score_head": name in self.judges,
                }
                for name, generations in self.generations.items()
            ]
        )

    async def rollback(self, name: str) -> Response:
        self.current[name] -= 1
        return JSONResponse({"name": name})

    async def load(self, request: Request) -> Response:
        body = await request.json()
        self.loads.append(body)
        name = body["lora_name"]
        self.current[name] = max(self.generations[name]) + 1
        self.generations[name].append(self.current[name])
        return PlainTextResponse("Success")

    async def create(self, request: Request) -> Response:
        self.addresses.add(request.headers.get("x-forwarded-for"))
        if self.refusal:
            return refuse(self.refusal)
        body = await request.json()
        self.created.append(body)
        job = {
            "id": f"ftjob-{len(self.jobs)}",
            "status": "validating_files",
            "paused": False,
            "created_at": 1,
            "model": body["model"],
            "fine_tuned_model": None,
            "method": body["method"],
            "user_provided_suffix": body.get("suffix"),
            "step": 0,
            "total_steps": None,
            "error": None,
        }
        self.jobs[job["id"]] = job
        self._tell(job, "The data have 2 samples, format chat.")
        return JSONResponse(job)

    async def list_jobs(self) -> Response:
        return page(list(self.jobs.values())[::-1])

    async def retrieve(self, job_id: str) -> Response:
        job = self.jobs[job_id]
        if job["status"] == "validating_files":
            job |= {"status": "running", "total_steps": NUM_STEPS}
        elif job["status"] == "running" and not job["paused"]:
            self._train(job)
        return JSONResponse(job)

    async def act(self, job_id: str, action: str) -> Response:
        job = self.jobs[job_id]
        if action == "cancel":
            job["status"] = "cancelled"
        job["paused"] = action == "pause"
        return JSONResponse(job)

    async def list_events(self, job_id: str, limit: int, after: str | None = None) -> Response:
        events = [event for event in self.events[::-1] if event["job_id"] == job_id]
        if after is not None:
            ids = [event["id"] for event in events]
            events = events[ids.index(after) + 1 :]
        return page(events[:limit], has_more=len(events) > limit)

    def _train(self, job: dict[str, Any]) -> None:
        for step in range(job["step"] + 1, job["step"] + STEPS_PER_LOOK + 1):
            data = {"step": step, "train_loss": 3 / step, "train_mean_token_accuracy": step / 30}
            data |= {"valid_loss": 4 / step} if step % 5 == 0 else {}
            self._tell(job, f"Step {step}", data)
        job["step"] += STEPS_PER_LOOK
        if job["step"] == NUM_STEPS and self.fails:
            job |= {"status": "failed", "error": {"message": "line 7: no answer to learn"}}
        elif job["step"] == NUM_STEPS:
            name = f"ft:demo:{job['user_provided_suffix'] or 'x'}"
            job |= {"status": "succeeded", "fine_tuned_model": name}
            self.generations[name], self.current[name] = [1], 1

    def _tell(self, job: dict[str, Any], message: str, data: dict | None = None) -> None:
        self.events.append(
            {
                "id": f"ftevent-{len(self.events)}",
                "job_id": job["id"],
                "message": message,
                "type": "message" if data is None else "metrics",
                "data": data,
            }
        )

    def _add_file(self, name: str, num_bytes: int) -> dict[str, Any]:
        file = {"id": f"file-{len(self.files)}", "filename": name, "bytes": num_bytes}
        self.files.append(file)
        return file


def page(entries: list[dict[str, Any]], *, has_more: bool = False) -> Response:
    last_id = entries[-1].get("id") if entries else None
    return JSONResponse(
        {"object": "list", "data": entries, "has_more": has_more, "last_id": last_id}
    )


def refuse(message: str) -> Response:
    return JSONResponse({"error": {"message": message, "code": "invalid_value"}}, status_code=400)
