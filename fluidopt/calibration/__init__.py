"""From measured iteration times to the curve of a GPU: reading tables, fitting, and how far to trust the fit."""

from fluidopt.calibration.figure import plot_fit
from fluidopt.calibration.fit import IterationTimeFit, fit_iteration_time
from fluidopt.calibration.tables import read_curves, read_iteration_times

__all__ = ["IterationTimeFit", "fit_iteration_time", "plot_fit", "read_curves", "read_iteration_times"]
