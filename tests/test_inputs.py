"""Inputs: what is accepted, what is refused and in which words, files, and what importing the package costs."""

import json
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import build, gpus, impatient_workloads, mode_models, pair_models, prices

import fluidopt as fo
from fluidopt.reference import QWEN_8B_A100, reference_model, reference_workload
from fluidopt.scenario import scenario_schema

CLASS = {"arrival_rate": 0.5, "prompt_tokens": 300, "output_tokens": 1000}
PRICES = {"prompt": 0.1, "output": 0.2}
CURVE = {"alpha": 0.0174, "beta": 6.2e-5, "solo": 0.022}
SCENARIO = {
    "classes": [{"name": "code", **CLASS, "abandonment_rate": 0.1}],
    "gpu": {"curve": CURVE, "batch_size": 16, "chunk_size": 256},
    "prices": PRICES,
}


# ---- one value ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrival_rate": -1}, r"WorkloadClass 'code': arrival_rate must be at least 0(\.0)?; got -1"),
        ({"arrival_rate": float("nan")}, "arrival_rate must be a finite number; got nan"),
        ({"arrival_rate": float("inf")}, "arrival_rate must be a finite number; got inf"),
        ({"arrival_rate": "fast"}, "arrival_rate must be a number; got 'fast'"),
        ({"arrival_rate": None}, "arrival_rate must be a number; got None"),
        ({"arrival_rate": [1]}, "arrival_rate must be a number"),
        ({"arrival_rate": True}, "arrival_rate must be a number; got True"),
        ({"arrival_rate": 10**400}, "arrival_rate must be a (finite )?number"),
        ({"prompt_tokens": 0}, r"prompt_tokens must be greater than 0(\.0)?; got 0"),
        ({"output_tokens": -5}, r"output_tokens must be greater than 0(\.0)?; got -5"),
        ({"abandonment_rate": -0.1}, r"abandonment_rate must be at least 0(\.0)?; got -0.1"),
        ({"abandonment_rate": float("-inf")}, "abandonment_rate must be a finite number"),
        ({"patience": 3}, "patience is not a field"),
        ({"arival_rate": 3}, "arival_rate is not a field; did you mean 'arrival_rate'"),
    ],
    ids=str,
)
def test_a_class_with_a_bad_value(change, message):
    with pytest.raises(fo.InvalidInput, match=message):
        fo.WorkloadClass("code", **(CLASS | change))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name is required"),
        (("",), "name must not be empty"),
        ((3,), "name must be a text; got 3"),
        (("x" * 201,), "name"),
    ],
)
def test_a_class_needs_a_name(arguments, message):
    with pytest.raises(fo.InvalidInput, match=message):
        fo.WorkloadClass(*arguments, **CLASS)


def test_a_missing_value_is_named():
    with pytest.raises(fo.InvalidInput, match=r"prompt_tokens is required; output_tokens is required"):
        fo.WorkloadClass("code", arrival_rate=1)


def test_values_are_given_by_name():
    with pytest.raises(fo.InvalidInput, match=r"arrival_rate must be given by name \(arrival_rate=...\)"):
        fo.WorkloadClass("code", 0.5, 300, 1000)


@pytest.mark.parametrize("number", [np.float32(1), np.float64(1), np.int64(1), 1], ids=lambda each: type(each).__name__)
def test_numpy_numbers_are_numbers(number):
    assert fo.WorkloadClass("code", **(CLASS | {"arrival_rate": number})).arrival_rate == 1.0
    assert fo.GPU(QWEN_8B_A100, batch_size=np.int64(16), chunk_size=256).batch_size == 16


def test_inputs_are_frozen():
    code = fo.WorkloadClass("code", **CLASS)
    with pytest.raises(AttributeError):
        code.arrival_rate = 3


@pytest.mark.parametrize(
    ("prices", "message"),
    [
        ({"prompt": 0, "output": 0}, "prompt and output are both 0, so every plan earns nothing"),
        ({"prompt": -1, "output": 1}, "prompt must be at least 0"),
        ({"prompt": float("nan"), "output": 1}, "prompt must be a finite number"),
        ({"prompt": 1}, "output is required"),
    ],
)
def test_bad_prices(prices, message):
    with pytest.raises(fo.InvalidInput, match=message):
        fo.TokenPrices(**prices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": -1}, "alpha must be at least 0"),
        ({"solo": 0}, "solo must be greater than 0"),
        ({"alpha": 0, "beta": 0}, "alpha and beta are both 0"),
        ({"beta": float("inf")}, "beta must be a finite number"),
        ({"gamma": 45}, "gamma is not a field"),
    ],
)
def test_a_bad_curve(change, message):
    with pytest.raises(fo.InvalidInput, match=message):
        fo.IterationTime(**(CURVE | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number; got 2.5"),
        ({"batch_size": "many"}, "batch_size must be a whole number; got 'many'"),
        ({"chunk_size": 0}, "chunk_size must be at least 1; got 0"),
        ({"chunk_size": -256}, "chunk_size must be at least 1"),
        ({"chunk_size": 10**400}, "chunk_size"),
        ({"share": 0}, "share must be greater than 0"),
        ({"share": 1.2}, "share must be at most 1"),
        ({"curve": 0.02}, "curve must be (an? )?IterationTime"),
        ({"name": ""}, "name must not be empty"),
        ({"chunk": 256}, "chunk is not a field; did you mean 'chunk_size'"),
    ],
    ids=lambda each: str(each)[:40],
)
def test_a_bad_gpu(change, message):
    with pytest.raises(fo.InvalidInput, match=message):
        fo.GPU(**({"curve": QWEN_8B_A100, "batch_size": 16, "chunk_size": 256} | change))


# ---- modes --------------------------------------------------------------------------------------------------------

PREFILL = fo.Mode("prefill", chunk=256, iteration_time=0.03)
MIXED = fo.Mode("mixed", chunk=256, decode_slots=15, iteration_time=0.03)
SOLO = fo.Mode("solo", decode_slots=16, iteration_time=0.022)
IDLE = fo.Mode("idle")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"iteration_time": 0.03}, "iteration_time must be left out of an idle mode"),
        ({"chunk": 256}, "iteration_time is required unless the mode is idle"),
        ({"decode_slots": 16}, "iteration_time is required unless the mode is idle"),
        ({"decode_slots": 16, "iteration_time": 0.02, "after_prefill": "idle"}, "after_prefill has no meaning"),
        ({"chunk": -1, "iteration_time": 0.03}, "chunk must be at least 0"),
        ({"chunk": 256, "iteration_time": 0}, "iteration_time must be greater than 0"),
        ({"chunk": 256, "iteration_time": float("inf")}, "iteration_time must be a finite number"),
    ],
)
def test_a_bad_mode(arguments, message):
    with pytest.raises(fo.InvalidInput, match=message):
        fo.Mode("mode", **arguments)


def gpu_with(*modes, batch_size=16):
    return fo.GPU(QWEN_8B_A100, batch_size=batch_size, chunk_size=256, operating_modes=modes)


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        ((), "operating_modes"),
        ((IDLE,), "only idle modes"),
        ((MIXED,), "mode 'mixed' prefills, so the GPU needs a decode-only mode to fall into"),
        ((MIXED, IDLE), "mode 'mixed' prefills, so the GPU needs a decode-only mode to fall into"),
        ((PREFILL,), r"mode 'prefill' prefills, so the GPU needs an idle mode \(chunk = decode_slots = 0\)"),
        ((SOLO, SOLO), "mode names must be unique; 'solo' occurs more than once"),
        (
            (fo.Mode("wide", decode_slots=17, iteration_time=0.02),),
            "mode 'wide' has decode_slots 17, more than batch_size 16",
        ),
        (
            (fo.Mode("mixed", chunk=9, decode_slots=1, iteration_time=0.03, after_prefill="rest"), SOLO),
            r"after_prefill 'rest', which is not a mode without prefill of this GPU; it has \['solo'\]",
        ),
        (
            (fo.Mode("mixed", chunk=9, decode_slots=1, iteration_time=0.03, after_prefill="mixed"), SOLO),
            "after_prefill 'mixed', which is not a mode without prefill",
        ),
        ((fo.Mode("full", chunk=9, decode_slots=16, iteration_time=0.03), SOLO), "batch_size"),
    ],
    ids=[
        "none",
        "idle only",
        "no rest",
        "idle rest for decodes",
        "prefill without idle",
        "same name",
        "too many slots",
        "unknown rest",
        "itself as rest",
        "a prefill beside a full batch",
    ],
)
def test_modes_that_do_not_make_a_gpu(modes, message):
    with pytest.raises(fo.InvalidInput, match=message):
        gpu_with(*modes)


def test_where_a_gpu_falls_when_its_prefill_ends():
    few = fo.Mode("few", decode_slots=8, iteration_time=0.02)
    small = fo.Mode("small", chunk=64, decode_slots=4, iteration_time=0.025)
    gpu = gpu_with(MIXED, small, PREFILL, SOLO, few, IDLE)
    assert gpu.rest_mode(MIXED) == SOLO, "the decode-only mode with the fewest slots that still holds 15"
    assert gpu.rest_mode(small) == few
    assert gpu.rest_mode(PREFILL) == IDLE
    assert gpu_with(MIXED, few).rest_mode(MIXED) == few, "the largest where none is large enough"
    chosen = fo.Mode("chosen", chunk=64, decode_slots=4, iteration_time=0.025, after_prefill="solo")
    assert gpu_with(chosen, few, SOLO).rest_mode(chosen) == SOLO


def test_the_default_modes_are_the_pair():
    mixed, solo = fo.GPU(QWEN_8B_A100, batch_size=16, chunk_size=256).modes()
    assert (mixed.chunk, mixed.decode_slots, solo.chunk, solo.decode_slots) == (256, 15, 0, 16)
    assert mixed.iteration_time == pytest.approx(0.0174 + 6.2e-5 * 256)
    assert solo.iteration_time == 0.022


def test_batch_size_one_means_prefill_or_decode():
    mixed, solo = fo.GPU(QWEN_8B_A100, batch_size=1, chunk_size=256).modes()
    assert (mixed.decode_slots, solo.decode_slots) == (0, 1)


# ---- the curve and its warning ------------------------------------------------------------------------------------


def test_a_physical_curve_never_speeds_decodes_up():
    assert QWEN_8B_A100.crossover_chunk == pytest.approx(74.19, abs=0.01)
    assert QWEN_8B_A100.mixed(10) == 0.022
    assert fo.GPU(QWEN_8B_A100, batch_size=16, chunk_size=10).kappa == 1
    assert fo.IterationTime(alpha=0.03, beta=0, solo=0.022).crossover_chunk == 0
    assert fo.IterationTime(alpha=0.01, beta=0, solo=0.022).crossover_chunk == float("inf")


def model_with(chunk, batch=16, alpha=0.0174):
    curve = fo.IterationTime(alpha=alpha, beta=6.2e-5, solo=0.022, physical=False)
    return fo.FluidModel(
        reference_workload(),
        fo.GPU(curve, batch_size=batch, chunk_size=chunk),
        prices=fo.TokenPrices(**PRICES),
    )


def test_a_raw_curve_below_the_decode_only_time_warns_with_chunk_and_crossover():
    with pytest.warns(
        fo.ContentionWarning, match=r"chunk_size 70 .*kappa = 0.988.*b0 = 74.19.*no longer convex"
    ) as got:
        model_with(70)
    assert "Proposition 3.2" not in str(got[0].message)
    assert got[0].filename == __file__


def test_a_raw_curve_below_the_bound_of_the_proposition_says_so():
    with pytest.warns(fo.ContentionWarning, match=r"kappa < \(B-1\)/B = 0.9375.*Proposition 3.2 of \[L26\]"):
        model_with(10)


def test_a_raw_curve_above_the_decode_only_time_is_silent():
    assert model_with(75).scenario.gpu.kappa > 1


# ---- workloads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "classes is empty; give at least one WorkloadClass"),
        ([fo.WorkloadClass("a", **CLASS)] * 2, "class names must be unique; 'a' occurs more than once"),
        (3, "classes must be a Workload or a sequence of WorkloadClass; got int"),
        (None, "classes must be a Workload or a sequence of WorkloadClass; got NoneType"),
        ("ab", "WorkloadClass"),
        ([1, 2], "must be (a )?WorkloadClass"),
    ],
    ids=["empty", "twice", "number", "none", "text", "numbers"],
)
def test_bad_classes(classes, message):
    with pytest.raises(fo.InvalidInput, match=message):
        fo.FluidModel(classes, reference_model().gpu_types, prices=fo.TokenPrices(**PRICES))


def test_one_class_needs_no_list():
    model = fo.FluidModel(
        fo.WorkloadClass("a", **CLASS, abandonment_rate=1), reference_model().gpu_types, prices=fo.TokenPrices(**PRICES)
    )
    assert model.workload.names == ("a",)


@pytest.mark.parametrize("gpus", [None, [], 3, "gpu", [1]], ids=repr)
def test_bad_gpus(gpus):
    with pytest.raises(fo.InvalidInput, match="gpu"):
        fo.FluidModel(reference_workload(), gpus, prices=fo.TokenPrices(**PRICES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prices": None}, "prices must be (a )?TokenPrices"),
        ({"charging": "free"}, "charging must be 'bundled' or 'separate'; got 'free'"),
    ],
)
def test_a_model_with_a_bad_argument(change, message):
    with pytest.raises(fo.InvalidInput, match=message):
        fo.FluidModel(
            reference_workload(), reference_model().gpu_types, **({"prices": fo.TokenPrices(**PRICES)} | change)
        )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "classes is empty"),
        ({"name": ["a"], "arrival_rate": [1.0]}, "prompt_tokens is required"),
        ({"name": ["a", "b"], "arrival_rate": [1.0]}, "length"),
        ({"name": ["a"], **{key: [value] for key, value in CLASS.items()}, "arival_rate": [1]}, "arival_rate is not"),
        (None, "frame"),
    ],
    ids=["empty", "missing column", "ragged", "typo", "none"],
)
def test_a_bad_table(table, message):
    with pytest.raises(fo.InvalidInput, match=message):
        fo.Workload.from_frame(table)


@given(impatient_workloads())
def test_a_workload_goes_to_a_table_and_back(workload):
    frame = workload.to_frame()
    assert list(frame.index) == list(workload.names)
    assert fo.Workload.from_frame(frame.reset_index(names="name")) == workload


def test_per_gpu_and_scaled():
    workload = reference_workload()
    assert workload.per_gpu(4).arrival_rate == pytest.approx([0.125, 0.125])
    assert workload.scaled(3).arrival_rate == pytest.approx([1.5, 1.5])
    assert workload.with_abandonment(0.7).abandonment_rate == pytest.approx([0.7, 0.7])
    assert workload.scaled(3).source == workload.source
    for bad in (0, -1, float("nan"), float("inf"), "4", None):
        with pytest.raises(fo.InvalidInput, match="gpus must be a finite number greater than 0"):
            workload.per_gpu(bad)
    for bad in (-1, float("nan"), "4"):
        with pytest.raises(fo.InvalidInput, match="factor must be a finite number of at least 0"):
            workload.scaled(bad)


def test_a_class_is_found_by_name():
    workload = reference_workload()
    assert workload["prefill-heavy"] is workload.classes[1]
    with pytest.raises(fo.InvalidInput, match="has no class 'chat'; it has 'decode-heavy', 'prefill-heavy'"):
        workload["chat"]


# ---- scenarios ----------------------------------------------------------------------------------------------------


def changed(**change):
    return json.loads(json.dumps(SCENARIO)) | change


def nested(*path, value):
    data = json.loads(json.dumps(SCENARIO))
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed(charing="bundled"), "Scenario: charing is not a field; did you mean 'charging'"),
        (changed(zzz=1), "zzz is not a field"),
        (changed(charging="free"), "charging must be 'bundled' or 'separate'; got 'free'"),
        (changed(classes=[]), "classes is empty"),
        (changed(classes=SCENARIO["classes"] * 2), "'code' occurs more than once"),
        (changed(gpu=[]), "gpu is empty; give at least one GPU"),
        (changed(gpus=0), "gpus must be at least 1"),
        (changed(rates="total"), "gpus is required where rates = 'total'"),
        (changed(prices={"prompt": 0, "output": 0}), "prices: prompt and output are both 0"),
        (nested("classes", 0, "arrival_rate", value=-1), r"classes\[0\].arrival_rate must be at least 0"),
        (nested("classes", 0, "arival_rate", value=1), r"classes\[0\].arival_rate .*did you mean 'arrival_rate'"),
        (nested("gpu", "batchsize", value=1), r"gpu.batchsize is not a field; did you mean 'batch_size'"),
        (nested("gpu", "batch_size", value=0), r"gpu.batch_size must be at least 1"),
        (nested("gpu", "chunk_size", value=10**400), "gpu.*chunk_size"),
        (nested("gpu", "curve", "alpha", value="slow"), r"gpu.curve.alpha must be a number; got 'slow'"),
        (
            changed(gpu=[SCENARIO["gpu"] | {"share": 0.4}, SCENARIO["gpu"] | {"share": 0.4, "name": "b"}]),
            "add up to 1; got 0.8",
        ),
        (changed(gpu=[SCENARIO["gpu"] | {"share": 0.5}] * 2), "type names must be unique"),
        (changed(gpu=SCENARIO["gpu"] | {"share": 0.5}), "shares of the types must add up to 1; got 0.5"),
        (None, "must be (a )?Scenario, or a table with its fields; got None"),
        ([], "must be (a )?Scenario"),
        ({}, "classes is required; gpu is required; prices is required"),
        ({1: 2}, "classes is required"),
    ],
    ids=lambda each: str(each)[-50:],
)
def test_a_bad_scenario(data, message):
    with pytest.raises(fo.InvalidInput, match=message):
        fo.Scenario.from_dict(data)


def test_a_message_about_one_gpu_does_not_speak_of_lists():
    with pytest.raises(fo.InvalidInput) as caught:
        fo.Scenario.from_dict(nested("gpu", "batch_size", value=0))
    assert "tuple" not in str(caught.value)
    assert "list" not in str(caught.value)


def test_the_source_of_bad_data_is_named():
    with pytest.raises(fo.InvalidInput, match=r"^fleet\.toml: Scenario: charing is not a field"):
        fo.Scenario.from_dict(changed(charing=1), source="fleet.toml")


def test_rates_of_the_whole_stream_are_divided():
    scenario = fo.Scenario.from_dict(changed(rates="total", gpus=10))
    assert scenario.workload.arrival_rate == pytest.approx([0.05])
    model = fo.FluidModel.from_scenario(scenario)
    assert model.workload.arrival_rate == pytest.approx([0.05])
    assert model.solve().policy().gpus == 10


@settings(max_examples=60)
@given(
    impatient_workloads(),
    gpus(),
    prices(),
    st.sampled_from(["bundled", "separate"]),
    st.one_of(st.none(), st.integers(1, 10**6)),
    st.one_of(st.none(), st.text(max_size=20)),
)
def test_a_scenario_goes_to_json_and_back(workload, gpu, prices, charging, count, source):
    scenario = fo.Scenario(
        classes=workload.classes, gpu=gpu, prices=prices, charging=charging, gpus=count, source=source
    )
    assert fo.Scenario.from_dict(json.loads(json.dumps(scenario.to_dict()))) == scenario


@settings(max_examples=40)
@given(st.one_of(pair_models(physical=st.just(True)), mode_models()))
def test_a_model_goes_to_json_and_back(model):
    again = fo.FluidModel.from_dict(json.loads(model.to_json()))
    assert again == model
    assert np.array_equal(again.program().matrix.toarray(), model.program().matrix.toarray())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["bundled", "separate", "total", "per_gpu", "mixed", "code"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = sorted(
    {"classes", "gpu", "prices", "charging", "rates", "gpus", "source", "curve", "batch_size", "chunk_size", "share"}
    | {"operating_modes", "name", "arrival_rate", "prompt_tokens", "output_tokens", "abandonment_rate", "prompt"}
    | {"output", "alpha", "beta", "solo", "physical", "chunk", "decode_slots", "iteration_time", "after_prefill"}
)


@st.composite
def damaged_scenarios(draw):
    """A valid scenario in which up to three values at any depth were replaced, removed or added."""
    data = json.loads(json.dumps(SCENARIO))
    data["gpu"]["operating_modes"] = [
        {"name": "mixed", "chunk": 256, "decode_slots": 15, "iteration_time": 0.03},
        {"name": "solo", "decode_slots": 16, "iteration_time": 0.022},
    ]
    if draw(st.booleans()):
        del data["gpu"]["operating_modes"]
    for _ in range(draw(st.integers(1, 3))):
        place = data
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys)) if keys else None
            if key is None or not isinstance(place[key], dict | list) or draw(st.integers(0, 3)) == 0:
                break
            place = place[key]
        change = draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "replace" and key is not None:
            place[key] = draw(JSON)
        elif change == "remove" and key is not None:
            del place[key]
        elif isinstance(place, dict):
            place[draw(st.sampled_from(KEYS))] = draw(JSON)
        else:
            place.append(draw(JSON))
    return data


@settings(max_examples=400)
@given(st.one_of(damaged_scenarios(), JSON))
def test_any_json_is_a_scenario_or_invalid_input(data):
    try:
        scenario = fo.Scenario.from_dict(data)
    except fo.InvalidInput:
        return
    assert fo.Scenario.from_dict(scenario.to_dict()) == scenario


# ---- files --------------------------------------------------------------------------------------------------------

TOML = """
charging = "separate"
gpus = 8

[[classes]]
name = "code"
arrival_rate = 0.5
prompt_tokens = 300
output_tokens = 1000
abandonment_rate = 0.1

[gpu]
batch_size = 16
chunk_size = 256
curve = { alpha = 0.0174, beta = 6.2e-5, solo = 0.022 }

[prices]
prompt = 0.1
output = 0.2
"""


def test_toml_and_json_files_say_the_same(tmp_path):
    toml, js = tmp_path / "fleet.toml", tmp_path / "fleet.JSON"
    toml.write_text(TOML, encoding="utf-8")
    js.write_text(json.dumps(SCENARIO | {"charging": "separate", "gpus": 8}), encoding="utf-8")
    assert fo.read_scenario(toml) == fo.read_scenario(str(js))
    assert fo.FluidModel.from_scenario(toml).solve().policy().gpus == 8


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.toml", b"a = ", "bad.toml: not valid TOML"),
        ("bad.json", b"{", "bad.json: not valid JSON"),
        ("bad.yaml", b"", r"bad.yaml: a scenario file ends in .toml or .json; got '.yaml'"),
        ("bad", b"", r"a scenario file ends in .toml or .json; got 'no ending'"),
        ("bad.json", b"\xff\xfe", "bad.json: cannot read the scenario file"),
        ("bad.json", b"[" * 100_000, "bad.json: not valid JSON"),
        ("bad.toml", b"a=" + b"[" * 100_000, "bad.toml: not valid TOML"),
        ("bad.json", b'{"gpus": ' + b"1" * 5000 + b"}", "bad.json: not valid JSON"),
        ("bad.toml", b"gpus = " + b"1" * 5000, "bad.toml: not valid TOML"),
        ("bad.json", b"{}", "bad.json: Scenario: classes is required"),
        ("bad.toml", TOML.replace("charging", "charing").encode(), "bad.toml: .*did you mean 'charging'"),
        ("bad.toml", TOML.replace("0.5", "2020-01-01").encode(), r"classes\[0\].arrival_rate must be a number"),
        ("bad.json", json.dumps(SCENARIO).replace("0.5", "NaN").encode(), "arrival_rate must be a finite number"),
    ],
    ids=lambda each: str(each)[:30],
)
def test_a_bad_file(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(fo.InvalidInput, match=message):
        fo.read_scenario(path)


@pytest.mark.parametrize("path", ["nowhere.toml", ".", "a\0b.json"], ids=repr)
def test_a_file_that_cannot_be_read(path):
    with pytest.raises(fo.InvalidInput, match="cannot read the scenario file"):
        fo.read_scenario(path)


@pytest.mark.parametrize("path", [3, None], ids=repr)
def test_a_path_that_is_none(path):
    with pytest.raises(fo.InvalidInput, match="path"):
        fo.read_scenario(path)


def test_the_schema_describes_every_field():
    schema = scenario_schema()
    assert {"classes", "gpu", "prices", "charging", "rates", "gpus", "source"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    rate = schema["$defs"]["WorkloadClass"]["properties"]["arrival_rate"]
    assert "requests/s" in rate["description"]
    assert rate["minimum"] == 0


def test_errors_belong_to_one_family():
    for error in (fo.InvalidInput, fo.InfeasibleModel, fo.SolverFailure, fo.TraceFormatError):
        assert issubclass(error, fo.FluidoptError)
    assert issubclass(fo.InvalidInput, ValueError)


def test_models_compare_by_their_inputs():
    assert reference_model() == reference_model()
    assert reference_model() != reference_model("separate")
    assert reference_model() != build(reference_workload().scaled(2), reference_model().gpu_types)
    assert reference_model() != 3


# ---- importing ----------------------------------------------------------------------------------------------------

SLOW = ("numpy", "scipy", "sympy", "cvxpy", "highspy", "matplotlib", "pandas", "numba", "pydantic", "xarray")


def test_importing_loads_nothing_slow():
    code = f"import sys, fluidopt; print([name for name in {SLOW!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_loads():
    for name in fo.__all__:
        assert getattr(fo, name) is not None
    with pytest.raises(AttributeError):
        _ = fo.no_such_name


def seconds(code):
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def test_importing_is_no_slower_than_twice_numpy():
    bare, ours, numpy = (
        statistics.median(each)
        for each in zip(
            *((seconds("pass"), seconds("import fluidopt"), seconds("import numpy")) for _ in range(5)), strict=True
        )
    )
    assert ours - bare <= 2 * (numpy - bare) + 0.02
