"""`fluidopt report`: the same inputs give the same page, mistakes are refused, and browsers show it as it is meant."""

import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from html import unescape
from pathlib import Path

import pytest
from report_page import SHORT, Page

import fluidopt as fo
from fluidopt import cli
from fluidopt.reports import report
from fluidopt.reports.page import page

BRIEF = ("--horizon", "300", "--replications", "4")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
in_browser = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="needs Chromium (a CI without one fails)"
)


# ---- the command --------------------------------------------------------------------------------------------------


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fluidopt", "report", *words], capture_output=True, text=True, cwd=cwd, check=False
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a scenario and its page, and what the command said."""
    folder = tmp_path_factory.mktemp("report")
    scenario = Path(__file__).parents[1] / "docs" / "examples" / "scenario.toml"
    shutil.copy(scenario, folder / "scenario.toml")
    done = run("scenario.toml", "--seed", "7", "-o", "first.html", *BRIEF, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_same_inputs_and_seed_give_the_same_page(written):
    """Another process, another file, other order of options; and the JSON of a third is that of the objects."""
    folder, done = written
    again = run(*BRIEF, "-o", "second.html", "--json", "--seed", "7", "scenario.toml", cwd=folder)
    assert again.returncode == 0, again.stderr
    first = (folder / "first.html").read_bytes()
    command = "fluidopt report scenario.toml --horizon 300.0 --replications 4 --seed 7"
    assert first == (folder / "second.html").read_bytes()
    assert command.encode() in first
    assert done.stdout.endswith("Page: first.html\n")
    assert re.fullmatch(r"[\d.]+ s( \(.*\))?\n", done.stderr)
    model = fo.FluidModel.from_scenario(folder / "scenario.toml")
    made = report(model, seed=7, command=command, **SHORT)
    assert json.loads(again.stdout) == json.loads(json.dumps(made.to_dict()))
    assert page(made).encode() == first
    assert made.figures[0].sentence in " ".join(done.stdout.split())


def test_the_scenario_on_the_page_makes_the_plan_again(written):
    folder, _ = written
    text = (folder / "first.html").read_text()
    (saved,) = [
        unescape(each) for each in re.findall(r"<code>(.*?)</code>", text, re.DOTALL) if each.startswith("{")
    ]  # fmt: skip
    again = fo.FluidModel.from_scenario(fo.Scenario.from_dict(json.loads(saved)))
    assert again.solve() == fo.FluidModel.from_scenario(folder / "scenario.toml").solve()


def main(monkeypatch, *words: str) -> int | str | None:
    """The command in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", ["fluidopt", "report", *words])
    with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
        cli.main()
    return ended.value.code


def test_shells_complete_what_there_is():
    from fluidopt.cli.options import PROMISES
    from fluidopt.reports.making import LEVELS

    assert tuple(level.kind for level in LEVELS) == PROMISES


def test_the_command_says_what_it_could_not_make(tmp_path, monkeypatch, capsys):
    patient = fo.reference_model().workload.with_abandonment(0.0)
    model = fo.FluidModel(patient, fo.reference_model().gpu_types, prices=fo.TokenPrices(prompt=0.1, output=0.2))
    (tmp_path / "busy.json").write_text(json.dumps(model.scenario.to_dict()))
    page = tmp_path / "page.html"
    assert main(monkeypatch, str(tmp_path / "busy.json"), "--gpus", "4", "-o", str(page)) == 3
    assert "no plan satisfies all rows" in capsys.readouterr().err
    assert "There is no plan" in page.read_text()


def test_the_command_refuses_what_does_not_fit(written, monkeypatch, capsys):
    folder, _ = written
    scenario = str(folder / "scenario.toml")
    for words, message in (
        (["--with", scenario], "--column, --with, --classes and --abandonment-rate go with a trace"),
        (["--classes", "3"], "--column, --with, --classes and --abandonment-rate go with a trace"),
        (["--percentile", "95"], "--percentile and --mean go with a trace"),
        (["--mean"], "--percentile and --mean go with a trace"),
        (["--start", "full"], "start must be 'empty' or 'fluid'; got 'full'"),
        (["--horizon", "1e12"], "take at most"),
        (["--gpus", "2000000"], "--gpus must be at most 1,000,000"),
        (["--promise", "magic"], "promise must be one of slot_tpot"),
        (["-o", str(folder)], "--output must be a file in a directory that exists"),
        (["-o", str(folder / "nowhere" / "page.html")], "--output must be a file in a directory that exists"),
    ):
        assert main(monkeypatch, scenario, "--horizon", "100", *words) == 2
        said = capsys.readouterr()
        assert (said.out, message in said.err) == ("", True)


def test_the_command_refuses_what_does_not_fit_a_trace(tmp_path, monkeypatch, capsys):
    trace = tmp_path / "requests.csv"
    trace.write_text("arrival_time,prompt_tokens,output_tokens\n" + "".join(f"{at},300,40\n" for at in range(50)))
    for words, message in (
        (["--gpus", "2", "--percentile", "95"], "--percentile and --mean go with a trace and its --ttft and --tpot"),
        (["--ttft", "2", "--tpot", "1", "--mean", "--percentile", "95"], "give one of them"),
        (["--gpus", "2", "--horizon", "1e12"], "take at most"),
        (["--gpus", "2000000"], "--gpus must be at most 1,000,000"),
        (["--ttft", "2", "--tpot", "1", "--horizon", "1e12"], "take at most"),
    ):
        assert main(monkeypatch, str(trace), *words) == 2
        assert message in capsys.readouterr().err


# ---- browsers -----------------------------------------------------------------------------------------------------

# A page that frames the report from the same server, so that a script may look into it at two widths.
LOOK = """<!DOCTYPE html><title>look</title><pre id="found"></pre><script>
addEventListener("load", async () => {
  const found = {};
  for (const width of [390, 1280]) {
    const frame = document.createElement("iframe");
    frame.style.cssText = `width:${width}px;height:900px;border:0`;
    frame.src = "first.html";
    document.body.append(frame);
    await new Promise((done) => { frame.onload = done; });
    const page = frame.contentDocument, tip = page.getElementById("tip");
    const spot = page.querySelector("#figure-served .spot"), box = spot.getBoundingClientRect();
    const at = { bubbles: true, clientX: box.left + 5, clientY: box.top + 5, pointerType: "mouse" };
    spot.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", at));
    const pointed = { hidden: tip.hidden, text: tip.textContent, said: spot.dataset.tip };
    page.body.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", at));
    const chart = page.querySelector("#figure-served .chart");
    chart.focus();
    const key = (name) => new frame.contentWindow.KeyboardEvent("keydown", { bubbles: true, key: name });
    chart.dispatchEvent(key("ArrowDown"));
    page.activeElement.dispatchEvent(key("ArrowDown"));
    const spots = [...chart.querySelectorAll(".spot")];
    const walked = spots.indexOf(page.activeElement);
    page.activeElement.dispatchEvent(key("Escape"));
    const right = tip.getBoundingClientRect().right;
    found[width] = {
      wide: page.scrollingElement.scrollWidth, inner: frame.contentWindow.innerWidth, pointed, walked,
      escaped: tip.hidden && page.activeElement === chart, right,
      titles: page.querySelectorAll(".spot > title").length, scripts: page.scripts.length,
    };
  }
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


QUIET = """<!DOCTYPE html><title>quiet</title><pre id="found"></pre>
<iframe src="first.html" sandbox="allow-same-origin"></iframe><script>
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument;
  document.getElementById("found").textContent = page.documentElement.outerHTML;
});
</script>"""


@contextlib.contextmanager
def served(folder: Path):
    """The folder on a server of this machine: its address, and what it was asked for."""
    asked: list[str] = []

    class Remembers(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_parts):
            asked.append(self.path)

    handler = functools.partial(Remembers, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def browse(address: str, *options: str) -> subprocess.CompletedProcess[str]:
    quiet = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
    return subprocess.run(
        [str(CHROMIUM), *quiet, "--enable-logging=stderr", "--log-level=0", *options, address],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@in_browser
def test_a_browser_shows_it_without_errors_and_asks_for_nothing_else(written):
    """Served by a server that remembers what it is asked for; in two widths, pointed at, and walked by keyboard."""
    folder, _ = written
    (folder / "look.html").write_text(LOOK)
    with served(folder) as (address, asked):
        done = browse(f"{address}/look.html", "--dump-dom", "--virtual-time-budget=10000")
    assert set(asked) <= {"/look.html", "/first.html", "/favicon.ico"}
    assert "CONSOLE" not in done.stderr, done.stderr
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    seen = json.loads(unescape(found))
    for width in ("390", "1280"):
        looked = seen[width]
        assert looked["wide"] <= looked["inner"] <= int(width)
        assert looked["pointed"]["hidden"] is False
        assert looked["pointed"]["text"] == looked["pointed"]["said"] != ""
        assert looked["walked"] == 1
        assert looked["escaped"]
        assert (looked["titles"], looked["scripts"]) == (0, 1)


@in_browser
def test_a_browser_without_scripts_shows_the_same_numbers(written):
    """Framed by a page that forbids the report its script, and copies what is there."""
    folder, _ = written
    (folder / "quiet.html").write_text(QUIET)
    with served(folder) as (address, _):
        done = browse(f"{address}/quiet.html", "--dump-dom", "--virtual-time-budget=10000")
    (copied,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    seen, whole = Page(unescape(copied)), Page((folder / "first.html").read_text())
    assert seen.tables == whole.tables
    assert seen.figures == whole.figures
    spots = sum(given.get("class") == "spot" for _, given in whole.tags)
    assert [tag for tag, _ in seen.tags].count("title") == spots + 1  # its own, and one to each spot


@in_browser
def test_it_prints(written, tmp_path):
    folder, _ = written
    paper = tmp_path / "page.pdf"
    browse((folder / "first.html").as_uri(), f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    printed = paper.read_bytes()
    assert printed.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 20
