"""How many classes a trace needs: what a plan loses that cannot tell its requests apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fluidopt.contention import GPU
from fluidopt.errors import InvalidInput, SolverFailure
from fluidopt.inputs import is_number, is_whole
from fluidopt.model import FluidModel
from fluidopt.plan import Plan
from fluidopt.program import Array
from fluidopt.scenario import Charging
from fluidopt.solvers import Certificate, certify
from fluidopt.tables import jsonable, text
from fluidopt.traces.classify import (
    Classification,
    Cut,
    between,
    classification,
    length_cuts,
    length_groups,
    log_lengths,
)
from fluidopt.traces.trace import Trace
from fluidopt.views import amount_bar, card, figures, html, paragraph, share_bar
from fluidopt.workload import TokenPrices, Workload, WorkloadClass

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Groups = NDArray[np.int64]
Basis = Literal["label", "prompt", "label, prompt", "output", "lengths", "cuts"]
"""What tells classes apart: see `class_study`."""
AT_ARRIVAL: tuple[Basis, ...] = ("label", "prompt", "label, prompt")
"""What is known of a request when it arrives; its answer's length is not."""
FORESIGHT: tuple[Basis, ...] = ("output", "lengths", "cuts")
LEAST_DECODE = 1e-3
"""Decode iterations of a cell of the finest model in which no request decodes, as the model needs some."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Grouping:
    """One way to put the requests into classes, and what a plan earns that sees no more than these."""

    by: Basis
    """What tells the classes apart."""
    classification: Classification
    """The classes, rates of the whole stream; `Workload.per_gpu` makes them ready for a model."""
    prompt_explained: float
    """Share, 0 to 1, of the variance of prompt tokens that lies between the classes."""
    output_explained: float
    """The same for output tokens."""
    ratio_explained: float
    """The same for log(output/prompt), the order of a gate by D/P. In logs, where a factor counts the same everywhere:
    the plain ratio is governed by the few requests with the shortest prompts."""
    kv_error: float
    """KV tokens that a decode in service holds on average, as the classes tell it from their means and variations, over
    what the requests tell, less 1: what is lost where prompt and output lengths go together inside a class."""
    planned: float
    """R*, money/s per GPU: the plan of these classes in their own model."""
    certificate: Certificate
    """The same plan in the finest model, against that model's optimum: `objective` is what it earns there, `bound` what
    no plan beats; with a primal residual of 0 it is feasible there."""

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.classification.workload)

    @property
    def foresight(self) -> bool:
        """Whether the classes need output lengths, which nobody knows when a request arrives."""
        return self.by in FORESIGHT

    @property
    def revenue_rate(self) -> float:
        """What the plan earns, money/s per GPU, in the finest model."""
        return self.certificate.objective

    @property
    def loss(self) -> float:
        """Share of the finest plan's revenue that is lost, 0 to 1."""
        bound = self.certificate.bound
        return max(0.0, 1.0 - self.revenue_rate / bound) if bound > 0 else 0.0


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassStudy:
    """What each way to classify a trace keeps of its variety, and of the revenue of a plan that knows all of it."""

    groupings: tuple[Grouping, ...]
    """In the order asked for, by number of classes."""
    cut_tree: tuple[Cut, ...]
    """The cuts, the one that explains most first; empty where they were not asked for."""
    finest: Plan
    """The plan of the finest model, whose classes are the cells that all groupings together make."""
    gpus: float
    """Number of GPUs that share the stream."""
    tolerance: float
    """What the recommendation may lose beyond the best grouping, share of revenue."""
    requests: int
    """Requests in the trace."""

    @property
    def revenue_rate(self) -> float:
        """R* of the finest model, money/s per GPU: every request's lengths known when it arrives."""
        return self.finest.revenue_rate

    @cached_property
    def served(self) -> float:
        """Share of the requests that the finest plan completes."""
        return float(self.finest.throughput.sum() / self.finest.model.workload.arrival_rate.sum())

    def recommended(self, *, foresight: bool = False) -> Grouping | None:
        """The fewest classes that lose at most `tolerance` more than the best grouping does.

        Args:
            foresight: among the classes that need output lengths; else among those that can be told at arrival.

        Returns:
            Of equally many classes those that lose least; None where there is no such grouping.
        """
        able = [each for each in self.groupings if each.foresight == foresight]
        least = min((each.loss for each in able), default=0.0)
        good = [each for each in able if each.loss <= least + self.tolerance]
        return min(good, key=lambda each: (each.classes, each.loss), default=None)

    def to_frame(self) -> pd.DataFrame:
        """A row per grouping, indexed by what tells the classes apart and their number.

        Columns: ``at_arrival``, whether these classes can be told when a request arrives; ``explained``, share of the
        variance of (log prompt, log output) tokens between the classes; ``prompt_explained``, ``output_explained``,
        ``ratio_explained`` and ``kv_error`` as in `Grouping`; ``revenue_rate``, money/s per GPU; ``loss``, share of
        revenue.
        """
        import pandas as pd

        rows = [
            {
                "at_arrival": not each.foresight,
                "explained": each.classification.explained,
                "prompt_explained": each.prompt_explained,
                "output_explained": each.output_explained,
                "ratio_explained": each.ratio_explained,
                "kv_error": each.kv_error,
                "revenue_rate": each.revenue_rate,
                "loss": each.loss,
            }
            for each in self.groupings
        ]
        index = pd.MultiIndex.from_tuples([(each.by, each.classes) for each in self.groupings], names=["by", "classes"])
        return pd.DataFrame(rows, index=index)

    @property
    def cuts(self) -> pd.DataFrame:
        """A row per cut, in their order.

        Columns: ``by`` and ``at`` (tokens), ``of`` (the group that is cut), ``explained`` (what the cut adds), and
        ``loss`` (share of revenue that the classes made by all cuts so far lose; missing where so many classes were not
        asked for).
        """
        import pandas as pd

        loss = {each.classes: each.loss for each in self.groupings if each.by == "cuts"}
        rows = [
            {"by": cut.by, "at": cut.at, "of": cut.of, "explained": cut.explained, "loss": loss.get(at, np.nan)}
            for at, cut in enumerate(self.cut_tree, start=2)
        ]
        return pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="cut"))

    @property
    def statement(self) -> str:
        """The outcome in words."""
        if self.served > 1 - 1e-6 and max(each.loss for each in self.groupings) <= 1e-6:
            return (
                f"On {self.gpus:g} GPUs every request is served, whatever the classes: they do not matter for revenue. "
                "Study the load at which requests are turned away."
            )
        sentences = [
            f"A plan that knew every request's lengths would earn {self.revenue_rate:.5g} money/s per GPU and complete "
            f"{self.served:.1%} of the requests."
        ]
        arrival, ahead = self.recommended(), self.recommended(foresight=True)
        if arrival is not None:
            sentences.append(f"Told at arrival: {_words(arrival)}.")
        if ahead is not None:
            sentences.append(f"With foresight: {_words(ahead)}.")
        if arrival is not None and ahead is not None and arrival.loss - ahead.loss > self.tolerance:
            sentences.append(
                f"A label or a predictor of output lengths is worth up to {arrival.loss - ahead.loss:.1%} of revenue."
            )
        if self.cut_tree:
            gains = {by: sum(cut.explained for cut in self.cut_tree if cut.by == by) for by in ("prompt", "output")}
            sentences.append(
                f"Of the variance of log lengths, {gains['prompt']:.0%} is explained by cuts in prompt tokens and "
                f"{gains['output']:.0%} by cuts in output tokens."
            )
        return " ".join(sentences)

    @property
    def caption(self) -> str:
        """How the numbers were made, in words."""
        return (
            f"{self.requests:,} requests on {self.gpus:g} GPUs; loss against {len(self.finest.model.workload):,} "
            "cells. Classes by lengths, output or cuts need output lengths, which nobody knows when a request arrives: "
            "they are usable only where a label or a predictor tells them. Recommended: the fewest classes that lose "
            f"at most {self.tolerance:.1%} of revenue more than the best of their kind."
        )

    def to_dict(self) -> dict[str, Any]:
        """The tables as JSON-able data."""
        return {
            "requests": self.requests,
            "gpus": self.gpus,
            "tolerance": self.tolerance,
            "revenue_rate": self.revenue_rate,
            "served": self.served,
            "statement": self.statement,
            "groupings": [
                {"by": each.by, "classes": each.classes, **{str(name): jsonable(cell) for name, cell in row.items()}}
                for each, (_, row) in zip(self.groupings, self.to_frame().iterrows(), strict=True)
            ],
            "cuts": [{str(name): jsonable(cell) for name, cell in row.items()} for _, row in self.cuts.iterrows()],
        }

    def plot(self) -> Figure:
        """Revenue lost and variance explained by number of classes, and what each cut explains."""
        return plot_class_study(self)

    def __str__(self) -> str:
        return "\n".join(["Class study", self.caption, self.statement, "", text(self.to_frame(), max_rows=60)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        shares = [name for name in frame.columns if name.endswith("explained")]
        return card(
            "Class study",
            figures(
                ("Every length known", self.revenue_rate, "money/s per GPU"),
                ("Requests completed then", 100.0 * self.served, "%"),
            ),
            paragraph(self.statement),
            html(
                frame,
                title="Groupings",
                units=dict.fromkeys(shares, "of variance") | {"revenue_rate": "money/s per GPU", "loss": "of revenue"},
                bars={"explained": share_bar, "loss": amount_bar},
                max_rows=60,
            ),
            paragraph(self.caption, muted=True),
        )


def class_study(
    trace: Trace,
    gpu: GPU | Sequence[GPU],
    *,
    gpus: float,
    prices: TokenPrices,
    charging: Charging = "bundled",
    abandonment_rate: float = 0.1,
    counts: Sequence[int] = range(1, 9),
    by: Basis | Sequence[Basis] | None = None,
    tolerance: float = 0.01,
    seed: int = 0,
) -> ClassStudy:
    """Classify a trace in several ways and measure what the plan of each loses.

    An operator who cannot tell two requests apart must treat them alike: admit and complete the same share of both.
    The plan of k classes is carried over to the finest model in this sense and certified there; its loss is the share
    of the finest plan's revenue that it misses, never negative. (The model is linear in the mean lengths, so that the
    plan of the merged classes is the best of all plans that treat their members alike, and earns in the finest model
    what it promises in its own.) Only revenue counts here: no waits, no promises, no finite fleet.

    Args:
        trace: the requests.
        gpu: the GPU type, or several whose shares add up to 1.
        gpus: how many GPUs share the stream. Choose the load that is planned for: where all requests can be served,
            classes do not matter.
        prices: what a token earns.
        charging: ``"bundled"`` or ``"separate"``.
        abandonment_rate: theta of all requests, 1/s; revenue does not depend on it as long as it is above 0. With 0
            every request must be served.
        counts: numbers of classes.
        by: what tells classes apart, one or several of: ``"label"``, ``"prompt"`` (k-means on log prompt tokens),
            ``"label, prompt"`` (so many classes per label), which are known at arrival; and, with foresight,
            ``"output"`` and ``"lengths"`` (k-means on log output tokens, on both) and ``"cuts"`` (a tree of cuts in
            either, `length_cuts`). Default: all that the trace has.
        tolerance: of the recommendation, share of revenue.
        seed: of k-means.

    Raises:
        InvalidInput: an argument breaks a rule, the trace has no duration, or no grouping is left: counts above the
            number of distinct lengths, and groups in which no request decodes, are passed over.
        InfeasibleModel: ``abandonment_rate=0`` and more requests than the GPUs can serve.

    Costs about 2 s on 30,000 requests with the defaults, most of it k-means, and grows linearly.
    """
    chosen = _checked(trace, gpus, abandonment_rate, counts, by, tolerance, seed)
    trace.duration  # noqa: B018 - a trace without one has no rates, and says so
    cuts = length_cuts(trace, max(counts)) if "cuts" in chosen else ()
    found = [
        each
        for basis in chosen
        for each in _classifications(trace, basis, sorted(set(counts)), cuts, abandonment_rate, seed)
    ]
    if not found:
        raise InvalidInput(
            f"class_study: none of counts={list(counts)!r} gives classes of this trace in which requests decode; ask "
            "for fewer classes"
        )
    cells = _Cells(trace, [each.assignment for _, each in found], gpus=gpus, abandonment_rate=abandonment_rate)
    model = FluidModel(cells.workload, gpu, prices=prices, charging=charging)
    finest = model.solve()
    groupings = []
    for basis, each in found:
        plan = FluidModel(cells.merged(each), gpu, prices=prices, charging=charging).solve()
        values = cells.carried_over(plan, finest, each)
        certificate = certify(finest.program, values, finest.solution.duals)
        if certificate.primal_residual > finest.solution.tolerance:
            raise SolverFailure(f"class_study: the plan of {each!r} breaks rows of the finest model: {certificate}")
        groupings.append(_grouping(trace, basis, each, plan.revenue_rate, certificate))
    return ClassStudy(
        groupings=tuple(groupings),
        cut_tree=cuts,
        finest=finest,
        gpus=float(gpus),
        tolerance=float(tolerance),
        requests=len(trace),
    )


def _checked(
    trace: Trace,
    gpus: float,
    abandonment_rate: float,
    counts: Sequence[int],
    by: object,
    tolerance: float,
    seed: int,
) -> tuple[Basis, ...]:
    """What to go by, with all arguments checked."""
    if not isinstance(trace, Trace):
        raise InvalidInput(f"class_study: trace must be a Trace; got {type(trace).__name__}; see read_trace")
    if not (is_number(gpus) and gpus > 0):
        raise InvalidInput(f"class_study: gpus must be a finite number above 0; got {gpus!r}")
    if not (is_number(abandonment_rate) and abandonment_rate >= 0):
        raise InvalidInput(
            f"class_study: abandonment_rate must be a finite number of at least 0; got {abandonment_rate!r}"
        )
    if not is_whole(seed, least=0):
        raise InvalidInput(f"class_study: seed must be a whole number of at least 0; got {seed!r}")
    if not (is_number(tolerance) and 0 <= tolerance < 1):
        raise InvalidInput(f"class_study: tolerance must be at least 0 and below 1; got {tolerance!r}")
    if not len(counts) or not all(is_whole(count, least=1) for count in counts):
        raise InvalidInput(f"class_study: counts must be whole numbers of at least 1; got {counts!r}")
    if by is None:
        return tuple(each for each in get_args(Basis) if trace.label is not None or "label" not in each)
    asked = (by,) if isinstance(by, str) else tuple(by) if isinstance(by, Sequence) else ()
    unknown = [each for each in asked if each not in get_args(Basis)]
    if unknown or not asked or len(set(asked)) < len(asked):
        raise InvalidInput(
            f"class_study: by must be one or several of {', '.join(map(repr, get_args(Basis)))}, each once; got {by!r}"
        )
    if trace.label is None and any("label" in each for each in asked):
        raise InvalidInput(
            "class_study: by='label' needs labels and this trace has none; read the files with label=..., or leave it "
            "out"
        )
    return asked


def _classifications(
    trace: Trace, by: Basis, counts: Sequence[int], cuts: Sequence[Cut], abandonment_rate: float, seed: int
) -> list[tuple[Basis, Classification]]:
    """The classes that a basis makes, by their number; those that the model cannot hold left out."""
    found: dict[int, Classification] = {}
    for count in counts if by != "label" else (1,):
        try:
            groups = _groups(trace, by, count, cuts, seed)
            names = (
                [str(each) for each in np.unique(trace.label)] if by == "label" and trace.label is not None else None
            )
            each = classification(trace, groups, names, how=f"by {by}", abandonment_rate=abandonment_rate)
        except InvalidInput:
            continue  # more classes than distinct lengths, or one in which no request decodes
        found.setdefault(len(each.workload), each)
    return [(by, found[size]) for size in sorted(found)]


def _groups(trace: Trace, by: Basis, count: int, cuts: Sequence[Cut], seed: int) -> Groups:
    """Group number of each request, shape (N,)."""
    generator = np.random.default_rng(seed)
    if by == "cuts":
        made = min(count - 1, len(cuts))
        return cuts[made - 1].groups if made else np.zeros(len(trace), dtype=np.int64)
    if trace.label is None or "label" not in by:
        return length_groups(trace, count, by=by, seed=generator)
    labels: Groups = np.unique(trace.label, return_inverse=True)[1].astype(np.int64)
    if by == "label":
        return labels
    groups = np.empty_like(labels)
    for label in range(len(trace.labels)):
        own = labels == label
        part = Trace(trace.arrival_time[own], trace.prompt_tokens[own], trace.output_tokens[own])
        groups[own] = label * count + length_groups(part, count, by="prompt", seed=generator)
    return groups


class _Cells:
    """The finest model's classes: the cells that all groupings together cut the requests into."""

    def __init__(self, trace: Trace, assignments: Sequence[Groups], *, gpus: float, abandonment_rate: float) -> None:
        grid, first, cell = np.unique(np.stack(assignments, axis=1), axis=0, return_index=True, return_inverse=True)
        cell = cell.reshape(-1)
        count = np.bincount(cell)
        self.first = first
        self.abandonment_rate = abandonment_rate
        self.rate = trace.request_rate / gpus * count / len(trace)
        self.prompt = np.bincount(cell, weights=trace.prompt_tokens) / count
        self.decode = np.maximum(np.bincount(cell, weights=trace.output_tokens - 1) / count, LEAST_DECODE)
        self.workload = self._workload([f"cell {at}" for at in range(len(grid))], self.rate, self.prompt, self.decode)

    def _workload(self, names: Sequence[str], rate: Array, prompt: Array, decode: Array) -> Workload:
        theta = self.abandonment_rate
        return Workload(
            tuple(
                WorkloadClass(
                    name,
                    arrival_rate=float(rate[at]),
                    prompt_tokens=float(prompt[at]),
                    output_tokens=float(decode[at]),
                    abandonment_rate=theta,
                )
                for at, name in enumerate(names)
            )
        )

    def merged(self, each: Classification) -> Workload:
        """The classes of a grouping, per GPU, from the cells in them."""
        of = each.assignment[self.first]
        rate = np.bincount(of, weights=self.rate).astype(float)
        return self._workload(
            each.workload.names,
            rate,
            np.bincount(of, weights=self.rate * self.prompt) / rate,
            np.bincount(of, weights=self.rate * self.decode) / rate,
        )

    def carried_over(self, plan: Plan, finest: Plan, each: Classification) -> Array:
        """The plan of a grouping in the columns of the finest model: every cell of a class is treated alike.

        The same share of each cell's requests is admitted and completed, in the same modes. Requests in the queues are
        shared by arrivals, prefills by prompt tokens and decodes by decode iterations.
        """
        of = each.assignment[self.first]
        weight = {
            name: self.rate * work / np.bincount(of, weights=self.rate * work)[of]
            for name, work in (("x", self.prompt), ("y", self.decode), ("q_p", 1.0), ("q_d", 1.0))
        }
        merged = plan.program.column_grids(plan.solution.values)
        values = np.zeros(finest.program.shape[1])
        for block in finest.program.columns:
            grid = merged[block.name]
            if block.name in weight:
                grid = (grid[of].T * weight[block.name]).T
            there = block.numbers >= 0
            values[block.numbers[there]] = grid[there]
        return values


def _grouping(trace: Trace, by: Basis, each: Classification, planned: float, certificate: Certificate) -> Grouping:
    points = log_lengths(trace)

    def explained(values: NDArray[Any]) -> float:
        return between(values.astype(float)[:, None], each.assignment)

    return Grouping(
        by=by,
        classification=each,
        prompt_explained=explained(trace.prompt_tokens),
        output_explained=explained(trace.output_tokens),
        ratio_explained=explained(points[:, 1] - points[:, 0]),
        kv_error=_kv_error(trace, each),
        planned=planned,
        certificate=certificate,
    )


def _kv_error(trace: Trace, each: Classification) -> float:
    """KV tokens per decode in service: P + D (1 + cv^2)/2 by class, weighted by decode work, against the requests'."""
    prompt, decode = trace.prompt_tokens.astype(float), (trace.output_tokens - 1).astype(float)
    classes = each.workload
    work = classes.arrival_rate * classes.output_tokens
    told = work @ (classes.prompt_tokens + classes.output_tokens * (1 + each.output_cv**2) / 2) / work.sum()
    held = decode @ (prompt + decode / 2) / decode.sum()
    return float(told / held - 1.0)


def _words(each: Grouping) -> str:
    if each.classes == 1:
        return f"1 class loses {each.loss:.2%} of it"
    return f"{each.classes} classes by {each.by} lose {each.loss:.2%} of it"


def plot_class_study(study: ClassStudy) -> Figure:
    """Revenue lost and variance explained by number of classes, and what each cut explains: three panels.

    Filled markers and full lines: told at arrival; hollow and dotted: with foresight.
    """
    from fluidopt.plots import DARK, LIGHT, LINES, _class_axis, _figure, _panel, _title

    figure, axes = _figure(1, 3, rows=max(6, len(study.cut_tree)))
    kinds = list(dict.fromkeys(each.by for each in study.groupings))
    markers = dict(zip(get_args(Basis), "sod^vP", strict=True))
    for basis in kinds:
        own = [each for each in study.groupings if each.by == basis]
        foresight = own[0].foresight
        peers = [each for each in kinds if (each in FORESIGHT) == foresight]
        look: dict[str, Any] = {
            "color": LINES[peers.index(basis) % 3],
            "marker": markers[basis],
            "linestyle": ":" if foresight else "-",
            "fillstyle": "none" if foresight else "full",
            "markersize": 5,
            "label": f"{basis} (foresight)" if foresight else basis,
        }
        sizes = [each.classes for each in own]
        axes[0].plot(sizes, [100 * each.loss for each in own], **look)
        axes[1].plot(sizes, [100 * each.classification.explained for each in own], **look)
    most = max(each.classes for each in study.groupings)
    for axis, title in zip(axes, ("Revenue lost, %", "Variance of log lengths explained, %"), strict=False):
        axis.set_xticks(range(1, most + 1, 1 if most <= 10 else 2))
        axis.set_xlabel("classes", fontsize=8)
        axis.set_ylim(bottom=0)
        _panel(axis, title, legend=False)
    axes[1].set_ylim(top=100)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=6, frameon=False, fontsize=8)
    axes[2].set_visible(bool(study.cut_tree))
    if study.cut_tree:
        places = _class_axis(axes[2], [f"{at}: {cut.by} at {cut.at}" for at, cut in enumerate(study.cut_tree, start=1)])
        for by, colour in (("prompt", DARK), ("output", LIGHT)):
            bars = [100 * cut.explained if cut.by == by else 0.0 for cut in study.cut_tree]
            axes[2].barh(places, bars, color=colour, label=f"{by} tokens")
        _panel(axes[2], "Explained by each cut, %")
    _title(figure, f"Classes of {study.requests:,} requests on {study.gpus:g} GPUs")
    return figure
