"""Feeds bent and broken inputs to the surface of fluidopt for as long as it is told, and keeps what goes wrong.

    python tests/fuzz.py scenario --minutes 60 --findings /tmp/findings

Targets are scenario files, trace files with tables of measurements, and command lines. An input that brings up a
message not seen before is kept and bent further. Whatever is done with an input must end well or in one of the
documented ways: a `FluidoptError`, for the command line exit code 0, 2, 3 or 4 with a sentence on standard error. Found
are other exceptions, other warnings than those of fluidopt, JSON that is none, more than 10 s of computing, more than
4 GiB of memory, crashes, and code or files out of place. Each finding is made smaller and written down with its input.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from fuzz_commands import command_case
from fuzz_inputs import TRAP, Case
from fuzz_scenarios import scenario_case
from fuzz_traces import trace_case

import fluidopt as fo
from fluidopt.calibration import read_curves

SECONDS = 10
MEMORY = 4 << 30
PER_CHILD = 1000
KEPT = 2000
CODES = {0, 2, 3, 4}
_STACK = 60


class Breach(BaseException):
    """Something that no input may bring about; no handler of exceptions takes it for an error of the input."""


# ---- what must not happen -----------------------------------------------------------------------------------------

_home: Path | None = None
"""Where files may be written while an input is tried; None in between."""
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect")
_GENERATED = ("<lambdifygenerated", "<frozen", "<string>", "<attrs generated", "<unknown>", "<__array_function__")


def guard(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: no other program, no connection, no file written elsewhere, no code that comes from an input."""
    if _home is None:
        return
    if event in _FORBIDDEN:
        raise Breach(f"{event} {arguments!r:.200}")
    if event == "exec":
        code = arguments[0]
        known = code.co_filename.startswith(_GENERATED) or Path(code.co_filename).exists()
        if not known or TRAP in repr((code.co_names, code.co_consts)):
            raise Breach(f"exec of {code!r:.200}")
    elif event == "open":
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR) if isinstance(flags, int) else "w" in str(mode)
        if writes and isinstance(path, str) and not _allowed(Path(path)):
            raise Breach(f"open of {path!r} for writing")


def _allowed(path: Path) -> bool:
    """Whether a file may be written: the input's own folder, compiled code, and devices."""
    place = os.path.abspath(path)
    return place.startswith((str(_home), "/dev/")) or "__pycache__" in place or "matplotlib" in place


@contextlib.contextmanager
def watched(home: Path) -> Iterator[None]:
    """Try an input: in its folder, with warnings as errors, for a limited time of the processor."""
    global _home
    before = os.getcwd()
    os.chdir(home)
    earlier = signal.signal(signal.SIGPROF, _late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    _home = home
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", fo.ContentionWarning)
            yield
    finally:
        _home = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, earlier)
        os.chdir(before)


def _late(*_: Any) -> None:
    raise Breach(f"more than {SECONDS} s of computing")


# ---- the targets --------------------------------------------------------------------------------------------------


def scenario(case: Case) -> str:
    """Read a scenario file, make the model, solve it, and look at the plan."""
    from fluidopt.cli.output import plan_data

    (name,) = case.files
    try:
        read = fo.read_scenario(name)
        assert fo.Scenario.from_dict(read.to_dict()) == read, "a scenario and what its data give back differ"
        model = fo.FluidModel.from_scenario(read)
        repr(model)
        plan = model.solve()
        _strict_json(json.dumps(plan_data(plan)))
        _shown(plan)
        if read.gpus is not None and read.gpus < 10_000:
            _shown(plan.policy(gpus=read.gpus))
    except fo.FluidoptError as error:
        return _template(error)
    kinds = sorted({level.kind for level in read.service_levels})
    return f"done by {plan.solution.method}, {kinds}, {len(read.rows)}, {read.objective}, {len(plan.notes)}"


def trace(case: Case) -> str:
    """Read a trace and describe it, or read a table of measurements and fit a curve to it."""
    options = dict(case.words)
    try:
        if "table.csv" in case.files:
            if case.files["table.csv"].lstrip().startswith(b"{"):
                return f"curves {len(read_curves('table.csv'))}"
            form = options.pop("form", "auto")
            fitted = fo.fit_iteration_time(fo.read_iteration_times("table.csv", **options), form=form)
            _shown(fitted)
            fitted.to_toml()
            return f"fit {fitted.form}"
        read = fo.read_trace("a-trace.csv", **options)
        _shown(read)
        text = "trace"
        for look in (read.describe, read.lengths, read.by_hour, read.dispersion, lambda: _shown(read.classify(2))):
            try:
                look()
            except fo.FluidoptError as error:
                text = _template(error)
        return text
    except fo.FluidoptError as error:
        return _template(error)


def command(case: Case) -> str:
    """Run a command line in this process, or now and then in one of its own."""
    words = [str(word) for word in case.words]
    if zlib.crc32(repr(case.words).encode()) % 200 == 0 and not any("\0" in word for word in words):
        return _in_a_process(words)
    out, err = _Text(), _Text()
    kept = sys.argv, sys.stdin, sys.stdout, sys.stderr, warnings.showwarning
    sys.argv, sys.stdin, sys.stdout, sys.stderr = ["fluidopt", *words], _Text(case.files.get("-", b"")), out, err
    code: Any = 0
    try:
        from fluidopt.cli import main

        main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv, sys.stdin, sys.stdout, sys.stderr, warnings.showwarning = kept
    return _judged(words, code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode())


class _Text(io.TextIOWrapper):
    def __init__(self, content: bytes = b"") -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8", write_through=True)


def _in_a_process(words: list[str]) -> str:
    global _home
    home, _home = _home, None
    try:
        done = subprocess.run(
            [sys.executable, "-m", "fluidopt", *words],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=120,
            check=False,
        )
    finally:
        _home = home
    return _judged(words, done.returncode, done.stdout.decode(), done.stderr.decode())


def _judged(words: list[str], code: Any, out: str, err: str) -> str:
    assert code in CODES, f"exit code {code!r}: {err[-300:]}"
    assert "Traceback" not in err, err
    assert out.strip() or err.strip() or code == 0, f"exit code {code} without a word"
    if "--json" in words and code == 0 and "--help" not in words and out:
        _strict_json(out)
    return f"{code} {_normal(err)}" if code else f"0 {sorted(word for word in words if word.startswith('--'))}"


def _shown(thing: Any) -> None:
    repr(thing)
    if hasattr(thing, "_repr_html_"):
        thing._repr_html_()
    if hasattr(thing, "to_dict"):
        _strict_json(json.dumps(thing.to_dict()))


def _strict_json(text: str) -> None:
    json.loads(text, parse_constant=_no_constant)


def _no_constant(text: str) -> None:
    raise AssertionError(f"{text} is no JSON")


def _template(error: BaseException) -> str:
    return f"{type(error).__name__} {_normal(str(error))}"


def _normal(text: str) -> str:
    """The first clause of a message, without what the input put into it."""
    text = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|0x[0-9a-f]+", "'", text).partition(";")[0]
    return re.sub(r"(?:[0-9]|\s|[^\x00-\x7f])+", " ", text)[:150]


TARGETS: dict[str, tuple[Callable[..., Case], Callable[[Case], str]]] = {
    "scenario": (scenario_case, scenario),
    "trace": (trace_case, trace),
    "command": (command_case, command),
}


# ---- trying, shrinking, keeping -----------------------------------------------------------------------------------


def tried(target: str, case: Case) -> tuple[str, str | None]:
    """What came of an input, and its traceback where that should not be."""
    home = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        for name, content in case.files.items():
            (home / name).write_bytes(content)
        with watched(home):
            return TARGETS[target][1](case), None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        lines = traceback.format_exception(error, limit=-_STACK)
        return _signature(error), "".join(lines)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _signature(error: BaseException) -> str:
    """The kind of error and the last line of fluidopt's own that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/fluidopt/" in frame.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "outside"
    return f"{type(error).__name__} {place} {_normal(str(error))[:60]}"


def smaller(target: str, case: Case, signature: str, *, seconds: float = 60.0) -> Case:
    """The case with as much of its files and words left out as still ends in the same way."""
    until = time.monotonic() + seconds

    def same(other: Case) -> bool:
        return tried(target, other)[0] == signature

    for at in reversed(range(len(case.words))):
        fewer = replace(case, words=case.words[:at] + case.words[at + 1 :])
        if time.monotonic() < until and same(fewer):
            case = fewer
    for name in case.files:
        size = len(case.files[name]) // 2
        while size and time.monotonic() < until:
            at = 0
            while at < len(case.files[name]) and time.monotonic() < until:
                content = case.files[name]
                fewer = replace(case, files={**case.files, name: content[:at] + content[at + size :]})
                if same(fewer):
                    case = fewer
                else:
                    at += size
            size //= 2
    return case


def child(target: str, seed: int, minutes: float, findings: Path) -> None:
    """Try inputs until the time or the number for one process is up; write down what goes wrong."""
    sys.addaudithook(guard)
    faulthandler.enable()
    rng, until = Random(seed), time.monotonic() + 60 * minutes
    store = findings / f"{target}-corpus.pickle"
    known: dict[str, Case] = pickle.loads(store.read_bytes()) if store.exists() else {}
    limit = _warm(target) + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    make, found, count = TARGETS[target][0], {path.name for path in findings.glob(f"{target}-*.txt")}, 0
    while count < PER_CHILD and time.monotonic() < until:
        case = make(rng, rng.choice(list(known.values())) if known and rng.random() < 0.5 else None)
        (findings / f"{target}-current.pickle").write_bytes(pickle.dumps(case))
        faulthandler.dump_traceback_later(120, exit=True)
        end, fault = tried(target, case)
        faulthandler.cancel_dump_traceback_later()
        count += 1
        if fault is not None:
            name = f"{target}-{re.sub(r'[^A-Za-z0-9_.]+', '-', end)}.txt"
            if name not in found:
                found.add(name)
                small = smaller(target, case, end)
                (findings / name).write_text(f"{small!r:.20000}\n\n{fault}", errors="backslashreplace")
        elif end not in known and len(known) < KEPT and sum(map(len, case.files.values())) < 1 << 20:
            known[end] = case
    store.write_bytes(pickle.dumps(known))
    with (findings / f"{target}-count").open("a") as log:
        log.write(f"{count}\n")


def _warm(target: str) -> int:
    """Import and compile what is slow before the clock runs; the bytes of address space then in use."""
    from test_cli import SCENARIO, TRACE

    files = {"scenario.toml": SCENARIO.encode(), "requests.csv": TRACE.encode()}
    lines = [
        ("plan", "scenario.toml", "--gpus", "5", "--solver", "cvxpy", "--figure", "x.png"),
        ("simulate", "scenario.toml", "--gpus", "5", "--horizon", "50"),
        ("replay", "requests.csv", "--gpus", "2", "--policy", "FI-WSP"),
        ("size", "requests.csv", "--ttft", "2", "--tpot", "0.05"),
        ("sensitivity", "scenario.toml"),
    ]
    home = Path(tempfile.mkdtemp(prefix="fuzz-"))
    before = os.getcwd()
    os.chdir(home)
    for name, content in files.items():
        (home / name).write_bytes(content)
    for words in lines if target == "command" else lines[:1]:
        command(Case(files, words))
    if target == "trace":
        fo.read_trace(home / "requests.csv").classify(2)
    os.chdir(before)
    shutil.rmtree(home)
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> None:
    """Run processes one after the other until the time is up; a process that dies is a finding too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, required=True)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.findings.mkdir(parents=True, exist_ok=True)
    if given.child:
        child(given.target, given.seed, given.minutes, given.findings)
        return
    start, seed = time.monotonic(), given.seed
    while (left := given.minutes - (time.monotonic() - start) / 60) > 0:
        words = [given.target, "--child", f"--seed={seed}", f"--minutes={left}", f"--findings={given.findings}"]
        done = subprocess.run([sys.executable, __file__, *words], stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            last = given.findings / f"{given.target}-current.pickle"
            case = pickle.loads(last.read_bytes()) if last.exists() else None
            path = given.findings / f"{given.target}-died-{seed}.txt"
            path.write_text(f"exit {done.returncode}\n{case!r:.20000}\n\n{done.stderr}", errors="backslashreplace")
        seed += 1
    counts = given.findings / f"{given.target}-count"
    total = sum(map(int, counts.read_text().split())) if counts.exists() else 0
    found = sorted(path.name for path in given.findings.glob(f"{given.target}-*.txt"))
    print(f"{given.target}: {total:,} inputs in {(time.monotonic() - start) / 60:.1f} minutes, {len(found)} findings")
    print("\n".join(found))


if __name__ == "__main__":
    main()
