"""This module owns the real workload that ships with the package: a summary of two production traces.

The real GPUs that ship with it are in `fluidopt.data.gpus`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

from fluidopt.data.gpus import known_gpu, known_gpus
from fluidopt.errors import InvalidInput
from fluidopt.workload import Workload, WorkloadClass

if TYPE_CHECKING:
    from fluidopt.traces import Classification, Trace

__all__ = ["azure_2023", "azure_2023_summary", "known_gpu", "known_gpus", "summarise_azure_2023"]


def azure_2023(*, by: Literal["lengths", "label"] = "lengths", abandonment_rate: float = 0.0) -> Workload:
    """Return the classes of one hour of production requests at Azure, November 2023.

    28,185 requests of two services, code completion (8,819) and conversation (19,366), taken as one stream.
    The rates, requests/s, are those of the whole stream: divide them with `Workload.per_gpu`.

    Args:
        by: "lengths": five classes of like prompt and output length, over both services; "label": one class
            per service.
        abandonment_rate: theta of every class, 1/s; the traces do not tell it.

    Raises:
        InvalidInput: an argument breaks a rule.

    Source: Azure/AzurePublicDataset, commit b469a113, CC-BY-4.0; `azure_2023_summary` says how it was
    derived.
    """
    if by not in ("lengths", "label"):
        raise InvalidInput(f"azure_2023: by must be 'lengths' or 'label'; got {by!r}")
    summary = azure_2023_summary()
    return Workload(
        tuple(
            WorkloadClass(
                each["name"],
                arrival_rate=each["arrival_rate"],
                prompt_tokens=each["prompt_tokens"],
                output_tokens=each["output_tokens"],
                abandonment_rate=abandonment_rate,
            )
            for each in summary[by]["classes"]
        ),
        source=f"{summary['source']} ({summary['licence']}), classes by {by}",
    )


def azure_2023_summary() -> dict[str, Any]:
    """Return the embedded summary: source, licence, derivation, totals, and for either grouping its classes.

    A class has ``requests``, ``arrival_rate`` (requests/s of the whole stream), ``prompt_tokens`` and
    ``output_tokens`` (mean prompt tokens and mean decode iterations), their coefficients of variation, and
    ``requests_by_label``.
    """
    summary: dict[str, Any] = json.loads(_azure_2023_text())
    return summary


@cache
def _azure_2023_text() -> str:
    return files(__name__).joinpath("azure_2023.json").read_text(encoding="utf-8")


def summarise_azure_2023(code: str | os.PathLike[str], conversation: str | os.PathLike[str]) -> dict[str, Any]:
    """Derive the embedded summary from the two files it summarises.

    ``azure_2023.json`` is ``json.dumps(..., indent=1)`` of the result.

    Args:
        code: AzureLLMInferenceTrace_code.csv.
        conversation: AzureLLMInferenceTrace_conv.csv.
    """
    from fluidopt.traces import classify, read_trace

    trace = read_trace([code, conversation], label=["code", "conv"])
    return {
        "source": (
            "Azure/AzurePublicDataset, commit b469a113, AzureLLMInferenceTrace_code.csv and "
            "AzureLLMInferenceTrace_conv.csv"
        ),
        "licence": "CC-BY-4.0",
        "changes": "only the summary below is kept, not the requests",
        "derivation": (
            "trace = read_trace([code, conv], label=['code', 'conv']); lengths: classify(trace, seed=0); "
            "label: classify(trace, by='label')"
        ),
        "units": (
            "duration s; arrival_rate requests/s of the whole stream; prompt_tokens mean prompt tokens; "
            "output_tokens mean decode iterations (output tokens less one); prompt_cv, output_cv their "
            "coefficients of variation"
        ),
        "requests": len(trace),
        "duration": _rounded(trace.duration),
        "lengths": _summary(trace, classify(trace, seed=0)),
        "label": _summary(trace, classify(trace, by="label")),
    }


def _summary(trace: Trace, found: Classification) -> dict[str, Any]:
    classes = []
    for index, each in enumerate(found.workload):
        members = found.assignment == index
        labels = Counter(trace.label[members].tolist() if trace.label is not None else [])
        classes.append(
            {
                "name": each.name,
                "requests": int(members.sum()),
                "arrival_rate": _rounded(each.arrival_rate),
                "prompt_tokens": _rounded(each.prompt_tokens),
                "output_tokens": _rounded(each.output_tokens),
                "prompt_cv": _rounded(found.prompt_cv[index]),
                "output_cv": _rounded(found.output_cv[index]),
                "requests_by_label": dict(sorted(labels.items())),
            }
        )
    return {"explained": _rounded(found.explained), "classes": classes}


def _rounded(value: float) -> float:
    """Keep nine significant digits."""
    return float(f"{value:.9g}")
