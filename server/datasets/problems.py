"""What is wrong with a data file: every bad line by number, what was found and what to do."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.errors import EngineError

MAX_SHOWN = 50
"""Problems kept in full; the others are counted."""
MAX_CHARS = 1000
"""Of one message: it may quote the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing to put right."""

    message: str
    """What was found, what is allowed, what to do."""
    line: int | None = None
    """From 1; None: the file as a whole."""


class DatasetErrors(EngineError):
    """A file that cannot be trained on: all that is wrong with it."""

    code = "invalid_training_data"

    def __init__(self, file: str, problems: tuple[Problem, ...], num_problems: int) -> None:
        self.file = file
        self.problems = problems
        """The first MAX_SHOWN, in the order of the lines."""
        self.num_problems = num_problems
        lines = [f"{file}: {num_problems} problem{'s' if num_problems > 1 else ''}"]
        for problem in problems:
            where = f"line {problem.line}: " if problem.line is not None else ""
            lines.append(f"  {where}{problem.message}")
        if num_problems > len(problems):
            lines.append(f"  and {num_problems - len(problems)} more")
        super().__init__("\n".join(lines))


@dataclass(slots=True)
class ProblemList:
    """Collects problems while a file is read; bounded, however bad the file is."""

    file: str
    problems: list[Problem] = field(default_factory=list)
    num_problems: int = 0

    def add(self, message: str, line: int | None = None) -> None:
        self.num_problems += 1
        if len(self.problems) < MAX_SHOWN:
            self.problems.append(Problem(message=printable(message), line=line))

    def raise_if_any(self) -> None:
        """Raises:
        DatasetErrors: there are some.
        """
        if self.num_problems:
            raise DatasetErrors(self.file, tuple(self.problems), self.num_problems)


def printable(text: str) -> str:
    """A text on one line that terminals, databases and JSON libraries take: what a file holds may
    have line breaks, NUL or half a surrogate pair."""
    shown = text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown
    )


class BadRecord(ValueError):
    """One record that cannot be used; the reader of the file adds the line."""
