"""What an optimal policy does, in words and as a map over two coordinates of the state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt

from fluidopt.chain.control import DECODE, PREFILL, TURN_AWAY, ControlledChain
from fluidopt.chain.dynamic import Solution
from fluidopt.errors import InvalidInput
from fluidopt.simulation.system import FloatArray, IntArray
from fluidopt.tables import MISSING, shorten

if TYPE_CHECKING:
    import pandas as pd

DecisionKind = Literal["admit", "route"]
NOTHING = {"admit": "hold", "route": "wait"}
ALWAYS = 0.995
"""From this share on, a decision counts as the only one of its cell."""


def steps(
    chain: ControlledChain, solution: Solution, numbers: IntArray
) -> Iterator[tuple[IntArray, IntArray, IntArray, IntArray]]:
    """The actions taken from states, first the first of each, then the second of those that have one, and so on.

    Yields places in `numbers`, then kind, class and GPU configuration of the action (`ControlledChain.unravel`).
    """
    places, now = np.arange(numbers.size), numbers
    while True:
        acts = solution.choice[now] >= 0
        places, now = places[acts], now[acts]
        if places.size == 0:
            return
        at = chain.actions.indptr[now] + solution.choice[now]
        yield places, *chain.unravel(chain.actions.data[at])
        now = chain.actions.indices[at]


def turning_away(chain: ControlledChain, solution: Solution) -> npt.NDArray[np.bool_]:
    """(S,) whether the controller turns somebody away in a state."""
    above = np.flatnonzero(chain.above)
    turned = np.zeros(len(chain), dtype=np.bool_)
    for places, kind, _, _ in steps(chain, solution, above):
        turned[above[places[kind == TURN_AWAY]]] = True
    return turned


def decision_text(
    chain: ControlledChain, solution: Solution, number: int, *, classes: Sequence[str], roles: Sequence[str]
) -> str:
    """All that the policy does in a state, in words."""
    role_of = chain.space.configurations.roles()
    did = []
    for _, (kind,), (i,), (c,) in steps(chain, solution, np.array([number])):
        name = classes[i]
        if kind == TURN_AWAY:
            did.append(f"turn away {name}")
        else:
            decodes = ", ".join(f"{count} {each}" for each, count in _decodes(chain, int(c), classes))
            beside = f" beside {decodes}" if decodes else ""
            running = int(chain.space.configurations.prefill[c])
            if running >= 0:
                beside += f"{' and' if beside else ' beside'} a prefill of {classes[running]}"
            what = "start" if kind == PREFILL else "seat"
            did.append(f"{what} {name} on {roles[role_of[c]]}{beside}")
    return "; ".join(did) or "wait"


def _decodes(chain: ControlledChain, configuration: int, classes: Sequence[str]) -> list[tuple[str, int]]:
    counts = chain.space.configurations.decodes[configuration].tolist()
    return [(name, count) for name, count in zip(classes, counts, strict=True) if count]


def decision_map(
    chain: ControlledChain,
    solution: Solution,
    flow: FloatArray,
    *,
    rows: str,
    columns: str,
    of: DecisionKind,
    where: Mapping[str, int],
    classes: Sequence[str],
    roles: Sequence[str],
) -> pd.DataFrame:
    """See `OptimalPolicy.decision_map`; `flow` (S,) is how often events lead to each state, 1/s."""
    import pandas as pd

    if of not in get_args(DecisionKind):
        raise InvalidInput(f"decision_map: of must be one of {', '.join(get_args(DecisionKind))}; got {of!r}")
    kind = PREFILL if of == "admit" else DECODE
    codes, _, _ = chain.unravel(chain.actions.data)
    open_to = np.unique(np.repeat(np.arange(len(chain)), np.diff(chain.actions.indptr))[codes == kind])
    numbers = open_to[flow[open_to] > 0]
    found = coordinates(chain, numbers, classes)
    for name in (rows, columns, *where):
        if name not in found:
            raise InvalidInput(
                f"decision_map: a coordinate must be one of {shorten(list(found), most=40)}; got {name!r}"
            )
    kept = np.all([found[name] == value for name, value in where.items()], axis=0) if where else slice(None)
    numbers = numbers[kept]
    table = pd.DataFrame(
        {
            "row": found[rows][kept],
            "column": found[columns][kept],
            "decision": _labels(chain, solution, numbers, kind, classes, roles),
            "flow": flow[numbers],
        }
    )
    met = table.groupby(["row", "column", "decision"], sort=True)["flow"].sum().reset_index()
    met["share"] = met["flow"] / met.groupby(["row", "column"])["flow"].transform("sum")
    most = met.sort_values("share", kind="stable").groupby(["row", "column"]).tail(1)
    cells = [
        name if share >= ALWAYS else f"{name} {100 * share:.0f} %"
        for name, share in zip(most["decision"], most["share"], strict=True)
    ]
    shown = most.assign(cell=cells).pivot_table(index="row", columns="column", values="cell", aggfunc="first")
    return shown.fillna(MISSING).rename_axis(index=rows, columns=columns)


def _labels(
    chain: ControlledChain,
    solution: Solution,
    numbers: IntArray,
    kind: int,
    classes: Sequence[str],
    roles: Sequence[str],
) -> list[str]:
    """The decision in each state: what starts, or who is seated where."""
    c = chain.space.configurations
    places = (
        [""] if kind == PREFILL else [f" to {name}{beside}" for name in roles for beside in ("", " with a prefill")]
    )
    counts = np.zeros((numbers.size, len(classes) * len(places)), dtype=np.int64)
    for at, kinds, i, configuration in steps(chain, solution, numbers):
        place = 2 * c.roles()[configuration] + (c.prefill[configuration] >= 0) if kind == DECODE else 0
        mine = kinds == kind
        np.add.at(counts, (at[mine], (i * len(places) + place)[mine]), 1)
    different, which = np.unique(counts, axis=0, return_inverse=True)
    names = [name + place for name in classes for place in places]
    nothing = NOTHING["admit" if kind == PREFILL else "route"]
    told = [
        " + ".join(name if count == 1 else f"{count} {name}" for name, count in zip(names, row, strict=True) if count)
        for row in different.tolist()
    ]
    return [told[k] or nothing for k in np.ravel(which)]


def coordinates(chain: ControlledChain, numbers: IntArray, classes: Sequence[str]) -> dict[str, IntArray]:
    """Coordinates of states by name, each of the shape of `numbers`."""
    s, c, layout = chain.space.layout.system, chain.space.configurations, chain.space.layout
    digits = chain.space.keys[numbers, None] // layout.multipliers % np.array(layout.radices())
    gpus = digits[:, : s.gpus] + c.first[np.repeat(np.arange(s.roles), s.role_gpus)]
    (_, queue), (_, buffer) = layout.starts
    found = {
        "prefill_queue": chain.waiting[numbers, 0],
        "decode_queue": chain.waiting[numbers, 1],
        "free_decode_slots": c.room[gpus].sum(axis=1),
        "idle_prefill_gpus": c.idle[gpus].sum(axis=1),
    }
    for i, name in enumerate(classes):
        found[f"prefill_queue[{name}]"] = digits[:, queue + i]
        found[f"decode_queue[{name}]"] = digits[:, buffer + i]
        found[f"prefill[{name}]"] = (c.prefill[gpus] == i).sum(axis=1)
        found[f"decode[{name}]"] = c.decodes[gpus, i].sum(axis=1)
    return found
