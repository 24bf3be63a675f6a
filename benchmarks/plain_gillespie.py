"""This module owns the baseline of the chain simulator: the direct method, written plainly, per GPU, compiled by numba.

Every event sums the rates of all transitions (per class, role and mode), draws one by a scan over them, and finds the
GPU by a scan over the fleet; every count is integrated at every event. It is what one writes first and it is correct,
so the kernel is compared with it, in speed here and in law by the tests. Run as a script it prints, side by side in one
process, the rates of both and how the kernel's rate depends on the numbers of classes and of GPUs.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

if __name__ == "__main__" and not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fluidopt.simulation.run import simulate
from fluidopt.simulation.system import Start, System


class PlainReplication(NamedTuple):
    """The counters of `fluidopt.simulation.system.Replication` under the same names, over the window."""

    events: int
    arrivals: npt.NDArray[np.int64]
    prefill_starts: npt.NDArray[np.int64]
    prefill_completions: npt.NDArray[np.int64]
    decode_starts: npt.NDArray[np.int64]
    decode_completions: npt.NDArray[np.int64]
    abandoned_prefill: npt.NDArray[np.int64]
    abandoned_decode: npt.NDArray[np.int64]
    prefill_queue_time: npt.NDArray[np.float64]
    decode_queue_time: npt.NDArray[np.float64]
    prefill_time: npt.NDArray[np.float64]
    decode_time: npt.NDArray[np.float64]
    reward: float


@njit(cache=True)
def _route(rng, free_slot, role, router_order):
    for r in router_order:
        free = 0
        for g in range(role.size):
            if role[g] == r and free_slot[g]:
                free += 1
        if free > 0:
            pick = rng.integers(0, free)
            for g in range(role.size):
                if role[g] == r and free_slot[g]:
                    if pick == 0:
                        return g
                    pick -= 1
    return -1


@njit(cache=True)
def _gate(key_base, key_slope, queue_target, running, queue):
    best = -1
    best_key = best_excess = 0.0
    for i in range(queue.size):
        if queue[i] == 0:
            continue
        key = key_base[i] + key_slope[i] * running[i]
        excess = queue[i] - queue_target[i]
        if best < 0 or key < best_key or (key == best_key and excess > best_excess):
            best, best_key, best_excess = i, key, excess
    return best


@njit(cache=True)
def _run(
    arrival_rate,
    abandonment_rate,
    prefill_rate,  # (R, I)
    decode_rate,  # (R, 2, I): without and with a prefill running
    role_gpus,
    can_prefill,
    decode_slots,
    slots,
    gate_slope,
    gate_base,
    gate_queue_target,
    router_order,
    horizon,
    warmup,
    rng,
):
    classes = arrival_rate.size
    roles = role_gpus.size
    gpus = role_gpus.sum()
    role = np.empty(gpus, np.int64)
    g = 0
    for r in range(roles):
        for _ in range(role_gpus[r]):
            role[g] = r
            g += 1

    prefill = np.full(gpus, -1, np.int64)  # class of the prefill running on each GPU
    decodes = np.zeros((gpus, classes), np.int64)
    load = np.zeros(gpus, np.int64)  # decodes of all classes
    free_slot = np.empty(gpus, np.bool_)
    for g in range(gpus):
        free_slot[g] = decode_slots[role[g]] > 0
    queue = np.zeros(classes, np.int64)
    buffer = np.empty(64, np.int64)  # classes in order of arrival
    buffered = 0
    buffer_count = np.zeros(classes, np.int64)
    in_prefill = np.zeros((roles, classes), np.int64)
    in_decode = np.zeros((roles, 2, classes), np.int64)
    running = np.zeros(classes, np.int64)

    count = np.zeros((7, classes), np.int64)
    queue_time = np.zeros((2, classes))
    prefill_time = np.zeros((roles, classes))
    decode_time = np.zeros((roles, classes))
    events = 0
    now = 0.0
    while True:
        total = 0.0
        for i in range(classes):
            total += arrival_rate[i] + abandonment_rate[i] * (queue[i] + buffer_count[i])
            for r in range(roles):
                total += in_prefill[r, i] * prefill_rate[r, i]
                total += in_decode[r, 0, i] * decode_rate[r, 0, i] + in_decode[r, 1, i] * decode_rate[r, 1, i]
        then = now + rng.exponential() / total
        span = min(then, horizon) - max(now, warmup)
        if span > 0.0:
            for i in range(classes):
                queue_time[0, i] += queue[i] * span
                queue_time[1, i] += buffer_count[i] * span
                for r in range(roles):
                    prefill_time[r, i] += in_prefill[r, i] * span
                    decode_time[r, i] += (in_decode[r, 0, i] + in_decode[r, 1, i]) * span
        if then >= horizon:
            break
        if now < warmup <= then:
            count[:] = 0
            events = 0
        now = then
        events += 1

        # 0 arrival, 1 and 2 abandonment of queue and of buffer, 3 prefill, 4 and 5 decode without and with a prefill
        u = rng.random() * total
        kind, i, r = -1, 0, 0
        for j in range(classes):
            i = j
            u -= arrival_rate[j]
            if u < 0.0:
                kind = 0
                break
            u -= abandonment_rate[j] * queue[j]
            if u < 0.0:
                kind = 1
                break
            u -= abandonment_rate[j] * buffer_count[j]
            if u < 0.0:
                kind = 2
                break
            for s in range(roles):
                r = s
                u -= in_prefill[s, j] * prefill_rate[s, j]
                if u < 0.0:
                    kind = 3
                    break
                u -= in_decode[s, 0, j] * decode_rate[s, 0, j]
                if u < 0.0:
                    kind = 4
                    break
                u -= in_decode[s, 1, j] * decode_rate[s, 1, j]
                if u < 0.0:
                    kind = 5
                    break
            if kind >= 0:
                break
        if kind < 0:
            continue  # rounding

        freed = -1
        if kind == 0:
            count[0, i] += 1
            queue[i] += 1
        elif kind == 1:
            count[5, i] += 1
            queue[i] -= 1
        elif kind == 2:
            count[6, i] += 1
            pick = rng.integers(0, buffer_count[i])
            place = 0
            while True:
                if buffer[place] == i:
                    if pick == 0:
                        break
                    pick -= 1
                place += 1
            buffer[place : buffered - 1] = buffer[place + 1 : buffered]
            buffered -= 1
            buffer_count[i] -= 1
        elif kind == 3:
            pick = rng.integers(0, in_prefill[r, i])
            for g in range(gpus):
                if role[g] == r and prefill[g] == i:
                    if pick == 0:
                        freed = g
                        break
                    pick -= 1
            count[2, i] += 1
            in_prefill[r, i] -= 1
            running[i] -= 1
            prefill[freed] = -1
            for j in range(classes):
                in_decode[r, 1, j] -= decodes[freed, j]
                in_decode[r, 0, j] += decodes[freed, j]
            free_slot[freed] = load[freed] < decode_slots[r] and load[freed] < slots[r]
            g = _route(rng, free_slot, role, router_order)
            if g >= 0:
                count[3, i] += 1
                decodes[g, i] += 1
                load[g] += 1
                busy = 0 if prefill[g] < 0 else 1
                in_decode[role[g], busy, i] += 1
                free_slot[g] = load[g] < decode_slots[role[g]] and load[g] + busy < slots[role[g]]
            else:
                if buffered == buffer.size:
                    longer = np.empty(2 * buffered, np.int64)
                    longer[:buffered] = buffer
                    buffer = longer
                buffer[buffered] = i
                buffered += 1
                buffer_count[i] += 1
        else:
            pick = rng.integers(0, in_decode[r, kind - 4, i])
            for g in range(gpus):
                if role[g] == r and (prefill[g] >= 0) == (kind == 5):
                    if pick < decodes[g, i]:
                        freed = g
                        break
                    pick -= decodes[g, i]
            count[4, i] += 1
            decodes[freed, i] -= 1
            load[freed] -= 1
            in_decode[r, kind - 4, i] -= 1
            busy = kind - 4
            free_slot[freed] = load[freed] < decode_slots[r] and load[freed] + busy < slots[r]

        while freed >= 0 and buffered > 0 and free_slot[freed]:
            j = buffer[0]
            buffer[: buffered - 1] = buffer[1:buffered]
            buffered -= 1
            buffer_count[j] -= 1
            count[3, j] += 1
            r = role[freed]
            busy = 0 if prefill[freed] < 0 else 1
            decodes[freed, j] += 1
            load[freed] += 1
            in_decode[r, busy, j] += 1
            free_slot[freed] = load[freed] < decode_slots[r] and load[freed] + busy < slots[r]

        while True:
            i = _gate(gate_base, gate_slope, gate_queue_target, running, queue)
            if i < 0:
                break
            idle = 0
            for g in range(gpus):
                if can_prefill[role[g]] and prefill[g] < 0 and load[g] < slots[role[g]]:
                    idle += 1
            if idle == 0:
                break
            pick = rng.integers(0, idle)
            for g in range(gpus):
                if can_prefill[role[g]] and prefill[g] < 0 and load[g] < slots[role[g]]:
                    if pick == 0:
                        break
                    pick -= 1
            r = role[g]
            queue[i] -= 1
            count[1, i] += 1
            running[i] += 1
            in_prefill[r, i] += 1
            prefill[g] = i
            for j in range(classes):
                in_decode[r, 0, j] -= decodes[g, j]
                in_decode[r, 1, j] += decodes[g, j]
            free_slot[g] = load[g] < decode_slots[r] and load[g] + 1 < slots[r]
    return events, count, queue_time, prefill_time, decode_time


def plain_simulate(system: System, *, horizon: float, warmup: float, rng: np.random.Generator) -> PlainReplication:
    """One replication from the empty fleet by the direct method; prefills go to a uniformly chosen idle GPU.

    Raises:
        ValueError: the system asks for another placement or another policy.
    """
    if system.placement != 0:
        raise ValueError(f"plain_simulate places prefills uniformly. Got placement {system.placement!r} instead.")
    ruled = system.gate_fcfs or system.gate_first or system.role_stays.any() or np.isfinite(system.gate_hold).any()
    if ruled or system.sides > 1:
        raise ValueError("plain_simulate knows gate-and-route and prioritize-and-route only")
    events, count, queue_time, prefill_time, decode_time = _run(
        system.arrival_rate,
        system.abandonment_rate,
        system.prefill_rates(),
        system.decode_speeds()[:, :, None] / system.output_tokens,
        system.role_gpus,
        system.role_prefill_mode >= 0,
        system.role_decode_slots,
        system.role_slots,
        system.gate_slope,
        system.gate_base,
        system.gate_queue_target,
        system.router_order,
        horizon,
        warmup,
        rng,
    )
    reward = count[2] @ system.prefill_reward + count[4] @ system.decode_reward
    return PlainReplication(events, *count, *queue_time, prefill_time, decode_time, float(reward))


def reference_system(gpus: int) -> System:
    """The two-class instance of [L26], sections 6.1-6.2, under gate-and-route with the partition of its fluid plan."""
    prompt, output = np.array([300.0, 3000.0]), np.array([1000.0, 400.0])
    prefill_share, queue_share = np.array([0.018261, 0.194953]), np.array([0.316687, 0.0])
    mixed = math.ceil(gpus * 0.213214)
    return System(
        arrival_rate=np.full(2, 0.5 * gpus),
        prompt_tokens=prompt,
        output_tokens=output,
        abandonment_rate=np.full(2, 0.1),
        mode_chunk=np.array([256.0, 0.0]),
        mode_time=np.array([0.0174 + 6.2e-5 * 256, 0.022]),
        role_gpus=np.array([mixed, gpus - mixed]),
        role_prefill_mode=np.array([0, -1]),
        role_rest_mode=np.array([1, 1]),
        role_decode_slots=np.array([15, 16]),
        role_slots=np.array([16, 16]),
        gate_slope=1.0 / prefill_share,
        gate_base=np.zeros(2),
        gate_queue_target=gpus * queue_share,
        router_order=np.array([1, 0]),
        placement=0,
        prefill_reward=np.zeros(2),
        decode_reward=0.1 * prompt + 0.2 * output,
    )


def many_class_system(gpus: int, classes: int, seed: int = 0) -> System:
    """Classes of random sizes and shares on a fleet at 95 % of its decode and 90 % of its prefill capacity."""
    rng = np.random.default_rng(seed)
    prompt = np.exp(rng.uniform(np.log(200), np.log(3000), classes))
    output = np.exp(rng.uniform(np.log(200), np.log(1500), classes))
    share = rng.dirichlet(np.full(classes, 2.0))
    mix_time, solo_time = 0.0174 + 6.2e-5 * 256, 0.022
    prefill_work = share @ prompt * mix_time / 256  # GPU-seconds of prefill per request
    decode_work = share @ output
    speed = 0.9 * 15 / mix_time + 0.1 * 16 / solo_time  # of a mixed GPU that prefills 90 % of the time
    mixed_per_rate = prefill_work / 0.9
    rate = 0.95 * gpus * 16 / solo_time / (decode_work + 0.95 * mixed_per_rate * (16 / solo_time - speed))
    mixed = math.ceil(rate * mixed_per_rate)
    prefill_load = rate * share * prompt * mix_time / 256
    return System(
        arrival_rate=rate * share,
        prompt_tokens=prompt,
        output_tokens=output,
        abandonment_rate=rng.uniform(0.05, 0.2, classes),
        mode_chunk=np.array([256.0, 0.0]),
        mode_time=np.array([mix_time, solo_time]),
        role_gpus=np.array([mixed, gpus - mixed]),
        role_prefill_mode=np.array([0, -1]),
        role_rest_mode=np.array([1, 1]),
        role_decode_slots=np.array([15, 16]),
        role_slots=np.array([16, 16]),
        gate_slope=gpus / prefill_load,
        gate_base=np.zeros(classes),
        gate_queue_target=np.zeros(classes),
        router_order=np.array([1, 0]),
        placement=0,
        prefill_reward=np.zeros(classes),
        decode_reward=0.1 * prompt + 0.2 * output,
    )


def _kernel_rate(system: System, events: float, start: Start | None = None) -> float:
    """Events/s of the kernel, set-up excluded, best of three."""
    rates = []
    horizon = events / (3.0 * system.arrival_rate.sum())
    for seed in range(3):
        seconds, done = [], []
        for part in (1.0, 1e-6):
            began = time.perf_counter()
            seen = simulate(
                system,
                start or Start.empty(system),
                horizon=part * horizon,
                warmup=0.0,
                rng=np.random.default_rng(seed),
            )
            seconds.append(time.perf_counter() - began)
            done.append(seen.events)
        rates.append((done[0] - done[1]) / (seconds[0] - seconds[1]))
    return max(rates)


def _plain_rate(system: System, events: float) -> float:
    horizon = events / (3.0 * system.arrival_rate.sum())
    rates = []
    for seed in range(3):
        began = time.perf_counter()
        seen = plain_simulate(system, horizon=horizon, warmup=0.0, rng=np.random.default_rng(seed))
        rates.append(seen.events / (time.perf_counter() - began))
    return max(rates)


def _settled(system: System) -> Start:
    """A state near the stationary regime."""
    rng = np.random.default_rng(0)
    return simulate(system, Start.empty(system), horizon=60.0, warmup=0.0, rng=rng).at_end


def main() -> None:
    small = reference_system(5)
    began = time.perf_counter()
    simulate(small, Start.empty(small), horizon=1.0, warmup=0.0, rng=np.random.default_rng(0))
    print(f"kernel, first call (compiles unless cached): {time.perf_counter() - began:.1f} s")
    plain_simulate(small, horizon=1.0, warmup=0.0, rng=np.random.default_rng(0))

    print(f"{'system':34s} {'kernel, M events/s':>20s} {'plain, M events/s':>20s} {'ratio':>8s}")
    for label, system, plain_events in (
        ("reference, I=2, n=5", reference_system(5), 1e6),
        ("reference, I=2, n=50", reference_system(50), 1e6),
        ("reference, I=2, n=500", reference_system(500), 1e6),
        ("random, I=2, n=500", many_class_system(500, 2), 1e6),
        ("random, I=1000, n=500", many_class_system(500, 1000), 5e4),
    ):
        kernel = _kernel_rate(system, 4e6, _settled(system)) / 1e6
        plain = _plain_rate(system, plain_events) / 1e6
        print(f"{label:34s} {kernel:20.2f} {plain:20.3f} {kernel / plain:8.1f}")

    print("scaling of the kernel:")
    pairs = (
        ("I=1000 against I=2, n=500", many_class_system(500, 1000), many_class_system(500, 2)),
        ("n=100,000 against n=50, I=2", reference_system(100_000), reference_system(50)),
        ("both", many_class_system(100_000, 1000), many_class_system(50, 2)),
    )
    for label, large, little in pairs:
        rates = [_kernel_rate(system, 4e6, _settled(system)) / 1e6 for system in (large, little)]
        print(f"{label:34s} {rates[0]:20.2f} {rates[1]:20.2f} {rates[0] / rates[1]:8.2f}")


if __name__ == "__main__":
    main()
