"""The structured solver: the fluid LP as a problem in the plane, solved exactly with one sort.

A completed request is worth ``w_i = c_p P_i + c_d D_i`` ([L26] eq. (21)) and takes ``P_i`` prompt and ``D_i`` output
tokens of capacity. Value and use of a class mix z (requests/s) depend only on its token rates ``p = sum_i P_i z_i`` and
``d = sum_i D_i z_i``, so the LP of `fluidopt.formulation` (whose two-mode case is [L26] eqs. (40) and (42)) becomes

    max c_p p + c_d d   over (p, d) in Z and in Pi

- Pi, what the fleet can do, is all ``d <= F(p)``. F is the upper boundary of the sum over GPU types of share_g times
  the convex hull of the modes' (C_k/tau_k, b_k/tau_k): the edges of the types' hulls merged by slope (Minkowski sum).
- Z, what the classes can ask for, is the zonogon of all (p, d) with ``lower <= z <= upper``. Its lower boundary serves
  classes by increasing D/P, its upper boundary by decreasing D/P; both are cumulative sums along one sort.

Both are convex polygons, so an optimum lies (i) at the top of Z, (ii) at the right end of Pi, (iii) where the upper or
lower boundary of Z meets F, or (iv) at the vertex of F that prices favour, inside Z. Each is found by bisection over
break points and one interpolation on a stretch where everything is linear; nothing is iterated to a tolerance.

The variants change one of the polygons:

- Decode queue, bundled charging. Prefills beyond those decoded (a >= z) earn nothing, they only let the fleet run modes
  with more decode slots: F(p) becomes the maximum of F over [p, all there is to prefill]. Where F never increases
  (kappa >= (B-1)/B for the pair) nothing changes, which is Proposition 3.2 of [L26].
- Decode queue, separate charging. Prefills are paid whether decoded or not: p counts them all, and since any part of
  their decodes may be dropped, the lower boundary of Z falls to what classes that never abandon need.
- No decode queue: a = z, and the two charging schemes are the same problem.
- Bounds on admissions move the corners of Z; a cap on the prefills in service cuts Pi.

With pi and v the prices of capacity per prompt and per output token (the normal of Pi at the optimum), the margin of a
class is ``r_i = w_i - pi P_i - v D_i``. As r_i/P_i is affine in D_i/P_i, the price rule is one threshold in D/P.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidopt.errors import InfeasibleModel, InvalidInput
from fluidopt.solvers.plane import Fill, Frontier, bracket, root, upper_hull

Array = NDArray[np.float64]

_PER_CLASS = ("arrival_rate", "abandonment_rate", "prompt_tokens", "output_tokens")
_BOUNDS = ("admitted_lower", "admitted_upper")
_PER_MODE = ("chunk", "decode_slots", "iteration_time")
_POSITIVE = {"prompt_tokens", "output_tokens", "iteration_time", "share"}
_MAY_BE_INFINITE = {"iteration_time", "admitted_upper", "prefill_cap"}
# Patient classes may fill the fleet to the last token: loads above capacity by rounding are not infeasible.
ROUNDING = 1e-12


def _checked(name: str, value: ArrayLike, shape: tuple[int, ...]) -> Array:
    array = np.asarray(value, dtype=float)
    if array.ndim != 1 or array.size == 0 or array.shape != shape:
        raise InvalidInput(f"CapacityProblem.{name} must have shape {shape or '(n,)'}. Got {array.shape} instead.")
    least, most = array.min(), array.max()  # both NaN where an entry is
    positive, finite = name in _POSITIVE, name not in _MAY_BE_INFINITE
    if not (least > 0 if positive else least >= 0) or (finite and most == np.inf):
        wrong = ~(array > 0 if positive else array >= 0) | (finite & np.isinf(array))
        at = int(np.flatnonzero(wrong)[0])
        rule = ("above 0" if positive else "at least 0") + (" and finite" if finite else "")
        raise InvalidInput(f"CapacityProblem.{name} must be {rule}. Got {array[at]} at {at} instead.")
    return array


@dataclass(frozen=True, eq=False, kw_only=True)
class CapacityProblem:
    """The fluid LP of a fleet in numbers; per GPU, or as fleet totals throughout.

    Raises:
        InvalidInput: an array of the wrong shape, or a value outside its range.
    """

    arrival_rate: Array
    """lambda, shape (I,), requests/s."""
    abandonment_rate: Array
    """theta, shape (I,), 1/s; 0 where a class never abandons and must be served in full."""
    prompt_tokens: Array
    """P, shape (I,), tokens."""
    output_tokens: Array
    """D, shape (I,), decode iterations."""
    prompt_price: float
    """c_p, money/token."""
    output_price: float
    """c_d, money/token."""
    charging: Literal["bundled", "separate"]
    chunk: Array
    """C, shape (K,), prefill tokens per iteration of each mode; 0 where it only decodes."""
    decode_slots: Array
    """b, shape (K,), decodes per GPU in the mode."""
    iteration_time: Array
    """tau, shape (K,), s; inf in an idle mode."""
    gpu_type: NDArray[np.int64]
    """Number of the GPU type of each mode, shape (K,)."""
    share: Array
    """Fraction of the fleet that is of each type, shape (G,)."""
    admitted_lower: Array | None = None
    """Least prefills completed per class, shape (I,), requests/s (default 0)."""
    admitted_upper: Array | None = None
    """Most prefills completed per class, shape (I,), requests/s (default: what arrives)."""
    prefill_cap: float = float("inf")
    """Most prefills in service per GPU: a cap on sum x, as the slot-average TPOT bound [L26] eq. (48) asks for."""
    decode_queue_allowed: bool = True
    """False imposes q_d = 0, as service levels on fairness and waiting do."""

    def __post_init__(self) -> None:
        # Broadcast views, so that defaults cost no memory.
        for name, default in (("admitted_lower", 0.0), ("admitted_upper", np.inf)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, np.broadcast_to(default, np.shape(self.arrival_rate)))
        for names in (_PER_CLASS + _BOUNDS, _PER_MODE, ("share",)):
            shape = np.shape(getattr(self, names[0]))
            for name in names:
                object.__setattr__(self, name, _checked(name, getattr(self, name), shape))
        for name in ("prompt_price", "output_price", "prefill_cap"):
            object.__setattr__(self, name, float(_checked(name, [getattr(self, name)], (1,))[0]))
        if self.prompt_price + self.output_price == 0:
            raise InvalidInput("CapacityProblem: prompt_price and output_price are both 0; make one of them positive")
        if self.charging not in {"bundled", "separate"}:
            raise InvalidInput(
                f"CapacityProblem.charging must be 'bundled' or 'separate'. Got {self.charging!r} instead."
            )
        stuck = np.flatnonzero((self.chunk + self.decode_slots > 0) & np.isinf(self.iteration_time))
        if stuck.size:
            raise InvalidInput(f"CapacityProblem.iteration_time must be finite in mode {stuck[0]}, which is not idle")
        kinds = np.asarray(self.gpu_type)
        if kinds.shape != self.chunk.shape or not np.array_equal(np.unique(kinds), np.arange(self.share.size)):
            raise InvalidInput("CapacityProblem.gpu_type must number the types 0, 1, ... and give every type a mode")
        object.__setattr__(self, "gpu_type", kinds.astype(np.int64))
        crossed = np.flatnonzero(self.lower > self.upper)
        if crossed.size:
            i = crossed[0]
            raise InvalidInput(
                f"CapacityProblem: class {i} must be admitted at {self.lower[i]:.6g}/s or more and at "
                f"{self.upper[i]:.6g}/s or less; admitted_lower must not exceed admitted_upper or arrival_rate, and a "
                "class that never abandons is admitted in full"
            )

    @property
    def patient(self) -> NDArray[np.bool_]:
        """Shape (I,): classes that never abandon."""
        never: NDArray[np.bool_] = self.abandonment_rate == 0
        return never

    @cached_property
    def lower(self) -> Array:
        """Least requests served, shape (I,), 1/s."""
        at_least = np.asarray(self.admitted_lower)
        forced: Array = np.where(self.patient, np.maximum(self.arrival_rate, at_least), at_least)
        return forced

    @cached_property
    def upper(self) -> Array:
        """Most requests served, shape (I,), 1/s."""
        at_most: Array = np.minimum(self.arrival_rate, np.asarray(self.admitted_upper))
        return at_most

    @property
    def speed(self) -> Array:
        """1/tau, shape (K,), iterations/s."""
        return 1.0 / self.iteration_time


@dataclass(frozen=True, eq=False, kw_only=True)
class StructuredSolution:
    """An optimal primal-dual pair of the LP in `fluidopt.formulation`, every class with the same share of each mode.

    Duals are d(maximum)/d(right side of the row). ``fleet``, ``prefill_slots``, ``decode_slots``, ``prefill_balance``
    and ``decode_balance`` are those of the rows of the same name. They follow from (pi, v): xi and nu are the prices of
    the tokens that a slot makes, sigma the most that a mode earns at these prices, eta a prefilled request's value less
    v D, varphi the margin; eta and varphi of a class that may abandon are at least 0, as it may be left waiting.
    """

    mode_share: Array
    """phi, shape (K,)."""
    prefill: Array
    """x, shape (I, K), requests in prefill; 0 in modes without prefill."""
    decode: Array
    """y, shape (I, K), requests in decode; decode-only modes fill first, then the faster ones."""
    prefill_queue: Array
    """q_p, shape (I,), requests; NaN where a class never abandons, as the model leaves it open."""
    decode_queue: Array
    """q_d, shape (I,), requests; NaN where a class never abandons."""
    fleet: Array
    """sigma, shape (G,), money/s per GPU of the type."""
    prefill_slots: Array
    """xi, shape (K,), money/s per prefill in service; 0 where the mode has no such row."""
    decode_slots: Array
    """nu, shape (K,), >= 0, money/s per decode slot; 0 where the mode has no such row."""
    prefill_balance: Array
    """varphi (phi_i of [L26]), shape (I,), money per arriving request; >= 0 unless the class never abandons."""
    decode_balance: Array
    """eta, shape (I,), money per prefilled request. With q_d = 0 imposed it may be negative: that row's own dual is
    then ``-theta_i eta_i``."""
    admitted_lower_dual: Array
    """Dual of ``a_i >= admitted_lower_i``, shape (I,), <= 0, money per request."""
    admitted_upper_dual: Array
    """Dual of ``a_i <= admitted_upper_i``, shape (I,), >= 0, money per request; 0 where arrivals bind first."""
    prefill_cap_dual: float
    """Dual of ``sum x <= prefill_cap``, >= 0, money/s per prefill in service."""
    prices: tuple[float, float]
    """(pi, v): price of capacity, money per prompt token (of any sign) and per output token (>= 0). For the pair of
    [L26]: beta = v/tau, delta = kappa v/tau, alpha = pi C/tau - (kappa B - (B-1)) v/tau."""
    margin: Array
    """w_i - pi P_i - v D_i, shape (I,), money per request: > 0 served in full, < 0 to the lower bound, 0 in part."""
    objective: float
    """Maximum, money/s."""


def applies(problem: CapacityProblem) -> str | None:
    """Say why the reduction is not exact for this problem, in words; None where it is."""
    prefills = problem.chunk > 0
    missing = np.setdiff1d(np.arange(problem.share.size), problem.gpu_type[~prefills])
    if missing.size:
        return f"GPU type {missing[0]} has no mode without prefill, so its GPUs would have to prefill all the time"
    if problem.prefill_cap < np.inf and prefills.sum() != 1:
        return (
            f"a cap on prefills in service is a cap on prompt tokens only with one prefill mode, not {prefills.sum()}"
        )
    if problem.decode_queue_allowed and np.any(problem.lower[~problem.patient] > 0):
        return (
            "with a lower bound on admissions and a decode queue, prefills would be made only to be thrown away; "
            "impose decode_queue_allowed=False"
        )
    return None


def solve_capacity(problem: CapacityProblem) -> StructuredSolution:
    """Solve the fluid LP exactly, in O(I log I + K log K) time and O(I K) memory.

    Where prices make many class mixes equally good (case (iv): every margin is 0), classes are served from both ends of
    the order of D/P. Classes of equal D/P always get the same share of what lies between their bounds, so at most two
    values of D/P are served in part. Under separate charging prefills go by decreasing D/P, and all classes that
    abandon have the same share of their prefills decoded.

    Raises:
        InfeasibleModel: the classes that must be served do not fit.
        InvalidInput: the reduction does not apply (see `applies`).
    """
    reason = applies(problem)
    if reason is not None:
        raise InvalidInput(f"the structured solver does not apply: {reason}; use another solver")
    prompt, output, lower, upper = problem.prompt_tokens, problem.output_tokens, problem.lower, problem.upper
    bundled_queue = problem.decode_queue_allowed and problem.charging == "bundled"
    separate_queue = problem.decode_queue_allowed and problem.charging == "separate"

    # From here on p and d count from what must be served: t = p - p0.
    ratio, width = output / prompt, upper - lower
    low = Fill.by_ratio(ratio, prompt * width)
    high = low.reversed()
    everything = low.end
    p0, d0 = float(prompt @ lower), float(output @ lower)
    fleet = frontier(problem)
    rest = fleet.minus(p0, d0)
    # How far prefilling more than is decoded can push F up.
    top = min(rest.peak, everything, rest.end)
    usable = rest.flattened(top) if bundled_queue else rest
    floor = Fill(np.zeros(1), np.full(1, everything)) if separate_queue else low
    tolerance = ROUNDING * (d0 + fleet.largest)
    start = _first_feasible(usable, floor, everything, tolerance)
    if start is None or rest.end < -ROUNDING * p0:
        raise _infeasible(problem, fleet, p0, d0)
    optimum = _optimum(problem.prompt_price, problem.output_price, usable, floor, low, high, start, tolerance)

    share = np.minimum(low.share(optimum.low, ratio) + high.share(optimum.high, ratio), 1.0)
    admitted = completed = np.minimum(lower + width * share, upper)
    t, pi, v = optimum.low + optimum.high, optimum.prefill_price, optimum.decode_price
    if separate_queue:
        offered = np.where(problem.patient, 0.0, output * admitted).sum()
        served = min(1.0, max(0.0, rest.at(t) / offered)) if offered > 0 else 1.0
        completed = np.where(problem.patient | (served > 1.0 - ROUNDING), admitted, served * admitted)
        if t >= everything and rest.slope.size:
            pi = min(pi, v * rest.slope_before(t))
    elif bundled_queue and v > 0 and t < top:
        admitted = np.minimum(completed + (top - t) / (everything - t) * (upper - completed), upper)
        if top >= everything:
            pi = min(pi, v * rest.slope_before(top))
        t = top
    # At a vertex of F, exactly there: rounding must not leave slivers of modes that are not used.
    vertex = int(np.argmin(np.abs(rest.prefill - t)))
    p = float(fleet.prefill[vertex]) if abs(rest.prefill[vertex] - t) <= 4 * np.spacing(t) else p0 + t
    return _assemble(problem, fleet, optimum, (pi, v), p, admitted, completed)


def _assemble(
    problem: CapacityProblem,
    fleet: Frontier,
    optimum: Optimum,
    prices: tuple[float, float],
    p: float,
    admitted: Array,
    completed: Array,
) -> StructuredSolution:
    """Spread the optimum over classes and modes, and its two prices over the rows of the LP."""
    prompt, output, patient = problem.prompt_tokens, problem.output_tokens, problem.patient
    prompt_speed, output_speed = problem.chunk * problem.speed, problem.decode_slots * problem.speed
    prefills = problem.chunk > 0
    pi, v = prices

    # Along the edge of F that the cap cuts, Pi itself charges at most its slope times v; the cap charges the rest.
    inner = min(pi, v * fleet.slope_before(fleet.cap)) if fleet.cap < fleet.prefill[-1] else pi
    sigma = np.full(problem.share.size, -np.inf)
    np.maximum.at(sigma, problem.gpu_type, inner * prompt_speed + v * output_speed)
    margin = prompt * (optimum.base + optimum.tilt * (output / prompt - optimum.pivot))
    # eta is w - v D; under separate charging (c_d - v) D, as the prompt is paid when it runs: a cheaper prefill slot.
    separate = problem.charging == "separate"
    eta = optimum.tilt * output if separate else margin + optimum.prefill_price * prompt
    # pi, less c_p where that is paid; as the margin's terms have it, which is exact where the two are nearly equal.
    slot_price = optimum.tilt * optimum.pivot - optimum.base if separate else optimum.prefill_price
    # What a prefill is worth for the decode slots that come with it, where every class is prefilled in full for that.
    bonus = (optimum.prefill_price - pi) * prompt
    if problem.decode_queue_allowed:
        eta = np.where(patient, eta, np.maximum(eta, 0.0))
    gain = np.where(patient, margin, np.maximum(margin, 0.0)) + bonus
    bounded = ~patient & (problem.upper < problem.arrival_rate)

    mode_share = fleet.mode_share(p)
    slots = mode_share * problem.decode_slots
    decodes = in_router_order(slots, problem.speed, prefills, float(output @ completed))
    patience = np.where(patient, np.nan, problem.abandonment_rate)
    return StructuredSolution(
        mode_share=mode_share,
        prefill=split(np.where(prefills, mode_share, 0.0), prompt * admitted),
        decode=split(decodes, output * completed),
        prefill_queue=(problem.arrival_rate - admitted) / patience,
        decode_queue=(admitted - completed) / patience,
        fleet=sigma,
        prefill_slots=np.where(prefills, (slot_price + (inner - optimum.prefill_price)) * prompt_speed, 0.0),
        decode_slots=np.where(problem.decode_slots > 0, v * problem.speed, 0.0),
        prefill_balance=np.where(bounded, 0.0, gain),
        decode_balance=eta,
        admitted_lower_dual=np.where(patient | problem.decode_queue_allowed, 0.0, np.minimum(margin, 0.0)),
        admitted_upper_dual=np.where(bounded, gain, 0.0),
        prefill_cap_dual=(pi - inner) * float(prompt_speed.max()),
        prices=prices,
        margin=margin + bonus,
        objective=float(
            problem.prompt_price * (prompt @ (admitted if separate else completed))
            + problem.output_price * (output @ completed)
        ),
    )


def split(totals: Array, work: Array) -> Array:
    """Each mode's total shared over classes in proportion to ``work``; shape (I, K)."""
    amount = work.sum()
    return np.outer(work / amount if amount > 0 else np.zeros_like(work), totals)


def in_router_order(slots: Array, speed: Array, prefills: NDArray[np.bool_], rate: float) -> Array:
    """Decodes per mode, shape (K,), at ``rate`` output tokens/s: decode-only modes fill first, then the faster ones.

    Where slots are left over the model does not say which stay empty; this is the router's order.

    Args:
        slots: decode slots per mode, requests/GPU.
        speed: tokens/s of each.
        prefills: whether the mode runs a prefill.
        rate: output tokens/s.
    """
    order = np.lexsort((-speed, prefills))
    capacity = (slots * speed)[order]
    before = np.concatenate([[0.0], np.cumsum(capacity)[:-1]])
    filled = np.clip(rate - before, 0.0, capacity)
    used = np.zeros_like(slots)
    used[order] = np.divide(filled, speed[order], out=np.zeros_like(filled), where=speed[order] > 0)
    return used


def _infeasible(problem: CapacityProblem, fleet: Frontier, p0: float, d0: float) -> InfeasibleModel:
    """The set of classes that must be served, what they ask for and what there is."""
    prompt, output = problem.prompt_tokens * problem.lower, problem.output_tokens * problem.lower
    p_max, d_max = fleet.end, fleet.largest
    weight = prompt / max(p_max, 1e-300) + output / max(d_max, 1e-300)
    heaviest = np.argsort(-weight, kind="stable")[: np.count_nonzero(weight)]
    parts = "; ".join(f"class {i} {prompt[i]:.4g} + {output[i]:.4g}" for i in heaviest[:6])
    parts += f"; and {heaviest.size - 6} more" if heaviest.size > 6 else ""
    beside = f", {max(fleet.at(p0), 0.0):.6g} beside that prefill" if p0 <= p_max else ""
    return InfeasibleModel(
        f"classes that must be served (they never abandon, or have a lower bound) do not fit together: they need "
        f"{p0:.6g} of at most {p_max:.6g} prompt tokens/s and {d0:.6g} of at most {d_max:.6g} output tokens/s per GPU"
        f"{beside} (prompt + output tokens/s, classes numbered from 0: {parts}). Add GPUs (lower the arrival rates per "
        "GPU), give a class an abandonment rate, or lower its bound."
    )


# ---- the optimum in the plane ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Optimum:
    """An optimal class mix, the prices of capacity there, and what a class gains at these prices."""

    low: float
    """Prompt tokens/s served from the low end of D/P."""
    high: float
    """Prompt tokens/s served from the high end of D/P."""
    prefill_price: float
    """pi, money per prompt token."""
    decode_price: float
    """v, money per output token."""
    base: float = 0.0
    """The margin of a class, w - pi P - v D, is P (base + tilt (D/P - pivot)): in this form it is exactly 0 at the
    class that is served in part, however large its load."""
    tilt: float = 0.0
    pivot: float = 0.0


def _optimum(
    c_p: float, c_d: float, usable: Frontier, floor: Fill, low: Fill, high: Fill, start: float, tolerance: float
) -> Optimum:
    """Maximise ``c_p t + c_d min(high(t), F(t))`` over the t >= ``start`` at which ``floor(t) <= F(t)``.

    ``floor`` is the lower boundary of Z (``low``), or flat where prefills need not be decoded.
    """
    serve_low = floor is low
    end = min(low.end, max(usable.end, 0.0))
    if low.end <= end and high.decode[-1] <= usable.at(low.end) + tolerance:
        return Optimum(low.end, 0.0, 0.0, 0.0, base=c_p, tilt=c_d)

    def above(t: float) -> float:
        return usable.at(t) - high.at(t)

    def room(t: float) -> float:
        return usable.at(t) - floor.at(t)

    def crossing(gap: Callable[[float], float], fill: Fill, left: float, right: float) -> tuple[float, Optimum]:
        """Where a boundary of Z meets an edge of F: the class there has no margin, and pi/v is the edge's slope."""
        t, left = root(gap, left, right, fill.prefill, usable.prefill)
        s, pivot = usable.slope_after(left), fill.slope_after(left)
        v = (c_p + c_d * pivot) / (s + pivot)
        return t, Optimum(0.0, 0.0, s * v, v, tilt=(c_d * s - c_p) / (s + pivot), pivot=pivot)

    # Left of the vertex that prices favour more prefill always pays, wherever the binding boundary lies.
    favoured = float(usable.prefill[np.searchsorted(c_d * usable.slope, c_p, side="right")])
    vertex = min(max(favoured, start), end)
    if favoured < start or above(vertex) > 0:
        if above(end) >= 0 or vertex >= end:
            pivot = high.slope_after(end)
            return Optimum(0.0, end, c_p + c_d * pivot, 0.0, tilt=c_d, pivot=pivot)
        t, at = crossing(above, high, vertex, end)
        return replace(at, high=t)
    if room(vertex) < 0 and vertex > start:
        t, at = crossing(room, floor, start, vertex)
        return replace(at, low=t) if serve_low else replace(at, high=t)
    if not serve_low:
        return Optimum(0.0, vertex, c_p, c_d)
    # The unknown is the part from the high end, where a small error in prompt tokens would be a large one in output.
    decode = usable.at(vertex)
    part, _ = root(
        lambda t: decode - high.at(t) - low.at(vertex - t), 0.0, vertex, high.prefill, vertex - low.prefill[::-1]
    )
    return Optimum(vertex - part, part, c_p, c_d)


def _first_feasible(usable: Frontier, floor: Fill, end: float, tolerance: float) -> float | None:
    """0 where what must be served fits; else the t at which most room is left, if any is (F may rise first)."""
    end = min(end, usable.end)

    def falling(t: float) -> bool:
        return usable.slope_after(t) + floor.slope_after(t) > 0

    best = 0.0
    if usable.at(best) - floor.at(best) < 0 and end > 0 and not falling(best):
        _, best = bracket(falling, best, end, floor.prefill, usable.prefill)
    return best if usable.at(best) - floor.at(best) >= -tolerance else None


def frontier(problem: CapacityProblem) -> Frontier:
    """The upper boundary of Pi, with the cap on prefills in service."""
    prompt, output = problem.chunk * problem.speed, problem.decode_slots * problem.speed
    first = np.zeros(problem.chunk.size)
    height = 0.0
    edges: list[tuple[float, float, float, tuple[int, int, float]]] = []
    for kind, share in enumerate(problem.share.tolist()):
        hull = upper_hull(prompt, output, np.flatnonzero(problem.gpu_type == kind))
        first[hull[0]] = share
        height += share * output[hull[0]]
        slope = -np.inf
        for out, into in pairwise(hull):
            across, up = prompt[into] - prompt[out], output[into] - output[out]
            # Never below the edge before it, even by rounding: a type's own edges must stay in order below.
            slope = max(slope, -up / across)
            edges.append((slope, share * across, share * up, (out, into, share)))
    edges.sort(key=lambda edge: edge[0])
    prefill = np.concatenate([[0.0], np.cumsum([edge[1] for edge in edges])])
    decode = np.concatenate([[height], height + np.cumsum([edge[2] for edge in edges])])
    slopes, moves = np.array([edge[0] for edge in edges]), tuple(edge[3] for edge in edges)
    cap = problem.prefill_cap * float(prompt.max()) if problem.prefill_cap < np.inf else np.inf
    return Frontier(prefill, decode, slopes, first, moves, cap)
