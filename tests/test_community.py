"""The files for contributors: recipes that work as written, citation metadata, and what the security page promises."""

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import fluidopt as fo
from fluidopt.traces import readers

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fluidopt"
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def blocks(heading, language):
    """The code blocks of a section of the guide, in order."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", GUIDE, re.DOTALL | re.MULTILINE)
    assert section is not None
    return re.findall(rf"^```{language}\n(.*?)^```", section[1], re.DOTALL | re.MULTILINE)


def run(code):
    """Run a block of the guide, the project's own file; returns its names."""
    names = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    return names


# ---- changes inside the package, made to a copy of it ---------------------------------------------------------------


def apply(diff, root):
    """Apply a diff of the guide: each part must fit its file in exactly one place."""
    for part in diff.split("--- ")[1:]:
        name, _, lines = part.partition("\n")
        old, new = (
            "".join(line[1:] for line in lines.splitlines(keepends=True) if line[0] in signs) for signs in (" -", " +")
        )
        path = root / name
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name} has the lines {text.count(old)} times:\n{old}"
        path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the package with the guide's service level and policy in it."""
    root = tmp_path_factory.mktemp("changed")
    shutil.copytree(PACKAGE, root / "fluidopt", ignore=shutil.ignore_patterns("__pycache__"))
    levels = root / "fluidopt" / "service_levels.py"
    text = levels.read_text(encoding="utf-8")
    above = "ServiceLevel = Annotated["
    assert text.count(above) == 1
    (level,) = blocks("Add a service level", "python")
    levels.write_text(text.replace(above, f"{level}\n\n{above}"), encoding="utf-8")
    for diff in (*blocks("Add a service level", "diff"), *blocks("Add a policy", "diff")):
        apply(diff, root)
    return root


def told(root, script):
    """What a script prints, as JSON, where the package is the copy."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def outcome(changed):
    """What the level and the policy do there, on the reference instance."""
    return told(
        changed,
        """
import json
import fluidopt as fo

model = fo.reference_model()
def solved(**how):
    level = fo.SlowTokenShare(**how)
    with_it = fo.FluidModel(model.workload, model.gpu_types, prices=model.scenario.prices, service_levels=[level])
    plan = with_it.solve()
    beside, alone = (plan.decode[:, k] / mode.iteration_time for k, (_, mode) in enumerate(plan.model.modes))
    again = fo.Scenario.from_dict(json.loads(json.dumps(with_it.to_dict())))
    return {
        "revenue": plan.revenue_rate,
        "objective": plan.objective,
        "shares": (beside / (beside + alone)).tolist(),
        "tokens": [beside.tolist(), alone.tolist()],
        "kept": again == with_it.scenario,
        "certified": bool(plan.certificate.holds(1e-7)),
    }

policy = model.solve().policy(gpus=20, kind="PI-WSP")
print(json.dumps({
    "hard": solved(at_most=0.05),
    "soft": solved(at_most=0.05, penalty=0.02),
    "one": solved(at_most=0.05, classes=["prefill-heavy"]),
    "roles": [role.gpus for role in policy.roles],
    "rules": policy.rules(),
    "again": fo.Policy.from_json(policy.to_json()) == policy,
}))
""",
    )


def by_row(*classes):
    """The same promise as the guide's one line in the user's own script; for all classes, or those named."""
    found = re.search(r"`model\.subject_to\((\".+?\"), name=\"slow_tokens\"\)`", GUIDE)
    assert found is not None
    relation = ast.literal_eval(found[1]).replace("0.1", "0.05")
    model = fo.reference_model()
    for at, name in enumerate(classes or ["i"]):
        chosen = relation.replace("[i,", f"[{name!r},") if classes else relation
        model.subject_to(chosen, name=f"slow_tokens_{at}")
    return model.solve()


def test_a_service_level_as_the_guide_adds_it(outcome):
    hard, one = outcome["hard"], outcome["one"]
    assert max(hard["shares"]) <= 0.05 + 1e-9
    assert hard["revenue"] == pytest.approx(by_row().revenue_rate, rel=1e-9)
    assert one["shares"][1] <= 0.05 + 1e-9
    assert one["revenue"] == pytest.approx(by_row("prefill-heavy").revenue_rate, rel=1e-9)
    assert hard["revenue"] < one["revenue"] - 1e-3  # so the row binds, and for the classes named only
    assert all(outcome[each]["certified"] and outcome[each]["kept"] for each in ("hard", "soft", "one"))


def test_its_penalty_is_money_per_token_above_the_bound(outcome):
    soft = outcome["soft"]
    above = sum(max(0.0, slow - 0.05 * (slow + fast)) for slow, fast in zip(*soft["tokens"], strict=True))
    assert above > 0.1
    assert soft["objective"] == pytest.approx(soft["revenue"] - 0.02 * above, rel=1e-9)
    assert soft["objective"] > outcome["hard"]["revenue"]


def test_a_kind_of_policy_as_the_guide_adds_it(outcome):
    """No partition, as many GPUs as there are, a priority by output over prompt tokens, and decodes that stay."""
    assert outcome["again"]
    assert outcome["roles"] == [20]
    role, gate, router = outcome["rules"]
    assert "one prefill at a time" in role
    assert "decode-heavy > prefill-heavy" in gate
    assert "same slot" in router


# ---- changes from outside -------------------------------------------------------------------------------------------


def test_a_gate_of_ones_own():
    (code,) = blocks("Add a policy", "python")
    found = run(code)
    assert "decode-heavy: -2" in str(found["holding"])
    revenue = found["found"].to_frame()["revenue_rate"]
    assert revenue["gate-and-route"] < revenue["holding"] < found["policy"].revenue_bound


@pytest.fixture
def formats(monkeypatch):
    """The known formats, and whatever the guide registers, for one test."""
    monkeypatch.setattr(readers, "_FORMATS", dict(readers._FORMATS))
    for code in blocks("Add a trace format", "python"):
        run(code)


@pytest.mark.usefixtures("formats")
def test_a_declared_trace_format(tmp_path):
    path = tmp_path / "gateway.csv"
    path.write_text("at,tenant,tokens in,tokens out\n500,a,472,18\n4500,b,1087,230\n", encoding="utf-8")
    trace = fo.read_trace(path)
    assert trace.arrival_time.tolist() == [0.0, 4.0]
    assert trace.label.tolist() == ["a", "b"]


@pytest.mark.usefixtures("formats")
def test_a_trace_format_with_a_parser(tmp_path):
    path = tmp_path / "access.log"
    lines = [
        "2026-11-24T12:00:00.250Z POST /v1/chat in=472 out=18",
        "",
        "2026-11-24T12:00:02.500Z POST /v1/chat in=1087 out=230",
        "2026-11-24T12:00:03Z POST /v1/chat in=none out=1",
    ]
    path.write_text("\n".join(lines[:3]), encoding="utf-8")
    trace = fo.read_trace(path)
    assert trace.arrival_time.tolist() == [0.0, 2.25]
    assert trace.prompt_tokens.tolist() == [472, 1087]
    assert trace.output_tokens.tolist() == [18, 230]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(fo.TraceFormatError, match=r"line 4: expected a whole number .* in column in, found 'none'"):
        fo.read_trace(path)
    assert fo.read_trace(path, on_bad_line="skip").skipped_lines == 1


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"`((?:fluidopt|tests|docs|benchmarks)/[\w./]*)`", GUIDE + SECURITY))
    named |= {f"fluidopt/{each}" for each in re.findall(r"`([a-z_]+(?:\.py|/))`", GUIDE) if each != "fluidopt/"}
    generated = {"fluidopt/tests/", "fluidopt/docs/", "fluidopt/benchmarks/"}
    inside = [path.name for path in PACKAGE.rglob("*")]
    missing = [
        each for each in sorted(named - generated) if not (ROOT / each).exists() and Path(each).name not in inside
    ]
    assert named
    assert not missing


# ---- citation -------------------------------------------------------------------------------------------------------


def test_citation_file():
    """The keys that version 1.2.0 of the format requires, and the values that other files of the project say too."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert cited["cff-version"] == "1.2.0"
    assert all(isinstance(cited[key], str) and cited[key] for key in ("message", "title"))
    assert cited["type"] == "software"
    assert str(cited["version"]) == project["version"] == fo.__version__
    assert cited["license"] == project["license"]
    assert cited["keywords"] == project["keywords"]
    assert [each["name"] for each in cited["authors"]] == [each["name"] for each in project["authors"]]
    (paper,) = cited["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert [each["family-names"] for each in paper["authors"]] == ["Lin", "Ding", "Han", "Zhang"]
    number = paper["url"].rpartition("/")[2]
    assert paper["identifiers"][0]["value"] == f"arXiv:{number}"
    assert number in (ROOT / "README.md").read_text(encoding="utf-8")


# ---- what the security page promises of the source -----------------------------------------------------------------

FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"subprocess", "socket", "http", "urllib.request", "requests", "ftplib", "marshal", "shelve"}


def breaches(source):
    """Calls and imports that run text, start a process, open a connection or load a pickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS or name in ("os.system", "pickle.load", "pickle.loads"):
                found.append(name)
        elif isinstance(node, ast.Import):
            found += [each.name for each in node.names if each.name in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module in FORBIDDEN_MODULES | {"pickle"}:
            found.append(node.module)
    return found


def test_the_package_runs_no_text_and_opens_no_connection():
    found = {str(path.relative_to(ROOT)): breaches(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    assert len(found) > 100
    assert not {name: what for name, what in found.items() if what}


@pytest.mark.parametrize(
    "source",
    ["eval('1')", "import subprocess", "from pickle import loads", "import os\nos.system('ls')", "pickle.load(file)"],
)
def test_a_breach_would_be_found(source):
    assert breaches(source)


def test_unknown_fields_and_names_are_refused(tmp_path):
    path = tmp_path / "scenario.json"
    data = fo.reference_model().to_dict()
    for change, message in (
        ({"rows": [{"name": "r", "row": "__import__('os').getcwd() <= q_p[i]"}]}, "rows"),
        ({"hook": "import os"}, "hook is not a field"),
    ):
        path.write_text(json.dumps(data | change), encoding="utf-8")
        with contextlib.chdir(tmp_path), pytest.raises(fo.InvalidInput, match=message):
            fo.FluidModel.from_scenario(path)
