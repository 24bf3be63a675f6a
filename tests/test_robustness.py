"""Robustness studies: they repeat, agree with the simulators, change one thing at a time, and say what went wrong."""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import fluidopt as fo
from fluidopt.policy.bound import revenue_bound
from fluidopt.simulation.arrivals import Bursty, Law, Laws
from fluidopt.simulation.fleet import fleet_system
from fluidopt.studies.robustness import (
    FACTORS,
    NOMINAL,
    Disturbance,
    RobustnessStudy,
    _fleet,
    robustness_study,
    standard_disturbances,
    threshold_policy,
)

SHORT = {"horizon": 150.0, "warmup": 30.0, "replications": 3, "seed": 5}
MORE = Disturbance("more", arrival_rate=1.2)


@pytest.fixture(scope="module")
def study(reference_plan):
    """All the standard worlds, 20 GPUs."""
    return robustness_study(reference_plan, gpus=20, horizon=600.0, replications=6, seed=3)


def test_repeats_wherever_it_runs(reference_plan):
    first, again = (robustness_study(reference_plan, gpus=5, disturbances=[MORE], **SHORT) for _ in range(2))
    np.testing.assert_array_equal(first.revenue, again.revenue)
    with ProcessPoolExecutor(2) as pool:
        apart = robustness_study(reference_plan, gpus=5, disturbances=[MORE], executor=pool, **SHORT)
    np.testing.assert_array_equal(first.revenue, apart.revenue)
    other = robustness_study(reference_plan, gpus=5, disturbances=[MORE], **(SHORT | {"seed": 6}))
    assert not np.any(first.revenue == other.revenue)


def test_replications_and_worlds_differ_but_share_what_they_do_not_change(reference_plan):
    same = Disturbance("the same under another name")
    study = robustness_study(reference_plan, gpus=5, disturbances=[same, MORE], **SHORT)
    np.testing.assert_array_equal(study.revenue[0], study.revenue[1])
    assert np.unique(study.revenue[0]).size == study.revenue[0].size
    assert study.change("FI-WSP", same.name).mean == 0.0


def test_the_nominal_world_is_the_chain(study):
    for name, policy in study.policies.items():
        chain = policy.simulate(horizon=2000, warmup=100, replications=6, seed=1).revenue_rate
        found = study.revenue_rate(name)
        assert abs(found.mean - chain.mean) < 5 * np.hypot(found.standard_error, chain.standard_error)


def test_no_policy_beats_the_bound_of_its_world(study):
    for w in range(len(study.disturbances)):
        for p in range(len(study.policies)):
            values = study.revenue[w, p]
            assert study.bounds[w][p].holds
            assert values.mean() - 6 * values.std(ddof=1) / np.sqrt(values.size) < study.bounds[w][p].rate


def test_bounds_are_those_of_the_changed_rates(study, reference_plan):
    worlds = [each.name for each in study.disturbances]
    at = worlds.index("arrival rate +20%")
    model = fo.FluidModel(
        reference_plan.model.workload.scaled(1.2),
        reference_plan.model.scenario.gpu,
        prices=reference_plan.model.scenario.prices,
    )
    assert study.bounds[at][0].rate == pytest.approx(model.solve().revenue_rate, rel=1e-9)
    frame = study.to_frame()
    assert frame.loc[("arrival rate +20%", "FI-WSP"), "bound"] == study.bounds[at][0].rate


def test_differences_are_paired(study):
    """Common requests: the half-width of a difference is far below that of the numbers it is of."""
    apart = np.hypot(study.revenue_rate("thresholds").half_width, study.revenue_rate("FI-WSP").half_width)
    paired = study.behind_best("FI-WSP", "nominal").half_width
    assert study.best["nominal"] == "thresholds"
    assert paired < 0.7 * apart


def test_numbers_are_those_of_the_replications(study):
    frame = study.to_frame()
    assert len(frame) == len(study.disturbances) * len(study.policies)
    values = study.revenue[3, 1]
    row = frame.iloc[3 * len(study.policies) + 1]
    assert row["revenue_rate"] == pytest.approx(values.mean())
    assert row["change"] == pytest.approx((values - study.revenue[0, 1]).mean())
    best = study.revenue[3].mean(axis=1).max()
    assert row["behind_best"] == pytest.approx(best - values.mean())
    assert (frame["behind_best"].groupby("disturbance").min() == 0).all()
    assert "best of the policies in" in study.statement
    assert str(frame.index[4][0]) in str(study)
    assert "bursty arrivals" in study._repr_html_()


def test_goes_to_json_and_back(study):
    text = json.dumps(study.to_dict())
    again = RobustnessStudy.from_dict(json.loads(text))
    assert again.policies == study.policies
    assert again.disturbances == study.disturbances
    assert str(again) == str(study)
    with pytest.raises(fo.InvalidInput, match="not a saved robustness study: KeyError"):
        RobustnessStudy.from_dict({"policies": {}})
    spoilt = json.loads(text)
    spoilt["disturbances"][0]["arrivals"] = {"kind": "tides"}
    with pytest.raises(fo.InvalidInput, match="arrivals"):
        RobustnessStudy.from_dict(spoilt)


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("kind", ["gate-and-route", "prioritize-and-route", "sli-aware-general", "FI-WSP"])
def test_a_world_changes_its_rates_and_no_rule(kind, name, reference_plan):
    policy = reference_plan.policy(gpus=20, kind=kind)
    planned, actual = fleet_system(policy), _fleet(policy, Disturbance("other", **{name: 1.3}))
    changed = {key for key, value in vars(planned).items() if not np.array_equal(value, getattr(actual, key), True)}
    expected = {name}
    if name in ("prompt_tokens", "output_tokens"):
        expected.add("decode_reward")
    assert changed == expected
    np.testing.assert_allclose(getattr(actual, name), 1.3 * getattr(planned, name))
    prices, classes = policy.scenario.prices, Disturbance("other", **{name: 1.3}).changed(policy).scenario.workload
    worth = prices.prompt * classes.prompt_tokens + prices.output * classes.output_tokens
    np.testing.assert_allclose(actual.decode_reward, worth)


def test_separate_charging_pays_by_phase():
    policy = fo.reference_model("separate").solve().policy(gpus=10)
    actual = _fleet(policy, Disturbance("long", prompt_tokens=2.0))
    np.testing.assert_allclose(actual.prefill_reward, 2.0 * fleet_system(policy).prefill_reward)
    study = robustness_study({"own": policy}, disturbances=[], **SHORT)
    assert study.bounds[0][0].rate == pytest.approx(298.59798, rel=1e-6)


def test_bursts_and_laws_are_passed_on(reference_plan):
    """Bursts cost; a world of fixed counts varies less."""
    worlds = [
        Disturbance("bursts", arrivals=Bursty(ratio=8.0, share=0.2, burst=60.0)),
        Disturbance("fixed", laws=Laws(prompt=Law("deterministic"), output=Law("deterministic"))),
    ]
    study = robustness_study(reference_plan, gpus=20, disturbances=worlds, horizon=600.0, replications=8, seed=2)
    change = study.change("thresholds", "bursts")
    assert change.mean + change.half_width < -20.0
    spread = study.revenue.std(axis=2)
    assert np.all(spread[2] < spread[0])


def test_standard_disturbances_cover_every_rate_both_ways():
    worlds = standard_disturbances()
    for name in FACTORS:
        assert sorted(getattr(each, name) for each in worlds if getattr(each, name) != 1.0) == [0.8, 1.2]
    assert len({each.name for each in worlds}) == len(worlds) == 11
    assert {each.arrival_rate for each in standard_disturbances(0.5)} == {0.5, 1.0, 1.5}


def test_threshold_policy_puts_the_fully_served_first(reference_plan):
    policy = threshold_policy(reference_plan, gpus=50)
    assert policy.gate.order == ("prefill-heavy", "decode-heavy")
    assert policy.gate.hold == {"decode-heavy": 3}
    assert sum(role.gpus for role in policy.roles if role.prefill) == 17
    assert revenue_bound(policy).holds
    own = threshold_policy(reference_plan, gpus=50, hold=1.0, prefill_gpus=20)
    assert own.gate.hold == {"decode-heavy": 1.0}
    assert sum(role.gpus for role in own.roles if role.prefill) == 20


def test_takes_policies_of_any_make(reference_plan):
    hand = replace(reference_plan.policy(gpus=5), kind="thresholds")
    study = robustness_study({"mine": hand, "theirs": hand}, disturbances=[MORE], **SHORT)
    np.testing.assert_array_equal(study.revenue[:, 0], study.revenue[:, 1])
    kinds = robustness_study(reference_plan, gpus=5, kinds=["GF-WSP", "FG-SP"], disturbances=[], **SHORT)
    assert list(kinds.policies) == ["GF-WSP", "FG-SP"]


def test_a_fleet_of_separate_roles_has_no_policy_that_stays():
    reference = fo.reference_model()
    gpu = reference.scenario.gpu
    split = replace(gpu, operating_modes=gpu.modes(disaggregated=True))
    plan = fo.FluidModel(reference.workload, split, prices=reference.scenario.prices).solve()
    study = robustness_study(plan, gpus=10, disturbances=[], **SHORT)
    assert list(study.policies) == ["gate-and-route", "thresholds"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"horizon": 0}, "horizon must be a finite number of seconds above 0; got 0"),
        ({"warmup": 150.0}, r"warmup must be at least 0 and below horizon \(150 s\); got 150"),
        ({"replications": 1}, "replications must be a whole number of at least 2"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"disturbances": ["bursts"]}, "disturbances must be Disturbance objects; got str"),
        ({"disturbances": [MORE, MORE]}, "different names; 'more' occurs twice"),
        ({"kinds": ["FI-WSP", "FI-WSP"]}, "policies must have different names"),
        ({"kinds": []}, "at least one policy"),
        ({"gpus": None}, "gpus .* is required"),
    ],
)
def test_refuses(options, match, reference_plan):
    with pytest.raises(fo.InvalidInput, match=match):
        robustness_study(reference_plan, **({"gpus": 5} | SHORT | options))


def test_refuses_policies_that_do_not_belong_together(reference_plan):
    small, large = reference_plan.policy(gpus=5), reference_plan.policy(gpus=6)
    with pytest.raises(fo.InvalidInput, match=r"same scenario and GPUs.*'b' .6 GPUs. differs from 'a' .5 GPUs."):
        robustness_study({"a": small, "b": large}, **SHORT)
    with pytest.raises(fo.InvalidInput, match="'a' must be a Policy; got str"):
        robustness_study({"a": "FI-WSP"}, **SHORT)
    with pytest.raises(fo.InvalidInput, match="gpus and kinds go with a plan"):
        robustness_study([small], gpus=5, **SHORT)


def test_refuses_names_that_are_not_there(study):
    with pytest.raises(fo.InvalidInput, match=r"policy must be one of 'gate-and-route'.*got 'best'"):
        study.change("best", "nominal")
    with pytest.raises(fo.InvalidInput, match=r"disturbance must be one of 'nominal'.*got 'flood'"):
        study.revenue_rate("FI-WSP", "flood")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Disturbance("x", arrival_rate=0), "arrival_rate must be greater than 0"),
        (lambda: Disturbance(""), "name must not be empty"),
        (lambda: standard_disturbances(1.0), "size must be between 0 and 1; got 1.0"),
    ],
)
def test_disturbances_refuse(make, match):
    with pytest.raises(fo.InvalidInput, match=match):
        make()


def test_nominal_is_always_there_once(reference_plan):
    study = robustness_study(reference_plan, gpus=5, disturbances=[MORE, NOMINAL], **SHORT)
    assert [each.name for each in study.disturbances] == ["nominal", "more"]
