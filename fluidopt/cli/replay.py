"""The command that sends recorded requests through a simulated fleet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fluidopt.cli.options import (
    KINDS,
    BatchSize,
    ChunkSize,
    Classes,
    Columns,
    Json,
    KvTokens,
    Patience,
    Seed,
    Template,
    Traces,
    among,
    columns_of,
    gpu_names,
    gpu_types,
)
from fluidopt.cli.output import frame_data, print_json, print_sentence, print_table, terminal, writing
from fluidopt.errors import InvalidInput

if TYPE_CHECKING:
    from fluidopt.contention import GPU
    from fluidopt.serving import Replay
    from fluidopt.traces import Classification, Trace
    from fluidopt.workload import TokenPrices

ENGINE = "engine"
BLOCK = 16
SHOWN = {"ttft": "TTFT, s", "tpot": "TPOT, s", "e2e": "end to end, s"}


def replay(
    inputs: Traces,
    gpus: Annotated[int, typer.Option(help="Number of GPUs in the fleet.")],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            help="engine (vLLM's scheduler, the default), or a kind of policy; may be repeated.",
            autocompletion=among((ENGINE, *KINDS)),
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME", help="A GPU that ships with the package.", autocompletion=gpu_names),
    ] = None,
    column: Columns = None,
    template: Template = None,
    batch_size: BatchSize = None,
    chunk_size: ChunkSize = None,
    kv_tokens: KvTokens = None,
    classes: Classes = None,
    abandonment_rate: Patience = 0.0,
    ttft: Annotated[float | None, typer.Option(help="Time to first token to be met, s.")] = None,
    tpot: Annotated[float | None, typer.Option(help="Time per output token to be met, s.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write every request's times there.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Replay recorded requests on a fleet, iteration by iteration: TTFT, TPOT, throughput, and who met the limits.

    The GPU comes from --gpu, or from the scenario of --with; default: Qwen-8B on an A100.

    Example: fluidopt replay requests.csv --gpus 4 --ttft 2 --tpot 0.05
    """
    from fluidopt.traces import classify, read_trace

    kinds = list(dict.fromkeys(policy or [ENGINE]))
    if csv is not None and len(kinds) > 1:
        raise InvalidInput(f"--csv goes with one --policy; got {len(kinds)}")
    if kv_tokens is not None and kv_tokens < BLOCK:
        raise InvalidInput(f"--kv-tokens must be at least {BLOCK}, one block of the KV cache; got {kv_tokens}")
    types, prices = gpu_types([gpu] if gpu else None, template, batch_size, chunk_size)
    if len(types) > 1:
        raise InvalidInput(f"replay: the scenario has {len(types)} GPU types; give one, or use --gpu")
    trace = read_trace(inputs, columns=columns_of(column))
    planned = [kind for kind in kinds if kind != ENGINE]
    found = classify(trace, classes, abandonment_rate=abandonment_rate) if planned else None
    results = {kind: _replayed(kind, trace, found, types[0], prices, gpus, kv_tokens, seed) for kind in kinds}
    if csv is not None:
        with writing(csv):
            results[kinds[0]].to_frame().to_csv(csv, index=False)
    if as_json:
        print_json({kind: _data(result, ttft, tpot) for kind, result in results.items()})
        return
    _show(results, ttft, tpot)


def _replayed(
    kind: str,
    trace: Trace,
    found: Classification | None,
    gpu: GPU,
    prices: TokenPrices | None,
    gpus: int,
    kv_tokens: int | None,
    seed: int,
) -> Replay:
    from fluidopt.model import FluidModel
    from fluidopt.serving import EngineFleet, replay
    from fluidopt.workload import TokenPrices

    if found is None or kind == ENGINE:
        blocks = None if kv_tokens is None else kv_tokens // BLOCK + 1  # an engine keeps one block empty
        return replay(trace, EngineFleet.like(gpu, gpus=gpus, kv_blocks=blocks), prices=prices, seed=seed)
    earned = prices or TokenPrices(prompt=1.0, output=1.0)
    plan = FluidModel(found.workload.per_gpu(gpus), gpu, prices=earned).solve()
    policy = plan.policy(gpus=gpus, kind=kind)
    return replay(trace, policy, classes=found, kv_tokens=kv_tokens, seed=seed)


def _data(result: Replay, ttft: float | None, tpot: float | None) -> dict[str, object]:
    frame = result.percentiles()
    data: dict[str, object] = {
        "summary": {name: float(value) for name, value in result.summary().items()},
        "latencies": [
            {"quantity": quantity, "of": of, **frame_data(row)}
            for (quantity, of), row in zip(frame.index, (frame.iloc[at] for at in range(len(frame))), strict=True)
        ],
    }
    if ttft is not None or tpot is not None:
        data["attainment"] = {"ttft": ttft, "tpot": tpot, "share": result.attainment(ttft=ttft, tpot=tpot)}
    return data


def _show(results: dict[str, Replay], ttft: float | None, tpot: float | None) -> None:
    import pandas as pd

    console = terminal()
    for quantity, title in SHOWN.items():
        rows = {kind: result.percentiles().loc[(quantity, "all")] for kind, result in results.items()}
        print_table(console, title, pd.DataFrame(rows).T, first="fleet")
    fleet = {}
    for kind, result in results.items():
        summary = result.summary()
        row = {
            "completed": summary["completed"] / summary["requests"],
            "requests/s": summary["throughput_requests_per_s"],
        }
        row["GPUs busy"] = summary["utilisation"]
        if ttft is not None or tpot is not None:
            row["met"] = result.attainment(ttft=ttft, tpot=tpot)
        if result.prices is not None:
            row["money/s per GPU"] = summary["revenue_rate"]
        fleet[kind] = row
    print_table(console, "Of all requests", pd.DataFrame(fleet).T, first="fleet")
    for result in results.values():
        print_sentence(console, "", result.caption + ".")
