"""The command that sizes a fleet for a trace."""

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
    Figure,
    Json,
    KvTokens,
    Mean,
    Percentile,
    Seed,
    Template,
    Traces,
    among,
    columns_of,
    gpu_names,
    gpu_types,
    share_of_requests,
)
from fluidopt.cli.output import check_figure, print_json, print_sentence, print_table, prose, terminal, writing

if TYPE_CHECKING:
    from rich.console import Console

    from fluidopt.studies.sizing.trace import TraceSize

Types = Annotated[
    list[str] | None,
    typer.Option(
        "--gpu",
        metavar="NAME[=PRICE]",
        help="A GPU that ships with the package, and its price per hour.",
        autocompletion=gpu_names,
    ),
]


def size(
    inputs: Traces,
    ttft: Annotated[float, typer.Option(help="Time to first token at most, s.")],
    tpot: Annotated[float, typer.Option(help="Time per output token at most, s.")],
    percentile: Percentile = None,
    mean: Mean = False,
    gpu: Types = None,
    column: Columns = None,
    template: Template = None,
    batch_size: BatchSize = None,
    chunk_size: ChunkSize = None,
    policy: Annotated[
        str,
        typer.Option(
            help="engine, or a kind of policy such as gate-and-route.", autocompletion=among(("engine", *KINDS))
        ),
    ] = "engine",
    interval: Annotated[float, typer.Option(help="Length of the table's intervals, s.")] = 300.0,
    classes: Classes = None,
    kv_tokens: KvTokens = None,
    max_gpus: Annotated[int | None, typer.Option(help="The most GPUs that are tried.")] = None,
    seed: Seed = 0,
    csv: Annotated[Path | None, typer.Option(help="Write the intervals there.")] = None,
    figure: Figure = None,
    as_json: Json = False,
) -> None:
    """Find how many GPUs recorded requests need: what no policy can do without, and what a real one needs, replayed.

    GPU types come from --gpu (which may be repeated), or from the scenario of --with; default: Qwen-8B on an A100.

    Example: fluidopt size requests.csv --ttft 2 --tpot 0.05 --gpu llama-3.1-8b/h100-sxm
    """
    from fluidopt.studies.sizing.trace import size_trace
    from fluidopt.traces import read_trace

    # What may be written is checked before what takes time.
    check_figure(figure)
    share = share_of_requests(percentile, mean)
    types, prices = gpu_types(gpu, template, batch_size, chunk_size)
    found = size_trace(
        read_trace(inputs, columns=columns_of(column)),
        types,
        ttft=ttft,
        tpot=tpot,
        percentile=share,
        policy=policy,
        classes=classes,
        interval=interval,
        prices=prices,
        kv_tokens=kv_tokens,
        max_gpus=max_gpus,
        seed=seed,
    )
    if csv is not None:
        with writing(csv):
            found.intervals.to_csv(csv)
    if figure is not None:
        with writing(figure):
            found.plot().savefig(figure)
    if as_json:
        print_json(found.to_dict())
        return
    _show(terminal(), found)


def _show(console: Console, found: TraceSize) -> None:
    intervals = found.intervals.set_index("start")[["requests", "request_rate", "prompt_rate", "output_rate", "gpus"]]
    intervals.columns = ["requests", "requests/s", "prompt tokens/s", "output tokens/s", "GPUs"]
    intervals.index = [f"{start:g}" for start in intervals.index]
    print_table(console, "Fluid GPUs, as if the rates of an interval lasted", intervals, first="from, s")
    frame = found.to_frame()
    columns = {"least_gpus": "at least", "gpus": "replayed", "share": "meet both"}
    if len(found.types) > 1:
        columns |= {"least_cost": "at least/h", "cost": "replayed/h"}
    else:
        columns |= {"mean_ttft": "TTFT, s", "mean_tpot": "TPOT, s"}
    frame = frame[list(columns)].rename(columns=columns)
    print_table(console, f"GPUs for {found.promise}", frame, first="GPU")
    tried = ", ".join(f"{each.gpus}: {each.share:.1%}" for each in found.best.outcomes if each.share == each.share)
    console.print(found.statement, width=prose())
    print_sentence(console, "Requests that meet both, by GPUs: ", tried)
    console.print()
    print_sentence(console, "", found.caption)
