"""The best long-run average of a controlled chain: policy iteration, with certified bounds.

With the time between events made exponential of one rate L, by events that change nothing (uniformisation), the value v
of a state, money relative to the others, and the gain g, money/s, satisfy

    v(x) + g/L = max over the y that actions lead to from x of  w(y) = v(y) + (r(y) + sum_z q(y,z) (v(z) - v(y))) / L,

r being the rate of earning and q the rates of the events. Write T v for the right-hand side with any v. Then

    L min (T v - v)  <=  g  <=  L max (T v - v),

the right for every policy, randomised and with memory, the left for the policy that takes the maximising actions
(Odoni, Oper. Res. 17, 1969). So the bounds hold wherever v came from, and it may come from an inexact method: here
policy iteration (Howard 1960), with the values of each policy by a Krylov method.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import splu

from fluidopt.chain.control import ControlledChain
from fluidopt.chain.incomplete import bicgstab, diagonal_places, incomplete_lu
from fluidopt.chain.packing import AnyArray, compiled
from fluidopt.chain.stationary import likely_state
from fluidopt.errors import SolverFailure
from fluidopt.simulation.system import FloatArray, IntArray

DIRECT_STATES = 1_000
"""Most states that a policy acts no more in with which its values come from a sparse LU."""

FIRST_SWEEPS = 60
"""Sweeps of value iteration before the first policy."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Solution:
    """What policy iteration found.

    Attributes:
        values: (S,) v, money.
        choice: (S,) place of the best action within the state's row of actions, -1 to act no more.
        settled: (S,) the state that the sequence of best actions ends in.
        lower, upper: bounds of the best gain, money/s of the fleet; the policy of `choice` earns `lower` at least.
        policies: policies evaluated.
        sweeps: sweeps of value iteration.
    """

    values: FloatArray
    choice: IntArray
    settled: IntArray
    lower: float
    upper: float
    policies: int
    sweeps: int


def best_policy(
    chain: ControlledChain, *, tolerance: float, most_policies: int = 60, most_sweeps: int = 50_000
) -> Solution:
    """The policy of greatest gain.

    Args:
        chain: states, events, actions.
        tolerance: the bounds may differ by this part of the larger one.
        most_policies, most_sweeps: policies evaluated, and after these sweeps of value iteration, before it gives up.

    Raises:
        SolverFailure: the bounds do not come close enough.
    """
    clock = 1.02 * float(chain.leaving.max()) or 1.0  # above every rate, so that value iteration has no period
    events, actions = chain.events, chain.actions
    values = np.zeros(len(chain))
    swept, choice = np.empty(len(chain)), np.full(len(chain), -1, dtype=np.int64)
    settled = np.arange(len(chain))
    lower, upper, policies, sweeps = -np.inf, np.inf, 0, 0
    iterating = False  # by sweeps to the end, once policies change no more or one has no values
    while True:
        low, high = _sweep(
            events.indptr,
            events.indices,
            events.data,
            chain.reward,
            chain.above,
            actions.indptr,
            actions.indices,
            clock,
            values,
            swept,
            choice,
        )
        lower, upper = max(lower, clock * low), min(upper, clock * high)
        before, settled = settled, _settled(chain, choice)
        if clock * (high - low) <= tolerance * abs(clock * high):
            return Solution(
                values=values,
                choice=choice,
                settled=settled,
                lower=clock * low,
                upper=clock * high,
                policies=policies,
                sweeps=sweeps,
            )
        iterating = iterating or policies == most_policies or (policies > 0 and np.array_equal(before, settled))
        if sweeps >= FIRST_SWEEPS and not iterating:
            policies += 1
            evaluated = _policy_values(chain, settled, accuracy=0.2 * tolerance * abs(clock * high), start=values)
            if evaluated is not None:
                values = evaluated
                continue
            iterating = True
        sweeps += 1
        if sweeps > most_sweeps:
            raise SolverFailure(
                f"optimal_policy: after {policies} policies and {sweeps} sweeps the best gain is between {lower:.9g} "
                f"and {upper:.9g} for the fleet, not within {tolerance:g} of each other; raise tolerance"
            )
        values = swept - swept[0]


@compiled
def _sweep(
    event_starts: AnyArray,
    targets: AnyArray,
    rates: AnyArray,
    reward: AnyArray,
    above: AnyArray,
    action_starts: AnyArray,
    leads_to: AnyArray,
    clock: float,
    values: AnyArray,
    swept: AnyArray,
    choice: AnyArray,
) -> tuple[float, float]:
    """T v into swept, the maximising actions into choice; least and largest entry of T v - v.

    Actions lead to lower numbers, whose best is known when a state's turn comes. An action counts as better than none
    where it is so by more than rounding.
    """
    low, high = np.inf, -np.inf
    for x in range(values.size):
        best, chosen = -np.inf, -1
        for k in range(action_starts[x], action_starts[x + 1]):
            value = swept[leads_to[k]]
            if value > best:
                best, chosen = value, k - action_starts[x]
        if not above[x]:
            flow = reward[x]
            for k in range(event_starts[x], event_starts[x + 1]):
                flow += rates[k] * (values[targets[k]] - values[x])
            rests = values[x] + flow / clock
            if rests >= best - 1e-13 * abs(best):
                chosen = -1
            best = max(best, rests)
        swept[x] = best
        choice[x] = chosen
        low, high = min(low, best - values[x]), max(high, best - values[x])
    return low, high


def _settled(chain: ControlledChain, choice: IntArray) -> IntArray:
    settled = np.empty(len(chain), dtype=np.int64)
    _settle(chain.actions.indptr, chain.actions.indices, choice, settled)
    return settled


@compiled
def _settle(action_starts: AnyArray, leads_to: AnyArray, choice: AnyArray, settled: AnyArray) -> None:
    for x in range(choice.size):
        settled[x] = x if choice[x] < 0 else settled[leads_to[action_starts[x] + choice[x]]]


def policy_generator(chain: ControlledChain, settled: IntArray) -> tuple[sparse.csr_array, IntArray]:
    """The chain under a policy that acts from x until `settled[x]`: its generator, 1/s, and the states of its rows."""
    states, place = np.unique(settled, return_inverse=True)
    rows = chain.events[states]
    targets = (rows.data, place[rows.indices], rows.indptr)
    events = sparse.csr_array(targets, shape=(states.size, states.size))
    generator = (events - sparse.diags_array(chain.leaving[states])).tocsr()
    generator.sum_duplicates()
    return generator, states


def _policy_values(
    chain: ControlledChain, settled: IntArray, *, accuracy: float, start: FloatArray
) -> FloatArray | None:
    """The values of a policy, 0 in one state; None where the equations have no solution.

    Solves Q h - g 1 = -r for h and g. The state whose value is 0 is a likely one and comes last, and g takes its place
    among the unknowns. The largest error in an equation is at most the accuracy, money/s, if the iteration gets there.
    """
    generator, states = policy_generator(chain, settled)
    size = states.size
    order = np.arange(size)
    likely = likely_state(generator)
    order[likely:-1] = order[likely + 1 :].copy()
    order[-1] = likely
    ordered = generator[order][:, order].tocsc()
    equations = sparse.hstack([ordered[:, :-1], sparse.csc_array(np.full((size, 1), -1.0))], format="csr")
    right = -chain.reward[states[order]]
    if size <= DIRECT_STATES:
        try:
            unknown = splu(equations.tocsc()).solve(right)
        except RuntimeError:  # singular: under this policy the chain falls apart
            return None
    else:
        guess = start[states[order]] - start[states[likely]]
        guess[-1] = float(np.mean(generator @ start[states] + chain.reward[states]))
        unknown = _iterate(equations, right, guess, accuracy)
    if not np.all(np.isfinite(unknown)):
        return None
    values = np.empty(size)
    values[order[:-1]], values[order[-1]] = unknown[:-1], 0.0
    place = np.searchsorted(states, settled)
    return values[place]


def _iterate(
    equations: sparse.csr_array, right: FloatArray, guess: FloatArray, accuracy: float, *, rounds: int = 20
) -> FloatArray:
    """BiCGStab with incomplete factors, restarted on its own residual until that is small or stalls; NaN where the
    factors do not exist."""
    equations.sort_indices()
    starts, columns = equations.indptr, equations.indices
    size = guess.size
    where, factors = np.full(size, -1, dtype=starts.dtype), equations.data.copy()
    diagonal_places(starts, columns, where)
    if where.min() < 0:  # a state that nothing leads out of
        return np.full(size, np.nan)
    incomplete_lu(starts, columns, where, factors, np.full(size, -1, dtype=np.int64))
    unknown, reached = guess, np.inf
    for _ in range(rounds):
        residual = right - equations @ unknown
        now = float(np.abs(residual).max())
        if now <= accuracy or not now < 0.9 * reached:
            break
        reached = now
        step = bicgstab(equations, where, factors, residual, relative=1e-6, most=300)
        if np.all(np.isfinite(step)):
            unknown = unknown + step
    return unknown
