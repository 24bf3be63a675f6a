"""The best policy of a small fleet by dynamic programming, and what it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csgraph

from fluidopt.chain.control import ControlledChain, control_layout, controlled_chain, refuse
from fluidopt.chain.decisions import DecisionKind, decision_map, decision_text, turning_away
from fluidopt.chain.dynamic import Solution, best_policy, policy_generator
from fluidopt.chain.exact import check_sizes, subject
from fluidopt.chain.means import Means, class_names, role_names, values_frame
from fluidopt.chain.states import GIB
from fluidopt.chain.stationary import stationary_law
from fluidopt.errors import InvalidInput, SolverFailure
from fluidopt.policy.bound import revenue_bound
from fluidopt.policy.rules import Policy
from fluidopt.simulation.system import FloatArray, System
from fluidopt.tables import text
from fluidopt.views import card, figures, html, paragraph, with_units

if TYPE_CHECKING:
    import pandas as pd

CAPS = ("prefill_queue_cap", "decode_queue_cap")
FIRST_CAP = 3


@dataclass(frozen=True, eq=False, kw_only=True)
class OptimalPolicy:
    """The policy that earns most in the long run, for given roles of the GPUs, and its stationary law.

    The bounds are certified: no policy of a fleet with these roles and these caps earns more than `upper_bound`,
    whatever it remembers and however it draws, and this one earns at least `lower_bound` (both up to rounding). Without
    the caps it earns as much: who is turned away is then simply never served. So `lower_bound` holds for the fleet
    without caps too; there, if every class abandons, the fluid optimum bounds all policies from above.

    Attributes:
        policy: whose roles these are, None if the fleet was given as a `System`.
        system: the fleet.
        chain: states, events and actions.
        solution: values and best actions.
        law: (S,) stationary probabilities of the states in which it acts no more, 0 for the others.
        cap_rise: by what part of itself the revenue rose when the caps grew for the last time; NaN for given caps.
    """

    policy: Policy | None
    system: System
    chain: ControlledChain
    solution: Solution
    law: FloatArray
    cap_rise: float

    @property
    def prefill_queue_cap(self) -> int:
        """Most requests that wait for a prefill."""
        return self.chain.space.layout.prefill_queue_cap - 1

    @property
    def decode_queue_cap(self) -> int:
        """Most requests that wait for a decode."""
        return self.chain.space.layout.decode_queue_cap - 1

    @cached_property
    def means(self) -> Means:
        """Stationary means, totals of the fleet by class and role."""
        return self.chain.space.means(self.law)

    @cached_property
    def revenue_rate(self) -> float:
        """Revenue rate, money/s per GPU, from the stationary law."""
        return self.means.revenue_rate(self.system)

    @property
    def lower_bound(self) -> float:
        """What this policy earns at least, money/s per GPU."""
        return self.solution.lower / self.system.gpus

    @property
    def upper_bound(self) -> float:
        """What any policy with these roles and caps earns at most, money/s per GPU."""
        return self.solution.upper / self.system.gpus

    @cached_property
    def values(self) -> dict[str, FloatArray]:
        """Every mean of `SimulationResult.values`, under the same name and in the same unit."""
        return self.means.values(self.system)

    @cached_property
    def lost_mass(self) -> float:
        """Stationary probability of the states in which some event makes the controller turn somebody away.

        That costs nothing where it is somebody whom it would not serve anyway; what larger caps would earn shows in
        `cap_rise`.
        """
        into = self.chain.events @ turning_away(self.chain, self.solution).astype(float)
        return float(self.law[into > 0].sum())

    def describe(self, number: int) -> str:
        """One state in words, with GPUs, classes and roles by number."""
        return self.chain.space.describe(number)

    def decision(self, number: int) -> str:
        """What the policy does in one state, in words: all it starts and seats at once, or "wait"."""
        classes, roles = class_names(self.system, self.policy), role_names(self.system, self.policy)
        return decision_text(self.chain, self.solution, number, classes=classes, roles=roles)

    def decision_map(
        self,
        rows: str = "free_decode_slots",
        columns: str | None = None,
        *,
        of: DecisionKind = "admit",
        where: Mapping[str, int] | None = None,
    ) -> pd.DataFrame:
        """The decisions over two coordinates of the state, the others averaged by how often they are met.

        A cell looks at the states just after an event in which there is a choice. It names the most frequent decision,
        with its share if it is not always the same; a dash stands where the policy never comes.

        Args:
            rows, columns: coordinates: ``"prefill_queue"``, ``"decode_queue"`` (a prefill that has just ended counts
                there), ``"free_decode_slots"``, ``"idle_prefill_gpus"``, or of one class ``"prefill_queue[code]"``,
                ``"decode_queue[code]"``, ``"prefill[code]"``, ``"decode[code]"`` (in service). Columns are by default
                the prefill queue of the first class.
            of: ``"admit"``: which classes' prefills start, where one waits and a GPU could start one; ``"hold"`` stands
                for none. ``"route"``: which waiting decodes are seated and where, where one waits and a slot is free;
                ``"wait"`` stands for none.
            where: only states with these values of coordinates.

        Raises:
            InvalidInput: an unknown coordinate or kind of decision.
        """
        classes, roles = class_names(self.system, self.policy), role_names(self.system, self.policy)
        return decision_map(
            self.chain,
            self.solution,
            self.chain.events.T @ self.law,
            rows=rows,
            columns=f"prefill_queue[{classes[0]}]" if columns is None else columns,
            of=of,
            where={} if where is None else where,
            classes=classes,
            roles=roles,
        )

    def to_frame(self) -> pd.DataFrame:
        """A row per quantity and class or role, column ``optimal``; the index is that of `SimulationResult.to_frame`,
        so the two join."""
        return values_frame(self.values, self.system, self.policy, column="optimal")

    @property
    def _headline(self) -> str:
        found = f"Best revenue rate {self.revenue_rate:.6g} per GPU, proved to be at most {self.upper_bound:.9g}"
        gap = "" if self.policy is None else revenue_bound(self.policy).against(self.revenue_rate)
        return f"{found}; {gap}" if gap else found

    def _caption(self) -> str:
        whose = "" if self.policy is None else f", roles of {self.policy.title}"
        return (
            f"Optimal policy{whose}: {self.system.gpus} GPU(s), {len(self.chain):,} states, at most "
            f"{self.prefill_queue_cap} and {self.decode_queue_cap} waiting; lost mass {self.lost_mass:.1e}, "
            f"{self.solution.policies} policies evaluated"
        )

    def __str__(self) -> str:
        return "\n".join([self._caption(), self._headline, "", text(self.to_frame(), max_rows=80)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return card(
            f"Optimal policy of {self.system.gpus} GPU(s)",
            figures(
                ("Revenue", self.revenue_rate, "money/s per GPU"),
                ("Proved to be at most", self.upper_bound, "money/s per GPU"),
                ("States", len(self.chain), ""),
                ("Lost mass", self.lost_mass, ""),
            ),
            paragraph(f"{self._headline}."),
            html(with_units(self.to_frame()), title="In the long run", max_rows=80),
            paragraph(self._caption(), muted=True),
        )


def optimal_policy(
    policy_or_system: Policy | System,
    *,
    prefill_queue_cap: int | None = None,
    decode_queue_cap: int | None = None,
    tolerance: float = 1e-6,
    cap_tolerance: float = 1e-4,
    max_states: int = 3_000_000,
    memory_limit: float = 2.0 * GIB,
) -> OptimalPolicy:
    """The policy of a small fleet that earns most per second in the long run.

    The roles of the GPUs are given, the rest is free (`fluidopt.chain.control`): after every event, whom to admit to
    an idle GPU that may prefill, and to which, or nobody; which waiting decode to seat in a free slot, and in which, or
    none. That includes every gate and router, hence the revenue of every policy with these roles is at most this one's.
    Of the policy given only the roles matter. To let any GPU prefill, give one of a kind without a partition, for
    instance ``plan.policy(gpus=2, kind="GF-WSP")``: that fleet can do whatever one of the same GPUs can do with any
    partition.

    Args:
        policy_or_system: a policy, or the arrays of a fleet, for the roles.
        prefill_queue_cap, decode_queue_cap: most requests waiting, all classes together; where one more comes, the
            controller turns away whom it likes. None grows the cap by halves until that raises the revenue by at most
            ``cap_tolerance`` of it.
        tolerance: largest difference of the bounds, as a part of them.
        cap_tolerance: see the caps.
        max_states, memory_limit: bytes; checked against an estimate before anything is allocated.

    Raises:
        InvalidInput: the chain is too large, or an argument is out of range.
        SolverFailure: the bounds do not come within the tolerance.
    """
    policy, system = subject(policy_or_system, caller="optimal_policy")
    check_sizes(
        "optimal_policy",
        prefill_queue_cap=prefill_queue_cap,
        decode_queue_cap=decode_queue_cap,
        max_states=max_states,
        memory_limit=memory_limit,
    )
    for name, value in (("tolerance", tolerance), ("cap_tolerance", cap_tolerance)):
        if not (isinstance(value, float | int) and 0 < value < 1):
            raise InvalidInput(f"optimal_policy: {name} must be between 0 and 1; got {value!r}")
    given = (prefill_queue_cap, decode_queue_cap)
    caps = [FIRST_CAP if cap is None else int(cap) for cap in given]
    growing = [k for k, cap in enumerate(given) if cap is None]
    rises: dict[int, float] = {}  # of the caps that need not grow further, if the other does not
    best = _solved(policy, system, caps, tolerance, max_states, memory_limit)
    why = " (to see whether larger caps raise the revenue)"
    while len(rises) < len(growing):
        k = next(k for k in growing if k not in rises)
        caps[k] += (caps[k] + 1) // 2
        found = _solved(policy, system, caps, tolerance, max_states, memory_limit, why)
        rise = found.revenue_rate - best.revenue_rate
        best, small = found, rise <= cap_tolerance * abs(found.revenue_rate)
        rises = rises | {k: rise / found.revenue_rate if rise > 0 else 0.0} if small else {}
        if not small:
            why = f" (raising {CAPS[k]} to {caps[k]} still raised the revenue by {rise:.2g})"
    return replace(best, cap_rise=max(rises.values(), default=np.nan))


def _solved(
    policy: Policy | None,
    system: System,
    caps: list[int],
    tolerance: float,
    max_states: int,
    memory_limit: float,
    why: str = "",
) -> OptimalPolicy:
    layout = control_layout(system, *caps)
    refuse(layout, max_states=int(max_states), memory_limit=memory_limit, why=why)
    chain = controlled_chain(layout)
    solution = best_policy(chain, tolerance=tolerance)
    found = OptimalPolicy(
        policy=policy, system=system, chain=chain, solution=solution, law=_law(chain, solution), cap_rise=np.nan
    )
    slack = 1e-9 * (abs(found.lower_bound) + abs(found.upper_bound))
    if not found.lower_bound - slack <= found.revenue_rate <= found.upper_bound + slack:
        raise SolverFailure(
            f"optimal_policy: the revenue under the stationary law, {found.revenue_rate:.12g}, must be between the "
            f"bounds {found.lower_bound:.12g} and {found.upper_bound:.12g}; lower tolerance"
        )
    return found


def _law(chain: ControlledChain, solution: Solution) -> FloatArray:
    """The stationary law of the part of the chain that the policy ends in from the empty fleet."""
    generator, states = policy_generator(chain, solution.settled)
    first = int(np.searchsorted(states, solution.settled[0]))
    reached = np.sort(csgraph.breadth_first_order(generator, first, return_predecessors=False))
    generator, states = generator[reached][:, reached], states[reached]
    _, part = csgraph.connected_components(generator, connection="strong")
    flows = generator.tocoo()
    left = np.unique(part[flows.row[part[flows.row] != part[flows.col]]])
    closed = np.setdiff1d(part, left)[0]  # all of them earn the same
    kept = np.flatnonzero(part == closed)
    law = np.zeros(len(chain))
    law[states[kept]] = stationary_law(generator[kept][:, kept].tocsr())
    return law
