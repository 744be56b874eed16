"""The database's tables, and the few ways in which their rows are read and written.

Every table has a growing `number`, the order of its rows; ids are what the API shows. Times are
Unix times.

Public   the tables, insert, select_one, select_page
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

VERSION = 1
"""Of the tables below; a database with another number is refused."""

metadata = sa.MetaData()


def _number() -> sa.Column[int]:
    # SQLite counts upwards by itself only in a column of this very type.
    kind = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    return sa.Column("number", kind, primary_key=True, autoincrement=True)


def _id() -> sa.Column[str]:
    return sa.Column("id", sa.String(80), unique=True, nullable=False)


def _created_at() -> sa.Column[int]:
    return sa.Column("created_at", sa.BigInteger, nullable=False)


def _json(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.JSON(none_as_null=True))


files = sa.Table(
    "files",
    metadata,
    _number(),
    _id(),
    _created_at(),
    sa.Column("expires_at", sa.BigInteger, index=True),
    sa.Column("filename", sa.Text, nullable=False),
    sa.Column("purpose", sa.String(40), nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
)
"""The bytes lie in the data folder, files/<id>."""

jobs = sa.Table(
    "jobs",
    metadata,
    _number(),
    _id(),
    _created_at(),
    sa.Column("finished_at", sa.BigInteger),
    sa.Column("status", sa.String(20), nullable=False, index=True),
    sa.Column("is_paused", sa.Boolean, nullable=False, default=False),
    sa.Column("base_fingerprint", sa.String(80), nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("reward_model", sa.Text),
    sa.Column("method", sa.String(20), nullable=False),
    sa.Column("suffix", sa.String(64)),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("training_file", sa.String(80), nullable=False),
    sa.Column("validation_file", sa.String(80)),
    _json("hyperparameters"),
    _json("config"),
    _json("metadata"),
    _json("integrations"),
    sa.Column("model_name", sa.String(160), unique=True, nullable=False),
    sa.Column("path", sa.Text),
    sa.Column("result_file", sa.String(80)),
    sa.Column("step", sa.BigInteger, nullable=False, default=0),
    sa.Column("num_steps", sa.BigInteger),
    sa.Column("trained_tokens", sa.BigInteger),
    sa.Column("estimated_finish", sa.BigInteger),
    sa.Column("num_deaths", sa.Integer, nullable=False, default=0),
    _json("error"),
)

events = sa.Table(
    "events",
    metadata,
    _number(),
    _id(),
    _created_at(),
    sa.Column("job_id", sa.String(80), nullable=False, index=True),
    sa.Column("level", sa.String(10), nullable=False),
    sa.Column("type", sa.String(10), nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("step", sa.BigInteger),
    _json("data"),
)

checkpoints = sa.Table(
    "checkpoints",
    metadata,
    _number(),
    _id(),
    _created_at(),
    sa.Column("job_id", sa.String(80), nullable=False, index=True),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("model", sa.String(160), nullable=False, unique=True),
    sa.Column("path", sa.Text, nullable=False),
    _json("metrics"),
)

feedback = sa.Table(
    "feedback",
    metadata,
    _number(),
    _id(),
    _created_at(),
    sa.Column("response_id", sa.String(80), nullable=False, index=True),
    sa.Column("choice", sa.Integer, nullable=False, default=0),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("generation", sa.BigInteger),
    sa.Column("rating", sa.String(10)),
    sa.Column("comment", sa.Text),
    _json("prompt"),
    sa.Column("answer", sa.Text, nullable=False),
    sa.Column("preferred", sa.Text),
    sa.UniqueConstraint("response_id", "choice"),
)
"""One judgement of one answer, with all that is needed to learn from it."""

about = sa.Table("about", metadata, sa.Column("version", sa.Integer, nullable=False))
"""One row: VERSION."""


def insert(connection: sa.Connection, table: sa.Table, **values: object) -> None:
    """Add one row."""
    connection.execute(table.insert().values(**values))


def select_page(
    connection: sa.Connection,
    table: sa.Table,
    *conditions: sa.ColumnElement[bool],
    after: str | None,
    limit: int,
    newest_first: bool = True,
) -> tuple[list[dict[str, Any]], bool]:
    """A page of a list: rows, and whether there are more.

    Args:
        after: id of the row before the page; None is the list's beginning.
        newest_first: order of the list.

    Raises:
        LookupError: `after` is not in the list.
    """
    query = sa.select(table).where(*conditions)
    if after is not None:
        last = connection.execute(
            sa.select(table.c.number).where(table.c.id == after, *conditions)
        ).scalar()
        if last is None:
            raise LookupError(after)
        query = query.where(table.c.number < last if newest_first else table.c.number > last)
    order = table.c.number.desc() if newest_first else table.c.number.asc()
    rows = connection.execute(query.order_by(order).limit(limit + 1)).mappings().all()
    return [dict(row) for row in rows[:limit]], len(rows) > limit


def select_one(
    connection: sa.Connection, table: sa.Table, *conditions: sa.ColumnElement[bool]
) -> dict[str, Any] | None:
    """The row that meets the conditions."""
    row = connection.execute(sa.select(table).where(*conditions)).mappings().first()
    return dict(row) if row is not None else None
