"""Fluid trajectories of a fleet under a policy."""

from fluidopt.fluid.dynamics import FluidState
from fluidopt.fluid.trajectory import FluidTrajectory, fluid_trajectory

__all__ = ["FluidState", "FluidTrajectory", "fluid_trajectory"]
