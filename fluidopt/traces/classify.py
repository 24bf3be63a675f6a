"""This module owns how a trace becomes workload classes, and how much of its variety those classes keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fluidopt.errors import InvalidInput
from fluidopt.traces.checks import generator_of
from fluidopt.traces.trace import Trace, unique
from fluidopt.views import card, figures, html, paragraph
from fluidopt.workload import Workload, WorkloadClass

if TYPE_CHECKING:
    import pandas as pd

By = Literal["lengths", "prompt", "output", "label"]
"""What tells the classes apart."""
ENOUGH_EXPLAINED = 0.8
"""``classes=None`` takes the smallest count that explains this share of the variance of the log lengths it goes by."""
MOST_CLASSES = 8
"""``classes=None`` never takes more."""
_RESTARTS = 20
_SAMPLE = 5_000
_MOST_ITERATIONS = 500


@dataclass(frozen=True, eq=False, repr=False)
class Classification:
    """The classes found in a trace, which request is in which, and how alike the requests of a class are."""

    workload: Workload
    """The classes; rates are those of the whole stream, requests/s."""
    assignment: NDArray[np.int64]
    """Index of each request's class in `workload`, shape (N,)."""
    explained: float
    """Share, 0 to 1, of the variance of (log prompt, log output) tokens that lies between the classes."""
    prompt_cv: NDArray[np.float64]
    """Coefficient of variation of the prompt tokens in each class, shape (I,); 1 for an exponential law."""
    output_cv: NDArray[np.float64]
    """The same for the decode iterations."""
    dropped: tuple[str, ...] = ()
    """Cells of the grid of cuts that no request fell into."""

    @property
    def requests(self) -> NDArray[np.int64]:
        """Number of requests in each class, shape (I,)."""
        return np.bincount(self.assignment, minlength=len(self.workload)).astype(np.int64)

    def to_frame(self) -> pd.DataFrame:
        """Return the workload as a table, with requests, their share of all, and both variations added."""
        frame = self.workload.to_frame()
        frame["requests"] = self.requests
        frame["share"] = self.requests / self.assignment.size
        frame["prompt_cv"] = self.prompt_cv
        frame["output_cv"] = self.output_cv
        return frame

    def __repr__(self) -> str:
        return f"<Classification: {self._headline()}>"

    def _repr_html_(self) -> str:
        units = {"arrival_rate": "requests/s", "prompt_tokens": "tokens, mean", "output_tokens": "tokens, mean"}
        return card(
            "Classification",
            figures(
                ("Classes", len(self.workload), ""),
                ("Requests", self.assignment.size, ""),
                ("Explained", 100.0 * self.explained, "% of the variance of log lengths"),
            ),
            html(self.to_frame(), title="Classes", units=units),
            paragraph(self._headline(), muted=True),
        )

    def _headline(self) -> str:
        text = (
            f"{self.assignment.size:,} requests in {len(self.workload)} classes, which explain "
            f"{self.explained:.1%} of the variance of their log lengths"
        )
        return text + (f"; empty and dropped: {'; '.join(self.dropped)}" if self.dropped else "")


def classify(
    trace: Trace,
    classes: int | None = None,
    *,
    by: By = "lengths",
    prompt_cuts: Sequence[float] | None = None,
    output_cuts: Sequence[float] | None = None,
    abandonment_rate: float = 0.0,
    seed: int | np.random.SeedSequence | np.random.Generator = 0,
) -> Classification:
    """Group the requests of a trace into workload classes.

    By lengths: k-means on (log prompt, log output) tokens, so that a factor of two counts the same for a
    prompt and for an answer, a short one and a long one; by prompt or by output: on one of the two. With cuts:
    the cells of the grid that the thresholds make. By label: a class per label. Classes are ordered by mean
    prompt, then mean output tokens.

    A prompt's length and a label are known when a request arrives, the length of its answer is not: a gate can
    act on classes by lengths or by output only where something predicts them. `class_study` says what that is
    worth.

    A class gets its share of the trace's request rate, its mean prompt tokens and its mean decode iterations,
    output tokens less one, because the first output token comes from the prefill. Prompt tokens/s and decode
    tokens/s of the whole stream are those of the trace, whatever the classes; the spread inside a class is
    lost, and `explained`, `prompt_cv` and `output_cv` say how much that is. The names give mean prompt and
    mean output tokens.

    Args:
        trace: the requests.
        classes: how many; left out, the smallest count from 2 to 8 that explains 80 % of the variance of the
            log lengths they go by, 8 where none does. Counts that leave a class without decode iterations are
            passed over.
        by: "lengths" (prompt and output), "prompt", "output" or "label".
        prompt_cuts: increasing thresholds in prompt tokens; a request at a threshold is above it.
        output_cuts: the same in output tokens.
        abandonment_rate: theta of every class, 1/s; a trace of served requests does not tell it.
        seed: of the starting points of k-means; the same seed gives the same classes.

    Raises:
        InvalidInput: an argument breaks a rule, the trace has no duration, fewer distinct lengths than
            classes, or a class in which no request decodes (one output token each), which the model cannot
            hold.

    Costs about 0.05 s for a count and 0.2 s for ``classes=None`` on 30,000 requests, and grows linearly.
    k-means finds a local optimum: the best of 20 starts on at most 5,000 requests drawn from the trace, then
    refined on all of them.
    """
    if by not in get_args(By):
        raise InvalidInput(f"classify: by must be 'lengths', 'prompt', 'output' or 'label'; got {by!r}")
    prompt_edges, output_edges = _cuts(prompt_cuts, "prompt_cuts"), _cuts(output_cuts, "output_cuts")
    cuts = prompt_cuts is not None or output_cuts is not None
    if classes is not None:
        _check_count(classes)
        if cuts or by == "label":
            other = "prompt_cuts and output_cuts" if cuts else "by='label'"
            raise InvalidInput(f"classify: classes={classes} and {other} exclude each other; give one of them")
    if cuts and by != "lengths":
        raise InvalidInput(f"classify: cuts and by={by!r} exclude each other; give one of them")
    generator = generator_of(seed, "classify")
    dropped: tuple[str, ...] = ()
    names: list[str] | None = None
    if by == "label":
        groups, names = _label_groups(trace)
        how = "by label"
    elif cuts:
        groups, names, dropped = _grid_groups(trace, prompt_edges, output_edges)
        how = "by cuts in " + " and ".join(
            f"{what} tokens at {', '.join(f'{edge:g}' for edge in edges)}"
            for what, edges in (("prompt", prompt_edges), ("output", output_edges))
            if edges.size
        )
        if dropped:
            how += f"; {len(dropped)} empty cell(s) dropped: " + "; ".join(dropped)
    else:
        groups = length_groups(trace, classes, by=by, seed=generator)
        how = "by log lengths" if by == "lengths" else f"by log {by} tokens"
    return classification(trace, groups, names, how=how, dropped=dropped, abandonment_rate=abandonment_rate)


def classification(
    trace: Trace,
    groups: NDArray[np.int64],
    names: Sequence[str] | None = None,
    *,
    how: str,
    dropped: tuple[str, ...] = (),
    abandonment_rate: float = 0.0,
) -> Classification:
    """Order and name the groups (numbers from 0, none of them empty, shape (N,)) and take their means.

    Raises:
        InvalidInput: a group in which no request decodes.
    """
    decode = trace.output_tokens - 1
    count = np.bincount(groups)
    prompt_sum = np.bincount(groups, weights=trace.prompt_tokens)
    decode_sum = np.bincount(groups, weights=decode)
    prompt_mean, decode_mean = prompt_sum / count, decode_sum / count
    order = np.lexsort((decode_mean, prompt_mean))
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    if names is None:
        named = [f"prompt {_short(prompt_mean[i])}, output {_short(decode_mean[i] + 1)}" for i in order]
    else:
        named = [names[i] for i in order]
    named = unique(named)
    rate = trace.request_rate
    for name, i in zip(named, order, strict=True):
        if decode_sum[i] == 0:
            raise InvalidInput(
                f"classify: no request of class {name!r} ({count[i]:,} requests) decodes, as each has one "
                "output token, and a class needs a positive mean of decode iterations; ask for fewer "
                "classes, give output_cuts that put them together with longer answers, or leave them out of "
                "the trace"
            )
    workload = Workload(
        tuple(
            WorkloadClass(
                name,
                arrival_rate=rate * float(count[i]) / len(trace),
                prompt_tokens=float(prompt_mean[i]),
                output_tokens=float(decode_mean[i]),
                abandonment_rate=abandonment_rate,
            )
            for name, i in zip(named, order, strict=True)
        ),
        source=f"{', '.join(trace.sources) or 'trace'}: {len(trace):,} requests, classes {how}",
    )
    assignment = rank[groups]
    assignment.setflags(write=False)
    return Classification(
        workload,
        assignment,
        explained=between(log_lengths(trace), assignment),
        prompt_cv=_variation(trace.prompt_tokens, assignment),
        output_cv=_variation(decode, assignment),
        dropped=dropped,
    )


def _label_groups(trace: Trace) -> tuple[NDArray[np.int64], list[str]]:
    if trace.label is None:
        raise InvalidInput(
            "classify: by='label' needs labels and this trace has none; read the files with label=..., or "
            "use by='lengths'"
        )
    names, groups = np.unique(trace.label, return_inverse=True)
    return groups.astype(np.int64), [str(name) for name in names]


def _grid_groups(
    trace: Trace, prompt_edges: NDArray[np.float64], output_edges: NDArray[np.float64]
) -> tuple[NDArray[np.int64], list[str], tuple[str, ...]]:
    columns = output_edges.size + 1
    cell = np.searchsorted(prompt_edges, trace.prompt_tokens, side="right") * columns
    cell += np.searchsorted(output_edges, trace.output_tokens, side="right")
    names = [
        ", ".join(part for part in (prompt, output) if part) or "all"
        for prompt in _intervals("prompt", prompt_edges)
        for output in _intervals("output", output_edges)
    ]
    used, groups = np.unique(cell, return_inverse=True)
    kept = set(used.tolist())
    dropped = tuple(name for index, name in enumerate(names) if index not in kept)
    return groups.astype(np.int64), [names[index] for index in used], dropped


def _intervals(what: str, edges: NDArray[np.float64]) -> list[str]:
    if not edges.size:
        return [""]
    inner = [f"{low:g} <= {what} < {high:g}" for low, high in pairwise(edges)]
    return [f"{what} < {edges[0]:g}", *inner, f"{what} >= {edges[-1]:g}"]


def length_groups(trace: Trace, classes: int | None, *, by: str, seed: np.random.Generator) -> NDArray[np.int64]:
    """Group number of each request by k-means on log tokens, shape (N,); arguments as in `classify`."""
    points = log_lengths(trace)[:, {"lengths": slice(0, 2), "prompt": slice(0, 1), "output": slice(1, 2)}[by]]
    distinct = len(np.unique(points, axis=0))
    if classes is not None:
        if classes > distinct:
            what = "pair(s) of prompt and output" if by == "lengths" else f"count(s) of {by}"
            raise InvalidInput(
                f"classify: classes={classes}, but the {len(trace):,} requests have only {distinct} distinct "
                f"{what} tokens; ask for at most {distinct}"
            )
        return _k_means(points, classes, seed)
    groups = np.zeros(len(trace), dtype=np.int64)
    for count in range(2, min(MOST_CLASSES, distinct) + 1):
        candidate = _k_means(points, count, seed)
        if (np.bincount(candidate, weights=trace.output_tokens - 1) > 0).all():
            groups = candidate
            if between(points, groups) >= ENOUGH_EXPLAINED:
                break
    return groups


def _k_means(points: NDArray[np.float64], count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return the best of several k-means partitions into ``count`` non-empty groups, shape (N,).

    scipy's `kmeans2` has no test of convergence and renamed its seed argument between 1.14 and 1.15, so only
    its nearest-centre search is used.
    """
    if count == 1:
        return np.zeros(len(points), dtype=np.int64)
    sample = points
    if len(points) > _SAMPLE:
        sample = points[generator.choice(len(points), _SAMPLE, replace=False)]
        if len(np.unique(sample, axis=0)) < count:
            sample = points
    best_error, best = math.inf, points[:0]
    for _ in range(_RESTARTS):
        centres, _, error = _lloyd(sample, _spread_centres(sample, count, generator))
        if error < best_error:
            best_error, best = error, centres
    return _lloyd(points, best)[1]


def _spread_centres(points: NDArray[np.float64], count: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Draw distinct points as starting centres (k-means++, Arthur and Vassilvitskii 2007).

    Each is drawn with a probability proportional to its squared distance from those before.
    """
    centres = np.empty((count, points.shape[1]))
    centres[0] = points[generator.integers(len(points))]
    distance = ((points - centres[0]) ** 2).sum(axis=1)
    for k in range(1, count):
        cumulative = np.cumsum(distance)
        pick = int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
        centres[k] = points[pick]
        distance = np.minimum(distance, ((points - centres[k]) ** 2).sum(axis=1))
    return centres


def _lloyd(
    points: NDArray[np.float64], centres: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64], float]:
    """Move centres to the means of their groups until no group changes: centres, groups, squared error."""
    from scipy.cluster.vq import vq

    count = len(centres)
    groups = np.full(len(points), -1, dtype=np.int64)
    distance = np.zeros(len(points))
    for _ in range(_MOST_ITERATIONS):
        nearest, distance = vq(points, centres, check_finite=False)
        found: NDArray[np.int64] = nearest.astype(np.int64)
        size = np.bincount(found, minlength=count)
        for empty in np.flatnonzero(size == 0):
            # An empty group takes the request farthest from its centre out of a group that can spare it.
            far = int(np.argmax(np.where(size[found] > 1, distance, -1.0)))
            size[found[far]] -= 1
            found[far], distance[far], size[empty] = empty, 0.0, 1
        if np.array_equal(found, groups):
            break
        groups = found
        sums = [np.bincount(groups, weights=points[:, j], minlength=count) for j in range(points.shape[1])]
        centres = np.stack(sums, axis=1) / size[:, None]
    return centres, groups, float((distance**2).sum())


@dataclass(frozen=True, eq=False, kw_only=True)
class Cut:
    """A group of requests cut in two, by prompt or by output tokens."""

    by: Literal["prompt", "output"]
    """Which of the two lengths is compared."""
    at: int
    """Threshold, tokens; a request at it is above it."""
    of: str
    """The group that is cut, by the cuts before it."""
    explained: float
    """Share of the variance of (log prompt, log output) tokens that this cut adds to what lies between groups."""
    groups: NDArray[np.int64]
    """Group number of each request from this cut on, shape (N,)."""


def length_cuts(trace: Trace, classes: int) -> tuple[Cut, ...]:
    """Cut the requests into ``classes`` groups, one cut at a time, each the one that explains most.

    A tree of cuts, as in regression trees (Breiman et al. 1984): of all thresholds, in prompt and in output tokens,
    in all groups so far, the one that adds most to the variance of (log prompt, log output) tokens between groups.
    No cut leaves a group without decode iterations. Fewer cuts where no more are possible.

    Costs O(N log N) per cut.
    """
    points = log_lengths(trace)
    total = float(((points - points.mean(axis=0)) ** 2).sum())
    groups = np.zeros(len(trace), dtype=np.int64)
    names = ["all"]
    found = [_best_cut(trace, points, groups == 0)]
    cuts: list[Cut] = []
    while len(names) < classes:
        g = int(np.argmax([gain for gain, _, _ in found]))
        gain, by, at = found[g]
        if gain <= 0.0:
            break
        tokens = trace.prompt_tokens if by == "prompt" else trace.output_tokens
        groups = np.where((groups == g) & (tokens >= at), len(names), groups)
        cuts.append(Cut(by=by, at=at, of=names[g], explained=gain / total, groups=groups))
        names.append(_narrowed(names[g], f"{by} >=", at))
        names[g] = _narrowed(names[g], f"{by} <", at)
        found[g] = _best_cut(trace, points, groups == g)
        found.append(_best_cut(trace, points, groups == len(names) - 1))
    return tuple(cuts)


def _narrowed(name: str, side: str, at: int) -> str:
    """The name of a group within a group; a threshold replaces the looser one on its side."""
    kept = [part for part in name.split("; ") if name != "all" and not part.startswith(f"{side} ")]
    return "; ".join([*kept, f"{side} {at}"])


def _best_cut(
    trace: Trace, points: NDArray[np.float64], where: NDArray[np.bool_]
) -> tuple[float, Literal["prompt", "output"], int]:
    """The gain in squared log distance between groups, length and threshold of the best cut of some requests."""
    best: tuple[float, Literal["prompt", "output"], int] = (0.0, "prompt", 0)
    inside, count = points[where], int(where.sum())
    decode = trace.output_tokens[where] - 1
    kinds: tuple[Literal["prompt"], Literal["output"]] = ("prompt", "output")
    for by in kinds:
        tokens = (trace.prompt_tokens if by == "prompt" else trace.output_tokens)[where]
        order = np.argsort(tokens, kind="stable")
        tokens, decodes = tokens[order], np.cumsum(decode[order])
        sums = np.cumsum(inside[order], axis=0)
        below = np.flatnonzero((np.diff(tokens) > 0) & (decodes[:-1] > 0) & (decodes[:-1] < decodes[-1]))
        if not below.size:
            continue
        left = below + 1.0
        apart = sums[below] / left[:, None] - (sums[-1] - sums[below]) / (count - left)[:, None]
        gain = left * (count - left) / count * (apart**2).sum(axis=1)
        at = int(np.argmax(gain))
        if gain[at] > best[0]:
            best = (float(gain[at]), by, int(tokens[below[at] + 1]))
    return best


def log_lengths(trace: Trace) -> NDArray[np.float64]:
    """(log prompt, log output) tokens, shape (N, 2)."""
    return np.log(np.stack([trace.prompt_tokens, trace.output_tokens], axis=1).astype(np.float64))


def between(points: NDArray[np.float64], groups: NDArray[np.int64]) -> float:
    """Share, 0 to 1, of the variance of ``points``, (N, d), that lies between groups; 1 where there is none."""
    total = float(((points - points.mean(axis=0)) ** 2).sum())
    count = np.bincount(groups)
    means = np.stack([np.bincount(groups, weights=points[:, j]) / count for j in range(points.shape[1])], axis=1)
    within = float(((points - means[groups]) ** 2).sum())
    return min(1.0, max(0.0, 1.0 - within / total)) if total > 0.0 else 1.0


def _variation(values: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Population standard deviation over mean, by group."""
    count = np.bincount(groups)
    mean = np.bincount(groups, weights=values) / count
    variance = np.bincount(groups, weights=(values - mean[groups]) ** 2) / count
    cv: NDArray[np.float64] = np.sqrt(variance) / mean
    cv.setflags(write=False)
    return cv


def _short(tokens: float) -> str:
    """Write a token count with two to three significant digits: 12, 180, 1.2k, 34k, 2.1M."""
    for limit, scale, unit in ((999.5, 1.0, ""), (999.5e3, 1e3, "k"), (math.inf, 1e6, "M")):
        if tokens < limit:
            scaled = tokens / scale
            return f"{scaled:.1f}{unit}" if unit and scaled < 9.95 else f"{scaled:.0f}{unit}"
    raise AssertionError


def _check_count(classes: int) -> None:
    if isinstance(classes, bool) or not isinstance(classes, (int, np.integer)) or classes < 1:
        raise InvalidInput(f"classify: classes must be a whole number of at least 1, or None; got {classes!r}")


def _cuts(cuts: Sequence[float] | None, name: str) -> NDArray[np.float64]:
    if cuts is None:
        return np.empty(0)
    try:
        edges = np.atleast_1d(np.asarray(cuts, dtype=np.float64))
    except (TypeError, ValueError):
        edges = np.array([math.nan])
    if edges.ndim != 1 or not edges.size or not np.isfinite(edges).all() or (np.diff(edges, prepend=0.0) <= 0).any():
        raise InvalidInput(
            f"classify: {name} must be increasing token counts above 0, such as [512, 2048]; got {cuts!r}"
        )
    return edges
