"""Reports: everything about one instance on a page that opens anywhere, for the person who decides."""

from fluidopt.reports.making import Report, Unmade, report

__all__ = ["Report", "Unmade", "report"]
