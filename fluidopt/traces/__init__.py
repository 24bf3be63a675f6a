"""Recorded request streams: reading them, describing them, and turning them into workload classes."""

from fluidopt.traces.classify import Classification, classify
from fluidopt.traces.readers import (
    Columns,
    CsvLayout,
    TraceFormat,
    csv_format,
    read_trace,
    register_trace_format,
    trace_formats,
)
from fluidopt.traces.trace import Trace

__all__ = [
    "Classification",
    "Columns",
    "CsvLayout",
    "Trace",
    "TraceFormat",
    "classify",
    "csv_format",
    "read_trace",
    "register_trace_format",
    "trace_formats",
]
