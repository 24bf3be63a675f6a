"""What independent replications say: means with 95 % confidence intervals, and the comparison with the plan."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from fluidopt.errors import InvalidInput, SolverFailure
from fluidopt.policy.rules import Policy
from fluidopt.program import Array
from fluidopt.simulation.fleet import fleet_system, fluid_start
from fluidopt.simulation.run import EventLimitExceeded, WaitingLimitExceeded, simulate
from fluidopt.simulation.system import Replication, Start, System
from fluidopt.tables import html, shorten, text

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.95
NEGLIGIBLE = 1e-5


@dataclass(frozen=True)
class Estimate:
    """A mean over independent replications with its 95 % confidence interval (Student t)."""

    mean: float
    half_width: float
    standard_error: float
    replications: int

    @classmethod
    def of(cls, values: Array) -> Estimate:
        """Estimate the mean of independent ``values``, shape (replications,)."""
        count = len(values)
        error = float(np.std(values, ddof=1) / np.sqrt(count))
        quantile = float(stats.t.ppf(0.5 + LEVEL / 2, count - 1))
        return cls(float(np.mean(values)), quantile * error, error, count)

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95 % confidence interval."""
        return self.mean - self.half_width, self.mean + self.half_width

    def __str__(self) -> str:
        return f"{self.mean:.6g} ± {self.half_width:.2g} (95 %, {self.replications} replications)"


@dataclass(frozen=True, eq=False)
class SimulationResult:
    """Averages over the measured window of each replication; rates and occupancies are per GPU of the fleet.

    ``values`` holds one array per quantity, first axis the replication, second the class or role where there is one:
    ``revenue_rate`` (money/s), ``admitted``, ``throughput`` (requests/s), ``prefill``, ``decode``, ``prefill_queue``,
    ``decode_queue`` (requests), ``prefill_wait``, ``decode_wait``, ``time_to_first_token`` (s, by Little's law, over
    all who arrive at that queue), ``abandonment_share`` (of arrivals), ``role_prefill``, ``role_decode`` (requests).
    """

    policy: Policy
    horizon: float
    warmup: float
    seed: int
    start: str
    values: dict[str, Array]
    events: int
    """Transitions of the chain over all replications."""

    @property
    def replications(self) -> int:
        """Number of independent replications."""
        return len(self.values["revenue_rate"])

    @cached_property
    def revenue_rate(self) -> Estimate:
        """Revenue rate, money/s per GPU."""
        return Estimate.of(self.values["revenue_rate"])

    @property
    def against_plan(self) -> str:
        """How far the mean revenue is from the plan's, in words; empty where the plan earns nothing."""
        plan = self.policy.revenue_bound
        if plan <= 0:
            return ""
        gap = 1 - self.revenue_rate.mean / plan
        what = "the plan's" if self.policy.scenario.objective is not None else "the fluid optimum"
        return f", {abs(gap):.1%} {'below' if gap >= 0 else 'above'} {what} {plan:.6g}"

    def estimate(self, quantity: str, of: str | None = None) -> Estimate:
        """One quantity, of one class or role where it has one (names in the class docstring)."""
        if quantity not in self.values:
            raise InvalidInput(f"estimate: quantity must be one of {', '.join(self.values)}; got {quantity!r}")
        values = self.values[quantity]
        if values.ndim == 1:
            return Estimate.of(values)
        labels = self._labels(quantity)
        if of not in labels:
            known = shorten([repr(label) for label in labels])
            raise InvalidInput(f"estimate: {quantity} needs of= one of {known}; got {of!r}")
        return Estimate.of(values[:, labels.index(of)])

    def _labels(self, quantity: str) -> list[str]:
        if quantity.startswith("role_"):
            return [role.name for role in self.policy.roles]
        return [each.name for each in self.policy.scenario.classes]

    def _fluid(self) -> dict[str, Array]:
        """What the plan says of each quantity, in the same shapes less the replications; NaN where it is silent."""
        targets, workload = self.policy.targets, self.policy.scenario.workload
        fluid = {
            name: np.array([np.nan if value is None else value for value in getattr(targets, name)], dtype=float)
            for name in ("admitted", "throughput", "prefill", "decode", "prefill_queue", "decode_queue")
        }
        arrival = workload.arrival_rate
        with np.errstate(divide="ignore", invalid="ignore"):
            fluid["prefill_wait"] = np.where(arrival > 0, fluid["prefill_queue"] / arrival, np.nan)
            fluid["decode_wait"] = np.where(fluid["admitted"] > 0, fluid["decode_queue"] / fluid["admitted"], np.nan)
            fluid["time_to_first_token"] = (fluid["prefill_queue"] + fluid["prefill"]) / arrival
            gone = workload.abandonment_rate * np.nan_to_num(fluid["prefill_queue"] + fluid["decode_queue"])
            fluid["abandonment_share"] = np.where(arrival > 0, gone / arrival, np.nan)
        for name in ("role_prefill", "role_decode"):
            of = getattr(targets, name)
            fluid[name] = np.array([of[role.name] for role in self.policy.roles])
        fluid["revenue_rate"] = np.array(self.policy.revenue_bound)
        return fluid

    def to_frame(self) -> pd.DataFrame:
        """The comparison of plan and simulation: a row per quantity and class or role.

        Columns: ``fluid`` (the plan), ``simulated``, ``half_width`` (95 %), ``difference`` (simulated - fluid) and
        ``z`` (difference over standard error; large values are the finite fleet, not noise).
        """
        import pandas as pd

        rows, index = [], []
        for quantity, fluid in self._fluid().items():
            values = self.values[quantity]
            labels = [""] if values.ndim == 1 else self._labels(quantity)
            for label, column, target in zip(
                labels,
                np.atleast_2d(values.T if values.ndim > 1 else values),
                np.atleast_1d(fluid),
                strict=True,
            ):
                estimate = Estimate.of(column)
                difference = estimate.mean - target
                # A quantity that never varies (all slots always full) has rounding for a standard error.
                measurable = estimate.standard_error > NEGLIGIBLE * (1.0 + abs(estimate.mean))
                z = difference / estimate.standard_error if measurable else np.nan
                rows.append((target, estimate.mean, estimate.half_width, difference, z))
                index.append((quantity, label))
        return pd.DataFrame(
            rows,
            columns=["fluid", "simulated", "half_width", "difference", "z"],
            index=pd.MultiIndex.from_tuples(index, names=["quantity", "of"]),
        ).sort_index(level=0, key=lambda level: level.map(_ORDER.index), sort_remaining=False, kind="stable")

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-able data, replication by replication; `from_dict` reads it back."""
        return {
            "policy": self.policy.to_dict(),
            "horizon": self.horizon,
            "warmup": self.warmup,
            "seed": self.seed,
            "start": self.start,
            "events": self.events,
            "values": {name: _with_none(array.tolist()) for name, array in self.values.items()},
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SimulationResult:
        """Read a result back."""
        try:
            values = {str(name): np.array(array, dtype=float) for name, array in data["values"].items()}
            return cls(
                policy=Policy.from_dict(data["policy"]),
                horizon=float(data["horizon"]),
                warmup=float(data["warmup"]),
                seed=int(data["seed"]),
                start=str(data["start"]),
                values=values,
                events=int(data["events"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"not a saved simulation result: {error!r}") from None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SimulationResult):
            return NotImplemented
        return (self.policy, self.horizon, self.warmup, self.seed, self.start) == (
            (other.policy, other.horizon, other.warmup, other.seed, other.start)
        ) and all(np.array_equal(array, other.values[name], equal_nan=True) for name, array in self.values.items())

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return "\n".join(
            [
                f"Simulation of {self.policy.kind}, {self.policy.gpus} GPUs: {self.replications} replications of "
                f"{self.horizon:g} s, {self.warmup:g} s of them warm-up, start {self.start}, seed {self.seed}",
                f"Revenue rate {self.revenue_rate} per GPU{self.against_plan}",
                "",
                text(self.to_frame(), max_rows=80),
            ]
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        note = (
            f"{self.replications} replications of {self.horizon:g} s, {self.warmup:g} s of them warm-up, start "
            f"{self.start}, seed {self.seed}; 95 % confidence"
        )
        return html(
            self.to_frame(),
            title=f"{self.policy.kind}, {self.policy.gpus} GPUs: {self.revenue_rate}",
            note=note,
            max_rows=80,
        )


def _with_none(values: Any) -> Any:
    """NaN as None at any depth, since JSON has no NaN."""
    if isinstance(values, list):
        return [_with_none(value) for value in values]
    return None if values != values else values


_ORDER = [
    "revenue_rate",
    "admitted",
    "throughput",
    "prefill",
    "decode",
    "prefill_queue",
    "decode_queue",
    "prefill_wait",
    "decode_wait",
    "time_to_first_token",
    "abandonment_share",
    "role_prefill",
    "role_decode",
]


def simulate_policy(
    policy: Policy, *, horizon: float, warmup: float | None, replications: int, seed: int | None, start: str
) -> SimulationResult:
    """Run independent replications, in threads, and collect their averages (see `Policy.simulate`)."""
    if not (isinstance(horizon, int | float | np.number) and np.isfinite(horizon) and horizon > 0):
        raise InvalidInput(f"simulate: horizon must be a finite number of seconds above 0; got {horizon!r}")
    warmup = horizon / 10 if warmup is None else warmup
    if not (isinstance(warmup, int | float | np.number) and 0 <= warmup < horizon):
        raise InvalidInput(f"simulate: warmup must be at least 0 and below horizon ({horizon:g} s); got {warmup!r}")
    if isinstance(replications, bool) or not isinstance(replications, int) or replications < 2:
        raise InvalidInput(
            "simulate: replications must be a whole number of at least 2, for a confidence interval; "
            f"got {replications!r}"
        )
    if start not in {"empty", "fluid"}:
        raise InvalidInput(f"simulate: start must be 'empty' or 'fluid'; got {start!r}")
    if seed is None:
        seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise InvalidInput(f"simulate: seed must be a whole number of at least 0; got {seed!r}")
    system = fleet_system(policy)
    origin = fluid_start(policy, system) if start == "fluid" else Start.empty(system)
    streams = np.random.SeedSequence(int(seed)).spawn(replications)

    def replicate(stream: np.random.SeedSequence) -> Replication:
        return simulate(system, origin, horizon=horizon, warmup=warmup, rng=np.random.default_rng(stream))

    try:
        with ThreadPoolExecutor(max_workers=min(replications, os.cpu_count() or 1)) as pool:
            runs = list(_progress(pool.map(replicate, streams), replications))
    except WaitingLimitExceeded as error:
        raise InvalidInput(
            f"simulate: the queues grow without end ({error}); the fleet is too small for classes that never abandon. "
            "Use more GPUs or give them an abandonment rate."
        ) from None
    except EventLimitExceeded as error:
        raise SolverFailure(f"simulate: {error}; use a shorter horizon") from None
    return SimulationResult(
        policy=policy,
        horizon=float(horizon),
        warmup=float(warmup),
        seed=int(seed),
        start=start,
        values=_averages(policy.gpus, system, runs),
        events=sum(run.events for run in runs),
    )


def _progress(runs: Any, total: int) -> Any:
    """A bar on stderr, only where a person watches."""
    from tqdm import tqdm

    return tqdm(runs, total=total, desc="replications", file=sys.stderr, disable=None, leave=False, delay=1.0)


def _averages(gpus: int, system: System, runs: list[Replication]) -> dict[str, Array]:
    """Window averages per GPU, first axis the replication."""

    def stack(name: str) -> Array:
        return np.array([getattr(run, name) / run.window for run in runs], dtype=float)

    prefill, decode = stack("prefill_time"), stack("decode_time")
    prefill_queue, decode_queue = stack("prefill_queue_time"), stack("decode_queue_time")
    admitted = stack("prefill_completions")
    arrivals = stack("arrivals")
    gone = stack("abandoned_prefill") + stack("abandoned_decode")
    # Little's law with the known arrival rate; the decode queue's own arrival rate is only known by counting.
    rate = np.where(system.arrival_rate > 0, system.arrival_rate, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        decode_wait = decode_queue / np.where(admitted > 0, admitted, np.nan)
        share = gone / np.where(arrivals > 0, arrivals, np.nan)
    return {
        "revenue_rate": stack("expected_reward") / gpus,
        "admitted": admitted / gpus,
        "throughput": stack("decode_completions") / gpus,
        "prefill": prefill.sum(axis=1) / gpus,
        "decode": decode.sum(axis=1) / gpus,
        "prefill_queue": prefill_queue / gpus,
        "decode_queue": decode_queue / gpus,
        "prefill_wait": prefill_queue / rate,
        "decode_wait": decode_wait,
        "time_to_first_token": (prefill_queue + prefill.sum(axis=1)) / rate,
        "abandonment_share": share,
        "role_prefill": prefill.sum(axis=2) / gpus,
        "role_decode": decode.sum(axis=2) / gpus,
    }
