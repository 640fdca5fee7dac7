"""A collector of spans on loopback, which also takes webhooks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Collected:
    """A span. service: the process that made it. parent, span_id: in hex digits."""

    service: str
    name: str
    span_id: str
    parent: str
    attributes: dict[str, str | int | float]


@dataclass
class Collector:
    """traces: trace id -> its spans. hooks: the `traceparent` of each webhook."""

    port: int
    traces: dict[str, list[Collected]] = field(default_factory=dict)
    hooks: list[str] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/traces"

    @property
    def hook_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {each.key: each.value.string_value for each in resource.resource.attributes}
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                attributes = {each.key: getattr(each.value, each.value.WhichOneof("value") or "") for each in span.attributes}
                made = Collected(names["service.name"], span.name, span.span_id.hex(), span.parent_span_id.hex(), attributes)
                self.traces.setdefault(span.trace_id.hex(), []).append(made)


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.path == "/hook":
                collector.hooks.append(self.headers["traceparent"])
            else:
                collector.take(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(server.server_port)
        Thread(target=server.serve_forever, daemon=True).start()
        yield collector
        server.shutdown()
