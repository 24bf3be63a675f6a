"""Figures of frontiers: revenue and shadow price against the bound of a service level, or a map over two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidopt.errors import InvalidInput
from fluidopt.plots import DARK, INK, LIGHT, MIDDLE, _panel, _shown_figure, _title
from fluidopt.studies.frontier import Frontier, Promise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HATCH = "////"
CONTOURS = 8


def plot_frontiers(frontiers: Frontier | Sequence[Frontier]) -> Figure:
    """Frontiers side by side, revenue above its shadow price ([L26] figure 8); of two promises, a map of the revenue.

    A dot marks each kink of the curve; where no plan keeps the bound, the panel is hatched.

    Args:
        frontiers: one or several, at most four.

    Raises:
        InvalidInput: there is none, or there are more than four.
    """
    shown = [frontiers] if isinstance(frontiers, Frontier) else list(frontiers)
    if not 1 <= len(shown) <= 4 or not all(isinstance(each, Frontier) for each in shown):
        raise InvalidInput(f"plot_frontiers: expected one to four frontiers; got {frontiers!r}")
    rows = 2 if any(len(each.promises) == 1 for each in shown) else 1
    size = (min(11.0, 5.5 * len(shown)), 0.4 + 3.0 * rows)
    figure = _shown_figure()(figsize=size, layout="constrained", dpi=130)
    axes = figure.subplots(rows, len(shown), squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=INK)
    for column, each in zip(axes.T, shown, strict=False):
        if len(each.promises) == 2:
            _map(figure, column[0], each)
        else:
            _revenue(column[0], each)
            _price(column[1], each)
    for axis in axes.flat:
        axis.set_visible(axis.has_data())
    _title(figure, "The most that can be earned, against what is promised")
    return figure


def _revenue(axis: Axes, frontier: Frontier) -> None:
    """The curve through its kinks, from 0 up."""
    (promise,) = frontier.promises
    bounds, revenue = np.asarray(frontier.points[promise.name]), frontier.revenue_rate
    kinks = frontier.kinks
    at = np.concatenate([bounds, [each.bound for each in kinks]])
    order = np.argsort(at, kind="stable")
    axis.plot(at[order], np.concatenate([revenue, [each.revenue_rate for each in kinks]])[order], color=DARK)
    axis.plot([each.bound for each in kinks], [each.revenue_rate for each in kinks], "o", color=INK, markersize=4)
    axis.set_ylim(0, 1.08 * max(float(np.nanmax(revenue, initial=0.0)), 1e-12))
    _hatch(axis, promise, bounds)
    _panel(axis, "Revenue, money/s per GPU", legend=False)


def _price(axis: Axes, frontier: Frontier) -> None:
    """What a unit of the bound earns; it jumps at kinks."""
    (promise,) = frontier.promises
    bounds = np.asarray(frontier.points[promise.name])
    prices = np.asarray(frontier.points["shadow_price"])
    at = np.concatenate([bounds, *([each.bound, each.bound] for each in frontier.kinks)])
    both = np.concatenate([prices, *([each.price_below, each.price_above] for each in frontier.kinks)])
    order = np.argsort(at, kind="stable")
    axis.plot(at[order], both[order], color=MIDDLE)
    _hatch(axis, promise, bounds)
    unit = "share" if promise.unit == "1" else promise.unit
    _panel(axis, f"Shadow price, money/s per GPU per {unit}", legend=False)


def _hatch(axis: Axes, promise: Promise, bounds: np.ndarray[Any, Any]) -> None:
    """Mark the bounds that no plan keeps, name the axis."""
    ends = (bounds[0], promise.least_feasible) if promise.loosens > 0 else (promise.least_feasible, bounds[-1])
    if ends[1] > ends[0]:
        axis.axvspan(*ends, facecolor="#ffffff", edgecolor=LIGHT, hatch=HATCH, linewidth=0)
        axis.axvline(promise.least_feasible, color=INK, linewidth=0.8)
        axis.annotate(
            f"no plan\n{'below' if promise.loosens > 0 else 'above'} {promise.least_feasible:.4g}",
            (np.mean(ends), 0.5),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="center",
            fontsize=7,
            color=INK,
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "#ffffff", "edgecolor": "none"},
        )
    axis.set_xlim(bounds[0], bounds[-1])
    axis.set_xlabel(promise.words, fontsize=8)


def _map(figure: Figure, axis: Axes, frontier: Frontier) -> None:
    """Contours of the revenue over two bounds."""
    first, second = frontier.promises
    across, up = (np.asarray(frontier.points[each.name]) for each in (first, second))
    revenue = frontier.revenue_rate.T
    axis.set_facecolor("#ffffff")
    axis.fill_between(across, up[0], up[-1], facecolor="#ffffff", edgecolor=LIGHT, hatch=HATCH, linewidth=0)
    earned = revenue[np.isfinite(revenue)]
    if earned.size and np.ptp(earned) > 1e-9 * np.abs(earned).max():
        filled = axis.contourf(across, up, revenue, levels=CONTOURS, cmap="Greys_r")
        lines = axis.contour(across, up, revenue, levels=filled.levels, colors=INK, linewidths=0.4)
        for label in axis.clabel(lines, fontsize=7, fmt="%g"):
            label.set_bbox({"boxstyle": "round,pad=0.1", "facecolor": "#ffffff", "edgecolor": "none"})
        bar = figure.colorbar(filled, ax=axis)
        bar.ax.tick_params(labelsize=7)
    axis.set_xlim(across[0], across[-1])
    axis.set_ylim(up[0], up[-1])
    axis.set_xlabel(first.words, fontsize=8)
    axis.set_ylabel(second.words, fontsize=8)
    _panel(axis, "Revenue, money/s per GPU; hatched: no plan", legend=False)
