"""The exact chain: states, transitions, seconds, memory, and scipy's LU on the same generator, as markdown."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from scipy.sparse.linalg import splu

from fluidopt.chain import enumerate_chain, stationary_law
from fluidopt.chain.states import GIB, Layout
from fluidopt.chain.stationary import likely_state
from fluidopt.reference import reference_model
from fluidopt.simulation.fleet import fleet_system
from fluidopt.simulation.system import System

COLUMNS = "chain states nnz build_s LU_s iterative_s splu_s iterative/splu difference estimated_GiB peak_GiB"
DIRECT_TIME_STATES = 120_000


def two_stages(gpus: int, slots: int) -> System:
    """One class in two stages, prefill-only GPUs and a decode-only GPU: a chain in the plane."""
    return System(
        arrival_rate=np.array([0.98 * gpus]),
        prompt_tokens=np.array([1.0]),
        output_tokens=np.array([slots / gpus]),
        abandonment_rate=np.array([0.002]),
        mode_chunk=np.array([1.0, 0.0, 0.0]),
        mode_time=np.array([1.0, np.nan, 1.0]),
        role_gpus=np.array([gpus, 1]),
        role_prefill_mode=np.array([0, -1]),
        role_rest_mode=np.array([1, 2]),
        role_decode_slots=np.array([0, slots]),
        role_slots=np.array([1, slots]),
        gate_slope=np.array([1.0]),
        gate_base=np.array([0.0]),
        gate_queue_target=np.array([0.0]),
        router_order=np.array([0, 1]),
        placement=0,
        prefill_reward=np.array([0.0]),
        decode_reward=np.array([1.0]),
    )


def layout_of(name: str) -> Layout:
    kind, *sizes = name.split()
    first, second, third, fourth = map(int, sizes)
    if kind == "tandem":
        return Layout(
            system=two_stages(first, second), prefill_queue_cap=third, decode_queue_cap=fourth, ordered_places=0
        )
    system = fleet_system(reference_model().solve().policy(gpus=first))
    return Layout(system=system, prefill_queue_cap=second, decode_queue_cap=third, ordered_places=fourth)


def spent(work: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def plain_lu(generator: Any) -> None:
    """scipy's LU with its minimum-degree ordering and its own defaults, a likely state pinned."""
    balance = generator.T.tocsc()
    keep = np.delete(np.arange(balance.shape[0]), likely_state(generator))
    splu(balance[keep][:, keep].tocsc(), permc_spec="MMD_AT_PLUS_A").solve(np.ones(keep.size))


def measure(name: str, answer: Any) -> None:
    enumerate_chain(layout_of("tandem 1 1 1 1"))  # compiles, unless cached
    stationary_law(enumerate_chain(layout_of("tandem 2 2 2 2"))[1], method="iterative")
    layout = layout_of(name)
    before = peak()
    build, (states, generator) = spent(lambda: enumerate_chain(layout))
    iterative, law = spent(lambda: stationary_law(generator, method="iterative"))
    memory = peak() - before
    row = [name, f"{len(states):,}", f"{generator.nnz:,}", f"{build:.2f}"]
    if len(states) > DIRECT_TIME_STATES:
        row += ["", f"{iterative:.2f}", "", "", ""]
    else:
        direct, other = spent(lambda: stationary_law(generator, method="direct"))
        scipy, _ = spent(lambda: plain_lu(generator))
        row += [f"{direct:.2f}", f"{iterative:.2f}", f"{scipy:.2f}", f"{iterative / scipy:.2f}"]
        row += [f"{np.abs(law - other).sum():.0e}"]
    answer.put([*row, f"{layout.memory() / GIB:.2f}", f"{memory:.2f}"])


# tandem: prefill GPUs, decode slots, caps of both queues; reference: GPUs, caps, places in order
CASES = (
    "tandem 1 10 100 90",
    "tandem 1 10 310 310",
    "tandem 1 10 1000 990",
    "reference 1 3 8 0",
    "reference 1 8 20 1",
    "reference 1 10 26 0",
)


def main() -> None:
    """Measure each case in a process of its own, for its peak memory; all, or those named on the command line."""
    columns = COLUMNS.split()
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    context = multiprocessing.get_context("spawn")
    for name in sys.argv[1:] or CASES:
        answer = context.Queue()
        process = context.Process(target=measure, args=(name, answer))
        process.start()
        row = answer.get(timeout=600)
        process.join()
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
