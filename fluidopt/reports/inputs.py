"""What goes in: the model's classes, GPUs and promises, and the recorded requests they come from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fluidopt.reports import pictures
from fluidopt.reports.blocks import Items, Prose, Section, Table, Warn, blocks
from fluidopt.reports.summary import counted
from fluidopt.service_levels import names_of
from fluidopt.tables import number, shorten
from fluidopt.traces.statistics import ALL

if TYPE_CHECKING:
    from fluidopt.model import FluidModel
    from fluidopt.reports.making import Report


def inputs(report: Report) -> Section:
    """Classes, GPU types, modes, prices and promises."""
    model, gpus = report.model, report.settings.gpus
    scenario = model.scenario
    fleet = counted(gpus) if gpus else "A fleet of any size"
    pay = "when a request completes" if scenario.charging == "bundled" else "phase by phase, the prompt when it is read"
    lead = (
        f"{fleet}. A prompt token earns {number(scenario.prices.prompt)} and an output token "
        f"{number(scenario.prices.output)}, paid {pay} ({scenario.charging} charging)."
    )
    if scenario.source:
        lead += f" Source of the numbers: {scenario.source}."
    return Section(
        "inputs",
        "What goes in",
        blocks(
            Prose(lead),
            _classes(model, gpus),
            _gpus(model),
            _modes(model),
            pictures.contention(model.gpu_types),
            Items("Promises", _promises(model)),
        ),
    )


def _classes(model: FluidModel, gpus: int | None) -> Table:
    frame = model.workload.to_frame()
    prices, headings = model.scenario.prices, {}
    frame["value"] = prices.prompt * frame["prompt_tokens"] + prices.output * frame["output_tokens"]
    if gpus:
        frame.insert(0, "fleet_rate", gpus * frame["arrival_rate"])
        headings["fleet_rate"] = "requests/s, fleet"
    headings |= {
        "arrival_rate": "requests/s per GPU",
        "prompt_tokens": "prompt tokens",
        "output_tokens": "output tokens after the first",
        "abandonment_rate": "gives up, 1/s",
        "value": "value, money/request",
    }
    return Table("classes", "Classes of requests (means)", frame, headings, "A rate of 0 of giving up: waits for ever.")


def _gpus(model: FluidModel) -> Table:
    import pandas as pd

    rows = {
        gpu.name: {
            "share": gpu.share,
            "batch_size": gpu.batch_size,
            "chunk_size": gpu.chunk_size,
            "kappa": gpu.kappa,
            "hourly_price": math.nan if gpu.hourly_price is None else gpu.hourly_price,
            "curve": getattr(gpu.curve, "form", type(gpu.curve).__name__),
        }
        for gpu in model.gpu_types
    }
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("GPU type")
    headings = {
        "share": "share of the fleet",
        "batch_size": "batch B, requests",
        "chunk_size": "chunk C, tokens",
        "hourly_price": "price, money/hour",
        "curve": "form of the curve",
    }
    note = "kappa: how much faster a decode runs where no prefill does."
    return Table("gpus", "GPU types", frame, headings, note)


def _modes(model: FluidModel) -> Table:
    import pandas as pd

    frame = pd.DataFrame(
        {
            "gpu": [gpu.name for gpu, _ in model.modes],
            "chunk": [mode.chunk for _, mode in model.modes],
            "decode_slots": [mode.decode_slots for _, mode in model.modes],
            "iteration_ms": [1e3 * (mode.iteration_time or math.nan) for _, mode in model.modes],
            "prefill_speed": [mode.prefill_speed for _, mode in model.modes],
            "decode_speed": [mode.decode_speed for _, mode in model.modes],
        },
        index=pd.Index(model.labels["mode"], name="mode"),
    )
    headings = {
        "gpu": "GPU type",
        "chunk": "prefill chunk, tokens",
        "decode_slots": "decodes at most",
        "iteration_ms": "iteration, ms",
        "prefill_speed": "prefill, tokens/s",
        "decode_speed": "each decode, tokens/s",
    }
    return Table("modes", "Modes of operation of a GPU", frame, headings)


def _promises(model: FluidModel) -> tuple[str, ...]:
    """The service levels and rows of one's own, in words."""
    levels = model.scenario.service_levels
    found = []
    for name, level in zip(names_of(levels), levels, strict=True):
        row = next((row for row in model.symbolic.constraints if row.name == name), None)
        words = row.sentence({"class": "each class"}) if row is not None else name.replace("_", " ")
        fee = getattr(level, "penalty", None)
        whom = getattr(level, "classes", None)
        words += f" ({shorten(list(whom))})" if whom else ""
        found.append(words + (f", or else {number(fee)} money/s per unit beyond" if fee else ""))
    found += [f"{row.meaning or row.name}: {row.row}" for row in model.scenario.rows]
    if model.scenario.objective is not None:
        found.append(f"what is maximised is not the revenue but {model.scenario.objective}")
    if found:
        return tuple(found)
    patient = [
        name for name, rate in zip(model.workload.names, model.workload.abandonment_rate, strict=True) if not rate
    ]
    bound = f", but for those that never give up, which it must serve: {shorten(patient)}" if patient else ""
    return (f"None: the plan may turn away whom it likes, and let them wait{bound}.",)


def trace(report: Report) -> Section | None:
    """Rates, dispersion and lengths of a trace, and the classes found in it; None for a model."""
    recorded, classes = report.trace, report.classes
    if recorded is None or classes is None:
        return None
    described = recorded.describe()
    described = described[
        ["requests", "request_rate", "interarrival_cv", "prompt_mean", "prompt_p95", "output_mean", "output_p95"]
    ]
    uneven = recorded.dispersion()
    uneven = uneven[uneven["label"] == ALL].set_index("window").drop(columns="label")
    fit = recorded.exponential_fit()
    fit = fit[fit["label"] == ALL].set_index("tokens")[["mean", "cv", "ks", "kl"]]
    return Section(
        "trace",
        "The recorded requests",
        blocks(
            Prose(f"{recorded._headline()}. Files: {', '.join(recorded.sources) or 'none'}."),
            Warn(
                f"{recorded.skipped_lines:,} broken lines were skipped: "
                f"{shorten(list(recorded.skipped_reasons), most=3)}"
            )
            if recorded.skipped_lines
            else None,
            Table(
                "streams",
                "The stream at a glance (tokens per request)",
                described,
                {
                    "request_rate": "requests/s",
                    "interarrival_cv": "variation of gaps (Poisson: 1)",
                    "prompt_mean": "prompt, mean",
                    "prompt_p95": "prompt, 95 % below",
                    "output_mean": "output, mean",
                    "output_p95": "output, 95 % below",
                },
            ),
            pictures.trace_rates(recorded),
            Table(
                "dispersion",
                "Dispersion: variance over mean of the counts in windows",
                uneven.rename_axis("window, s"),
                {"mean": "mean requests", "poisson_low": "Poisson, from", "poisson_high": "to (95 %)"},
                "Above the Poisson range the stream is burstier than the model and the simulation take it for.",
            ),
            pictures.trace_dispersion(recorded),
            Table(
                "lengths",
                "Lengths beside the exponential law that the model takes them for",
                fit,
                {
                    "mean": "mean, tokens",
                    "cv": "variation (exponential: 1)",
                    "ks": "Kolmogorov-Smirnov distance",
                    "kl": "divergence, nats",
                },
            ),
            pictures.trace_lengths(recorded),
            Prose(
                f"Classes: {classes._headline()}. A class keeps the mean lengths of its requests; the spread inside it "
                "is lost. How long an answer gets is not known when a request arrives: a gate that tells classes apart "
                "by it needs a predictor."
            ),
            Table(
                "classification",
                "Classes as found (rates of the whole stream)",
                classes.to_frame().drop(columns="abandonment_rate"),
                {
                    "arrival_rate": "requests/s",
                    "prompt_tokens": "prompt tokens",
                    "output_tokens": "output tokens after the first",
                    "share": "share of the requests",
                    "prompt_cv": "variation of prompts",
                    "output_cv": "of outputs",
                },
                bars=("share",),
            ),
        ),
    )
