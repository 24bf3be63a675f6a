"""The simulator against Ciw and SimPy on queues that all three can express: the same law, then events per second.

The queues are Erlang's with abandonment, M/M/c+M, and a prefill station followed by a decode station, with patience
running out at either. The second is a fleet whose decodes run at one speed, beside a prefill or not: M GPUs with one
prefill and B - 1 decodes each, the others with B decodes. The first is a fleet whose prefills take no time. Before a
rate is reported, the mean numbers waiting and in service that each simulator found are compared with the exact law:
that of the birth-death chain for one station, that of the exact chain for two, there of another fleet which is the same
queue (prefill-only GPUs, and all decode slots on one more).
"""

from __future__ import annotations

import importlib.util
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
from scipy import stats

from benchmarks.chain import two_stages
from fluidopt.chain import exact_chain
from fluidopt.simulation.run import simulate
from fluidopt.simulation.system import Start, System

FloatArray = npt.NDArray[np.float64]

INSTANT = 1e9
"""Prefills/s of a queue that has no prefill station: what waits there is negligible."""

REPLICATIONS = 8
CONFIDENCE = 1 - 1e-4
"""Of each comparison with the exact law before a table is printed; there are some fifty."""


@dataclass(frozen=True, kw_only=True)
class Queue:
    """A fleet of one class whose iterations all take 1 s, seen as stations in series.

    Attributes:
        arrival_rate: requests/s, of the fleet.
        abandonment_rate: of whoever waits, at either station, 1/s.
        prefill_gpus, decode_gpus: GPUs that run a prefill and `batch_size` - 1 decodes, and `batch_size` decodes.
        batch_size: B.
        prefill_rate, decode_rate: 1/s, of one request in service.
    """

    arrival_rate: float
    abandonment_rate: float
    prefill_gpus: int
    decode_gpus: int
    batch_size: int
    prefill_rate: float = INSTANT
    decode_rate: float = 1.0

    @property
    def slots(self) -> int:
        """Decodes that the fleet runs at most."""
        return self.prefill_gpus * (self.batch_size - 1) + self.decode_gpus * self.batch_size

    @property
    def stations(self) -> tuple[tuple[int, float], ...]:
        """Servers and service rate of each station; an instant prefill is none."""
        both = (self.prefill_gpus, self.prefill_rate), (self.slots, self.decode_rate)
        return both if self.prefill_rate < INSTANT else both[1:]

    @property
    def settled_after(self) -> float:
        """Seconds after which an empty start is forgotten, but for exp(-10) of it."""
        return 10.0 / self.decode_rate

    def system(self) -> System:
        """The fleet."""
        return System(
            arrival_rate=np.array([self.arrival_rate]),
            prompt_tokens=np.array([1.0 / self.prefill_rate]),
            output_tokens=np.array([1.0 / self.decode_rate]),
            abandonment_rate=np.array([self.abandonment_rate]),
            mode_chunk=np.array([1.0, 0.0]),
            mode_time=np.array([1.0, 1.0]),
            role_gpus=np.array([self.prefill_gpus, self.decode_gpus]),
            role_prefill_mode=np.array([0, -1]),
            role_rest_mode=np.array([1, 1]),
            role_decode_slots=np.array([self.batch_size - 1, self.batch_size]),
            role_slots=np.array([self.batch_size, self.batch_size]),
            gate_slope=np.array([1.0]),
            gate_base=np.array([0.0]),
            gate_queue_target=np.array([0.0]),
            router_order=np.array([1, 0]),
            placement=0,
            prefill_reward=np.array([0.0]),
            decode_reward=np.array([1.0]),
        )


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one run of a queue of S stations found.

    Attributes:
        waiting, busy: (S,) mean numbers waiting and in service in the window. Of Ciw and SimPy they are the times that
            ended in the window over its length, which in the stationary regime has the same mean (Little's law).
        events: arrivals, ends of service and abandonments at the stations. Of the simulator here those of the window
            alone, and not the instant prefills, which it has nonetheless to run: its rate comes out too low.
        seconds: the run took, with its warm-up and without reading the answer off it.
    """

    waiting: FloatArray
    busy: FloatArray
    events: int
    seconds: float


def run_fluidopt(queue: Queue, *, horizon: float, warmup: float, seed: int) -> Seen:
    """The fleet in the compiled simulator."""
    system, rng = queue.system(), np.random.default_rng(seed)
    began = time.perf_counter()
    seen = simulate(system, Start.empty(system), horizon=horizon, warmup=warmup, rng=rng)
    seconds = time.perf_counter() - began
    stations = len(queue.stations)
    waiting = np.array([seen.prefill_queue_time.sum(), seen.decode_queue_time.sum()])[-stations:]
    busy = np.array([seen.prefill_time.sum(), seen.decode_time.sum()])[-stations:]
    events = seen.events - (0 if stations == 2 else int(seen.prefill_completions.sum()))
    return Seen(waiting=waiting / seen.window, busy=busy / seen.window, events=events, seconds=seconds)


def run_ciw(queue: Queue, *, horizon: float, warmup: float, seed: int) -> Seen:
    """A Ciw network of nodes with reneging."""
    import ciw

    def exponential(rate: float) -> Any:
        return ciw.dists.Exponential(rate=rate)

    count = len(queue.stations)
    network = ciw.create_network(
        arrival_distributions=[exponential(queue.arrival_rate)] + [None] * (count - 1),
        service_distributions=[exponential(rate) for _, rate in queue.stations],
        number_of_servers=[servers for servers, _ in queue.stations],
        routing=np.eye(count, k=1).tolist(),
        reneging_time_distributions=[exponential(queue.abandonment_rate)] * count,
    )
    ciw.seed(seed)
    simulation = ciw.Simulation(network)
    began = time.perf_counter()
    simulation.simulate_until_max_time(horizon)
    seconds = time.perf_counter() - began
    records = simulation.get_all_records(only=["service", "renege"])
    waiting, busy = np.zeros(count), np.zeros(count)
    for record in records:
        served = record.record_type == "service"
        stopped_waiting = record.service_start_date if served else record.exit_date
        if stopped_waiting >= warmup:
            waiting[record.node - 1] += record.waiting_time
        if served and record.service_end_date >= warmup:
            busy[record.node - 1] += record.service_time
    window = horizon - warmup
    events = len(simulation.get_all_individuals()) + len(records)
    return Seen(waiting=waiting / window, busy=busy / window, events=events, seconds=seconds)


def run_simpy(queue: Queue, *, horizon: float, warmup: float, seed: int) -> Seen:
    """A SimPy process per request, which waits for a resource or for its patience, whichever is first."""
    import simpy

    draw = random.Random(seed).expovariate
    environment = simpy.Environment()
    stations = [simpy.Resource(environment, capacity=servers) for servers, _ in queue.stations]
    waiting, busy = np.zeros(len(stations)), np.zeros(len(stations))
    events = 0

    def visit() -> Iterator[Any]:
        nonlocal events
        for at, (station, (_, rate)) in enumerate(zip(stations, queue.stations, strict=True)):
            with station.request() as turn:
                joined = environment.now
                if not turn.triggered:
                    yield turn | environment.timeout(draw(queue.abandonment_rate))
                    if environment.now >= warmup:
                        waiting[at] += environment.now - joined
                    if not turn.triggered:
                        events += 1
                        return
                service = draw(rate)
                yield environment.timeout(service)
                events += 1
                if environment.now >= warmup:
                    busy[at] += service

    def arrivals() -> Iterator[Any]:
        nonlocal events
        while True:
            yield environment.timeout(draw(queue.arrival_rate))
            events += 1
            environment.process(visit())

    environment.process(arrivals())
    began = time.perf_counter()
    environment.run(until=horizon)
    seconds = time.perf_counter() - began
    window = horizon - warmup
    return Seen(waiting=waiting / window, busy=busy / window, events=events, seconds=seconds)


Simulator = Callable[..., Seen]
SIMULATORS: dict[str, tuple[Simulator, int]] = {
    "fluidopt": (run_fluidopt, 4_000_000),
    "simpy": (run_simpy, 100_000),
    "ciw": (run_ciw, 100_000),
}
"""By the module that each needs: how to run it, and about how many events after the warm-up, a few seconds' work."""

QUEUES = {
    "M/M/7+M": Queue(arrival_rate=7.7, abandonment_rate=1.0, prefill_gpus=1, decode_gpus=3, batch_size=2),
    "M/M/159+M": Queue(arrival_rate=160.0, abandonment_rate=1.0, prefill_gpus=1, decode_gpus=9, batch_size=16),
    "2 prefills, then 10 decodes": Queue(
        arrival_rate=11.0, abandonment_rate=1.0, prefill_gpus=2, decode_gpus=1, batch_size=4, prefill_rate=5.5
    ),
    "5 prefills, then 315 decodes": Queue(
        arrival_rate=330.0, abandonment_rate=1.0, prefill_gpus=5, decode_gpus=15, batch_size=16, prefill_rate=66.0
    ),
}


def installed() -> list[str]:
    """The simulators that can run here."""
    return [name for name in SIMULATORS if importlib.util.find_spec(name)]


def erlang_a(queue: Queue, servers: int, service_rate: float) -> tuple[float, float]:
    """Mean numbers waiting and in service at a station that the fleet's arrivals come to, M/M/c+M."""
    size = servers + int(10 * (1 + queue.arrival_rate / queue.abandonment_rate))  # beyond it, e**-100 or less
    level = np.arange(size)
    leave = np.minimum(level, servers) * service_rate + np.maximum(level - servers, 0) * queue.abandonment_rate
    log = np.concatenate([[0.0], np.cumsum(np.log(queue.arrival_rate) - np.log(leave[1:]))])
    law = np.exp(log - log.max())
    law /= law.sum()
    return float(law @ np.maximum(level - servers, 0)), float(law @ np.minimum(level, servers))


def exact_means(queue: Queue) -> FloatArray:
    """Mean numbers waiting, (S,), and in service, (S,), one after the other."""
    if len(queue.stations) == 1:
        return np.array(erlang_a(queue, *queue.stations[0]))
    plane = replace(
        two_stages(queue.prefill_gpus, queue.slots),
        arrival_rate=np.array([queue.arrival_rate]),
        prompt_tokens=np.array([1.0 / queue.prefill_rate]),
        output_tokens=np.array([1.0 / queue.decode_rate]),
        abandonment_rate=np.array([queue.abandonment_rate]),
    )
    means = exact_chain(plane).means
    return np.array([each.sum() for each in (means.prefill_queue, means.decode_queue, means.prefill, means.decode)])


def run(name: str, queue: Queue, *, events: float, seed: int) -> Seen:
    """One run of about so many events after the warm-up."""
    warmup = queue.settled_after
    horizon = warmup + events / (queue.arrival_rate * (1 + len(queue.stations)))
    return SIMULATORS[name][0](queue, horizon=horizon, warmup=warmup, seed=seed)


def errors(seen: Sequence[Seen], exact: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Deviations of the means from the exact ones, and their standard errors, in the order of `exact_means`."""
    found = np.array([np.concatenate([each.waiting, each.busy]) for each in seen])
    return found.mean(axis=0) - exact, found.std(axis=0, ddof=1) / np.sqrt(len(seen))


def check(name: str, label: str, seen: Sequence[Seen], exact: FloatArray) -> None:
    """Stop if a simulator does not simulate this queue.

    Raises:
        RuntimeError: a mean lies outside its confidence interval.
    """
    deviation, error = errors(seen, exact)
    allowed = stats.t.ppf(0.5 + CONFIDENCE / 2, len(seen) - 1) * error
    if np.any(np.abs(deviation) > allowed):
        raise RuntimeError(f"{name} on {label}: {deviation} off the exact means {exact}; the intervals allow {allowed}")


def main() -> None:
    """Print the table, or which extra is needed for it."""
    missing = sorted(set(SIMULATORS) - set(installed()))
    if missing:
        print(f"Not run: {' and '.join(missing)} not installed. They come with the extra peers: fluidopt[peers].")
        return
    for queue in QUEUES.values():
        run("fluidopt", queue, events=1e3, seed=0)  # compiles, unless cached
    columns = [
        "queue",
        "simulator",
        "exact mean waiting",
        "found",
        "events per run",
        "1,000 events/s",
        "fluidopt over it",
    ]
    print("| " + " | ".join(columns) + " |\n|---|---|" + "---:|" * 5)
    quantile = stats.t.ppf(0.975, REPLICATIONS - 1)
    for label, queue in QUEUES.items():
        exact = exact_means(queue)
        seen: dict[str, list[Seen]] = {name: [] for name in SIMULATORS}
        for seed in range(REPLICATIONS):  # in turn, so that all meet the same machine
            for name, (_, events) in SIMULATORS.items():
                seen[name].append(run(name, queue, events=events, seed=seed))
        rates = {name: np.median([each.events / each.seconds for each in runs]) for name, runs in seen.items()}
        for name, runs in seen.items():
            check(name, label, runs, exact)
            deviation, error = errors(runs, exact)
            waiting = slice(len(queue.stations))
            found = [
                f"{mean:.3f} ± {half:.3f}"
                for mean, half in zip((exact + deviation)[waiting], (quantile * error)[waiting], strict=True)
            ]
            row = [label, name, ", ".join(f"{mean:.3f}" for mean in exact[waiting]), ", ".join(found)]
            row += [f"{np.mean([each.events for each in runs]):,.0f}", f"{rates[name] / 1e3:,.1f}"]
            print("| " + " | ".join([*row, f"{rates['fluidopt'] / rates[name]:,.0f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
