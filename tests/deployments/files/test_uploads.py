"""Large files in a folder and in a bucket of a real S3 server: received, put together from parts, sent to the bucket directly."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import httpx
import pytest

from deployments.files import file_store, uploads
from deployments.files.file_store import FileStore
from deployments.files.uploads import MIN_BLOCK_BYTES, assemble, direct_url, receive, take_in
from deployments.ingress.app import create_app
from deployments.jobs.store import JobStore
from deployments.settings import QuotaSettings, Settings, UploadSettings
from engines.errors import BadRequest, StorageFailed
from tests.bucket import bucket, s3_server
from tests.patience import PATIENCE_S

OPEN_S = 60.0


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(scope="module")
def bucket_url(s3_url: str) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patched, bucket(s3_url, patched) as url:
        yield url


@pytest.fixture(params=["folder", "bucket"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> FileStore:
    return FileStore(str(tmp_path / "files") if request.param == "folder" else request.getfixturevalue("bucket_url"))


async def pieces(data: bytes, step: int = 700_000) -> AsyncIterator[bytes]:
    for begin in range(0, len(data), step):
        yield data[begin : begin + step]


async def content(files: FileStore, name: str) -> bytes | None:
    size = await files.size(name)
    return None if size is None else b"".join([chunk async for chunk in files.read(name, 0, size)])


def listed(files: FileStore) -> list[str]:
    return [path for path in files.fs.find(files._root) if not path.endswith("/")]


@pytest.mark.parametrize("size", [0, 1, 3 * MIN_BLOCK_BYTES + 1])
async def test_a_body_is_stored_as_it_came(size: int, files: FileStore) -> None:
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    name = files.new_listed_name("dance.mp4", "video/mp4")
    assert await receive(files, name, pieces(data), size, OPEN_S) == hashlib.sha256(data).digest()
    assert await content(files, name) == data
    await files.delete(name)
    assert await files.size(name) is None


async def test_a_body_that_fails_leaves_nothing(files: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    name, data = files.new_listed_name("a.txt", "text/plain"), b"x" * (3 * MIN_BLOCK_BYTES)
    before = listed(files)

    async def breaks() -> AsyncIterator[bytes]:
        yield data
        raise ConnectionResetError

    async def stalls() -> AsyncIterator[bytes]:
        yield data
        await asyncio.sleep(60)

    for body, idle_s, error in (
        (pieces(data), PATIENCE_S, BadRequest),
        (stalls(), 0.2, BadRequest),
        (breaks(), PATIENCE_S, ConnectionResetError),
    ):
        monkeypatch.setattr(uploads, "IDLE_S", idle_s)
        with pytest.raises(error):
            await receive(files, name, body, 10**9, OPEN_S)
    assert listed(files) == before
    if not files.is_local:
        assert files.fs.list_multipart_uploads(files._root.partition("/")[0]) == []


@pytest.mark.parametrize("size", [100, MIN_BLOCK_BYTES], ids=["small parts", "parts that a bucket joins itself"])
async def test_parts_become_one_file_in_their_order(size: int, files: FileStore) -> None:
    name = files.new_listed_name("dance.mp4", "video/mp4")
    data = {number: bytes([number]) * (size if number < 3 else 50) for number in (1, 2, 3)}
    parts = [files.part_name(name, number) for number in data]
    for part, each in zip(parts, data.values(), strict=True):
        await receive(files, part, pieces(each), len(each), OPEN_S)
    await assemble(files, name, parts, [len(each) for each in data.values()])
    assert await content(files, name) == b"".join(data.values())
    for part in parts:
        await files.delete(part)
    assert [path for path in listed(files) if "/parts/" in path] == []
    with pytest.raises(StorageFailed):
        await assemble(files, name, parts, [size] * 3)


async def test_a_part_is_nobodys_to_fetch(files: FileStore) -> None:
    part = files.part_name(files.new_listed_name("a.txt", "text/plain"), 1)
    await receive(files, part, pieces(b"x"), 1, OPEN_S)
    assert await files.size(part) is None


async def test_half_uploads_of_killed_processes_are_ended_in_the_bucket(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = FileStore(bucket_url)
    name = files._root.partition("/")[0]
    files.fs.call_s3("create_multipart_upload", Bucket=name, Key="files/b/killed")
    files.fs.call_s3("create_multipart_upload", Bucket=name, Key="others/file")
    with monkeypatch.context() as patched:
        patched.setattr(file_store, "LEFT_IN_BUCKET_S", time.time())  # moto says that all of them began in 2010
        await files.delete_incomplete()
    assert len(files.fs.list_multipart_uploads(name)) == 2, "they may be at work"
    await files.delete_incomplete()
    assert [each["Key"] for each in files.fs.list_multipart_uploads(name)] == ["others/file"]


async def test_a_direct_url_is_for_one_file_and_type(bucket_url: str) -> None:
    files = FileStore(bucket_url)
    name = files.new_listed_name("a.png", "image/png")
    url = await direct_url(files, name, "image/png", 3, OPEN_S)
    signed = dict(pair.split("=") for pair in urlsplit(url).query.split("&"))
    assert signed["X-Amz-SignedHeaders"] == "content-length%3Bcontent-type%3Bhost"
    assert signed["X-Amz-Expires"] == "60"
    async with httpx.AsyncClient() as client:
        assert (await client.put(url, content=b"png", headers={"content-type": "image/png"})).is_success
    assert await content(files, name) == b"png"


# The service on a bucket


@pytest.fixture
def settings(tmp_path: Path, bucket_url: str) -> Settings:
    direct = UploadSettings(direct=True, max_bytes=2_000)
    return Settings(home=tmp_path, files=bucket_url, auth="keys", uploads=direct, quotas=QuotaSettings(stored_bytes=5_000))


@pytest.fixture
async def client(settings: Settings, store: JobStore) -> httpx.AsyncClient:
    headers = {"authorization": f"Key {await store.keys.create('studio')}"}
    transport = httpx.ASGITransport(app=create_app(settings, store))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost:8000", headers=headers)


@pytest.fixture
async def sql(database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


async def initiated(client: httpx.AsyncClient, storage_type: str = "fal-cdn-v3", **asked: Any) -> Any:
    described = {"content_type": "image/png", "file_name": "a.png"} | asked
    answer = await client.post(f"/rest/storage/upload/initiate?storage_type={storage_type}", json=described)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def sent(upload_url: str, data: bytes) -> None:
    async with httpx.AsyncClient() as bare:
        answer = await bare.put(upload_url, content=data, headers={"content-type": "image/png"})
        assert answer.is_success, answer.text


async def test_a_file_goes_straight_to_the_bucket_and_is_served_from_here(
    client: httpx.AsyncClient, s3_url: str, sql: asyncpg.Connection
) -> None:
    urls = await initiated(client)
    assert urls["upload_url"].startswith(s3_url)
    assert (await client.get(urls["file_url"])).status_code == 404
    await sent(urls["upload_url"], b"a picture")
    found = await client.get(urls["file_url"])
    assert (found.content, found.headers["content-type"]) == (b"a picture", "image/png")
    assert "sandbox" in found.headers["content-security-policy"]
    row = await sql.fetchrow("SELECT size_bytes, expires_at - now() AS kept FROM stored_files WHERE part_of IS NULL")
    assert row["size_bytes"] == 9, "no longer what was reserved"
    assert row["kept"] > timedelta(days=6)


async def test_the_other_ways_go_through_the_service(client: httpx.AsyncClient) -> None:
    fallback = await initiated(client, "gcs")
    assert fallback["upload_url"].startswith("http://localhost:8000/files/b/")
    assert (await client.put(fallback["upload_url"], content=b"hello")).status_code == 200
    assert (await client.get(fallback["file_url"])).content == b"hello"
    uploaded = await client.post("/files/upload", content=b"hello", headers={"content-type": "text/plain"})
    assert (await client.get(uploaded.json()["access_url"], headers={"range": "bytes=1-2"})).content == b"el"


async def test_a_direct_upload_that_is_larger_than_it_said_is_deleted(
    client: httpx.AsyncClient, settings: Settings, store: JobStore
) -> None:
    read, unread = await initiated(client), await initiated(client)
    for urls in (read, unread):
        await sent(urls["upload_url"], b"x" * 2_001)
    files = FileStore(settings.files_url)
    names = [urls["file_url"].partition("/files/")[2] for urls in (read, unread)]
    assert (await client.get(read["file_url"])).status_code == 404
    assert not files.fs.exists(files.path(files.arriving(names[0]))), "at once"
    await store.uploads.settle_direct(partial(take_in, files))
    assert not files.fs.exists(files.path(files.arriving(names[1]))), "by the next sweep, long before its time is over"
    assert [await files.size(name) for name in names] == [None, None]


async def test_a_direct_upload_does_not_change_once_it_was_taken_in(
    client: httpx.AsyncClient, settings: Settings, store: JobStore, sql: asyncpg.Connection
) -> None:
    files = FileStore(settings.files_url)
    read, swept = await initiated(client), await initiated(client)
    for urls in (read, swept):
        await sent(urls["upload_url"], b"a picture")
    answers = await asyncio.gather(*(client.get(read["file_url"]) for _ in range(4)))
    assert {answer.content for answer in answers} == {b"a picture"}
    await store.uploads.settle_direct(partial(take_in, files))
    assert await sql.fetchval("SELECT sum(size_bytes) FROM stored_files") == 18, "what is no longer reserved may be used"
    for urls in (read, swept):
        await sent(urls["upload_url"], b"x" * 100_000)
        await store.uploads.settle_direct(partial(take_in, files))
        assert (await client.get(urls["file_url"])).content == b"a picture"
    await sql.execute("UPDATE stored_files SET expires_at = now() WHERE part_of IS NOT NULL")  # the URLs are no longer good
    await store.retention.expire_files(files.delete)
    names = [urls["file_url"].partition("/files/")[2] for urls in (read, swept)]
    assert not any(files.fs.exists(files.path(files.arriving(name))) for name in names)
    assert (await client.get(read["file_url"])).content == b"a picture"


async def test_a_direct_upload_whose_taker_was_killed_is_not_lost(client: httpx.AsyncClient, settings: Settings) -> None:
    files = FileStore(settings.files_url)
    urls = await initiated(client)
    await sent(urls["upload_url"], b"a picture")
    assert await take_in(files, urls["file_url"].partition("/files/")[2], 2_000) == 9
    assert (await client.get(urls["file_url"])).content == b"a picture"


async def test_direct_uploads_count_before_they_come(client: httpx.AsyncClient) -> None:
    for _ in range(2):
        await initiated(client)  # may have 2,000 bytes each
    refused = await client.post("/rest/storage/upload/initiate?storage_type=fal-cdn-v3", json={})
    assert refused.status_code == 429
    await initiated(client, file_size=1_000)


async def test_a_direct_upload_that_nobody_reads_is_kept_and_one_that_never_came_is_not(
    client: httpx.AsyncClient, settings: Settings, store: JobStore, sql: asyncpg.Connection
) -> None:
    files = FileStore(settings.files_url)
    came, never = await initiated(client), await initiated(client)
    assert int(parse_qs(urlsplit(came["upload_url"]).query)["X-Amz-Expires"][0]) <= 3600
    await store.uploads.settle_direct(partial(take_in, files))
    await sent(came["upload_url"], b"a picture")
    await sql.execute("UPDATE stored_files SET expires_at = expires_at - interval '7201 seconds'")
    await store.retention.expire_files(files.delete)
    uploads = "SELECT count(*) FROM stored_files WHERE part_of IS NULL"
    assert await sql.fetchval(uploads) == 2, "they are looked up first"
    await store.uploads.settle_direct(partial(take_in, files))
    await store.retention.expire_files(files.delete)
    assert await sql.fetchval(uploads) == 1
    assert (await client.get(came["file_url"])).content == b"a picture"
    assert (await client.get(never["file_url"])).status_code == 404


def test_direct_uploads_need_a_bucket(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="s3://"):
        Settings(home=tmp_path, uploads=UploadSettings(direct=True))
