"""What a simulation says: means and percentiles with 95 % confidence intervals, and the comparison with the plan."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidopt.errors import InvalidInput
from fluidopt.policy.bound import Bound, revenue_bound
from fluidopt.policy.rules import Policy
from fluidopt.program import Array
from fluidopt.simulation.fleet import fluid_values
from fluidopt.simulation.statistics import Batches, Estimate
from fluidopt.simulation.system import Trajectory
from fluidopt.tables import shorten, text
from fluidopt.views import card, cautions, figures, html, paragraph, with_units

if TYPE_CHECKING:
    import pandas as pd

NEGLIGIBLE = 1e-5
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, eq=False, kw_only=True)
class SimulationResult:
    """Averages over the measured window of all replications; rates and occupancies are per GPU of the fleet.

    ``values`` holds one array per quantity, first axis the segment of time (replication after replication), second the
    class or role where there is one:
    ``revenue_rate`` (money/s), ``admitted``, ``throughput`` (requests/s), ``prefill``, ``decode``, ``prefill_queue``,
    ``decode_queue`` (requests), ``prefill_wait``, ``decode_wait``, ``time_to_first_token`` (s, means by Little's law,
    over all who arrive at that queue), ``abandonment_share`` (of arrivals), ``role_prefill``, ``role_decode``
    (requests); and, of the requests that are served, the percentiles ``prefill_wait_p50`` (and ``_p90``, ``_p99``),
    ``decode_wait_p50``, ``time_to_first_token_p50`` (s), with up to 1,000 classes. A segment's value of a ratio or a
    percentile is its jackknife pseudo-value.
    """

    policy: Policy
    horizon: float
    """Simulated seconds per replication, warm-up included."""
    warmup: float
    """Seconds at the beginning of each replication that are not measured."""
    warmup_rule: str
    """How the warm-up was chosen."""
    stationary: bool
    """Whether what is left looks as if it does not depend on time; false where the rule cut as much as it may."""
    segment: float
    """Length of the segments that ``values`` is of, s."""
    batch_size: int
    """Consecutive segments that make an independent batch."""
    replications: int
    """Number of independent replications."""
    seed: int
    start: str
    precision: float | None = None
    """Relative half-width of the revenue rate that was asked for, if any."""
    values: dict[str, Array]
    controls: Array
    """Control variates of each segment, (N, C): quantities whose mean is 0."""
    events: int
    """Transitions of the chain over all replications, warm-up included."""
    paths: tuple[Trajectory, ...] = ()
    """The state at equally spaced times, per replication, where it was asked for."""

    @cached_property
    def batches(self) -> Batches:
        """How the estimates are made."""
        # by the rule of three: 3/N is the 95 % bound on the share of what was not seen once in N events
        return Batches(self.controls, self.batch_size, rarest=1.5 / max(self.events, 1))

    @cached_property
    def revenue_rate(self) -> Estimate:
        """Revenue rate, money/s per GPU."""
        return self.batches.estimate(self.values["revenue_rate"])

    @property
    def against_plan(self) -> str:
        """How far the mean revenue is from what no policy beats, in words; empty where nothing can be earned."""
        gap = self.bound.against(self.revenue_rate.mean)
        return f", {gap}" if gap else ""

    @cached_property
    def bound(self) -> Bound:
        """What no policy earns more than in the long run, and the conditions it rests on."""
        return revenue_bound(self.policy)

    def estimate(self, quantity: str, of: str | None = None) -> Estimate:
        """One quantity, of one class or role where it has one (names in the class docstring)."""
        return self.batches.estimate(self.segment_values(quantity, of))

    def segment_values(self, quantity: str, of: str | None = None) -> Array:
        """The segments' values of one quantity, (N,), of one class or role where it has one.

        Raises:
            InvalidInput: there is no such quantity, class or role.
        """
        if quantity not in self.values:
            raise InvalidInput(f"estimate: quantity must be one of {', '.join(self.values)}; got {quantity!r}")
        values = self.values[quantity]
        if values.ndim == 1:
            return values
        labels = self._labels(quantity)
        if of not in labels:
            known = shorten([repr(label) for label in labels])
            raise InvalidInput(f"estimate: {quantity} needs of= one of {known}; got {of!r}")
        return values[:, labels.index(of)]

    def _labels(self, quantity: str) -> list[str]:
        if quantity.startswith("role_"):
            return [role.name for role in self.policy.roles]
        return [each.name for each in self.policy.scenario.classes]

    def to_frame(self) -> pd.DataFrame:
        """The comparison of plan and simulation: a row per quantity and class or role.

        Columns: ``fluid`` (the plan), ``simulated``, ``half_width`` (95 %), ``difference`` (simulated - fluid) and
        ``z`` (difference over standard error; large values are the finite fleet, not noise).
        """
        import pandas as pd

        fluid = fluid_values(self.policy)
        frames = []
        for quantity in fluid:
            mean, error, _ = (np.atleast_1d(each) for each in self.batches.estimates(self.values[quantity]))
            difference = mean - fluid[quantity]
            # A quantity that never varies (all slots always full) has rounding for a standard error.
            measurable = error > NEGLIGIBLE * (1.0 + np.abs(mean))
            columns = {
                "fluid": np.atleast_1d(fluid[quantity]),
                "simulated": mean,
                "half_width": self.batches.quantile * error,
                "difference": difference,
                "z": np.divide(difference, error, out=np.full_like(mean, np.nan), where=measurable),
            }
            frames.append(pd.DataFrame(columns, index=self._index(quantity)))
        return pd.concat(frames)

    def percentiles(self) -> pd.DataFrame:
        """Percentiles of the waits and of the time to first token of those who are served, in s.

        A row per quantity and class; columns ``p50``, ``p90``, ``p99`` with the half-width of each (95 %) beside it.
        Empty where percentiles were not collected (more than 1,000 classes).
        """
        import pandas as pd

        frames = []
        for quantity in ("prefill_wait", "decode_wait", "time_to_first_token"):
            columns = {}
            for name in PERCENTILES:
                if f"{quantity}_{name}" in self.values:
                    mean, error, _ = self.batches.estimates(self.values[f"{quantity}_{name}"])
                    columns[name], columns[f"{name}_half_width"] = mean, self.batches.quantile * error
            if columns:
                frames.append(pd.DataFrame(columns, index=self._index(quantity)))
        return pd.concat(frames) if frames else pd.DataFrame(columns=list(PERCENTILES))

    def _index(self, quantity: str) -> pd.MultiIndex:
        import pandas as pd

        scalar = self.values.get(quantity, np.zeros((0, 0))).ndim == 1
        labels = [""] if scalar else self._labels(quantity)
        return pd.MultiIndex.from_product([[quantity], labels], names=["quantity", "of"])

    def path(self, replication: int = 0) -> pd.DataFrame:
        """The sampled path of one replication: rows by time (s), columns by quantity and class, requests per GPU.

        Raises:
            InvalidInput: no path was asked for (``simulate(path=...)``), or there is no such replication.
        """
        import pandas as pd

        if replication not in range(len(self.paths)):
            raise InvalidInput(
                f"path: replication must be below {len(self.paths)}, the number of paths kept; got {replication!r}. "
                "Ask for paths with simulate(..., path=number of points)."
            )
        seen = self.paths[replication]
        columns = {
            "prefill_queue": seen.prefill_queue,
            "prefill": seen.prefill.sum(axis=1),
            "decode_queue": seen.decode_queue,
            "decode": seen.decode.sum(axis=1),
        }
        frames = {
            name: pd.DataFrame(counts / self.policy.gpus, index=seen.time, columns=self._labels(name))
            for name, counts in columns.items()
        }
        return pd.concat(frames, axis=1, names=["quantity", "of"]).rename_axis(index="time")

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-able data, segment by segment, without the paths; `from_dict` reads it back."""
        return {
            "policy": self.policy.to_dict(),
            **{name: getattr(self, name) for name in _PLAIN},
            "controls": self.controls.tolist(),
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
            controls = np.array(data["controls"], dtype=float).reshape(len(values["revenue_rate"]), -1)
            plain = {name: data[name] for name in _PLAIN}
            return cls(policy=Policy.from_dict(data["policy"]), controls=controls, values=values, **plain)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InvalidInput(f"not a saved simulation result: {error!r}") from None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SimulationResult):
            return NotImplemented
        return (
            all(getattr(self, name) == getattr(other, name) for name in ("policy", *_PLAIN))
            and np.array_equal(self.controls, other.controls)
            and self.values.keys() == other.values.keys()
            and all(np.array_equal(array, other.values[name], equal_nan=True) for name, array in self.values.items())
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def caption(self) -> str:
        """How the numbers were made, and how much to believe them, in words."""
        controls = self.controls.shape[1]
        sentences = (
            f"{self.replications} replications of {self.horizon:g} s from {self.start}, seed {self.seed}; the first "
            f"{self.warmup:.4g} s cut ({self.warmup_rule}); {len(self.batches)} batches of "
            f"{self.batch_size * self.segment:.4g} s"
        )
        sentences += f", {controls} control variates" if controls else ""
        if not self.stationary:
            sentences += (
                ". NOT STATIONARY: the fleet still changes after the warm-up; use a longer horizon, or it never settles"
            )
        if self.precision is not None and self.revenue_rate.half_width > self.precision * abs(self.revenue_rate.mean):
            sentences += f". The precision of {self.precision:g} was NOT REACHED within the horizon"
        return sentences + "."

    def __str__(self) -> str:
        lines = [
            f"Simulation of {self.policy.kind}, {self.policy.gpus} GPUs",
            self.caption,
            f"Revenue rate {self.revenue_rate} per GPU{self.against_plan}",
            "",
            text(self.to_frame(), max_rows=80),
        ]
        percentiles = self.percentiles()
        if len(percentiles):
            shown = percentiles[list(PERCENTILES)]
            lines += ["", "Percentiles of those served, s", text(shown, max_rows=80)]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        percentiles = self.percentiles()
        return card(
            f"Simulation of {self.policy.kind}, {self.policy.gpus} GPUs",
            figures(
                ("Revenue", self.revenue_rate, "money/s per GPU"),
                ("Fluid optimum", self.bound.rate, "money/s per GPU"),
            ),
            paragraph(f"Revenue rate {self.revenue_rate} per GPU{self.against_plan}."),
            html(with_units(self.to_frame()), title="Plan against simulation", max_rows=80),
            html(percentiles, title="Percentiles of those served, s", max_rows=80) if len(percentiles) else "",
            paragraph(self.caption, muted=True) if self.stationary else cautions([self.caption]),
        )


_PLAIN = (
    "horizon",
    "warmup",
    "warmup_rule",
    "stationary",
    "segment",
    "batch_size",
    "replications",
    "seed",
    "start",
    "precision",
    "events",
)


def _with_none(values: Any) -> Any:
    """NaN as None at any depth, since JSON has no NaN."""
    if isinstance(values, list):
        return [_with_none(value) for value in values]
    return None if values != values else values
