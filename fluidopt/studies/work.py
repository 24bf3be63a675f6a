"""The work of a study: its units on any executor, a bar where a person watches, and a file that survives a crash."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fluidopt.errors import InvalidInput
from fluidopt.tables import shorten

Result = TypeVar("Result")


def run_jobs(
    function: Callable[..., Result], jobs: Sequence[Mapping[str, Any]], executor: Executor | None
) -> Iterator[Result]:
    """Call a function with the arguments of each job, here or on an executor; results as they come."""
    if executor is None:
        for job in jobs:
            yield function(**job)
        return
    futures = [executor.submit(function, **job) for job in jobs]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def in_order(function: Callable[..., Result], *arguments: Iterable[Any], executor: Executor | None) -> Iterator[Result]:
    """As `map`, here or on an executor: results in the order of their arguments."""
    return map(function, *arguments) if executor is None else executor.map(function, *arguments)


def progress(
    results: Iterable[Result], *, total: int, what: str, size: Callable[[Result], int] = lambda _: 1
) -> Iterator[Result]:
    """The results, with a bar on stderr where a person watches; a result counts for its ``size`` of the ``total``."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, file=sys.stderr, disable=None, leave=False) as bar:
        for each in results:
            yield each
            bar.update(size(each))


@dataclass(frozen=True)
class Checkpoint:
    """Finished units of a study in a file: a line of JSON with what they depend on, then a line each."""

    path: Path | None
    """The file; without one nothing is kept."""
    settings: dict[str, Any]
    """What the units depend on, JSON-able."""

    def read(self) -> list[dict[str, Any]]:
        """The units that are there; an unfinished last line, left by a kill, is taken off.

        Raises:
            InvalidInput: the file cannot be read or written, or is of another study.
        """
        if self.path is None:
            return []
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else [""]
            whole = [json.loads(line) for line in lines[:-1]]
        except (OSError, ValueError) as error:
            raise InvalidInput(f"checkpoint: {self.path} cannot be read as lines of JSON ({error})") from None
        ours = json.loads(json.dumps(self.settings))
        theirs = whole[0] if whole else ours
        if not isinstance(theirs, dict):
            raise InvalidInput(f"checkpoint: {self.path} is no checkpoint of a study; use another file")
        differ = [name for name, value in ours.items() if theirs.get(name) != value]
        if differ:
            raise InvalidInput(
                f"checkpoint: {self.path} is of a study with other {shorten(differ)} "
                f"({differ[0]} there: {theirs.get(differ[0])!s:.200}); use another file"
            )
        if lines[-1] or not whole:
            try:
                self.path.write_text("".join(f"{line}\n" for line in lines[:-1] or [json.dumps(ours)]), "utf-8")
            except OSError as error:
                raise InvalidInput(f"checkpoint: {self.path} cannot be written ({error})") from None
        return whole[1:]

    def add(self, unit: dict[str, Any]) -> None:
        """Append a finished unit."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(unit) + "\n")
