"""Token prices: what the ratio of prompt to output price does to revenue, and the best one.

What a plan can do does not depend on prices, and what it earns is linear in them. So for a fixed demand R*(c_p, c_d)
is the largest of many linear functions: convex, and homogeneous, R*(t c) = t R*(c) with the same plans. Two things
follow. Along ``a c_p + b c_d = k`` (a = b = 1 in [L26] section 6.3) revenue is a chain of straight pieces, one plan
each, which a few solves give exactly; and its maximum is at an end: all on the prompt, or all on the output. Only a
demand that answers to prices makes anything between best. Then ``R(c) = R*(c, lambda(c))`` has no shape one could rely
on, and `fluidopt.studies.prices.search` searches it all, with a bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fluidopt.errors import InvalidInput
from fluidopt.inputs import is_number
from fluidopt.model import FluidModel
from fluidopt.plan import Plan
from fluidopt.program import Array
from fluidopt.scenario import Charging
from fluidopt.solvers.knapsack import applies, solve_capacity
from fluidopt.solvers.structured import capacity_problem
from fluidopt.solvers.warm import Solver
from fluidopt.studies.hardware.values import check_revenue, price_bound
from fluidopt.studies.quiet import built_quietly
from fluidopt.tables import number, text
from fluidopt.views import amount_bar, card, figures, html, paragraph, sketch
from fluidopt.workload import TokenPrices

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Relative: below this two straight pieces are the same.
SAME = 1e-9
# Requests per GPU, or per second and GPU: below this there are none.
ROUNDING = 1e-9


@dataclass(frozen=True)
class PriceLine:
    """All prices with ``weights[0] c_p + weights[1] c_d = budget``, by the share of the budget on the prompt price."""

    budget: float
    """k, money (per token with weights 1 and 1; per request with the mean tokens of a request)."""
    weights: tuple[float, float] = (1.0, 1.0)
    """a and b, above 0."""

    def prices(self, share: float) -> TokenPrices:
        """c_p = share k/a and c_d = (1 - share) k/b."""
        return TokenPrices(
            prompt=share * self.budget / self.weights[0], output=(1 - share) * self.budget / self.weights[1]
        )

    def share(self, prices: TokenPrices) -> float:
        """Share of the budget on the prompt price, of prices on the line or anywhere on its ray from 0."""
        parts = self.weights[0] * prices.prompt, self.weights[1] * prices.output
        return parts[0] / sum(parts)


def price_line(model: FluidModel, budget: object, weights: object, caller: str) -> PriceLine:
    """The prices of a budget; by default of the budget that the model's own prices come to.

    Raises:
        InvalidInput: budget or weights break a rule, or the model does not maximise revenue.
    """
    check_revenue(model, caller)
    pair = list(weights) if isinstance(weights, tuple | list) else []
    if len(pair) != 2 or not all(is_number(each) and each > 0 for each in pair):
        raise InvalidInput(f"{caller}: weights must be two numbers above 0; got {weights!r}")
    present = model.scenario.prices
    if budget is None:
        budget = pair[0] * present.prompt + pair[1] * present.output
    if not (is_number(budget) and budget > 0):  # type: ignore[operator]
        raise InvalidInput(f"{caller}: budget must be a finite number above 0; got {budget!r}")
    return PriceLine(float(budget), (float(pair[0]), float(pair[1])))  # type: ignore[arg-type]


def with_prices(
    model: FluidModel, prices: TokenPrices, *, charging: Charging | None = None, rates: Array | None = None
) -> FluidModel:
    """``model`` at other prices; under another scheme, or at other arrival rates (requests/s per GPU), where given."""
    scenario = replace(model.scenario, prices=prices, charging=charging or model.scenario.charging)
    if rates is not None:
        classes = tuple(
            replace(each, arrival_rate=rate) for each, rate in zip(model.workload, rates.tolist(), strict=True)
        )
        scenario = replace(scenario, classes=classes, rates="per_gpu")
    return built_quietly(scenario)


# ---- what one model earns at many prices ----------------------------------------------------------------------------


class Earned(NamedTuple):
    """What an optimal plan earns, and what for."""

    objective: float
    """R*, money/s per GPU, less penalties."""
    bound: float
    """What no plan exceeds."""
    prompt: float
    """Prompt tokens/s per GPU that are paid."""
    output: float
    """Output tokens/s per GPU that are paid."""


class Revenue:
    """R* of a model at other prices and arrival rates: by the structured solver, or by simplex from the last basis."""

    def __init__(self, model: FluidModel) -> None:
        self.bundled = model.scenario.charging == "bundled"
        self.prompt_tokens, self.output_tokens = model.workload.prompt_tokens, model.workload.output_tokens
        self.prefill_speed, self.decode_speed = (
            np.array([getattr(mode, name) for _, mode in model.modes]) for name in ("prefill_speed", "decode_speed")
        )
        self.problem = capacity_problem(model)
        self.solver = None if model.is_standard and applies(self.problem) is None else Solver(model)

    def __call__(self, prices: TokenPrices, rates: Array | None = None) -> Earned:
        """Solve at these prices, and at these arrival rates where given, shape (I,), requests/s per GPU.

        Raises:
            InfeasibleModel: there is no plan.
        """
        if self.solver is None:
            problem = replace(self.problem, prompt_price=prices.prompt, output_price=prices.output)
            problem = problem if rates is None else replace(problem, arrival_rate=rates)
            answer = solve_capacity(problem)
            tokens = self._paid(answer.prefill, answer.decode)
            return Earned(answer.objective, max(answer.objective, price_bound(problem, answer.prices)), *tokens)
        changes: dict[str, Any] = {"c_p": prices.prompt, "c_d": prices.output}
        found = self.solver.solve(changes if rates is None else changes | {"lambda": rates})
        tokens = self._paid(found.values["x"], found.values["y"])
        return Earned(found.objective, max(found.objective, found.certificate.bound), *tokens)

    def _paid(self, prefill: Array, decode: Array) -> tuple[float, float]:
        output = np.nansum(decode * self.decode_speed, axis=1)
        if self.bundled:
            return float(self.prompt_tokens @ (output / self.output_tokens)), float(output.sum())
        return float(np.nansum(prefill * self.prefill_speed)), float(output.sum())


# ---- fixed demand: the exact curve ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Prices between which one plan is optimal, and what it earns: a straight line in the share."""

    first: float
    last: float
    """Share of the budget on the prompt price, from ``first`` to ``last``."""
    earned: tuple[float, float]
    """Money/s per GPU at ``first`` and at ``last``."""
    plan: Plan
    """The optimal plan in the middle."""

    @property
    def decode_queue(self) -> float:
        """Requests waiting for decode per GPU, of classes where that is determined."""
        impatient = self.plan.model.workload.abandonment_rate > 0
        waiting = float(np.nan_to_num(self.plan.decode_queue)[impatient].sum())
        return waiting if waiting > ROUNDING else 0.0

    @property
    def wasted(self) -> float:
        """Prefills that no decode follows, requests/s per GPU."""
        wasted = float((self.plan.admitted - self.plan.throughput).sum())
        return wasted if wasted > ROUNDING else 0.0


@dataclass(frozen=True, eq=False)
class PriceCurve:
    """R* along a price line at fixed demand, exactly: convex, straight between its kinks."""

    line: PriceLine
    charging: Charging
    pieces: tuple[Piece, ...]

    @cached_property
    def kinks(self) -> Array:
        """Shares at which the optimal plan changes, 0 and 1 included; shape (M+1,)."""
        return np.array([self.pieces[0].first, *(piece.last for piece in self.pieces)])

    @cached_property
    def revenue(self) -> Array:
        """R* at the kinks, money/s per GPU; shape (M+1,)."""
        return np.array([self.pieces[0].earned[0], *(piece.earned[1] for piece in self.pieces)])

    def revenue_at(self, share: float) -> float:
        """R* at a share of the budget on the prompt price, money/s per GPU."""
        return float(np.interp(share, self.kinks, self.revenue))

    def piece_at(self, share: float) -> Piece:
        """The piece that holds a share; at a kink the one after it."""
        return self.pieces[min(int(np.searchsorted(self.kinks, share, side="right")) - 1, len(self.pieces) - 1)]

    def _repr_html_(self) -> str:
        return card(
            f"Revenue over prices, {self.charging} charging",
            figures(
                ("All on the output price", self.revenue[0], "money/s per GPU"),
                ("All on the prompt price", self.revenue[-1], "money/s per GPU"),
                ("Plans", len(self.pieces), "straight pieces"),
            ),
            sketch({"R*": (self.kinks, self.revenue)}, across="share on the prompt price", up="money/s per GPU"),
        )


def price_curve(
    model: FluidModel, *, budget: float | None = None, weights: tuple[float, float] = (1.0, 1.0)
) -> PriceCurve:
    """R* over all prices of a budget, exactly, for the demand as it is ([L26] section 6.3, figure 10(b)).

    Every solve gives a straight line that touches the curve from below. Where two neighbours meet, either the curve has
    its kink, or another solve there gives a new line between them: about 2M solves for M pieces, and one for each plan.

    Args:
        model: the model; its prices are replaced, its service levels stay. Penalties are money and do not move with
            prices.
        budget: k in ``weights[0] c_p + weights[1] c_d = k``; by default what the model's own prices come to.
        weights: a and b; with the mean prompt and output tokens of a request, k is what an average request pays.

    Raises:
        InvalidInput: an argument breaks a rule, or the model has an objective of its own or a convex penalty.
        InfeasibleModel: the model has no plan.
    """
    line = price_line(model, budget, weights, "price_curve")
    revenue = Revenue(model)
    ends = [_touch(revenue, line, share) for share in (0.0, 1.0)]
    touching = [ends[0], *_between(revenue, line, ends[0], ends[1]), ends[1]]
    starts = [0.0, *(_meet(left, right) for left, right in pairwise(touching))]
    # At an end, where one price is 0, a plan may tie that is optimal nowhere else: its piece has no length.
    kept = [at for at, (start, end) in enumerate(pairwise([*starts, 1.0])) if end - start > SAME]
    kinks = [0.0, *(starts[at] for at in kept[1:]), 1.0]
    pieces = []
    for at, (first, last) in zip(kept, pairwise(kinks), strict=True):
        plan = with_prices(model, line.prices((first + last) / 2)).solve()
        pieces.append(Piece(first, last, (touching[at].at(first), touching[at].at(last)), plan))
    return PriceCurve(line, model.scenario.charging, tuple(pieces))


@dataclass(frozen=True)
class _Touch:
    """What one plan earns at all prices of a line: straight, and nowhere above R*."""

    start: float
    slope: float

    def at(self, share: float) -> float:
        return self.start + self.slope * share


def _touch(revenue: Revenue, line: PriceLine, share: float) -> _Touch:
    prices = line.prices(share)
    earned = revenue(prices)
    # What is earned beside tokens are penalties, which prices do not move.
    rest = earned.objective - prices.prompt * earned.prompt - prices.output * earned.output
    ends = (line.prices(0.0).output * earned.output + rest, line.prices(1.0).prompt * earned.prompt + rest)
    return _Touch(ends[0], ends[1] - ends[0])


def _meet(left: _Touch, right: _Touch) -> float:
    turn = right.slope - left.slope
    scale = abs(left.slope) + abs(right.slope) + abs(left.start)
    return min(max((left.start - right.start) / turn, 0.0), 1.0) if turn > SAME * scale else 1.0


def _between(revenue: Revenue, line: PriceLine, left: _Touch, right: _Touch) -> Iterator[_Touch]:
    """The lines between two that touch the curve, by increasing slope."""
    share = _meet(left, right)
    if not 0.0 < share < 1.0:
        return
    touch = _touch(revenue, line, share)
    known = max(left.at(share), right.at(share))
    if touch.at(share) - known <= SAME * (abs(known) + 1e-300):
        return
    yield from _between(revenue, line, left, touch)
    yield touch
    yield from _between(revenue, line, touch, right)


def price_study(
    model: FluidModel, *, budget: float | None = None, weights: tuple[float, float] = (1.0, 1.0)
) -> PriceStudy:
    """Bundled and separate charging side by side over all prices of a budget, the demand as it is.

    Separate charging never earns less: what completes is paid alike, and a prefill whose decode never runs is paid too.
    It is that difference that fills the decode queue. Arguments and errors are those of `price_curve`.
    """
    check_revenue(model, "price_study")
    bundled, separate = (
        price_curve(with_prices(model, model.scenario.prices, charging=charging), budget=budget, weights=weights)
        for charging in ("bundled", "separate")
    )
    return PriceStudy(model, bundled, separate)


@dataclass(frozen=True, eq=False)
class PriceStudy:
    """Revenue, decode queue and wasted prefills over the price ratio, under both charging schemes."""

    model: FluidModel
    bundled: PriceCurve
    separate: PriceCurve

    @property
    def line(self) -> PriceLine:
        """The prices that are compared."""
        return self.bundled.line

    @cached_property
    def parts_from(self) -> float:
        """Share on the prompt price from which separate charging earns more than bundled; 1 where it never does.

        For the mixed/solo pair an extra prefill costs decodes worth c_d e, with e = kappa B - (B-1), and earns c_p C:
        it pays to prefill what will not be decoded where c_p C > c_d e, if there is anyone left to prefill.
        """
        shares = np.unique(np.concatenate([self.bundled.kinks, self.separate.kinks]))
        lead = np.array([self.separate.revenue_at(each) - self.bundled.revenue_at(each) for each in shares])
        ahead = np.flatnonzero(lead > 1e-7 * (1e-12 + self.separate.revenue.max()))
        return float(shares[max(ahead[0] - 1, 0)]) if ahead.size else 1.0

    def charging(self, share: float | None = None) -> pd.DataFrame:
        """Both schemes at one share of the budget on the prompt price (default: the model's own ratio).

        Columns: ``revenue_rate`` (money/s per GPU), ``completed`` (requests/s), ``prefill_share`` (of the fleet),
        ``decode_queue`` (requests), ``wasted`` (prefills/s that no decode follows); per GPU.
        """
        import pandas as pd

        share = self.line.share(self.model.scenario.prices) if share is None else share
        if not (is_number(share) and 0 <= share <= 1):
            raise InvalidInput(f"charging: share must be between 0 and 1; got {share!r}")
        rows = {}
        for curve in (self.bundled, self.separate):
            piece = curve.piece_at(share)
            prefills = np.array([mode.prefills for _, mode in self.model.modes])
            rows[curve.charging] = {
                "revenue_rate": curve.revenue_at(share),
                "completed": float(piece.plan.throughput.sum()),
                "prefill_share": float(piece.plan.mode_share[prefills].sum()),
                "decode_queue": piece.decode_queue,
                "wasted": piece.wasted,
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("charging")

    def to_frame(self) -> pd.DataFrame:
        """A row per scheme and piece: the shares it holds for, prices and revenue at both ends, and what is decoded,
        queued and wasted on it (per GPU)."""
        import pandas as pd

        rows = [
            {
                "charging": curve.charging,
                "share_from": piece.first,
                "share_to": piece.last,
                "revenue_from": piece.earned[0],
                "revenue_to": piece.earned[1],
                "completed": float(piece.plan.throughput.sum()),
                "decode_queue": piece.decode_queue,
                "wasted": piece.wasted,
            }
            for curve in (self.bundled, self.separate)
            for piece in curve.pieces
        ]
        return pd.DataFrame(rows).set_index("charging")

    def plot(self) -> Figure:
        """Revenue, decode queue and wasted prefills over the share of the budget on the prompt price."""
        from fluidopt.studies.prices.figures import plot_prices

        return plot_prices(self)

    @property
    def headline(self) -> str:
        """Both schemes at the model's own ratio, in one line."""
        share = self.line.share(self.model.scenario.prices)
        frame = self.charging(share)
        earned, queue = frame["revenue_rate"], frame["decode_queue"]
        return (
            f"c_p : c_d = {ratio(self.model.scenario.prices)}: bundled {number(earned['bundled'])} money/s per GPU, "
            f"separate {number(earned['separate'])}; decode queue {number(queue['bundled'])} against "
            f"{number(queue['separate'])} requests per GPU"
        )

    def __repr__(self) -> str:
        return f"PriceStudy: {self.headline}\n\n{text(self.to_frame())}"

    def _repr_html_(self) -> str:
        units = dict.fromkeys(("share_from", "share_to"), "on the prompt price")
        units |= dict.fromkeys(("revenue_from", "revenue_to"), "money/s per GPU")
        units |= {"completed": "requests/s per GPU", "decode_queue": "requests/GPU", "wasted": "prefills/s per GPU"}
        curves, present = (self.bundled, self.separate), self.charging()["revenue_rate"]
        return card(
            "Prices at fixed demand",
            figures(*((f"{each.charging} charging", present[each.charging], "money/s per GPU") for each in curves)),
            paragraph(f"{self.headline}."),
            sketch(
                {each.charging: (each.kinks, each.revenue) for each in curves},
                across="share on the prompt price",
                up="money/s per GPU",
            ),
            html(self.to_frame(), title="A row per plan", units=units, bars={"wasted": amount_bar}),
        )


def ratio(prices: TokenPrices) -> str:
    """c_p : c_d."""
    return f"{number(prices.prompt)} : {number(prices.output)}"
