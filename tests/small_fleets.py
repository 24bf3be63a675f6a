"""Fleets small enough for an exact chain, shared by the test files."""

from dataclasses import replace

import numpy as np

import fluidopt as fo
from fluidopt.policy import Gate
from fluidopt.policy.extract import UNPARTITIONED
from fluidopt.simulation.system import System

NEVER = -np.inf


def two_classes(**changes):
    """A mixed GPU with two slots and a decode-only GPU with two."""
    arguments = {
        "arrival_rate": [0.5, 0.3],
        "prompt_tokens": [0.5, 0.9],
        "output_tokens": [1.0, 0.6],
        "abandonment_rate": [2.5, 3.5],
        "mode_chunk": [1.0, 0.0],
        "mode_time": [1.6, 1.0],
        "role_gpus": [1, 1],
        "role_prefill_mode": [0, -1],
        "role_rest_mode": [1, 1],
        "role_decode_slots": [1, 2],
        "role_slots": [2, 2],
        "gate_slope": [1.0, 1.0],
        "gate_base": [0.0, 0.3],
        "gate_queue_target": [0.0, 0.0],
        "router_order": [1, 0],
        "placement": 0,
        "prefill_reward": [1.0, 2.0],
        "decode_reward": [3.0, 5.0],
    }
    return System(**(arguments | changes))


def two_stages(*, arrival_rate, prefill_rate, prefill_gpus, decode_rate, slots, patience):
    """One class: prefill-only GPUs that rest idle, and one decode-only GPU; iterations take 1 s."""
    return System(
        arrival_rate=[arrival_rate],
        prompt_tokens=[1.0 / prefill_rate],
        output_tokens=[1.0 / decode_rate],
        abandonment_rate=[patience],
        mode_chunk=[1.0, 0.0, 0.0],
        mode_time=[1.0, np.nan, 1.0],
        role_gpus=[prefill_gpus, 1],
        role_prefill_mode=[0, -1],
        role_rest_mode=[1, 2],
        role_decode_slots=[0, slots],
        role_slots=[1, slots],
        gate_slope=[1.0],
        gate_base=[0.0],
        gate_queue_target=[0.0],
        router_order=[0, 1],
        placement=0,
        prefill_reward=[0.0],
        decode_reward=[1.0],
    )


def small_policy(kind, gpus, seed=0):
    """Two impatient classes on GPUs of two slots, where every rate is near 1/s; "thresholds" is a priority and a
    hold."""
    rng = np.random.default_rng(seed)
    solo = rng.uniform(0.8, 1.2)
    gpu = fo.GPU(fo.IterationTime(alpha=1.0, beta=rng.uniform(0.3, 0.7), solo=solo), batch_size=2, chunk_size=1)
    classes = [
        fo.WorkloadClass(
            name,
            arrival_rate=rng.uniform(0.15, 0.35),
            prompt_tokens=rng.uniform(0.3, 1.5),
            output_tokens=rng.uniform(0.8, 3.0),
            abandonment_rate=rng.uniform(3.0, 8.0),
        )
        for name in ("a", "b")
    ]
    charging = "bundled" if seed % 3 else "separate"
    model = fo.FluidModel(classes, gpu, prices=fo.TokenPrices(prompt=0.7, output=1.0), charging=charging)
    thresholds = kind == "thresholds"
    partition = {} if kind in UNPARTITIONED else {"prefill_gpus": int(rng.integers(1, gpus + 1))}
    policy = model.solve().policy(gpus=gpus, kind="gate-and-route" if thresholds else kind, **partition)
    if not thresholds:
        return policy
    gate = Gate(rule="priority", order=("b", "a"), hold={"a": float(rng.integers(-1, 2))}, placement="fewest-decodes")
    return replace(policy, kind="thresholds", gate=gate)


def mixture(seed):
    """A small fleet under any mixture of the rules."""
    rng = np.random.default_rng(seed)
    roles = int(rng.integers(1, 4))
    sides = int(rng.integers(1, min(roles, 2) + 1))
    side = rng.permutation(np.arange(roles) % sides)
    decode_slots = rng.integers(1, 3, roles)
    prefills = rng.random(roles) < 0.6
    prefills[rng.integers(roles)] = True
    stays = prefills & (rng.random(roles) < 0.3)
    share = rng.dirichlet(np.ones(sides), 2).T
    if rng.random() < 0.3:
        share = np.eye(sides)[:, rng.integers(0, sides, 2)]
    fcfs = bool(rng.random() < 0.3)
    weight = rng.uniform(0.2, 1.0, (sides, 2)) * rng.integers(0, 2, (sides, 2))
    return System(
        arrival_rate=rng.uniform(0.2, 1.0, 2),
        prompt_tokens=rng.uniform(0.3, 1.5, 2),
        output_tokens=rng.uniform(0.5, 2.0, 2),
        abandonment_rate=rng.uniform(0.5, 3.0, 2),
        mode_chunk=np.array([1.0, 2.0, 0.0]),
        mode_time=np.array([1.3, 0.7, 1.0]),
        role_gpus=1 + (rng.random(roles) < 0.5) if roles == 1 else np.ones(roles, dtype=int),
        role_prefill_mode=np.where(prefills, rng.integers(0, 2, roles), -1),
        role_rest_mode=np.full(roles, 2),
        role_decode_slots=decode_slots,
        role_slots=decode_slots + np.where(stays, 0, rng.integers(0, 2, roles)),
        gate_slope=rng.uniform(0, 2, 2) * rng.integers(0, 2, 2),
        gate_base=rng.integers(0, 2, 2).astype(float),
        gate_queue_target=rng.uniform(0, 2, 2),
        gate_hold=np.where((rng.random(2) < 0.6) | fcfs, NEVER, rng.integers(-2, 3, 2)),
        gate_fcfs=fcfs,
        gate_first=bool(rng.random() < 0.4) and not np.any(stays),
        role_stays=stays.astype(int),
        role_side=side,
        side_share=share,
        side_weight=weight if rng.random() < 0.6 else np.zeros_like(weight),
        router_order=rng.permutation(roles),
        placement=int(rng.integers(2)),
        prefill_reward=rng.uniform(0, 1, 2),
        decode_reward=rng.uniform(0, 1, 2),
    )
