"""The figures of a page: small panels that stack on a phone, each with spots that say their numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidopt.plots import (
    DARK,
    INK,
    LINES,
    MARKERS,
    MIDDLE,
    MOST_CLASSES,
    STYLES,
    _against,
    _fleet,
    _margins,
    _names,
    _panel,
    _served,
    _shown_figure,
    _ticks,
)
from fluidopt.reports.blocks import Picture
from fluidopt.reports.svg import Spot, inline_svg
from fluidopt.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fluidopt.contention import GPU
    from fluidopt.plan import Plan
    from fluidopt.simulation.result import SimulationResult
    from fluidopt.studies.frontier import Frontier
    from fluidopt.studies.sizing.fleet import FleetSize
    from fluidopt.studies.sizing.trace import TraceSize
    from fluidopt.traces.trace import Trace

# Inches: letters of 8 points are 11 pixels high on a phone of 390 pixels, and 13 in a column of a wide page.
WIDTH, HEAD, ROW, TALL_ROW, SQUARE = 3.6, 0.95, 0.28, 0.36, 2.5
# Characters of a row's label before it breaks, and of a legend's line before a name in it is cut.
LABEL, LONGEST = 16, 52
# Spots of a curve: fine enough to read it off, few enough to walk through with the arrow keys.
MOST_SPOTS = 41


def _drawn(height: float) -> tuple[Figure, Axes]:
    """An empty panel; 72 dots per inch, so that pixels are SVG's points."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.03)
    figure = _shown_figure()(figsize=(WIDTH, height), layout=layout, dpi=72)
    axis = figure.subplots()
    figure.patch.set_visible(False)
    axis.patch.set_visible(False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["bottom", "left"]].set_color(INK)
    axis.tick_params(which="both", labelsize=8, colors=INK)
    return figure, axis


def _picture(
    figure: Figure, axis: Axes, spots: Sequence[Spot], name: str, caption: str, *, legend_columns: int = 2
) -> Picture:
    if axis.get_legend() is not None:  # anew, and narrow, as the panel is
        legend = axis.legend(
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            ncols=legend_columns,
            frameon=False,
            fontsize=8,
            borderaxespad=0.2,
            handlelength=1.5,
            handletextpad=0.5,
            columnspacing=1.0,
        )
        for text in legend.get_texts():  # names may hold dollar signs, and be long
            text.set_parse_math(False)
            if len(text.get_text()) > LONGEST // legend_columns:
                text.set_text(text.get_text()[: LABEL - 1] + "…")
    return Picture(name, caption, inline_svg(figure, axis, spots, name=name, label=caption))


def _records(frame: Any) -> Iterator[Any]:
    """The rows, with a field per column."""
    return iter(frame.itertuples())


def _label_rows(axis: Axes, names: Sequence[str]) -> None:
    """Name the rows, dollar signs and all; a long name breaks into two lines, which leaves room for the bars."""
    from textwrap import wrap

    places, _ = _ticks(list(names))
    labels = ["\n".join(wrap(name, LABEL, max_lines=2, placeholder="…")) for name in names]
    axis.set_yticks(places, labels, linespacing=1.0, parse_math=False)


def _height(names: Sequence[str]) -> float:
    """Of a panel with these rows, inches."""
    return HEAD + (ROW if all(len(name) <= LABEL for name in names) else TALL_ROW) * len(names)


def _rows_of(names: Sequence[str], texts: Sequence[str]) -> list[Spot]:
    """A spot per class or mode, the whole row wide."""
    places, _ = _ticks(list(names))
    return [
        Spot(f"{name}: {text}", up=(place - 0.5, place + 0.5))
        for name, place, text in zip(names, places.tolist(), texts, strict=True)
    ]


def _columns_of(at: Sequence[float], texts: Sequence[str], *, log: bool = False) -> list[Spot]:
    """A spot per point of a curve: the strip of the panel that is nearest to it."""
    middle = [float(np.sqrt(a * b) if log else (a + b) / 2) for a, b in pairwise(at)]
    edges = [float(at[0]), *middle, float(at[-1])]
    return [Spot(text, across=ends) for ends, text in zip(pairwise(edges), texts, strict=True)]


def _some(count: int) -> list[int]:
    """Places of at most `MOST_SPOTS` of so many points, the first and the last among them."""
    return [int(place) for place in np.unique(np.linspace(0, count - 1, min(count, MOST_SPOTS)).round())]


# ---- inputs -------------------------------------------------------------------------------------------------------


def contention(gpus: Sequence[GPU]) -> Picture:
    """Iteration time against the prefill chunk, and the modes that the model uses."""
    figure, axis = _drawn(SQUARE)
    most = 1.25 * max([gpu.chunk_size for gpu in gpus] + [mode.chunk for gpu in gpus for mode in gpu.modes()])
    chunks = np.linspace(1.0, most, 200)
    spots = []
    for gpu, colour, style, marker in zip(gpus[:3], LINES, STYLES, MARKERS, strict=False):
        grid, cached = gpu.curve.grid(), gpu.kv_tokens or 0.0
        label = gpu.name if len(gpus) > 1 else f"beside {gpu.batch_size - 1} decodes"
        axis.plot(chunks, 1e3 * grid.times(chunks, gpu.batch_size - 1, cached), style, color=colour, label=label)
        for mode in gpu.modes():
            if mode.iteration_time is None:
                continue
            time = 1e3 * mode.iteration_time
            axis.plot([mode.chunk], [time], marker, color=MIDDLE, markersize=6, clip_on=False)
            spots.append(
                Spot(
                    f"{gpu.name}, {mode.name}: {number(time)} ms per iteration, {mode.chunk} prefill tokens beside "
                    f"{mode.decode_slots} decodes",
                    (mode.chunk, mode.chunk),
                    (time, time),
                )
            )
    axis.plot([], [], "o", color=MIDDLE, label="modes of the model")
    axis.set_xlim(0, most)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("prefill chunk, tokens (0: decodes alone)", fontsize=8, color=INK)
    rows = (min(len(gpus), 3) + 2) // 2
    _panel(axis, "Iteration time, ms", rows=rows)
    return _picture(figure, axis, spots, "contention", "Contention: time of one iteration")


def trace_rates(trace: Trace) -> list[Picture]:
    """Requests/s and tokens/s over time, from `fluidopt.traces.figure`."""
    from fluidopt.traces.figure import _INTERVALS, _rates, _round, _streams
    from fluidopt.traces.statistics import ALL

    figures = [_drawn(SQUARE) for _ in range(2)]
    _rates(figures[0][1], figures[1][1], trace, _streams(trace))
    interval = _round(trace.duration / _INTERVALS)
    table = trace.rates(interval=interval)
    table = table[(table["label"] == ALL) & (table["seconds"] > interval / 2)].reset_index(drop=True)
    scale, unit = (3600.0, "h") if trace.duration > 3 * 3600 else (1.0, "s")
    pictures = []
    for (figure, axis), name, caption in zip(
        figures,
        ("trace-requests", "trace-tokens"),
        ("Requests over time", "Tokens that arrive over time"),
        strict=True,
    ):
        spots = []
        for row in _records(table):
            said = (
                f"{number(row.request_rate)} requests/s"
                if name == "trace-requests"
                else f"{number(row.prompt_rate)} prompt and {number(row.output_rate)} output tokens/s"
            )
            start = float(row.start) / scale
            spots.append(Spot(f"from {number(start)} {unit}: {said}", (start, start + interval / scale)))
        pictures.append(_picture(figure, axis, spots, name, caption))
    return pictures


def trace_dispersion(trace: Trace) -> Picture:
    """Index of dispersion against the window, from `fluidopt.traces.figure`."""
    from fluidopt.traces.figure import _dispersion, _streams
    from fluidopt.traces.statistics import ALL

    figure, axis = _drawn(SQUARE)
    _dispersion(axis, trace, _streams(trace))
    table = trace.dispersion(windows=np.asarray(axis.lines[0].get_xdata(), dtype=float).tolist())
    table = table[table["label"] == ALL]
    texts = [
        f"windows of {number(row.window)} s: variance {number(row.dispersion)} times the mean (Poisson: "
        f"{number(row.poisson_low)} to {number(row.poisson_high)})"
        for row in _records(table)
    ]
    spots = _columns_of(table["window"].tolist(), texts, log=True)
    caption = "How uneven the stream is"
    return _picture(figure, axis, spots, "trace-dispersion", caption)


def trace_lengths(trace: Trace) -> list[Picture]:
    """Prompt and output tokens beside the exponential law, from `fluidopt.traces.figure`."""
    from matplotlib.ticker import MaxNLocator

    from fluidopt.traces.figure import _BINS, _lengths
    from fluidopt.traces.lengths import exponential_bins

    pictures = []
    for name, tokens in (("prompt", trace.prompt_tokens), ("output", trace.output_tokens)):
        figure, axis = _drawn(SQUARE)
        _lengths(axis, trace, name, {})
        axis.xaxis.set_major_locator(MaxNLocator(5))  # numbers of five digits need the room
        edges, shares, law = exponential_bins(tokens, bins=_BINS)
        spots = [
            Spot(
                f"{low + 1:,} to {high:,} tokens: {number(100 * share)} % of the {name}s (exponential: "
                f"{number(100 * float(np.exp(log)))} %)",
                (float(low), float(high)),
            )
            for (low, high), share, log in zip(pairwise(edges.tolist()), shares.tolist(), law.tolist(), strict=False)
        ]
        caption = f"Lengths of {name}s"
        pictures.append(_picture(figure, axis, spots, f"trace-{name}s", caption))
    return pictures


# ---- plan and simulation ------------------------------------------------------------------------------------------


def served(plan: Plan) -> Picture:
    """Arrivals and completions by class."""
    names = _names(plan)
    figure, axis = _drawn(_height(names))
    _served(axis, plan)
    _label_rows(axis, names)
    texts = [
        f"{number(arrives)} requests/s per GPU arrive, {number(done)} are completed"
        for arrives, done in zip(plan.model.workload.arrival_rate.tolist(), plan.throughput.tolist(), strict=True)
    ]
    spots = _rows_of(names, texts[: len(names)])
    return _picture(figure, axis, spots, "served", "Requests that arrive and are completed")


def margins(plan: Plan) -> Picture:
    """What a request is worth, and what is left when its capacity is paid, by class."""
    names = _names(plan)
    figure, axis = _drawn(_height(names))
    _margins(axis, plan)
    _label_rows(axis, names)
    table = plan.thresholds.head(len(names))
    texts = [f"value {number(row.value)}, margin {number(row.margin)} money: {row.decision}" for row in _records(table)]
    return _picture(figure, axis, _rows_of(names, texts), "margins", "What a request is worth")


def split(plan: Plan) -> Picture:
    """Share of the fleet in each mode."""
    names = [str(name) for name in plan.modes.index]
    figure, axis = _drawn(_height(names) - 0.2)
    _fleet(axis, plan)
    _label_rows(axis, names)
    texts = [f"{number(100 * share)} % of the fleet" for share in plan.modes["fleet_share"].tolist()]
    return _picture(figure, axis, _rows_of(names, texts), "split", "How the fleet is split")


def simulated(result: SimulationResult) -> list[Picture]:
    """Plan and simulation side by side: completions, time to first token, abandonment."""
    quantities: tuple[tuple[str, str, str, float, str], ...] = (
        ("throughput", "Completed, requests/s per GPU", "Requests completed, plan and simulation", 1.0, "requests/s"),
        ("time_to_first_token", "Mean time to first token, s", "Time to first token, plan and simulation", 1.0, "s"),
        ("abandonment_share", "Abandoned, % of arrivals", "Requests that give up, plan and simulation", 100.0, "%"),
    )
    frame = result.to_frame()
    pictures = []
    for quantity, title, caption, scale, unit in quantities:
        table = scale * frame.loc[quantity].head(MOST_CLASSES)
        names = [str(name) for name in table.index]
        figure, axis = _drawn(_height(names))
        _against(axis, result, quantity, title, scale)
        _label_rows(axis, names)
        texts = [
            f"plan {number(row.fluid)}, simulated {number(row.simulated)} ± {number(row.half_width)} {unit}"
            for row in _records(table)
        ]
        spots = _rows_of(names, texts)
        pictures.append(_picture(figure, axis, spots, f"simulated-{quantity.replace('_', '-')}", caption))
    return pictures


# ---- studies ------------------------------------------------------------------------------------------------------


def frontier(curve: Frontier, *, scale: float, unit: str) -> list[Picture]:
    """Revenue and shadow price against the bound, from `fluidopt.studies.frontier_figure`."""
    from matplotlib.ticker import MaxNLocator

    from fluidopt.studies.frontier_figure import _price, _revenue

    (promise,) = curve.promises
    bounds = np.asarray(curve.points[promise.name])
    prices = np.asarray(curve.points["shadow_price"])
    chosen = [place for place in _some(len(bounds)) if np.isfinite(curve.revenue_rate[place])]
    if len(chosen) < 2:
        return []
    texts = (
        [f"{number(curve.revenue_rate[place])} money/s per GPU" for place in chosen],
        [f"a {unit} earns {number(prices[place] / scale)} money/s per GPU" for place in chosen],
    )
    pictures = []
    for draw, name, caption, said in (
        (_revenue, "frontier-revenue", "Revenue against the promise", texts[0]),
        (_price, "frontier-price", "Price of the promise", texts[1]),
    ):
        figure, axis = _drawn(SQUARE)
        draw(axis, curve)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(lambda at, _: number(scale * at))
        axis.set_xlabel(f"{promise.words.rpartition(',')[0]}, {unit}", fontsize=8, color=INK)
        if draw is _price:
            axis.yaxis.set_major_formatter(lambda price, _: number(price / scale))
            axis.set_title(f"Money/s per GPU, for one {unit}", loc="left", fontsize=9, color=INK)
        words = [f"{number(scale * bounds[place])} {unit}: {text}" for place, text in zip(chosen, said, strict=True)]
        spots = _columns_of(bounds[chosen].tolist(), words)
        pictures.append(_picture(figure, axis, spots, name, caption))
    return pictures


def fleet(size: FleetSize) -> Picture:
    """GPUs that another request per second of each class takes, or costs."""
    names = list(size.problem.workload.names[:MOST_CLASSES])
    figure, axis = _drawn(_height(names) - 0.2)
    places, _ = _ticks(names)
    _label_rows(axis, names)
    axis.set_ylim(-0.7, len(names) - 0.3)
    values = size.marginal_cost[: len(names)]
    axis.barh(places, values, height=0.5, color=DARK)
    _panel(axis, f"{size.unit} per request/s more", legend=False)
    spots = _rows_of(names, [f"{number(value)} {size.unit} per request/s more" for value in values.tolist()])
    return _picture(figure, axis, spots, "marginal-cost", "What one more request per second of a class takes")


def trace_fleet(size: TraceSize) -> Picture:
    """GPUs per interval, the bound and the answer, from `fluidopt.studies.sizing.trace`."""
    from fluidopt.studies.sizing.trace import plot_trace_size

    figure: Any = plot_trace_size(size)
    figure.set(dpi=72)
    figure.set_size_inches(WIDTH, SQUARE + 0.7)
    figure.patch.set_visible(False)
    (axis,) = figure.axes
    axis.patch.set_visible(False)
    figure.suptitle("")
    spots = [
        Spot(
            f"from {number(row.start / 60)} min: {number(row.gpus)} GPUs of a perfect system, "
            f"{number(row.request_rate)} requests/s",
            (row.start / 60, (row.start + row.seconds) / 60),
        )
        for row in _records(size.intervals)
    ]
    caption = "GPUs over time, the bound for every policy, and the answer"
    return _picture(figure, axis, spots, "trace-fleet", caption, legend_columns=1)
