"""Lists in OpenAI's shape, a page at a time: `after` is the id of the last object seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from server.errors import ApiError, bad_request, json_response


def list_response(objects: Sequence[dict[str, Any]], has_more: bool) -> Response:
    """One page."""
    return json_response(
        {
            "object": "list",
            "data": objects,
            "first_id": objects[0]["id"] if objects else None,
            "last_id": objects[-1]["id"] if objects else None,
            "has_more": has_more,
        }
    )


def unknown_after(after: str | None) -> ApiError:
    """`after` names nothing in the list."""
    return bad_request(f"after: no object {str(after)[:100]!r} in this list", "after")
