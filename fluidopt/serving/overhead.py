"""What an iteration takes beyond its curve: one constant, fitted to requests that were really served."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from fluidopt.errors import InvalidInput
from fluidopt.serving.engine import EngineFleet
from fluidopt.serving.replay import replay
from fluidopt.traces.trace import Trace

MOST = 0.1
"""s: an iteration that takes this much longer than its curve has another curve."""


def fit_step_overhead(trace: Trace, fleet: EngineFleet, *, which: NDArray[np.bool_] | None = None) -> EngineFleet:
    """Fit what every iteration takes on top of its curve: the replay's mean end-to-end time becomes the measured one.

    A table of kernels leaves out scheduling, sampling and the rest of a step. That constant belongs to a GPU, an engine
    and its version: it does not carry over to others.

    Args:
        trace: requests with measured times.
        fleet: the engines that served them, as they were configured.
        which: requests to fit on, (N,); keep some to test on.

    Returns:
        The fleet with ``engine.step_overhead`` set, s.

    Raises:
        InvalidInput: the trace has no measured times, or no overhead from 0 to 0.1 s makes the two agree.
    """

    def excess(overhead: float) -> float:
        changed = replace(fleet, engine=replace(fleet.engine, step_overhead=overhead))
        frame: Any = replay(trace, changed).against_measured(which)
        return float(frame.loc[("e2e", "mean"), "error"])

    at_none, at_most = excess(0.0), excess(MOST)
    if not at_none <= 0 <= at_most:
        raise InvalidInput(
            f"fit_step_overhead: without an overhead the replay's mean end-to-end time is off by {at_none:+.1%}, with "
            f"{MOST} s by {at_most:+.1%}, so no overhead between makes it right; check the iteration times and the "
            "engine's settings"
        )
    found = float(brentq(excess, 0.0, MOST, xtol=1e-7))
    return replace(fleet, engine=replace(fleet.engine, step_overhead=found))
