"""Means of a law over the states of a chain, and the quantities that are reported of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fluidopt.policy.rules import Policy
from fluidopt.simulation.system import FloatArray, System

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Means:
    """Stationary or transient means of a law over the states, totals of the fleet.

    Attributes:
        prefill_queue, decode_queue: (I,) requests waiting.
        prefill, decode: (R, I) requests in service.
        admitted, throughput: (I,) prefills and decodes completed, 1/s.
        prefill_marginal, decode_marginal: law of the two queues' total lengths.
    """

    prefill_queue: FloatArray
    decode_queue: FloatArray
    prefill: FloatArray
    decode: FloatArray
    admitted: FloatArray
    throughput: FloatArray
    prefill_marginal: FloatArray
    decode_marginal: FloatArray

    def revenue_rate(self, system: System) -> float:
        """Revenue rate, money/s per GPU."""
        return float(self.admitted @ system.prefill_reward + self.throughput @ system.decode_reward) / system.gpus

    def values(self, system: System) -> dict[str, FloatArray]:
        """Every mean of `SimulationResult.values`, under the same name and in the same unit.

        The waits are Little's law over all who arrive at that queue; NaN where nobody does.
        """
        gpus, prefill = system.gpus, self.prefill.sum(axis=0)
        arrival = np.where(system.arrival_rate > 0, system.arrival_rate, np.nan)
        return {
            "revenue_rate": np.array(self.revenue_rate(system)),
            "admitted": self.admitted / gpus,
            "throughput": self.throughput / gpus,
            "prefill": prefill / gpus,
            "decode": self.decode.sum(axis=0) / gpus,
            "prefill_queue": self.prefill_queue / gpus,
            "decode_queue": self.decode_queue / gpus,
            "prefill_wait": self.prefill_queue / arrival,
            "decode_wait": self.decode_queue / np.where(self.admitted > 0, self.admitted, np.nan),
            "time_to_first_token": (self.prefill_queue + prefill) / arrival,
            "abandonment_share": system.abandonment_rate * (self.prefill_queue + self.decode_queue) / arrival,
            "role_prefill": self.prefill.sum(axis=1) / gpus,
            "role_decode": self.decode.sum(axis=1) / gpus,
        }


def class_names(system: System, policy: Policy | None) -> list[str]:
    """The classes by name, by number where the chain was built from arrays."""
    if policy is None:
        return [f"class {i}" for i in range(system.classes)]
    return [each.name for each in policy.scenario.classes]


def role_names(system: System, policy: Policy | None) -> list[str]:
    """The roles by name, by number where the chain was built from arrays."""
    return [f"role {r}" for r in range(system.roles)] if policy is None else [role.name for role in policy.roles]


def values_frame(values: dict[str, FloatArray], system: System, policy: Policy | None, *, column: str) -> pd.DataFrame:
    """A row per quantity and class or role; the index is that of `SimulationResult.to_frame`, so the two join."""
    import pandas as pd

    classes, roles = class_names(system, policy), role_names(system, policy)
    rows = {
        (quantity, label): float(value)
        for quantity, array in values.items()
        for label, value in zip(
            [""] if array.ndim == 0 else roles if quantity.startswith("role_") else classes,
            np.atleast_1d(array),
            strict=True,
        )
    }
    index = pd.MultiIndex.from_tuples(list(rows), names=["quantity", "of"])
    return pd.DataFrame({column: list(rows.values())}, index=index)
