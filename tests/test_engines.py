"""Engine settings: they reproduce the roles they come from, keep vLLM's rules, and leave nothing of a policy unsaid."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import build, gpus, impatient_workloads, operating_modes

import fluidopt as fo
from fluidopt.policy.engines import EngineRole, EngineSettings, Gap, engine_settings
from fluidopt.policy.extract import RULES
from fluidopt.policy.rules import Gate, Router
from fluidopt.serving.engine import EngineFleet, read_engine

KINDS = list(RULES)
SCENARIO = Path(__file__).parents[1] / "docs" / "examples" / "scenario.toml"


@st.composite
def policies(draw):
    """Policies of every kind, of the pair, of other modes, of separate roles; ``None`` where the fleet has none."""
    gpu = draw(gpus())
    shape = draw(st.sampled_from(["pair", "chunks", "split", "any"]))
    if shape == "chunks":
        gpu = gpu.with_modes(chunks=sorted({gpu.chunk_size, 2 * gpu.chunk_size}))
    elif shape == "split":
        gpu = gpu.with_modes(disaggregated=True)
    elif shape == "any":
        gpu = replace(gpu, operating_modes=draw(operating_modes(gpu.batch_size)))
    plan = build(draw(impatient_workloads()).classes, gpu).solve()
    try:
        policy = plan.policy(gpus=draw(st.integers(1, 40)), kind=draw(st.sampled_from(KINDS)))
    except fo.InvalidInput:
        return None
    if draw(st.booleans()) and policy.gate.rule != "first-come":
        hold = {policy.scenario.classes[0].name: draw(st.floats(-5, 5))}
        policy = replace(policy, gate=replace(policy.gate, hold=hold))
    return policy


def running(role):
    """The most requests an engine of the role runs, and tokens of a full iteration, from the role itself."""
    prefills = 1 if role.prefill is not None else 0
    decodes = min(role.decode_slots, role.slots - prefills)
    return decodes + prefills, decodes + (role.prefill.chunk if role.prefill else 0), decodes


@given(policies())
@settings(max_examples=120)
def test_settings_reproduce_chunk_and_decodes_of_every_role(policy):
    if policy is None:
        return
    found = engine_settings(policy)
    roles = [role for role in policy.roles if role.gpus]
    assert [each.name for each in found.roles] == [role.name for role in roles]
    assert sum(each.replicas for each in found.roles) == policy.gpus
    types = {gpu.name: gpu for gpu in policy.scenario.gpu_types}
    for each, role in zip(found.roles, roles, strict=True):
        requests, tokens, decodes = running(role)
        assert (each.max_num_seqs, each.max_num_batched_tokens) == (requests, tokens)
        assert each.decode_slots == role.decode_slots
        # the rule that vLLM refuses to start without
        assert each.max_num_batched_tokens >= each.max_num_seqs
        back = each.gpu_type(types[role.gpu])
        if role.prefill is None:
            assert (each.chunk, each.long_prefill_token_threshold) == (0, 0)
            assert not any(mode.prefills for mode in back.modes())
            assert max(mode.decode_slots for mode in back.modes()) == role.decode_slots
        else:
            mixed = next(mode for mode in back.modes() if mode.prefills)
            assert (each.chunk, mixed.chunk) == (role.prefill.chunk, role.prefill.chunk)
            assert mixed.decode_slots == decodes
            assert each.long_prefill_token_threshold == role.prefill.chunk
        values = options(each.command_line("m"))
        assert int(values["max-num-seqs"]) == requests
        assert int(values["max-num-batched-tokens"]) == tokens
    assert EngineSettings.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def options(line):
    """The options of a command line, by name."""
    words = shlex.split(line)
    assert words[:2] == ["vllm", "serve"]
    found = {}
    for at, word in enumerate(words):
        if word.startswith("--"):
            last = at + 1 == len(words) or words[at + 1].startswith("--")
            found[word[2:]] = True if last else words[at + 1]
    return found


def test_the_pair_of_the_paper(reference_plan):
    """B = 16 and C = 256: 15 decodes and a chunk make 271 tokens, as MODEL's C = max_num_batched_tokens - (B - 1)."""
    found = engine_settings(reference_plan.policy(gpus=20))
    mixed, solo = found.roles
    assert (mixed.replicas, mixed.max_num_seqs, mixed.max_num_batched_tokens, mixed.decode_slots) == (5, 16, 271, 15)
    assert (solo.replicas, solo.max_num_seqs, solo.max_num_batched_tokens, solo.decode_slots) == (15, 16, 16, 16)
    gpu = reference_plan.model.gpu_types[0]
    assert mixed.gpu_type(gpu) == gpu
    assert mixed.gpu_type(gpu).modes() == gpu.modes()


@given(policies())
@settings(max_examples=40)
def test_caches_move_where_decodes_do(policy):
    if policy is None:
        return
    roles = {role.name: role for role in policy.roles}
    for each in engine_settings(policy).roles:
        role = roles[each.name]
        if policy.router.rule == "stay" or policy.gpus == 1:
            assert each.kv_role is None
            continue
        assert (each.kv_role in ("kv_producer", "kv_both")) == (role.prefill is not None)
        assert (each.kv_role in ("kv_consumer", "kv_both")) == (role.decode_slots > 0 or role.prefill is None)


def test_a_role_that_no_decode_goes_to_only_sends(reference_plan):
    policy = reference_plan.policy(gpus=20)
    alone = replace(policy, router=Router(order=("solo",)))
    assert [each.kv_role for each in engine_settings(alone).roles] == ["kv_producer", "kv_consumer"]
    line = engine_settings(alone, kv_connector="MyConnector").roles[0].command_line("m")
    assert json.loads(options(line)["kv-transfer-config"]) == {
        "kv_connector": "MyConnector",
        "kv_role": "kv_producer",
    }


def test_a_static_order_becomes_priorities(reference_plan):
    by_ratio = engine_settings(reference_plan.policy(gpus=20, kind="prioritize-and-route"))
    assert by_ratio.priorities == {"decode-heavy": 0, "prefill-heavy": 1}
    assert [each.scheduling_policy for each in by_ratio.roles] == ["priority", "fcfs"]
    policy = fo.threshold_policy(reference_plan, gpus=20)
    own = engine_settings(policy)
    assert tuple(own.priorities) == policy.gate.order
    assert own.priorities["prefill-heavy"] == 0
    for kind in ("gate-and-route", "FI-WSP", "sli-aware"):
        found = engine_settings(reference_plan.policy(gpus=20, kind=kind))
        assert found.priorities is None
        assert {each.scheduling_policy for each in found.roles} == {"fcfs"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_engine_reads_the_same_settings(kind, reference_plan, tmp_path):
    """What is written for vLLM is what the replay's engines take, and what they make of the role's GPU type."""
    for role in engine_settings(reference_plan.policy(gpus=20, kind=kind)).roles:
        path = tmp_path / f"{role.name}.json"
        path.write_text(json.dumps({"engine_kwargs": role.settings()}))
        engine = read_engine(path)
        assert (engine.max_num_seqs, engine.max_num_batched_tokens) == (role.max_num_seqs, role.max_num_batched_tokens)
        if role.chunk:
            assert EngineFleet.like(role.gpu_type(reference_plan.model.gpu_types[0])).engine == engine


GATES = {
    "occupancy": "smallest multiple of their target",
    "queue-deviation": "furthest above its target",
    "priority": "One order of classes",
    "first-come": "One queue for all GPUs",
}


@given(policies())
@settings(max_examples=60)
def test_what_no_setting_says_is_listed(policy):
    if policy is None:
        return
    gaps = " ".join(gap.rule for gap in engine_settings(policy).gaps)
    prefills = [role for role in policy.roles if role.prefill is not None]
    moves = policy.router.rule != "stay" and policy.gpus > 1
    for words, told in {
        GATES[policy.gate.rule]: bool(prefills),
        "One prefill at a time": bool(prefills),
        "held back": bool(policy.gate.hold),
        "decoded on another GPU": moves,
        "in the order": moves and policy.router.rule == "preference",
        "drawn by the plan's shares, class": moves and policy.router.rule == "shares",
        "a freed slot draws": moves and policy.router.rule == "weighted-shares",
        "place of the prefill": any(role.slots > role.decode_slots for role in prefills),
        "before a decode": policy.gate.before_decodes,
        "preempted": True,
    }.items():
        assert (words in gaps) == told, (words, gaps)


def test_a_memory_limit_in_the_model_closes_that_gap(reference_plan):
    model = reference_plan.model
    limited = fo.FluidModel(
        model.workload, model.gpu_types, prices=model.scenario.prices, service_levels=[fo.KVMemory(tokens=200_000)]
    )
    gaps = engine_settings(limited.solve().policy(gpus=20)).gaps
    assert not any("preempted" in gap.rule for gap in gaps)


def test_queue_deviation_gate_and_holds(reference_plan):
    policy = reference_plan.policy(gpus=20)
    held = replace(policy, gate=Gate(rule="queue-deviation", hold={"decode-heavy": 2.0}))
    gaps = engine_settings(held).gaps
    assert GATES["queue-deviation"] in gaps[0].rule
    assert any("(decode-heavy)" in gap.rule for gap in gaps)


def test_prints_and_writes_files(reference_plan):
    found = engine_settings(reference_plan.policy(gpus=20, kind="prioritize-and-route"))
    for shown in (str(found), found._repr_html_()):
        assert "vLLM 0.11 to 0.19" in shown
        assert "decode-heavy 0, prefill-heavy 1" in shown
        assert "One prefill at a time on a GPU." in shown
    files = found.config_files("some/model")
    assert list(files) == ["mixed", "solo"]
    lines = dict(line.split(": ", 1) for line in files["mixed"].splitlines() if not line.startswith("#"))
    values = {name: json.loads(value) for name, value in lines.items()}
    assert values.pop("model") == "some/model"
    transfer = json.loads(values.pop("kv-transfer-config"))
    assert {**{name.replace("-", "_"): value for name, value in values.items()}, "kv_transfer_config": transfer} == (
        found.roles[0].settings()
    )
    assert found.command_lines("a model")[0].startswith("vllm serve 'a model' --max-num-seqs 16 ")


def test_gaps_read_as_sentences_and_mistakes_are_named():
    with pytest.raises(fo.InvalidInput, match=r"policy must be a Policy, from plan.policy\(gpus=...\); got 'FI-WSP'"):
        engine_settings("FI-WSP")
    with pytest.raises(fo.InvalidInput, match=r"max_num_batched_tokens must be at least max_num_seqs \(16\).*got 8"):
        EngineRole(
            "solo",
            gpu="gpu",
            replicas=1,
            max_num_seqs=16,
            max_num_batched_tokens=8,
            long_prefill_token_threshold=0,
            decode_slots=16,
        )
    with pytest.raises(fo.InvalidInput, match="roles is required"):
        EngineSettings.from_dict({"title": "x", "gaps": []})
    assert str(Gap(rule="Hold.", engine="Runs.", remedy="Wait.")) == "Hold. Runs. Wait."


def test_from_the_terminal():
    command = [sys.executable, "-m", "fluidopt", "engines", str(SCENARIO), "--gpus", "20", "--model", "some/model"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    policy = fo.FluidModel.from_scenario(replace(fo.read_scenario(SCENARIO), gpus=20)).solve().policy(gpus=20)
    found = engine_settings(policy)
    joined = done.stdout.replace(" \\\n    ", " ")
    assert all(line in joined for line in found.command_lines("some/model"))
    assert "One prefill at a time on a GPU." in " ".join(done.stdout.split())
    data = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert list(data.pop("commands").values()) == list(found.command_lines("some/model"))
    assert EngineSettings.from_dict(data) == found
