"""Policies: the rules as data, and how they are read off a plan."""

from fluidopt.policy.extract import extract
from fluidopt.policy.rules import Gate, Policy, Role, Router, Targets

__all__ = ["Gate", "Policy", "Role", "Router", "Targets", "extract"]
