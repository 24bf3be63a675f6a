"""Simulation of fleets: the compiled chain simulator and what is estimated from its replications."""
