"""Recorded requests through simulated engines, iteration by iteration, at the cost of a few events for each."""

from fluidopt.serving.engine import Engine, EngineFleet, read_engine
from fluidopt.serving.overhead import fit_step_overhead
from fluidopt.serving.replay import replay
from fluidopt.serving.result import Replay

__all__ = ["Engine", "EngineFleet", "Replay", "fit_step_overhead", "read_engine", "replay"]
