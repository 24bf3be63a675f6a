"""How tables look as text for a terminal: numbers to four significant digits, missing as a dash; and as JSON."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

MISSING = "–"


def number(value: Any) -> str:
    """Format one cell: four significant digits, thousands kept whole, a dash where there is no value."""
    if value is None or value != value:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return str(value)
    value = float(value)
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if abs(value) < 1e-12:
        return "0"
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value)}"
    if 1e-3 <= abs(value) < 1e5:
        decimals = 4 if abs(value) < 1 else max(0, 3 - math.floor(math.log10(abs(value))))
        return f"{value:.{decimals}f}".rstrip("0").rstrip(".") if decimals else f"{value:.0f}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def jsonable(value: Any) -> Any:
    """A value, or all in it, as JSON holds it: plain numbers and lists; None where one is missing or infinite."""
    if isinstance(value, Mapping):
        return {key: jsonable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(each) for each in value]
    if hasattr(value, "tolist"):  # numpy's numbers and arrays
        return jsonable(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
