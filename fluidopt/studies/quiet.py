"""Models that a study builds, without the warning that their owner has had."""

from __future__ import annotations

import warnings

from fluidopt.errors import ContentionWarning
from fluidopt.model import FluidModel
from fluidopt.scenario import Scenario


def built_quietly(scenario: Scenario) -> FluidModel:
    """The model; that its curve is not physical was said of the one it varies, and a study may mean to go there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ContentionWarning)
        return FluidModel.from_scenario(scenario)
