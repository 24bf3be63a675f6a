"""The replay of traces: requests per second by fleet, size and tokens, and an engine that walks every iteration."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__" and not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
from engine_by_steps import serve

from fluidopt.data import azure_2023_summary
from fluidopt.model import FluidModel
from fluidopt.reference import reference_model
from fluidopt.serving import EngineFleet, Replay, replay
from fluidopt.traces import Trace, classify

COLUMNS = "requests GPUs fleet tokens/request seconds requests/s events/request peak_MiB"


def stream(count: int, *, tokens: float = 1.0, seed: int = 1) -> Trace:
    """Poisson arrivals at the rate and with the classes of the embedded production traces, lengths exponential."""
    rng = np.random.default_rng(seed)
    classes = azure_2023_summary()["lengths"]["classes"]
    rate = np.array([each["arrival_rate"] for each in classes])
    kind = rng.choice(rate.size, count, p=rate / rate.sum())
    prompt, output = (
        np.ceil(tokens * np.array([each[name] for each in classes])[kind] * rng.exponential(size=count))
        for name in ("prompt_tokens", "output_tokens")
    )
    duration = count / rate.sum()
    arrival = np.sort(rng.uniform(0, duration, count))
    return Trace(arrival, prompt.astype(np.int64), output.astype(np.int64), observation_time=duration)


def best_of(work: Callable[[], Replay], times: int = 3) -> tuple[float, Replay]:
    """The shortest of a few runs, after one that compiles."""
    result = work()
    spent = []
    for _ in range(times):
        begin = time.perf_counter()
        result = work()
        spent.append(time.perf_counter() - begin)
    return min(spent), result


def row(trace: Trace, gpus: int, fleet: str, seconds: float, result: Replay | None) -> None:
    """Print one line of the table."""
    tokens = (trace.prompt_tokens + trace.output_tokens).mean()
    events = f"{result.events / len(trace):.1f}" if result else "one per iteration"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cells = (f"{len(trace):,}", f"{gpus:,}", fleet, f"{tokens:,.0f}", f"{seconds:.3g}")
    print("|", " | ".join((*cells, f"{len(trace) / seconds:,.0f}", events, f"{peak:,.0f}")), "|")


def main() -> None:
    """Print the table, then what tokens, GPUs and iterations cost relative to each other."""
    scenario = reference_model().scenario
    (gpu,) = scenario.gpu_types
    print("|", COLUMNS.replace(" ", " | "), "|")
    print("|", " | ".join("---" for _ in COLUMNS.split()), "|")
    hour = stream(28_185)
    times = {}
    for gpus in (50, 5_000):
        found = classify(hour, 5, abandonment_rate=0.05)
        model = FluidModel(found.workload.per_gpu(gpus), gpu, prices=scenario.prices)
        plan = model.solve()
        for kind in ("gate-and-route", "FI-WSP"):
            policy = plan.policy(gpus=gpus, kind=kind)  # type: ignore[arg-type]
            seconds, result = best_of(lambda p=policy, c=found: replay(hour, p, classes=c))  # type: ignore[misc]
            row(hour, gpus, kind, seconds, result)
            times[gpus, kind] = seconds
    for factor in (1, 10, 100):
        trace = stream(28_185, tokens=factor)
        larger = replace(gpu, chunk_size=gpu.chunk_size * factor)
        curve = replace(gpu.curve, beta=gpu.curve.beta / factor, alpha=gpu.curve.alpha / factor)  # type: ignore[union-attr]
        shorter = replace(larger, curve=replace(curve, solo=gpu.curve.solo / factor))  # type: ignore[union-attr]
        seconds, result = best_of(lambda t=trace, g=shorter: replay(t, EngineFleet.like(g, gpus=50)))  # type: ignore[misc]
        row(trace, 50, "engines", seconds, result)
        times[factor] = seconds
    million = stream(1_000_000)
    seconds, result = best_of(lambda: replay(million, EngineFleet.like(gpu, gpus=50)), times=1)
    row(million, 50, "engines", seconds, result)
    part = stream(300)
    fleet = EngineFleet.like(gpu)
    quick, result = best_of(lambda: replay(part, fleet))
    row(part, 1, "engine", quick, result)
    begin = time.perf_counter()
    first, _, _ = serve(part, fleet.engine, fleet.curve.grid())
    plain = time.perf_counter() - begin
    row(part, 1, "plain Python, every iteration", plain, None)
    print()
    print(
        f"A hundred times the tokens at the same load take {times[100] / times[1]:.2f} times as long, a hundred times "
        f"the GPUs {times[5_000, 'FI-WSP'] / times[50, 'FI-WSP']:.1f} times; walking through every iteration in plain "
        f"Python takes {plain / quick:,.0f} times as long and agrees to "
        f"{np.abs(first - result.first_token).max():.0e} s."
    )


if __name__ == "__main__":
    main()
