"""Figures of hardware: revenue and time per token over a GPU's numbers, the landscape of two, and the best chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import TYPE_CHECKING

import numpy as np

from fluidopt.errors import InvalidInput
from fluidopt.plots import DARK, INK, LIGHT, MIDDLE, _figure, _panel, _shown_figure, _title
from fluidopt.program import Array
from fluidopt.studies.hardware.study import NUMBERS, HardwareStudy
from fluidopt.tables import number

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

    from fluidopt.studies.hardware.chunk_size import ChunkChoice
    from fluidopt.studies.hardware.study import GPUComparison

MOST_COLUMNS = 5
STYLES = ("-", "--", ":")
LEVELS = 12


def plot_hardware(studies: Sequence[HardwareStudy] | Mapping[str, Sequence[HardwareStudy]]) -> Figure:
    """Revenue above, time per token below, a column per study of one number ([L26] figure 9); dotted: the model's.

    Args:
        studies: of one number each; or several lists of them by label, a style of line each, to see what another curve,
            load or promise changes.

    Raises:
        InvalidInput: no study, one of several numbers, or more columns or lists than can be read.
    """
    lists = {label: list(some) for label, some in studies.items()} if isinstance(studies, Mapping) else {"": [*studies]}
    columns: dict[str, dict[str, HardwareStudy]] = {}
    for label, some in lists.items():
        for study in some:
            if len(study.axes) != 1:
                raise InvalidInput(f"plot_hardware: a study must be of one number; got one of {', '.join(study.axes)}")
            name = next(iter(study.axes))
            if label in columns.setdefault(name, {}):
                raise InvalidInput(f"plot_hardware: two studies of {name}; give them by label, {{label: [studies]}}")
            columns[name][label] = study
    if not 1 <= len(columns) <= MOST_COLUMNS or len(lists) > len(STYLES):
        raise InvalidInput(
            f"plot_hardware: give studies of 1 to {MOST_COLUMNS} numbers in at most {len(STYLES)} lists; got "
            f"{len(columns)} numbers in {len(lists)}"
        )
    alone = len(columns) == 1
    figure, axes = _figure(1, 2, rows=6) if alone else _figure(2, len(columns), rows=4)
    axes = axes.reshape(2, len(columns))
    everything = [study for some in lists.values() for study in some]
    top = _top(*(study.revenue_rate for study in everything))
    for column, (name, group) in enumerate(columns.items()):
        money, time = axes[0, column], axes[1, column]
        for label, study in group.items():
            _curves(money, time, study, name, label, style=STYLES[[*lists].index(label)])
        money.set_ylim(0, top)
        times = [(each.performance.slot_average_tpot, each.performance.user_tpot) for each in group.values()]
        time.set_ylim(0, _top(*(1e3 * each for pair in times for each in pair)))
        time.set_xlabel(_label(name), fontsize=8)
        first = column == 0
        _panel(money, "Revenue, money/s per GPU" if first else "", legend=first and len(lists) > 1)
        _panel(time, "Time per token, ms" if first else "", legend=first)
        if column:
            money.set_yticklabels([])
        if alone:
            money.set_xlabel(_label(name), fontsize=8)
    one = len(everything) == 1
    _title(figure, everything[0].headline if one else "Optimal plans, one hardware number at a time")
    return figure


def _curves(money: Axes, time: Axes, study: HardwareStudy, name: str, label: str, *, style: str) -> None:
    values, scale = study.axes[name], NUMBERS[name].scale
    money.plot(scale * values, study.revenue_rate, color=DARK, linestyle=style, label=label or None)
    for colour, width, times, whose in (
        (MIDDLE, 2.4, study.performance.slot_average_tpot, "slots, all counted full"),
        (DARK, 1.2, study.performance.user_tpot, "users"),
    ):
        shown = whose if style == STYLES[0] else None
        time.plot(scale * values, 1e3 * times, color=colour, linestyle=style, linewidth=width, label=shown)
    present = scale * study.present(name)
    for axis in (money, time):
        if scale * values[0] <= present <= scale * values[-1]:
            axis.axvline(present, color=INK, linewidth=0.8, linestyle=":")
        _spread(axis, "x", name, values)


def _top(*values: Array) -> float:
    """A little above the largest that there is, so that a line along the top is seen."""
    finite = [each[np.isfinite(each)].max(initial=0.0) for each in values]
    return 1.06 * float(max(finite)) or 1.0


def _spread(axis: Axes, which: str, name: str, values: Array) -> None:
    """A logarithmic axis for what spans decades."""
    if name not in ("beta", "chunk_size") or values[0] <= 0 or values[-1] < 10 * values[0]:
        return
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    ticks = axis.xaxis if which == "x" else axis.yaxis
    ticks.set_major_formatter(lambda value, _: f"{value:g}")
    ticks.set_minor_formatter(lambda *_: "")


def _label(name: str) -> str:
    return f"{NUMBERS[name].words}, {NUMBERS[name].unit}"


def plot_landscape(study: HardwareStudy, *, offers: GPUComparison | None = None) -> Figure:
    """Revenue and users' time per token over two numbers, dark where large; a cross where the model stands, hatched
    where no plan keeps the promises.

    ``offers`` are points, filled by what they really earn: their curves differ from the model's in more than the two
    numbers, so a point may be lighter or darker than the ground around it. Beside each its price per hour, or, where it
    has none, up to which price it would be the better buy.

    Raises:
        InvalidInput: the study is not of two numbers, or offers are no points of it.
    """
    if len(study.axes) != 2:
        raise InvalidInput(f"plot_landscape: the study must be of two numbers; got {', '.join(study.axes)}")
    (across, columns), (up, rows) = study.axes.items()
    if min(columns.size, rows.size) < 2:
        raise InvalidInput("plot_landscape: both numbers need two values or more")
    if offers is not None and (across, up) != ("batch_size", "beta"):
        raise InvalidInput(f"plot_landscape: offers are points over batch_size and beta, not over {across} and {up}")
    figure = _shown_figure()(figsize=(11.0, 4.6), layout="constrained", dpi=130)
    x, y = NUMBERS[across].scale * columns, NUMBERS[up].scale * rows
    money, time = figure.subplots(1, 2)
    _revenue(money, x, y, study.revenue_rate.T, offers)
    shades = time.pcolormesh(x, y, 1e3 * study.performance.user_tpot.T, cmap=_shades(), shading="nearest")
    figure.colorbar(shades, ax=time, pad=0.02).ax.tick_params(labelsize=8, colors=INK)
    _panel(money, "Revenue, money/s per GPU", legend=False)
    _panel(time, "Time per token as users see it, ms", legend=False)
    for axis in (money, time):
        if np.isnan(study.revenue_rate).any():
            axis.patch.set(hatch="////", edgecolor="#9ca3af")
        _spread(axis, "x", across, columns)
        _spread(axis, "y", up, rows)
        axis.set_xlim(x[0], x[-1])
        axis.set_ylim(y[0], y[-1])
        here = [NUMBERS[name].scale * study.present(name) for name in (across, up)]
        axis.plot(*here, "x", color=INK, markersize=9, markeredgewidth=2.2)
        axis.set_xlabel(_label(across), fontsize=8)
        axis.set_ylabel(_label(up), fontsize=8)
        axis.tick_params(labelsize=8, colors=INK)
    if offers is not None:
        figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    _title(figure, study.headline)
    return figure


def _shades() -> Colormap:
    """From nearly white to dark, so that more is darker in grey too."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("shades", ["#f4f8f9", LIGHT, DARK])


def _revenue(axis: Axes, x: Array, y: Array, heights: Array, offers: GPUComparison | None) -> None:
    """Contours with labels, and the offers on them in the same shades."""
    from matplotlib.colors import Normalize

    frame = offers.to_frame() if offers is not None else None
    own = frame["revenue_rate"].to_numpy() if frame is not None else np.empty(0)
    everything = np.concatenate([heights[np.isfinite(heights)], own, [0.0] if not np.isfinite(heights).any() else []])
    low, high = float(everything.min()), float(everything.max())
    scale, shades = Normalize(low, max(high, low + 1e-9)), _shades()
    axis.pcolormesh(x, y, heights, cmap=shades, norm=scale, shading="nearest")
    if np.isfinite(heights).any() and np.nanmax(heights) > np.nanmin(heights):
        lines = axis.contour(x, y, heights, levels=LEVELS, colors=INK, linewidths=0.5)
        axis.clabel(lines, fontsize=7, fmt="%g")
    if frame is not None:
        _points(axis, frame, scale, shades)


def _points(axis: Axes, frame: pd.DataFrame, scale: Normalize, shades: Colormap) -> None:
    """The offers by letter, and below the figure what they are; the first is the model's own type, marked already."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="white")]
    for letter, name in zip(ascii_uppercase, list(frame.index)[1:], strict=False):
        row = frame.loc[str(name)]
        price = "at" if np.isfinite(row["hourly_price"]) else "break-even"
        money = number(row["hourly_price" if price == "at" else "break_even_price"])
        at = (row["batch_size"], NUMBERS["beta"].scale * row["beta"])
        axis.plot(
            *at,
            "o",
            markersize=9,
            markerfacecolor=shades(scale(row["revenue_rate"])),
            markeredgecolor=INK,
            markeredgewidth=1.2,
            linestyle="none",
            label=f"{letter}  {name}: {number(row['revenue_rate'])} money/s, {price} {money} money/hour",
        )
        axis.annotate(letter, at, (7, 4), textcoords="offset points", fontsize=10, weight="bold", path_effects=halo)


def plot_chunks(choice: ChunkChoice) -> Figure:
    """Revenue and time per token over the chunk; the best one dotted, light what the promises cost."""
    figure, axes = _figure(1, 2, rows=5)
    frame = choice.to_frame()
    solved = frame.dropna(subset=["revenue_rate"])
    plain = choice.plan.model.is_standard
    if not plain:
        axes[0].plot(frame.index, frame["without_promises"], color=LIGHT, linewidth=3, label="without promises")
    # Not every chunk is solved where promises are searched, so that lines would cross what is not known.
    style = "-" if len(solved) == len(frame) else "."
    axes[0].plot(solved.index, solved["revenue_rate"], style, color=DARK, markersize=3, label="best plan")
    if plain:
        axes[0].axhline(choice.mixture, color=MIDDLE, linestyle="--", linewidth=1, label="chunks mixed freely")
    _panel(axes[0], "Revenue, money/s per GPU")
    axes[0].set_ylim(0, _top(choice.without_promises))
    axes[1].plot(solved.index, 1e3 * solved["slot_average_tpot"], style, color=MIDDLE, label="slots, all counted full")
    axes[1].plot(solved.index, 1e3 * solved["user_tpot"], style, color=DARK, label="users")
    _panel(axes[1], "Time per token, ms")
    for axis in axes:
        axis.axvline(choice.chunk_size, color=INK, linewidth=0.8, linestyle=":")
        axis.set_xlabel("chunk size C, tokens", fontsize=8)
        axis.set_xlim(*axes[0].get_xlim())  # where promises leave few chunks solved, one panel spans less
        _spread(axis, "x", "chunk_size", choice.chunks.astype(float))
    _title(figure, f"Chunk {choice.chunk_size} earns {number(choice.revenue_rate)} money/s per GPU")
    return figure
