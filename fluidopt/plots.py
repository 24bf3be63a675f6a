"""Figures of plans and simulation results. Each function draws on one matplotlib figure and returns it.

Colours are told apart in grey too (light to dark), and every axis carries its unit.
"""

from __future__ import annotations

from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidopt.errors import InvalidInput
from fluidopt.tables import MISSING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fluidopt.fluid import FluidTrajectory
    from fluidopt.plan import Plan
    from fluidopt.simulation.result import SimulationResult
    from fluidopt.studies.convergence import ConvergenceStudy, FleetPoint
    from fluidopt.studies.policy_study import PolicyStudy

INK = "#1f2933"
DARK, MIDDLE, LIGHT = "#16697a", "#e07a1f", "#b9d8de"
MOST_CLASSES = 12
MOST_LINES = 4
LINES = (DARK, MIDDLE, "#6b7280", LIGHT)
STYLES, MARKERS = ("-", ":", "-."), ("o", "s", "^")


def plot_plan(plan: Plan) -> Figure:
    """Who is served, at what price, and how the fleet is split: one figure of three panels."""
    figure, axes = _figure(1, 3, rows=_shown(plan))
    _served(axes[0], plan)
    _margins(axes[1], plan)
    _fleet(axes[2], plan)
    _title(figure, f"Fluid plan: {plan.revenue_rate:.4g} money/s per GPU, {plan.model.scenario.charging} charging")
    return figure


def plot_result(result: SimulationResult) -> Figure:
    """Plan against simulation with 95 % intervals: throughput, waiting and abandonment."""
    figure, axes = _figure(1, 3, rows=min(len(result.policy.scenario.classes), MOST_CLASSES))
    _against(axes[0], result, "throughput", "Completed, requests/s per GPU")
    _against(axes[1], result, "time_to_first_token", "Mean time to first token, s")
    _against(axes[2], result, "abandonment_share", "Abandoned, % of arrivals", scale=100.0)
    for axis in axes[1:]:
        axis.set_yticklabels([])
    _title(figure, f"{result.policy.kind} on {result.policy.gpus} GPUs: {_earned(result)}")
    return figure


def plot_summary(plan: Plan, result: SimulationResult) -> Figure:
    """Plan and simulated check on one page."""
    figure, axes = _figure(2, 2, rows=_shown(plan))
    _served(axes[0, 0], plan)
    _margins(axes[0, 1], plan)
    _fleet(axes[1, 0], plan)
    _against(axes[1, 1], result, "throughput", "Simulated: completed, requests/s per GPU")
    for axis in axes[:, 1]:
        axis.set_yticklabels([])
    axes[1, 1].set_yticks(*_ticks(_names(plan)), parse_math=False)
    _title(figure, f"{result.policy.kind} on {result.policy.gpus} GPUs: {_earned(result)}")
    return figure


def plot_trajectory(path: FluidTrajectory) -> Figure:
    """Queues, requests in service and revenue of a fluid trajectory over time."""
    figure, axes = _figure(1, 3, rows=6)
    curves = (
        ("Waiting, requests per GPU", "prefill_queue", "decode_queue"),
        ("In service, requests per GPU", "prefill", "decode"),
    )
    for axis, (title, *quantities) in zip(axes, curves, strict=False):
        for name, colour in zip(quantities, (DARK, MIDDLE), strict=True):
            values = getattr(path, name)
            label = name.split("_")[0]
            axis.plot(path.time, values.reshape(len(path.time), -1).sum(axis=1), color=colour, label=label)
        _panel(axis, title)
    axes[2].plot(path.time, path.revenue_rate, color=DARK, label="fluid")
    if path.revenue_bound is not None:
        axes[2].axhline(path.revenue_bound, color=MIDDLE, linewidth=0.8, label="plan")
    _panel(axes[2], "Money/s per GPU")
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.set_xlabel("s", fontsize=8)
    _title(figure, f"Fluid trajectory: {path.revenue_rate[-1]:.4g} money/s per GPU after {path.time[-1]:g} s")
    return figure


def plot_convergence(study: ConvergenceStudy) -> Figure:
    """Policies against the number of GPUs, beside the fluid plan: revenue, queues, decodes by role and class."""
    figure, axes = _figure(2, max(3, len(study.kinds) + 1), rows=6)
    frame = study.to_frame()
    classes = _names(study.plan)[:MOST_LINES]
    _approach(axes[0, 0], frame[frame["quantity"] == "revenue_rate"], {"": DARK}, "Revenue, money/s per GPU")
    for axis, name in zip(axes[0, 1:], ("prefill", "decode"), strict=False):
        chosen = frame[frame["quantity"] == f"{name}_queue"]
        _approach(axis, chosen, dict(zip(classes, LINES, strict=False)), f"Waiting for {name}, requests per GPU")
    for axis, kind in zip(axes[1], study.kinds, strict=False):
        _decodes(axis, study.of(kind), classes, f"Decodes per GPU, {kind}")
    _misplaced(axes[1, len(study.kinds)], study)
    for axis in axes.flat:
        axis.set_visible(axis.has_data())
        axis.set_xscale("log")
        axis.set_xticks(sorted(frame["gpus"].unique()), [f"{n}" for n in sorted(frame["gpus"].unique())])
        axis.minorticks_off()
        axis.set_xlabel("GPUs", fontsize=8)
    _title(figure, "Approach of finite fleets to the fluid plan (dashed); 95 % intervals")
    return figure


def plot_policy_study(study: PolicyStudy) -> Figure:
    """What each policy loses on random instances, a dot each, with quartiles; hollow where kappa < (B-1)/B."""
    figure, axes = _figure(1, 2, rows=len(study.kinds) + 2)
    holds = np.array([each.decode_bound_holds for each in study.instances])
    kinds = list(study.policies.index)
    tables = {
        "Short of the fluid bound, %": study.losses("bound"),
        f"Less than {study.proposed}, % of the bound": -study.leads,
    }
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        places = _class_axis(axis, kinds)
        for place, kind in zip(places, kinds, strict=True):
            values = 100 * table[kind].to_numpy()
            axis.boxplot(
                values,
                positions=[place],
                orientation="horizontal",
                widths=0.55,
                whis=(0, 100),
                patch_artist=True,
                manage_ticks=False,
                boxprops={"facecolor": LIGHT, "edgecolor": "none"},
                medianprops={"color": INK, "linewidth": 1.6},
                whiskerprops={"color": INK, "linewidth": 0.8},
                capprops={"color": INK, "linewidth": 0.8},
            )
            # spread out by rank, so that equal values do not hide each other
            height = place + 0.2 * np.sin(2.4 * np.arange(len(values)))
            axis.plot(values[holds], height[holds], "o", markersize=3.5, color=DARK)
            axis.plot(values[~holds], height[~holds], "o", markersize=3.5, color=MIDDLE, fillstyle="none")
            axis.plot(values.mean(), place, "D", markersize=6, color=INK, markeredgecolor="white")
        axis.axvline(0, color=INK, linewidth=0.8)
        # small differences matter beside large losses
        axis.set_xscale("symlog", linthresh=1.0, linscale=0.7)
        low, high = 100 * table.to_numpy().min(), 100 * table.to_numpy().max()
        axis.set_xlim(min(1.3 * low, 0.0) - 0.1, 1.3 * high + 0.1)
        ticks = [each for each in (-100, -30, -10, -3, -1, -0.5, 0, 0.5, 1, 3, 10, 30, 100) if low <= each <= high]
        axis.set_xticks(ticks, [f"{each:g}" for each in ticks])
        axis.minorticks_off()
        _panel(axis, title, legend=False)
    axes[1].set_yticklabels([])
    figure.supxlabel(
        "dots: instances (hollow: kappa < (B-1)/B); boxes: quartiles and median; diamonds: mean; linear up to 1 %",
        fontsize=8,
        color=INK,
    )
    _title(figure, f"{len(study.instances)} random instances, {study.gpus} GPUs, common arrivals")
    return figure


def _approach(axis: Axes, frame: pd.DataFrame, colours: dict[str, str], title: str) -> None:
    """One quantity against the number of GPUs, a line per policy and class."""
    for at, (kind, of_kind) in enumerate(frame.groupby("kind", sort=False)):
        for of, colour in colours.items():
            line = of_kind[of_kind["of"] == of]
            axis.errorbar(
                line["gpus"],
                line["simulated"],
                yerr=line["half_width"],
                color=colour,
                linestyle=STYLES[at % len(STYLES)],
                marker=MARKERS[at % len(MARKERS)],
                fillstyle="full" if at % 2 == 0 else "none",
                markersize=4,
                capsize=2,
                # the first panel tells the policies apart, the others the classes
                label=kind if not of else of if at == 0 else None,
            )
            if at == 0:
                axis.axhline(line["fluid"].iloc[0], color=colour, linestyle="--", linewidth=1)
    _panel(axis, title, rows=-(-len(axis.get_legend_handles_labels()[0]) // 2))


def _decodes(axis: Axes, fleets: Sequence[FleetPoint], classes: list[str], title: str) -> None:
    """Decodes in service against the number of GPUs, a line per role and class."""
    for r, role in enumerate(fleets[0].policy.roles):
        for i, (name, colour) in enumerate(zip(classes, LINES, strict=False)):
            axis.errorbar(
                [each.policy.gpus for each in fleets],
                [each.decode_by_role[r, i] for each in fleets],
                yerr=[each.decode_by_role_half_width[r, i] for each in fleets],
                color=colour,
                marker=MARKERS[r % len(MARKERS)],
                markersize=4,
                capsize=2,
                label=f"{role.name}, {name}",
            )
            axis.axhline(fleets[0].decode_targets[r, i], color=colour, linestyle="--", linewidth=1)
    axis.set_ylim(bottom=0)
    _panel(axis, title, rows=-(-len(axis.get_legend_handles_labels()[0]) // 2))


def _misplaced(axis: Axes, study: ConvergenceStudy) -> None:
    """How far decodes by role are from the plan, class by class and in total."""
    for at, kind in enumerate(study.kinds):
        table = study.fleets.loc[kind]
        for name, colour, of in (("decodes_by_class", MIDDLE, "by class"), ("decodes_in_total", DARK, "in total")):
            axis.plot(
                table.index,
                table[name],
                color=colour,
                linestyle=STYLES[at % len(STYLES)],
                marker=MARKERS[at % len(MARKERS)],
                fillstyle="full" if at % 2 == 0 else "none",
                markersize=4,
                label=f"{kind}, {of}",
            )
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    _panel(axis, "Decodes per GPU off the plan at most", rows=len(study.kinds))


def _earned(result: SimulationResult) -> str:
    rate = result.revenue_rate
    return f"{rate.mean:.4g} ± {rate.half_width:.2g} money/s per GPU{result.against_plan}"


def _figure(down: int, across: int, *, rows: int) -> tuple[Figure, Any]:
    """A figure of panels that belongs to no global state (nothing to close)."""
    figure = _shown_figure()(figsize=(11.0, 0.4 + down * (1.5 + 0.3 * rows)), layout="constrained", dpi=130)
    axes = figure.subplots(down, across)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=INK)
    return figure, axes


@cache
def _shown_figure() -> type[Figure]:
    """A matplotlib figure that a notebook shows by itself, whether or not pyplot was ever imported."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            FigureCanvasAgg(self)

        def _repr_png_(self) -> bytes:
            picture = BytesIO()
            self.savefig(picture, format="png")
            return picture.getvalue()

    return ShownFigure


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, color=INK)


def _panel(axis: Axes, title: str, legend: bool = True, rows: int = 1) -> None:
    """Title above, legend (of so many rows) between title and axes, where no bar can be."""
    axis.set_title(title, loc="left", fontsize=9, color=INK, pad=8 + 14 * rows if legend else 6)
    if legend:
        axis.legend(
            loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False, fontsize=8, borderaxespad=0.2
        )


def _shown(plan: Plan) -> int:
    return min(len(plan.model.workload), MOST_CLASSES)


def _names(plan: Plan) -> list[str]:
    return list(plan.model.workload.names[:MOST_CLASSES])


def _ticks(names: list[str]) -> tuple[np.ndarray[Any, Any], list[str]]:
    """Places from top to bottom, and labels short enough to leave room for the bars."""
    return np.arange(len(names))[::-1], [name if len(name) <= 26 else name[:25] + "…" for name in names]


def _class_axis(axis: Axes, names: list[str]) -> np.ndarray[Any, Any]:
    places, labels = _ticks(names)
    axis.set_yticks(places, labels, parse_math=False)  # a name may hold dollar signs
    axis.set_ylim(-0.7, len(names) - 0.3)
    return places


def _served(axis: Axes, plan: Plan) -> None:
    names = _names(plan)
    places = _class_axis(axis, names)
    axis.barh(places, plan.model.workload.arrival_rate[: len(names)], color=LIGHT, label="arriving")
    axis.barh(places, plan.throughput[: len(names)], height=0.45, color=DARK, label="completed in the plan")
    _panel(axis, "Requests/s per GPU")


def _margins(axis: Axes, plan: Plan) -> None:
    names = _names(plan)
    table = plan.thresholds.head(len(names))
    places = _class_axis(axis, names)
    axis.barh(places, table["value"], color=LIGHT, label="value")
    axis.barh(places, table["margin"], height=0.45, color=MIDDLE, label="less the price of capacity")
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.set_yticklabels([])
    _panel(axis, "Money per request")


def _fleet(axis: Axes, plan: Plan) -> None:
    modes = plan.modes
    places = _class_axis(axis, list(modes.index))
    axis.barh(places, 100 * modes["fleet_share"], height=0.5, color=DARK)
    for place, share in zip(places, modes["fleet_share"], strict=True):
        axis.annotate(
            f"{share:.0%}", (100 * share, place), xytext=(3, 0), textcoords="offset points", va="center", size=8
        )
    axis.set_xlim(0, 115 * max(float(modes["fleet_share"].max()), 0.1))
    _panel(axis, "Modes, % of the fleet", legend=False)


def _against(axis: Axes, result: SimulationResult, quantity: str, title: str, scale: float = 1.0) -> None:
    table = result.to_frame().loc[quantity].head(MOST_CLASSES)
    places = _class_axis(axis, list(table.index))
    axis.barh(places, scale * table["fluid"].fillna(0.0), color=LIGHT, label="fluid plan")
    axis.errorbar(
        scale * table["simulated"],
        places,
        xerr=scale * table["half_width"],
        fmt="o",
        markersize=4,
        color=MIDDLE,
        ecolor=INK,
        capsize=2,
        label="simulated, 95 % interval",
    )
    axis.set_xlim(left=0)
    _panel(axis, title)


def plot_decisions(maps: Mapping[str, pd.DataFrame]) -> Figure:
    """Maps of decisions side by side, a panel each, on common axes.

    A cell is filled by its most frequent decision, its share in % written in where there are others; white where the
    policy never comes. The fills differ in brightness, and holding is hatched, so that they print in grey.

    Args:
        maps: by title, as from `OptimalPolicy.decision_map`; of the same two coordinates.

    Raises:
        InvalidInput: no map has a decision.
    """
    from matplotlib.patches import Patch, Rectangle

    cells = {name: _decision_cells(table) for name, table in maps.items()}
    rows = sorted({row for found in cells.values() for row, _ in found})
    columns = sorted({column for found in cells.values() for _, column in found})
    if not rows:
        raise InvalidInput("plot_decisions: maps must have a decision somewhere; allow more states with where")
    met = dict.fromkeys(label for found in cells.values() for label, _ in found.values())
    acts = sorted(label for label in met if label not in ("hold", "wait"))
    colours = zip(acts, (LIGHT, DARK, MIDDLE), strict=False)
    fills: dict[str, Any] = {label: {"facecolor": colour} for label, colour in colours}
    fills |= {label: {"facecolor": "#ffffff", "hatch": "////"} for label in met if label in ("hold", "wait")}
    other = {"facecolor": "#ffffff", "hatch": ".."}  # beyond the colours there are
    figure, axes = _figure(1, max(2, len(maps)), rows=max(6, len(rows) // 2))
    for axis, (name, found) in zip(axes, cells.items(), strict=False):
        for (row, column), (label, share) in found.items():
            fill = fills.get(label, other)
            corner = (column - 0.5, row - 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, edgecolor=INK, linewidth=0.3, **fill))
            if share:
                box = {"boxstyle": "round,pad=0.1", "facecolor": "#ffffff", "edgecolor": "none"}
                axis.text(column, row, share, ha="center", va="center", fontsize=6, color=INK, bbox=box)
        axis.set_xlim(columns[0] - 0.5, columns[-1] + 0.5)
        axis.set_ylim(rows[0] - 0.5, rows[-1] + 0.5)
        axis.set_xticks(columns)
        axis.set_yticks(rows)
        axis.set_xlabel(_coordinate(next(iter(maps.values())).columns.name), fontsize=8)
        _panel(axis, name, legend=False)
    for axis in axes[len(maps) :]:
        axis.set_visible(False)
    axes[0].set_ylabel(_coordinate(next(iter(maps.values())).index.name), fontsize=8)
    patches = [Patch(edgecolor=INK, linewidth=0.3, label=label, **fills.get(label, other)) for label in sorted(met)]
    figure.legend(handles=patches, loc="outside lower left", ncols=6, frameon=False, fontsize=8)
    return figure


def _decision_cells(table: pd.DataFrame) -> dict[tuple[int, int], tuple[str, str]]:
    """Decision and share in % (empty if it is the only one) by row and column, of the cells that are met."""
    found = {}
    for row, line in zip(table.index, table.to_numpy(), strict=True):
        for column, cell in zip(table.columns, line, strict=True):
            label, _, share = cell.removesuffix(" %").rpartition(" ") if cell.endswith(" %") else (cell, "", "")
            if label != MISSING:
                found[int(row), int(column)] = (label, share)
    return found


def _coordinate(name: object) -> str:
    """A coordinate of the state in words: ``prefill_queue[code]`` as "prefill queue, code"."""
    return str(name).replace("_", " ").replace("[", ", ").rstrip("]")
