"""This module owns the files that ``fluidopt example`` writes."""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fluidopt.data import azure_2023_summary
from fluidopt.errors import InvalidInput

if TYPE_CHECKING:
    import os

    import pandas as pd

FILES = ("scenario.toml", "iteration_times.csv", "requests.csv")
SEED, SECONDS = 2023, 600.0


def write_example(directory: str | os.PathLike[str]) -> list[Path]:
    """Write a scenario, measured iteration times and ten minutes of drawn requests into a directory.

    ``scenario.toml`` is annotated; ``iteration_times.csv`` holds means of measurements by Splitwise
    (Mutinifni/splitwise-sim, MIT licence; Llama 2 70B on four H100); ``requests.csv`` is `drawn_requests`.

    Args:
        directory: made where it does not exist.

    Returns:
        The files written.

    Raises:
        InvalidInput: one of the files exists already (then none is written), or one cannot be written.
    """
    folder = Path(directory)
    paths = [folder / name for name in FILES]
    try:
        if there := [str(path) for path in paths if path.exists()]:
            raise InvalidInput(
                f"there is {' and '.join(there)} already, and nothing is overwritten; name an empty directory"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths[:-1]:
            path.write_bytes(files("fluidopt.data").joinpath("examples", path.name).read_bytes())
        drawn_requests().to_csv(paths[-1], index=False)
    except OSError as error:
        raise InvalidInput(
            f"cannot write the example files to {str(directory)!r}: {error.strerror or error}; name a directory that "
            "you may write to"
        ) from None
    return paths


def drawn_requests(*, seconds: float = SECONDS, seed: int = SEED) -> pd.DataFrame:
    """Draw requests from the embedded summary of Azure's traces of 2023: no recording, but of the same means.

    Of either service, arrivals are a Poisson stream of the recorded rate, and token counts are log-normal with the
    recorded means and coefficients of variation, prompts independent of answers.

    Args:
        seconds: length of the stream.
        seed: of the draws.

    Returns:
        A row per request: ``arrival_time`` (s, whole milliseconds), ``prompt_tokens``, ``output_tokens``, ``label``
        (the service), and ``origin``, which says in every row that it was drawn and which `fluidopt.read_trace` skips.
    """
    import pandas as pd

    rng = np.random.default_rng(seed)
    parts = []
    for service in azure_2023_summary()["label"]["classes"]:
        count = rng.poisson(service["arrival_rate"] * seconds)
        part = {"arrival_time": rng.uniform(0.0, seconds, count).round(3)}
        # The summary's output tokens leave out the first one, which the prefill makes.
        for name, more in (("prompt", 0), ("output", 1)):
            spread = math.log1p(service[f"{name}_cv"] ** 2)
            mean = math.log(service[f"{name}_tokens"]) - spread / 2
            part[f"{name}_tokens"] = (
                np.maximum(rng.lognormal(mean, math.sqrt(spread), count).round().astype(int), 1) + more
            )
        parts.append(pd.DataFrame(part).assign(label=service["name"], origin="drawn"))
    return pd.concat(parts).sort_values("arrival_time", ignore_index=True)
