"""The command that writes files to try the other commands on."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def example(
    directory: Annotated[
        Path, typer.Argument(metavar="[DIRECTORY]", help="Where the files go; made if need be.")
    ] = Path(),
) -> None:
    """Write files to try the commands on: a scenario, requests, and iteration times. What exists is never overwritten.

    The requests are drawn, not recorded: ten minutes with the rates and token counts of one hour of production requests
    (Azure, November 2023, CC-BY-4.0). The iteration times were measured by Splitwise (MIT licence).

    Example: fluidopt example

    Somewhere else: fluidopt example trial
    """
    from fluidopt.data.example import write_example

    written = write_example(directory)
    told = {
        "scenario.toml": "two services on eight GPUs, made up and annotated",
        "iteration_times.csv": "Llama 2 70B on four H100, measured by Splitwise (MIT licence)",
        "requests.csv": "10 minutes of requests, drawn and not recorded (means of Azure's, CC-BY-4.0)",
    }
    for path in written:
        print(f"{path}: {told[path.name]}")
    print("Next:")
    if directory != Path():
        print(f"  cd {shlex.quote(str(directory))}")
    for line in NEXT:
        print(f"  {line}")


NEXT = (
    "fluidopt plan scenario.toml",
    "fluidopt simulate scenario.toml --horizon 600",
    "fluidopt replay requests.csv --gpus 4 --ttft 2 --tpot 0.05",
    "fluidopt size requests.csv --ttft 2 --tpot 0.05 --gpu llama-3.1-8b/h100-sxm",
    "fluidopt fit iteration_times.csv --column seconds=milliseconds --unit ms",
)
