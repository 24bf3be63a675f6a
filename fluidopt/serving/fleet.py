"""From a policy's fleet, or a fleet of engines, and a trace to the arrays that a replay moves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fluidopt.errors import InvalidInput
from fluidopt.policy.rules import Policy
from fluidopt.serving.clock import Curves, flatten
from fluidopt.serving.engine import BLOCK, EngineFleet
from fluidopt.serving.state import (
    CLASS,
    GATE,
    GPU,
    LEAST_REQUESTS,
    LINE,
    NOT_YET,
    REQUEST,
    ROLE,
    ROUND_ROBIN,
    SCALARS,
    TALLY,
    WAITING,
    Fleet,
    State,
)
from fluidopt.simulation.choices import NOBODY, list_gpu
from fluidopt.simulation.fleet import fleet_system
from fluidopt.simulation.system import FEWEST_DECODES, System
from fluidopt.tables import shorten
from fluidopt.traces.trace import Trace

IntArray = NDArray[np.int64]
MOST_MEMORY = 8 << 30
"""Bytes that the arrays of a replay may take."""
MOST = 2**31 - 1
"""Prompts in one iteration of an engine: as many as there is room for."""


def check_memory(*, gpus: int, cap: int, block: int, requests: int) -> None:
    """Refuse a replay whose arrays would not fit into memory.

    Raises:
        InvalidInput: saying how much they need.
    """
    needed = gpus * (8 * cap + 8 * block + GPU.itemsize + 72) + requests * (REQUEST.itemsize + 24) + 40 * cap
    if needed > MOST_MEMORY:
        raise InvalidInput(
            f"replay: {requests:,} requests on {gpus:,} GPUs of up to {cap:,} requests each need "
            f"{needed / 2**30:,.0f} GiB of memory, more than {MOST_MEMORY >> 30}; give fewer GPUs, smaller batches, or "
            "a part of the trace (trace.window)"
        )


def policy_fleet(policy: Policy, kv_tokens: dict[str, int]) -> tuple[Fleet, Curves, System]:
    """The fleet of a policy: one prompt at a time per GPU, in chunks of its role, and the roles' caps on decodes."""
    system = fleet_system(policy)
    types = {gpu.name: gpu for gpu in policy.scenario.gpu_types}
    names = list(types)
    classes = np.zeros(system.classes, dtype=CLASS)
    for name in ("slope", "base", "queue_target", "hold"):
        classes[name] = getattr(system, f"gate_{name}")
    roles = np.zeros(system.roles, dtype=ROLE)
    prefills = system.role_prefill_mode >= 0
    roles["first_gpu"] = np.cumsum(system.role_gpus) - system.role_gpus
    for name in ("decode_slots", "slots", "stays", "side"):
        roles[name] = getattr(system, f"role_{name}")
    roles["prefills"] = prefills
    roles["takes"] = prefills & (system.role_decode_slots == system.role_slots)
    # A role that never prefills computes preempted requests again, in chunks of its type.
    roles["chunk"] = [role.prefill.chunk if role.prefill else types[role.gpu].chunk_size for role in policy.roles]
    roles["cap"] = np.maximum(system.role_slots, 1)
    roles["prompts"] = 1
    roles["curve"] = [names.index(role.gpu) for role in policy.roles]
    roles["blocks"] = [kv_tokens[role.gpu] // BLOCK for role in policy.roles]
    roles["block"] = BLOCK
    roles["reuse"] = roles["reserve"] = 1
    order, first_role, cumulative = system.routing()
    padded = np.arange(int(roles["cap"].max()) + 1)
    fleet = Fleet(classes, roles, order, first_role, cumulative, system.side_weight.copy(), padded)
    return fleet, flatten([gpu.curve.grid() for gpu in types.values()]), system


def engine_fleet(fleet: EngineFleet) -> tuple[Fleet, Curves]:
    """The fleet of equal engines: one role, whose GPUs have queues of their own."""
    engine = fleet.engine
    roles = np.zeros(1, dtype=ROLE)
    roles["decode_slots"] = roles["slots"] = roles["cap"] = engine.max_num_seqs
    roles["prefills"] = roles["takes"] = roles["stays"] = 1
    roles["budget"] = engine.max_num_batched_tokens
    roles["prompts"] = MOST
    roles["blocks"], roles["block"] = engine.usable_blocks, engine.block_size
    roles["reuse"], roles["lag"] = engine.enable_prefix_caching, engine.async_scheduling
    roles["reserve"], roles["overhead"] = engine.reserve_full_prompt, engine.step_overhead
    one = np.ones((1, 1))
    arrays = (np.zeros(1, dtype=np.int64), np.array([0, 1]), one, np.zeros((1, 1)), engine.padded())
    return Fleet(np.zeros(1, dtype=CLASS), roles, *arrays), flatten([fleet.curve.grid()])


def build_state(
    fleet: Fleet,
    role_gpus: IntArray,
    trace: Trace,
    kind: IntArray,
    patience: NDArray[np.float64],
    *,
    dispatch: str | None = None,
    system: System | None = None,
) -> State:
    """The empty fleet before the first request; ``dispatch`` for engines, ``system`` for a policy."""
    roles, classes = fleet.roles, fleet.classes.size
    n, sides, count = int(role_gpus.sum()), fleet.weight.shape[0], len(trace)
    requests = np.zeros(count, dtype=REQUEST)
    requests["arrival"], requests["prompt"], requests["output"] = (
        trace.arrival_time,
        trace.prompt_tokens,
        trace.output_tokens,
    )
    requests["kind"], requests["target"], requests["patience"] = kind, trace.prompt_tokens, patience
    for name in ("started", "first", "finished"):
        requests[name] = NOT_YET
    requests["gpu"] = requests["next"] = requests["previous"] = NOBODY
    requests["output"][_too_long(roles, role_gpus, trace)] = 0
    gpus = np.zeros(n, dtype=GPU)
    gpus["role"] = np.repeat(np.arange(roles.size), role_gpus)
    for name in ("free_position", "idle_level", "idle_position", "partial", "done", "head", "tail"):
        gpus[name] = NOBODY
    gpus["joining_head"] = gpus["joining_tail"] = NOBODY
    gpus["pushed"] = roles["blocks"][gpus["role"]]
    scalars = np.zeros(1, dtype=SCALARS)
    scalars["slack"] = role_gpus @ roles["decode_slots"]
    fewest = system is not None and system.placement == FEWEST_DECODES
    if system is not None:
        scalars["mode"] = GATE
        scalars["fcfs"], scalars["gate_first"] = system.gate_fcfs, system.gate_first
    else:
        scalars["mode"] = ROUND_ROBIN if dispatch == "round-robin" else LEAST_REQUESTS
    cap = int(roles["cap"].max())
    levels = cap + 1 if fewest else 1
    numbers = np.arange(n)
    state = State(
        scalars=scalars,
        gpus=gpus,
        requests=requests,
        batch=np.zeros((n, cap), dtype=np.int64),
        residues=np.zeros((n, int(roles["block"].max())), dtype=np.int64),
        due=np.full(n, np.inf),
        due_order=numbers.copy(),
        due_place=numbers.copy(),
        load=np.zeros(n),
        load_order=numbers.copy(),
        load_place=numbers.copy(),
        deadline=np.zeros(count),
        deadline_order=np.zeros(count, dtype=np.int64),
        deadline_place=np.zeros(count, dtype=np.int64),
        free_members=np.zeros(n, dtype=np.int64),
        free_size=np.zeros(roles.size, dtype=np.int64),
        idle_members=np.zeros((levels, n), dtype=np.int64),
        idle_size=np.zeros(levels, dtype=np.int64),
        tallies=np.zeros(classes, dtype=TALLY),
        waiting=np.zeros((1 + sides) * classes, dtype=WAITING),
        lines=np.full(classes + sides + sides * classes, NOBODY, dtype=LINE),
    )
    if system is not None:
        for g in range(n):
            list_gpu(fleet, state, g)
    return state


def _too_long(roles: NDArray[np.void], role_gpus: IntArray, trace: Trace) -> NDArray[np.bool_]:
    """Requests that do not fit into the memory of every GPU that they may be sent to; one of these would wait for ever.

    A GPU that prefills holds the prompt, one that decodes all tokens but the last, which is never read.
    """
    too_long = np.zeros(len(trace), dtype=bool)
    for role in roles[(roles["blocks"] > 0) & (role_gpus > 0)]:
        held = trace.prompt_tokens + (trace.output_tokens - 1 if role["decode_slots"] > 0 else 0)
        too_long |= held > role["blocks"] * role["block"]
    return too_long


def kinds(policy: Policy, trace: Trace, classes: object) -> IntArray:
    """The class of each request under a policy, (N,): as given, or by the labels of the trace.

    Raises:
        InvalidInput: the classes given are not one index of the policy's classes per request, or none are given and
            labels do not tell.
    """
    names = [each.name for each in policy.scenario.classes]
    found = getattr(getattr(classes, "workload", None), "names", None)
    if found is not None and list(found) != names:
        raise InvalidInput(
            f"replay: classes must be the Classification that the policy's workload was made from; it has the classes "
            f"{shorten(list(found))}, the policy {shorten(names)}"
        )
    if classes is not None:
        kind = np.asarray(getattr(classes, "assignment", classes))
        if kind.shape != (len(trace),) or kind.dtype.kind not in "iu" or not np.all((kind >= 0) & (kind < len(names))):
            raise InvalidInput(
                f"replay: classes must be a Classification of this trace, or its {len(trace):,} class numbers from 0 "
                f"to {len(names) - 1}; got shape {kind.shape} of {kind.dtype}"
            )
        return kind.astype(np.int64)
    if len(names) == 1:
        return np.zeros(len(trace), dtype=np.int64)
    if set(trace.labels) <= set(names) and trace.label is not None:
        place = {name: at for at, name in enumerate(names)}
        return np.array([place[str(label)] for label in trace.label], dtype=np.int64)
    raise InvalidInput(
        f"replay: the policy has {len(names)} classes and the trace's labels are not their names; give classes=, the "
        "Classification that the policy's workload was made from (fo.classify(trace, ...))"
    )
