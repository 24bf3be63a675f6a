"""Recorded request streams: reading them, describing them, and turning them into workload classes."""

from fluidopt.traces.classify import Classification, classify
from fluidopt.traces.columns import Columns, Reading
from fluidopt.traces.readers import (
    TraceFormat,
    csv_format,
    json_format,
    read_trace,
    register_trace_format,
    trace_formats,
)
from fluidopt.traces.records import JsonLayout
from fluidopt.traces.table import CsvLayout
from fluidopt.traces.trace import Trace

__all__ = [
    "Classification",
    "Columns",
    "CsvLayout",
    "JsonLayout",
    "Reading",
    "Trace",
    "TraceFormat",
    "classify",
    "csv_format",
    "json_format",
    "read_trace",
    "register_trace_format",
    "trace_formats",
]
