"""The best token prices where demand answers to them: a search of all ratios of a budget, with a bound.

Without an answer there is nothing to search: revenue is convex in the prices (`fluidopt.studies.prices.curves`), and an
end of the budget is best.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidopt.errors import InvalidInput, SolverFailure
from fluidopt.inputs import is_number
from fluidopt.model import FluidModel
from fluidopt.plan import Plan
from fluidopt.program import Array
from fluidopt.service_levels import KVMemory, MeanTPOT, SlotTPOT
from fluidopt.studies.prices.curves import (
    ROUNDING,
    SAME,
    Earned,
    PriceLine,
    Revenue,
    price_curve,
    price_line,
    ratio,
    with_prices,
)
from fluidopt.tables import number
from fluidopt.views import card, figures, paragraph, sketch
from fluidopt.workload import TokenPrices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_SOLVES = 20_000

Demand = Callable[[float, float], Any]
"""Arrival rates lambda, shape (I,), requests/s per GPU, at a prompt and an output price, money/token. No rate may rise
when a price does."""


@dataclass(frozen=True)
class ElasticDemand:
    """Arrivals that fall as requests become dearer: lambda_i = lambda_i(0) (w_i/w_i(0))^-epsilon_i.

    w_i = c_p P_i + c_d D_i is what a request pays, [L26] eq. (21), and w_i(0) what it paid at ``prices``.
    """

    arrival_rate: Array
    """lambda(0), shape (I,), requests/s per GPU, at ``prices``."""
    prompt_tokens: Array
    output_tokens: Array
    prices: TokenPrices
    """The prices at which ``arrival_rate`` was seen."""
    elasticity: Array
    """epsilon, shape (I,), at least 0: % of requests lost per % that a request becomes dearer."""

    def __call__(self, prompt_price: float, output_price: float) -> Array:
        """Arrival rates at these prices; inf where a request is free and its class is elastic."""
        was = self.prices.prompt * self.prompt_tokens + self.prices.output * self.output_tokens
        now = prompt_price * self.prompt_tokens + output_price * self.output_tokens
        with np.errstate(divide="ignore"):
            factor = np.where((self.elasticity > 0) & (self.arrival_rate > 0), (now / was) ** -self.elasticity, 1.0)
        return self.arrival_rate * factor


def elastic_demand(model: FluidModel, elasticity: float | Array) -> ElasticDemand:
    """The demand of ``model`` as seen at its own prices, with one elasticity, or one per class.

    Raises:
        InvalidInput: an elasticity below 0, or not one per class.
    """
    workload = model.workload
    try:
        each = np.broadcast_to(np.asarray(elasticity, dtype=float), (len(workload),)).copy()
    except (TypeError, ValueError):
        each = np.array([np.nan])
    if not (np.isfinite(each).all() and (each >= 0).all()):
        raise InvalidInput(
            f"elastic_demand: elasticity must be a number of at least 0, or {len(workload)} of them; got {elasticity!r}"
        )
    return ElasticDemand(
        workload.arrival_rate, workload.prompt_tokens, workload.output_tokens, model.scenario.prices, each
    )


def optimal_prices(
    model: FluidModel,
    *,
    budget: float | None = None,
    weights: tuple[float, float] = (1.0, 1.0),
    demand: Demand | None = None,
    tolerance: float = 1e-3,
    most_solves: int = MOST_SOLVES,
) -> OptimalPrices:
    """The prices with ``weights[0] c_p + weights[1] c_d = budget`` that earn most.

    Without ``demand`` arrivals stay as they are; revenue is convex along the line, so that the better end is optimal.
    With it the problem is max over c of R*(c, lambda(c)), solved by branch and bound. On a stretch of the line no rate
    exceeds what it is at the lowest prompt and the lowest output price there, lambda'; revenue at lambda' is convex
    along the stretch and rises with every rate; so nothing there earns more than R*(c, lambda') at one of its ends.
    Stretches are halved until no bound exceeds the best revenue found by more than ``tolerance``.

    Args:
        model: the model. Its arrival rates are replaced where ``demand`` is given.
        budget: k; by default what the model's own prices come to.
        weights: a and b.
        demand: arrival rates at given prices, such as `elastic_demand`; rates must not rise with a price.
        tolerance: relative gap between what is found and what is possible.
        most_solves: stop after so many; the bound that is reached then is reported.

    Raises:
        InvalidInput: an argument breaks a rule; with ``demand``: a class that never abandons, or a service level that
            more arrivals can make harder to keep, so that revenue need not rise with every rate; a demand that rises.
        InfeasibleModel: the model has no plan.
    """
    line = price_line(model, budget, weights, "optimal_prices")
    if demand is None:
        curve = price_curve(model, budget=budget, weights=weights)
        share = float(curve.kinks[int(curve.revenue.argmax())])
        plan = with_prices(model, line.prices(share)).solve()
        best = float(curve.revenue.max())
        tried = np.column_stack([curve.kinks, curve.revenue])
        return _checked(OptimalPrices(line, share, best, best, plan, tried, demand=None))
    _check_demand(model, demand, tolerance, most_solves)
    return _searched(model, line, demand, float(tolerance), int(most_solves))


def _check_demand(model: FluidModel, demand: object, tolerance: object, most_solves: object) -> None:
    if not callable(demand):
        raise InvalidInput(f"optimal_prices: demand must be a function of two prices; got {demand!r}")
    if not (is_number(tolerance) and 0 < tolerance < 1):  # type: ignore[operator]
        raise InvalidInput(f"optimal_prices: tolerance must be above 0 and below 1; got {tolerance!r}")
    if not (is_number(most_solves) and most_solves >= 10):  # type: ignore[operator]
        raise InvalidInput(f"optimal_prices: most_solves must be a number of at least 10; got {most_solves!r}")
    patient = [each.name for each in model.workload if each.abandonment_rate == 0]
    if patient:
        raise InvalidInput(
            f"optimal_prices: class {patient[0]!r} never abandons, so all of it has to be served and more demand may "
            "earn less; give it an abandonment_rate above 0 (without service levels its size does not matter)"
        )
    safe = all(isinstance(each, SlotTPOT | MeanTPOT | KVMemory) for each in model.scenario.service_levels)
    if not safe or model.scenario.rows:
        raise InvalidInput(
            "optimal_prices: with demand, only bounds on time per token and KV memory may be promised; others can be "
            "harder to keep with more arrivals, and then the search has no bound; leave them and added rows out"
        )


def _searched(model: FluidModel, line: PriceLine, demand: Demand, tolerance: float, most_solves: int) -> OptimalPrices:
    value, most = Revenue(model), _most_admitted(model)
    solves, tried = 0, dict[float, float]()

    def rates(prompt: float, output: float) -> Array:
        found = np.asarray(demand(prompt, output), dtype=float)
        if found.shape != most.shape or np.isnan(found).any() or (found < 0).any():
            raise InvalidInput(
                f"optimal_prices: demand must return {most.size} rates of at least 0; got {found!r} at prices "
                f"{prompt:g} and {output:g}"
            )
        return found

    def earned(share: float, at: Array) -> Earned:
        nonlocal solves
        solves += 1
        # More arrivals than the fleet could prefill change nothing, and may be infinite.
        return value(line.prices(share), np.minimum(at, most))

    def revenue(share: float) -> float:
        if share not in tried:
            prices = line.prices(share)
            tried[share] = earned(share, rates(prices.prompt, prices.output)).objective
        return tried[share]

    def most_between(first: float, last: float) -> float:
        at_most = rates(line.prices(first).prompt, line.prices(last).output)
        for share in (first, last):
            prices = line.prices(share)
            if (rates(prices.prompt, prices.output) > at_most * (1 + SAME) + ROUNDING).any():
                raise InvalidInput(
                    f"optimal_prices: demand rises with a price: it is higher at {ratio(prices)} than where neither "
                    "price is higher; the search needs rates that do not rise"
                )
        return max(earned(share, at_most).bound for share in (first, last))

    best = max(0.0, 1.0, key=revenue)
    stretches = [(-most_between(0.0, 1.0), 0.0, 1.0)]
    while stretches and solves < most_solves:
        if -stretches[0][0] <= tried[best] * (1 + tolerance) + 1e-300:
            break
        _, first, last = heapq.heappop(stretches)
        middle = (first + last) / 2
        best = max(best, middle, key=revenue)
        for ends in ((first, middle), (middle, last)):
            heapq.heappush(stretches, (-most_between(*ends), *ends))
    bound = max(tried[best], -stretches[0][0] if stretches else -np.inf)
    prices = line.prices(best)
    arrivals = rates(prices.prompt, prices.output)
    plan = with_prices(model, prices, rates=np.where(np.isfinite(arrivals), arrivals, most)).solve()
    points = np.array(sorted(tried.items()))
    return _checked(OptimalPrices(line, best, tried[best], bound, plan, points, demand=demand, solves=solves))


def _most_admitted(model: FluidModel) -> Array:
    """Requests/s per GPU of each class that the fleet could prefill if it did nothing else, shape (I,)."""
    fastest = sum(gpu.share * max(mode.prefill_speed for mode in gpu.modes()) for gpu in model.gpu_types)
    return fastest / model.workload.prompt_tokens


def _checked(found: OptimalPrices) -> OptimalPrices:
    """The answer, if a plan solved from scratch earns the same."""
    if abs(found.plan.objective - found.revenue_rate) > 1e-6 * (1e-12 + abs(found.revenue_rate)):
        raise SolverFailure(
            f"optimal_prices: the plan at the best prices earns {found.plan.objective:.9g}, the search found "
            f"{found.revenue_rate:.9g}"
        )
    return found


@dataclass(frozen=True, eq=False)
class OptimalPrices:
    """The best prices of a budget, and how far any others can be better."""

    line: PriceLine
    share: float
    """Share of the budget on the prompt price."""
    revenue_rate: float
    """R* at these prices, money/s per GPU (less penalties, where there are)."""
    bound: float
    """What no prices of the budget exceed, money/s per GPU."""
    plan: Plan
    """The optimal plan there, with the arrivals that these prices bring."""
    tried: Array
    """Shares that were solved and the revenue there, shape (N, 2), by increasing share; without a demand response the
    kinks of the curve."""
    demand: Demand | None
    """How arrivals answer to prices; None where they do not."""
    solves: int = 0
    """Programs that the search solved."""

    @property
    def prices(self) -> TokenPrices:
        """c_p and c_d."""
        return self.line.prices(self.share)

    @property
    def gap(self) -> float:
        """How much more, relative, any other prices of the budget can earn at most."""
        if self.revenue_rate > 0:
            return self.bound / self.revenue_rate - 1.0
        return 0.0 if self.bound <= 0 else float("inf")

    @property
    def statement(self) -> str:
        """The answer and its guarantee, in words."""
        head = f"c_p : c_d = {ratio(self.prices)} earns {number(self.revenue_rate)} money/s per GPU"
        if self.demand is None:
            shares, earned = self.tried.T
            low = int(earned.argmin())
            ends = (
                f"{number(earned[0])} with all on the output price, {number(earned[-1])} with all on the prompt price"
            )
            return (
                f"{head}, the most that this demand pays: revenue is convex in the prices, so an end is best ({ends}; "
                f"least {number(earned[low])} at a share of {number(shares[low])})."
            )
        return f"{head}; no other ratio of this budget earns over {self.gap:.2%} more ({self.solves} solves)."

    def plot(self) -> Figure:
        """Revenue over the share of the budget on the prompt price, where it was solved, and the bound."""
        from fluidopt.studies.prices.figures import plot_optimal_prices

        return plot_optimal_prices(self)

    def __repr__(self) -> str:
        return f"OptimalPrices: {self.statement}"

    def _repr_html_(self) -> str:
        shares, earned = self.tried.T
        return card(
            "Optimal prices",
            figures(
                ("Prompt", self.prices.prompt, "money/token"),
                ("Output", self.prices.output, "money/token"),
                ("Revenue", self.revenue_rate, "money/s per GPU"),
                ("Any prices at most", self.bound, "money/s per GPU"),
            ),
            sketch({"R*": (shares, earned)}, across="share of the budget on the prompt price", up="money/s per GPU"),
            paragraph(self.statement),
        )
