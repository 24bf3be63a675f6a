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


@pytest.hookimpl(tryfirst=True)  # before the groups are read
def pytest_collection_modifyitems(items):
    """Keep the tests of a file in one process, where they share what is compiled and solved; the notebooks are executed
    once for the pages and for their own tests."""
    for item in items:
        name = item.path.stem
        item.add_marker(pytest.mark.xdist_group("pages" if name in {"test_docs", "test_notebooks"} else name))


@pytest.fixture
def reference():
    """A fresh copy of the bundled reference model of arXiv:2602.02987, for tests that change it."""
    return reference_model()


@pytest.fixture(scope="session")
def reference_plan():
    """The plan of the bundled reference model."""
    return reference_model().solve("highs")
