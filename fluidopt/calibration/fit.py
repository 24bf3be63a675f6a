"""This module owns fitting a curve to measured iteration times: which form, how good it is, and where it is worst."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fluidopt.calibration.forms import FORMS, Fitted, Form, Outcome, fit_form
from fluidopt.calibration.regression import MOST_LEVELS, Measurements
from fluidopt.calibration.tables import LABELS, MEASURED, select_series
from fluidopt.contention import GPU
from fluidopt.curves import Array
from fluidopt.errors import ContentionWarning, InvalidInput
from fluidopt.inputs import dump
from fluidopt.tables import MISSING, text
from fluidopt.views import amount_bar, bullets, card, figures, html, paragraph

if TYPE_CHECKING:
    import pandas as pd

FLAT = 0.1
"""Relative error above which a flat decode-only time is warned about."""
AXES = ("chunk", "decodes", "kv_tokens")


@dataclass(frozen=True, eq=False)
class IterationTimeFit:
    """A curve fitted to measured iteration times, and how far to trust it."""

    curve: Fitted
    """The curve, as a `GPU` takes it."""
    form: Form
    """Its form."""
    measurements: pd.DataFrame
    """What was fitted: the columns of `read_iteration_times`, ``fitted`` (s) and ``error`` (fitted/measured - 1)."""
    coefficients: pd.DataFrame
    """A row per fitted number: ``value``, ``standard_error`` and ``unit``; empty for a table.

    Standard errors are those of independent residuals. Where the form itself is off, residuals of neighbours are
    alike and the errors are too small: `worst` and `cross_validation` then say more.
    """
    cross_validation: pd.DataFrame
    """A row per form compared: ``error`` (relative), ``standard_error`` of its distance to the best form, ``levels``
    left out in turn, ``chosen``; see `fit_iteration_time`. Empty where the measurements have too few levels."""
    notes: tuple[str, ...]
    """What had to be assumed, and how the form was chosen."""

    @cached_property
    def r_squared(self) -> pd.Series[float]:
        """Share of the variance of the times, s^2, that the curve explains: ``mixed`` and ``decode_only``."""
        import pandas as pd

        frame, mixed = self.measurements, self.measurements["chunk"] > 0
        return pd.Series({"mixed": _explained(frame[mixed]), "decode_only": _explained(frame[~mixed])})

    @cached_property
    def worst(self) -> pd.Series[Any]:
        """The measurement with the largest relative error, in the columns of `measurements`."""
        return self.measurements.iloc[int(self.measurements["error"].abs().argmax())]

    def gpu(self, *, batch_size: int, chunk_size: int, kv_tokens: float | None = None, name: str = "gpu") -> GPU:
        """A GPU with this curve.

        Args:
            batch_size: B, requests that it batches at most.
            chunk_size: C, prefill tokens per iteration.
            kv_tokens: mean tokens in the KV cache per decode; required where the curve depends on them.
            name: its label.

        Raises:
            InvalidInput: an argument breaks a rule.
        """
        return GPU(self.curve, batch_size=batch_size, chunk_size=chunk_size, kv_tokens=kv_tokens, name=name)

    @property
    def headline(self) -> str:
        """The fit in one sentence."""
        mixed, alone = ("–" if np.isnan(each) else f"{each:.4f}" for each in self.r_squared)
        worst = self.worst
        left_out = ""
        if len(self.cross_validation):
            left_out = f"{100 * self.cross_validation['error'][self.form]:.1f} % off at levels left out; "
        return (
            f"{self.form} curve through {len(self.measurements)} measurements: R² {mixed} mixed, {alone} decode-only; "
            f"{left_out}"
            f"worst {100 * worst['error']:+.1f} % at {_place(worst)} ({1e3 * worst['seconds']:.4g} ms measured, "
            f"{1e3 * worst['fitted']:.4g} ms fitted)"
        )

    @property
    def coefficients_text(self) -> pd.DataFrame:
        """The coefficients as text, four digits of each however small."""
        numbers = self.coefficients[["value", "standard_error"]]
        shown: pd.DataFrame = numbers.map(lambda each: MISSING if np.isnan(each) else f"{each:.4g}")
        return shown.assign(unit=self.coefficients["unit"])

    def to_toml(self) -> str:
        """The lines that give a GPU this curve in a scenario file, with what the fit is worth as a comment."""
        lines = [f"# {line}" for line in wrap(self.headline, 110)]
        if self.curve.depends_on_kv:
            cached = self.measurements.loc[self.measurements["decodes"] > 0, "kv_tokens"]
            lines += [
                "# [gpu] must have kv_tokens, the mean tokens in the KV cache per decode; measured: "
                f"{cached.min():g} to {cached.max():g}"
            ]
        return "\n".join([*lines, "[gpu.curve]", *_toml(self.curve), ""])

    def to_dict(self) -> dict[str, Any]:
        """The fit as JSON-able data, without the measurements."""
        worst = {name: float(self.worst[name]) for name in (*MEASURED, "fitted", "error")}
        return {
            "form": self.form,
            "curve": dump(self.curve),
            "measurements": len(self.measurements),
            "r_squared": {name: _value(each) for name, each in self.r_squared.items()},
            "worst": worst,
            "coefficients": [
                {"name": name, **row, "standard_error": _value(row["standard_error"])}
                for name, row in self.coefficients.iterrows()
            ],
            "cross_validation": self.cross_validation.rename_axis("form").reset_index().to_dict("records"),
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        parts = [self.headline]
        if len(self.coefficients):
            parts += ["", text(self.coefficients_text)]
        if len(self.cross_validation):
            parts += ["", text(self.cross_validation)]
        return "\n".join([*parts, *(f"Note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        mixed, alone = self.r_squared
        errors = self.cross_validation
        return card(
            f"Iteration-time fit, {self.form}",
            figures(
                ("R², with a prefill chunk", mixed, ""),
                ("R², decodes alone", alone, ""),
                ("Worst error", 100.0 * self.worst["error"], "%"),
                ("Measurements", len(self.measurements), ""),
            ),
            paragraph(f"{self.headline}."),
            html(self.coefficients_text, title="Coefficients") if len(self.coefficients) else "",
            html(
                errors,
                title="Error of each form where a level is left out",
                units={"error": "relative"},
                bars={"error": amount_bar},
            )
            if len(errors)
            else "",
            bullets("Notes", self.notes),
        )


def fit_iteration_time(
    frame: pd.DataFrame,
    *,
    form: Form | Literal["auto"] = "auto",
    model: str | None = None,
    gpu: str | None = None,
    tensor_parallel: int | None = None,
    errors: Literal["relative", "absolute"] = "relative",
    physical: bool = True,
) -> IterationTimeFit:
    """Fit an iteration-time curve to measurements of one model on one GPU.

    Forms, from the simplest: "affine" (`IterationTime`), "linear" (`LinearTime`), "piecewise" (the same with kinks,
    placed at measured levels while that lowers BIC, at most four per line) and "table" (`TabulatedTime`). Lines are
    fitted by weighted least squares with slopes of at least 0, the decode-only ones apart from the mixed ones.

    "auto" chooses by cross-validation. Neighbours on a grid of measurements are alike, so whole levels are left out:
    one chunk size, one number of decodes or one KV length at a time, of those that lie between others. The error of a
    form is the mean over levels of the root mean square relative error at the level left out. Chosen is the simplest
    form that is not worse than the best by more than one standard error of their difference, level by level. The
    measured ends stay in: beyond them nothing is claimed.

    Args:
        frame: as from `read_iteration_times`; leave out with ``frame.query(...)`` what the GPU will not run.
        form: the form, or "auto".
        model: the model to fit, where the frame has several; a part of its name does.
        gpu: the GPU, likewise.
        tensor_parallel: the tensor-parallel size, likewise.
        errors: what the squares are of: errors relative to the time measured, so that short iterations count as much
            as long ones, or errors in seconds.
        physical: whether the curve keeps that a prefill never speeds decodes up; residuals are those of the curve as
            it is then.

    Raises:
        InvalidInput: an argument breaks a rule, the frame lacks a column, holds several series or what is no
            measurement, or does not determine the form.

    Warns:
        ContentionWarning: the affine curve was taken, and its flat decode-only time is off by more than 10 % somewhere.
    """
    if form not in ("auto", *FORMS):
        raise InvalidInput(f"fit_iteration_time: form must be 'auto' or one of {list(FORMS)}; got {form!r}")
    if errors not in ("relative", "absolute"):
        raise InvalidInput(f"fit_iteration_time: errors must be 'relative' or 'absolute'; got {errors!r}")
    frame = _one_series(frame, model=model, gpu=gpu, tensor_parallel=tensor_parallel)
    measured = _measurements(frame, errors)
    notes: tuple[str, ...] = ()
    try:
        if form == "auto":
            form, table, reason = _choose(measured, physical)
            notes = (reason,)
        else:
            table = _compare((form,), measured, physical)
        outcome = fit_form(form, measured, physical=physical)
    except InvalidInput as error:
        raise InvalidInput(f"fit_iteration_time: {error}") from None
    fitted = outcome.curve.grid().times(measured.chunk, measured.decodes, measured.kv_tokens)
    fit = IterationTimeFit(
        outcome.curve,
        form,
        frame.assign(fitted=fitted, error=fitted / measured.seconds - 1.0),
        _coefficients(outcome),
        table,
        (*outcome.notes, *notes),
    )
    if (fault := _flatness(fit)) is not None:
        warnings.warn(fault, ContentionWarning, stacklevel=2)
    return fit


def _one_series(frame: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """The measurements of one series, sorted, with the columns that a fit needs."""
    import pandas as pd

    if not isinstance(frame, pd.DataFrame):
        raise InvalidInput(
            f"fit_iteration_time: frame must be a DataFrame, as from read_iteration_times; got {type(frame).__name__}"
        )
    frame = frame if "kv_tokens" in frame else frame.assign(kv_tokens=0.0)
    missing = [name for name in MEASURED if name not in frame]
    if missing:
        raise InvalidInput(f"fit_iteration_time: column {missing[0]!r} is missing; the frame has {list(frame)}")
    frame = select_series(frame, **wanted, caller="fit_iteration_time")
    labels = [name for name in LABELS if name in frame]
    series = frame[labels].drop_duplicates()
    if labels and len(series) > 1:
        there = "; ".join(", ".join(f"{name}={row[name]!r}" for name in labels) for _, row in series.iterrows())
        raise InvalidInput(f"fit_iteration_time: the frame holds {len(series)} series; choose one of: {there}")
    if frame.empty:
        raise InvalidInput("fit_iteration_time: the frame has no measurement; give at least a few of each kind")
    values = frame[list(MEASURED)].apply(pd.to_numeric, errors="coerce")
    wrong = ~np.isfinite(values) | (values < 0)
    wrong["seconds"] |= values["seconds"] <= 0
    if wrong.to_numpy().any():
        row = int(np.flatnonzero(wrong.any(axis=1))[0])
        column = next(name for name in MEASURED if wrong[name].iloc[row])
        rule = "above 0" if column == "seconds" else "a number of at least 0"
        raise InvalidInput(f"fit_iteration_time: {column} must be {rule}; row {row} has {frame[column].iloc[row]}")
    values[labels] = frame[labels]
    ordered: pd.DataFrame = values.sort_values(list(AXES), ignore_index=True)
    return ordered


def _measurements(frame: pd.DataFrame, errors: str) -> Measurements:
    chunk, decodes, kv_tokens, seconds = (frame[name].to_numpy(dtype=float) for name in MEASURED)
    weight = 1.0 / seconds if errors == "relative" else np.full(seconds.size, 1.0 / seconds.mean())
    return Measurements(chunk, decodes, kv_tokens, seconds, weight)


# ---- which form ---------------------------------------------------------------------------------------------------


def _choose(measured: Measurements, physical: bool) -> tuple[Form, pd.DataFrame, str]:
    """The form that cross-validation chooses, its table, and the choice in words."""
    forms = [form for form in FORMS if _can_be(form, measured, physical)] or ["table"]
    table = _compare(forms, measured, physical)
    if table.empty:
        taken: Form = "linear" if "linear" in forms else "table"
        return taken, table, f"too few levels to leave one out and compare forms: {taken} taken"
    error = table["error"]
    chosen, best = forms[int(table["chosen"].argmax())], forms[int(error.argmin())]
    reason = f"of the forms, {best} misses levels left out by {100 * error[best]:.1f} % on average"
    if chosen == best:
        return chosen, table, f"{reason}, the least"
    simpler = f"{chosen} is simpler and by {100 * error[chosen]:.1f} % not significantly worse"
    return chosen, table, f"{reason}; {simpler}"


def _compare(forms: Sequence[Form], measured: Measurements, physical: bool) -> pd.DataFrame:
    """The error of each form at the levels left out, and which one is chosen; empty where there are too few levels."""
    import pandas as pd

    missed = np.array([[_missed(form, measured, kept, physical) for form in forms] for kept in _folds(measured)])
    missed = missed.reshape(-1, len(forms))
    missed = missed[~np.isnan(missed).any(axis=1)]
    if len(missed) < 2:
        return pd.DataFrame(columns=["error", "standard_error", "levels", "chosen"])
    error = missed.mean(axis=0)
    distance = missed - missed[:, [int(error.argmin())]]
    spread = distance.std(axis=0, ddof=1) / np.sqrt(len(missed))
    chosen = int(np.flatnonzero(distance.mean(axis=0) <= spread)[0])
    return pd.DataFrame(
        {
            "error": error,
            "standard_error": spread,
            "levels": len(missed),
            "chosen": np.arange(len(forms)) == chosen,
        },
        index=pd.Index(forms, name="form"),
    )


def _can_be(form: Form, measured: Measurements, physical: bool) -> bool:
    """Whether all measurements together determine the form."""
    try:
        fit_form(form, measured, physical=physical)
    except InvalidInput:
        return False
    return True


def _folds(measured: Measurements) -> Iterator[NDArray[np.bool_]]:
    """Which measurements stay, for each level left out; of very many levels, for each stretch of neighbours."""
    for axis in AXES:
        values: Array = getattr(measured, axis)
        inner = np.unique(values[values > 0])[1:-1]
        for stretch in np.array_split(inner, min(inner.size, MOST_LEVELS) or 1):
            if stretch.size:
                yield (values < stretch[0]) | (values > stretch[-1])


def _missed(form: Form, measured: Measurements, kept: NDArray[np.bool_], physical: bool) -> float:
    """Root mean square relative error at the measurements that are not kept; nan where the rest tells no curve."""
    try:
        curve = fit_form(form, measured.where(kept), physical=physical).curve
    except InvalidInput:
        return np.nan
    out = measured.where(~kept)
    error = curve.grid().times(out.chunk, out.decodes, out.kv_tokens) / out.seconds - 1.0
    return float(np.sqrt(np.mean(error**2)))


# ---- what is said about it ----------------------------------------------------------------------------------------


def _coefficients(outcome: Outcome) -> pd.DataFrame:
    import pandas as pd

    rows = [(each.value, each.standard_error, each.unit) for each in outcome.coefficients]
    index = pd.Index([each.name for each in outcome.coefficients], name="coefficient")
    table = pd.DataFrame(rows, columns=["value", "standard_error", "unit"], index=index)
    return table.astype({"value": float, "standard_error": float})


def _explained(frame: pd.DataFrame) -> float:
    """R^2 in seconds; nan where the times do not vary."""
    seconds = frame["seconds"]
    total = float(((seconds - seconds.mean()) ** 2).sum())
    return 1.0 - float(((frame["fitted"] - seconds) ** 2).sum()) / total if total > 0 else float("nan")


def _flatness(fit: IterationTimeFit) -> str | None:
    """Where a flat decode-only time is too far off, in words."""
    alone = fit.measurements[fit.measurements["chunk"] == 0]
    off = alone["error"].abs()
    if fit.form != "affine" or off.max() <= FLAT:
        return None
    ends = [alone.iloc[int(at)] for at in (alone["seconds"].argmin(), alone["seconds"].argmax())]
    measured = " and ".join(f"{1e3 * end['seconds']:.4g} ms at {_place(end)}" for end in ends)
    return (
        f"the flat decode-only time {1e3 * fit.curve.decode_only(0):.4g} ms is off by up to {100 * off.max():.0f} %, "
        f"by more than {100 * FLAT:.0f} % at {int((off > FLAT).sum())} of {len(alone)} measurements: {measured} were "
        "measured. Fit form='linear', or leave out batches that do not occur"
    )


def _place(row: pd.Series[Any]) -> str:
    """Where a measurement lies, in words."""
    parts = [f"chunk {row['chunk']:g}"] if row["chunk"] > 0 else []
    parts.append(f"{row['decodes']:g} decode{'s' if row['decodes'] != 1 else ''}")
    if row["decodes"] > 0 and row["kv_tokens"] > 0:
        parts.append(f"{row['kv_tokens']:g} KV tokens")
    return ", ".join(parts)


def _value(number: float) -> float | None:
    """A number for JSON, which has no nan."""
    return None if np.isnan(number) else float(number)


def _toml(curve: Fitted) -> Iterator[str]:
    """A curve as TOML lines, without what is left at its default."""
    from dataclasses import MISSING, fields

    for field in fields(curve):
        value = getattr(curve, field.name)
        if field.name == "form" or field.default is MISSING or value != field.default:
            yield f"{field.name} = {_toml_value(value)}"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        inner = [_toml_value(each) for each in value]
        deep = value and isinstance(value[0], tuple)
        return f"[\n{''.join(f'  {each},{chr(10)}' for each in inner)}]" if deep else f"[{', '.join(inner)}]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{{ at = {value.at:g}, slope = {value.slope:.6g} }}"
