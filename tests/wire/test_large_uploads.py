"""Uploads above 100 MiB, which both clients send in parts of 10 MiB: J1 and P4 of fal-queue-protocol.md.

One after the other and on one hosting, because they take the machine's time; `cases/` has all that is small.
"""

import asyncio
import gc
import hashlib
from collections import Counter
from pathlib import Path

import fal_client
import fal_client.client
import httpx
import pytest

from deployments.files.file_store import FileStore
from deployments.jobs.store import JobStore
from tests.patience import PATIENCE_S
from tests.wire.page import PageClient
from tests.wire.service import ENDPOINT, Wire

SIZE = 101 * 1024 * 1024 + 7
PARTS = 11


async def digest_of(url: str) -> tuple[str, str]:
    """The type and the SHA-256 of a file."""
    digest = hashlib.sha256()
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client, client.stream("GET", url) as answer:
        assert answer.headers["content-length"] == str(SIZE)
        async for piece in answer.aiter_bytes():
            digest.update(piece)
    return answer.headers["content-type"], digest.hexdigest()


def parts_sent(wire: Wire) -> Counter[str]:
    """Method -> how many calls of it went to a file."""
    return Counter(method for method, path in wire.requests if path.startswith("/files/b/"))


async def test_the_javascript_client(page: PageClient, wire: Wire, store: JobStore, files: FileStore) -> None:
    done = await page("upload", ENDPOINT, size=SIZE, name="dance.mp4", type="video/mp4", timeout_s=150)
    assert done.error is None, done.error
    assert done.value["methods"] == ["POST", *["PUT"] * PARTS, "POST"]
    assert await digest_of(done.value["url"]) == ("video/mp4", done.value["sha256"])
    await store.retention.expire_files(files.delete)
    assert files.fs.find(files.path("parts")) == []


@pytest.fixture
def data() -> bytes:
    return (bytes(range(251)) * (SIZE // 251 + 1))[:SIZE]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the client leaves its connections open
@pytest.mark.parametrize("kind", ["bytes", "file"])
async def test_the_python_clients(
    kind: str, base_url: str, wire: Wire, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fal_client.client, "REST_URL", f"{base_url}/rest")
    monkeypatch.setattr(fal_client.client, "CDN_URL", f"{base_url}/cdn")
    if kind == "bytes":
        url = await fal_client.AsyncClient(key="anything").upload(data, "video/mp4", file_name="dance.mp4")
    else:
        (tmp_path / "dance.mp4").write_bytes(data)
        url = await asyncio.to_thread(fal_client.SyncClient(key="anything").upload_file, tmp_path / "dance.mp4")
    assert parts_sent(wire) == {"PUT": PARTS, "POST": 1}
    assert await digest_of(url) == ("video/mp4", hashlib.sha256(data).hexdigest())
    gc.collect()
