"""What a simulation asked for on a command line may take."""

from __future__ import annotations

import math

from fluidopt.errors import InvalidInput

MOST_GPUS = 1_000_000
MOST_REQUESTS = 1e10
"""A simulation of more requests takes more than about an hour on one core."""


def check_effort(gpus: int, requests_per_second: float, horizon: float, replications: int) -> None:
    """Refuse a simulation that would take days or fill the memory: it follows every GPU and every request.

    Args:
        gpus: in the fleet.
        requests_per_second: that arrive at the whole fleet.
        horizon: simulated seconds per replication; 0 where they are not known before.
        replications: of the whole simulation.
    """
    if gpus > MOST_GPUS:
        raise InvalidInput(f"--gpus must be at most {MOST_GPUS:,} where every GPU is simulated; got {gpus:,}")
    requests = requests_per_second * horizon * replications
    if MOST_REQUESTS < requests < math.inf:
        raise InvalidInput(
            f"--horizon {horizon:g} makes {requests:.3g} requests in {replications} replications, more than "
            f"{MOST_REQUESTS:g}; take at most {horizon / requests * MOST_REQUESTS:.3g} s"
        )
