"""How results look in a notebook, on a page and in a report: HTML without scripts, right on dark and on light.

A view is a `card` of parts: key `figures`, tables (`html`), sentences (`bullets`, `paragraph`, `cautions`), `facts`
and a `sketch` of a curve. Colours are those of the page (``currentColor``, greys that let it through) and two accents
that stand out on black and on white. Styles are written into the tags, since notebooks and hosts take style elements
out; where those go too, tables, lists and words remain. Every part escapes the text that it is given, but for
`formulas`, whose cells are HTML.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from fluidopt.tables import MISSING, number

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

ACCENT, AGAINST = "#2a9fb5", "#e07a1f"
LINE = "rgba(128,128,128,.3)"
TRACK = "rgba(128,128,128,.18)"
BAR_WIDTH, BAR_HEIGHT = 64, 10

# Notebook hosts style every table, cell and list; what is said here has to win, so it is said in full.
_CARD = f"border:1px solid {LINE};border-radius:8px;padding:.8em 1em;margin:.6em 0;max-width:72em;overflow:hidden"
_PART = "margin:.9em 0 0"
_MUTED = "opacity:.72"
_TABLE = (
    "border-collapse:collapse;margin:0;border:0;width:auto;font-size:.92em;"
    "font-variant-numeric:tabular-nums;line-height:1.35;display:table"
)
_ROW = "background:none;border:0"
_CELL = "padding:.3em .6em;border:0;vertical-align:baseline;max-width:none"
_RULE = f"border-top:1px solid {LINE}"

Bar: TypeAlias = "Callable[[pd.DataFrame, Any], list[str]]"
"""What draws a column as small pictures, one per row; of a row without a value, an empty text."""

Numbers: TypeAlias = "Sequence[float] | NDArray[np.float64]"
"""One axis of a curve."""


@runtime_checkable
class Uncertain(Protocol):
    """A number with the half width of its confidence interval, such as `fluidopt.Estimate`."""

    @property
    def mean(self) -> float:
        """The estimate."""

    @property
    def half_width(self) -> float:
        """Half of its interval."""


# ---- parts of a page ----------------------------------------------------------------------------------------------


def card(title: str, *parts: str) -> str:
    """Frame parts of a view under a headline; parts that are empty leave nothing."""
    head = f"<div style='font-size:1.1em'><strong>{escape(title)}</strong></div>"
    return f"<div class='fluidopt' style='{_CARD}'>{head}{''.join(parts)}</div>"


def figures(*given: tuple[str, Any, str]) -> str:
    """Key figures in large type: (label, value, unit) each; an `Uncertain` value shows ± its half width."""
    shown = "".join(
        "<div style='min-width:6em'>"
        f"<div style='{_MUTED};font-size:.85em'>{escape(label)}</div>"
        f"<div><strong style='font-size:1.5em'>{escape(_value(value))}</strong>"
        f" <span style='{_MUTED}'>{escape(f'{_spread(value)} {unit}'.strip())}</span></div></div>"
        for label, value, unit in given
    )
    numerals = "font-variant-numeric:tabular-nums"
    return f"<div style='display:flex;flex-wrap:wrap;gap:.6em 2.2em;{_PART};{numerals}'>{shown}</div>" if given else ""


def facts(*given: tuple[str, Any, str]) -> str:
    """Names, values and units, a line each: what an input is made of."""
    rows = "".join(
        f"<tr style='{_ROW}'><th scope='row' style='{_CELL};{_RULE};text-align:left;font-weight:normal;{_MUTED}'>"
        f"{escape(label)}</th><td style='{_CELL};{_RULE};text-align:left'>{escape(_value(value))}"
        f" <span style='{_MUTED}'>{escape(f'{_spread(value)} {unit}'.strip())}</span></td></tr>"
        for label, value, unit in given
    )
    return f"<div style='{_PART};overflow-x:auto'><table style='{_TABLE}'><tbody>{rows}</tbody></table></div>"


def paragraph(sentence: str | None, *, muted: bool = False) -> str:
    """Running text; muted where it says how, not what."""
    look = f"{_PART};max-width:60em;line-height:1.45" + (f";{_MUTED};font-size:.92em" if muted else "")
    return f"<div style='{look}'>{escape(sentence)}</div>" if sentence else ""


def bullets(title: str, sentences: Sequence[str], *, most: int = 12, numbered: bool = False) -> str:
    """Sentences as a list under a heading; nothing where there are none."""
    if not sentences:
        return ""
    tag, mark = ("ol", "decimal") if numbered else ("ul", "disc")
    return f"<div style='{_PART}'>{_heading(title)}{_items(sentences, most, tag=tag, mark=mark)}</div>"


def cautions(sentences: Sequence[str], *, title: str = "Caution", most: int = 12) -> str:
    """Sentences that must not be missed, beside a coloured edge."""
    if not sentences:
        return ""
    edge = f"border-left:4px solid {AGAINST};padding:.1em 0 .1em .9em"
    return f"<div style='{_PART};{edge}'>{_heading(title)}{_items(sentences, most)}</div>"


def formulas(rows: Sequence[tuple[str, ...]]) -> str:
    """Formulas and what belongs to them, a row each; the cells are HTML already, such as MathML."""
    cell = f"{_CELL};{_RULE};text-align:left"
    cells = ("".join(f"<td style='{cell}'>{part}</td>" for part in row) for row in rows)
    body = "".join(f"<tr style='{_ROW}'>{each}</tr>" for each in cells)
    return f"<div style='{_PART};overflow-x:auto'><table style='{_TABLE}'><tbody>{body}</tbody></table></div>"


def more(title: str, *parts: str) -> str:
    """Parts that open on a click, without a script; where a host does not know how, they are simply there."""
    return (
        f"<details style='{_PART}'><summary style='cursor:pointer'>{escape(title)}</summary>{''.join(parts)}</details>"
    )


# ---- tables -------------------------------------------------------------------------------------------------------


def html(
    frame: pd.DataFrame | pd.Series[Any],
    *,
    title: str,
    note: str | None = None,
    units: Mapping[Any, str] | None = None,
    bars: Mapping[Any, Bar] | None = None,
    max_rows: int = 40,
) -> str:
    """A table under a heading, numbers to the right with their points aligned; a wide one scrolls in its own box.

    Args:
        frame: rows are labelled by the index, columns by their names.
        title: above it.
        note: below it.
        units: of columns by name, shown under the name.
        bars: pictures beside the numbers of a column: `share_bar`, `amount_bar`, `signed_bar`, `whisker`.
        max_rows: more rows than this are left out and counted.
    """
    import pandas as pd

    table = frame.to_frame() if isinstance(frame, pd.Series) else frame
    shown = table.head(max_rows)
    columns = [
        _column(shown, at, (units or {}).get(name, ""), (bars or {}).get(name)) for at, name in enumerate(table.columns)
    ]
    corner = "".join(
        f"<th style='{_CELL};text-align:left;font-weight:normal;vertical-align:bottom;{_MUTED}'>{escape(name)}</th>"
        for name in (str(name) if name is not None else "" for name in table.index.names)
    )
    body = "".join(
        f"<tr style='{_ROW}'>{labels}{''.join(cells)}</tr>"
        for labels, *cells in zip(_row_labels(shown.index), *(cells for _, cells in columns), strict=True)
    )
    left_out = len(table) - len(shown)
    notes = [f"The first {len(shown)} of {len(table)} rows; {left_out} more rows are left out."] if left_out else []
    below = "".join(paragraph(line, muted=True) for line in [*notes, note or ""])
    return (
        f"<div style='{_PART}'>{_heading(title)}"
        f"<div style='overflow-x:auto;max-width:100%' role='region' aria-label='{escape(title)}' tabindex='0'>"
        f"<table style='{_TABLE}'><thead><tr style='{_ROW}'>{corner}{''.join(head for head, _ in columns)}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>{below}</div>"
    )


def _row_labels(index: pd.Index[Any]) -> list[str]:
    """The cells that label each row, one per level; what repeats the row above is left empty."""
    style = f"{_CELL};text-align:left;font-weight:normal;white-space:nowrap"
    above: tuple[Any, ...] = ()
    rows = []
    for label in index:
        parts = label if isinstance(label, tuple) else (label,)
        new = [parts[: level + 1] != above[: level + 1] for level in range(len(parts))]
        rows.append(
            "".join(
                f"<th scope='row' style='{style};{_RULE}'>{escape(number(part))}</th>"
                if shown
                else f"<th style='{style}'></th>"
                for part, shown in zip(parts, new, strict=True)
            )
        )
        above = parts
    return rows


def _column(frame: pd.DataFrame, at: int, unit: str, bar: Bar | None) -> tuple[str, list[str]]:
    """The head of a column and its cells."""
    values, name = frame.iloc[:, at].tolist(), frame.columns[at]
    numeric = all(_is_number(value) or _is_missing(value) for value in values)
    side = "right" if numeric else "left"
    texts = [number(value) for value in values]
    pictures = bar(frame, name) if bar else [""] * len(values)
    below = f"<br><span style='{_MUTED};font-weight:normal;font-size:.9em'>{escape(unit)}</span>"
    least = ";min-width:5.5em" if len(_label(name)) > 12 else ""
    head = (
        f"<th scope='col' style='{_CELL};text-align:{side};font-weight:600;vertical-align:bottom{least}'>"
        f"{_breakable(_label(name))}{below if unit else ''}</th>"
    )
    wrap = "white-space:nowrap" if numeric or max(map(len, texts), default=0) <= 40 else "min-width:18em"
    style = f"{_CELL};{_RULE};text-align:{side};{wrap}"
    shown = _aligned(texts) if numeric else texts
    cells = [
        f"<td style='{style}'>{escape(text)}{picture and ' ' + picture}</td>"
        for text, picture in zip(shown, pictures, strict=True)
    ]
    return head, cells


def _aligned(texts: Sequence[str]) -> list[str]:
    """Pad with blanks as wide as a point and as digits, so that points of a right-aligned column are in line."""
    tails = [len(text.partition(".")[2]) for text in texts if "e" not in text]
    longest, point, digit = max(tails, default=0), "\u2008", "\u2007"
    padded = []
    for text in texts:
        tail = text.partition(".")[2]
        missing = "" if "e" in text else digit * (longest - len(tail))
        padded.append(f"{text}{point if missing and not tail else ''}{missing}")
    return padded


# ---- pictures in cells --------------------------------------------------------------------------------------------


def share_bar(frame: pd.DataFrame, column: Any) -> list[str]:
    """Fractions of one as filled parts of a track."""
    return [_bar(0.0, value) if _is_number(value) else "" for value in frame[column]]


def amount_bar(frame: pd.DataFrame, column: Any) -> list[str]:
    """Amounts from 0 as bars, the largest of the column over the whole width."""
    values = [float(value) for value in frame[column] if _is_number(value)]
    largest = max(map(abs, values), default=0.0) or 1.0
    return [_bar(0.0, value / largest) if _is_number(value) else "" for value in frame[column]]


def signed_bar(frame: pd.DataFrame, column: Any) -> list[str]:
    """Amounts of either sign as bars to the right and to the left of a line at 0."""
    values = [float(value) for value in frame[column] if _is_number(value)]
    low, high = min([0.0, *values]), max([0.0, *values])
    width = (high - low) or 1.0
    zero = -low / width
    return [_bar(zero, zero + value / width, line=zero) if _is_number(value) else "" for value in frame[column]]


def whisker(half_width: Any = "half_width") -> Bar:
    """Confidence intervals as whiskers on one scale; ``half_width`` names the column that holds the half widths."""

    def draw(frame: pd.DataFrame, column: Any) -> list[str]:
        pairs = list(zip(frame[column], frame[half_width], strict=True))
        known = [(float(mean), float(half)) for mean, half in pairs if _is_number(mean) and _is_number(half)]
        low = min((mean - half for mean, half in known), default=0.0)
        width = max((mean + half for mean, half in known), default=1.0) - low or 1.0
        return [
            _whisker((mean - half - low) / width, (mean - low) / width, (mean + half - low) / width)
            if _is_number(mean) and _is_number(half)
            else ""
            for mean, half in pairs
        ]

    return draw


def sketch(lines: Mapping[str, tuple[Numbers, Numbers]], *, across: str, up: str) -> str:
    """Curves as a small drawing without ticks, from 0 up, the ends of both axes in words; nothing without a point.

    Args:
        lines: (x, y) of each by name; at most two are told apart, a full and a dashed one. Points that are not finite
            are left out, and of many only some are drawn.
        across, up: what the axes show, with units.
    """
    curves = {name: _drawable(*line) for name, line in lines.items()}
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    low, high = min(0.0, low), max(0.0, high)
    width, height, edge = 220, 80, 3

    def place(x: float, y: float) -> str:
        along = edge + (x - left) / ((right - left) or 1.0) * (width - 2 * edge)
        return f"{along:.1f},{height - edge - (y - low) / ((high - low) or 1.0) * (height - 2 * edge):.1f}"

    drawn = "".join(
        f"<polyline points='{' '.join(place(x, y) for x, y in curve)}' fill='none' "
        f"stroke='{colour}' stroke-width='2'{dash}/>"
        for curve, (colour, dash) in zip(curves.values(), _STROKES, strict=False)
    )
    axes = f"<path d='M{edge} 0V{height - edge}H{width}' fill='none' stroke='currentColor' stroke-opacity='.4'/>"
    names = " · ".join(
        f"<span style='color:{colour}'>{'– –' if dash else '——'}</span> {escape(name)}"
        for name, (colour, dash) in zip(lines, _STROKES, strict=False)
    )
    legend = f"<div style='font-size:.85em'>{names}</div>" if len(lines) > 1 else ""
    scale = f"{up}: {number(low)} to {number(high)}; {across}: {number(left)} to {number(right)}"
    return (
        f"<div style='{_PART}'>{_picture(width, height, axes + drawn)}{legend}"
        f"<div style='{_MUTED};font-size:.85em'>{escape(scale)}</div></div>"
    )


def _drawable(across: Numbers, up: Numbers) -> list[tuple[float, float]]:
    """The finite points of a curve, thinned to no more than a drawing of this size can show, the last one kept."""
    points = [(float(x), float(y)) for x, y in zip(across, up, strict=True) if math.isfinite(x) and math.isfinite(y)]
    step = max(1, len(points) // 200)
    return [*points[:-1:step], *points[-1:]]


_STROKES = ((ACCENT, ""), (AGAINST, " stroke-dasharray='6 4'"))


def _bar(start: float, end: float, *, line: float | None = None) -> str:
    """A filled part of a track, from and to in fractions of its width; in the other colour where it runs back."""
    first, last = sorted((min(max(start, 0.0), 1.0), min(max(end, 0.0), 1.0)))
    colour = ACCENT if end >= start else AGAINST
    drawn = f"<rect width='{BAR_WIDTH}' height='{BAR_HEIGHT}' rx='2' fill='{TRACK}'/>" + (
        f"<rect x='{first * BAR_WIDTH:.1f}' width='{(last - first) * BAR_WIDTH:.1f}' height='{BAR_HEIGHT}' rx='2' "
        f"fill='{colour}'/>"
    )
    if line is not None:
        at = min(max(line * BAR_WIDTH, 0.5), BAR_WIDTH - 0.5)
        drawn += f"<path d='M{at:.1f} 0V{BAR_HEIGHT}' stroke='currentColor'/>"
    return _picture(BAR_WIDTH, BAR_HEIGHT, drawn)


def _whisker(low: float, middle: float, high: float) -> str:
    """An interval with its middle, in fractions of the width."""
    edge, half = 3, BAR_HEIGHT / 2
    first, centre, last = (edge + place * (BAR_WIDTH - 2 * edge) for place in (low, middle, high))
    return _picture(
        BAR_WIDTH,
        BAR_HEIGHT,
        f"<path d='M{first:.1f} {half}H{last:.1f}M{first:.1f} 2V{BAR_HEIGHT - 2}M{last:.1f} 2V{BAR_HEIGHT - 2}' "
        f"stroke='{ACCENT}' stroke-width='1.5'/><circle cx='{centre:.1f}' cy='{half}' r='2.5' fill='{ACCENT}'/>",
    )


def _picture(width: int, height: int, drawn: str) -> str:
    return (
        f"<svg width='{width}' height='{height}' viewBox='0 0 {width} {height}' aria-hidden='true' "
        f"style='display:inline-block;vertical-align:baseline;max-width:none'>{drawn}</svg>"
    )


# ---- quantities ---------------------------------------------------------------------------------------------------

_QUANTITIES = {
    "revenue_rate": "money/s per GPU",
    **dict.fromkeys(("admitted", "throughput"), "requests/s per GPU"),
    **dict.fromkeys(("prefill", "decode", "prefill_queue", "decode_queue"), "requests/GPU"),
    **dict.fromkeys(("prefill_wait", "decode_wait", "time_to_first_token"), "s"),
    "abandonment_share": "of arrivals",
    **dict.fromkeys(("role_prefill", "role_decode"), "requests/GPU"),
}


def with_units(frame: pd.DataFrame) -> pd.DataFrame:
    """A table with a row per quantity and class or role, and each row's unit in a column of its own."""
    units = [_QUANTITIES[quantity] for quantity in frame.index.get_level_values("quantity")]
    return frame.assign(unit=units)[["unit", *frame.columns]]


# ---- words --------------------------------------------------------------------------------------------------------


def _heading(title: str) -> str:
    return f"<div style='margin:0 0 .2em'><strong>{escape(title)}</strong></div>" if title else ""


def _items(sentences: Sequence[str], most: int, *, tag: str = "ul", mark: str = "disc") -> str:
    left_out = [f"and {len(sentences) - most} more"] if len(sentences) > most else []
    items = "".join(
        f"<li style='margin:.15em 0'>{escape(sentence)}</li>" for sentence in [*sentences[:most], *left_out]
    )
    return (
        f"<{tag} style='margin:0;padding:0 0 0 1.6em;list-style:{mark};line-height:1.45;max-width:60em'>{items}</{tag}>"
    )


def _breakable(name: str) -> str:
    """A long column name may break after its underscores and before its brackets."""
    if len(name) <= 12:
        return escape(name)
    return escape(name).replace("_", "_<wbr>").replace("[", "<wbr>[")


def _label(label: Any) -> str:
    parts = label if isinstance(label, tuple) else (label,)
    return " / ".join(number(part) for part in parts if part != "")


def _value(value: Any) -> str:
    """A number, text or estimate; of an estimate the mean, to as many places as its half width supports."""
    if not isinstance(value, Uncertain):
        return number(value)
    places = _places(value.half_width)
    return number(value.mean) if places is None else f"{value.mean:.{places}f}"


def _spread(value: Any) -> str:
    """± half width of an estimate, to two significant digits."""
    if not isinstance(value, Uncertain):
        return ""
    places = _places(value.half_width)
    return f"± {number(value.half_width)}" if places is None else f"± {value.half_width:.{places}f}"


def _places(half_width: float) -> int | None:
    """Decimal places that two significant digits of ``half_width`` take; None where plain notation does not suit."""
    if not (1e-6 <= half_width < 1e5):
        return None
    return max(0, 1 - math.floor(math.log10(half_width)))


def _is_missing(value: Any) -> bool:
    return number(value) == MISSING


def _is_number(value: Any) -> bool:
    """Whether a cell holds a finite number; numpy's count, truth values do not."""
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)
