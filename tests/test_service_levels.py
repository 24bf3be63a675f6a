"""Service levels: each against its formula written a second time in cvxpy, its frontier, its prices and its refusals."""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize_scalar
from strategies import random_models
from test_formulation import evaluate, given_numbers, members

import fluidopt as fo
from fluidopt.reference import reference_model
from fluidopt.solvers import solve_program

REFERENCE = reference_model()
WORKLOAD, GPU, PRICES = REFERENCE.workload, REFERENCE.scenario.gpu, REFERENCE.scenario.prices
SHORT, LONG = WORKLOAD.names


def build(levels, classes=WORKLOAD, gpu=GPU, *, prices=PRICES, charging="bundled"):
    """A model with service levels; the warning that some random curves earn is not the point."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fo.ContentionWarning)
        return fo.FluidModel(classes, gpu, prices=prices, charging=charging, service_levels=levels)


def with_levels(model, levels):
    return build(
        levels, model.workload, model.scenario.gpu, prices=model.scenario.prices, charging=model.scenario.charging
    )


# ---- every level, written a second time ---------------------------------------------------------------------------


class Pair:
    """[L26] eqs. (40) and (42) in the paper's symbols, in cvxpy; ``point`` holds x, y_m, y_s, q_p, q_d as variables."""

    def __init__(self, model):
        (gpu,), load, prices = model.gpu_types, model.workload, model.scenario.prices
        line = gpu.curve.alpha + gpu.curve.beta * gpu.chunk_size
        self.solo = gpu.curve.solo
        self.tau = max(self.solo, line) if gpu.curve.physical else line
        self.B, self.C = gpu.batch_size, gpu.chunk_size
        self.lam, self.theta, self.P, self.D = (
            load.arrival_rate,
            load.abandonment_rate,
            load.prompt_tokens,
            load.output_tokens,
        )
        self.w = prices.prompt * self.P + prices.output * self.D
        self.mu_p, self.mu_m, self.mu_s = self.C / (self.P * self.tau), 1 / (self.D * self.tau), 1 / (self.D * self.solo)
        self.x, self.y_m, self.y_s, self.q_p, self.q_d = (cp.Variable(len(load), nonneg=True) for _ in range(5))
        done = cp.multiply(self.mu_m, self.y_m) + cp.multiply(self.mu_s, self.y_s)
        S = cp.sum(self.x)
        self.rows = [
            S <= 1,
            cp.sum(self.y_m) <= (self.B - 1) * S,
            cp.sum(self.y_s) <= self.B * (1 - S),
            cp.multiply(self.mu_p, self.x) + cp.multiply(self.theta, self.q_p) == self.lam,
            done + cp.multiply(self.theta, self.q_d) == cp.multiply(self.mu_p, self.x),
        ]
        self.revenue = (
            self.w @ done
            if model.scenario.charging == "bundled"
            else prices.prompt * self.C / self.tau * S
            + prices.output * (cp.sum(self.y_m) / self.tau + cp.sum(self.y_s) / self.solo)
        )

    def best(self, promises=(), cost=0, *, decode_queue=True):
        """The optimum with more rows and a cost; None where there is no plan."""
        rows = [*self.rows, *promises]
        if not decode_queue:
            rows.append(cp.multiply(self.theta > 0, self.q_d) == 0)
        problem = cp.Problem(cp.Maximize(self.revenue - cost), rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
        return problem.value if problem.status in {"optimal", "optimal_inaccurate"} else None


class Seen:
    """The numbers of a plan for the mixed/solo pair, from its allocation and the inputs alone."""

    def __init__(self, plan):
        table, pair = plan.allocation, Pair(plan.model)
        self.__dict__.update({name: getattr(pair, name) for name in ("B", "C", "tau", "solo", "lam", "theta", "P", "D")})
        self.x, self.y_m, self.y_s = (table[name].to_numpy() for name in ("prefill", "decode[mixed]", "decode[solo]"))
        self.q_p, self.q_d = (table[name].fillna(0).to_numpy() for name in ("prefill_queue", "decode_queue"))
        self.done = table["throughput"].to_numpy()


def spread(values):
    return values.max() - values.min()


def kv_use(v, prompt_cv, output_cv):
    """KV-cache tokens in mixed and in solo modes, per class."""
    held, filling = v.P + v.D * (1 + output_cv**2) / 2, v.P * (1 + prompt_cv**2) / 2
    if isinstance(v, Pair):
        return cp.multiply(held, v.y_m) + cp.multiply(filling, v.x), cp.multiply(held, v.y_s)
    return held * v.y_m + filling * v.x, held * v.y_s


@dataclass(frozen=True)
class Promise:
    """One kind of level: how it is made, its rows in cvxpy, and what a plan makes of it, to be at most the bound."""

    make: Callable[..., Any]
    rows: Callable[[Pair, float, Any], list[tuple[Any, Any]]]
    """For a bound and the places of the classes: pairs ``left <= right``."""
    metric: Callable[[Seen, Any], Any]
    decode_queue: bool
    """Whether one may be left."""
    grid: tuple[float, float]
    """Loose and tight on the reference instance."""
    right: Callable[[fo.Plan, float], Any] = lambda plan, bound: 1.0
    """d(right side of its rows less left side)/d(bound), one per row of the level."""
    sign: int = 1
    """-1 where the level is a floor."""
    by_class: bool = True
    concave: bool = True
    """Whether theory promises that the frontier is concave in the bound."""


def per_class(kind, **given):
    def make(bound, **more):
        return kind(at_most=bound, **given, **more)

    return make


def whole(kind):
    def make(bound, classes=None, **more):
        assert classes is None
        return kind(at_most=bound, **more)

    return make


def served(v, wait):
    return -np.expm1(-v.theta * wait) / v.theta


def kv(bound, penalty=None, classes=None):
    assert classes is None
    return fo.KVMemory(tokens=bound, prompt_cv=0.7, output_cv=1.3, penalty=penalty)


def kv_rows(v, bound, _):
    mixed, solo = kv_use(v, 0.7, 1.3)
    S = cp.sum(v.x)
    waiting = (v.P * (v.theta > 0)) @ v.q_d
    return [
        (cp.sum(mixed), bound * S),
        (cp.sum(solo), bound * (1 - S)),
        (cp.sum(mixed) + cp.sum(solo) + waiting, bound),
    ]


def kv_metric(v, _):
    mixed, solo = kv_use(v, 0.7, 1.3)
    S = v.x.sum()
    fleet = mixed.sum() + solo.sum() + v.P @ v.q_d
    return np.array([mixed.sum() / S if S > 1e-7 else 0.0, solo.sum() / (1 - S) if S < 1 else 0.0, fleet])


def slot_tpot(v, S):
    """[L26] eq. (47)."""
    return (v.tau * (v.B - 1) * S + v.B * v.solo * (1 - S)) / ((v.B - 1) * S + v.B * (1 - S))


def lam(plan, _):
    return plan.model.workload.arrival_rate


PROMISES = {
    "prefill_fairness": Promise(
        per_class(fo.PrefillFairness),
        lambda v, bound, at: [(cp.max(v.x[at]) - cp.min(v.x[at]), bound)],
        lambda v, at: spread(v.x[at]),
        decode_queue=False,
        grid=(0.25, 0.0),
        by_class=False,
    ),
    "decode_fairness": Promise(
        per_class(fo.DecodeFairness),
        lambda v, bound, at: [(cp.max(v.y_s[at]) - cp.min(v.y_s[at]), bound)],
        lambda v, at: spread(v.y_s[at]),
        decode_queue=False,
        grid=(6.0, 0.0),
        by_class=False,
    ),
    "slot_tpot": Promise(
        whole(fo.SlotTPOT),
        lambda v, bound, _: [
            (
                v.tau * (v.B - 1) * cp.sum(v.x) + v.solo * v.B * (1 - cp.sum(v.x)),
                bound * ((v.B - 1) * cp.sum(v.x) + v.B * (1 - cp.sum(v.x))),
            )
        ],
        lambda v, _: slot_tpot(v, v.x.sum()),
        decode_queue=True,
        grid=(0.0255, 0.0219),
        right=lambda plan, _: plan.modes["decode_slots"].sum(),
        by_class=False,
    ),
    "mean_wait": Promise(
        per_class(fo.MeanWait),
        lambda v, bound, at: [(v.q_p[at], bound * v.lam[at])],
        lambda v, at: v.q_p[at] / v.lam[at],
        decode_queue=False,
        grid=(0.7, 0.0),
        right=lam,
    ),
    "mean_wait of served": Promise(
        per_class(fo.MeanWait, of="served"),
        lambda v, bound, at: [(v.q_p[at], (v.lam * served(v, bound))[at])],
        lambda v, at: (-np.log1p(-v.theta * v.q_p / v.lam) / v.theta)[at],
        decode_queue=False,
        grid=(0.7, 0.0),
        right=lambda plan, bound: lam(plan, 0) * np.exp(-plan.model.workload.abandonment_rate * bound),
    ),
    "mean_ttft": Promise(
        per_class(fo.MeanTTFT),
        lambda v, bound, at: [(v.q_p[at] + v.x[at], bound * v.lam[at])],
        lambda v, at: ((v.q_p + v.x) / v.lam)[at],
        decode_queue=False,
        grid=(0.75, 0.3),
        right=lam,
    ),
    "mean_ttft of served": Promise(
        per_class(fo.MeanTTFT, of="served"),
        lambda v, bound, at: [(v.q_p[at], (v.lam * served(v, bound - v.P * v.tau / v.C))[at])],
        lambda v, at: (-np.log1p(-v.theta * v.q_p / v.lam) / v.theta + v.P * v.tau / v.C)[at],
        decode_queue=False,
        grid=(0.75, 0.4),
        right=lambda plan, bound: (
            lam(plan, 0)
            * np.exp(
                -plan.model.workload.abandonment_rate
                * (bound - plan.model.workload.prompt_tokens * GPU.curve.mixed(256) / 256)
            )
        ),
    ),
    "mean_tpot": Promise(
        per_class(fo.MeanTPOT),
        lambda v, bound, at: [
            (
                (v.y_m + v.y_s + cp.multiply(v.theta > 0, v.q_d))[at],
                bound * (v.y_m / v.tau + v.y_s / v.solo)[at],
            )
        ],
        lambda v, at: np.divide(v.y_m + v.y_s + v.q_d, v.y_m / v.tau + v.y_s / v.solo + 1e-12)[at],
        decode_queue=True,
        grid=(0.0255, 0.0221),
        right=lambda plan, _: np.nansum(plan.decode / plan.modes["iteration_time"].to_numpy(), axis=1),
        concave=False,
    ),
    "abandonment_share": Promise(
        per_class(fo.AbandonmentShare),
        lambda v, bound, at: [(cp.multiply(v.theta, v.q_p + v.q_d)[at], bound * v.lam[at])],
        lambda v, at: (v.theta * (v.q_p + v.q_d) / v.lam)[at],
        decode_queue=True,
        grid=(0.07, 0.0),
        right=lam,
    ),
    "completion_floor": Promise(
        lambda bound, **more: fo.CompletionFloor(share=bound, **more),
        lambda v, bound, at: [
            (bound * v.lam[at], (cp.multiply(v.mu_m, v.y_m) + cp.multiply(v.mu_s, v.y_s))[at]),
        ],
        lambda v, at: -(v.done / v.lam)[at],
        decode_queue=True,
        grid=(0.93, 1.0),
        right=lambda plan, bound: -lam(plan, bound),
        sign=-1,
    ),
    "completion_floor as a rate": Promise(
        lambda bound, **more: fo.CompletionFloor(rate=bound, **more),
        lambda v, bound, at: [
            (bound * np.ones(len(v.lam))[at], (cp.multiply(v.mu_m, v.y_m) + cp.multiply(v.mu_s, v.y_s))[at])
        ],
        lambda v, at: -v.done[at],
        decode_queue=True,
        grid=(0.4, 0.51),
        right=lambda plan, bound: -np.ones(len(plan.model.workload)),
        sign=-1,
    ),
    "kv_memory": Promise(
        kv,
        kv_rows,
        kv_metric,
        decode_queue=True,
        grid=(34_000.0, 100.0),
        right=lambda plan, _: np.array([*plan.mode_share, 1.0]),
        by_class=False,
        concave=False,
    ),
}
each_promise = pytest.mark.parametrize("name", PROMISES)
ALL = slice(None)


def optimum(model, solver="highs"):
    """The maximum of what the model maximises, without the time that an explanation takes; None where infeasible."""
    try:
        return solve_program(model.program(), solver).certificate.objective
    except fo.InfeasibleModel:
        return None


@each_promise
@pytest.mark.parametrize("charging", ["bundled", "separate"])
@pytest.mark.parametrize("whom", ["all", "one"])
def test_hard_and_soft_levels_equal_their_formula_in_cvxpy(name, charging, whom):
    """Random instances, bounds between loose and infeasible, penalties from idle to prohibitive."""
    promise, rng = PROMISES[name], np.random.default_rng(sum(map(ord, name + charging + whom)))
    takes_classes = name not in {"slot_tpot", "kv_memory"}
    if whom == "one" and not takes_classes:
        pytest.skip("a level on the fleet, not on classes")
    needs_patience = {"mean_wait", "mean_wait of served", "mean_ttft", "mean_ttft of served", "mean_tpot"}
    patient = whom == "one" or name not in needs_patience
    feasible, costly = 0, 0
    for model in random_models(int(rng.integers(2**30)), 5, charging=charging, patient=patient):
        size = len(model.workload)
        if patient and size < 2:
            continue
        places = [size - 1] if whom == "one" and promise.by_class else list(range(size))
        if whom == "one" and not promise.by_class:
            places = places[1:]
        classes = [model.workload.names[at] for at in places] if whom == "one" else None
        free = with_levels(model, [fo.MeanWait(at_most=1e9, classes=[model.workload.names[-1]])])
        plan = (model if promise.decode_queue else free).solve()
        worst = float(np.max(promise.metric(Seen(plan), places)))
        bound = promise.sign * worst * (1 + promise.sign * rng.uniform(-0.5, 0.05))
        if name == "mean_ttft of served":
            bound = max(bound, 1.0001 * float((model.workload.prompt_tokens[places]).max() / plan_speed(model)))
        bound = min(max(bound, 0.0), 1.0) if name in {"completion_floor", "abandonment_share"} else max(bound, 1e-9)
        extra = {"classes": classes} if classes else {}
        hard = optimum(with_levels(model, [promise.make(bound, **extra)]))
        pair = Pair(model)
        rows = promise.rows(pair, bound, places)
        direct = pair.best([left <= right for left, right in rows], decode_queue=promise.decode_queue)
        assert (hard is None) == (direct is None), (name, bound)
        if hard is not None:
            feasible += 1
            assert hard == pytest.approx(direct, rel=1e-6, abs=1e-6)
        if name == "slot_tpot":
            continue
        penalty = (1 + plan.revenue_rate) / (abs(worst) + 1e-3) * 10 ** rng.uniform(-1.5, 1)
        soft = optimum(with_levels(model, [promise.make(bound, penalty=penalty, **extra)]))
        excess = penalty * sum(cp.sum(cp.pos(left - right)) for left, right in rows)
        assert soft == pytest.approx(
            pair.best(cost=excess, decode_queue=promise.decode_queue), rel=1e-6, abs=1e-6 * (1 + penalty * bound)
        )
        costly += soft < plan.revenue_rate * (1 - 1e-6)
    assert feasible + costly >= 1


def plan_speed(model):
    """Prompt tokens/s of a mixed GPU."""
    return model.modes[0][1].prefill_speed
