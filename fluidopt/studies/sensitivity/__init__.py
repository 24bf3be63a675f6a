"""Sensitivity of a model's revenue: derivatives with their sides, exact curves, shares of variance."""
