"""The simulator against formulas, the exact chain and, where they are installed, Ciw and SimPy, on shared queues."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import queue_peers
from benchmarks.queue_peers import QUEUES, SIMULATORS, Queue, Seen, check, erlang_a, exact_means, installed, run

REPLICATIONS = 8
SMALL = ("M/M/7+M", "2 prefills, then 10 decodes")


def replications(name: str, queue: Queue, *, events: float) -> list[Seen]:
    return [run(name, queue, events=events, seed=seed) for seed in range(REPLICATIONS)]


@pytest.mark.parametrize("label", QUEUES)
def test_the_fleet_is_the_queue(label: str) -> None:
    queue = QUEUES[label]
    check("fluidopt", label, replications("fluidopt", queue, events=4e5), exact_means(queue))


@pytest.mark.parametrize("name", [name for name in installed() if name != "fluidopt"])
@pytest.mark.parametrize("label", SMALL)
def test_peers_simulate_the_same_queue(label: str, name: str) -> None:
    queue = QUEUES[label]
    seen = replications(name, queue, events=2e4)
    check(name, label, seen, exact_means(queue))
    # all events of a run are counted, those of its warm-up too
    expected = 2e4 + queue.settled_after * queue.arrival_rate * (1 + len(queue.stations))
    assert np.mean([each.events for each in seen]) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("label", [label for label, queue in QUEUES.items() if len(queue.stations) == 2])
def test_the_first_station_of_a_tandem_is_erlangs_queue(label: str) -> None:
    queue = QUEUES[label]
    waiting, _, busy, _ = exact_means(queue)
    np.testing.assert_allclose((waiting, busy), erlang_a(queue, *queue.stations[0]), rtol=1e-6)


def test_an_impatient_queue_as_fast_as_its_servers_is_poisson() -> None:
    queue = Queue(arrival_rate=3.0, abandonment_rate=1.0, prefill_gpus=1, decode_gpus=1, batch_size=3)
    waiting, busy = erlang_a(queue, queue.slots, 1.0)
    assert waiting + busy == pytest.approx(3.0, rel=1e-12)  # everyone leaves at rate 1: M/M/infinity


def test_another_queue_is_found_out() -> None:
    label = SMALL[0]
    queue = QUEUES[label]
    seen = replications("fluidopt", replace(queue, abandonment_rate=1.1), events=4e5)
    with pytest.raises(RuntimeError, match=r"fluidopt on M/M/7\+M: .* off the exact means"):
        check("fluidopt", label, seen, exact_means(queue))


def test_table_or_the_extra_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        queue_peers.importlib.util, "find_spec", lambda name: None if name in ("ciw", "simpy") else find(name)
    )
    queue_peers.main()
    assert capsys.readouterr().out == (
        "Not run: ciw and simpy not installed. They come with the extra peers: fluidopt[peers].\n"
    )
    monkeypatch.setattr(queue_peers, "SIMULATORS", {"fluidopt": (SIMULATORS["fluidopt"][0], 4e5)})
    monkeypatch.setattr(queue_peers, "QUEUES", {SMALL[1]: QUEUES[SMALL[1]]})
    queue_peers.main()
    rows = capsys.readouterr().out.strip().splitlines()
    assert len(rows) == 3
    assert rows[2].startswith("| 2 prefills, then 10 decodes | fluidopt | 1.826, 0.773 | 1.")
    assert rows[2].endswith("| 1 |")
