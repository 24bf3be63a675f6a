"""The figure of a trace."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidopt.plots import DARK, INK, LIGHT, MIDDLE, _figure, _panel, _title
from fluidopt.traces.lengths import exponential_bins, exponential_fit
from fluidopt.traces.statistics import ALL, dispersion, members, rates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fluidopt.traces.trace import Trace

MOST_STREAMS = 3
"""Labels drawn, the most frequent ones, beside the whole stream."""
COLOURS = (INK, MIDDLE, DARK, "#9aa5b1")
STYLES = ("-", "--", ":", "-.")
_INTERVALS = 100
_BINS = 50


def plot_trace(trace: Trace) -> Figure:
    """Draw what a trace tells, in six panels.

    Above: rates of requests and of tokens over time, and the longest waits for the next request. Below: the index of
    dispersion of counts against the length of the window (1 for a Poisson stream, whose 95 % band is shaded), and
    prompt and output lengths of the whole stream beside exponential ones of the same mean.

    Raises:
        InvalidInput: the trace has no duration (see `Trace.duration`), or fewer than three requests.
    """
    figure, axes = _figure(2, 3, rows=6)
    streams = _streams(trace)
    _rates(axes[0, 0], axes[0, 1], trace, streams)
    _gaps(axes[0, 2], trace, streams)
    _dispersion(axes[1, 0], trace, streams)
    for axis, name in ((axes[1, 1], "prompt"), (axes[1, 2], "output")):
        _lengths(axis, trace, name, streams)
    since = "" if trace.start is None else f" from {trace.start.isoformat(sep=' ', timespec='seconds')}"
    _title(figure, f"{len(trace):,} requests, {trace.request_rate:,.4g}/s over {trace.duration:,.4g} s{since}")
    return figure


def _streams(trace: Trace) -> dict[str, dict[str, Any]]:
    """The streams that are drawn, and how: the whole one, and the most frequent labels."""
    names = [ALL]
    if trace.label is not None:
        label, count = np.unique(trace.label, return_counts=True)
        names += [str(each) for each in label[np.argsort(-count, kind="stable")][:MOST_STREAMS]]
    return {
        name: {"color": colour, "linestyle": style} for name, colour, style in zip(names, COLOURS, STYLES, strict=False)
    }


def _rates(requests: Axes, tokens: Axes, trace: Trace, streams: dict[str, dict[str, Any]]) -> None:
    interval = _round(trace.duration / _INTERVALS)
    table = rates(trace, interval=interval)
    table = table[table["seconds"] > interval / 2]  # a rate over a sliver at the end is mostly chance
    scale, unit = (3600.0, "h") if trace.duration > 3 * 3600 else (1.0, "s")
    for name, style in streams.items():
        line = table[table["label"] == name]
        requests.step(line["start"] / scale, line["request_rate"], where="post", label=name, linewidth=1.2, **style)
    whole = table[table["label"] == ALL]
    for column, colour, dash in (("prompt_rate", DARK, "-"), ("output_rate", MIDDLE, "--")):
        tokens.step(
            whole["start"] / scale,
            whole[column],
            where="post",
            color=colour,
            linestyle=dash,
            linewidth=1.2,
            label=column.split("_")[0],
        )
    for axis in (requests, tokens):
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.set_xlabel(f"time, {unit}", fontsize=8)
    _panel(requests, f"Requests/s, in intervals of {interval:g} s", rows=_legend_rows(streams))
    _panel(tokens, f"Tokens/s that arrive, in intervals of {interval:g} s", rows=_legend_rows(streams))


def _gaps(axis: Axes, trace: Trace, streams: dict[str, dict[str, Any]]) -> None:
    """Share of the gaps longer than a number of mean gaps, beside that of a Poisson stream."""
    longest = 1.0
    for name, style in streams.items():
        gaps = np.sort(np.diff(trace.arrival_time[members(trace)[name]]))[::-1]
        if gaps.size < 2 or not gaps.any():
            continue
        # Every one of the longest gaps, then fewer and fewer: a curve of 300 points shows them all.
        rank = np.unique(np.geomspace(1, gaps.size, 300).astype(np.int64)) - 1
        axis.plot(gaps[rank] / gaps.mean(), (rank + 1) / gaps.size, label=name, linewidth=1.2, **style)
        longest = max(longest, float(gaps[0] / gaps.mean()))
    time = np.geomspace(1e-2, max(1.5 * longest, 10.0), 200)
    axis.plot(time, np.exp(-time), color=LIGHT, linewidth=3, zorder=0, label="Poisson")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(1e-2, time[-1])
    axis.set_ylim(1 / len(trace), 1.3)
    axis.set_xlabel("gap to the next request, mean gaps", fontsize=8)
    _panel(axis, "Share of gaps that are longer", rows=_legend_rows(streams))


def _dispersion(axis: Axes, trace: Trace, streams: dict[str, dict[str, Any]]) -> None:
    shortest = min(0.5, 0.5 * trace.duration / len(trace))
    windows = np.geomspace(max(shortest, trace.duration / 1e6), trace.duration / 10, 25)
    table = dispersion(trace, windows=windows.tolist())
    for name, style in streams.items():
        line = table[table["label"] == name]
        axis.plot(line["window"], line["dispersion"], label=name, linewidth=1.2, **style)
    band = table[table["label"] == ALL]
    axis.fill_between(
        band["window"], band["poisson_low"], band["poisson_high"], color=LIGHT, linewidth=0, label="Poisson, 95 %"
    )
    axis.axhline(1.0, color=INK, linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("window, s", fontsize=8)
    _panel(axis, "Variance over mean of the counts in windows", rows=_legend_rows(streams))


def _lengths(axis: Axes, trace: Trace, name: str, streams: dict[str, dict[str, Any]]) -> None:
    tokens = trace.prompt_tokens if name == "prompt" else trace.output_tokens
    edges, shares, law = exponential_bins(tokens, bins=_BINS)
    width = float(edges[1])
    axis.bar(
        edges[:-1] + width / 2,
        100 * shares[:-1],
        width,
        color=LIGHT,
        edgecolor=DARK,
        linewidth=0.4,
        label=f"trace, {100 * shares[-1]:.2g} % beyond",
    )
    axis.plot(edges[:-1] + width / 2, 100 * np.exp(law[:-1]), color=MIDDLE, linewidth=1.6, label="exponential")
    table = exponential_fit(trace, bins=_BINS)
    fit = table[(table["label"] == ALL) & (table["tokens"] == name)].iloc[0]
    axis.annotate(
        f"mean {fit['mean']:,.0f} tokens\nvariation {fit['cv']:.2f}\nKL {fit['kl']:.3f} nats\nKS {fit['ks']:.3f}",
        (0.98, 0.95),
        xycoords="axes fraction",
        ha="right",
        va="top",
        fontsize=8,
        color=INK,
    )
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.set_xlabel(f"{name} tokens", fontsize=8)
    _panel(axis, f"{name.capitalize()}s, % in bins of {width:,.0f} tokens", rows=_legend_rows(streams))


def _legend_rows(streams: dict[str, dict[str, Any]]) -> int:
    """Rows of the longest legend, for which all panels leave room, so that they line up."""
    return (len(streams) + 2) // 2


def _round(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... at or above a value."""
    power = 10.0 ** math.floor(math.log10(value))
    return next((step * power for step in (1, 2, 5) if step * power >= value), 10 * power)
