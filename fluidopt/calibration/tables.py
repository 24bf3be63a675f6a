"""This module owns the seam between tables of measured iteration times and the one frame that a fit takes.

A layout says which columns a file has and which measurements a line of it holds. Units are turned into tokens and
seconds here, so that nothing behind this module knows what a file looked like.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fluidopt.curves import LinearTime
from fluidopt.errors import InvalidInput
from fluidopt.inputs import MOST, read_text

if TYPE_CHECKING:
    import pandas as pd

MEASURED = ("chunk", "decodes", "kv_tokens", "seconds")
LABELS = ("model", "gpu", "tensor_parallel")
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
SHORTEST, LONGEST = 1e-9, 1e6
"""Seconds that an iteration may take."""
DERIVED = "pcap"
"""What the names of Splitwise's power-capped GPUs end in."""
Unit = Literal["s", "ms", "us"]


class _Fault(Exception):
    """Why one line cannot be read."""


@dataclass(frozen=True)
class _Line:
    """One line of a table, its cells by column."""

    cells: Mapping[str, str]

    def number(self, column: str, *, least: float = 0.0) -> float:
        """A finite number of at least ``least``; a time must be above 0."""
        text = self.cells[column].strip()
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least:
            raise _Fault(f"expected a number of at least {least:g} in column {column}, found {text[:60]!r}")
        if value > MOST:
            raise _Fault(f"expected a number of at most {MOST:g} in column {column}, found {text[:60]!r}")
        return value

    def time(self, column: str, unit: Unit) -> float:
        """A time above 0, in seconds."""
        value = self.number(column) * UNITS[unit]
        if value < SHORTEST:
            raise _Fault(f"expected a time above 0 in column {column}, found {self.cells[column].strip()[:60]!r}")
        if value > LONGEST:
            raise _Fault(f"expected a time of at most {LONGEST:g} s in column {column}, found {value:g} s")
        return value

    def label(self, column: str) -> str:
        """A text that is not empty."""
        text = self.cells[column].strip()
        if not text:
            raise _Fault(f"expected a name in column {column}, found nothing")
        return text


Row = tuple[float, float, float, float, str, str, float]
"""Chunk, decodes, KV tokens per decode, seconds; model, GPU and tensor-parallel size ("", "", nan where not said)."""


@dataclass(frozen=True)
class _Layout:
    """One kind of table: the columns that it must have, and the measurements in a line of it."""

    name: str
    columns: tuple[str, ...]
    rows: Callable[[_Line], Iterator[Row]]
    repeats: bool = False
    """Whether one decode-only time stands beside every chunk; it is one measurement, not many."""

    def recognises(self, header: Iterable[str]) -> bool:
        return set(self.columns) <= set(header)


def _configurator(line: _Line) -> Iterator[Row]:
    """A line of aiconfigurator: one mixed step, and the decode-only step beside it (the same for every chunk).

    A decode is on average half way through its output, so that its KV cache holds isl + osl/2 tokens.
    """
    decodes = line.number("decode_batch", least=1)
    cached = line.number("isl") + line.number("osl") / 2
    labels = line.label("model").split("/")[-1], line.label("system"), line.number("tp", least=1)
    yield line.number("ctx_tokens_C", least=1), decodes, cached, line.time("mix_step_ms", "ms"), *labels
    yield 0.0, decodes, cached, line.time("genonly_step_ms", "ms"), *labels


def _splitwise(line: _Line) -> Iterator[Row]:
    """A line of Splitwise: a batch of whole prompts in one iteration, and the mean decode-only one after it."""
    if line.label("hardware").endswith(DERIVED):
        return
    prompt, batch = line.number("prompt_size", least=1), line.number("batch_size", least=1)
    labels = line.label("model"), line.label("hardware"), line.number("tensor_parallel", least=1)
    yield prompt * batch, 0.0, 0.0, line.time("prompt_time", "ms"), *labels
    yield 0.0, batch, prompt + line.number("token_size") / 2, line.time("token_time", "ms"), *labels


def _grid_profile(line: _Line) -> Iterator[Row]:
    """A line of a profile over chunk, decodes and KV length."""
    decodes = line.number("decodes")
    cached = line.number("kv_tokens_per_decode") if decodes else 0.0
    yield line.number("prefill_chunk_tokens"), decodes, cached, line.time("iteration_ms", "ms"), "", "", math.nan


LAYOUTS = (
    _Layout(
        "aiconfigurator",
        ("model", "system", "tp", "decode_batch", "isl", "osl", "ctx_tokens_C", "mix_step_ms", "genonly_step_ms"),
        _configurator,
        repeats=True,
    ),
    _Layout(
        "Splitwise",
        (
            "model",
            "hardware",
            "prompt_size",
            "batch_size",
            "token_size",
            "prompt_time",
            "token_time",
            "tensor_parallel",
        ),
        _splitwise,
    ),
    _Layout(
        "profile over chunk, decodes and KV length",
        ("prefill_chunk_tokens", "decodes", "kv_tokens_per_decode", "iteration_ms"),
        _grid_profile,
    ),
)


def read_iteration_times(
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    gpu: str | None = None,
    tensor_parallel: int | None = None,
    columns: Mapping[str, str] | None = None,
    unit: Unit = "s",
) -> pd.DataFrame:
    """Read measured iteration times, whatever their table looks like, as one frame.

    The table is recognised by its header: aiconfigurator's estimates, Splitwise's measurements, a profile over chunk,
    decodes and KV length, or a plain CSV with the columns of the frame (``kv_tokens`` and the labels may be absent).
    In Splitwise's file the rows of the power-capped H100 are those of the H100 times 1.3, so they are left out.

    Args:
        path: the file, comma-separated with a header.
        model: keep this model: its name, or a part of it that fits one model only.
        gpu: keep this GPU, likewise.
        tensor_parallel: keep this tensor-parallel size.
        columns: for a plain CSV with other names: the file's column by the frame's, ``{"seconds": "step_time"}``.
        unit: for a plain CSV: the unit of its times.

    Returns:
        A row per measurement: ``chunk`` (prefill tokens of the iteration; 0: none runs), ``decodes``, ``kv_tokens``
        (mean tokens in the KV cache per decode), ``seconds``; then ``model``, ``gpu``, ``tensor_parallel`` where the
        file says them.

    Raises:
        InvalidInput: the file cannot be read, its columns are not known, a cell breaks a rule (named by file, line and
            column), or no measurement is left.
    """
    import pandas as pd

    path, text = _text(path, "read_iteration_times")
    if unit not in UNITS:
        raise InvalidInput(f"read_iteration_times: unit must be 's', 'ms' or 'us'; got {unit!r}")
    if text.lstrip().startswith("{"):
        raise InvalidInput(f"{path}: expected a CSV file, found JSON; published coefficients are read with read_curves")
    header, lines = _lines(text, path)
    layout = _layout(header, columns, unit, path)
    seen: set[Row] = set()
    kept: list[Row] = []
    for number, line in lines:
        try:
            found = list(layout.rows(line))
        except _Fault as fault:
            raise InvalidInput(f"{path}, line {number}: {fault}. Repair the cell") from None
        kept.extend(row for row in found if not (layout.repeats and row[0] == 0 and row in seen))
        seen.update(found)
    frame = pd.DataFrame(kept, columns=[*MEASURED, *LABELS])
    if frame.empty:
        raise InvalidInput(f"{path}: no measurements below the header; give a table with at least one line")
    absent = [name for name in LABELS if frame[name].isna().all() or (frame[name] == "").all()]
    frame = frame.drop(columns=absent)
    if "tensor_parallel" in frame and (frame["tensor_parallel"] % 1 == 0).all():
        frame["tensor_parallel"] = frame["tensor_parallel"].astype(int)
    return select_series(frame, model=model, gpu=gpu, tensor_parallel=tensor_parallel, caller=str(path))


def select_series(
    frame: pd.DataFrame,
    *,
    model: str | None = None,
    gpu: str | None = None,
    tensor_parallel: int | None = None,
    caller: str,
) -> pd.DataFrame:
    """The measurements of one model, GPU or tensor-parallel size.

    Raises:
        InvalidInput: none or several match, with what there is.
    """
    wanted = {"model": model, "gpu": gpu, "tensor_parallel": tensor_parallel}
    for name, value in wanted.items():
        if value is None:
            continue
        there = list(dict.fromkeys(frame[name])) if name in frame else []
        if not there:
            raise InvalidInput(f"{caller}: {name}={value!r} cannot be chosen: the table does not say the {name}")
        matches = [each for each in there if each == value]
        if not matches and isinstance(value, str):
            matches = [each for each in there if value.lower() in str(each).lower()]
        if len(matches) != 1:
            fault = "fits several" if matches else "is not in the table"
            hint = "; power-capped rows are derived from the others" if DERIVED in str(value) else ""
            raise InvalidInput(f"{caller}: {name}={value!r} {fault}: choose one of {matches or there}{hint}")
        frame = frame[frame[name] == matches[0]]
    return frame.reset_index(drop=True)


def _plain(columns: Mapping[str, str], unit: Unit) -> Callable[[_Line], Iterator[Row]]:
    def rows(line: _Line) -> Iterator[Row]:
        decodes = line.number(columns["decodes"])
        cached = line.number(columns["kv_tokens"]) if "kv_tokens" in columns and decodes else 0.0
        model, gpu = (line.label(columns[name]) if name in columns else "" for name in ("model", "gpu"))
        parallel = line.number(columns["tensor_parallel"], least=1) if "tensor_parallel" in columns else math.nan
        chunk = line.number(columns["chunk"])
        if chunk == decodes == 0:
            raise _Fault("chunk and decodes are both 0, so that nothing runs")
        yield chunk, decodes, cached, line.time(columns["seconds"], unit), model, gpu, parallel

    return rows


def _layout(header: list[str], columns: Mapping[str, str] | None, unit: Unit, path: str) -> _Layout:
    """The layout that a header has, by the columns given or by its content."""
    if columns is not None:
        if not isinstance(columns, Mapping):
            raise InvalidInput(
                f"{path}: columns must map {[*MEASURED, *LABELS]} to columns of the file; got {columns!r}"
            )
        unknown = sorted(set(columns) - {*MEASURED, *LABELS})
        if unknown:
            raise InvalidInput(f"{path}: columns has {unknown}; its keys must be among {[*MEASURED, *LABELS]}")
        absent = [name for name in columns.values() if name not in header]
        if absent:
            raise InvalidInput(f"{path}, line 1: column {absent[0]!r} is missing; the header has {header}")
    elif found := [layout for layout in LAYOUTS if layout.recognises(header)]:
        return found[0]
    named = {name: name for name in (*MEASURED, *LABELS) if name in header} | dict(columns or {})
    missing = [name for name in MEASURED if name not in named and name != "kv_tokens"]
    if missing:
        known = "; ".join(f"{layout.name}: {', '.join(layout.columns)}" for layout in LAYOUTS)
        raise InvalidInput(
            f"{path}, line 1: the table is not known: {', '.join(missing)} missing in the header {header}. Name its "
            f"columns with columns={{{', '.join(f'{name!r}: ...' for name in missing)}}}, or give one of: {known}; "
            f"plain: {', '.join(MEASURED)}"
        )
    return _Layout("plain", tuple(named.values()), _plain(named, unit))


def read_curves(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read published coefficients of iteration times: the model data of llm-inferno.

    An iteration there takes ``alpha + beta T + gamma M`` ms, with T the tokens computed (a chunk's, and one per
    decode) and M the cached tokens read. Each entry becomes a `LinearTime`, the same with and without a prefill. The
    coefficients are taken at their word; many entries are one accelerator's scaled to another.

    Returns:
        A row per entry: ``model``, ``gpu``, ``gpus`` (that one copy of the model takes), ``max_batch_size`` and
        ``at_tokens`` (tokens per request assumed for it), ``curve``.

    Raises:
        InvalidInput: the file is not such data, or an entry breaks a rule.
    """
    import pandas as pd

    path, text = _text(path, "read_curves")
    try:
        entries = json.loads(text)["models"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidInput(f"{path}: expected JSON with a list 'models' ({error!r})") from None
    if not isinstance(entries, list) or not entries:
        raise InvalidInput(f"{path}: models must be a list of entries; got {entries!r:.80}")
    return pd.DataFrame([_published(entry, f"{path}: models[{at}]") for at, entry in enumerate(entries)])


def _published(entry: Any, place: str) -> dict[str, Any]:
    try:
        alpha, beta, gamma = (float(entry["perfParms"][name]) * UNITS["ms"] for name in ("alpha", "beta", "gamma"))
        row = {
            "model": str(entry["name"]),
            "gpu": str(entry["acc"]),
            "gpus": int(entry["accCount"]),
            "max_batch_size": int(entry["maxBatchSize"]),
            "at_tokens": int(entry["atTokens"]),
        }
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # OverflowError: an integer beyond float
        raise InvalidInput(
            f"{place}: expected name, acc, accCount, maxBatchSize, atTokens and perfParms with numbers alpha, beta, "
            f"gamma ({error!r})"
        ) from None
    try:
        # The chunk's own tokens are cached too, and each is read once where a whole prompt is one chunk.
        curve = LinearTime(
            alpha=alpha,
            beta=beta + gamma,
            per_decode=beta,
            per_kv_token=gamma,
            solo=alpha,
            solo_per_decode=beta,
            solo_per_kv_token=gamma,
        )
    except InvalidInput as error:
        raise InvalidInput(f"{place}: {error}") from None
    return row | {"curve": curve}


def _text(path: str | os.PathLike[str], caller: str) -> tuple[str, str]:
    """Name and content of a file."""
    try:
        return str(path), read_text(Path(path), encoding="utf-8-sig")
    except TypeError:
        raise InvalidInput(f"{caller}: path must be a file name; got {path!r}") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InvalidInput(f"{caller}: {str(path)!r} cannot be read: {reason}; check the path") from None


def _lines(text: str, path: str) -> tuple[list[str], Iterator[tuple[int, _Line]]]:
    """The header, and number and cells of each line below it that is not blank."""
    reader = csv.reader(io.StringIO(text), strict=True)
    header = [name.strip() for name in _next(reader, path) or []]
    if not header:
        raise InvalidInput(f"{path}: the file is empty; give a comma-separated table with a header")
    if len(set(header)) < len(header):
        raise InvalidInput(f"{path}, line 1: a column name occurs twice in {header}; rename one")

    def lines() -> Iterator[tuple[int, _Line]]:
        while (row := _next(reader, path)) is not None:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(header):
                raise InvalidInput(
                    f"{path}, line {reader.line_num}: expected {len(header)} cells ({', '.join(header)}), found "
                    f"{len(row)}. Repair the line"
                )
            yield reader.line_num, _Line(dict(zip(header, row, strict=True)))

    return header, lines()


def _next(reader: Any, path: str) -> list[str] | None:
    """The next line as CSV reads it; None at the end."""
    try:
        row: list[str] | None = next(reader, None)
    except csv.Error as error:
        raise InvalidInput(f"{path}, line {reader.line_num}: not comma-separated text ({error})") from None
    return row
