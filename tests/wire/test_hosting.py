"""What a server or proxy in front of the app could break: sizes, paths, timing. Raw requests where the clients hide it."""

import asyncio
import json
import ssl
from urllib.parse import quote

import httpx

from deployments.files.file_store import FileStore
from deployments.jobs.store import JobStore
from tests.patience import PATIENCE_S
from tests.wire.service import ENDPOINT, LEASE_S, VIDEO

HANG_UP_S = 0.2


async def test_headers_of_16_kb_are_taken(base_url: str) -> None:
    headers = {"x-fal-runner-hint": "a" * 8_000, "x-fal-object-lifecycle-preference": json.dumps({"a": "b" * 8_300})}
    async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
        answer = await http.post(f"{base_url}/queue/{ENDPOINT}", json={"prompt": "x"}, headers=headers)
    assert answer.status_code == 200


async def test_a_body_of_63_mb_is_taken_and_one_too_large_is_told_so(base_url: str) -> None:
    image = b"data:image/png;base64," + b"A" * 63_000_000
    body = b'{"prompt": "x", "keyframe_0_index": 0, "keyframe_0_image_url": "' + image + b'"}'
    async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
        assert (await http.post(f"{base_url}/queue/{ENDPOINT}", content=body)).status_code == 200
        refused = await http.post(f"{base_url}/queue/{ENDPOINT}", content=body + b" " * 2_000_000)
    assert refused.status_code == 413
    assert "x-fal-request-id" in refused.headers


async def test_a_path_may_be_encoded(base_url: str) -> None:
    async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
        submitted = (await http.post(f"{base_url}/queue/{ENDPOINT}", json={"prompt": "x"})).json()
        request_id = submitted["request_id"]
        assert (await http.get(f"{base_url}/queue/{quote(ENDPOINT, safe='')}/requests/{request_id}/status")).status_code == 202
        target = f"https://queue.fal.run/{quote(ENDPOINT, safe='')}/requests/{request_id}/status?logs=1"
        assert (await http.get(f"{base_url}/api/fal/proxy", headers={"x-fal-target-url": target})).status_code == 202


async def test_parts_and_heads_of_a_file(base_url: str, files: FileStore) -> None:
    url = base_url + (await files.put("video.mp4", VIDEO, "video/mp4")).path
    async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
        head = await http.head(url)
        part = await http.get(url, headers={"range": "bytes=10-19"})
        again = await http.get(url, headers={"if-none-match": head.headers["etag"]})
        behind = await http.get(url, headers={"range": f"bytes={len(VIDEO)}-"})
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(VIDEO)), b"")
    assert (part.status_code, part.content) == (206, VIDEO[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(VIDEO)}"
    assert (again.status_code, behind.status_code) == (304, 416)


async def test_a_stream_tells_each_change_as_it_happens_and_ends_with_the_job(base_url: str, store: JobStore) -> None:
    async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
        submitted = (await http.post(f"{base_url}/queue/{ENDPOINT}", json={"prompt": "x"})).json()
        async with http.stream("GET", submitted["status_url"] + "/stream") as stream:
            lines = stream.aiter_lines()
            assert (await _event(lines))["status"] == "IN_QUEUE"
            claim = await store.claims.take([ENDPOINT], LEASE_S)
            assert claim is not None
            assert (await _event(lines))["status"] == "IN_PROGRESS"
            await store.claims.succeed(claim, {"video": {"url": "/files/x"}}, {"inference_time": 1.0})
            assert (await _event(lines))["status"] == "COMPLETED"
            assert [line async for line in lines if line] == []


async def test_a_caller_may_be_slow_and_ask_again_on_its_connection(base_url: str) -> None:
    reader, writer, host = await connected(base_url)
    body = b'{"prompt": "slow"}'
    writer.write(f"POST /queue/{ENDPOINT} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\n\r\n".encode())
    for i in range(len(body)):
        writer.write(body[i : i + 1])
        await writer.drain()
        await asyncio.sleep(0.01)
    for _ in range(2):
        async with asyncio.timeout(PATIENCE_S):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            [length] = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            await reader.readexactly(length)
        writer.write(f"GET /health HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
    writer.close()


async def test_a_caller_that_hangs_up_in_its_body_leaves_no_job(base_url: str, store: JobStore) -> None:
    _, writer, host = await connected(base_url)
    writer.write(f"POST /queue/{ENDPOINT} HTTP/1.1\r\nhost: {host}\r\ncontent-length: 1000\r\n\r\n{{".encode())
    await writer.drain()
    await asyncio.sleep(HANG_UP_S)
    writer.close()
    await asyncio.sleep(HANG_UP_S)
    assert await store.queued(ENDPOINT, at_most=1) == 0


async def test_a_websocket_that_is_refused_is_hung_up_on(base_url: str) -> None:
    """fal's Python client waits for that."""
    reader, writer, host = await connected(base_url)
    upgrade = (
        "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA=="
    )
    writer.write(f"GET /run/{ENDPOINT}/realtime?max_buffering=0 HTTP/1.1\r\nhost: {host}\r\n{upgrade}\r\n\r\n".encode())
    async with asyncio.timeout(PATIENCE_S):
        answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"max_buffering" in answer


async def connected(base_url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, str]:
    """A connection, and what stands in `Host`."""
    scheme, _, host = base_url.partition("://")
    name, port = host.split(":")
    reader, writer = await asyncio.open_connection(
        name, int(port), ssl=ssl.create_default_context() if scheme == "https" else None
    )
    return reader, writer, host


async def _event(lines) -> dict[str, object]:  # type: ignore[no-untyped-def]
    async for line in lines:
        if line.startswith("data: "):
            return json.loads(line.removeprefix("data: "))  # type: ignore[no-any-return]
    raise AssertionError("the stream has ended")
