"""/v1/feedback: judge an answer, see what was collected, make a training file of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field, model_validator
from starlette.responses import Response

from server.auth import require_admin
from server.errors import json_response
from server.feedback import Rating
from server.feedback_samples import Format
from server.limits import body_of
from server.message_schemas import Body, Text
from server.pages import list_response, unknown_after
from server.schemas import MAX_CHOICES
from server.state import state_of

router = APIRouter()
ADMIN = [Depends(require_admin)]
"""What was collected are other people's conversations."""
LongText = Annotated[Text, Field(min_length=1, max_length=1_000_000)]


class FeedbackRequest(Body):
    response_id: Annotated[Text, Field(min_length=1, max_length=80)]
    """The id of a chat completion."""
    choice: Annotated[int, Field(ge=0, lt=MAX_CHOICES)] = 0
    rating: Rating | None = None
    """Thumbs up or down; none takes an earlier one back."""
    preferred: LongText | None = None
    """What would have been a better answer."""
    comment: Annotated[Text, Field(min_length=1, max_length=10_000)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.rating is None and self.preferred is None and self.comment is None:
            raise ValueError("rating: expected at least one of rating, preferred, comment")
        return self


class ExportRequest(Body):
    format: Format = "preference"
    """preference for method dpo or reward, supervised for method supervised."""
    filename: Annotated[Text, Field(pattern=r"^[^/\\]{1,200}\.jsonl$")] | None = None


FeedbackBody = Annotated[FeedbackRequest, Depends(body_of(FeedbackRequest))]
ExportBody = Annotated[ExportRequest, Depends(body_of(ExportRequest))]


@router.post("/v1/feedback")
async def create_feedback(request: Request, body: FeedbackBody) -> Response:
    """Judge an answer, or change an earlier judgement of it."""
    row = await state_of(request).feedback.judge(
        body.response_id,
        body.choice,
        rating=body.rating,
        preferred=body.preferred,
        comment=body.comment,
    )
    return json_response(_describe(row))


@router.get("/v1/feedback", dependencies=ADMIN)
async def list_feedback(
    request: Request,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """What was collected, newest first."""
    try:
        rows, has_more = await state_of(request).feedback.page(
            after=after, limit=limit, newest_first=order == "desc"
        )
    except LookupError:
        raise unknown_after(after) from None
    return list_response([_describe(row) for row in rows], has_more)


@router.get("/v1/feedback/summary", dependencies=ADMIN)
async def summarize_feedback(request: Request) -> Response:
    """How much was collected."""
    counts = await state_of(request).feedback.summary()
    return json_response({"object": "feedback.summary", **counts})


@router.post("/v1/feedback/export", dependencies=ADMIN)
async def export_feedback(request: Request, body: ExportBody) -> Response:
    """Make a training file of all that was collected; answers with its file object."""
    filename = body.filename or f"feedback-{body.format}.jsonl"
    record, num_samples = await state_of(request).feedback.export(body.format, filename)
    return json_response(record.to_dict() | {"num_samples": num_samples})


@router.get("/v1/feedback/{feedback_id}", dependencies=ADMIN)
async def retrieve_feedback(request: Request, feedback_id: str) -> Response:
    """One judgement."""
    return json_response(_describe(await state_of(request).feedback.get(feedback_id)))


@router.delete("/v1/feedback/{feedback_id}", dependencies=ADMIN)
async def delete_feedback(request: Request, feedback_id: str) -> Response:
    """Forget a judgement."""
    await state_of(request).feedback.delete(feedback_id)
    return json_response({"id": feedback_id, "object": "feedback", "deleted": True})


def _describe(row: dict[str, Any]) -> dict[str, Any]:
    hidden = ("number", "prompt")
    shown = {name: value for name, value in row.items() if name not in hidden}
    return {"object": "feedback", **shown, **row["prompt"]}
