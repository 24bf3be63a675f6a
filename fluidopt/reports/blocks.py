"""What a page is made of: sections of sentences, lists, tables and figures, before anyone decides how they look.

The HTML page and its JSON are two ways of writing the same blocks, so they cannot say different things.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fluidopt.tables import MISSING, jsonable, number

if TYPE_CHECKING:
    import pandas as pd

MOST_ROWS = 40
"""Rows of a table that the page shows; its JSON has all of them."""


@dataclass(frozen=True)
class Prose:
    """A paragraph."""

    kind: ClassVar[str] = "prose"
    text: str

    def to_dict(self) -> dict[str, Any]:
        """The paragraph as JSON-able data."""
        return {"kind": self.kind, "text": self.text}


@dataclass(frozen=True)
class Warn:
    """A sentence that must not be missed: what cannot be trusted, and why; or what is not there, and why."""

    kind: ClassVar[str] = "warning"
    text: str

    def to_dict(self) -> dict[str, Any]:
        """The warning as JSON-able data."""
        return {"kind": self.kind, "text": self.text}


@dataclass(frozen=True)
class Items:
    """Sentences below each other."""

    kind: ClassVar[str] = "items"
    title: str
    sentences: tuple[str, ...]
    ordered: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The list as JSON-able data."""
        return {"kind": self.kind, "title": self.title, "sentences": list(self.sentences)}


@dataclass(frozen=True)
class Cell:
    """One value of a table: what is read, and the value behind it."""

    text: str
    value: float | None
    """None where it is no number."""

    @classmethod
    def of(cls, value: Any) -> Cell:
        """The cell of a value; booleans as yes and no, infinity in words."""
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, bool):
            return cls("yes" if value else "no", None)
        if isinstance(value, float) and math.isinf(value):
            return cls("no limit", None)
        text = number(value)
        return cls(text, None if isinstance(value, str) or text == MISSING else float(value))


@dataclass(frozen=True)
class Column:
    """The head of a column."""

    heading: str
    numeric: bool
    bar: bool
    """Whether a share is drawn beside its number."""


@dataclass(frozen=True, eq=False)
class Table:
    """A frame with a caption; the labels of its index name the rows."""

    kind: ClassVar[str] = "table"
    name: str
    """In the JSON, and as the anchor on the page."""
    caption: str
    """What the rows are, with the unit where all columns share it."""
    frame: pd.DataFrame
    headings: dict[str, str] = field(default_factory=dict)
    """What stands above a column on the page, with its unit; the column's name where nothing is said."""
    note: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    """What stands for a label of the index on the page, where it is not the label itself; the JSON has the label."""
    bars: tuple[str, ...] = ()
    """Columns of shares, 0 to 1, which are drawn too."""

    @property
    def heading(self) -> str:
        """Above the labels of the rows."""
        return " and ".join(str(name).replace("_", " ") for name in self.frame.index.names if name)

    @property
    def columns(self) -> list[Column]:
        """The heads of the columns, in order."""
        return [
            Column(
                self.headings.get(str(name), str(name).replace("_", " ")),
                self.frame[name].dtype.kind in "ifu",
                name in self.bars,
            )
            for name in self.frame.columns
        ]

    @property
    def groups(self) -> list[tuple[str, list[tuple[str, list[Cell]]]]]:
        """The rows that are shown, label and cells each, under the first label where there are two; else under ""."""
        found: list[tuple[str, list[tuple[str, list[Cell]]]]] = []
        shown = self.frame.head(MOST_ROWS)
        for index, row in zip(shown.index, shown.itertuples(index=False, name=None), strict=True):
            *above, label = index if isinstance(index, tuple) else (index,)
            group = ", ".join(self._shown(each) for each in above)
            if label == "":  # a quantity of no class: a row by itself
                group, label = "", group
            if not found or found[-1][0] != group:
                found.append((group, []))
            found[-1][1].append((self._shown(label), [Cell.of(value) for value in row]))
        return found

    def _shown(self, label: object) -> str:
        return self.labels.get(str(label), number(label) if isinstance(label, float) else str(label))

    @property
    def left_out(self) -> int:
        """Rows that are not shown."""
        return max(0, len(self.frame) - MOST_ROWS)

    def to_dict(self) -> dict[str, Any]:
        """The whole table as JSON-able data, a record per row; what is missing or has no limit is null."""
        records = [
            {str(name): jsonable(value) for name, value in row.items()}
            for row in self.frame.reset_index().to_dict(orient="records")
        ]
        return {"kind": self.kind, "name": self.name, "caption": self.caption, "note": self.note, "rows": records}


@dataclass(frozen=True)
class Picture:
    """A figure that has been drawn."""

    kind: ClassVar[str] = "picture"
    name: str
    caption: str
    svg: str = field(repr=False)
    """Markup from `fluidopt.reports.svg`, safe to put into a page."""

    def to_dict(self) -> dict[str, Any]:
        """Name and caption as JSON-able data; the numbers drawn are in the tables."""
        return {"kind": self.kind, "name": self.name, "caption": self.caption}


@dataclass(frozen=True)
class Source:
    """Text to be copied: a command, a file."""

    kind: ClassVar[str] = "source"
    title: str
    text: str
    brief: bool = False
    """Short enough to be shown at once."""

    def to_dict(self) -> dict[str, Any]:
        """The text as JSON-able data."""
        return {"kind": self.kind, "title": self.title, "text": self.text}


Block = Prose | Warn | Items | Table | Picture | Source


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading of its own."""

    name: str
    """Its anchor."""
    title: str
    blocks: tuple[Block, ...]

    def to_dict(self) -> dict[str, Any]:
        """The section as JSON-able data."""
        return {"name": self.name, "title": self.title, "blocks": [block.to_dict() for block in self.blocks]}


@dataclass(frozen=True)
class Figure:
    """One of the few numbers that matter, with the sentence that says what it means."""

    label: str
    shown: str
    value: float
    unit: str
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """The figure as JSON-able data."""
        return {"label": self.label, "value": jsonable(self.value), "unit": self.unit, "sentence": self.sentence}


def blocks(*found: Block | Sequence[Block] | None) -> tuple[Block, ...]:
    """The blocks that there are, in order."""
    flat: list[Block] = []
    for each in found:
        if each is not None:
            flat += each if isinstance(each, Sequence) else [each]
    return tuple(flat)


def unmade(why: str) -> tuple[Block, ...]:
    """All that a section holds which could not be made."""
    return (Warn(f"This section could not be made: {why}"),)
