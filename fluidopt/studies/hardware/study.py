"""What hardware is worth: revenue and time per token over a GPU's numbers, upgrades, and other GPU types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fluidopt.contention import GPU
from fluidopt.curves import Curve
from fluidopt.errors import InvalidInput
from fluidopt.inputs import is_number
from fluidopt.model import FluidModel
from fluidopt.plan import Plan
from fluidopt.program import Array
from fluidopt.studies.hardware.values import Performance, gpu_number, paired, performance, with_gpu
from fluidopt.studies.sizing.problem import SECONDS_PER_HOUR
from fluidopt.tables import number, shorten, text
from fluidopt.views import amount_bar, card, figures, html, paragraph, share_bar, signed_bar

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MOST_POINTS = 1_000_000
# A step of a number of the curve, relative, that is short enough to be its slope and long enough to be no rounding.
SHORT = 1e-4
# Revenues this close, relative, are equal.
TIE = 1e-9


class Meaning(NamedTuple):
    """A number of a GPU in words."""

    words: str
    unit: str
    scale: float
    """From the model's unit to the one of figures."""


NUMBERS = {
    "batch_size": Meaning("batch size B", "requests", 1.0),
    "chunk_size": Meaning("chunk size C", "tokens", 1.0),
    "alpha": Meaning("intercept alpha", "ms", 1e3),
    "beta": Meaning("slope beta", "µs/token", 1e6),
    "solo": Meaning("decode-only time 1/gamma", "ms", 1e3),
    "gamma": Meaning("decode-only speed gamma", "1/s", 1.0),
}


def hardware_study(
    model: FluidModel,
    *,
    batch_size: Sequence[int] | None = None,
    chunk_size: Sequence[int] | None = None,
    alpha: Sequence[float] | None = None,
    beta: Sequence[float] | None = None,
    solo: Sequence[float] | None = None,
    gamma: Sequence[float] | None = None,
    gpu: str | None = None,
) -> HardwareStudy:
    """Revenue and time per token on a grid of a GPU type's numbers, everything else as in ``model``.

    One number gives a curve, two a landscape ([L26] section 6.3, figures 9 and 10); more are possible. The plan is
    optimal at every point, and certified there. Service levels hold at every point too; where none can be kept the
    point is NaN. 10,000 points take about 5 s without service levels.

    Args:
        model: the model; its GPU type must have the mixed/solo pair of modes (no ``operating_modes``).
        batch_size: B, whole numbers.
        chunk_size: C, tokens, whole numbers.
        alpha: intercept of the mixed iteration time, s.
        beta: its slope in the chunk, s/token; of a curve that bends, the slope at ``chunk_size``, and the others move
            with it.
        solo: decode-only iteration time 1/gamma, s.
        gamma: the same as a speed, 1/s (not together with ``solo``).
        gpu: the GPU type whose numbers move, where there are several.

    Raises:
        InvalidInput: no numbers, values that a GPU cannot have, or a curve that does not have them.
    """
    caller = "hardware_study"
    at = gpu_number(model, gpu, caller)
    present = paired(model, at, caller)
    given = {
        "batch_size": batch_size,
        "chunk_size": chunk_size,
        "alpha": alpha,
        "beta": beta,
        "solo": solo,
        "gamma": gamma,
    }
    axes = {name: _axis(name, values) for name, values in given.items() if values is not None}
    if not axes:
        raise InvalidInput(f"{caller}: give values of at least one of {', '.join(given)}")
    if {"solo", "gamma"} <= axes.keys():
        raise InvalidInput(f"{caller}: solo and gamma are the same number (gamma = 1/solo); give one of them")
    shape = tuple(values.size for values in axes.values())
    points = int(np.prod(shape))
    if points > MOST_POINTS:
        raise InvalidInput(f"{caller}: the grid has {points} points, more than {MOST_POINTS}; give fewer values")
    gpus = [_changed(present, dict(zip(axes, point, strict=True))) for point in product(*axes.values())]
    return HardwareStudy(model, at, axes, performance(model, gpus, at=at).reshaped(shape))


def _axis(name: str, values: object) -> Array:
    try:
        axis = np.array(values, dtype=float)
    except (TypeError, ValueError):
        axis = np.empty(0)
    if axis.ndim != 1 or axis.size == 0 or not np.isfinite(axis).all() or (np.diff(axis) <= 0).any():
        raise InvalidInput(f"hardware_study: {name} must be a list of increasing numbers; got {values!r}")
    return axis


def _changed(gpu: GPU, numbers: dict[str, float]) -> GPU:
    """The type with other numbers.

    Raises:
        InvalidInput: its curve does not have one of them, or refuses the value.
    """
    whole = {name: float(value) for name, value in numbers.items() if name in ("batch_size", "chunk_size")}
    of_curve = {name: value for name, value in numbers.items() if name not in whole}
    if (gamma := of_curve.pop("gamma", None)) is not None:
        if not gamma > 0:
            raise InvalidInput(f"gamma must be above 0; got {gamma!r}")
        of_curve["solo"] = 1.0 / gamma
    missing = [name for name in of_curve if not hasattr(gpu.curve, name)]
    if missing:
        raise InvalidInput(
            f"GPU {gpu.name!r} has a tabulated curve, which has no {missing[0]}; fit a curve with one "
            "(fit_iteration_time), or move batch_size and chunk_size"
        )
    curve: Any = gpu.curve
    changes: dict[str, Any] = whole | ({"curve": replace(curve, **_slopes(gpu, of_curve))} if of_curve else {})
    return replace(gpu, **changes)


def _slopes(gpu: GPU, numbers: dict[str, float]) -> dict[str, Any]:
    """The numbers of a curve, beta as that of its pieces: a faster GPU is so at every chunk."""
    curve: Any = gpu.curve
    kinks = getattr(curve, "chunk_kinks", ())
    if "beta" not in numbers or not kinks:
        return dict(numbers)
    slope = chunk_slope(gpu)
    if not slope > 0:
        raise InvalidInput(
            f"GPU {gpu.name!r}: its curve is flat at chunk_size {gpu.chunk_size}, so beta cannot scale it"
        )
    factor = numbers["beta"] / slope
    return numbers | {
        "beta": curve.beta * factor,
        "chunk_kinks": tuple(replace(kink, slope=kink.slope * factor) for kink in kinks),
    }


@dataclass(frozen=True, eq=False)
class HardwareStudy:
    """Revenue and time per token of the best plan over numbers of a GPU type."""

    model: FluidModel
    at: int
    """Number of the GPU type whose numbers move."""
    axes: dict[str, Array]
    """The values of each number, in the order of the grid's axes; s, s/token, 1/s, requests, tokens."""
    performance: Performance
    """What the best plan does at each point, arrays of the grid's shape."""

    @property
    def gpu(self) -> GPU:
        """The type as it is in the model."""
        return self.model.gpu_types[self.at]

    @property
    def revenue_rate(self) -> Array:
        """R*, money/s per GPU, shape of the grid."""
        return self.performance.revenue_rate

    def present(self, name: str) -> float:
        """The number as it is in the model, NaN where its curve does not have it."""
        if name == "gamma":
            return 1.0 / self.present("solo")
        return _value(self.gpu, name) if hasattr(self.gpu, name) or hasattr(self.gpu.curve, name) else np.nan

    def saturates_at(self, share: float = 0.99) -> float:
        """From where on the number of a one-number study no longer matters: ``share`` of the best revenue is reached.

        The value nearest to the end that earns less, beyond which no value earns less than ``share`` of the best.

        Raises:
            InvalidInput: the study has several numbers, ``share`` is not between 0 and 1, or nowhere is there a plan.
        """
        if len(self.axes) != 1:
            raise InvalidInput(f"saturates_at: the study must be of one number; this one is of {', '.join(self.axes)}")
        if not (is_number(share) and 0 < share <= 1):
            raise InvalidInput(f"saturates_at: share must be above 0 and at most 1; got {share!r}")
        (values,) = self.axes.values()
        earned = np.nan_to_num(self.revenue_rate, nan=-np.inf)
        if np.isinf(earned).all():
            raise InvalidInput("saturates_at: no plan keeps the promises at any value; widen the study or loosen them")
        if earned[0] > earned[-1]:
            values, earned = values[::-1], earned[::-1]
        short = np.flatnonzero(earned < share * earned.max())
        return float(values[0 if short.size == 0 else min(short[-1] + 1, values.size - 1)])

    def to_frame(self) -> pd.DataFrame:
        """A row per point: the numbers, ``revenue_rate`` (money/s per GPU), both TPOTs (s), ``prefill_share``,
        ``kappa``."""
        import pandas as pd

        grid = np.meshgrid(*self.axes.values(), indexing="ij")
        columns = {name: values.ravel() for name, values in zip(self.axes, grid, strict=True)}
        for name in ("revenue_rate", "slot_average_tpot", "user_tpot", "prefill_share", "kappa"):
            columns[name] = getattr(self.performance, name).ravel()
        return pd.DataFrame(columns)

    def plot(self, *, offers: GPUComparison | None = None) -> Figure:
        """Draw the study: one number as curves, two as a landscape, on which ``offers`` are put as points.

        Raises:
            InvalidInput: the study has more than two numbers, or offers are given for one that is no landscape.
        """
        from fluidopt.studies.hardware.figures import plot_hardware, plot_landscape

        if len(self.axes) == 2:
            return plot_landscape(self, offers=offers)
        if offers is not None:
            raise InvalidInput("plot: offers are points of a landscape; give a study of two numbers")
        return plot_hardware([self])

    @property
    def headline(self) -> str:
        """The span of revenue in one line."""
        earned = self.revenue_rate
        spans = [f"{name} {number(values[0])} to {number(values[-1])}" for name, values in self.axes.items()]
        over = f"{earned.size} points over {', '.join(spans)}"
        if np.isnan(earned).all():
            return f"{over}: no plan keeps the promises anywhere"
        kept = int(np.isfinite(earned).sum())
        refused = "" if kept == earned.size else f"; no plan keeps the promises at {earned.size - kept} of them"
        return f"{over}: {number(np.nanmin(earned))} to {number(np.nanmax(earned))} money/s per GPU{refused}"

    def __repr__(self) -> str:
        return f"HardwareStudy: {self.headline}\n\n{text(self.to_frame(), max_rows=12)}"

    def _repr_html_(self) -> str:
        units = {"revenue_rate": "money/s per GPU", "prefill_share": "of the fleet", "alpha": "s", "beta": "s/token"}
        units |= {"batch_size": "requests", "chunk_size": "tokens", "solo": "s", "gamma": "1/s"}
        return card(
            f"Hardware of {self.gpu.name}",
            paragraph(f"{self.headline}."),
            html(
                self.to_frame(),
                title="Grid",
                units=units | dict.fromkeys(("slot_average_tpot", "user_tpot"), "s/token"),
                bars={"revenue_rate": amount_bar, "prefill_share": share_bar},
                max_rows=12,
            ),
        )


# ---- upgrades -------------------------------------------------------------------------------------------------------

# What an engineer buys, and which numbers that moves.
BOTH = "memory and compute"
UPGRADES = {
    "memory": ("batch_size",),
    "compute": ("beta",),
    "memory bandwidth": ("alpha", "solo"),
    BOTH: ("batch_size", "beta"),
}


def hardware_upgrades(model: FluidModel, *, step: float = 0.1, gpu: str | None = None) -> HardwareUpgrades:
    """What better hardware would earn: ``step`` more memory, ``step`` less time per prefill token, and so on.

    Each upgrade is a re-solve, not an extrapolation. *Memory*: B grows by ``step``, rounded up to whole requests.
    *Compute*: beta falls by ``step`` (time that grows with the tokens of an iteration is spent computing). *Memory
    bandwidth*: alpha and 1/gamma fall by ``step`` (time that every iteration takes goes on reading the weights).

    Args:
        model: the model as it is.
        step: relative size of an upgrade, above 0 and below 1.
        gpu: the GPU type that is upgraded, where there are several.

    Raises:
        InvalidInput: an argument breaks a rule.
        InfeasibleModel: the model as it is has no plan.
    """
    if not (is_number(step) and 0 < step < 1):
        raise InvalidInput(f"hardware_upgrades: step must be above 0 and below 1; got {step!r}")
    at = gpu_number(model, gpu, "hardware_upgrades")
    present = paired(model, at, "hardware_upgrades")
    plan = model.solve()
    possible = {name: of for name, of in UPGRADES.items() if _has(present, of)}
    better = [_changed(present, {name: _better(present, name, step) for name in of}) for of in possible.values()]
    numbers = [name for name in ("batch_size", "chunk_size", "alpha", "beta", "solo") if _has(present, (name,))]
    nudged = [_changed(present, {name: _nudged(present, name)}) for name in numbers]
    tried = performance(model, [present, *better, *nudged], at=at)
    count = 1 + len(better)
    steps = np.array([_nudged(present, name) - _value(present, name) for name in numbers])
    slopes = (tried.revenue_rate[count:] - tried.revenue_rate[0]) / steps
    return HardwareUpgrades(
        plan,
        at,
        float(step),
        dict(zip(possible, better, strict=True)),
        tried,
        dict(zip(numbers, slopes.tolist(), strict=True)),
    )


def _value(gpu: GPU, name: str) -> float:
    if name == "beta":
        return chunk_slope(gpu)
    return float(getattr(gpu if hasattr(gpu, name) else gpu.curve, name))


def _has(gpu: GPU, names: Sequence[str]) -> bool:
    return all((hasattr(gpu, name) or hasattr(gpu.curve, name)) and _value(gpu, name) > 0 for name in names)


def _better(gpu: GPU, name: str, step: float) -> float:
    value = _value(gpu, name)
    return float(np.ceil(value * (1.0 + step) - 1e-9)) if name == "batch_size" else value * (1.0 - step)


def _nudged(gpu: GPU, name: str) -> float:
    """A short step in the direction of better hardware; one more where only whole numbers are possible."""
    value = _value(gpu, name)
    return value + 1.0 if name in ("batch_size", "chunk_size") else value * (1.0 - SHORT)


@dataclass(frozen=True, eq=False)
class HardwareUpgrades:
    """What better hardware would earn, the plan chosen anew each time."""

    plan: Plan
    """The optimal plan on the hardware as it is."""
    at: int
    """Number of the GPU type that is upgraded."""
    step: float
    """Relative size of each upgrade."""
    better: dict[str, GPU]
    """The upgraded type, by upgrade."""
    performance: Performance
    """Of the type as it is, of each upgrade, and of a short step of each number."""
    gradient: dict[str, float]
    """dR*/d(number), money/s per GPU and unit (request, token, s, s/token), on the side where hardware is better; per
    whole request and token for B and C. Less time is better, so times have negative entries."""

    @property
    def gains(self) -> dict[str, float]:
        """Money/s per GPU that each upgrade earns more, by upgrade."""
        earned = self.performance.revenue_rate
        return dict(zip(self.better, (earned[1 : 1 + len(self.better)] - earned[0]).tolist(), strict=True))

    def to_frame(self) -> pd.DataFrame:
        """A row per upgrade.

        Columns: ``change`` in words; ``gain`` (money/s per GPU); ``hourly_gain`` (money/hour per GPU: what the upgrade
        may cost); ``gain_share``; ``elasticity`` (% of revenue per % of upgrade); ``user_tpot`` (s/token after it).
        """
        import pandas as pd

        present, rows = self.plan.model.gpu_types[self.at], {}
        for place, (name, gpu) in enumerate(self.better.items(), 1):
            gain, base = self.gains[name], float(self.performance.revenue_rate[0])
            moved = [(each, _value(present, each), _value(gpu, each)) for each in UPGRADES[name]]
            relative = abs(moved[0][2] / moved[0][1] - 1.0)
            rows[name] = {
                "change": ", ".join(
                    f"{each} {number(old * NUMBERS[each].scale)} to {number(new * NUMBERS[each].scale)} "
                    f"{NUMBERS[each].unit}"
                    for each, old, new in moved
                ),
                "gain": gain,
                "hourly_gain": gain * SECONDS_PER_HOUR,
                "gain_share": gain / base if base else np.nan,
                "elasticity": gain / base / relative if base else np.nan,
                "user_tpot": float(self.performance.user_tpot[place]),
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("upgrade")

    @cached_property
    def advice(self) -> str:
        """What to buy first, and what it may cost, in words."""
        single = {name: gain for name, gain in self.gains.items() if name != BOTH}
        earned = float(self.performance.revenue_rate[0])
        floor = TIE * (1e-12 + abs(earned))
        worth = [name for name in sorted(single, key=lambda each: -single[each]) if single[name] > floor]
        if not worth:
            return (
                f"No upgrade by {self.step:.0%} earns more: capacity does not hold this plan back "
                f"({number(earned)} money/s per GPU)."
            )
        best = worth[0]
        row, gain = self.to_frame().loc[best], single[best]
        lines = [
            f"Buy {best} first: {row['change']} earns {number(gain)} money/s per GPU more "
            f"({row['gain_share']:.1%}), so it may cost up to {number(row['hourly_gain'])} money/hour per "
            "GPU."
        ]
        others = [f"{name} {number(single[name])}" for name in worth[1:]]
        if others:
            lines.append(f"Next, money/s per GPU: {shorten(others)}.")
        for name in single:
            if abs(single[name]) <= floor:
                lines.append(f"More {name} alone earns nothing.")
            elif single[name] < 0:
                lines.append(f"More {name} alone makes a promise dearer to keep: {number(single[name])}.")
        both = self.gains.get(BOTH, 0.0)
        parts = self.gains.get("memory", 0.0) + self.gains.get("compute", 0.0)
        if both > parts + 1e-6 * abs(earned):
            lines.append(f"Memory and compute together earn {number(both)}, more than one by one.")
        return " ".join(lines)

    def __repr__(self) -> str:
        return f"HardwareUpgrades\n{text(self.to_frame())}\n\n{self.advice}"

    def _repr_html_(self) -> str:
        units = {"gain": "money/s per GPU", "hourly_gain": "money/hour per GPU", "gain_share": "of revenue"}
        return card(
            f"Upgrades by {self.step:.0%}, each with a plan of its own",
            figures(("As it is", self.plan.objective, "money/s per GPU")),
            paragraph(self.advice),
            html(
                self.to_frame(),
                title="Upgrades",
                units=units | {"elasticity": "% per %", "user_tpot": "s/token"},
                bars={"gain": signed_bar},
            ),
        )


# ---- GPU types against each other -----------------------------------------------------------------------------------


def compare_gpus(model: FluidModel, gpus: Sequence[GPU], *, gpu: str | None = None) -> GPUComparison:
    """Put other GPU types in the place of the model's own, one for one, and see what they earn and cost.

    Each GPU has the same share of the arrivals as before: it is the same number of GPUs that are replaced. How many
    fewer of a better type would do is for `size_fleet`. Prices per hour are ``GPU.hourly_price``; a type without one
    is compared by the price up to which it would be the better buy.

    Args:
        model: the model with the present type.
        gpus: the types to compare, names unique; of a model that takes several GPUs, the group is one (`known_gpu`).
        gpu: the type that is replaced, where there are several.

    Raises:
        InvalidInput: an argument breaks a rule.
        InfeasibleModel: a type on which no plan keeps the promises.
    """
    at = gpu_number(model, gpu, "compare_gpus")
    offered = list(gpus) if isinstance(gpus, Sequence) else []
    if not offered or not all(isinstance(each, GPU) for each in offered):
        raise InvalidInput(f"compare_gpus: gpus must be a list of GPU; got {gpus!r}")
    names = [each.name for each in (model.gpu_types[at], *offered)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InvalidInput(
            f"compare_gpus: names must be unique, the present type's among them; {twice[0]!r} occurs more than once"
        )
    plans = tuple(with_gpu(model, each, at=at).solve() for each in (model.gpu_types[at], *offered))
    return GPUComparison(plans, at)


def chunk_slope(gpu: GPU) -> float:
    """beta of a GPU: what one more token of chunk adds to a mixed iteration, s/token.

    The curve's own number where it has one line in the chunk, its slope at ``chunk_size`` where it bends.
    """
    curve: Curve = gpu.curve
    if hasattr(curve, "beta"):
        bends = [kink.slope for kink in getattr(curve, "chunk_kinks", ()) if kink.at <= gpu.chunk_size]
        return float(bends[-1] if bends else curve.beta)
    cached, beside = gpu.kv_tokens or 0.0, gpu.batch_size - 1
    here, next_token = (curve.mixed(gpu.chunk_size + more, beside, cached) for more in (0, 1))
    return next_token - here


@dataclass(frozen=True, eq=False)
class GPUComparison:
    """GPU types in the place of the present one, the plan chosen anew for each; the present type comes first."""

    plans: tuple[Plan, ...]
    at: int
    """Number of the type that is replaced."""

    @cached_property
    def gpus(self) -> tuple[GPU, ...]:
        """The types."""
        return tuple(plan.model.gpu_types[self.at] for plan in self.plans)

    def to_frame(self) -> pd.DataFrame:
        """A row per type, the present one first.

        Columns: ``batch_size``, ``chunk_size``, ``beta`` (s/token, `chunk_slope`), ``kappa``; ``revenue_rate`` (money/s
        per GPU); ``slot_average_tpot`` and ``user_tpot`` (s/token); ``hourly_price``; ``hourly_profit`` (revenue less
        price, money/hour per GPU; missing without a price); ``break_even_price`` (money/hour: below it the type is the
        better buy than the present one at its price; without a price, what it may cost more).
        """
        import pandas as pd

        revenue = np.array([plan.objective for plan in self.plans])
        price = np.array([np.nan if gpu.hourly_price is None else gpu.hourly_price for gpu in self.gpus])
        columns = {
            "batch_size": [gpu.batch_size for gpu in self.gpus],
            "chunk_size": [gpu.chunk_size for gpu in self.gpus],
            "beta": [chunk_slope(gpu) for gpu in self.gpus],
            "kappa": [gpu.kappa for gpu in self.gpus],
            "revenue_rate": revenue,
            "slot_average_tpot": [plan.slot_average_tpot for plan in self.plans],
            "user_tpot": [user_tpot(plan) for plan in self.plans],
            "hourly_price": price,
            "hourly_profit": SECONDS_PER_HOUR * revenue - price,
            "break_even_price": np.nan_to_num(price[0]) + SECONDS_PER_HOUR * (revenue - revenue[0]),
        }
        return pd.DataFrame(columns, index=pd.Index([gpu.name for gpu in self.gpus], name="gpu"))

    @property
    def statement(self) -> str:
        """Which type earns most, and which is the best buy, in words."""
        frame = self.to_frame()
        revenue, profit = frame["revenue_rate"].to_numpy(), frame["hourly_profit"].to_numpy()
        # Of types that earn the same the one that was given first.
        most = int(np.flatnonzero(revenue >= revenue.max() * (1 - TIE))[0])
        line = f"{self.gpus[most].name} earns most, {number(revenue[most])} money/s per GPU"
        if np.isnan(profit).any():
            return f"{line}. Give every GPU an hourly_price to know the best buy; break_even_price says up to where."
        best = int(profit.argmax())
        after = f"{number(profit[best])} money/hour per GPU after its price"
        return f"{line}; {self.gpus[best].name} is the best buy: {after}."

    def __repr__(self) -> str:
        return f"GPUComparison\n{text(self.to_frame())}\n\n{self.statement}"

    def _repr_html_(self) -> str:
        units = {"batch_size": "requests", "chunk_size": "tokens", "beta": "s/token", "revenue_rate": "money/s per GPU"}
        units |= dict.fromkeys(("slot_average_tpot", "user_tpot"), "s/token")
        units |= dict.fromkeys(("hourly_price", "hourly_profit", "break_even_price"), "money/hour")
        return card(
            "GPU types, one for one",
            paragraph(self.statement),
            html(self.to_frame(), title="Types", units=units, bars={"revenue_rate": amount_bar}),
        )


def user_tpot(plan: Plan) -> float:
    """Time in decode and its queue over tokens, s/token, of a plan; NaN where nothing is decoded."""
    speed = np.array([mode.decode_speed for _, mode in plan.model.modes])
    tokens = float(np.nansum(plan.decode * speed))
    impatient = plan.model.workload.abandonment_rate > 0
    waiting = float(np.nan_to_num(plan.decode_queue)[impatient].sum())
    return (float(np.nansum(plan.decode)) + waiting) / tokens if tokens > 0 else float("nan")
