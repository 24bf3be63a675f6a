"""Fluid trajectories: what a fleet under a policy does as the number of GPUs grows, second by second."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import numpy.typing as npt
from scipy.integrate import BDF
from scipy.optimize import brentq

from fluidopt.errors import InvalidInput, SolverFailure
from fluidopt.fluid.dynamics import PASSED, BoolArray, Dynamics, FluidState, Rate, Regime
from fluidopt.inputs import is_number, is_whole
from fluidopt.policy.rules import Policy
from fluidopt.simulation.fleet import fleet_system, fluid_start
from fluidopt.simulation.system import FloatArray, Start, System
from fluidopt.tables import shorten, text
from fluidopt.views import bullets, card, figures, html, sketch

if TYPE_CHECKING:
    import pandas as pd

Path = Callable[[float], FloatArray]
ArrivalRate = Callable[[float], npt.ArrayLike] | tuple[npt.ArrayLike, npt.ArrayLike]
# s: regimes briefer than this are passed over in the account of them.
BRIEF = 1e-3
# s: first step of a regime.
FIRST_STEP = 1e-9
# Points and weights of Gauss's rule on [0, 1], by which flows are summed over a step.
POINTS = 0.5 + np.sqrt(0.15) * np.array([-1.0, 0.0, 1.0])
WEIGHTS = np.array([5.0, 8.0, 5.0]) / 18.0
FIELDS = ("prefill_queue", "decode_queue", "prefill", "decode")


@dataclass(frozen=True, eq=False, kw_only=True)
class FluidTrajectory:
    """The fluid of a fleet at m times, over I classes, R roles and S sides; all amounts are per GPU of the fleet.

    - ``time``: (m,) s.
    - ``prefill_queue``: (m, I) requests waiting for a prefill.
    - ``decode_queue``: (m, S, I) requests waiting for a decode, by side: a group of roles with a buffer of its own, of
      which most policies have one.
    - ``prefill``, ``decode``: (m, R, I) requests in service in each role.
    - ``revenue_rate``: (m,) money/s given the state; by completions under bundled charging, by tokens under separate.
    - ``arrived``, ``abandoned``, ``completed``: (m, I) requests since time 0.
    - ``imbalance``: largest amount by which arrivals less abandonments and completions miss the change of the state;
      flows are summed apart from the integration, so this measures its error.
    - ``regimes``: the regimes visited, each the time, s, at which it began and what held, in words; those of less than
      a millisecond are left out.
    - ``classes``, ``roles``: names.
    - ``revenue_bound``: the plan's revenue rate, money/s; None without a plan.
    """

    time: FloatArray
    prefill_queue: FloatArray
    decode_queue: FloatArray
    prefill: FloatArray
    decode: FloatArray
    revenue_rate: FloatArray
    arrived: FloatArray
    abandoned: FloatArray
    completed: FloatArray
    imbalance: float
    regimes: tuple[tuple[float, str], ...]
    classes: tuple[str, ...]
    roles: tuple[str, ...]
    revenue_bound: float | None

    def at(self, point: int) -> FluidState:
        """The state at ``time[point]``."""
        return FluidState(**{name: getattr(self, name)[point].copy() for name in FIELDS})

    @property
    def final(self) -> FluidState:
        """The state at the end; a trajectory that starts from it goes on where this one stopped."""
        return self.at(-1)

    @cached_property
    def mean_revenue_rate(self) -> float:
        """Revenue rate averaged over time by the trapezoidal rule on the points, money/s per GPU."""
        return float(np.trapezoid(self.revenue_rate, self.time) / (self.time[-1] - self.time[0]))

    def to_frame(self) -> pd.DataFrame:
        """A row per time, quantity and class or role: columns ``time``, ``quantity``, ``of``, ``value``.

        Quantities are named as in `SimulationResult.values`: ``revenue_rate``, ``prefill``, ``decode``,
        ``prefill_queue``, ``decode_queue`` by class, ``role_prefill`` and ``role_decode`` by role.
        """
        import pandas as pd

        columns: dict[tuple[str, str], FloatArray] = {("revenue_rate", ""): self.revenue_rate}
        by_class = {
            "prefill": self.prefill.sum(axis=1),
            "decode": self.decode.sum(axis=1),
            "prefill_queue": self.prefill_queue,
            "decode_queue": self.decode_queue.sum(axis=1),
        }
        by_role = {"role_prefill": self.prefill.sum(axis=2), "role_decode": self.decode.sum(axis=2)}
        for labels, quantities in ((self.classes, by_class), (self.roles, by_role)):
            for name, values in quantities.items():
                columns |= {(name, label): values[:, at] for at, label in enumerate(labels)}
        table = pd.DataFrame(columns, index=pd.Index(self.time, name="time"))
        table.columns = pd.MultiIndex.from_tuples(list(columns), names=["quantity", "of"])
        tidy = table.melt(ignore_index=False, value_name="value").reset_index()
        return tidy[["time", "quantity", "of", "value"]]

    def _summary(self) -> pd.DataFrame:
        """The final state by class."""
        import pandas as pd

        final = self.final
        return pd.DataFrame(
            {
                "prefill": final.prefill.sum(axis=0),
                "decode": final.decode.sum(axis=0),
                "prefill_queue": final.prefill_queue,
                "decode_queue": final.decode_queue.sum(axis=0),
            },
            index=pd.Index(self.classes, name="class"),
        )

    def _title(self) -> str:
        bound = "" if self.revenue_bound is None else f" (plan: {self.revenue_bound:.6g})"
        return f"Fluid after {self.time[-1]:g} s: revenue rate {self.revenue_rate[-1]:.6g} money/s per GPU{bound}"

    def _visited(self) -> list[str]:
        return [f"from {time:.4g} s: {words}" for time, words in self.regimes]

    def __str__(self) -> str:
        regimes = shorten(self._visited(), most=8, between="\n  ")
        return f"{self._title()}\n\n{text(self._summary())}\n\nRegimes\n  {regimes}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        key = [("Revenue at the end", self.revenue_rate[-1], "money/s per GPU")]
        if self.revenue_bound is not None:
            key.append(("Plan", self.revenue_bound, "money/s per GPU"))
        summary = self._summary()
        return card(
            f"Fluid trajectory over {self.time[-1]:g} s",
            figures(*key),
            sketch({"revenue rate": (self.time, self.revenue_rate)}, across="time, s", up="money/s per GPU"),
            html(summary, title="At the end", units=dict.fromkeys(summary.columns, "requests/GPU")),
            bullets("Regimes", self._visited(), most=8),
        )


def fluid_trajectory(
    policy_or_system: Policy | System,
    *,
    horizon: float,
    start: Literal["empty", "fluid"] | FluidState | Start | Mapping[str, npt.ArrayLike] = "empty",
    arrival_rate: ArrivalRate | None = None,
    points: int = 201,
    rtol: float = 1e-7,
    atol: float = 1e-9,
    holds: Literal["slide", "cycle"] = "slide",
    most_regimes: int = 20_000,
) -> FluidTrajectory:
    """Integrate the fluid limit of the n-GPU chain under a policy.

    As n grows, the chain per GPU follows an ordinary differential equation with a discontinuous right-hand side; see
    `fluidopt.fluid.dynamics` for it and for the two closures it needs. Each regime is integrated by backward
    differentiation formulas (a queue that forms is stiff) up to where it ends, which is located; sliding along a
    boundary is solved for, not approximated by switching. Where the theory says so the fluid converges to the plan:
    theta > 0 and kappa >= (B-1)/B ([L26], sections 4.1 and 5.1).

    Cost: tens of milliseconds per regime, of which there are a handful; with 100 classes tenths of a second.

    Args:
        policy_or_system: a policy, or the arrays of a fleet.
        horizon: s.
        start: ``"empty"``; ``"fluid"``, the plan's equilibrium in whole requests of the fleet (policies only); a
            `FluidState`, or a mapping with any of its fields, in requests per GPU (``decode_queue`` by side or over
            all); or a `Start`, in requests of the fleet. What can start at once does so at time 0.
        arrival_rate: in place of the policy's rates: a function of time (s) that returns (I,) requests/s per GPU,
            piecewise smooth; or a table ``(times, rates)`` of (k,) increasing times, the first of them 0, and (k, I)
            rates, each valid until the next time and the last one for ever.
        points: equally spaced times reported, 0 and ``horizon`` included.
        rtol, atol: relative and absolute (requests per GPU) error per step.
        holds: what classes do whose gate has a threshold (`Gate.hold`). A start moves the decode backlog only once the
            prefill ends, so the fluid cycles around the threshold, many times a second. ``"cycle"`` follows every turn,
            ``"slide"`` stays on the threshold, admitting at the rate that keeps the backlog there: far faster, near but
            not equal to the average of the cycle.
        most_regimes: stop with an error after this many regimes.

    Raises:
        InvalidInput: an argument is out of range, the start does not fit the slots, or a rule of the policy has no
            fluid here.
        SolverFailure: the integration stopped, or its result violates a capacity or the mass balance, at a time that
            the message names.
    """
    policy, system = _as_system(policy_or_system)
    if not (is_number(horizon) and horizon > 0):
        raise InvalidInput(f"fluid_trajectory: horizon must be a finite number of seconds above 0; got {horizon!r}")
    if not is_whole(points, least=2):
        raise InvalidInput(f"fluid_trajectory: points must be a whole number of at least 2; got {points!r}")
    for name, value, least, most in (("rtol", rtol, 1e-12, 1e-3), ("atol", atol, 1e-14, 1e-4)):
        if not (is_number(value) and least <= value <= most):
            raise InvalidInput(f"fluid_trajectory: {name} must be between {least:g} and {most:g}; got {value!r}")
    if not is_whole(most_regimes, least=1):
        raise InvalidInput(f"fluid_trajectory: most_regimes must be a whole number above 0; got {most_regimes!r}")
    if holds not in ("slide", "cycle"):
        raise InvalidInput(f"fluid_trajectory: holds must be 'slide' or 'cycle'; got {holds!r}")
    dynamics = Dynamics(system, slide=holds == "slide")
    classes = tuple(f"class {i}" for i in range(system.classes))
    roles = tuple(f"role {r}" for r in range(system.roles))
    if policy is not None:
        classes = tuple(each.name for each in policy.scenario.classes)
        roles = tuple(role.name for role in policy.roles)
    run = _Run(
        dynamics=dynamics,
        arrivals=_arrivals(arrival_rate, system),
        times=np.linspace(0.0, float(horizon), int(points)),
        rtol=float(rtol),
        atol=float(atol),
        most_regimes=int(most_regimes),
        words=lambda regime: in_words(regime, dynamics, classes, roles),
    )
    states, totals, regimes = run.integrate(dynamics.pack(_start(start, policy, dynamics)))
    imbalance = _checked(dynamics, run.times, states, totals, max(1e-6, 20 * rtol))
    sampled = [dynamics.unpack(z) for z in np.maximum(states, 0.0)]
    return FluidTrajectory(
        time=run.times,
        **{name: np.stack([getattr(state, name) for state in sampled]) for name in FIELDS},
        revenue_rate=np.array([dynamics.reward_rate(state) for state in sampled]),
        arrived=totals[:, 0],
        abandoned=totals[:, 1],
        completed=totals[:, 2],
        imbalance=imbalance,
        regimes=tuple(regimes),
        classes=classes,
        roles=roles,
        revenue_bound=None if policy is None else policy.revenue_bound,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Run:
    """The integration of one trajectory, regime by regime."""

    dynamics: Dynamics
    arrivals: Callable[[float], tuple[Rate, float]]
    times: FloatArray
    rtol: float
    atol: float
    most_regimes: int
    words: Callable[[Regime], str]

    def integrate(self, z: FloatArray) -> tuple[FloatArray, FloatArray, list[tuple[float, str]]]:
        """States (m, size), requests (m, 3, I) arrived, abandoned and completed so far, and the regimes."""
        dynamics, end = self.dynamics, float(self.times[-1])
        states = np.empty((self.times.size, z.size))
        totals = np.zeros((self.times.size, 3, dynamics.system.classes))
        total = np.zeros(totals.shape[1:])
        time, at, regime = 0.0, 0, None
        regimes: list[tuple[float, str]] = []
        for _ in range(self.most_regimes):
            z = dynamics.settle(z, regime)
            regime = dynamics.regime(z, regime)
            words = self.words(regime)
            if regimes and time - regimes[-1][0] < BRIEF:
                regimes.pop()
            if not regimes or regimes[-1][1] != words:
                regimes.append((time, words))
            if at == 0:
                states[0], at = z, 1
            rate, until = self.arrivals(time)
            until = min(until, end)
            for start, stop, path in self._steps(time, z, regime, rate, until):
                while at < self.times.size and self.times[at] <= stop:
                    here = float(self.times[at])
                    states[at] = path(here)
                    totals[at] = total + self._flown(start, here, path, regime, rate)
                    at += 1
                total += self._flown(start, stop, path, regime, rate)
                time, z = stop, path(stop)
            if time >= end:
                return states, totals, regimes
        raise SolverFailure(
            f"fluid_trajectory: {self.most_regimes} regimes ended before {time:.6g} s of {end:g} s, the last one "
            f"{self.words(regime) if regime else ''!r}; raise most_regimes or shorten the horizon"
        )

    def _steps(
        self, time: float, z: FloatArray, regime: Regime, rate: Rate, until: float
    ) -> Iterator[tuple[float, float, Path]]:
        """The integrator's steps (start, stop, path) up to ``until`` or to where the regime ends."""
        dynamics = self.dynamics
        # A queue that has just formed changes its mix of classes within no time: begin with a small step.
        first = min(FIRST_STEP, until - time)
        solver = BDF(
            lambda t, y: dynamics.velocity(y, regime, rate(t)),
            time,
            z,
            until,
            rtol=self.rtol,
            atol=self.atol,
            first_step=first,
        )
        while solver.status == "running":
            message = solver.step()
            if message is not None:
                raise SolverFailure(f"fluid_trajectory: the integration stopped at {solver.t:.6g} s: {message}")
            path = cast(Path, solver.dense_output())
            start, stop = float(solver.t_old), float(solver.t)
            if np.min(dynamics.margins(solver.y, regime)) < -PASSED:
                yield start, self._end(path, start, stop, regime), path
                return
            yield start, stop, path

    def _end(self, path: Path, start: float, stop: float, regime: Regime) -> float:
        """When in a step the regime ends, s."""

        def left(t: float) -> float:
            return float(np.min(self.dynamics.margins(path(t), regime))) + PASSED

        return start if left(start) <= 0 else float(brentq(left, start, stop, xtol=1e-12))

    def _flown(self, start: float, stop: float, path: Path, regime: Regime, rate: Rate) -> FloatArray:
        """Requests arrived, abandoned and completed (3, I) between two times of a step, by Gauss's rule."""
        total = np.zeros((3, self.dynamics.system.classes))
        for point, weight in zip(POINTS, WEIGHTS, strict=True):
            t = start + point * (stop - start)
            f = self.dynamics.flows(path(t), regime, rate(t))
            gone = f.gave_up + f.decode_gave_up.sum(axis=0)
            total += weight * (stop - start) * np.stack([f.arrived, gone, f.decoded.sum(axis=0)])
        return total


# ---- what goes in ---------------------------------------------------------------------------------------------------


def _as_system(policy_or_system: Policy | System) -> tuple[Policy | None, System]:
    if isinstance(policy_or_system, Policy):
        return policy_or_system, fleet_system(policy_or_system)
    if isinstance(policy_or_system, System):
        return None, policy_or_system
    raise InvalidInput(f"fluid_trajectory: takes a Policy or a System; got {type(policy_or_system).__name__}")


def _arrivals(arrival_rate: ArrivalRate | None, system: System) -> Callable[[float], tuple[Rate, float]]:
    """From a time to the rate from then on and how long it holds, s; rates per GPU."""
    classes = system.classes
    if arrival_rate is None:
        fixed = system.arrival_rate / system.gpus
        return lambda _: ((lambda _: fixed), np.inf)
    if callable(arrival_rate):

        def rate(t: float) -> FloatArray:
            value = np.asarray(arrival_rate(t), dtype=float)
            if value.shape != (classes,) or not np.all(np.isfinite(value) & (value >= 0)):
                raise InvalidInput(
                    f"fluid_trajectory: arrival_rate must return {classes} finite rates >= 0, one per class; at "
                    f"{t:.6g} s it returned {value!r}"
                )
            return value

        return lambda _: (rate, np.inf)
    try:
        times, rates = (np.asarray(part, dtype=float) for part in arrival_rate)
    except (TypeError, ValueError):
        raise InvalidInput(
            "fluid_trajectory: arrival_rate must be a function of time or a pair (times, rates); got "
            f"{type(arrival_rate).__name__}"
        ) from None
    if times.ndim != 1 or times.size == 0 or times[0] != 0 or not np.all(np.diff(times) > 0):
        raise InvalidInput(
            f"fluid_trajectory: the times of arrival_rate must be increasing and begin at 0; got {times!r}"
        )
    if rates.shape != (times.size, classes) or not np.all(np.isfinite(rates) & (rates >= 0)):
        raise InvalidInput(
            f"fluid_trajectory: the rates of arrival_rate must be finite, >= 0 and of shape (times, classes) = "
            f"{(times.size, classes)}; got shape {rates.shape}"
        )

    def piece(t: float) -> tuple[Rate, float]:
        at = int(np.searchsorted(times, t, side="right")) - 1
        row = rates[at]
        return (lambda _: row), float(times[at + 1]) if at + 1 < times.size else np.inf

    return piece


def _start(
    start: str | FluidState | Start | Mapping[str, npt.ArrayLike], policy: Policy | None, dynamics: Dynamics
) -> FluidState:
    """The state at time 0, per GPU, checked."""
    system = dynamics.system
    shapes = dict(zip(FIELDS, dynamics.shapes, strict=True))
    if isinstance(start, str):
        if start not in ("empty", "fluid"):
            raise InvalidInput(f"fluid_trajectory: start must be 'empty', 'fluid' or a state; got {start!r}")
        if start == "fluid" and policy is None:
            raise InvalidInput("fluid_trajectory: start='fluid' is the plan's equilibrium and needs a Policy")
        start = fluid_start(policy, system) if policy is not None and start == "fluid" else Start.empty(system)
    if isinstance(start, Mapping):
        unknown = [name for name in start if name not in FIELDS]
        if unknown:
            raise InvalidInput(f"fluid_trajectory: start has no field {unknown[0]!r}; there are {', '.join(FIELDS)}")
        given = dict(start)
    elif isinstance(start, FluidState | Start):
        scale = system.gpus if isinstance(start, Start) else 1
        given = {name: getattr(start, name) / scale for name in FIELDS}
    else:
        raise InvalidInput(f"fluid_trajectory: start must be 'empty', 'fluid' or a state; got {start!r}")
    arrays = {name: np.zeros(shape) for name, shape in shapes.items()}
    for name, value in given.items():
        array = np.asarray(value, dtype=float)
        if name == "decode_queue" and array.shape == (system.classes,):
            array = system.side_share * array
        if array.shape != shapes[name] or not np.all(np.isfinite(array) & (array >= 0)):
            raise InvalidInput(
                f"fluid_trajectory: start.{name} must be finite, >= 0 and of shape {shapes[name]}; got {value!r}"
            )
        arrays[name] = array.copy()
    state = FluidState(**arrays)
    running, room = state.prefill.sum(axis=1), dynamics.decode_room(state)
    most = np.where(dynamics.able, dynamics.gpus, 0.0)
    for name, excess, what in (("prefill", running - most, "GPUs that may prefill"), ("decode", -room, "decode slots")):
        if np.any(excess > 1e-9):
            r = int(np.argmax(excess))
            raise InvalidInput(
                f"fluid_trajectory: start.{name} must fit the {what}; role {r} has {excess[r]:.6g} requests per GPU of "
                "the fleet too many"
            )
    return state


# ---- what comes out -------------------------------------------------------------------------------------------------


def in_words(regime: Regime, dynamics: Dynamics, classes: tuple[str, ...], roles: tuple[str, ...]) -> str:
    """A regime as a phrase."""

    def names(chosen: BoolArray, of: tuple[str, ...]) -> str:
        return "all" if np.all(chosen) else shorten([of[k] for k in np.flatnonzero(chosen)], most=4)

    system = dynamics.system
    busy = regime.prefill_full | (dynamics.shared & regime.slots_full)
    parts = ["prefill slots busy" if np.all(busy[dynamics.able]) else "prefill slots free"]
    if np.any(regime.waits):
        parts.append(f"waiting for prefill: {names(regime.waits, classes)}")
    if np.any(regime.held):
        parts.append(f"held back: {names(regime.held, classes)}")
    served = regime.tied & regime.waits
    if np.any(served) and not system.gate_fcfs:
        parts.append(f"{'tied' if served.sum() > 1 else 'preferred'} at the gate: {names(served, classes)}")
    decodes = dynamics.gpus * system.role_decode_slots > 0
    full = regime.slots_full & decodes
    if np.any(full):
        parts.append(f"decode slots busy: {'all' if np.array_equal(full, decodes) else names(full, roles)}")
    if np.any(regime.decode_waits):
        waiting: BoolArray = np.any(regime.decode_waits, axis=0)
        parts.append(f"waiting for decode: {names(waiting, classes)}")
    return "; ".join(parts)


def _checked(dynamics: Dynamics, times: FloatArray, states: FloatArray, totals: FloatArray, tolerance: float) -> float:
    """The largest imbalance, requests per GPU, once no state violates a capacity or the balance of requests.

    The tolerance is relative to the requests handled so far.
    """
    classes = dynamics.system.classes
    first = None
    worst = 0.0
    for t, z, total in zip(times, states, totals, strict=True):
        state = dynamics.unpack(z)
        running = state.prefill.sum(axis=1)
        present = sum(getattr(state, each.name).reshape(-1, classes).sum(axis=0) for each in fields(FluidState))
        first = present if first is None else first
        imbalance = float(np.max(np.abs(total[0] - total[1] - total[2] - (present - first))))
        worst = max(worst, imbalance)
        scale = 1.0 + float(np.max(total, initial=0.0)) + float(np.max(first))
        for what, error in (
            ("a negative number of requests", -float(z.min())),
            ("more prefills than GPUs", float(np.max(running - dynamics.gpus))),
            ("more decodes than slots", -float(dynamics.decode_room(state).min())),
            ("arrivals that do not balance with abandonments, completions and what is there", imbalance),
        ):
            if not error <= tolerance * scale:
                raise SolverFailure(
                    f"fluid_trajectory: at {t:.6g} s the solution has {what} ({error:.3g} requests per GPU); "
                    "tighten rtol and atol"
                )
    return worst
