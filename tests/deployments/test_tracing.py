"""One trace id from a submission to its webhook, whichever way it came and whatever its caller sent."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments import tracing
from deployments.dispatch.dispatcher import Dispatcher
from deployments.files.file_store import FileStore
from deployments.hosting.logs import TraceFields
from deployments.ingress.app import create_app
from deployments.jobs.store import JobStore
from deployments.settings import FetchSettings, Settings
from deployments.webhooks.outbox import Outbox
from tests.deployments.webhooks.receiver import Received, answering, courier_of, receiving
from tests.fakes import ENDPOINT, ScriptedStages

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GIVEN = f"00-{TRACE}-{PARENT}-01"
WRITTEN = re.compile("00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]")
Running = AbstractAsyncContextManager[None]
INPUT = {"prompt": "a red ball"}
HOSTILE = {
    "empty": "",
    "words": "nonsense",
    "upper case": GIVEN.upper(),
    "no trace": f"00-{'0' * 32}-{PARENT}-01",
    "no parent": f"00-{TRACE}-{'0' * 16}-01",
    "a forbidden version": f"ff-{TRACE}-{PARENT}-01",
    "too many fields": f"{GIVEN}-more",
    "digits of another script": f"00-{TRACE.replace('0', '٠')}-{PARENT}-01",
    "two": f"{GIVEN},{GIVEN}",
    "long": f"01-{TRACE}-{PARENT}-01-{'a' * 100_000}",
    "SQL": "00-'; DROP TABLE jobs; ---01",
    "another header in it": f"{GIVEN}\r\nx-evil: 1",
}
TOLERATED = {
    "as it is written": (GIVEN, GIVEN),
    "not sampled": (GIVEN[:-1] + "0", GIVEN[:-1] + "0"),
    "flags that have no meaning yet": (GIVEN[:-2] + "ff", GIVEN),
    "a later version": (f"cc-{TRACE}-{PARENT}-01-what the future holds", GIVEN),
    "a line's end": (f"{GIVEN}\n", GIVEN),
}


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    """The spans that this process makes."""
    exporter = InMemorySpanExporter()
    tracing.process_with(SimpleSpanProcessor(exporter), "test")
    yield exporter
    tracing.stop_export()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(files=str(tmp_path / "files"), fetch=FetchSettings(allow_private=True))


@pytest.fixture
async def client(store: JobStore, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=create_app(settings, store))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_begins_another_trace(header: str):
    with tracing.span("submit", header, begins=True):
        begun = tracing.current()
    assert begun is not None
    assert WRITTEN.fullmatch(begun)
    assert TRACE not in begun
    assert tracing.current() is None


@pytest.mark.parametrize(("header", "written"), TOLERATED.values(), ids=TOLERATED)
def test_a_valid_header_is_written_anew_in_version_00(header: str, written: str):
    with tracing.span("submit", header, begins=True):
        assert tracing.current() == written


def test_without_a_trace_there_are_no_spans(spans: InMemorySpanExporter):
    with tracing.span("attempt", None):
        assert (tracing.current(), tracing.fields()) == (None, {})
    assert not spans.get_finished_spans()


def test_a_span_beside_is_not_current_and_passes_the_trace_on_with_and_without_an_exporter():
    for header, written in ((GIVEN, GIVEN), (None, None)):
        with tracing.span_beside("sample", header) as span:
            assert (span.traceparent, tracing.current()) == (written, None)
            span.tell(units=3)
            span.contains("units", 1.0, 2.0, replica="a")
    exporter = InMemorySpanExporter()
    tracing.process_with(SimpleSpanProcessor(exporter), "test")
    with suppress(ValueError), tracing.span_beside("sample", GIVEN, endpoint=ENDPOINT) as span:
        assert tracing.trace_id(span.traceparent or "") == TRACE
        span.contains("units", 1.0, 2.0, replica="a")
        raise ValueError("https://user:password@a.example")
    tracing.stop_export()
    units, sample = exporter.get_finished_spans()
    assert (units.end_time, parent_of(units)) == (2 * 10**9, id_of(sample))
    assert (parent_of(sample), sample.status.description, sample.events) == (PARENT, "ValueError", ())


def test_what_an_error_says_is_in_no_span(spans: InMemorySpanExporter):
    with suppress(ValueError), tracing.span("attempt", GIVEN):
        raise ValueError("https://user:password@a.example")
    (span,) = spans.get_finished_spans()
    assert (span.status.description, span.events) == ("ValueError", ())


async def test_every_way_of_submitting_stores_the_callers_trace(client: httpx.AsyncClient, store: JobStore, files: FileStore):
    """The fourth way, realtime, is in tests/wire/test_direct.py."""
    told = {"traceparent": GIVEN}
    async with working(store, files):
        for path in (f"/queue/{ENDPOINT}", f"/run/{ENDPOINT}", f"/run/{ENDPOINT}/stream"):
            response = await client.post(path, json=INPUT, headers=told)
            assert (response.status_code, response.headers["x-reelray-trace-id"]) == (200, TRACE), path
            job = await store.get((await store.recent(1))[0].id)
            assert job is not None
            assert job.traceparent == GIVEN


async def test_a_repeat_is_told_the_trace_of_the_job_that_it_repeats(client: httpx.AsyncClient):
    once = {"idempotency-key": "k"}
    first = await client.post(f"/queue/{ENDPOINT}", json=INPUT, headers=once)
    again = await client.post(f"/queue/{ENDPOINT}", json=INPUT, headers=once | {"traceparent": GIVEN})
    assert again.json()["request_id"] == first.json()["request_id"]
    assert again.headers["x-reelray-trace-id"] == first.headers["x-reelray-trace-id"] != TRACE


async def test_a_jobs_spans_logs_and_webhook_are_in_its_callers_trace(
    client: httpx.AsyncClient, store: JobStore, files: FileStore, settings: Settings, spans: InMemorySpanExporter
):
    in_stage: list[dict[str, str]] = []

    async def act(_: object) -> None:
        record = logging.makeLogRecord({})
        TraceFields().filter(record)
        in_stage.append({"trace_id": record.trace_id})  # type: ignore[attr-defined]

    async with receiving(answering(200)) as receiver:
        query = {"fal_webhook": receiver.url()}
        await client.post(f"/queue/{ENDPOINT}", json=INPUT, params=query, headers={"traceparent": GIVEN})
        async with working(store, files, act), delivering(store, settings):
            await receiver.arrival()
    (hook,) = receiver.received
    assert in_stage == [{"trace_id": TRACE}]
    made = {span.name: span for span in spans.get_finished_spans()}
    assert made.keys() == {"submit", "wait in the queue", "attempt", "preprocess", "denoise", "decode", "webhook"}
    assert {f"{span.context.trace_id:032x}" for span in made.values()} == {TRACE}
    assert parent_of(made["submit"]) == PARENT
    assert parent_of(made["denoise"]) == id_of(made["attempt"])
    assert {parent_of(made[name]) for name in ("wait in the queue", "attempt", "webhook")} == {id_of(made["submit"])}
    assert [event.name for event in made["attempt"].events] == ["succeeded"]
    assert traceparent_of(hook) == f"00-{TRACE}-{id_of(made['webhook'])}-01"


async def test_without_an_endpoint_for_spans_the_trace_goes_all_the_way_too(
    client: httpx.AsyncClient, store: JobStore, files: FileStore, settings: Settings
):
    async with receiving(answering(200)) as receiver:
        answer = await client.post(f"/queue/{ENDPOINT}", json=INPUT, params={"fal_webhook": receiver.url()})
        async with working(store, files), delivering(store, settings):
            await receiver.arrival()
    assert tracing.trace_id(traceparent_of(receiver.received[0])) == answer.headers["x-reelray-trace-id"]


def test_spans_are_sent_to_the_endpoint_and_one_that_is_away_costs_nothing(monkeypatch: pytest.MonkeyPatch):
    sent: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        Thread(target=collector.handle_request, daemon=True).start()
        tracing.export_to(f"http://127.0.0.1:{collector.server_port}/v1/traces", "dispatcher", 1.0)
        with tracing.span("attempt", GIVEN, endpoint=ENDPOINT):
            pass
        tracing.stop_export()
    monkeypatch.setattr(tracing, "GIVE_UP_S", 0.1)
    tracing.export_to("http://127.0.0.1:1/v1/traces", "dispatcher", 1.0)
    for _ in range(3000):  # more than it keeps
        with tracing.span("attempt", GIVEN):
            assert tracing.current() is not None
    tracing.stop_export()
    ((resource,),) = [request.resource_spans for request in sent]
    names = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert (names["service.name"], names["service.namespace"]) == ("dispatcher", "reelray")
    ((span,),) = [scope.spans for scope in resource.scope_spans]
    assert (span.trace_id.hex(), span.name) == (TRACE, "attempt")


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def working(store: JobStore, files: FileStore, act: Callable[[Any], Awaitable[None]] | None = None) -> Running:
    """A dispatcher whose denoiser calls `act`."""

    async def nothing(_: object) -> None:
        pass

    queue, retention = Settings().queue, Settings().retention
    return running(Dispatcher(store, files, {ENDPOINT: ScriptedStages(act or nothing)}, queue, retention).run())


def delivering(store: JobStore, settings: Settings) -> Running:
    """A courier."""
    return running(courier_of(Outbox(store.database), settings).run())


def id_of(span: ReadableSpan) -> str:
    return f"{span.context.span_id:016x}"


def parent_of(span: ReadableSpan) -> str:
    assert span.parent is not None
    return f"{span.parent.span_id:016x}"


def traceparent_of(request: Received) -> str:
    return request.headers["traceparent"]
