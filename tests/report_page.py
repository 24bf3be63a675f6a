"""A report's page as its reader's program sees it: tags, tables and the values behind the texts."""

import math
from html.parser import HTMLParser

import numpy as np
import pytest

from fluidopt.tables import number

SHORT = {"horizon": 300.0, "replications": 4}
"""A simulation that is soon done."""


class Page(HTMLParser):
    """What a page holds: tables by id, as (label, text and values of the cells), and the tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[tuple[str, list[tuple[str, float | None]]]]] = {}
        self.figures: list[float] = []
        self._row: tuple[list[str], list[list[str]], list[float | None]] | None = None
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag == "table":
            self._rows = self.tables.setdefault(given["id"] or "", [])
        elif tag == "tr":
            self._row = ([], [], [])
        elif tag == "td" and self._row:
            self._row[1].append([])
            self._row[2].append(None)
        elif tag == "data":
            if self._row:
                self._row[2][-1] = float(given["value"] or "nan")
            else:
                self.figures.append(float(given["value"] or "nan"))
        if tag in ("th", "td"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self._inside.pop()
        elif tag == "tr" and self._row:
            label, texts, values = self._row
            if texts:
                shown = ["".join(each).strip() for each in texts]
                self._rows.append(("".join(label), list(zip(shown, values, strict=True))))
            self._row = None

    def handle_data(self, data):
        if self._row and self._inside:
            (self._row[0] if self._inside[-1] == "th" else self._row[1][-1]).append(data)


def values_of(frame) -> list[list[float]]:
    """The numbers of a frame, a list per row; words and truth values left out."""
    return [
        [float(cell) for cell in row if isinstance(cell, (int, float, np.number)) and not isinstance(cell, bool)]
        for row in frame.itertuples(index=False, name=None)
    ]


def assert_same(shown, frame, *, exactly=True) -> None:
    """A table of a page holds the frame, row by row: to the last bit with texts that round it, or to rounding."""
    rows = values_of(frame)
    assert len(shown) == len(rows)
    for (label, cells), values in zip(shown, rows, strict=True):
        texts = [text for text, value in cells if value is not None or text in ("–", "no limit")]
        found = [value for _, value in cells if value is not None]
        finite = [value for value in values if math.isfinite(value)]
        assert found == (finite if exactly else pytest.approx(finite, rel=1e-6, abs=1e-7)), label
        if exactly:
            assert texts == [number(value) if not math.isinf(value) else "no limit" for value in values], label
