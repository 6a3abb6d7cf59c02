"""OpenTelemetry spans, one a request, where the extra `otel` is installed; else nothing. No text is ever in a span."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Protocol

from selfdraft.serve.service import Job

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
"""OpenTelemetry's own variable: where spans are sent. Without it none are made."""


class Span(Protocol):
    def set_attribute(self, key: str, value: str | int | float | bool) -> None: ...
    def end(self) -> None: ...


class Tracer(Protocol):
    def start_span(self, name: str) -> Span: ...


def tracer_from_environment() -> Tracer | None:
    """A tracer that sends its spans to the endpoint of the environment; None without one, or without the extra."""
    if not os.environ.get(ENDPOINT) or find_spec("opentelemetry") is None:
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "selfdraft"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    found: Tracer = provider.get_tracer("selfdraft.serve")
    return found


def describe(job: Job, request_id: str) -> Mapping[str, str | int | float]:
    """What a span says of a request that has ended: sizes, times, counts; OpenTelemetry's names where it has any."""
    call, first = job.call, job.call.sequences[0]
    found: dict[str, str | int | float] = {
        "gen_ai.request.model": job.model,
        "gen_ai.usage.input_tokens": first.prompt_length,
        "gen_ai.usage.output_tokens": sum(sequence.num_output_tokens for sequence in call.sequences),
        "selfdraft.request_id": request_id,
        "selfdraft.finish_reason": first.finish_reason or "",
        "selfdraft.mean_acceptance_length": first.stats.mean_acceptance_length,
        "selfdraft.cached_tokens": first.stats.num_cached_tokens,
    }
    if call.admitted is not None:
        found["selfdraft.queue_seconds"] = call.admitted - call.arrived
    if call.first_token is not None:
        found["selfdraft.first_token_seconds"] = call.first_token - call.arrived
    if call.error is not None:
        found["error.type"] = type(call.error).__name__
    return found
