"""How tables look: text for a terminal, HTML for a notebook. Numbers to four significant digits, missing as a dash."""

from __future__ import annotations

import html as escape
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

MISSING = "–"


def number(value: Any) -> str:
    """Format one cell: four significant digits, thousands kept whole, a dash where there is no value."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    if isinstance(value, str | bool):
        return str(value)
    value = float(value)
    if abs(value) < 1e-12:
        return "0"
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value)}"
    if 1e-3 <= abs(value) < 1e5:
        decimals = 4 if abs(value) < 1 else max(0, 3 - math.floor(math.log10(abs(value))))
        return f"{value:.{decimals}f}".rstrip("0").rstrip(".") if decimals else f"{value:.0f}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def shorten(names: Sequence[str], *, most: int = 6, between: str = ", ") -> str:
    """Join names into one phrase; of a long list, the first ones and the number of the others."""
    shown = between.join(names[:most])
    return shown if len(names) <= most else f"{shown}{between}and {len(names) - most} more"


def text(frame: pd.DataFrame | pd.Series[Any], *, max_rows: int = 40) -> str:
    """A table as plain text; the middle of a long one is left out and counted."""
    import pandas as pd

    table = frame.to_frame() if isinstance(frame, pd.Series) else frame
    shown = table.head(max_rows)
    body = shown.map(number).to_string()
    left_out = len(table) - len(shown)
    return body + (f"\n... {left_out} more rows" if left_out else "")


def html(frame: pd.DataFrame | pd.Series[Any], *, title: str, note: str | None = None, max_rows: int = 40) -> str:
    """A table as HTML, with a heading and an optional note below; numbers to the right, labels unbroken."""
    import pandas as pd

    table = frame.to_frame() if isinstance(frame, pd.Series) else frame
    shown = table.head(max_rows)
    below = [note] if note else []
    if len(table) > len(shown):
        below.append(f"{len(table) - len(shown)} more rows")
    sides = ["right" if table[column].dtype.kind in "ifu" else "left" for column in table.columns]
    label = " / ".join(str(name) for name in table.index.names if name)
    head = _cell("th", label, "left") + "".join(
        _cell("th", str(column), side) for column, side in zip(table.columns, sides, strict=True)
    )
    body = "".join(
        f"<tr>{_cell('th', _label(index), 'left')}"
        + "".join(_cell("td", number(cell), side) for cell, side in zip(row, sides, strict=True))
        + "</tr>"
        for index, row in zip(shown.index, shown.itertuples(index=False, name=None), strict=True)
    )
    notes = "".join(f"<div style='opacity:.7'>{escape.escape(line)}</div>" for line in below)
    return (
        f"<div style='margin:0.6em 0;overflow-x:auto'><b>{escape.escape(title)}</b>"
        f"<table style='border-collapse:collapse'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"{notes}</div>"
    )


def bullets(title: str, sentences: Sequence[str], *, most: int = 12) -> str:
    """Sentences as an HTML list under a heading; nothing where there are none."""
    if not sentences:
        return ""
    shown = [f"<li>{escape.escape(sentence)}</li>" for sentence in sentences[:most]]
    more = f"<li>and {len(sentences) - most} more</li>" if len(sentences) > most else ""
    return f"<div style='margin:0.6em 0'><b>{escape.escape(title)}</b><ul>{''.join(shown)}{more}</ul></div>"


def _cell(tag: str, content: str, side: str) -> str:
    weight = "font-weight:normal;" if tag == "th" and side == "left" else ""
    style = f"text-align:{side};{weight}padding:0.15em 0.6em;white-space:nowrap"
    return f"<{tag} style='{style}'>{escape.escape(content)}</{tag}>"


def _label(index: Any) -> str:
    return " / ".join(str(part) for part in index if part != "") if isinstance(index, tuple) else str(index)
