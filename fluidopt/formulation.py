"""The fluid LP of LLM serving in symbols: one template per family of rows, written once.

The operating-mode form; the mixed/solo pair of arXiv:2602.02987 ([L26]) is the case of two modes, in which the rows
here are its eqs. (40) and (42).
"""

from __future__ import annotations

from functools import cache
from typing import Any

from sympy import Expr, IndexedBase, Integer, Symbol

from fluidopt.algebra import IndexSet, Parameter, RowFamily, SymbolicProgram, Variable
from fluidopt.errors import InvalidInput
from fluidopt.tables import shorten


def _index(name: str, letter: str, size: str) -> IndexSet:
    return IndexSet(name, Symbol(letter, integer=True), Symbol(size, integer=True))


CLASSES = _index("class", "i", "I")
MODES = _index("mode", "k", "K")
TYPES = _index("gpu", "g", "G")
_i, _k, _g = CLASSES.symbol, MODES.symbol, TYPES.symbol

_lam, _theta, _P, _D = (IndexedBase(name) for name in ("lambda", "theta", "P", "D"))
_C, _b, _tau = (IndexedBase(name) for name in ("C", "b", "tau"))
_share, _member = IndexedBase("share"), IndexedBase("member")
_mu_p, _mu_d, _w = IndexedBase("mu_p"), IndexedBase("mu_d"), IndexedBase("w")
_c_p, _c_d = Symbol("c_p"), Symbol("c_d")
_x, _y, _q_p, _q_d, _phi = (IndexedBase(name) for name in ("x", "y", "q_p", "q_d", "phi"))

PARAMETERS = (
    Parameter(_lam, (CLASSES,), "requests/s/GPU", "arrival rate"),
    Parameter(_theta, (CLASSES,), "1/s", "abandonment rate"),
    Parameter(_P, (CLASSES,), "tokens", "mean prompt tokens"),
    Parameter(_D, (CLASSES,), "tokens", "mean decode iterations"),
    Parameter(_C, (MODES,), "tokens", "prefill chunk of the mode"),
    Parameter(_b, (MODES,), "requests/GPU", "decode slots of the mode"),
    Parameter(_tau, (MODES,), "s", "iteration time of the mode"),
    Parameter(_share, (TYPES,), "1", "fraction of the fleet that is of the type"),
    Parameter(_member, (TYPES, MODES), "1", "1 where the mode belongs to the type"),
    Parameter(_c_p, (), "money/token", "price of a prompt token"),
    Parameter(_c_d, (), "money/token", "price of an output token"),
    Parameter(_mu_p, (CLASSES, MODES), "1/s", "prefill service rate, eq. (4)", _C[_k] / (_P[_i] * _tau[_k])),
    Parameter(_mu_d, (CLASSES, MODES), "1/s", "decode service rate, eq. (4)", 1 / (_D[_i] * _tau[_k])),
    Parameter(
        _w,
        (CLASSES,),
        "money/request",
        "value of a completed request, eq. (21)",
        _c_p * _P[_i] + _c_d * _D[_i],
    ),
)

_PATIENT = "its abandonment rate is 0, so the fluid model leaves the length of its queue open"

VARIABLES = (
    Variable(_phi, (MODES,), "1", "fraction of the fleet in the mode"),
    Variable(_x, (CLASSES, MODES), "requests/GPU", "prefills in service", exists=_C[_k] > 0),
    Variable(_y, (CLASSES, MODES), "requests/GPU", "decodes in service", exists=_b[_k] > 0),
    Variable(_q_p, (CLASSES,), "requests/GPU", "waiting for prefill", exists=_theta[_i] > 0, absent=_PATIENT),
    Variable(_q_d, (CLASSES,), "requests/GPU", "waiting for decode", exists=_theta[_i] > 0, absent=_PATIENT),
)

_prefilled = MODES.sum(_mu_p[_i, _k] * _x[_i, _k])
_decoded = MODES.sum(_mu_d[_i, _k] * _y[_i, _k])

ROWS = (
    RowFamily(
        "fleet",
        MODES.sum(_member[_g, _k] * _phi[_k]),
        "==",
        _share[_g],
        (TYPES,),
        meaning="every GPU of type {gpu} is in one of its modes",
        dual="sigma",
        dual_unit="money/s per GPU",
    ),
    RowFamily(
        "prefill_slots",
        CLASSES.sum(_x[_i, _k]),
        "==",
        _phi[_k],
        (MODES,),
        where=_C[_k] > 0,
        meaning="a GPU is in mode {mode} while its prefill runs",
        dual="xi",
        dual_unit="money/s per prefill in service",
    ),
    RowFamily(
        "decode_slots",
        CLASSES.sum(_y[_i, _k]),
        "<=",
        _b[_k] * _phi[_k],
        (MODES,),
        where=_b[_k] > 0,
        meaning="every decode slot of mode {mode} is in use",
        dual="nu",
        dual_unit="money/s per decode slot",
    ),
    RowFamily(
        "prefill_balance",
        _prefilled + _theta[_i] * _q_p[_i],
        "==",
        _lam[_i],
        (CLASSES,),
        meaning="only so many requests of {class} arrive",
        dual="varphi",
        dual_unit="money per arriving request",
    ),
    RowFamily(
        "decode_balance",
        _decoded + _theta[_i] * _q_d[_i],
        "==",
        _prefilled,
        (CLASSES,),
        meaning="every prefilled request of {class} is decoded or abandons",
        dual="eta",
        dual_unit="money per prefilled request",
    ),
)

_OBJECTIVES = {
    "bundled": CLASSES.sum(MODES.sum(_w[_i] * _mu_d[_i, _k] * _y[_i, _k])),
    "separate": _c_p * MODES.sum(_C[_k] / _tau[_k] * _phi[_k]) + _c_d * CLASSES.sum(MODES.sum(_y[_i, _k] / _tau[_k])),
}


@cache
def formulation(charging: str) -> SymbolicProgram:
    """The fluid LP under ``charging`` (``"bundled"`` or ``"separate"``)."""
    return SymbolicProgram(
        index_sets=(CLASSES, MODES, TYPES),
        parameters=PARAMETERS,
        variables=VARIABLES,
        objective=_OBJECTIVES[charging],
        constraints=ROWS,
        title=f"Fluid LP, {charging} charging",
    )


class Family:
    """A parameter or variable of a model, subscripted by index symbols or by labels: ``q_p[i]``, ``q_p["code"]``."""

    def __init__(self, quantity: Parameter | Variable, labels: dict[str, tuple[str, ...]]) -> None:
        self.quantity = quantity
        self.labels = labels

    def __getitem__(self, key: Any) -> Expr:
        keys = key if isinstance(key, tuple) else (key,)
        over = self.quantity.over
        if len(keys) != len(over):
            sets = ", ".join(index.name for index in over)
            raise InvalidInput(f"{self.quantity.name} takes {len(over)} subscript(s) ({sets}); got {len(keys)}")
        return self.quantity.symbol[tuple(self._member(each, index) for each, index in zip(keys, over, strict=True))]

    def _member(self, key: Any, index: IndexSet) -> Expr:
        if key == index.symbol:
            return index.symbol
        labels = self.labels[index.name]
        if isinstance(key, str) and key in labels:
            return Integer(labels.index(key))
        raise InvalidInput(
            f"{self.quantity.name}[{key!r}]: there is no {index.name} of that name; use the symbol {index.symbol} for "
            f"all of them, or one of {shorten([repr(label) for label in labels])}"
        )

    def __repr__(self) -> str:
        sets = ", ".join(str(index.symbol) for index in self.quantity.over)
        return f"{self.quantity.name}[{sets}]: {self.quantity.meaning} ({self.quantity.unit})"


class Symbols:
    """The symbols of a model, for writing rows and objectives.

    Index symbols ``i`` (class), ``k`` (mode), ``g`` (GPU type); variables ``x``, ``y``, ``q_p``, ``q_d``, ``phi``;
    parameters ``lambda_``, ``theta``, ``P``, ``D``, ``C``, ``b``, ``tau``, ``mu_p``, ``mu_d``, ``w``, ``c_p``, ``c_d``.
    ``sum(expression, over=k)`` sums over a set.
    """

    i, k, g = _i, _k, _g
    c_p, c_d = _c_p, _c_d

    def __init__(self, labels: dict[str, tuple[str, ...]]) -> None:
        self.x, self.y, self.q_p, self.q_d, self.phi = (
            Family(each, labels) for each in (VARIABLES[1], VARIABLES[2], VARIABLES[3], VARIABLES[4], VARIABLES[0])
        )
        given = {each.name: Family(each, labels) for each in PARAMETERS if each.over}
        self.lambda_, self.theta, self.P, self.D = (given[name] for name in ("lambda", "theta", "P", "D"))
        self.C, self.b, self.tau, self.share = (given[name] for name in ("C", "b", "tau", "share"))
        self.mu_p, self.mu_d, self.w = (given[name] for name in ("mu_p", "mu_d", "w"))

    @staticmethod
    def sum(expression: Expr, *, over: Symbol) -> Expr:
        """Sum over all classes (``over=i``), modes (``k``) or GPU types (``g``)."""
        sets = {index.symbol: index for index in (CLASSES, MODES, TYPES)}
        if over not in sets:
            raise InvalidInput(f"sum: over must be one of the index symbols i, k, g; got {over!r}")
        if not isinstance(expression, Expr):
            raise InvalidInput(f"sum: expected an expression in the model's symbols; got {expression!r}")
        return sets[over].sum(expression)
