"""The exceptions and the warning that fluidopt raises, and nothing else.

Every message carries what was wrong (field, value, rule) and what to do next. Nothing but these types reaches a
user because of bad input.
"""

from __future__ import annotations

import os


class FluidoptError(Exception):
    """Base class of every exception fluidopt raises on purpose."""


class InvalidInput(FluidoptError, ValueError):
    """An argument, scenario or file entry breaks a rule; the message names field, value and rule."""


class InfeasibleModel(FluidoptError):
    """No plan satisfies all rows, or the objective has no finite maximum.

    Attributes:
        rows: names of the rows (``family[label, ...]``) that cannot hold together; empty where unbounded.
        kind: ``"infeasible"`` or ``"unbounded"``.
    """

    def __init__(self, message: str, *, rows: tuple[str, ...] = (), kind: str = "infeasible") -> None:
        super().__init__(message)
        self.rows = rows
        self.kind = kind


class SolverFailure(FluidoptError):
    """A solver stopped without an answer that passes its certificate (limit, numerical trouble)."""


class TraceFormatError(FluidoptError, ValueError):
    """A trace file cannot be read.

    Attributes:
        file: the file's name.
        line: line number in that file, counted from 1; None where the fault has no single line.
    """

    def __init__(self, message: str, *, file: str | os.PathLike[str], line: int | None = None) -> None:
        place = f"{os.fspath(file)}, line {line}" if line is not None else os.fspath(file)
        super().__init__(f"{place}: {message}")
        self.file = os.fspath(file)
        self.line = line


class ContentionWarning(UserWarning):
    """A contention curve is outside the range in which the model's guarantees hold."""
