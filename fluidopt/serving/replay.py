"""The replay of a trace: what is asked, the run with its progress, and what came out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluidopt.errors import InvalidInput
from fluidopt.inputs import is_whole
from fluidopt.policy.rules import Policy
from fluidopt.serving.engine import BLOCK, EngineFleet, Memory, checked_tokens
from fluidopt.serving.events import DONE, advance
from fluidopt.serving.fleet import build_state, check_memory, engine_fleet, kinds, policy_fleet
from fluidopt.serving.result import Replay
from fluidopt.serving.state import GAVE_UP, State
from fluidopt.traces.classify import Classification
from fluidopt.traces.trace import Trace
from fluidopt.workload import TokenPrices

SLICE = 1 << 19
"""Events between two looks at the keyboard."""


def replay(
    trace: Trace,
    fleet: Policy | EngineFleet,
    *,
    classes: Classification | NDArray[np.integer[Any]] | None = None,
    kv_tokens: Memory = None,
    patience: bool = True,
    prices: TokenPrices | None = None,
    seed: int = 0,
) -> Replay:
    """Serve the requests of a trace, at their times and with their tokens, on a simulated fleet.

    The simulation goes from iteration to iteration of each GPU, as engines do: tokens come out, requests start and
    move on at boundaries between iterations only, the last chunk of a prompt is as long as it is, and an iteration
    takes what the GPU's curve says for its chunk, its decodes and their mean KV. Stretches of equal iterations are
    summed in one go, so the cost follows requests, not tokens.

    A policy's fleet follows the policy: a GPU prefills one prompt at a time in chunks of its role, beside the decodes
    it has; a request sent to another GPU for its decode takes its KV along in no time. Iteration times come from the
    curve of the GPU's type at the decodes there are, where the plan has full batches.

    Args:
        trace: the requests.
        fleet: a policy, or engines with queues of their own behind a dispatcher.
        classes: for a policy, the class of each request: the `Classification` its workload came from, or class numbers,
            (N,); not needed where the trace's labels are the names of the classes, or there is one class.
        kv_tokens: for a policy, tokens that a GPU's KV cache holds, or one by GPU type; none for no limit. Engines have
            their own ``kv_blocks``. A request is refused if it does not fit on every GPU that it may be sent to.
        patience: for a policy, whether requests give up waiting after an exponential time with the rate of their class
            (a rate of 0 never does).
        prices: what tokens earn; by default the policy's.
        seed: for the policy's draws and the patience; the same seed gives the same replay.

    Raises:
        InvalidInput: an argument breaks a rule, or the classes of the requests are not known.
    """
    if not isinstance(trace, Trace):
        raise InvalidInput(f"replay: trace must be a Trace; got {type(trace).__name__} (read one with fo.read_trace)")
    if not is_whole(seed, least=0):
        raise InvalidInput(f"replay: seed must be a whole number of at least 0; got {seed!r}")
    if not isinstance(patience, bool):
        raise InvalidInput(f"replay: patience must be True or False; got {patience!r}")
    if prices is not None and not isinstance(prices, TokenPrices):
        raise InvalidInput(f"replay: prices must be TokenPrices(prompt=..., output=...); got {prices!r}")
    ours, theirs = np.random.default_rng(seed).spawn(2)
    never = np.full(len(trace), np.inf)
    if isinstance(fleet, Policy):
        limits = checked_tokens(kv_tokens, [gpu.name for gpu in fleet.scenario.gpu_types])
        kind = kinds(fleet, trace, classes)
        most = max(role.slots for role in fleet.roles)
        check_memory(gpus=fleet.gpus, cap=most, block=BLOCK, requests=len(trace))
        arrays, curves, system = policy_fleet(fleet, limits)
        if patience:
            rate = fleet.scenario.workload.abandonment_rate[kind]
            never = np.divide(theirs.exponential(size=len(trace)), rate, out=never, where=rate > 0)
        state = build_state(arrays, system.role_gpus, trace, kind, never, system=system)
        names = np.array([role.name for role in fleet.roles])
        prices = prices or fleet.scenario.prices
    elif isinstance(fleet, EngineFleet):
        if kv_tokens is not None or classes is not None:
            raise InvalidInput(
                "replay: classes and kv_tokens go with a policy; an engine has kv_blocks in its settings"
            )
        kind = np.zeros(len(trace), dtype=np.int64)
        engine = fleet.engine
        check_memory(gpus=fleet.gpus, cap=engine.max_num_seqs, block=engine.block_size, requests=len(trace))
        arrays, curves = engine_fleet(fleet)
        state = build_state(arrays, np.array([fleet.gpus]), trace, kind, never, dispatch=fleet.dispatch)
        names = np.array(["engine"])
    else:
        raise InvalidInput(f"replay: fleet must be a Policy or an EngineFleet; got {type(fleet).__name__}")
    while advance(arrays, state, curves, ours, SLICE) != DONE:
        pass
    return _measured(trace, fleet, state, kind, names, prices, seed)


def _measured(
    trace: Trace,
    fleet: Policy | EngineFleet,
    state: State,
    kind: NDArray[np.int64],
    names: NDArray[np.str_],
    prices: TokenPrices | None,
    seed: int,
) -> Replay:
    requests, gpus = state.requests, state.gpus
    refused = requests["output"] == 0

    def times(name: str) -> NDArray[np.float64]:
        return np.where(requests[name] >= 0, requests[name], np.nan)

    return Replay(
        trace=trace,
        fleet=fleet,
        started=times("started"),
        first_token=times("first"),
        finished=times("finished"),
        refused=refused,
        abandoned=requests["finished"] == GAVE_UP,
        preemptions=requests["preemptions"].astype(np.int64),
        recomputed_tokens=requests["recomputed"].astype(np.int64),
        gpu=requests["gpu"].astype(np.int64),
        gpu_columns={
            "role": names[gpus["role"]],
            "busy": gpus["busy"].copy(),
            "iterations": gpus["steps"].copy(),
            "prefill_tokens": gpus["prefill_tokens"].copy(),
            "decode_tokens": gpus["decode_tokens"].copy(),
            "most_kv_tokens": gpus["most_tokens"].copy(),
            "most_kv_blocks": gpus["most_blocks"].copy(),
            "preemptions": gpus["preemptions"].astype(np.int64),
        },
        kind=kind,
        prices=prices,
        seed=seed,
        events=int(state.scalars["events"][0]),
    )
