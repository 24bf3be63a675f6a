"""Scenario files that nobody should write: valid ones, bent in some places, as TOML or JSON; rows meant to do harm."""

from __future__ import annotations

import json
import tomllib
from copy import deepcopy
from random import Random
from typing import Any

from fuzz_inputs import NUMBERS, TEXTS, TRAP, Case, mangled

EXPRESSIONS = [
    f"__import__('{TRAP}')",
    f"{TRAP}()",
    f"(lambda: {TRAP})()",
    f"exec('{TRAP}')",
    f"x.__class__.__{TRAP}__",
    f"q_p[i].__class__.__mro__[1].__subclasses__().{TRAP} <= 1",
    f"f'{{{TRAP}}}' <= q_p[i]",
    "10**10**10*q_p[i] <= 1",
    "q_p[i]**10**10 <= 1",
    "2**2**2**2**2**2 <= q_p[i]",
    "1e300*1e300*q_p[i] <= 1",
    "q_p[i]/0 <= 1",
    "log(0) <= q_p[i]",
    "sqrt(-1)*q_p[i] <= 1",
    "(" * 39 + "q_p[i]" + ")" * 39 + " <= 1",
    "(" * 5000 + "q_p[i]" + ")" * 5000 + " <= 1",
    "-" * 5000 + "q_p[i] <= 1",
    "+".join(["q_p[i]"] * 900) + " <= 1",
    "*".join(["lambda[i]"] * 900) + "*q_p[i] <= 1",
    "/".join(["lambda[i]"] * 900) + "*q_p[i] <= 1",
    "exp(" * 30 + "q_p[i]" + ")" * 30 + " <= 1",
    "min(" + ",".join(["q_p[i]"] * 20) + ") <= 1",
    "sum(sum(sum(x[i,k],k),k),k) <= 1",
    "sum(x[i,k], i) == nan",
    "q_p['[/]'] <= 1",
    "max(min(0, sum(y[i, k], k)), sum(0, g)**-1) <= mu_d[k]",
    "q_p[i]/sum(0, i) <= 1",
    "q_p[i] <= 1 <= 2",
    "q_p[i] = 1",
    "q_p[i] < 1",
    "q_p[i] <= 1; 1",
    "q_p[0] <= 1",
    "q_p[-1] <= 1",
    "q_p[i,k] <= 1",
    "x[k,i] <= 1",
    "ｑ_p[i] <= 1",
    "0 <= 0",
    "sum(log(q_p[i]), i)",
    "sum(log(sum(mu_d[i, k]*y[i, k], k)), i)",
    "sum(sqrt(q_p[i]), i)",
    "sum(w[i]*q_p[i], i)",
    "-sum(q_p[i]**2, i)",
    "sum(q_p[i]**(1/2), i)",
    "sum(exp(-q_p[i]), i)",
    "sum(abs(q_p[i]), i)",
    "min(sum(q_p[i], i), 1)",
    "max(sum(q_p[i], i), 1)",
    "sum(x[i, k], k) <= 0.1*c_p",
    "sum(x[i, k]*theta[i], k) >= lambda[i]/1e-300",
    "q_d[i] == 0",
    "theta[i] > 0",
    "0",
    "1/theta[i]",
    "q_p[i]/theta[i] <= 1",
    "theta[i]**-100*q_p[i] <= 1e300",
    "log(theta[i])*q_p[i] <= 1",
]
_WORDS = [
    *("q_p[i]", "q_d[i]", "x[i, k]", "y[i, k]", "lambda[i]", "theta[i]", "mu_d[i, k]", "w[i]", "c_p", "i", "k", "g"),
    *("sum(", "exp(", "log(", "sqrt(", "min(", "max(", "abs(", "(", ")", ")", ")", "[", "]", ",", ", i)", ", k)"),
    *("+", "-", "*", "/", "**", "<=", ">=", "==", "1", "0", "2", "0.5", "1e300", "1e-300", "'chat'", '"documents"'),
]


def expression(rng: Random) -> str:
    """A row or objective: a known trap, words at random, or a tree that may well be valid."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(EXPRESSIONS)
    if kind < 0.6:
        return " ".join(rng.choices(_WORDS, k=rng.randint(1, 12)))
    return _tree(rng, 3) + rng.choice(["", *[f" {sign} {_tree(rng, 2)}" for sign in ("<=", ">=", "==", "<", "!=")]])


def _tree(rng: Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.2:
        return rng.choice([*_WORDS[:9], "1", "0", "2", "0.5", "1e6", "1e-6", "B", "C"])
    kind = rng.randrange(5)
    if kind == 0:
        return f"sum({_tree(rng, depth - 1)}, {rng.choice('ikg')})"
    if kind == 1:
        return f"{rng.choice(['exp', 'log', 'sqrt', 'abs'])}({_tree(rng, depth - 1)})"
    if kind == 2:
        return f"{rng.choice(['min', 'max'])}({_tree(rng, depth - 1)}, {_tree(rng, depth - 1)})"
    if kind == 3:
        return f"({_tree(rng, depth - 1)})**{rng.choice(['2', '(1/2)', '-1', '0', '100', '1e-3'])}"
    return f"({_tree(rng, depth - 1)} {rng.choice('+-*/')} {_tree(rng, depth - 1)})"


CLASS = {"name": "chat", "arrival_rate": 2.0, "prompt_tokens": 600.0, "output_tokens": 250.0, "abandonment_rate": 0.1}
DOCUMENTS = {**CLASS, "name": "documents", "arrival_rate": 0.5, "prompt_tokens": 6000.0, "abandonment_rate": 0.02}
CURVES: list[dict[str, Any]] = [
    {"alpha": 0.0174, "beta": 6.2e-5, "solo": 0.022},
    {"form": "linear", "alpha": 0.01, "beta": 5e-5, "per_decode": 1e-4, "solo": 0.012, "solo_per_decode": 1e-4},
    {
        "form": "linear",
        "alpha": 0.01,
        "beta": 5e-5,
        "solo": 0.01,
        "solo_per_kv_token": 1e-9,
        "per_kv_token": 1e-9,
        "chunk_kinks": [{"at": 128, "slope": 1e-5}],
    },
    {
        "form": "table",
        "chunk": [128, 512],
        "decodes": [1, 16],
        "kv_tokens": [0.0, 4096.0],
        "mixed_seconds": [[[0.02, 0.021], [0.022, 0.024]], [[0.05, 0.051], [0.052, 0.054]]],
        "decode_only_seconds": [[0.01, 0.011], [0.012, 0.014]],
    },
]
LEVELS: list[dict[str, Any]] = [
    {"kind": "prefill_fairness", "at_most": 0.3, "penalty": 5.0},
    {"kind": "decode_fairness", "at_most": 0.3, "penalty": 5.0},
    {"kind": "slot_tpot", "at_most": 0.024, "penalty": 5000.0},
    {"kind": "mean_wait", "at_most": 2.0, "of": "served", "penalty": 1.0},
    {"kind": "mean_ttft", "at_most": 2.0, "classes": ["chat"]},
    {"kind": "mean_tpot", "at_most": 0.03, "penalty": 1.0},
    {"kind": "abandonment_share", "at_most": 0.5},
    {"kind": "completion_floor", "share": 0.1},
    {"kind": "kv_memory", "tokens": 100_000.0, "penalty": 0.01},
    {"kind": "kv_transfer", "at_most": 1e6},
]
MODES = [
    {"name": "read", "chunk": 512, "iteration_time": 0.022},
    {"name": "mix", "chunk": 256, "decode_slots": 7, "iteration_time": 0.04, "after_prefill": "write"},
    {"name": "write", "decode_slots": 16, "iteration_time": 0.012},
    {"name": "idle"},
]


def scenario(rng: Random) -> dict[str, Any]:
    """A scenario that is valid, or would be if its promises and rows could be kept."""
    gpu: dict[str, Any] = {"name": "A100", "batch_size": 16, "chunk_size": 256, "curve": deepcopy(rng.choice(CURVES))}
    if "solo_per_kv_token" in gpu["curve"] or gpu["curve"].get("form") == "table":
        gpu["kv_tokens"] = 900.0
    if rng.random() < 0.3:
        gpu["operating_modes"] = deepcopy(MODES)
    made: dict[str, Any] = {
        "classes": [dict(CLASS), dict(DOCUMENTS)],
        "gpu": gpu,
        "prices": {"prompt": 0.1, "output": 0.2},
    }
    if rng.random() < 0.2:
        made["gpu"] = [{**deepcopy(gpu), "share": 0.25}, {**deepcopy(gpu), "name": "L4", "share": 0.75}]
    if rng.random() < 0.5:
        made |= {"rates": "total", "gpus": 8, "charging": rng.choice(["bundled", "separate"])}
    if rng.random() < 0.4:
        made["service_levels"] = deepcopy(rng.sample(LEVELS, rng.randint(1, 3)))
    if rng.random() < 0.3:
        made["rows"] = [{"name": f"own {at}", "row": expression(rng)} for at in range(rng.randint(1, 2))]
        if rng.random() < 0.3:
            made["rows"][0] |= {"where": expression(rng), "meaning": rng.choice(TEXTS)}
    if rng.random() < 0.2:
        made["objective"] = expression(rng)
    return made


def bent(tree: Any, rng: Random, times: int = 1) -> Any:
    """The same data with some of its values replaced, left out, repeated, moved or added to."""
    for _ in range(times):
        place = rng.choice(list(_places(tree)))
        tree = _with(tree, place, rng)
    return tree


def _places(tree: Any, at: tuple[Any, ...] = ()) -> Any:
    yield at
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield from _places(value, (*at, key))


def _with(tree: Any, place: tuple[Any, ...], rng: Random) -> Any:
    if not place:
        return tree if rng.random() < 0.9 else value(rng, tree)
    tree = deepcopy(tree)
    parent = tree
    for key in place[:-1]:
        parent = parent[key]
    key, kind = place[-1], rng.random()
    old = parent[key]
    if kind < 0.6:
        parent[key] = value(rng, old)
    elif kind < 0.7:
        del parent[key]
    elif kind < 0.8 and isinstance(parent, list):
        parent.insert(key, deepcopy(old))
    elif kind < 0.85 and isinstance(parent, list):
        parent *= rng.choice([2, 5, 50])
    elif kind < 0.9 and isinstance(parent, dict):
        parent[rng.choice([*TEXTS[:20], f"{key}s", str(key).upper(), "kind", "form", "name", "classes", "rows"])] = old
    elif kind < 0.95:
        for _ in range(rng.choice([1, 3, 60])):
            old = [old] if rng.random() < 0.5 else {"curve": old}
        parent[key] = old
    else:
        parent[key] = deepcopy(tree)
    return tree


def value(rng: Random, old: Any) -> Any:
    """Something to put in place of ``old``, often of the same type."""
    kind = rng.random()
    if isinstance(old, int | float) and not isinstance(old, bool) and kind < 0.7:
        try:
            return type(old)(old * 10 ** rng.uniform(-6, 6)) if rng.random() < 0.7 else type(old)(-old)
        except (OverflowError, ValueError):
            return old
    if isinstance(old, str) and kind < 0.4:
        return expression(rng)
    if kind < 0.8:
        return rng.choice(NUMBERS)
    return rng.choice([*TEXTS, None, [], {}, [[]], [None], {"": {}}, [1, "a"], expression(rng)])


def as_toml(data: Any) -> str:
    """The data as TOML, all but the top level inline; None, which TOML has not, as an empty text."""
    if not isinstance(data, dict):
        return f"value = {_inline(data)}\n"
    return "".join(f"{json.dumps(str(key), ensure_ascii=True)} = {_inline(each)}\n" for key, each in data.items())


def _inline(data: Any) -> str:
    if isinstance(data, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {_inline(each)}" for key, each in data.items()) + "}"
    if isinstance(data, list | tuple):
        return "[" + ", ".join(map(_inline, data)) + "]"
    if isinstance(data, bool):
        return str(data).lower()
    if isinstance(data, int | float):
        return repr(data)
    return json.dumps(str(data or ""), ensure_ascii=True)


def scenario_file(rng: Random, *, seed: bytes | None = None) -> tuple[str, bytes]:
    """Name and content of a scenario file, from ``seed`` where it is one that can be read."""
    data = _parsed(seed) if seed is not None else None
    tree = bent(data if data is not None else scenario(rng), rng, rng.choice([0, 0, 1, 1, 1, 1, 2, 4]))
    if rng.random() < 0.5:
        name, text = "scenario.toml", as_toml(tree)
    else:
        name, text = "scenario.json", json.dumps(tree, indent=rng.choice([None, 1]), default=str)
    content = text.encode("utf-8", "surrogatepass")
    return name, mangled(content, rng) if rng.random() < 0.15 else content


def _parsed(content: bytes) -> Any:
    """The data of a scenario file; None where there are none, or so many that a few changes would not tell."""
    if len(content) > 20_000 or content.count(b"[") + content.count(b"{") > 200:
        return None
    for read in (tomllib.loads, json.loads):
        try:
            return read(content.decode())
        except (ValueError, RecursionError):
            continue
    return None


def scenario_case(rng: Random, seed: Case | None = None) -> Case:
    """A scenario file."""
    name, content = scenario_file(rng, seed=next(iter(seed.files.values())) if seed else None)
    return Case({name: content})
