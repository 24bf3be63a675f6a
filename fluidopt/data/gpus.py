"""This module owns the curves that ship with the package: iteration times of known models on known GPUs."""

from __future__ import annotations

import json
import warnings
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluidopt.contention import GPU
from fluidopt.curves import ContentionCurve, Curve
from fluidopt.errors import ContentionWarning, InvalidInput
from fluidopt.inputs import adapter, dump

if TYPE_CHECKING:
    import os

    import pandas as pd

__all__ = ["derive_known_gpus", "known_gpu", "known_gpus"]

AICONFIGURATOR = {
    "kind": "estimated",
    "engine": "vLLM 0.14",
    "source": "aiconfigurator 0.12.0, its estimates over measured kernels",
    "licence": "Apache-2.0",
}
SPLITWISE = {
    "kind": "measured",
    "engine": "vLLM of 2023; prefills are whole prompts, without decodes beside them",
    "source": "Mutinifni/splitwise-sim, commit 8f99e7dc, data/perf_model.csv",
    "licence": "MIT",
}
RTX = {
    "kind": "measured",
    "engine": "kernels of vLLM 0.19, without scheduling",
    "source": "casys-kaist/LLMServingSim, commit 5daddb21, its per-layer profile summed over 32 layers",
    "licence": "MIT",
}
PUBLISHED = {
    "kind": "published fit",
    "engine": "vLLM 0.11",
    "source": "arXiv:2602.02987, section 6.1",
    "licence": "coefficients as published",
}


def known_gpus() -> pd.DataFrame:
    """The curves that ship with the package.

    Returns:
        A row per name: ``model``, ``gpu``, ``tensor_parallel`` (GPUs that one copy of the model takes; a `GPU` with
        this curve is that group), ``form``, ``kind`` (measured, estimated, or a published fit), ``chunk``, ``decodes``
        and ``kv_tokens`` (measured ranges, tokens), ``read_at`` (KV tokens at which `known_gpu` reads the curve; none
        where it does not depend on them), ``worst_error`` (largest relative error of the fit), ``r_squared_mixed``,
        ``r_squared_decode_only``, ``engine``, ``source``, ``licence``, ``curve``.
    """
    import pandas as pd

    rows = {name: entry | {"curve": _curve(name)} for name, entry in _entries().items()}
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("name")
    for axis in ("chunk", "decodes", "kv_tokens"):
        frame[axis] = pd.Series([tuple(each) if isinstance(each, list) else None for each in frame[axis]], frame.index)
    return frame


def known_gpu(
    name: str,
    *,
    batch_size: int,
    chunk_size: int,
    kv_tokens: float | None = None,
    hourly_price: float | None = None,
) -> GPU:
    """A GPU with a curve that ships with the package.

    Args:
        name: as in `known_gpus`.
        batch_size: B, requests that it batches at most.
        chunk_size: C, prefill tokens per iteration.
        kv_tokens: mean tokens in the KV cache per decode, at which its modes read the curve; by default ``read_at`` of
            `known_gpus`, the middle of what was measured.
        hourly_price: what it costs, money/hour (all GPUs of the group where ``tensor_parallel`` is above 1).

    Raises:
        InvalidInput: there is no such name, or an argument breaks a rule.

    Warns:
        ContentionWarning: batch, chunk or KV length lie outside what was measured.
    """
    entries = _entries()
    if name not in entries:
        raise InvalidInput(f"known_gpu: name must be one of {list(entries)}; got {name!r}")
    entry = entries[name]
    if kv_tokens is None:
        kv_tokens = entry.get("read_at")
    gpu = GPU(
        _curve(name),  # type: ignore[arg-type]
        batch_size=batch_size,
        chunk_size=chunk_size,
        kv_tokens=kv_tokens,
        hourly_price=hourly_price,
        name=name,
    )
    asked = {"decodes": gpu.batch_size, "chunk": gpu.chunk_size, "kv_tokens": gpu.kv_tokens}
    outside = [
        f"{axis} {value:g} (measured: {low:g} to {high:g})"
        for axis, value in asked.items()
        if value is not None and entry.get(axis) is not None
        for low, high in [entry[axis]]
        if not low <= value <= high
    ]
    if outside:
        warnings.warn(
            f"known_gpu: {name} is read outside what was measured, where its curve only goes on as it ends: "
            f"{'; '.join(outside)}",
            ContentionWarning,
            stacklevel=2,
        )
    return gpu


@cache
def _entries() -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = json.loads(files(__package__).joinpath("gpus.json").read_text("utf-8"))
    return entries


@cache
def _curve(name: str) -> ContentionCurve:
    curve: ContentionCurve = adapter(Curve).validate_python(_entries()[name]["curve"])
    return curve


def derive_known_gpus(directory: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Derive the embedded curves from the tables they summarise, in ``directory``.

    ``gpus.json`` is ``json.dumps(..., indent=1)`` of the result. Each is a piecewise fit: a table would follow the
    measurements more closely and be as large as they are.
    """
    from fluidopt.calibration import fit_iteration_time, read_iteration_times
    from fluidopt.reference import QWEN_4B_A100, QWEN_8B_A100

    folder = Path(directory)
    estimates = read_iteration_times(folder / "aiconfigurator" / "iteration_times_llama3.1.csv")
    splitwise = read_iteration_times(folder / "splitwise" / "perf_model.csv")
    rtx = read_iteration_times(folder / "vllm-rtxpro6000" / "iteration_times.csv")
    # On two GPUs a batch of 64 does not fit the memory beside the weights, and was not run as one.
    splitwise = splitwise.query("tensor_parallel > 2 or (decodes < 64 and chunk < 64 * 512)")
    # Longer caches at large batches would not fit that GPU's memory, and would only bend the fit.
    rtx = rtx.query("kv_tokens <= 2048").assign(model="Llama-3.1-8B", gpu="RTX PRO 6000", tensor_parallel=1)

    entries: dict[str, dict[str, Any]] = {}
    for tables, origin in ((estimates, AICONFIGURATOR), (splitwise, SPLITWISE), (rtx, RTX)):
        for labels, table in tables.groupby(["model", "gpu", "tensor_parallel"], sort=False):
            fit = fit_iteration_time(table, form="piecewise")
            model, gpu, parallel = (str(each).removeprefix("Meta-") for each in labels)
            cached = table.loc[table["decodes"] > 0, "kv_tokens"]
            entries[_name(model, gpu, int(parallel))] = {
                "model": model,
                "gpu": gpu,
                "tensor_parallel": int(parallel),
                "form": fit.form,
                **origin,
                "chunk": _range(table.loc[table["chunk"] > 0, "chunk"]),
                "decodes": _range(table.loc[table["decodes"] > 0, "decodes"]),
                "kv_tokens": _range(cached),
                **({"read_at": float(cached.median())} if fit.curve.depends_on_kv else {}),
                "worst_error": _rounded(fit.worst["error"], 3),
                "r_squared_mixed": _rounded(fit.r_squared["mixed"], 5),
                "r_squared_decode_only": _rounded(fit.r_squared["decode_only"], 5),
                "curve": _rounded(dump(fit.curve), 6),
            }
    for model, curve, explained in (("Qwen-8B", QWEN_8B_A100, 0.998), ("Qwen-4B", QWEN_4B_A100, 0.997)):
        entries[_name(model, "a100_sxm_40gb", 1)] = {
            "model": model,
            "gpu": "a100_sxm_40gb",
            "tensor_parallel": 1,
            "form": "affine",
            **PUBLISHED,
            "r_squared_mixed": explained,
            "curve": dump(curve),
        }
    return entries


def _name(model: str, gpu: str, parallel: int) -> str:
    """Model and GPU as one name, "llama-3.1-70b/h100-sxm-tp4"."""
    name = f"{model}/{gpu}" + (f"-tp{parallel}" if parallel > 1 else "")
    return name.lower().replace("_", "-").replace(" ", "-")


def _range(values: pd.Series[float]) -> list[float]:
    return [float(values.min()), float(values.max())]


def _rounded(value: Any, digits: int) -> Any:
    """Numbers, at any depth, to so many significant digits."""
    if isinstance(value, dict):
        return {key: _rounded(each, digits) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each, digits) for each in value]
    return value if isinstance(value, str | bool | None) else float(f"{float(value):.{digits}g}")
