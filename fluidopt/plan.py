"""`Plan`: the solved fluid LP (allocation, shadow prices, price thresholds) with its certificate of optimality."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidopt.canonical import canonical, exists_in, without_decode_queue
from fluidopt.errors import InvalidInput
from fluidopt.model import FluidModel
from fluidopt.program import Array, LinearProgram, Lowering
from fluidopt.solvers import Certificate, Solution, certify
from fluidopt.solvers.concave import certify_concave
from fluidopt.solvers.graph import is_linear
from fluidopt.tables import shorten, text
from fluidopt.views import bullets, card, figures, html, paragraph, share_bar, signed_bar

if TYPE_CHECKING:
    import pandas as pd

    from fluidopt.policy import Policy

# Relative to a class's value or load; well above the certificate's tolerance, far below anything one would act on.
SIGNIFICANT = 1e-6
# Below this, relative to a class's value, a margin is rounding.
NEGLIGIBLE = 1e-12


@dataclass(frozen=True, eq=False)
class Plan:
    """An optimal plan. All quantities are per GPU; all money rates per second.

    Class-by-mode numbers are not unique in the model as the paper poses it (only totals are): the plan reports the
    canonical split, in which every class has the same share of each mode's prefill and decode work.
    """

    model: FluidModel
    program: LinearProgram
    solution: Solution

    @classmethod
    def from_solution(cls, model: FluidModel, program: LinearProgram, solution: Solution) -> Plan:
        """Make a plan of a solver's answer, split canonically where the model leaves the split open."""
        plan = cls(model, program, solution)
        return canonical(plan) if model.is_standard else plan

    # ---- the allocation ---------------------------------------------------------------------------------------

    @cached_property
    def _grids(self) -> dict[str, Array]:
        return self.program.column_grids(self.solution.values)

    @property
    def certificate(self) -> Certificate:
        """Primal and dual residuals and gap, computed from the arrays."""
        return self.solution.certificate

    @property
    def objective(self) -> float:
        """Value of what was maximised; the revenue rate unless `FluidModel.maximize` replaced it."""
        return self.certificate.objective

    @cached_property
    def revenue_rate(self) -> float:
        """R*, money/s per GPU, under the model's charging scheme."""
        if self.model.is_standard:
            return self.objective
        workload, prices = self.model.workload, self.model.scenario.prices
        if self.model.scenario.charging == "bundled":
            return float(self._request_value @ self.throughput)
        return float(
            prices.prompt * (workload.prompt_tokens @ self.admitted)
            + prices.output * (workload.output_tokens @ self.throughput)
        )

    @cached_property
    def _request_value(self) -> Array:
        """w, shape (I,): money per completed request, [L26] eq. (21)."""
        prices, workload = self.model.scenario.prices, self.model.workload
        return prices.prompt * workload.prompt_tokens + prices.output * workload.output_tokens

    @property
    def mode_share(self) -> Array:
        """phi, shape (K,): fraction of the fleet in each mode."""
        return self._grids["phi"]

    @property
    def prefill(self) -> Array:
        """x, shape (I, K): prefills in service per GPU; NaN in modes without prefill."""
        return self._grids["x"]

    @property
    def decode(self) -> Array:
        """y, shape (I, K): decodes in service per GPU; NaN in modes without decode slots."""
        return self._grids["y"]

    @property
    def prefill_queue(self) -> Array:
        """q_p, shape (I,): requests waiting for prefill per GPU; NaN where not determined (patient classes)."""
        return self._grids["q_p"]

    @property
    def decode_queue(self) -> Array:
        """q_d, shape (I,): requests waiting for decode per GPU; NaN where not determined (patient classes)."""
        return self._grids["q_d"]

    @cached_property
    def admitted(self) -> Array:
        """a, shape (I,): prefills completed, requests/s per GPU."""
        speed = np.array([mode.prefill_speed for _, mode in self.model.modes])
        tokens: Array = np.nansum(self.prefill * speed, axis=1)
        return tokens / self.model.workload.prompt_tokens

    @cached_property
    def throughput(self) -> Array:
        """z, shape (I,): requests completed, requests/s per GPU."""
        speed = np.array([mode.decode_speed for _, mode in self.model.modes])
        tokens: Array = np.nansum(self.decode * speed, axis=1)
        return tokens / self.model.workload.output_tokens

    @cached_property
    def allocation(self) -> pd.DataFrame:
        """A row per class: prefills, decodes per mode, queues (requests/GPU), throughput (requests/s/GPU)."""
        import pandas as pd

        labels = self.model.labels
        prefills, decodes = (np.flatnonzero(exists_in(self, name)) for name in ("x", "y"))
        columns: dict[str, Array] = {"prefill": np.nansum(self.prefill, axis=1)}
        if len(prefills) > 1:
            columns |= {f"prefill[{labels['mode'][k]}]": self.prefill[:, k] for k in prefills}
        columns |= {f"decode[{labels['mode'][k]}]": self.decode[:, k] for k in decodes}
        columns |= {
            "prefill_queue": self.prefill_queue,
            "decode_queue": self.decode_queue,
            "throughput": self.throughput,
        }
        return pd.DataFrame(columns, index=pd.Index(labels["class"], name="class"))

    @cached_property
    def modes(self) -> pd.DataFrame:
        """A row per mode: fraction of the fleet, and the slots that are in use there (requests/GPU)."""
        import pandas as pd

        modes = self.model.modes
        columns = {
            "fleet_share": self.mode_share,
            "prefill": np.nansum(self.prefill, axis=0),
            "decode": np.nansum(self.decode, axis=0),
            "decode_slots": np.array([mode.decode_slots for _, mode in modes]) * self.mode_share,
            "iteration_time": [mode.iteration_time for _, mode in modes],
        }
        return pd.DataFrame(columns, index=pd.Index(self.model.labels["mode"], name="mode"))

    @property
    def slot_average_tpot(self) -> float:
        """Seconds per token averaged over decode slots, all counted full ([L26] eq. (47)); not what a user sees."""
        slots = np.array([mode.decode_slots for _, mode in self.model.modes]) * self.mode_share
        times = np.array([mode.iteration_time or 0.0 for _, mode in self.model.modes])
        return float(slots @ times / slots.sum()) if slots.sum() > 0 else float("nan")

    # ---- prices -----------------------------------------------------------------------------------------------

    @cached_property
    def shadow_prices(self) -> pd.Series[float]:
        """Dual of every row by name: d(maximum)/d(right side of the row).

        ``fleet[g]``: money/s per GPU if the whole share of type g grew; ``prefill_balance[i]``: money per additional
        arriving request of class i (phi_i of [L26]); ``decode_balance[i]``: money per additional prefilled request
        (eta_i); ``decode_slots[k]``: money/s per additional decode slot.
        """
        import pandas as pd

        return pd.Series(self.solution.duals, index=pd.Index(self.program.row_names, name="row"), name="shadow_price")

    def price_ranges(self, rows: Sequence[str] | None = None) -> pd.DataFrame:
        """Where each shadow price holds: a row per constraint, right sides in absolute values, all else equal.

        Columns: ``shadow_price``, ``right_side``, ``lower`` and ``upper`` (the price holds between them),
        ``price_below`` and ``price_above`` (beyond them; missing where there is no solution), ``note`` (a price at a
        kink holds to one side only: the optimum is degenerate there).

        Args:
            rows: names of constraints as in `shadow_prices` (default: all of them).
        """
        import pandas as pd

        from fluidopt.solvers.ranging import price_ranges

        names = self.program.row_names
        unknown = [name for name in rows or () if name not in names]
        if unknown:
            raise InvalidInput(f"price_ranges: there is no constraint {unknown[0]!r}; see plan.shadow_prices.index")
        chosen = range(len(names)) if rows is None else [names.index(name) for name in rows]
        found = price_ranges(self.program, self.solution.duals, chosen)
        columns = {
            "shadow_price": [each.price for each in found],
            "right_side": [each.right_side for each in found],
            "lower": [each.lower for each in found],
            "upper": [each.upper for each in found],
            "price_below": [each.price_below for each in found],
            "price_above": [each.price_above for each in found],
            "note": ["degenerate: holds to one side only" if each.at_kink else "" for each in found],
        }
        return pd.DataFrame(columns, index=pd.Index([each.row for each in found], name="row"))

    @cached_property
    def reduced_costs(self) -> pd.Series[float]:
        """By column: what the objective would lose per unit if it were forced up from 0; 0 where it is used."""
        import pandas as pd

        cost = self.program.matrix.T @ self.solution.duals - self.program.objective
        terms = abs(self.program.matrix).T @ np.abs(self.solution.duals) + np.abs(self.program.objective)
        cost = np.where(np.abs(cost) > NEGLIGIBLE * terms, cost, 0.0)
        return pd.Series(cost, index=pd.Index(self.program.column_names, name="column"), name="reduced_cost")

    def without_decode_queue(self) -> Plan:
        """The constructive form of Proposition 3.2 of [L26]: same revenue, same completions, no decode queue.

        Requests that would wait for decode and give up are not prefilled in the first place. Prefill capacity falls to
        what is completed, and the modes are chosen anew to keep the decode capacity.

        Raises:
            InvalidInput: where the condition fails: kappa < (B-1)/B (in general: a GPU type whose decode throughput
                b/tau is largest in a mode with prefill), separate charging, or added rows.
        """
        return without_decode_queue(self)

    @cached_property
    def class_margin(self) -> Array:
        """Shape (I,): value of one more arriving request, money; negative where serving it would cost more than it
        brings (the reduced value r_i/mu_p,i of the price threshold rule), NaN where no mode can serve it. With service
        levels or added rows: d(maximum)/d(lambda_i), through every row that arrivals move."""
        if not self.model.is_standard:
            return self._worth_of_arrivals()
        duals = self.program.row_grids(self.solution.duals)
        reduced = self.program.column_grids(self.program.matrix.T @ self.solution.duals - self.program.objective)
        workload, modes = self.model.workload, self.model.modes
        # A reduced cost is what one unit in service costs beyond what it brings; over the service rate, per request.
        # The decode's counts too: for a class that is turned away, eta_i is not what the decode would really earn.
        prefill = _cheapest(reduced["x"], workload.prompt_tokens, np.array([mode.prefill_speed for _, mode in modes]))
        decode = _cheapest(reduced["y"], workload.output_tokens, np.array([mode.decode_speed for _, mode in modes]))
        if not (self.decode_buffer_vanishes and self.model.scenario.charging == "bundled"):
            # A prefill may be worth its while though its decode then waits in vain, which costs eta_i.
            decode = np.fmin(decode, np.where(workload.abandonment_rate > 0, duals["decode_balance"], np.nan))
        margin: Array = duals["prefill_balance"] - prefill - decode
        return np.where(np.abs(margin) <= NEGLIGIBLE * (1.0 + self._request_value), 0.0, margin)

    def _worth_of_arrivals(self) -> Array:
        """d(maximum)/d(lambda_i), shape (I,): every row whose right side an arrival moves, at its shadow price."""
        worth = np.zeros(len(self.model.workload))
        lowering = Lowering(self.model.symbolic, self.model.numbers())
        rates = self.model.workload.arrival_rate
        step = 1e-3 * np.maximum(rates, rates.max(initial=0.0)) + 1e-9
        for sign in (1.0, -1.0):
            lowering.change({"lambda": rates + sign * np.diag(step)})
            for row, block in zip(lowering.program.constraints, self.program.rows, strict=False):
                if "lambda" in lowering.given(*(term.coefficient for term in lowering.program.terms(row.difference))):
                    numbers = block.numbers[block.numbers >= 0]
                    right = lowering.right_side(row, block)
                    worth += sign * (right @ self.solution.duals[numbers]) / (2 * step)
        return np.where(np.abs(worth) <= NEGLIGIBLE * (1.0 + self._request_value), 0.0, worth)

    @cached_property
    def thresholds(self) -> pd.DataFrame:
        """The price rule, a row per class: serve all, part, or turn away, and how far the class is from changing.

        Decision "either" is a class at the threshold that this plan happens to serve in full or not at all.

        ``value``: money per completed request; ``margin``: value less the price of the capacity it takes, money per
        request (> 0: serve all, < 0: turn away, 0: the class at the threshold); ``served``: share of the arrivals
        that is prefilled.
        """
        import pandas as pd

        workload = self.model.workload
        margin, value = self.class_margin, self._request_value
        with np.errstate(divide="ignore", invalid="ignore"):
            served = np.where(workload.arrival_rate > 0, self.admitted / workload.arrival_rate, np.nan)
        decision = self._decisions(served, margin, value)
        columns = {"decision": decision, "served": served, "margin": margin, "value": value}
        return pd.DataFrame(columns, index=pd.Index(workload.names, name="class"))

    def _decisions(self, served: Array, margin: Array, value: Array) -> Array:
        """The price rule in words; where promises or added rows decide besides prices, what the plan does."""
        whole = (served < SIGNIFICANT) | (served > 1 - SIGNIFICANT)
        if not self.model.is_standard:
            return np.select([served > 1 - SIGNIFICANT, whole], ["serve all", "turn away"], "serve part")
        return np.select(
            [
                self.model.workload.abandonment_rate == 0,
                margin > SIGNIFICANT * value,
                (margin < -SIGNIFICANT * value) | np.isnan(margin),
                whole,
            ],
            ["serve all (never abandons)", "serve all", "turn away", "either"],
            "serve part",
        )

    @cached_property
    def binding(self) -> tuple[str, ...]:
        """The limits that hold the objective back, in words, with what relaxing each by one unit is worth."""
        found: list[tuple[float, str]] = []
        rows = {row.name: row for row in self.model.symbolic.constraints}
        for block in self.program.rows:
            row = rows.get(block.name)
            if row is None or row.name in {"prefill_slots", "decode_balance"}:  # tangents, and what limits nobody
                continue
            for place in np.argwhere(block.numbers >= 0):
                at = block.numbers[tuple(place)]
                price = float(self.solution.duals[at])
                if abs(price) <= SIGNIFICANT * (1.0 + abs(self.objective)):
                    continue
                labels = block.labels_at(row.over, place)
                meaning = row.sentence(labels)
                if row.name == "fleet":
                    meaning = f"all GPUs of type {labels['gpu']} are in use"
                elif row.name == "prefill_balance" and price < 0:
                    meaning = f"requests of {labels['class']} arrive that must be dealt with"
                unit = row.dual_unit.replace("money/s", "units of the objective").replace(
                    "money", "units of the objective"
                )
                right = self.program.row_upper[at] if np.isfinite(self.program.row_upper[at]) else 0.0
                found.append(
                    (abs(price * right), f"{meaning}: {price:.6g} {unit if self._other_objective else row.dual_unit}")
                )
        return tuple(sentence for _, sentence in sorted(found, key=lambda each: -each[0]))

    @property
    def _other_objective(self) -> bool:
        return self.model.scenario.objective is not None

    # ---- what to know about this plan -------------------------------------------------------------------------

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What the numbers do not show: undetermined queues, a decode queue, conditions that do not hold."""
        found = []
        workload = self.model.workload
        patient = [name for name, theta in zip(workload.names, workload.abandonment_rate, strict=True) if theta == 0]
        if patient:
            found.append(
                f"never abandon, so their queue lengths are not determined: {shorten(patient)}; they are served in full"
            )
        queue = np.nan_to_num(self.decode_queue)
        waiting = [name for name, q in zip(workload.names, queue, strict=True) if q > SIGNIFICANT]
        if waiting:
            why = (
                "separate charging pays for prefills whose decode never runs"
                if self.model.scenario.charging == "separate"
                else "decode slots are faster in mixed modes here, so Proposition 3.2 does not apply"
                if not self.decode_buffer_vanishes
                else "added rows ask for it, or another objective leaves it open"
            )
            found.append(f"requests wait for decode in {shorten(waiting)}: {why}")
        if self.model.scenario.charging == "separate" and waiting:
            found.append(
                "which decodes run is not unique under separate charging; the plan gives every class the same share"
            )
        decision = self.thresholds["decision"]
        tied = list(self.thresholds.index[decision.isin(["either", "serve part"])])
        if self.model.is_standard and "either" in set(decision) and len(tied) > 1:
            found.append(
                f"the optimum is not unique: {shorten(tied)} are all at the threshold, and another plan could serve "
                "more of one and less of another for the same revenue in the fluid limit"
            )
        if self.model.is_standard and self.model.scenario.charging == "bundled" and not self.decode_buffer_vanishes:
            found.append("the condition of decode-buffer elimination (kappa >= (B-1)/B) does not hold")
        return tuple(found)

    @cached_property
    def decode_buffer_vanishes(self) -> bool:
        """Whether Proposition 3.2's condition holds: some optimum of the bundled LP has no decode queue.

        kappa >= (B-1)/B for the mixed/solo pair; in general, in every GPU type a mode without prefill has the
        largest decode throughput b/tau.
        """
        for gpu in self.model.gpu_types:
            speeds = [(mode.decode_slots * mode.decode_speed, mode.prefills) for mode in gpu.modes()]
            best = max(speed for speed, _ in speeds)
            if not any(speed >= best * (1 - 1e-12) for speed, prefills in speeds if not prefills):
                return False
        return True

    @property
    def headline(self) -> str:
        """Revenue rate and, where it is something else, the objective, in one line."""
        line = f"{self.revenue_rate:.6g} money/s per GPU, {self.model.scenario.charging} charging"
        if self._other_objective:
            return f"{line}; objective {self.objective:.6g} ({self.model.scenario.objective})"
        penalties = self.revenue_rate - self.objective
        if penalties > SIGNIFICANT * (1.0 + abs(self.objective)):
            line += f"; less penalties of {penalties:.6g}: {self.objective:.6g}"
        return line

    # ---- onwards ----------------------------------------------------------------------------------------------

    def policy(self, *, gpus: int | None = None, kind: str | None = None, prefill_gpus: int | None = None) -> Policy:
        """Read the policy for a fleet of ``gpus`` GPUs off the plan.

        Args:
            gpus: n, at least 1 (default: the scenario's own number).
            kind: ``"gate-and-route"`` (also ``"GG-SP"``), ``"prioritize-and-route"``, ``"sli-aware"``,
                ``"sli-aware-general"``, or a baseline of [L26] section 6.3: ``"FI-WSP"``, ``"GI-WSP"``, ``"GF-WSP"``,
                ``"FG-SP"``. By default the one that belongs to the charging scheme. ``"refined"`` searches for the
                threshold rule that earns most on this number of GPUs, by simulation (`refine_policy` says more of it);
                under a minute on two cores.
            prefill_gpus: how many GPUs may prefill, in place of the plan's share rounded up (one GPU type, and a kind
                that partitions the fleet). In a small fleet one more or one fewer can earn more.

        Raises:
            InvalidInput: an unknown kind, or fewer GPUs than the plan needs roles.
        """
        from fluidopt.policy import extract

        gpus = gpus if gpus is not None else self.model.scenario.gpus
        if gpus is None:
            raise InvalidInput("Plan.policy: gpus (number of GPUs in the fleet) is required")
        if kind == "refined":
            from fluidopt.policy.refine import refine_policy

            if prefill_gpus is not None:
                raise InvalidInput(f"policy: kind 'refined' chooses prefill_gpus itself; got {prefill_gpus!r}")
            return refine_policy(self, gpus=gpus).policy
        return extract(self, gpus=gpus, kind=kind, prefill_gpus=prefill_gpus)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able data: the model, the primal and dual vectors; `from_dict` certifies them anew."""
        own = len(self.model.symbolic.constraints)
        return {
            "model": self.model.to_dict(),
            "method": self.solution.method,
            "tolerance": self.solution.tolerance,
            "tangents": [block.name for block in self.program.rows[own:]],
            "values": self.solution.values.tolist(),
            "duals": self.solution.duals.tolist(),
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Read a plan back; raises `InvalidInput` where its numbers do not solve its model."""
        try:
            model = FluidModel.from_dict(data["model"])
            values, duals = np.array(data["values"], dtype=float), np.array(data["duals"], dtype=float)
            method, tolerance = str(data["method"]), float(data["tolerance"])
            program = model.with_tangents([str(name) for name in data["tangents"]]).program()
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"not a saved plan: {error!r}") from None
        if (duals.shape, values.shape) != tuple((size,) for size in program.shape):
            raise InvalidInput(
                f"not a saved plan of this model: {values.size} values and {duals.size} duals for "
                f"{program.shape[1]} columns and {program.shape[0]} rows"
            )
        if is_linear(model.symbolic):
            certificate = certify(program, values, duals)
        else:
            program, certificate = certify_concave(model.symbolic, model.numbers(), values, duals)
        plan = cls(model, program, Solution(values, duals, certificate, method, tolerance))
        if not plan.certificate.holds(plan.solution.tolerance):
            raise InvalidInput(f"the saved plan does not solve its model: {plan.certificate}")
        return plan

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return (
            self.model == other.model
            and np.array_equal(self.solution.values, other.solution.values)
            and np.array_equal(self.solution.duals, other.solution.duals)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        lines = [
            f"Plan: {self.headline}",
            f"{self.solution.method}; {self.certificate}",
            "",
            text(self.modes),
            "",
            text(self.allocation),
            "",
            text(self.thresholds),
        ]
        if self.binding:
            lines += ["", "Held back by", *(f"  {sentence}" for sentence in self.binding[:12])]
        if self.notes:
            lines += ["", *(f"Note: {note}" for note in self.notes)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        per_mode = {"fleet_share": "of the fleet", "iteration_time": "s"}
        slots = dict.fromkeys(("prefill", "decode", "decode_slots"), "requests/GPU")
        classes = dict.fromkeys(self.allocation.columns, "requests/GPU") | {"throughput": "requests/s/GPU"}
        prices = {"served": "of arrivals", "margin": "money/request", "value": "money/request"}
        key = [("Revenue", self.revenue_rate, "money/s per GPU")]
        if self.objective != self.revenue_rate:
            key.append(("Objective", self.objective, ""))
        return card(
            f"Plan, {self.model.scenario.charging} charging",
            figures(*key, ("Completed", self.throughput.sum(), "requests/s per GPU"), ("Served", self._served, "%")),
            html(self.modes, title="Modes", units=per_mode | slots, bars={"fleet_share": share_bar}),
            html(self.allocation, title="Allocation", units=classes),
            html(self.thresholds, title="Price rule", units=prices, bars={"served": share_bar, "margin": signed_bar}),
            bullets("Held back by", self.binding),
            bullets("Notes", self.notes),
            paragraph(f"{self.headline}. {self.solution.method}; {self.certificate}.", muted=True),
        )

    @property
    def _served(self) -> float:
        """Share of all arrivals that is completed, percent."""
        arrivals = self.model.workload.arrival_rate.sum()
        return 100.0 * float(self.throughput.sum() / arrivals) if arrivals > 0 else float("nan")


def _cheapest(reduced: Array, tokens: Array, speed: Array) -> Array:
    """Least reduced cost per request over the modes, shape (I,); NaN where there is no mode."""
    able = speed > 0
    if not able.any():
        return np.full(len(tokens), np.nan)
    cost = reduced[:, able] * tokens[:, None] / speed[able]
    least: Array = np.where(np.isnan(cost), np.inf, cost).min(axis=1)
    return np.where(np.isinf(least), np.nan, least)
