"""Command lines of every command, with values that are in order, out of place, or rubbish."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

from fuzz_inputs import NUMBERS, TEXTS, Case
from fuzz_scenarios import as_toml, bent, scenario
from fuzz_traces import TABLES, TRACES

SMALL = ["1", "2", "5"]
COSTLY = {"--gpus", "--horizon", "--replications", "--precision", "--max-gpus"}
"""Options by which a user may ask for hours of computing; a fuzzer has not got them."""


def _cheap(text: str) -> bool:
    """Whether an option of `COSTLY` with this value is refused, or soon done."""
    try:
        return not (0.0 < float(text) < 1.0 or 5.0 < float(text) < math.inf)
    except ValueError:
        return True


RUBBISH = [*map(str, NUMBERS), *[text for text in TEXTS if "\0" not in text]]
CHEAP = [text for text in RUBBISH if _cheap(text)]
COMMANDS: dict[str, tuple[list[str], dict[str, list[str]]]] = {}
"""By command: its files, and valid values of its options; those that cost time stay small."""
_MODEL = {"--gpus": SMALL, "--with": ["scenario.toml"], "--classes": ["1", "2"], "--abandonment-rate": ["0.05", "0.1"]}
_FIGURE = {"--figure": ["out.svg", "out.txt", "missing/out.png", ".", ""]}
_FLAG: list[str] = []
_POLICY = ["engine", "gate-and-route", "prioritize-and-route", "sli-aware", "GG-SP", "FI-WSP", "GI-WSP", "refined"]
_GPU = ["llama-3.1-8b/h100-sxm", "llama-3.1-8b/h100-sxm=2", "=1", "x=y", "llama-3.1-8b/h100-sxm=nan"]
COMMANDS |= {
    "plan": (
        ["scenario.toml", "requests.csv"],
        {**_MODEL, **_FIGURE, "--solver": ["auto", "highs", "cvxpy", "knapsack"], "--json": _FLAG},
    ),
    "simulate": (
        ["scenario.toml", "requests.csv"],
        {
            **_MODEL,
            "--horizon": ["20", "50"],
            "--warmup": ["1", "5", "60"],
            "--replications": ["2", "3"],
            "--seed": SMALL,
            "--policy": _POLICY[1:-1],
            "--start": ["empty", "fluid"],
            "--precision": ["0.5"],
            "--json": _FLAG,
        },
    ),
    "engines": (
        ["scenario.toml", "requests.csv"],
        {**_MODEL, "--policy": _POLICY[:-1], "--model": ["Qwen/Qwen3-8B", "a b; c"], "--json": _FLAG},
    ),
    "fit": (
        ["iteration_times.csv"],
        {
            "--form": ["auto", "affine", "linear", "table"],
            "--model": ["m"],
            "--gpu": ["a100"],
            "--unit": ["s", "ms"],
            "--longest-kv": ["1000", "0", "-1", "nan"],
            "--tensor-parallel": ["1"],
            **_FIGURE,
            "--json": _FLAG,
            "--output": ["curve.toml", ".", "missing/x.toml"],
        },
    ),
    "size": (
        ["requests.csv"],
        {
            "--ttft": ["2", "0.1", "1e-9"],
            "--tpot": ["0.05", "1e-9"],
            "--percentile": ["90", "0", "100", "50"],
            "--mean": _FLAG,
            "--gpu": _GPU,
            "--with": ["scenario.toml"],
            "--batch-size": SMALL,
            "--chunk-size": ["64"],
            "--policy": _POLICY[:2],
            "--interval": ["300", "1", "1e-3"],
            "--classes": ["1", "2"],
            "--csv": ["out.csv"],
            "--kv-tokens": ["100000", "1"],
            "--max-gpus": ["3", "8"],
            "--seed": SMALL,
            "--json": _FLAG,
        },
    ),
    "replay": (
        ["requests.csv"],
        {
            "--gpus": SMALL,
            "--policy": _POLICY[:4],
            "--gpu": _GPU,
            "--with": ["scenario.toml"],
            "--batch-size": SMALL,
            "--chunk-size": ["64", "4096"],
            "--kv-tokens": ["16", "100000"],
            "--classes": ["1", "2"],
            "--ttft": ["2"],
            "--abandonment-rate": ["0.1"],
            "--tpot": ["0.05"],
            "--csv": ["out.csv", ".", "no/out.csv"],
            "--json": _FLAG,
        },
    ),
    "sensitivity": (
        ["scenario.toml", "requests.csv"],
        {
            **_MODEL,
            "--parameter": [
                "alpha",
                "batch_size",
                "chunk_size",
                "arrival_rate[chat]",
                "lambda",
                "arrival_rate[[/]]",
            ],
            "--lower": ["16", "0", "0.01"],
            "--upper": ["64", "0.02", "1"],
            "--change": ["0.1", "1", "-1"],
            "--json": _FLAG,
        },
    ),
    "report": (
        ["scenario.toml", "requests.csv"],
        {
            **_MODEL,
            "--horizon": ["20", "50"],
            "--replications": ["2"],
            "--ttft": ["2"],
            "--tpot": ["0.05"],
            "--mean": _FLAG,
            "--promise": ["slot_tpot", "mean_ttft"],
            "--policy": _POLICY[1:-1],
            "--output": ["r.html", ".", "no/r.html"],
            "--json": _FLAG,
        },
    ),
    "example": (["new", ".", "requests.csv", "requests.csv/x"], {}),
    "schema": ([], {}),
}


def command_case(rng: Random, seed: Case | None = None) -> Case:
    """A command line beside files that are mostly in order."""
    if seed is not None and rng.random() < 0.3:
        words = list(seed.words)
        for _ in range(rng.choice([1, 1, 2])):
            at = rng.randint(0, len(words))
            words[at : at + rng.choice([0, 1])] = rng.choice([[], [rng.choice(CHEAP)], [rng.choice(_ALL_OPTIONS)]])
        return replace(seed, words=tuple(words))
    files = {
        "requests.csv": rng.choice(list(TRACES.values()))(rng),
        "iteration_times.csv": TABLES["plain"](rng),
        "scenario.toml": as_toml(scenario(rng) if rng.random() < 0.5 else bent(scenario(rng), rng, 1)).encode(),
        "empty.csv": b"",
    }
    name = rng.choice(list(COMMANDS))
    if name == "report" and rng.random() < 0.8:
        name = "plan"  # a report takes as long as all the others together
    inputs, options = COMMANDS[name]
    words = [name, *([rng.choice(inputs)] if inputs else [])]
    if rng.random() < 0.1:
        words = [rng.choice([*COMMANDS, *RUBBISH, "--version", "--help", "--json"]), *words[1:]]
    if rng.random() < 0.15:
        words[1:2] = rng.choices(
            ["missing.csv", ".", "empty.csv", "/dev/null", "scenario.toml", "-", "", *TEXTS[3:9]], k=2
        )
    required = [option for option in ("--ttft", "--tpot") if name == "size"] + ["--gpus"] * (name == "replay")
    required += ["--horizon"] * (name in ("simulate", "report")) + (
        ["--gpus"] if "requests.csv" in words and "--gpus" in options else []
    )
    chosen = rng.sample(list(options), min(len(options), rng.choice([0, 1, 2, 3])))
    for option in dict.fromkeys([*required, *chosen]):
        values = options[option] if rng.random() < 0.9 else CHEAP if option in COSTLY else RUBBISH
        given = [rng.choice(values)] if options[option] else []
        words += [f"{option}={given[0]}"] if given and rng.random() < 0.2 else [option, *given]
    return Case(files, tuple(words))


_ALL_OPTIONS = sorted({option for _, options in COMMANDS.values() for option in options} | {"--help", "--", "-o", "-x"})
