"""One trace id from a job's submission to its webhook: W3C Trace Context, https://www.w3.org/TR/trace-context/.

A job's trace is a `traceparent` in its row, taken from the caller's header or begun anew; it goes with every stage's call, is in
every log record and in the webhook's headers. Spans are made, and OpenTelemetry's SDK loaded, only where an OTLP endpoint is
configured; without one only the ids travel. `tracestate` and baggage are the caller's own and end here.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opentelemetry import context, trace
from opentelemetry.trace import NonRecordingSpan, NoOpTracer, Span, SpanContext, StatusCode, TraceFlags, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

MAX_CHARS = 256
"""Of a caller's header that is looked at: it has 55, and a later version of the standard may add some."""
EXPORT_S = 2.0
"""How long a span waits in its process for others, to be sent together."""
GIVE_UP_S = 5.0
"""For how long spans are sent again to a collector that does not take them, also by a process that ends."""

_PROPAGATOR = TraceContextTextMapPropagator()
_tracer: Tracer = NoOpTracer()
_stop: Callable[[], None] = lambda: None  # noqa: E731


def current() -> str | None:
    """The traceparent of what this task does now."""
    found = trace.get_current_span().get_span_context()
    return _written(found) if found.is_valid else None


def fields() -> dict[str, str]:
    """The ids of the current span for a log record; nothing outside of a trace."""
    found = trace.get_current_span().get_span_context()
    return {"trace_id": f"{found.trace_id:032x}", "span_id": f"{found.span_id:016x}"} if found.is_valid else {}


def trace_id(traceparent: str) -> str:
    """Its 32 hex digits."""
    return traceparent.split("-")[1]


@contextmanager
def span(
    name: str, traceparent: str | None, *, begins: bool = False, begun_s: float | None = None, **attributes: str | float
) -> Iterator[None]:
    """A span for the block, below the one that `traceparent` names; what is called within belongs to it.

    Where `traceparent` is None or no valid one, the block begins a trace (begins) or is in none. begun_s: when the span began, in
    seconds since 1970, if not now.
    """
    parent = _context_of(traceparent)
    if parent is None and not begins:
        yield
        return
    if parent is None and isinstance(_tracer, NoOpTracer):  # which makes no ids
        parent = SpanContext(secrets.randbits(128) or 1, secrets.randbits(64) or 1, True, TraceFlags(TraceFlags.SAMPLED))
    root = context.Context()
    with _tracer.start_as_current_span(
        name,
        root if parent is None else trace.set_span_in_context(NonRecordingSpan(parent), root),
        attributes=attributes,
        start_time=None if begun_s is None else int(begun_s * 1e9),
        record_exception=False,  # its text may hold what the caller sent
        set_status_on_exception=False,
    ) as made:
        try:
            yield
        except BaseException as exc:
            made.set_status(StatusCode.ERROR, type(exc).__name__)
            raise


@contextmanager
def span_beside(name: str, traceparent: str | None, **attributes: str | float) -> Iterator["Beside"]:
    """The same for a generator's block: the span is not this task's current one, as its caller's code runs in between."""
    parent = _context_of(traceparent)
    if parent is None:
        yield Beside(None, None)
        return
    at = trace.set_span_in_context(NonRecordingSpan(parent), context.Context())
    made = _tracer.start_span(name, at, attributes=attributes, record_exception=False, set_status_on_exception=False)
    try:
        yield Beside(_written(made.get_span_context()), made)
    except GeneratorExit:
        made.set_status(StatusCode.ERROR, "hung up")
        raise
    except BaseException as exc:
        made.set_status(StatusCode.ERROR, type(exc).__name__)
        raise
    finally:
        made.end()


@dataclass(frozen=True)
class Beside:
    """A span that is not the current one. traceparent: for what belongs to it."""

    traceparent: str | None
    _span: Span | None

    def tell(self, **attributes: str | float) -> None:
        """Sets attributes."""
        if self._span is not None:
            self._span.set_attributes(attributes)

    def contains(self, name: str, began_s: float, ended_s: float, **attributes: str | float) -> None:
        """A span below it that is over. began_s, ended_s: in seconds since 1970."""
        if self._span is not None:
            at = trace.set_span_in_context(self._span, context.Context())
            _tracer.start_span(name, at, attributes=attributes, start_time=int(began_s * 1e9)).end(int(ended_s * 1e9))


def note(event: str, **attributes: float) -> None:
    """Adds an event to the current span."""
    trace.get_current_span().add_event(event, attributes)


def enter(traceparent: str | None) -> None:
    """The rest of this task belongs to the trace. For a call that arrives from another process, which has a task of its own."""
    if (parent := _context_of(traceparent)) is not None:
        context.attach(trace.set_span_in_context(NonRecordingSpan(parent)))


def export_to(endpoint: str, service: str, share: float) -> None:
    """Sends this process's spans to an OTLP endpoint over HTTP, e.g. http://collector:4318/v1/traces, in the background.

    A collector that is away costs spans and nothing else. service: its `service.name`. share: of the traces, by their ids and
    whatever their callers' flags say. `OTEL_EXPORTER_OTLP_HEADERS` and the like are read by the exporter.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=GIVE_UP_S)
    process_with(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_S * 1000), service, share)


def process_with(processor: "SpanProcessor", service: str, share: float = 1.0) -> None:
    """Gives this process's spans to a processor. The provider is ours alone: Ray has one of its own."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanLimits, TracerProvider
    from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

    global _tracer, _stop
    resource = Resource.create({"service.name": service, "service.namespace": "reelray"})
    provider = TracerProvider(TraceIdRatioBased(share), resource, span_limits=SpanLimits(max_attribute_length=256))
    provider.add_span_processor(processor)
    _tracer, _stop = provider.get_tracer("reelray"), provider.shutdown


def stop_export() -> None:
    """Takes `export_to` back, after the last spans have been sent."""
    global _tracer, _stop
    _stop()
    _tracer, _stop = NoOpTracer(), lambda: None


def _context_of(traceparent: str | None) -> SpanContext | None:
    if not traceparent or len(traceparent) > MAX_CHARS:
        return None
    carrier: Mapping[str, str] = {"traceparent": traceparent}
    found = trace.get_current_span(_PROPAGATOR.extract(carrier, context.Context())).get_span_context()
    return found if found.is_valid else None


def _written(span_context: SpanContext) -> str:
    """In version 00, with no flag but `sampled`: whatever a caller sent, this is 55 characters of hex digits and hyphens."""
    sampled = span_context.trace_flags & TraceFlags.SAMPLED
    return f"00-{span_context.trace_id:032x}-{span_context.span_id:016x}-{sampled:02x}"
