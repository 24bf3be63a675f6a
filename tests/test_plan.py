"""The plan: canonical split, totals, prices and thresholds, tables, notes and the way to JSON and back."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import build, decode_bound_margin, mode_models, pair_models

import fluidopt as fo
from fluidopt.reference import reference_model
from fluidopt.solvers import solve_program

GPU = reference_model().scenario.gpu


def totals(model, values):
    """Mode totals, and class throughput before and after decode, of a solution vector."""
    grids = model.program().column_grids(values)
    prefill = np.array([mode.prefill_speed for _, mode in model.modes])
    decode = np.array([mode.decode_speed for _, mode in model.modes])
    return {
        "phi": grids["phi"],
        "prefills by mode": np.nansum(grids["x"], axis=0),
        "admitted": np.nansum(grids["x"] * prefill, axis=1) / model.workload.prompt_tokens,
        "completed": np.nansum(grids["y"] * decode, axis=1) / model.workload.output_tokens,
    }


# ---- canonical split ----------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(st.one_of(pair_models(), mode_models()))
def test_the_canonical_split_keeps_the_totals_and_is_certified(model):
    raw = solve_program(model.program())
    plan = model.solve("highs")
    before, after = totals(model, raw.values), totals(model, plan.solution.values)
    for name in ("phi", "prefills by mode", "admitted"):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-7, atol=1e-8, err_msg=name)
    tokens = model.workload.output_tokens
    assert tokens @ after["completed"] == pytest.approx(tokens @ before["completed"], rel=1e-7, abs=1e-6)
    if model.scenario.charging == "bundled":
        np.testing.assert_allclose(after["completed"], before["completed"], rtol=1e-7, atol=1e-8)
    assert plan.certificate.holds(1e-7)
    assert plan.revenue_rate == pytest.approx(raw.certificate.objective, rel=1e-7, abs=1e-9)


@settings(max_examples=60)
@given(st.one_of(pair_models(), mode_models()))
def test_slots_that_are_left_over_are_those_that_the_router_fills_last(model):
    plan = model.solve()
    try:
        order = plan.policy(gpus=10_000).router.order
    except fo.InvalidInput:
        assume(False)
    modes = plan.modes
    left = (modes["decode_slots"] - modes["decode"])[list(order)]
    used = modes["decode"][list(order)]
    for at in range(len(order) - 1):
        assert left.iloc[at] < 1e-6 or used.iloc[at + 1 :].max() < 1e-6, list(order)


@settings(max_examples=40)
@given(mode_models())
def test_every_class_has_the_same_share_of_every_modes_work(model):
    plan = model.solve()
    for grid in (plan.prefill, plan.decode):
        total = np.nansum(grid, axis=0)
        used = total > 1e-6
        shares = grid[:, used] / total[used]
        if used.any():
            np.testing.assert_allclose(
                shares, np.broadcast_to(shares.mean(axis=1, keepdims=True), shares.shape), atol=1e-9
            )


@settings(max_examples=40)
@given(pair_models(charging=st.just("separate")))
def test_separate_charging_completes_the_same_share_of_every_impatient_class(model):
    plan = model.solve()
    impatient = (model.workload.abandonment_rate > 0) & (plan.admitted > 1e-6)
    share = plan.throughput[impatient] / plan.admitted[impatient]
    np.testing.assert_allclose(share, share[:1].repeat(len(share)), rtol=1e-6)
    patient = model.workload.abandonment_rate == 0
    np.testing.assert_allclose(plan.throughput[patient], model.workload.arrival_rate[patient], rtol=1e-6)


def test_the_split_of_the_reference_is_the_package_rule(reference, reference_plan):
    """y_s,i = f g_i x_i/kappa and y_m,i = (1-f) g_i x_i with f = min(1, kappa B (1-S)/G)."""
    x = np.nansum(reference_plan.prefill, axis=1)
    g = 256 * reference.workload.output_tokens / reference.workload.prompt_tokens
    kappa = GPU.kappa
    f = min(1.0, kappa * 16 * (1 - x.sum()) / (g @ x))
    assert reference_plan.decode[:, 1] == pytest.approx(f * g * x / kappa, rel=1e-6)
    assert reference_plan.decode[:, 0] == pytest.approx((1 - f) * g * x, rel=1e-6)


# ---- the allocation -----------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.one_of(pair_models(), mode_models()))
def test_the_allocation_satisfies_the_model_by_its_own_numbers(model):
    plan, workload = model.solve(), model.workload
    theta = workload.abandonment_rate
    shares = np.array([gpu.share for gpu in model.gpu_types])
    of_type = np.array([[of.name == gpu.name for of, _ in model.modes] for gpu in model.gpu_types])
    np.testing.assert_allclose(of_type @ plan.mode_share, shares, atol=1e-7)
    prefills = np.array([mode.prefills for _, mode in model.modes])
    np.testing.assert_allclose(np.nansum(plan.prefill, axis=0)[prefills], plan.mode_share[prefills], atol=1e-7)
    slots = np.array([mode.decode_slots for _, mode in model.modes])
    assert np.all(np.nansum(plan.decode, axis=0) <= slots * plan.mode_share + 1e-6)
    waiting, behind = np.nan_to_num(plan.prefill_queue), np.nan_to_num(plan.decode_queue)
    np.testing.assert_allclose(plan.admitted + theta * waiting, workload.arrival_rate, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(plan.throughput + theta * behind, plan.admitted, rtol=1e-6, atol=1e-6)
    assert np.array_equal(np.isnan(plan.prefill_queue), theta == 0)
    assert np.array_equal(np.isnan(plan.decode_queue), theta == 0)


def test_the_tables_of_the_reference(reference_plan):
    allocation = reference_plan.allocation
    assert list(allocation.columns) == [
        "prefill",
        "decode[mixed]",
        "decode[solo]",
        "prefill_queue",
        "decode_queue",
        "throughput",
    ]
    assert list(allocation.index) == ["decode-heavy", "prefill-heavy"]
    modes = reference_plan.modes
    assert modes["fleet_share"].sum() == pytest.approx(1)
    assert modes.loc["mixed", "prefill"] == pytest.approx(modes.loc["mixed", "fleet_share"])
    assert modes["decode"].to_numpy() == pytest.approx(modes["decode_slots"].to_numpy())
    assert allocation["throughput"].to_numpy() @ [230, 380] == pytest.approx(reference_plan.revenue_rate)


def test_several_prefill_modes_have_a_column_each():
    gpu = fo.GPU(
        GPU.curve,
        batch_size=16,
        chunk_size=256,
        operating_modes=(
            fo.Mode("small", chunk=128, decode_slots=15, iteration_time=0.0254),
            fo.Mode("large", chunk=512, decode_slots=15, iteration_time=0.0492),
            fo.Mode("solo", decode_slots=16, iteration_time=0.022),
        ),
    )
    plan = build(reference_model().workload, gpu).solve()
    assert {"prefill[small]", "prefill[large]"} <= set(plan.allocation.columns)
    parts = plan.allocation[["prefill[small]", "prefill[large]"]].sum(axis=1)
    assert parts.to_numpy() == pytest.approx(plan.allocation["prefill"].to_numpy())


EXTREMES = {
    "decode only": (fo.Mode("decode", decode_slots=16, iteration_time=0.022),),
    "prefill only": (fo.Mode("prefill", chunk=256, iteration_time=0.03), fo.Mode("idle")),
}


@pytest.mark.parametrize("charging", ["bundled", "separate"])
@pytest.mark.parametrize("modes", EXTREMES.values(), ids=EXTREMES.keys())
def test_a_fleet_that_can_only_do_half_the_work_is_planned_and_shown(modes, charging):
    gpu = fo.GPU(GPU.curve, batch_size=16, chunk_size=256, operating_modes=modes)
    plan = build(reference_model().workload, gpu, charging=charging).solve()
    assert plan.throughput == pytest.approx([0, 0])
    prefill_pays = charging == "separate" and modes[0].prefills
    assert (plan.revenue_rate > 1) == prefill_pays
    assert "Plan:" in repr(plan)
    assert "Plan, " in plan._repr_html_()


def test_a_class_without_arrivals_is_planned_and_shown(reference):
    silent = fo.WorkloadClass("silent", arrival_rate=0, prompt_tokens=10, output_tokens=10, abandonment_rate=0.1)
    plan = build((*reference.workload, silent), GPU).solve()
    assert plan.revenue_rate == pytest.approx(297.71619, rel=1e-6)
    assert np.isnan(plan.thresholds.loc["silent", "served"])
    assert "silent" in repr(plan)


def test_no_arrivals_at_all():
    plan = build(reference_model().workload.scaled(0), GPU).solve()
    assert plan.revenue_rate == pytest.approx(0, abs=1e-12)
    assert "Plan: 0 money/s" in repr(plan)


def test_batch_size_one_prefills_or_decodes_never_both():
    gpu = fo.GPU(GPU.curve, batch_size=1, chunk_size=256)
    plan = build(reference_model().workload.scaled(0.02), gpu).solve()
    assert np.nansum(plan.decode, axis=0)[0] == 0
    assert plan.revenue_rate == pytest.approx(0.02 * 305, rel=1e-6)


# ---- prices -------------------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(pair_models(charging=st.just("bundled")))
def test_the_class_margin_is_the_reduced_value_of_the_price_threshold_rule(model):
    """r_i/mu_p,i = w_i - (u + v a_i)/mu_p,i, with u and v read off the plan's own prices."""
    assume(decode_bound_margin(model) > 1e-6)
    plan, workload = model.solve(), model.workload
    (gpu,), prices = model.gpu_types, model.scenario.prices
    mixed, _ = gpu.modes()
    kappa, batch = gpu.kappa, gpu.batch_size
    v = plan.shadow_prices["decode_slots[solo]"] / kappa
    u = plan.shadow_prices[f"fleet[{gpu.name}]"] - batch * kappa * v
    work = mixed.chunk * workload.output_tokens / workload.prompt_tokens
    needed = work + kappa * batch - (batch - 1)
    value = prices.prompt * workload.prompt_tokens + prices.output * workload.output_tokens
    rate = mixed.prefill_speed / workload.prompt_tokens
    if batch > 1:
        # At a degenerate vertex the two decode prices need not have the ratio kappa, and (u, v) do not say all.
        assume(plan.shadow_prices["decode_slots[mixed]"] == pytest.approx(v, rel=1e-6, abs=1e-9))
    margin = value - (u + v * needed) / rate
    np.testing.assert_allclose(plan.class_margin, margin, rtol=1e-6, atol=1e-7 * value.max())


@settings(max_examples=100)
@given(pair_models(charging=st.just("bundled")))
def test_the_decision_is_what_the_plan_does(model):
    plan = model.solve()
    for name, row in plan.thresholds.iterrows():
        if model.workload[name].arrival_rate == 0:
            assert np.isnan(row["served"])
        elif row["decision"].startswith("serve all"):
            assert row["served"] == pytest.approx(1, abs=1e-6)
        elif row["decision"] == "turn away":
            assert row["served"] == pytest.approx(0, abs=1e-6)
        else:
            assert row["decision"] in {"serve part", "either"}
            assert -1e-6 <= row["served"] <= 1 + 1e-6


@settings(max_examples=80)
@given(pair_models(charging=st.just("bundled"), patient=False))
def test_a_vertex_serves_at_most_two_classes_in_part(model):
    assume(decode_bound_margin(model) > 1e-6)
    plan = model.solve(options=fo.SolverOptions(method="simplex"))
    load = model.workload.arrival_rate
    served = plan.admitted[load > 0] / load[load > 0]
    assert np.sum((served > 1e-7) & (served < 1 - 1e-7)) <= 2


def test_a_class_that_brings_less_than_its_prefill_costs_is_turned_away():
    """Prefill is scarce, decode is not: u > 0 = v, and r = w mu_p - u decides. Nothing of the poorer class is served,
    so the solver's price of its empty decode queue means nothing."""
    rich = fo.WorkloadClass("rich", arrival_rate=20, prompt_tokens=2000, output_tokens=20, abandonment_rate=0.1)
    poor = fo.WorkloadClass("poor", arrival_rate=20, prompt_tokens=2000, output_tokens=10, abandonment_rate=0.1)
    plan = build([rich, poor], GPU).solve()
    assert plan.thresholds["decision"].tolist() == ["serve part", "turn away"]
    assert plan.class_margin == pytest.approx([0, -0.2 * 10], abs=1e-6)


def test_a_class_that_is_turned_away():
    """A class that brings little and takes much: negative margin, nothing served."""
    poor = fo.WorkloadClass("poor", arrival_rate=0.5, prompt_tokens=10, output_tokens=3000, abandonment_rate=0.1)
    plan = build((*reference_model().workload, poor), GPU, prices=fo.TokenPrices(prompt=1, output=0.001)).solve()
    assert plan.thresholds.loc["poor", "decision"] == "turn away"
    assert plan.class_margin[2] < 0
    assert plan.thresholds.loc["poor", "served"] == pytest.approx(0, abs=1e-9)


def test_binding_limits_of_the_reference_in_words(reference_plan):
    """The dearest limit first: shadow price times what there is of it."""
    assert [line.split(":")[0] for line in reference_plan.binding] == [
        "all GPUs of type A100/Qwen-8B are in use",
        "only so many requests of prefill-heavy arrive",
        "every decode slot of mode mixed is in use",
        "every decode slot of mode solo is in use",
    ]
    assert "165.489 money/s per GPU" in reference_plan.binding[0]
    assert "264.454 money per arriving request" in reference_plan.binding[1]


def test_shadow_prices_are_named_by_row(reference, reference_plan):
    assert list(reference_plan.shadow_prices.index) == reference.program().row_names
    assert isinstance(reference_plan.shadow_prices, pd.Series)


# ---- notes --------------------------------------------------------------------------------------------------------


def test_patient_classes_are_noted():
    model = build(reference_model().workload.scaled(0.3).with_abandonment(0), GPU)
    plan = model.solve()
    assert any("not determined: decode-heavy, prefill-heavy" in note for note in plan.notes)
    assert plan.thresholds["decision"].tolist() == ["serve all (never abandons)"] * 2
    assert plan.allocation["prefill_queue"].isna().all()


def test_a_decode_queue_under_separate_charging_is_noted():
    notes = reference_model("separate").solve().notes
    assert any("separate charging pays for prefills whose decode never runs" in note for note in notes)
    assert any("not unique" in note for note in notes)


def test_an_ordinary_plan_has_no_notes(reference_plan):
    assert reference_plan.notes == ()
    assert reference_plan.decode_buffer_vanishes


def test_classes_that_all_sit_at_the_threshold_are_noted():
    """With prefill and decode both scarce only token totals matter (w is linear in P and D): shares are not unique."""
    classes = [
        fo.WorkloadClass(f"class {at}", arrival_rate=5, prompt_tokens=p, output_tokens=d, abandonment_rate=0.1)
        for at, (p, d) in enumerate([(300, 5), (3000, 400), (1000, 40), (1500, 300)])
    ]
    plan = build(classes, fo.GPU(GPU.curve, batch_size=16, chunk_size=256)).solve()
    assert set(plan.thresholds["decision"]) <= {"serve part", "either"}
    assert plan.class_margin == pytest.approx([0] * 4, abs=1e-6)
    assert any("unique" in note for note in plan.notes)


# ---- (d) JSON -----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.one_of(pair_models(physical=st.just(True)), mode_models()))
def test_a_plan_goes_to_json_and_back(model):
    plan = model.solve()
    again = fo.Plan.from_dict(json.loads(plan.to_json()))
    assert again == plan
    assert again.model == model
    assert again.certificate == plan.certificate
    assert again.solution.method == plan.solution.method


def test_plan_equality(reference_plan):
    assert reference_plan == reference_model().solve("highs")
    assert reference_plan != reference_model("separate").solve("highs")
    assert reference_plan != 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": None}, "not a saved plan"),
        ({"values": ["x"] * 12}, "not a saved plan"),
        ({"values": [1.0]}, "1 values and 8 duals for 12 columns and 8 rows"),
        ({"values": [0.0] * 12}, "the saved plan does not solve its model"),
        ({"duals": [0.0] * 8}, "the saved plan does not solve its model"),
        ({"values": [[0.0] * 6] * 2}, "not a saved plan"),
        ({"values": [float("nan")] * 12}, "does not solve its model"),
        ({"duals": [float("nan")] * 8}, "does not solve its model"),
        ({"model": {}}, "not a saved plan.*classes is required"),
        ({"model": 3}, "not a saved plan"),
    ],
    ids=str,
)
def test_a_damaged_plan_is_refused(reference_plan, change, message):
    with pytest.raises(fo.InvalidInput, match=message):
        fo.Plan.from_dict(reference_plan.to_dict() | change)


@pytest.mark.parametrize("data", [{}, None, [], "plan", 3], ids=repr)
def test_what_is_no_plan_is_refused(data):
    with pytest.raises(fo.InvalidInput, match="not a saved plan"):
        fo.Plan.from_dict(data)


def test_a_model_with_rows_and_an_objective_of_its_own_goes_to_json_and_back(reference):
    s = reference.symbols
    reference.subject_to(s.q_p[s.i] <= 1, name="wait", meaning="{class} waits briefly")
    reference.subject_to('sum(y["decode-heavy", k], k) <= 11', name="few", where="b[k] > 0")
    reference.maximize("sum(sum(mu_d[i, k]*y[i, k], k), i)")
    plan = reference.solve()
    assert fo.FluidModel.from_dict(json.loads(reference.to_json())) == reference
    again = fo.Plan.from_dict(json.loads(plan.to_json()))
    assert again.objective == pytest.approx(plan.objective, rel=1e-12)
    assert again.model.scenario.rows[0].meaning == "{class} waits briefly"


def test_a_concave_plan_goes_to_json_and_back(reference):
    plan = reference.maximize("sum(log(sum(mu_d[i, k]*y[i, k], k)), i)").solve()
    again = fo.Plan.from_dict(json.loads(plan.to_json()))
    assert again.objective == pytest.approx(plan.objective, rel=1e-9)
    assert again.certificate.holds(1e-6)


def test_later_changes_to_the_model_do_not_touch_its_plan(reference):
    plan = reference.solve()
    s = reference.symbols
    reference.subject_to(s.q_p[s.i] <= 0.01, name="wait")
    assert plan.model == reference_model()
    assert plan.model != reference


def test_the_plan_prints_its_certificate_and_its_revenue(reference_plan):
    shown = repr(reference_plan)
    assert "Plan: 297.716 money/s per GPU, bundled charging" in shown
    assert "primal residual" in shown
    assert "serve part" in shown


def test_names_are_escaped_in_html():
    each = fo.WorkloadClass("<b>x</b>", arrival_rate=1, prompt_tokens=9, output_tokens=9, abandonment_rate=1)
    plan = build([each], GPU).solve()
    for shown in (plan._repr_html_(), plan.model.workload._repr_html_(), plan.policy(gpus=4)._repr_html_()):
        assert "<b>x</b>" not in shown


def test_a_fleet_size_is_needed_for_a_policy(reference_plan):
    with pytest.raises(fo.InvalidInput, match=r"Plan.policy: gpus \(number of GPUs in the fleet\) is required"):
        reference_plan.policy()
