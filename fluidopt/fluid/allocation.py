"""How a flow of capacity is shared among the classes that want it."""

from __future__ import annotations

import numpy as np

from fluidopt.simulation.system import FloatArray


def fill(total: float, weight: FloatArray, offset: FloatArray, most: FloatArray) -> FloatArray:
    """Share ``total`` as ``clip(v weight + offset, 0, most)`` at one common level v; all of ``most`` if it is enough.

    Args:
        total: what there is, >= 0.
        weight: (k,), > 0.
        offset: (k,), what a class gets at level 0.
        most: (k,), >= 0 or inf.
    """
    level = (total - offset.sum()) / weight.sum()
    share: FloatArray = level * weight + offset
    if np.all((share >= 0) & (share <= most)):
        return share
    if total <= 0:
        return np.zeros_like(share)
    # The sum rises piecewise linearly with the level: each class starts to count at one level and stops at another.
    bounded = np.isfinite(most)
    level_at = np.concatenate([-offset / weight, ((most - offset) / weight)[bounded]])
    order = np.argsort(level_at, kind="stable")
    level_at = level_at[order]
    slope = np.cumsum(np.concatenate([weight, -weight[bounded]])[order])
    reached = np.concatenate([[0.0], np.cumsum(slope[:-1] * np.diff(level_at))])
    if total >= reached[-1]:
        if np.all(bounded):
            return most.copy()
        open_weight = weight[~bounded].sum()
        level = level_at[-1] + (total - reached[-1]) / open_weight
    else:
        level = float(np.interp(total, reached, level_at))
    share = level * weight + offset
    return np.minimum(np.maximum(share, 0.0), most)


def first_come(total: float, queue: FloatArray, abandonment_rate: FloatArray) -> FloatArray:
    """Rates at which the classes leave the head of one first-come first-served line that moves at rate ``total``, 1/s.

    The line's order is not part of the state; the closure is that each class has stood in it as it would in equilibrium
    with a common wait w: of q_i requests, whose ages then have density proportional to exp(-theta_i age) up to w, those
    of age w leave, at rate q_i theta_i/(exp(theta_i w) - 1); w is such that these rates add up to ``total``. This is
    exact in steady state, and for equal theta_i and a constant mix of arrivals always (ours; not in [L26]).

    Args:
        total: rate at which the line moves, > 0.
        queue: (k,) requests in the line, >= 0; nobody leaves if all are 0.
        abandonment_rate: (k,) theta_i, 1/s.
    """
    theta = abandonment_rate
    if not queue.sum() > 0:
        return np.zeros_like(queue)
    if theta.size == 1 or theta.max() - theta.min() < 1e-12 * theta.max():
        leaving: FloatArray = total * queue / queue.sum()
        return leaving
    # In u = 1/w the sum is nearly linear and convex, so that Newton's method converges in a few steps.
    u = (total + 0.5 * np.dot(queue, theta)) / queue.sum()
    for _ in range(50):
        k = np.minimum(theta / u, 500.0)
        rate = np.where(k > 1e-8, theta / np.expm1(np.maximum(k, 1e-8)), u)
        gain = np.where(k > 1e-4, (0.5 * k / np.sinh(0.5 * np.maximum(k, 1e-4))) ** 2, 1.0)
        step = (np.dot(queue, rate) - total) / np.dot(queue, gain)
        u = max(u - step, 0.1 * u)
        if abs(step) < 1e-13 * u:
            break
    leaving = queue * rate
    leaving *= total / leaving.sum()
    return leaving
