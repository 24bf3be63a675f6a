"""Figures of sensitivities: tornado, spider, exact curves, global indices."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidopt.errors import InvalidInput
from fluidopt.inputs import is_number
from fluidopt.plots import DARK, INK, LIGHT, MIDDLE, _figure, _panel, _title
from fluidopt.studies.sensitivity.curve import SensitivityCurve, sensitivity_curve
from fluidopt.studies.sensitivity.parameters import ModelParameter, find_parameters
from fluidopt.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fluidopt.studies.sensitivity.local import Sensitivity
    from fluidopt.studies.sensitivity.variance import GlobalSensitivity

MOST_BARS, MOST_LINES = 15, 7
# Told apart in grey by dash and brightness, at their ends by name.
_COLOURS = (INK, DARK, MIDDLE, "#6b7280")
_DASHES = ("-", "--", "-.", ":")
_POINTS = 400


def plot_tornado(result: Sensitivity, *, change: float = 0.1) -> Figure:
    """R* where each parameter alone is lower (light) and higher (dark) by a share of itself, largest swings on top.

    Raises:
        InvalidInput: ``change`` is no share between 0 and 1.
    """
    table = result.swings(change)
    swings = (table[["revenue_at_low", "revenue_at_high"]] - result.objective).abs().max(axis=1)
    moving = swings > 1e-9 * abs(result.objective)
    table = table[moving].head(MOST_BARS)
    figure, axes = _figure(1, 2, rows=max(len(table), 4))
    axis = _alone(figure, axes)
    places = np.arange(len(table))[::-1]
    for column, colour, label in (
        ("revenue_at_low", LIGHT, f"{change:.0%} lower"),
        ("revenue_at_high", DARK, f"{change:.0%} higher"),
    ):
        widths = (table[column] - result.objective).fillna(0.0)
        axis.barh(places, widths, left=result.objective, color=colour, edgecolor=INK, linewidth=0.5, label=label)
    for place, (_, row) in zip(places, table.iterrows(), strict=True):
        ends = sorted([(row["revenue_at_low"], row["low"]), (row["revenue_at_high"], row["high"])])
        for (earned, value), side in zip(ends, (-1, 1), strict=True):
            outside = min(earned, result.objective) if side < 0 else max(earned, result.objective)
            if np.isfinite(earned):
                axis.annotate(
                    number(float(value)),
                    (outside, place),
                    xytext=(4 * side, 0),
                    textcoords="offset points",
                    ha="right" if side < 0 else "left",
                    va="center",
                    fontsize=7,
                    color=INK,
                )
    axis.axvline(result.objective, color=INK, linewidth=0.8)
    labels = [f"{name}, {row['unit']}" for name, row in table.iterrows()]
    axis.set_yticks(places, labels, parse_math=False)
    axis.set_ylim(-0.7, max(len(table), 1) - 0.3)
    axis.margins(x=0.12)
    axis.set_xlabel("optimal revenue, money/s per GPU; beside the bars: value of the parameter", fontsize=8)
    _panel(axis, "")
    idle = len(result.entries) - int(moving.sum())
    rest = f"; {idle} more change nothing" if idle else ""
    _title(figure, f"Each parameter alone {change:.0%} lower and higher: {result.objective:.4g} money/s per GPU{rest}")
    return figure


def plot_spider(result: Sensitivity, *, change: float = 0.5) -> Figure:
    """R* against the change of each parameter in % of itself, exact curves with their kinks; the strongest ones.

    Where a factor on all classes is among them, it stands for their parameters.

    Raises:
        InvalidInput: ``change`` is no share between 0 and 1.
        InfeasibleModel: no plan somewhere on a curve.
    """
    if not (is_number(change) and 0 < change < 1):
        raise InvalidInput(f"plot_spider: change must be a share between 0 and 1; got {change!r}")
    ranked = sorted(result.entries, key=lambda each: each.strength, reverse=True)
    everyone = {each.parameter for each in result.entries}
    moving = [each.parameter for each in ranked if each.strength > 0]
    names = [name for name in moving if "[" not in name or name.partition("[")[0] not in everyone][:MOST_LINES]
    figure, axes = _figure(1, 2, rows=12)
    axis = _alone(figure, axes)
    ends = []
    for at, parameter in enumerate(find_parameters(result.model, names, "plot_spider")):
        curve = _around(result, parameter, change)
        style: dict[str, Any] = {
            "color": _COLOURS[at % len(_COLOURS)],
            "linestyle": _DASHES[(at + at // len(_DASHES)) % len(_DASHES)],
        }
        places = np.linspace(curve.lower, curve.upper, _POINTS)
        axis.plot(_percent(places, parameter), curve.revenue_rate(places), linewidth=1.6, **style)
        bends = np.array([kink.at for kink in curve.kinks])
        if len(bends):
            values = curve.revenue_rate(bends)
            axis.plot(_percent(bends, parameter), values, "o", markersize=4, color=style["color"], zorder=3)
        last = float(curve.revenue_rate(curve.upper))
        ends.append((last, f"{parameter.name} ({number(parameter.value)} {parameter.unit})", style))
    axis.axvline(0, color=INK, linewidth=0.6)
    axis.plot([0], [result.objective], "D", color=INK, markersize=5, zorder=4)
    axis.set_xlim(-100 * change, 100 * change)
    axis.xaxis.set_major_formatter("{x:+g} %")
    axis.set_xlabel("change of the parameter", fontsize=8)
    _name_ends(axis, ends)
    _panel(axis, "Optimal revenue, money/s per GPU; dots: kinks", legend=False)
    _title(figure, f"What each parameter alone does, from {result.objective:.4g} money/s per GPU")
    return figure


def _around(result: Sensitivity, parameter: ModelParameter, change: float) -> SensitivityCurve:
    low = max(parameter.value * (1 - change), parameter.least)
    return sensitivity_curve(result.model, parameter.name, lower=low, upper=parameter.value * (1 + change))


def _percent(values: Any, parameter: ModelParameter) -> Any:
    return 100 * (values / parameter.value - 1)


def _name_ends(axis: Axes, ends: list[tuple[float, str, dict[str, Any]]]) -> None:
    """Names to the right of the lines, moved apart where they would overlap, a dash of the line beside each."""
    low, high = axis.get_ylim()
    gap = 0.05 * (high - low)
    right = axis.get_xlim()[1]
    width = right - axis.get_xlim()[0]
    ends = sorted(ends, key=lambda each: each[0])
    heights = [value for value, _, _ in ends]
    for at in range(1, len(heights)):
        heights[at] = max(heights[at], heights[at - 1] + gap)
    for at in reversed(range(len(heights))):
        heights[at] = min(heights[at], high - gap * (len(heights) - 1 - at))
    for height, (value, name, style) in zip(heights, ends, strict=True):
        axis.plot([right, right + 0.03 * width], [value, height], clip_on=False, linewidth=0.6, color=style["color"])
        axis.plot([right + 0.03 * width, right + 0.09 * width], [height, height], clip_on=False, linewidth=1.6, **style)
        axis.annotate(
            name,
            (right + 0.10 * width, height),
            va="center",
            fontsize=7.5,
            color=INK,
            annotation_clip=False,
        )
    axis.set_ylim(low, high)
    axis.set_xlim(right - width, right)


def _alone(figure: Figure, axes: Any) -> Axes:
    """The first of two panels, with the figure to itself."""
    figure.set_size_inches(7.6, figure.get_size_inches()[1])
    axes[1].remove()
    axes[0].set_subplotspec(figure.add_gridspec(1, 1)[0])
    first: Axes = axes[0]
    return first


def plot_curve(curve: SensitivityCurve) -> Figure:
    """The optimum against one parameter, its kinks marked, and its derivative beside it."""
    figure, axes = _figure(1, 2, rows=8)
    edges = sorted({curve.lower, curve.upper, *(kink.at for kink in curve.kinks)})
    for at, (low, high) in enumerate(pairwise(edges)):
        places = np.linspace(low, np.nextafter(high, low), _POINTS)
        axes[0].plot(places, curve.revenue_rate(places), color=DARK if at % 2 == 0 else MIDDLE, linewidth=1.6)
        axes[1].plot(places, curve.derivative(places), color=DARK if at % 2 == 0 else MIDDLE, linewidth=1.6)
    for kink in curve.kinks:
        axes[0].plot([kink.at], [kink.value], "o", color=INK, markersize=4, zorder=3)
        axes[1].plot([kink.at, kink.at], [kink.left, kink.right], ":", color=INK, linewidth=0.8)
    if curve.lower <= curve.present <= curve.upper:
        here = float(curve.revenue_rate(curve.present))
        axes[0].plot([curve.present], [here], "D", color=INK, markersize=6, fillstyle="none", label="present value")
    axes[1].axhline(0, color=INK, linewidth=0.6)
    _panel(axes[0], "Optimal revenue, money/s per GPU", legend=bool(axes[0].get_legend_handles_labels()[0]))
    _panel(axes[1], "Its derivative, money/s per GPU and unit", legend=False)
    for axis in axes:
        axis.set_xlabel(f"{curve.parameter}, {curve.unit}", fontsize=8)
    bends = f"kinks at {', '.join(number(kink.at) for kink in curve.kinks[:6])}" if curve.kinks else "no kink"
    _title(figure, f"{curve.parameter}: {curve.shape}, {bends}")
    return figure


def plot_global(study: GlobalSensitivity) -> Figure:
    """Indices with 95 % intervals, the most important parameter on top; of Morris, effects against their spread too."""
    frame = study.to_frame().head(MOST_BARS)
    figure, axes = _figure(1, 2, rows=max(len(frame), 5))
    places = np.arange(len(frame))[::-1]
    labels = [
        f"{name}\n{number(row['lower'])} to {number(row['upper'])} {row['unit']}" for name, row in frame.iterrows()
    ]
    bars: dict[str, Any] = {"edgecolor": INK, "linewidth": 0.5, "error_kw": {"ecolor": INK, "capsize": 2}}
    if study.method == "sobol":
        for shift, column, colour, label in (
            (0.19, "total", LIGHT, "total: has a part in"),
            (-0.19, "first_order", MIDDLE, "first order: explains alone"),
        ):
            errors = frame[f"{column}_half_width"]
            axes[0].barh(places + shift, frame[column], 0.36, xerr=errors, color=colour, label=label, **bars)
        _alone(figure, axes)
        _panel(axes[0], "Share of the variance, with 95 % intervals")
    else:
        errors = frame["mean_absolute_effect_half_width"]
        axes[0].barh(places, frame["mean_absolute_effect"], 0.6, xerr=errors, color=LIGHT, **bars)
        _panel(axes[0], f"Mean size of the effect on {study.response} over the range", legend=False)
        axes[1].plot(frame["mean_absolute_effect"], frame["effect_deviation"], "o", color=DARK, markersize=5)
        for name, row in frame.iterrows():
            axes[1].annotate(
                str(name),
                (row["mean_absolute_effect"], row["effect_deviation"]),
                xytext=(5, 3),
                textcoords="offset points",
                fontsize=7,
            )
        axes[1].set_xlabel("mean size of the effect", fontsize=8)
        axes[1].margins(x=0.25, y=0.1)
        _panel(axes[1], "Its standard deviation: interaction and curvature", legend=False)
    axes[0].set_yticks(places, labels, parse_math=False)
    axes[0].axvline(0, color=INK, linewidth=0.8)
    mean, deviation = number(study.mean), number(study.standard_deviation)
    _title(figure, f"{study.response} over the ranges: mean {mean}, standard deviation {deviation}")
    return figure
