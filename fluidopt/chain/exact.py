"""The exact law of a small fleet under a policy, and what it earns: no sampling error, and the truncation reported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from fluidopt.chain.generator import StateSpace, enumerate_chain
from fluidopt.chain.means import Means, values_frame
from fluidopt.chain.moves import ARRIVAL_CUT, DECODE_CUT
from fluidopt.chain.states import GIB, Layout
from fluidopt.chain.stationary import DIRECT_LIMIT, Method, relative_residual, stationary_law
from fluidopt.chain.transient import TransientLaw, transient_law
from fluidopt.errors import InvalidInput
from fluidopt.inputs import is_whole
from fluidopt.policy.bound import Bound, revenue_bound
from fluidopt.policy.rules import Policy
from fluidopt.simulation.fleet import fleet_system
from fluidopt.simulation.system import FloatArray, System
from fluidopt.tables import text
from fluidopt.views import card, figures, html, paragraph, with_units

if TYPE_CHECKING:
    import pandas as pd

FIRST_CAP = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class ChainResult:
    """The chain of a fleet, its stationary law, and the averages under it; rates and occupancies are per GPU.

    Attributes:
        policy: the policy, None if the chain was built from a `System`.
        system: the dynamics.
        states: the reachable states.
        generator: (S, S) CSR, 1/s, rows summing to zero; row and column k are state k of `states`.
        law: (S,) stationary probabilities.
        tolerance: of the lost mass.
    """

    policy: Policy | None
    system: System
    states: StateSpace
    generator: sparse.csr_array
    law: FloatArray
    tolerance: float

    @property
    def exact(self) -> bool:
        """Whether the order of the first-come lines is kept in full; if not, the law is an approximation."""
        return self.states.layout.exact

    @property
    def lost_mass(self) -> float:
        """Stationary probability of the states in which a cap turns somebody away; 0 would be the untruncated fleet.

        By PASTA it is also an upper bound on the share of arrivals that the prefill queue's cap turns away.
        """
        return float(self.law[self.states.flags > 0].sum())

    @property
    def residual(self) -> float:
        """What the balance equations miss: the absolute entries of pi Q, summed, over the flow out of all states."""
        return relative_residual(self.generator, self.law)

    @cached_property
    def means(self) -> Means:
        """Stationary means, totals of the fleet by class and role."""
        return self.states.means(self.law)

    @cached_property
    def revenue_rate(self) -> float:
        """Revenue rate, money/s per GPU."""
        return self.earnings(self.means)

    def earnings(self, means: Means) -> float:
        """Revenue rate per GPU under other means, for instance those of a transient law."""
        return means.revenue_rate(self.system)

    @cached_property
    def values(self) -> dict[str, FloatArray]:
        """Every mean of `SimulationResult.values`, under the same name and in the same unit.

        The waits are Little's law over all who arrive at that queue; NaN where nobody does.
        """
        return self.means.values(self.system)

    def to_frame(self) -> pd.DataFrame:
        """A row per quantity and class or role, column ``exact``; the index is that of `SimulationResult.to_frame`, so
        the two join."""
        return values_frame(self.values, self.system, self.policy, column="exact")

    def transient(self, t: float, start: int | FloatArray | None = None, *, tolerance: float = 1e-12) -> TransientLaw:
        """The law at time ``t`` (s), by uniformisation.

        Args:
            t: time, s.
            start: a state's number, a law over the states, or None: the empty fleet.
            tolerance: bound on the weight of the terms left out of the series.

        Raises:
            InvalidInput: an argument is out of range, or ``t`` needs too many products.
        """
        size = len(self.states)
        if start is None or is_whole(start, least=0):
            number = 0 if start is None else int(start)
            if number >= size:
                raise InvalidInput(f"transient: start must be a state below {size}; got {start!r}")
            law = np.zeros(size)
            law[number] = 1.0
        else:
            law = np.asarray(start, dtype=float)
        return transient_law(self.generator, law, t, tolerance=tolerance)

    def _caption(self) -> str:
        layout = self.states.layout
        kind = "Exact chain" if self.policy is None else f"Exact chain of {self.policy.kind}"
        places = max(line.places for line in layout.lines)
        order = "" if self.exact else f", first {places} of a line in order (approximate)"
        return (
            f"{kind}, {self.system.gpus} GPU(s): {len(self.states):,} states, at most {layout.prefill_queue_cap} and "
            f"{layout.decode_queue_cap} waiting{order}; lost mass {self.lost_mass:.1e}, residual {self.residual:.1e}"
        )

    @cached_property
    def bound(self) -> Bound | None:
        """What no policy earns more than, and the conditions it rests on; None for a chain built from a `System`."""
        return None if self.policy is None else revenue_bound(self.policy)

    @property
    def _headline(self) -> str:
        gap = "" if self.bound is None else self.bound.against(self.revenue_rate)
        return f"Revenue rate {self.revenue_rate:.6g} per GPU" + (f", {gap}" if gap else "")

    def __str__(self) -> str:
        return "\n".join([self._caption(), self._headline, "", text(self.to_frame(), max_rows=80)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return card(
            f"{'Exact' if self.exact else 'Approximate'} chain of {self.system.gpus} GPU(s)",
            figures(
                ("Revenue", self.revenue_rate, "money/s per GPU"),
                ("States", len(self.states), ""),
                ("Lost mass", self.lost_mass, ""),
            ),
            paragraph(f"{self._headline}."),
            html(with_units(self.to_frame()), title="In the long run", max_rows=80),
            paragraph(self._caption(), muted=True),
        )


def exact_chain(
    policy_or_system: Policy | System,
    *,
    prefill_queue_cap: int | None = None,
    decode_queue_cap: int | None = None,
    ordered_places: int | None = None,
    tolerance: float = 1e-8,
    max_states: int = 2_000_000,
    memory_limit: float = 2.0 * GIB,
    method: Method = "auto",
) -> ChainResult:
    """Build and solve the continuous-time Markov chain of a small fleet.

    The dynamics are those of the simulator, by the same `System`. Both queues are cut off; requests that find a queue
    at its cap are turned away, and the result carries the probability of the states where that can happen.

    Args:
        policy_or_system: a policy, or the arrays of a fleet.
        prefill_queue_cap, decode_queue_cap: most requests waiting, all classes and all sides together; None grows the
            cap until the lost mass is within the tolerance.
        ordered_places: places kept in order at the head of every line that is first come first served over several
            classes: the decode buffers, and the prefill queue if admission is; None keeps all of them, which is exact
            and, over I classes, costs I^length states. Fewer is an approximation (`fluidopt.chain.states`) that
            converges as places are added; `ChainResult.exact` says which it is.
        tolerance: largest lost mass accepted.
        max_states, memory_limit: bytes; checked against an estimate before anything is allocated.
        method: of the stationary law, ``"direct"`` (its fill-in is not in the memory estimate), ``"iterative"`` or
            ``"auto"``.

    Raises:
        InvalidInput: the chain is too large, the caps lose more than the tolerance, or an argument is out of range.
        SolverFailure: no law passes its check.
    """
    policy, system = subject(policy_or_system, caller="exact_chain")
    check_sizes(
        "exact_chain",
        prefill_queue_cap=prefill_queue_cap,
        decode_queue_cap=decode_queue_cap,
        ordered_places=ordered_places,
        max_states=max_states,
        memory_limit=memory_limit,
    )
    if not (isinstance(tolerance, float | int) and 0 < tolerance <= 1):
        raise InvalidInput(f"exact_chain: tolerance must be above 0 and at most 1; got {tolerance!r}")
    caps = [FIRST_CAP if cap is None else int(cap) for cap in (prefill_queue_cap, decode_queue_cap)]
    grows = [prefill_queue_cap is None, decode_queue_cap is None]
    why = ""
    while True:
        layout = Layout(
            system=system,
            prefill_queue_cap=caps[0],
            decode_queue_cap=caps[1],
            ordered_places=max(caps) if ordered_places is None else int(ordered_places),
        )
        layout.refuse(max_states=int(max_states), memory_limit=memory_limit, why=why)
        if method == "direct" and layout.states() > DIRECT_LIMIT:
            raise InvalidInput(
                f"exact_chain: method='direct' takes at most {DIRECT_LIMIT:,} states; got up to {layout.states():,}. "
                "Use method='iterative'."
            )
        states, generator = enumerate_chain(layout)
        law = stationary_law(generator, method=method)
        result = ChainResult(
            policy=policy, system=system, states=states, generator=generator, law=law, tolerance=float(tolerance)
        )
        if result.lost_mass <= tolerance:
            return result
        marginals = (result.means.prefill_marginal, result.means.decode_marginal)
        lost = [float(law[(states.flags & cut) > 0].sum()) for cut in (ARRIVAL_CUT, DECODE_CUT)]
        growing = [grow and edge > tolerance / 2 for grow, edge in zip(grows, lost, strict=True)]
        if not any(growing):
            names = ("prefill_queue_cap", "decode_queue_cap")
            worst = int(np.argmax(lost))
            raise InvalidInput(
                f"exact_chain: the caps lose mass {result.lost_mass:.2g}, more than tolerance={tolerance:g}; raise "
                f"{names[worst]}={caps[worst]} (mass {lost[worst]:.2g} at its edge) or leave it None."
            )
        why = f" (at caps of {caps[0]} and {caps[1]} the lost mass is still {result.lost_mass:.2g})"
        for k, marginal in enumerate(marginals):
            if growing[k]:
                caps[k] += _further(marginal, lost[k], tolerance / 4)


def subject(policy_or_system: Policy | System, *, caller: str) -> tuple[Policy | None, System]:
    """The policy, if it is one, and the arrays of its fleet."""
    if isinstance(policy_or_system, Policy):
        return policy_or_system, fleet_system(policy_or_system)
    if isinstance(policy_or_system, System):
        return None, policy_or_system
    raise InvalidInput(f"{caller}: takes a Policy or a System; got {type(policy_or_system).__name__}")


def check_sizes(caller: str, *, memory_limit: float, **sizes: int | None) -> None:
    """Raise unless the sizes are whole numbers of at least 0 (`max_states`: 1) and the memory is above 0 bytes."""
    for name, value in sizes.items():
        least = int(name == "max_states")
        if value is not None and not is_whole(value, least=least):
            raise InvalidInput(f"{caller}: {name} must be a whole number of at least {least}; got {value!r}")
    if not memory_limit > 0:
        raise InvalidInput(f"{caller}: memory_limit must be above 0 bytes; got {memory_limit!r}")


def _further(marginal: FloatArray, lost: float, target: float) -> int:
    """By how much a queue's cap must grow, from how fast the law of its length falls; at most about double."""
    cap = marginal.size - 1
    ratio = marginal[-1] / marginal[-2] if cap > 0 and marginal[-2] > 0 else 1.0
    if not 0 < ratio < 1:
        return cap + 2
    return min(cap + 2, max(1, math.ceil(math.log(target / lost) / math.log(ratio))))
