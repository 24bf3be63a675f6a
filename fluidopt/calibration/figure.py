"""The figure of a fit: measured and fitted iteration times, and the relative errors below them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fluidopt.curves import Array
from fluidopt.errors import InvalidInput
from fluidopt.plots import INK, LINES, MOST_LINES, _figure, _panel, _title

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fluidopt.calibration.fit import IterationTimeFit

MARKERS = ("o", "s", "^", "D")


def plot_fit(fit: IterationTimeFit) -> Figure:
    """Draw a fit: mixed times over the chunk, decode-only times over the decodes, and their errors in %.

    Times are drawn at up to four batch sizes or KV lengths, errors at all measurements. Both axes of the times are
    logarithmic, so that an error in % has the same height everywhere.

    Raises:
        InvalidInput: ``fit`` is not from `fit_iteration_time`.
    """
    if not hasattr(fit, "measurements"):
        raise InvalidInput(f"plot_fit: fit must be what fit_iteration_time returns; got {type(fit).__name__}")
    frame = fit.measurements
    mixed, alone = frame[frame["chunk"] > 0], frame[frame["chunk"] == 0]
    figure, axes = _figure(2, 2, rows=5)
    cached = _usual(mixed[mixed["decodes"] > 0])
    mixed_shown = mixed[(mixed["kv_tokens"] == cached) | (mixed["decodes"] == 0)]
    beside = f" ({cached:g} KV tokens per decode)" if cached else ""
    _times(axes[0, 0], fit, mixed_shown, along="chunk", by="decodes", unit="decodes")
    _panel(axes[0, 0], f"With a prefill chunk, ms{beside}", rows=_rows(axes[0, 0]))
    _times(axes[0, 1], fit, alone, along="decodes", by="kv_tokens", unit="KV tokens per decode")
    _panel(axes[0, 1], "Decodes alone, ms", rows=_rows(axes[0, 1]))
    for axis, rows, along, label in (
        (axes[1, 0], mixed, "chunk", "prefill chunk, tokens"),
        (axes[1, 1], alone, "decodes", "decodes"),
    ):
        axis.axhline(0.0, color=INK, linewidth=0.8)
        axis.plot(rows[along], 100 * rows["error"], "o", color=LINES[0], markersize=3, alpha=0.5)
        axis.set_xscale("log", base=2)
        axis.set_xlabel(label, fontsize=8)
        _panel(axis, f"Fitted less measured, %, at all {len(rows)}", legend=False)
    for column in (0, 1):
        axes[0, column].set_xlim(axes[1, column].get_xlim())
        for axis in axes[:, column]:
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _title(figure, _wrapped(fit.headline))
    return figure


def _times(axis: Axes, fit: IterationTimeFit, rows: pd.DataFrame, *, along: str, by: str, unit: str) -> None:
    """Points and fitted lines, one pair per level of ``by`` that was measured at many places."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    grid = fit.curve.grid()
    places = rows.groupby(by)[along].nunique()
    levels = _spread(places.index[places >= places.max() / 2].to_numpy(dtype=float))
    for level, colour, marker in zip(levels, LINES, MARKERS, strict=False):
        those = rows[rows[by] == level].sort_values(along)
        low, high = those[along].min(), those[along].max()
        at = np.unique(np.concatenate([np.geomspace(low, high, 200), those[along]]))
        other = those[["chunk", "decodes", "kv_tokens"]].iloc[0].to_dict() | {along: at}
        line = grid.times(other["chunk"], other["decodes"], other["kv_tokens"])
        axis.plot(at, 1e3 * line, color=colour, linewidth=1.2)
        axis.plot(those[along], 1e3 * those["seconds"], marker, color=colour, markersize=4, label=f"{level:g} {unit}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if high > 4 * low else MaxNLocator(5))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _usual(rows: pd.DataFrame) -> float | None:
    """The KV length with most measurements; of several, the one in the middle."""
    if rows.empty:
        return None
    counts = rows["kv_tokens"].value_counts()
    most = np.sort(counts.index[counts == counts.max()].to_numpy(dtype=float))
    return float(most[most.size // 2])


def _spread(levels: Array) -> Array:
    """At most four of the levels, from the first to the last."""
    if levels.size <= MOST_LINES:
        return levels
    chosen = np.unique(np.linspace(0, levels.size - 1, MOST_LINES).round().astype(int))
    return np.asarray(levels[chosen])


def _rows(axis: Axes) -> int:
    """Rows of the legend, two entries each."""
    return (len(axis.get_legend_handles_labels()[1]) + 1) // 2


def _wrapped(sentence: str) -> str:
    from textwrap import fill

    return fill(sentence, width=130)
