"""Figures of prices: both charging schemes over the price ratio, and the search for the best one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fluidopt.plots import DARK, INK, MIDDLE, _figure, _panel, _title
from fluidopt.program import Array
from fluidopt.studies.prices.curves import PriceStudy
from fluidopt.studies.prices.search import OptimalPrices
from fluidopt.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_prices(study: PriceStudy) -> Figure:
    """Revenue, decode queue and wasted prefills over the prompt price's share, both charging schemes."""
    figure, axes = _figure(1, 3, rows=6)
    for curve, colour, style, width in ((study.separate, MIDDLE, "-", 2.6), (study.bundled, DARK, "--", 1.6)):
        look = {"color": colour, "linestyle": style, "linewidth": width, "label": curve.charging}
        axes[0].plot(curve.kinks, curve.revenue, marker="o", markersize=3, **look)
        for axis, amounts in (
            (axes[1], [piece.decode_queue for piece in curve.pieces]),
            (axes[2], [piece.wasted for piece in curve.pieces]),
        ):
            axis.stairs(amounts, curve.kinks, baseline=None, **look)
    titles = ("Revenue, money/s per GPU", "Waiting for decode, requests per GPU", "Prefills never decoded, 1/s per GPU")
    for axis, title in zip(axes, titles, strict=True):
        _panel(axis, title)
        axis.set_ylim(0, 1.06 * max(axis.dataLim.ymax, 1e-9))
        _shares(axis, study.line.share(study.model.scenario.prices))
        axis.set_xlabel(_share_label(study.line.weights, study.line.budget), fontsize=8)
    _title(figure, study.headline)
    return figure


def plot_optimal_prices(found: OptimalPrices) -> Figure:
    """Revenue over the prompt price's share, what no prices exceed, and the arrivals that each share brings."""
    figure, axes = _figure(1, 2, rows=5)
    shares, earned = found.tried.T
    exact = found.demand is None
    axes[0].plot(shares, earned, "-" if exact else ".", color=DARK, markersize=4, label="solved")
    axes[0].axhline(found.bound, color=MIDDLE, linestyle="--", linewidth=1, label="no prices earn more")
    axes[0].set_ylim(0, 1.06 * found.bound)
    _panel(axes[0], "Revenue, money/s per GPU")
    workload = found.plan.model.workload
    at = np.linspace(0.0, 1.0, 101)[1:-1]
    for place, (name, style) in enumerate(zip(workload.names, ("-", "--", ":", "-.") * len(workload), strict=False)):
        rates = [_arrivals(found, share)[place] for share in at]
        axes[1].plot(at, rates, color=(DARK, MIDDLE)[place % 2], linestyle=style, label=name if place < 4 else None)
    _panel(axes[1], "Arrivals, requests/s per GPU", rows=2 if len(workload) > 2 else 1)
    axes[1].set_ylim(bottom=0)
    for axis in axes:
        _shares(axis, found.share)
        axis.set_xlabel(_share_label(found.line.weights, found.line.budget), fontsize=8)
    _title(figure, f"Best share {number(found.share)}: {number(found.revenue_rate)} money/s per GPU")
    return figure


def _arrivals(found: OptimalPrices, share: float) -> Array:
    prices = found.line.prices(share)
    if found.demand is None:
        return found.plan.model.workload.arrival_rate
    return np.asarray(found.demand(prices.prompt, prices.output), dtype=float)


def _shares(axis: Axes, chosen: float) -> None:
    axis.axvline(chosen, color=INK, linewidth=0.8, linestyle=":")
    axis.set_xlim(0, 1)


def _share_label(weights: tuple[float, float], budget: float) -> str:
    """What the share is of, in symbols."""
    a, b = ("" if weight == 1 else f"{number(weight)} " for weight in weights)
    return f"share of the prompt price: {a}c_p/({a}c_p + {b}c_d), sum {number(budget)}"
