"""What people say of answers, kept with all that is needed to learn from it.

The newest answers of /v1/chat/completions are remembered in memory; only one that somebody judges
is written to the database, and nothing where the server runs with --no-feedback.

Public   Exchange, Feedback
"""

from __future__ import annotations

import json
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from server.database import Database
from server.errors import ApiError, bad_request
from server.feedback_samples import SAMPLES, Format
from server.files import FileRecord, Files
from server.tables import feedback, insert, select_one, select_page

MAX_REMEMBERED = 2000
MAX_REMEMBERED_CHARS = 32 * 1024 * 1024
ROWS_AT_ONCE = 500
Rating = Literal["up", "down", "none"]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One response, as it may be judged later."""

    model: str
    generation: int | None
    """Of the adapter that answered."""
    prompt: dict[str, Any]
    """messages, and tools where there were any: OpenAI's input of a preference."""
    answers: tuple[str, ...]
    """By the index of the choice."""


class Feedback:
    """Judgements of answers. Touched on the event loop only."""

    def __init__(self, database: Database, files: Files, *, is_on: bool) -> None:
        self._database = database
        self._files = files
        self._is_on = is_on
        self._recent: OrderedDict[str, tuple[Exchange, int]] = OrderedDict()
        self._num_chars = 0

    def remember(self, response_id: str, exchange: Exchange) -> None:
        """Hold a response until it is judged or newer ones have taken its place."""
        if not self._is_on or not any(exchange.answers):
            return
        num_chars = len(json.dumps(exchange.prompt)) + sum(map(len, exchange.answers))
        self._recent[response_id] = (exchange, num_chars)
        self._num_chars += num_chars
        while len(self._recent) > MAX_REMEMBERED or self._num_chars > MAX_REMEMBERED_CHARS:
            _, (_, num_chars) = self._recent.popitem(last=False)
            self._num_chars -= num_chars

    async def judge(
        self,
        response_id: str,
        choice: int,
        *,
        rating: Rating | None,
        preferred: str | None,
        comment: str | None,
    ) -> Row:
        """Keep a judgement; another one of the same answer changes what it names.

        Args:
            rating: "none" takes an earlier one back.
            preferred: a better answer to the same conversation.

        Raises:
            ApiError: 404, the answer is not known (any more); 400, feedback is off.
        """
        if not self._is_on:
            raise bad_request(
                "This server takes no feedback (--no-feedback).", code="feedback_disabled"
            )
        given: Row = {"rating": rating, "preferred": preferred, "comment": comment}
        changes = {name: value for name, value in given.items() if value is not None}
        if rating == "none":
            changes["rating"] = None
        new = self._row(response_id, choice)

        def write(connection: sa.Connection) -> Row | None:
            is_same = (feedback.c.response_id == response_id) & (feedback.c.choice == choice)
            if select_one(connection, feedback, is_same) is not None:
                connection.execute(feedback.update().where(is_same).values(**changes))
            elif new is not None:
                insert(connection, feedback, **new, **changes)
            return select_one(connection, feedback, is_same)

        try:
            row = await self._database.write(write)
        except sa.exc.IntegrityError:  # another judgement of the same answer was quicker
            row = await self._database.write(write)
        if row is None:
            raise self._unknown(response_id, choice)
        return row

    async def get(self, feedback_id: str) -> Row:
        """One judgement.

        Raises:
            ApiError: 404, there is none.
        """
        row = await self._database.read(
            lambda connection: select_one(connection, feedback, feedback.c.id == feedback_id)
        )
        if row is None:
            text = f"No such feedback: {feedback_id[:100]}."
            raise ApiError(404, text, code="feedback_not_found", param="feedback_id")
        return row

    async def page(
        self, *, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[Row], bool]:
        """A page of the list, and whether there are more.

        Raises:
            LookupError: `after` is not in the list.
        """
        return await self._database.read(
            lambda connection: select_page(
                connection, feedback, after=after, limit=limit, newest_first=newest_first
            )
        )

    async def delete(self, feedback_id: str) -> None:
        """Forget a judgement and the answer it is about.

        Raises:
            ApiError: 404, there is none.
        """
        row = await self.get(feedback_id)
        self._forget(row["response_id"])
        await self._database.write(
            lambda connection: connection.execute(
                feedback.delete().where(feedback.c.id == feedback_id)
            )
        )

    async def summary(self) -> dict[str, int]:
        """How much there is, and how many samples it makes."""

        def count(connection: sa.Connection) -> dict[str, int]:
            rows = list(_all_rows(connection))
            return {
                "num_up": sum(row["rating"] == "up" for row in rows),
                "num_down": sum(row["rating"] == "down" for row in rows),
                "num_preferred": sum(row["preferred"] is not None for row in rows),
                **{f"num_{name}_samples": sum(1 for _ in make(rows)) for name, make in SAMPLES},
            }

        return await self._database.read(count)

    async def export(self, kind: Format, filename: str) -> tuple[FileRecord, int]:
        """Write what was collected as a training file; also gives the number of its samples.

        Raises:
            ApiError, EngineError: 400, there is nothing to learn from yet; or the disk is full.
        """

        def lines(connection: sa.Connection) -> list[str]:
            samples = dict(SAMPLES)[kind](list(_all_rows(connection)))
            return [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]

        found = await self._database.read(lines)
        if not found:
            raise bad_request(_NOTHING[kind], "format", "no_feedback")
        content = "".join(found).encode("utf-8", "replace")
        return await self._files.add_bytes(filename, content, "fine-tune"), len(found)

    def _row(self, response_id: str, choice: int) -> Row | None:
        """A new row about a remembered answer."""
        exchange, _ = self._recent.get(response_id, (None, 0))
        if exchange is None or choice >= len(exchange.answers):
            return None
        return {
            "id": f"feedback-{uuid.uuid4().hex[:24]}",
            "created_at": int(time.time()),
            "response_id": response_id,
            "choice": choice,
            "model": exchange.model,
            "generation": exchange.generation,
            "prompt": exchange.prompt,
            "answer": exchange.answers[choice],
        }

    def _unknown(self, response_id: str, choice: int) -> ApiError:
        exchange, _ = self._recent.get(response_id, (None, 0))
        if exchange is not None:
            return bad_request(
                f"choice: the response has {len(exchange.answers)}, got index {choice}", "choice"
            )
        return ApiError(
            404,
            f"No response {response_id[:100]!r} is remembered. Feedback is taken on answers of "
            f"/v1/chat/completions, the last {MAX_REMEMBERED} since the server was started.",
            code="response_not_found",
            param="response_id",
        )

    def _forget(self, response_id: str) -> None:
        _, num_chars = self._recent.pop(response_id, (None, 0))
        self._num_chars -= num_chars


def _all_rows(connection: sa.Connection) -> Iterator[Row]:
    rows = connection.execution_options(yield_per=ROWS_AT_ONCE).execute(
        sa.select(feedback).order_by(feedback.c.number)
    )
    for row in rows.mappings():
        yield dict(row)


_NOTHING: dict[Format, str] = {
    "preference": "No preferences were collected yet. One is made where an answer gets a better "
    "alternative (preferred), or where one answer to a conversation got thumbs up and another "
    "one to the same conversation thumbs down.",
    "supervised": "No good answers were collected yet: give some thumbs up, or alternatives "
    "(preferred).",
}
