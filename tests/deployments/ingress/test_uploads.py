"""Uploads in this process: every way in, what binds them, who may read them, and what becomes of those that nobody finishes."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import httpx
import pytest

from deployments.dispatch.dispatcher import Dispatcher
from deployments.files import uploads
from deployments.files.file_store import FileStore
from deployments.ingress.app import create_app
from deployments.jobs.job import Claim
from deployments.jobs.store import JobStore
from deployments.schemas.inputs import KEPT
from deployments.settings import FetchSettings, QuotaSettings, Settings, UploadSettings
from engines.errors import StorageFailed
from tests.patience import PATIENCE_S

ENDPOINT = "fal-ai/animatediff-sparsectrl-lcm"
SUBMIT = f"/queue/{ENDPOINT}"
DATA = bytes(range(256)) * 40
HIDDEN = {"x-fal-object-lifecycle": json.dumps({"initial_acl": {"default": "hide"}})}
FORBIDDEN = {"x-fal-object-lifecycle": json.dumps({"initial_acl": {"default": "forbid"}})}
PNG = {"content_type": "image/png", "file_name": "a cat.png"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        home=tmp_path,
        auth="keys",
        quotas=QuotaSettings(stored_bytes=100_000),
        uploads=UploadSettings(max_bytes=50_000),
        fetch=FetchSettings(max_bytes=20_000),
    )


class Callers:
    """Callers of one app, each with a key of its own."""

    def __init__(self, settings: Settings, store: JobStore):
        self.settings, self.store, self.app = settings, store, create_app(settings, store)
        self.files = FileStore(settings.files_url)

    def calling(self, base_url: str = "http://localhost:8000", **headers: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(app=self.app), base_url=base_url, headers=headers)

    async def key(self, **scopes: Any) -> httpx.AsyncClient:
        return self.calling(authorization=f"Key {await self.store.keys.create('studio', **scopes)}")


@pytest.fixture
def callers(settings: Settings, store: JobStore) -> Callers:
    return Callers(settings, store)


@pytest.fixture
def stranger(callers: Callers) -> httpx.AsyncClient:
    return callers.calling()


@pytest.fixture
async def mine(callers: Callers) -> httpx.AsyncClient:
    return await callers.key()


@pytest.fixture
async def sql(database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


def key_id(client: httpx.AsyncClient) -> str:
    return client.headers["authorization"].removeprefix("Key ").partition(":")[0]


async def initiated(
    client: httpx.AsyncClient, form: str = "initiate", headers: dict[str, str] | None = None, **asked: Any
) -> Any:
    answer = await client.post(f"/rest/storage/upload/{form}?storage_type=fal-cdn-v3", json=PNG | asked, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def uploaded(client: httpx.AsyncClient, data: bytes = DATA, headers: dict[str, str] | None = None, **asked: Any) -> str:
    """The URL of a file that the client has uploaded as fal's JavaScript client does."""
    urls = await initiated(client, headers=headers, **asked)
    answer = await client.put(urls["upload_url"], content=data, headers={"content-type": (PNG | asked)["content_type"]})
    assert answer.status_code == 200, answer.text
    return str(urls["file_url"])


async def cdn(client: httpx.AsyncClient) -> dict[str, str]:
    """The header of a client that has a token for the CDN."""
    answer = (await client.post("/rest/storage/auth/token?storage_type=fal-cdn-v3", json={})).json()
    return {"authorization": f"{answer['token_type']} {answer['token']}"}


def with_part(url: str, part: object) -> str:
    parts = urlsplit(url)
    return parts._replace(path=f"{parts.path}/{part}").geturl()


def stored(settings: Settings) -> list[str]:
    folder = Path(settings.files_url)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# The ways in


async def test_a_file_is_read_back_as_it_was_sent(mine: httpx.AsyncClient, stranger: httpx.AsyncClient) -> None:
    urls = await initiated(mine)
    assert urls["upload_url"].startswith(urls["file_url"] + "?")
    assert (await stranger.get(urls["file_url"])).status_code == 404, "nothing is there yet"
    sent = await stranger.put(urls["upload_url"], content=DATA, headers={"content-type": "image/png"})
    assert (sent.status_code, sent.json()) == (200, {})
    found = await stranger.get(urls["file_url"])
    assert (found.content, found.headers["content-type"]) == (DATA, "image/png")
    assert found.headers["content-disposition"] == 'inline; filename="a-cat.png"'


async def test_a_file_in_parts_as_the_javascript_client_sends_it(
    mine: httpx.AsyncClient, stranger: httpx.AsyncClient, settings: Settings, callers: Callers
) -> None:
    urls = await initiated(mine, "initiate-multipart", content_type="video/mp4", file_name="dance.mp4")
    pieces = [DATA[:4000], DATA[4000:9000], DATA[9000:]]
    answers = [await stranger.put(with_part(urls["upload_url"], i + 1), content=piece) for i, piece in enumerate(pieces)]
    again = await stranger.put(with_part(urls["upload_url"], 2), content=pieces[1])
    parts = [answer.json() for answer in answers]
    assert again.json() == parts[1]
    assert [part["partNumber"] for part in parts] == [1, 2, 3]
    assert (await stranger.get(urls["file_url"])).status_code == 404
    for _ in range(2):  # the second time its answer was lost
        done = await stranger.post(with_part(urls["upload_url"], "complete"), json={"parts": parts})
        assert done.status_code == 200, done.text
    assert (await stranger.get(urls["file_url"])).content == DATA
    await callers.store.retention.expire_files(callers.files.delete)
    assert len(stored(settings)) == 1, "the parts are gone"
    assert (await callers.store.keys.usage(key_id(mine), at_most=1)).stored_bytes == len(DATA)


async def test_a_file_with_a_token_for_the_cdn(mine: httpx.AsyncClient, stranger: httpx.AsyncClient) -> None:
    headers = await cdn(mine) | {"content-type": "text/plain; charset=utf-8", "x-fal-file-name": "notes.v2.txt"}
    for path in ("/cdn/files/upload", "/files/upload"):
        url = (await stranger.post(path, content=b"a note", headers=headers)).json()["access_url"]
        found = await stranger.get(url)
        assert (found.content, found.headers["content-type"]) == (b"a note", "text/plain; charset=utf-8")
        assert found.headers["content-disposition"] == 'attachment; filename="notes-v2.txt"'
        assert (await stranger.get(url.replace("/files/", "/cdn/files/"))).content == b"a note"


async def test_a_file_in_parts_as_the_python_client_sends_it(mine: httpx.AsyncClient, stranger: httpx.AsyncClient) -> None:
    token = (await mine.post("/rest/storage/auth/token", json={})).json()
    assert datetime.fromisoformat(token["expires_at"]) - datetime.now().astimezone() > timedelta(minutes=50)
    headers = {"authorization": f"{token['token_type']} {token['token']}"}
    described = {"content-type": "video/mp4", "x-fal-file-name": "dance.mp4"}
    begun = (await stranger.post(f"{token['base_url']}/files/upload/multipart", headers=headers | described)).json()
    url, upload_id = begun["access_url"], begun["uploadId"]
    pieces = {2: DATA[6000:], 1: DATA[:6000]}
    parts = []
    for number, piece in pieces.items():
        answer = await stranger.put(f"{url}/multipart/{upload_id}/{number}", content=piece, headers=headers | described)
        parts.append({"partNumber": number, "etag": answer.headers["etag"]})  # with its quotes, in the order of completion
    assert (await stranger.put(f"{url}/multipart/{upload_id}/3", content=b"x")).status_code == 401
    done = await stranger.post(f"{url}/multipart/{upload_id}/complete", json={"parts": parts}, headers=headers)
    assert done.status_code == 200
    assert (await stranger.get(url)).content == DATA


@pytest.mark.parametrize(
    ("host", "target", "base"),
    [
        ("rest.fal.ai", None, "http://v3.fal.media"),
        ("rest.alpha.fal.ai", None, "http://v3.fal.media"),
        ("rest.fal.ai:8443", None, "http://v3.fal.media:8443"),
        ("localhost:8000", "https://rest.fal.ai", "http://localhost:8000"),
        ("localhost:8000", "https://rest.alpha.fal.ai", "http://localhost:8000"),
    ],
)
async def test_fals_hosts_lead_to_the_same_files(
    host: str, target: str | None, base: str, callers: Callers, mine: httpx.AsyncClient
) -> None:
    async def rest(path: str, **asked: Any) -> Any:
        if target is None:
            return (await mine.post(f"http://{host}{path}", json=asked)).json()
        return (await mine.post("/api/fal/proxy", json=asked, headers={"x-fal-target-url": target + path})).json()

    urls = await rest("/storage/upload/initiate?storage_type=fal-cdn-v3", **PNG)
    token = await rest("/storage/auth/token?storage_type=fal-cdn-v3")
    assert urls["file_url"].startswith(f"{base}/files/b/")
    assert token["base_url"] == base
    assert (await mine.put(urls["upload_url"], content=DATA)).status_code == 200
    assert (await mine.get(urls["file_url"])).content == DATA
    headers = {"authorization": f"Bearer {token['token']}"}
    url = (await callers.calling().post("http://v3.fal.media/files/upload", content=DATA, headers=headers)).json()["access_url"]
    assert (await callers.calling().get(url)).content == DATA


async def test_public_url_is_before_every_upload_url(settings: Settings, store: JobStore) -> None:
    callers = Callers(settings.model_copy(update={"public_url": "https://video.example/api"}), store)
    urls = await initiated(await callers.key())
    assert all(url.startswith("https://video.example/api/files/b/") for url in urls.values())


async def test_an_open_service_takes_uploads_from_anybody(settings: Settings, store: JobStore) -> None:
    first, second = (Callers(settings.model_copy(update={"auth": "open"}), store) for _ in range(2))  # two gateways
    urls = await initiated(first.calling())
    assert (await second.calling().put(urls["upload_url"], content=DATA)).status_code == 200
    assert (await first.calling().get(urls["file_url"])).content == DATA
    headers = await cdn(first.calling())
    assert (await second.calling().post("/files/upload", content=DATA, headers=headers)).status_code == 200
    closed = Callers(settings, store)
    urls = await initiated(first.calling())
    assert (await closed.calling().put(urls["upload_url"], content=DATA)).status_code == 403, "its URLs end with it"
    assert (await closed.calling().post("/files/upload", content=DATA, headers=headers)).status_code == 401


async def test_an_upload_that_is_sent_again_is_the_same_and_another_is_refused(
    mine: httpx.AsyncClient, settings: Settings
) -> None:
    urls = await initiated(mine)
    for data, status in ((DATA, 200), (DATA, 200), (DATA[1:], 403), (b"", 403), (DATA, 200)):
        assert (await mine.put(urls["upload_url"], content=data)).status_code == status
    assert (await mine.get(urls["file_url"])).content == DATA
    assert len(stored(settings)) == 1


async def test_of_several_bodies_that_come_at_once_one_wins(mine: httpx.AsyncClient, settings: Settings) -> None:
    urls = await initiated(mine)
    bodies = [bytes([number]) * 30_000 for number in range(6)]
    answers = await asyncio.gather(*(mine.put(urls["upload_url"], content=body) for body in bodies))
    assert sorted(answer.status_code for answer in answers) == [200, *[403] * 5]
    [winner] = [body for body, answer in zip(bodies, answers, strict=True) if answer.status_code == 200]
    assert (await mine.get(urls["file_url"])).content == winner
    assert len(stored(settings)) == 1


async def test_an_upload_whose_process_was_killed_before_its_file_was_there_can_be_sent_again(
    mine: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = await initiated(mine)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", full)  # fails after it was listed as complete
        assert (await mine.put(urls["upload_url"], content=DATA)).status_code == StorageFailed.status
    assert (await mine.get(urls["file_url"])).status_code == 404
    assert (await mine.put(urls["upload_url"], content=DATA[1:])).status_code == 403
    assert (await mine.put(urls["upload_url"], content=DATA)).status_code == 200
    assert (await mine.get(urls["file_url"])).content == DATA


async def test_an_empty_file_is_a_file(mine: httpx.AsyncClient) -> None:
    url = await uploaded(mine, b"")
    found = await mine.get(url)
    assert (found.status_code, found.content) == (200, b"")
    assert (await mine.get(url, headers={"range": "bytes=0-"})).status_code == 416


async def test_pages_of_any_origin_may_upload_with_their_url(mine: httpx.AsyncClient, stranger: httpx.AsyncClient) -> None:
    page = {"origin": "https://studio.example"}
    asks = {"access-control-request-method": "PUT", "access-control-request-headers": "content-type"}
    urls = await initiated(mine, headers=page)
    assert (await stranger.options(urls["upload_url"], headers=page | asks)).status_code == 200
    sent = await stranger.put(urls["upload_url"], content=DATA, headers=page | {"content-type": "image/png"})
    assert sent.headers["access-control-allow-origin"] == "*"
    assert "etag" in sent.headers["access-control-expose-headers"]


# What binds an upload


async def test_an_upload_has_the_type_and_the_size_that_it_was_asked_for(mine: httpx.AsyncClient) -> None:
    exact = await initiated(mine, file_size=100)
    for data, content_type, status in (
        (b"x" * 100, "text/html", 403),
        (b"x" * 101, "image/png", 413),
        (b"x" * 99, "image/png", 403),
        (b"x" * 100, "IMAGE/PNG", 200),
    ):
        answer = await mine.put(exact["upload_url"], content=data, headers={"content-type": content_type})
        assert answer.status_code == status, answer.text
    parts = await initiated(mine, "initiate-multipart", file_size=10)
    part = (await mine.put(with_part(parts["upload_url"], 1), content=b"x" * 9)).json()
    assert (await mine.put(with_part(parts["upload_url"], 2), content=b"x" * 9)).status_code == 403
    done = await mine.post(with_part(parts["upload_url"], "complete"), json={"parts": [part]})
    assert done.status_code == 403
    assert (await mine.get(parts["file_url"])).status_code == 404


async def test_no_file_is_larger_than_the_service_takes(mine: httpx.AsyncClient, settings: Settings) -> None:
    most = settings.uploads.max_bytes
    assert (await mine.post("/rest/storage/upload/initiate", json=PNG | {"file_size": most + 1})).status_code == 413
    urls = await initiated(mine)
    assert (await mine.put(urls["upload_url"], content=b"x" * (most + 1))).status_code == 413
    headers = await cdn(mine)
    assert (await mine.post("/files/upload", content=b"x" * (most + 1), headers=headers)).status_code == 413
    parts = await initiated(mine, "initiate-multipart")
    for number, status in ((1, 200), (1, 200), (2, 403)):
        assert (await mine.put(with_part(parts["upload_url"], number), content=b"x" * 30_000)).status_code == status
    assert (await mine.put(with_part(parts["upload_url"], 2), content=b"x" * 20_000)).status_code == 200


async def test_a_body_of_unknown_length_is_refused_before_it_is_read(mine: httpx.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        raise AssertionError("nothing is to be read")
        yield b""

    urls = await initiated(mine)
    parts = await initiated(mine, "initiate-multipart")
    for method, url in (("PUT", urls["upload_url"]), ("PUT", with_part(parts["upload_url"], 1)), ("POST", "/files/upload")):
        assert (await mine.request(method, url, content=endless(), headers=await cdn(mine))).status_code == 411


async def test_a_body_that_breaks_off_or_crawls_leaves_nothing(
    mine: httpx.AsyncClient, settings: Settings, monkeypatch: pytest.MonkeyPatch, callers: Callers
) -> None:
    monkeypatch.setattr(uploads, "IDLE_S", 0.2)
    monkeypatch.setattr(uploads, "PIECE_BYTES", 100)
    parts = await initiated(mine, "initiate-multipart")
    urls = await initiated(mine)

    async def short() -> AsyncIterator[bytes]:
        yield b"x" * 500

    async def stalls() -> AsyncIterator[bytes]:
        yield b"x" * 500
        await asyncio.sleep(60)

    async def crawls() -> AsyncIterator[bytes]:
        for _ in range(10_000):
            yield b"x"
            await asyncio.sleep(0.02)

    for body in (short, stalls, crawls):
        for url in (urls["upload_url"], with_part(parts["upload_url"], 1)):
            answer = await mine.put(url, content=body(), headers={"content-length": "10000", "content-type": "image/png"})
            assert (answer.status_code, answer.json()["error_type"]) == (400, "bad_request")
    assert stored(settings) == []
    assert (await callers.store.keys.usage(key_id(mine), at_most=1)).stored_bytes == 0, "nothing stays reserved"
    monkeypatch.setattr(uploads, "IDLE_S", PATIENCE_S)
    assert (await mine.put(urls["upload_url"], content=DATA)).status_code == 200


async def test_a_caller_that_goes_away_leaves_nothing(mine: httpx.AsyncClient, settings: Settings) -> None:
    urls, asked_for_more = await initiated(mine), asyncio.Event()

    async def stalls() -> AsyncIterator[bytes]:
        yield b"x" * 2_000
        asked_for_more.set()
        await asyncio.sleep(60)

    sending = asyncio.create_task(mine.put(urls["upload_url"], content=stalls(), headers={"content-length": "10000"}))
    await asked_for_more.wait()
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    assert stored(settings) == []


def full(*_: object, **__: object) -> Any:
    raise OSError("no space left")


async def test_a_full_disk_is_told_and_leaves_nothing_reserved(
    mine: httpx.AsyncClient, callers: Callers, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = await initiated(mine)
    with monkeypatch.context() as patched:
        patched.setattr(uploads._Writing, "write", full)
        assert (await mine.put(urls["upload_url"], content=DATA)).status_code == StorageFailed.status
    assert stored(settings) == []
    assert (await callers.store.keys.usage(key_id(mine), at_most=1)).stored_bytes == 0
    assert (await mine.put(urls["upload_url"], content=DATA)).status_code == 200


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([], 422),
        ([{"partNumber": 1}], 422),
        ([{"partNumber": 0, "etag": "{1}"}], 422),
        ([{"partNumber": "1", "etag": "{1}"}], 422),
        ([{"partNumber": 10_001, "etag": "{1}"}], 422),
        ([{"partNumber": 3, "etag": "{1}"}], 400),
        ([{"partNumber": 1, "etag": "{2}"}], 400),
        ([{"partNumber": 1, "etag": ""}], 400),
        ([{"partNumber": 1, "etag": "{1}"}, {"partNumber": 1, "etag": "{1}"}], 400),
        ([{"partNumber": 2, "etag": "{2}"}, {"partNumber": 1, "etag": '"{1}"'}], 200),
    ],
    ids=range(10),
)
async def test_a_file_is_made_of_the_parts_that_were_sent(
    parts: list[dict[str, Any]], status: int, mine: httpx.AsyncClient
) -> None:
    urls = await initiated(mine, "initiate-multipart")
    etags = [(await mine.put(with_part(urls["upload_url"], n), content=f"part {n} ".encode())).json()["etag"] for n in (1, 2)]
    text = json.dumps({"parts": parts}).replace("{1}", etags[0]).replace("{2}", etags[1])
    done = await mine.post(with_part(urls["upload_url"], "complete"), content=text)
    assert done.status_code == status, done.text
    found = await mine.get(urls["file_url"])
    assert (found.status_code, found.content) == (200, b"part 1 part 2 ") if status == 200 else found.status_code == 404


async def test_of_several_lists_of_parts_that_come_at_once_one_wins(
    mine: httpx.AsyncClient, callers: Callers, settings: Settings, store: JobStore
) -> None:
    other = Callers(settings, store).calling()  # another process, as it were
    bodies = {n: bytes([n]) * 500 for n in (1, 2, 3)}
    lists = [(1, 2), (2, 3), (3,), (1, 2, 3), (1, 2)]
    seen = set[tuple[int, ...]]()
    for _ in range(25):
        urls = await initiated(mine, "initiate-multipart")
        etags = {n: (await mine.put(with_part(urls["upload_url"], n), content=body)).json()["etag"] for n, body in bodies.items()}
        complete = with_part(urls["upload_url"], "complete")
        calls = [
            client.post(complete, json={"parts": [{"partNumber": n, "etag": etags[n]} for n in numbers]})
            for client, numbers in zip((mine, other, mine, other, other), lists, strict=True)
        ]
        replaced = mine.put(with_part(urls["upload_url"], 2), content=b"other bytes")
        *answers, late = await asyncio.gather(*calls, replaced)
        won = {numbers for numbers, answer in zip(lists, answers, strict=True) if answer.status_code == 200}
        assert {answer.status_code for answer in answers} <= {200, 403, 400}
        if late.status_code == 200:  # it came before them all, so the lists with part 2 name one that is not there
            assert won == {(3,)}
        [winner] = won
        content = (await other.get(urls["file_url"])).content
        assert content == b"".join(bodies[n] for n in winner)
        seen.add(winner)
    await store.retention.expire_files(callers.files.delete)
    assert not [name for name in stored(settings) if "parts" in name]
    assert len(seen) > 1, "not always the same one"


async def test_a_file_in_parts_whose_process_was_killed_before_it_was_there_can_be_completed_again(
    mine: httpx.AsyncClient, callers: Callers, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = await initiated(mine, "initiate-multipart")
    parts = [(await mine.put(with_part(urls["upload_url"], n), content=DATA[n:])).json() for n in (1, 2)]
    complete = with_part(urls["upload_url"], "complete")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", full)
        assert (await mine.post(complete, json={"parts": parts})).status_code == StorageFailed.status
    await callers.store.retention.expire_files(callers.files.delete)
    assert (await mine.get(urls["file_url"])).status_code == 404
    assert (await mine.post(complete, json={"parts": parts[:1]})).status_code == 403
    assert (await mine.put(with_part(urls["upload_url"], 1), content=DATA)).status_code == 403
    assert (await mine.post(complete, json={"parts": parts})).status_code == 200
    assert (await mine.get(urls["file_url"])).content == DATA[1:] + DATA[2:]
    assert (await callers.store.keys.usage(key_id(mine), at_most=1)).stored_bytes == 2 * len(DATA) - 3


async def test_upload_urls_and_tokens_end_with_their_key_and_in_time(
    mine: httpx.AsyncClient, callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls, headers, now = await initiated(mine), await cdn(mine), time.time()
    with monkeypatch.context() as later:
        later.setattr(time, "time", lambda: now + callers.settings.uploads.open_s + 1)
        assert (await mine.put(urls["upload_url"], content=DATA)).status_code == 403
        assert (await callers.calling().post("/files/upload", content=DATA, headers=headers)).status_code == 401
    await callers.store.keys.revoke(key_id(mine))
    assert (await mine.put(urls["upload_url"], content=DATA)).status_code == 403
    assert (await callers.calling().post("/files/upload", content=DATA, headers=headers)).status_code == 401


async def test_uploading_needs_the_scope_submit(callers: Callers) -> None:
    reader = await callers.key(scopes=["read"])
    for path in ("/rest/storage/upload/initiate", "/rest/storage/upload/initiate-multipart", "/rest/storage/auth/token"):
        assert (await reader.post(path, json=PNG)).status_code == 403
        assert (await callers.calling().post(path, json=PNG)).status_code == 401
    assert (await reader.post("/files/upload", content=DATA)).status_code == 403


async def test_a_key_has_so_many_bytes_of_uploads(mine: httpx.AsyncClient, callers: Callers, sql: asyncpg.Connection) -> None:
    first = await uploaded(mine, b"x" * 45_000)
    urls, more = await initiated(mine), await initiated(mine, "initiate-multipart")
    assert (await mine.put(with_part(more["upload_url"], 1), content=b"x" * 40_000)).status_code == 200
    refused = await mine.put(urls["upload_url"], content=b"x" * 20_000)
    assert (refused.status_code, refused.json()["error_type"]) == (429, "too_many_requests")
    assert (await mine.post("/rest/storage/upload/initiate", json=PNG | {"file_size": 20_000})).status_code == 429
    other = await callers.key()
    assert await uploaded(other, b"x" * 45_000)
    await sql.execute("UPDATE stored_files SET expires_at = now() WHERE name = $1", first.partition("/files/")[2])
    await callers.store.retention.expire_files(callers.files.delete)
    assert (await mine.put(urls["upload_url"], content=b"x" * 20_000)).status_code == 200


async def test_uploads_that_come_at_once_do_not_exceed_the_quota_together(mine: httpx.AsyncClient, callers: Callers) -> None:
    urls = [await initiated(mine) for _ in range(6)]
    answers = await asyncio.gather(*(mine.put(each["upload_url"], content=b"x" * 40_000) for each in urls))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429, 429]


async def test_a_key_has_so_many_uploads_in_hand(settings: Settings, store: JobStore) -> None:
    callers = Callers(settings.model_copy(update={"quotas": QuotaSettings(open_uploads=1)}), store)
    mine, other = await callers.key(), await callers.key()
    urls, begun, go_on = [await initiated(each) for each in (mine, mine, other)], asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield DATA[:100]
        begun.set()
        await go_on.wait()
        yield DATA[100:]

    sending = asyncio.create_task(mine.put(urls[0]["upload_url"], content=slow(), headers={"content-length": str(len(DATA))}))
    await begun.wait()
    assert (await mine.put(urls[1]["upload_url"], content=DATA)).status_code == 429
    assert (await other.put(urls[2]["upload_url"], content=DATA)).status_code == 200
    go_on.set()
    assert (await sending).status_code == 200
    assert (await mine.put(urls[1]["upload_url"], content=DATA)).status_code == 200


# Expiry


@pytest.mark.parametrize("header", ["X-Fal-Object-Lifecycle", "X-Fal-Object-Lifecycle-Preference"])
async def test_a_file_expires_when_its_caller_wants(
    header: str, mine: httpx.AsyncClient, callers: Callers, sql: asyncpg.Connection, settings: Settings
) -> None:
    url = await uploaded(mine, headers={header: json.dumps({"expiration_duration_seconds": 60})})
    answer = await mine.get(url)
    assert 50 <= int(answer.headers["cache-control"].removeprefix("public, max-age=").removesuffix(", immutable")) <= 60
    await sql.execute("UPDATE stored_files SET expires_at = expires_at - interval '61 seconds'")
    assert (await mine.get(url)).status_code == 404, "even if it is not deleted yet"
    await callers.store.retention.expire_files(callers.files.delete)
    assert (stored(settings), await sql.fetchval("SELECT count(*) FROM stored_files")) == ([], 0)


async def test_a_file_without_a_wish_is_kept_as_the_settings_say(
    mine: httpx.AsyncClient, sql: asyncpg.Connection, settings: Settings, store: JobStore
) -> None:
    await uploaded(mine)
    kept = await sql.fetchval("SELECT expires_at - now() FROM stored_files")
    assert timedelta(days=6.99) < kept <= timedelta(days=7)
    for_ever = Callers(settings.model_copy(update={"retention": settings.retention.model_copy(update={"files_s": None})}), store)
    answer = await for_ever.calling().get(await uploaded(await for_ever.key()))
    assert answer.headers["cache-control"] == "public, max-age=3600, immutable"


async def test_uploads_that_nobody_finishes_are_swept_with_their_parts(
    mine: httpx.AsyncClient, callers: Callers, sql: asyncpg.Connection, settings: Settings
) -> None:
    await initiated(mine)
    parts = await initiated(mine, "initiate-multipart")
    part = (await mine.put(with_part(parts["upload_url"], 1), content=DATA)).json()
    assert len(stored(settings)) == 1
    await callers.store.retention.expire_files(callers.files.delete)
    assert len(stored(settings)) == 1, "their time is not over"
    await sql.execute("UPDATE stored_files SET expires_at = now() - interval '1 second'")
    done = await mine.post(with_part(parts["upload_url"], "complete"), json={"parts": [part]})
    assert done.status_code == 403
    await callers.store.retention.expire_files(callers.files.delete)
    assert (stored(settings), await sql.fetchval("SELECT count(*) FROM stored_files")) == ([], 0)


async def test_an_upload_whose_time_is_over_when_its_last_byte_comes_is_not_kept(
    mine: httpx.AsyncClient, sql: asyncpg.Connection, settings: Settings
) -> None:
    urls, parts = await initiated(mine), await initiated(mine, "initiate-multipart")

    async def late() -> AsyncIterator[bytes]:
        await sql.execute("UPDATE stored_files SET expires_at = now()")
        yield DATA

    for url in (urls["upload_url"], with_part(parts["upload_url"], 1)):
        await sql.execute("UPDATE stored_files SET expires_at = now() + interval '1 hour'")
        assert (await mine.put(url, content=late(), headers={"content-length": str(len(DATA))})).status_code == 403
    assert stored(settings) == []


# Who may read a file


@pytest.mark.parametrize(("headers", "status"), [(HIDDEN, 404), (FORBIDDEN, 403)])
async def test_a_hidden_file_is_as_if_absent_and_a_forbidden_one_is_refused(
    headers: dict[str, str], status: int, mine: httpx.AsyncClient, stranger: httpx.AsyncClient, callers: Callers
) -> None:
    url = await uploaded(mine, headers=headers)
    found = await mine.get(url)
    assert (found.content, found.headers["cache-control"]) == (DATA, "private, no-store")
    assert (await (await callers.key(scopes=["admin"])).get(url)).content == DATA
    absent = await stranger.get(url.replace("/b/", f"/b/{'0' * 32}/").replace(urlsplit(url).path.split("/")[3] + "/", ""))
    refused = [
        await stranger.get(url),
        await (await callers.key()).get(url),
        await stranger.get(url, headers={"authorization": "Key x"}),
    ]
    refused += [
        await stranger.get(url, headers={"range": "bytes=0-1"}),
        await callers.calling().get(url, headers={"if-none-match": "*"}),
    ]
    refused.append(await (await callers.key(scopes=["submit"])).get(url))
    assert {answer.status_code for answer in refused} == {status}
    assert (await stranger.head(url)).status_code == status
    if status == 404:
        assert {answer.text for answer in refused} == {absent.text}
    await callers.store.keys.revoke(key_id(mine))
    assert (await mine.get(url)).status_code == status


async def test_a_rule_is_for_the_id_of_a_key(mine: httpx.AsyncClient, stranger: httpx.AsyncClient, callers: Callers) -> None:
    friend, foe = await callers.key(), await callers.key()
    rules = [{"user": key_id(friend), "decision": "allow"}, {"user": key_id(foe), "decision": "hide"}]
    headers = {"x-fal-object-lifecycle": json.dumps({"initial_acl": {"default": "forbid", "rules": rules}})}
    url = await uploaded(mine, headers=headers)
    for reader, status in ((mine, 200), (friend, 200), (foe, 404), (stranger, 403), (await callers.key(), 403)):
        assert (await reader.get(url)).status_code == status


async def test_nobody_reads_a_restricted_file_of_an_open_service_but_its_jobs(settings: Settings, store: JobStore) -> None:
    callers = Callers(settings.model_copy(update={"auth": "open"}), store)
    url = await uploaded(callers.calling(), headers=HIDDEN)
    assert (await callers.calling().get(url)).status_code == 404
    assert (await submit(callers.calling(), url)).status_code == 200


@pytest.mark.parametrize(
    "value",
    [
        "{",
        "[]",
        '{"initial_acl": []}',
        '{"initial_acl": {"default": "deny"}}',
        '{"initial_acl": {"default": "hide", "users": ["a"]}}',
        '{"initial_acl": {"rules": [{"user": "a"}]}}',
        '{"initial_acl": {"rules": [{"user": "", "decision": "allow"}]}}',
        '{"expiration_duration_seconds": -1}',
        "[" * 5000,
    ],
)
async def test_a_lifecycle_that_is_none_is_told(value: str, mine: httpx.AsyncClient) -> None:
    for path in ("/rest/storage/upload/initiate", "/files/upload"):
        answer = await mine.post(path, json=PNG, headers={"x-fal-object-lifecycle": value})
        assert (answer.status_code, answer.json()["error_type"]) == (400, "bad_request")


@pytest.mark.parametrize(("access", "status"), [("hide", 404), ("forbid", 403)])
async def test_the_files_of_a_job_have_its_access_rules(
    access: str, status: int, mine: httpx.AsyncClient, stranger: httpx.AsyncClient, callers: Callers, sql: asyncpg.Connection
) -> None:
    wish = {"expiration_duration_seconds": 3600, "initial_acl": {"default": access}}
    headers = {"x-fal-object-lifecycle-preference": json.dumps(wish)}
    links = (await mine.post(SUBMIT, json={"prompt": "a"}, headers=headers)).json()
    result = await rendered(callers, links["request_id"])
    assert (await mine.get(links["response_url"])).json()["video"]["url"].endswith(result)
    assert (await mine.get(result)).content == b"an mp4"
    assert (await mine.get(result)).headers["content-type"] == "video/mp4"
    assert {(await reader.get(result)).status_code for reader in (stranger, await callers.key())} == {status}
    kept = await sql.fetchval("SELECT expires_at - now() FROM stored_files WHERE name LIKE 'b/%'")
    assert timedelta(minutes=59) < kept <= timedelta(hours=1)


async def rendered(callers: Callers, request_id: str) -> str:
    """Ends a job as the dispatcher does; returns its file's path."""
    settings, store = callers.settings, callers.store
    dispatcher = Dispatcher(store, callers.files, {}, settings.queue, settings.retention)
    claim = await store.claims.take([ENDPOINT], 30.0)
    assert isinstance(claim, Claim)
    assert claim.job_id == UUID(request_id)
    kept = await dispatcher.keep_file(claim, b"an mp4")
    video = {"url": kept.path, "content_type": "video/mp4", "file_name": "video.mp4", "file_size": kept.size}
    await store.claims.succeed(claim, {"video": video, "seed": 1}, {})
    return kept.path


# Files of ours in an input


def submit(client: httpx.AsyncClient, url: str, **headers: str) -> Any:
    body = {"prompt": "a", "keyframe_0_image_url": url, "keyframe_0_index": 0}
    return client.post(SUBMIT, json=body, headers=headers)


@pytest.mark.parametrize(
    "form",
    [
        "{url}",
        "http://v3.fal.media/{path}",
        "https://v3.fal.media/{path}?x=1#y",
        "http://localhost:8000/cdn/{path}",
        "https://video.example/{path}",
        "http://127.0.0.1:9/{path}",
        "HTTPS://user@LOCALHOST:8000/{path}",
        "http://localhost:8000/files/b%2F{rest}",
    ],
)
async def test_a_file_of_ours_is_read_from_the_store_by_any_of_our_names(
    form: str, callers: Callers, mine: httpx.AsyncClient, sql: asyncpg.Connection
) -> None:
    url = await uploaded(mine)
    path = urlsplit(url).path.lstrip("/")
    asked = form.format(url=url, path=path, rest=path.removeprefix("files/b/"))
    assert (await submit(mine, asked)).status_code == 200
    job_input = json.loads(await sql.fetchval("SELECT input::text FROM jobs"))
    assert job_input["keyframe_0_image_url"] == KEPT + path.removeprefix("files/")
    assert await sql.fetchval("SELECT input_files FROM jobs") == [], "it does not end with the job"


async def test_what_a_job_made_can_be_the_input_of_another(callers: Callers, mine: httpx.AsyncClient) -> None:
    made = await callers.files.put("video.mp4", b"x", "video/mp4")
    media = {"image_url": f"http://localhost:8000{made.path}", "video_url": f"https://v3.fal.media{made.path}"}
    assert (await mine.post("/queue/fal-ai/controlnext", json=media)).status_code == 200
    claim = await callers.store.claims.take(["fal-ai/controlnext"], 30.0)
    assert claim is not None
    assert claim.input["image_url"] == claim.input["video_url"] == KEPT + made.path.removeprefix("/files/")


@pytest.mark.parametrize("access", [HIDDEN, FORBIDDEN])
async def test_the_access_rules_hold_for_inputs(access: dict[str, str], callers: Callers, mine: httpx.AsyncClient) -> None:
    url = await uploaded(mine, headers=access)
    refused = await submit(await callers.key(), url)
    [detail] = refused.json()["detail"]
    assert (refused.status_code, detail["type"]) == (422, "file_download_error")
    assert detail["loc"] == ["body", "keyframe_0_image_url"]
    assert (await submit(mine, url)).status_code == 200


async def test_a_file_of_ours_that_is_gone_or_too_large_is_told_at_once(
    callers: Callers, mine: httpx.AsyncClient, sql: asyncpg.Connection
) -> None:
    url = await uploaded(mine)
    assert (await submit(mine, url, **{"idempotency-key": "render 7"})).status_code == 200
    await sql.execute("UPDATE stored_files SET expires_at = now()")
    for gone in (url, f"https://v3.fal.media{urlsplit(url).path}"):
        refused = await submit(mine, gone)
        assert (refused.status_code, refused.json()["detail"][0]["type"]) == (422, "file_download_error")
    assert (await submit(mine, url, **{"idempotency-key": "render 7"})).status_code == 200, "a repeat is answered all the same"
    refused = await submit(mine, await uploaded(mine, b"x" * 20_001))
    assert (refused.status_code, refused.json()["detail"][0]["type"]) == (422, "file_too_large")


@pytest.mark.parametrize(
    "url", ["https://v3.fal.media/files/b/0a8f1234/x_y.png", "https://a.example/files/b/" + "0" * 32 + "/x.png"]
)
async def test_a_file_of_another_service_is_left_to_the_download(url: str, callers: Callers, mine: httpx.AsyncClient) -> None:
    assert (await submit(mine, url)).status_code == 200
    claim = await callers.store.claims.take([ENDPOINT], 30.0)
    assert claim is not None
    assert claim.input["keyframe_0_image_url"] == url
