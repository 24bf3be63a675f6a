"""Hypothesis settings and the instances that several test files share."""

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

from fluidopt.reference import reference_model

settings.register_profile(
    "fluidopt",
    deadline=None,
    phases=set(Phase) - {Phase.explain},
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("fluidopt")


@pytest.fixture
def reference():
    """A fresh copy of the bundled reference model of arXiv:2602.02987, for tests that change it."""
    return reference_model()


@pytest.fixture(scope="session")
def reference_plan():
    """The plan of the bundled reference model."""
    return reference_model().solve("highs")
