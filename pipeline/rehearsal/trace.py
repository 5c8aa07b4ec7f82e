"""A timeline as a trace that Perfetto and chrome://tracing open: a line a stream."""

from __future__ import annotations

import json
from typing import Any

from pipeline.rehearsal.tape import Collective, HostWait, Kernel
from pipeline.rehearsal.timeline import Span, Timeline


def to_trace(timeline: Timeline, name: str) -> str:
    """Trace Event Format, JSON; times in microseconds, to the nanosecond that Perfetto counts in. Where a span begins when another
    one ends both are rounded alike: of two that overlap by a nanosecond Perfetto drops one."""
    lines = {stream: index for index, stream in enumerate(dict.fromkeys(span.stream for span in timeline.spans))}
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": name}}]
    events += [
        {"ph": "M", "pid": 0, "tid": line, "name": "thread_name", "args": {"name": stream}}
        for stream, line in lines.items()
    ]
    events += [
        {
            "ph": "X", "pid": 0, "tid": lines[span.stream], "name": span.name, "ts": _ns(span.start) / 1e3,
            "dur": (_ns(span.start + span.seconds) - _ns(span.start)) / 1e3, "cat": getattr(span.entry, "phase", ""), "args": _facts(span),
        }
        for span in timeline.spans
    ]  # fmt: skip
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _facts(span: Span) -> dict[str, Any]:
    match span.entry:
        case Kernel() as kernel:
            return {"where": kernel.where, "kind": kernel.kind, "GFLOP": kernel.flops / 1e9, "MB": kernel.bytes / 1e6}
        case Collective() as one:
            return {"where": one.where, "group": one.group, "dtype": one.dtype, "MB sent": one.sent / 1e6}
        case HostWait() as wait:
            return {"where": wait.where}
    return {}
