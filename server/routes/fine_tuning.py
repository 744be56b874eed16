"""/v1/fine_tuning/jobs: create, list, retrieve, cancel, pause, resume, events, checkpoints."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from server.auth import require_admin
from server.errors import bad_request, json_response
from server.fine_tuning_schemas import CreateJobRequest
from server.job_store import checkpoint_dict, event_dict
from server.limits import body_of
from server.pages import list_response, unknown_after
from server.state import state_of

router = APIRouter(prefix="/v1/fine_tuning/jobs")
ADMIN = [Depends(require_admin)]
CreateBody = Annotated[CreateJobRequest, Depends(body_of(CreateJobRequest))]
Limit = Annotated[int, Query(ge=1, le=100)]
MAX_EVENTS = 1000


@router.post("", dependencies=ADMIN)
async def create_job(request: Request, body: CreateBody) -> Response:
    """Put a job in the queue; its data are checked next."""
    state = state_of(request)
    info = state.info()
    await state.adapters.wake(body.model)
    job = await state.jobs.create(body, state.find(body.model), info)
    return json_response(job.to_dict())


@router.get("")
async def list_jobs(request: Request, after: str | None = None, limit: Limit = 20) -> Response:
    """All jobs, newest first; metadata[key]=value keeps those that have the pair."""
    metadata = {}
    for name, value in request.query_params.items():
        if name.startswith("metadata[") and name.endswith("]"):
            if '"' in name or "\0" in name or len(name) > 80:
                text = "metadata: keys are searched up to 64 characters, without quotes and zeros"
                raise bad_request(text, "metadata")
            metadata[name[9:-1]] = value
        elif name not in ("after", "limit"):
            raise bad_request(f"Unknown parameter: '{name[:80]}'", name[:80], "unknown_parameter")
    try:
        jobs, has_more = await state_of(request).jobs.page(
            after=after, limit=limit, metadata=metadata
        )
    except LookupError:
        raise unknown_after(after) from None
    return list_response([job.to_dict() for job in jobs], has_more)


@router.get("/{job_id}")
async def retrieve_job(request: Request, job_id: str) -> Response:
    """One job."""
    return json_response((await state_of(request).jobs.get(job_id)).to_dict())


@router.post("/{job_id}/cancel", dependencies=ADMIN)
async def cancel_job(request: Request, job_id: str) -> Response:
    """End a job for good."""
    return json_response((await state_of(request).jobs.cancel(job_id)).to_dict())


@router.post("/{job_id}/pause", dependencies=ADMIN)
async def pause_job(request: Request, job_id: str) -> Response:
    """Have a job wait."""
    return json_response((await state_of(request).jobs.pause(job_id)).to_dict())


@router.post("/{job_id}/resume", dependencies=ADMIN)
async def resume_job(request: Request, job_id: str) -> Response:
    """Have a paused job go on."""
    return json_response((await state_of(request).jobs.resume(job_id)).to_dict())


@router.get("/{job_id}/events")
async def list_events(
    request: Request,
    job_id: str,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=MAX_EVENTS)] = 20,
) -> Response:
    """What happened, newest first."""
    try:
        rows, has_more = await state_of(request).jobs.events(job_id, after=after, limit=limit)
    except LookupError:
        raise unknown_after(after) from None
    return list_response([event_dict(row) for row in rows], has_more)


@router.get("/{job_id}/checkpoints")
async def list_checkpoints(
    request: Request, job_id: str, after: str | None = None, limit: Limit = 10
) -> Response:
    """Checkpoints that are still there, newest first; each is a model."""
    try:
        rows, has_more = await state_of(request).jobs.checkpoints(job_id, after=after, limit=limit)
    except LookupError:
        raise unknown_after(after) from None
    return list_response([checkpoint_dict(row) for row in rows], has_more)
