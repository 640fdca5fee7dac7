"""What fal-client relies on when it uploads: rules as in `rules.py`, of section 4."""

import io
import re
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fal_client
import httpx
import pytest
from fal_client import StorageACL, StorageACLRule, StorageSettings
from PIL import Image

from tests.wire.cases import rules
from tests.wire.cases.harness import CALLS, rule
from tests.wire.cases.rules import ANIMATEDIFF, WITH_REST, client, failure, key


def read(url: str, who: str | None = None, **headers: str) -> httpx.Response:
    with httpx.Client(timeout=60) as plain:
        return plain.get(url, headers=headers | ({} if who is None else {"authorization": f"Key {key(who)}"}))


def rest(path: str, json: object, who: str = "own") -> httpx.Response:
    base = "https://rest.fal.ai" if rules.given.recipe == "P2" else f"{rules.given.base}/rest"
    with httpx.Client(timeout=60) as plain:
        return plain.post(f"{base}{path}", json=json, headers={"authorization": f"Key {key(who)}"})


def calls() -> list[tuple[str, str]]:
    """Method and the last words of the path of every call of the rule."""
    return [(call.request.method, re.sub(r".*/(files|storage)/", r"\1/", call.request.url.path)) for call in CALLS.get([])]


def input_with(url: str) -> dict[str, Any]:
    return {"prompt": "x", "keyframe_0_image_url": url, "keyframe_0_index": 0}


@rule("4: bytes are read back at once, with their type and without a key", only=WITH_REST)
def upload_read_back() -> None:
    answer = read(client().upload(b"Hello", "text/plain"))
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"Hello", "text/plain")


@rule("4: it goes to the CDN, with a token for it", only=WITH_REST)
def upload_by_the_cdn() -> None:
    url = fal_client.SyncClient(key=key()).upload("Hello", "text/plain", file_name="notes.txt")
    assert re.search(r"/files/b/[0-9a-f]{32}/notes\.txt$", url)
    assert calls() == [("POST", "storage/auth/token"), ("POST", "files/upload")]


@rule("4: the token is asked for once, and its end has an offset", only=WITH_REST)
def upload_token_is_kept() -> None:
    one = fal_client.SyncClient(key=key())
    for _ in range(3):
        one.upload(b"x", "text/plain")
    assert [path for _, path in calls()] == ["storage/auth/token", *["files/upload"] * 3]
    expires_at = CALLS.get([])[0].json()["expires_at"]
    assert datetime.fromisoformat(expires_at) > datetime.now(UTC) + timedelta(minutes=30)
    assert expires_at.endswith("+00:00")


@rule("4: the asynchronous client does the same", only=WITH_REST)
async def upload_async() -> None:
    url = await fal_client.AsyncClient(key=key()).upload(b"Hello", "image/png")
    answer = read(url)
    assert (answer.content, answer.headers["content-type"]) == (b"Hello", "image/png")


def uploaded_file(name: str, content: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return client().upload_file(path)


@rule("8: a file is uploaded under its name, with the type of its suffix", only=WITH_REST)
def upload_file() -> None:
    url = uploaded_file("notes.txt", b"Hello")
    assert url.endswith("/notes.txt")
    assert (read(url).content, read(url).headers["content-type"]) == (b"Hello", "text/plain")


@rule("8: a picture is uploaded as a JPEG", only=WITH_REST)
def upload_image() -> None:
    picture = Image.new("RGB", (64, 64), (200, 30, 30))
    answer = read(client().upload_image(picture))
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.headers["content-disposition"].startswith("inline")
    assert Image.open(io.BytesIO(answer.content)).size == (64, 64)


@rule("4: nothing at all is a file", only=WITH_REST)
def upload_empty() -> None:
    assert read(client().upload(b"", "text/plain")).content == b""


@rule("4: the fallback initiates, and sends the key along with the file", only=WITH_REST)
def upload_by_the_fallback() -> None:
    url = client().upload(b"Hello", "text/plain", file_name="notes.txt", repository="fal")
    assert [method for method, _ in calls()] == ["POST", "PUT"]
    assert "authorization" in CALLS.get([])[1].request.headers
    assert (read(url).content, read(url).headers["content-type"]) == (b"Hello", "text/plain")


@rule("4: the fallback without a name", only=WITH_REST)
def upload_by_the_fallback_without_a_name() -> None:
    assert client().upload(b"x", "application/octet-stream", repository="fal").endswith("/upload.bin")


@rule("4: the old name of the CDN is the CDN", only=WITH_REST)
def upload_by_the_old_name() -> None:
    url = client().upload(b"x", "text/plain", repository="cdn")
    assert ("POST", "files/upload") in calls()
    assert read(url).content == b"x"


@rule("4: a file expires when its lifecycle says", only=WITH_REST)
def upload_lifecycle() -> None:
    for repository in ("fal_v3", "fal"):
        settings = StorageSettings(expires_in="immediate")
        answer = read(client().upload(b"x", "text/plain", repository=repository, lifecycle=settings))
        assert 30 < int(re.findall(r"max-age=(\d+)", answer.headers["cache-control"])[0]) <= 60


@rule("4: a hidden file is as if absent, but for its owner", only=WITH_REST, with_keys=True)
def upload_hidden() -> None:
    for repository in ("fal_v3", "fal"):
        settings = StorageSettings(initial_acl=StorageACL(default="hide"))
        url = client().upload(b"x", "text/plain", repository=repository, lifecycle=settings)
        assert [read(url, who).status_code for who in (None, "other", "own")] == [404, 404, 200]


@rule("4: a forbidden file is an error, but for its owner and those of a rule", only=WITH_REST, with_keys=True)
def upload_forbidden() -> None:
    allowed = StorageACLRule(user=key("reader").partition(":")[0], decision="allow")
    settings = StorageSettings(initial_acl=StorageACL(default="forbid", rules=[allowed]))
    url = client().upload(b"x", "text/plain", lifecycle=settings)
    assert [read(url, who).status_code for who in (None, "other", "reader", "own")] == [403, 403, 200, 200]


@rule("6.2: a wrong key gets no token for the CDN", only=WITH_REST, with_keys=True)
def upload_wrong_key() -> None:
    with pytest.raises(httpx.HTTPStatusError) as caught:
        fal_client.SyncClient(key="a:b").upload(b"x", "text/plain")
    assert caught.value.response.status_code == 401


@rule("ours: nor does one that may only read", only=WITH_REST, with_keys=True)
def upload_scope() -> None:
    assert rest("/storage/auth/token", {}, "reader").status_code == 403
    assert (
        failure(lambda: client("reader").upload(b"x", "text/plain", repository="fal", fallback_repository=[])).status_code == 403
    )


@rule("ours: a file of ours is an input, and one that is gone is told at once", only=WITH_REST)
def input_of_ours() -> None:
    url = client().upload(b"x", "image/png")
    assert client().submit(ANIMATEDIFF, input_with(url)).request_id
    gone = re.sub(r"/b/.{4}", "/b/0000", url)
    error = failure(lambda: client().submit(ANIMATEDIFF, input_with(gone)))
    assert (error.status_code, error.message[0]["type"]) == (422, "file_download_error")  # type: ignore[index]


@rule("ours: another key's hidden file is no input", only=WITH_REST, with_keys=True)
def input_hidden() -> None:
    url = client().upload(b"x", "image/png", lifecycle=StorageSettings(initial_acl=StorageACL(default="hide")))
    assert failure(lambda: client("other").submit(ANIMATEDIFF, input_with(url))).status_code == 422


@rule("4: a picture that is encoded is an input without an upload")
def input_encoded() -> None:
    uri = fal_client.encode_image(Image.new("RGB", (64, 64)))
    assert client().submit(ANIMATEDIFF, input_with(uri)).request_id
    assert len(CALLS.get([])) == 1


@rule("4: a token for the CDN is for nothing else", only=WITH_REST, with_keys=True)
def cdn_token_is_for_uploads() -> None:
    token = rest("/storage/auth/token?storage_type=fal-cdn-v3", {}).json()
    assert set(token) == {"token", "token_type", "base_url", "expires_at"}
    bearer = {"authorization": f"{token['token_type']} {token['token']}"}
    with httpx.Client() as plain:
        stored = plain.post(f"{token['base_url']}/files/upload", content=b"x", headers=bearer)
        assert read(stored.json()["access_url"]).content == b"x"
        assert plain.post(f"{rules.given.base}/queue/{ANIMATEDIFF}", json={"prompt": "x"}, headers=bearer).status_code == 401
        assert plain.post(f"{token['base_url']}/files/upload", content=b"x").status_code == 401
