"""Short-lived tokens, from the request with a key to the page that uses the token."""

import base64
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from deployments.ingress.app import create_app
from deployments.jobs.keys import KeySecret
from deployments.jobs.store import JobStore
from deployments.schemas import tokens
from deployments.settings import Settings

ALIAS = "animatediff-sparsectrl-lcm"
ENDPOINT = f"fal-ai/{ALIAS}"
SUBMIT = f"/queue/{ENDPOINT}"
INPUT = {"prompt": "a city at night"}
ASKED = {"allowed_apps": [ALIAS], "token_expiration": 120}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, auth="keys")


@pytest.fixture
async def client(settings: Settings, store: JobStore) -> AsyncIterator[httpx.AsyncClient]:
    """Sends no key unless a test adds one."""
    transport = httpx.ASGITransport(app=create_app(settings, store))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
        yield client


def bearing(secret: str) -> dict[str, str]:
    return {"authorization": f"Key {secret}"}


async def token_for(client: httpx.AsyncClient, secret: str, **asked: Any) -> str:
    answer = await client.post("/rest/tokens/", json=ASKED | asked, headers=bearing(secret))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    token = answer.json()
    assert isinstance(token, str)
    return token


async def submit_with(client: httpx.AsyncClient, token: str) -> httpx.Response:
    return await client.post(SUBMIT, json=INPUT, params={"fal_jwt_token": token})


@pytest.mark.parametrize(
    ("url", "headers"),
    [
        ("/rest/tokens/", {}),
        ("/rest/tokens", {}),
        ("/tokens/", {"host": "rest.fal.ai"}),
        ("/tokens/realtime", {"host": "rest.fal.ai"}),
        ("/rest/tokens/realtime", {}),
        ("/api/fal/proxy", {"x-fal-target-url": "https://rest.fal.ai/tokens/"}),
    ],
)
@pytest.mark.parametrize("asked", [ASKED, {"allowed_apps": [ENDPOINT], "duration": 120}])
async def test_token_is_given_to_a_key_wherever_a_client_asks(
    url: str, headers: dict[str, str], asked: dict[str, Any], client: httpx.AsyncClient, store: JobStore
) -> None:
    assert (await client.post(url, json=asked, headers=headers)).status_code == 401
    secret = await store.keys.create("studio")
    answer = await client.post(url, json=asked, headers=headers | bearing(secret))
    assert (await submit_with(client, answer.json())).status_code == 200


async def test_token_does_for_its_app_what_the_key_may(client: httpx.AsyncClient, store: JobStore) -> None:
    secret = await store.keys.create("studio")
    used = {"fal_jwt_token": await token_for(client, secret)}
    links = (await client.post(SUBMIT, json=INPUT, params=used)).json()
    assert (await client.get(links["status_url"], params=used)).status_code == 202
    assert (await client.get(links["status_url"], headers=bearing(secret))).status_code == 202
    assert (await client.put(links["cancel_url"], params=used)).status_code == 202
    assert (await client.get(f"{links['status_url']}/stream", params=used)).status_code == 200
    assert (await client.get(links["response_url"], params=used)).status_code == 499


@pytest.mark.parametrize("header", ["Basic c3R1ZGlvOnB3", "Negotiate x", ""])
async def test_a_header_of_a_proxy_before_us_does_not_hide_the_token(
    header: str, client: httpx.AsyncClient, store: JobStore
) -> None:
    token = await token_for(client, await store.keys.create("studio"))
    answer = await client.post(SUBMIT, json=INPUT, params={"fal_jwt_token": token}, headers={"authorization": header})
    assert answer.status_code == 200
    assert (await client.post(SUBMIT, json=INPUT, headers={"authorization": header})).status_code == 401


async def test_token_is_for_no_other_app(client: httpx.AsyncClient, store: JobStore) -> None:
    secret = await store.keys.create("studio")
    links = (await client.post(SUBMIT, json=INPUT, headers=bearing(secret))).json()
    for apps in (["controlnext"], ["fal-ai/controlnext"], ["someone/animatediff-sparsectrl-lcm"], ["fal-ai"], ["*"]):
        used = {"fal_jwt_token": await token_for(client, secret, allowed_apps=apps)}
        for method, url in (("POST", SUBMIT), ("GET", links["status_url"]), ("PUT", links["cancel_url"])):
            refused = await client.request(method, url, params=used)
            assert (refused.status_code, refused.json()["error_type"]) == (403, "forbidden")
    several = await token_for(client, secret, allowed_apps=["controlnext", f"{ENDPOINT}/stream"])
    assert (await submit_with(client, several)).status_code == 200


async def test_token_has_the_scopes_of_its_key_and_never_admin(client: httpx.AsyncClient, store: JobStore) -> None:
    mine = await store.keys.create("mine")
    links = (await client.post(SUBMIT, json=INPUT, headers=bearing(mine))).json()
    reader = await token_for(client, await store.keys.create("r", scopes=["read"]))
    assert (await submit_with(client, reader)).status_code == 403
    for scopes in (["admin"], ["admin", "submit"]):
        used = {"fal_jwt_token": await token_for(client, await store.keys.create("o", scopes=scopes))}
        for method, url in (("GET", links["status_url"]), ("PUT", links["cancel_url"])):
            assert (await client.request(method, url, params=used)).status_code == 404


async def test_token_ends_in_time(client: httpx.AsyncClient, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    token = await token_for(client, await store.keys.create("studio"), token_expiration=30)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 28)
    assert (await submit_with(client, token)).status_code == 200
    monkeypatch.setattr(time, "time", lambda: now + 31)
    refused = await submit_with(client, token)
    assert (refused.status_code, refused.json()["error_type"]) == (401, "unauthorized")


async def test_token_ends_with_its_key_or_its_secret(client: httpx.AsyncClient, store: JobStore) -> None:
    old = await store.keys.create("studio")
    key_id = old.partition(":")[0]
    of_old = await token_for(client, old)
    new = await store.keys.rotate(key_id, 3600)
    assert new is not None
    of_new = await token_for(client, new)
    assert [(await submit_with(client, token)).status_code for token in (of_old, of_new)] == [200, 200]
    newest = await store.keys.rotate(key_id, 0)  # the others were stolen
    assert newest is not None
    of_newest = await token_for(client, newest)
    assert [(await submit_with(client, token)).status_code for token in (of_old, of_new, of_newest)] == [401, 401, 200]
    await store.keys.revoke(key_id)
    assert (await submit_with(client, of_newest)).status_code == 401


async def test_token_opens_nothing_but_the_queue(client: httpx.AsyncClient, store: JobStore) -> None:
    token = await token_for(client, await store.keys.create("studio"))
    used = {"fal_jwt_token": token}
    assert (await client.post("/rest/tokens/", json=ASKED, params=used)).status_code == 401
    assert (await client.post("/rest/tokens/", json=ASKED, headers={"authorization": f"Bearer {token}"})).status_code == 401
    assert (await client.get("/webhooks/deliveries", params=used)).status_code == 401
    assert (await client.post(f"/webhooks/deliveries/{uuid4()}/redeliver", params=used)).status_code == 401


async def test_wrong_key_is_not_saved_by_a_good_token(client: httpx.AsyncClient, store: JobStore) -> None:
    used = {"fal_jwt_token": await token_for(client, await store.keys.create("studio"))}
    assert (await client.post(SUBMIT, json=INPUT, params=used, headers=bearing("wrong"))).status_code == 401


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"allowed_apps": []},
        {"allowed_apps": [""]},
        {"allowed_apps": "x"},
        {"allowed_apps": [ALIAS], "token_expiration": 0},
        {"allowed_apps": [ALIAS], "token_expiration": 3601},
        {"allowed_apps": [ALIAS], "duration": 10**9},
        {"allowed_apps": [ALIAS], "token_expiration": True},
        {"allowed_apps": [ALIAS], "scopes": ["read"]},
    ],
)
async def test_what_no_token_can_be_is_told(asked: dict[str, Any], client: httpx.AsyncClient, store: JobStore) -> None:
    assert (await client.post("/rest/tokens/", json=asked)).status_code == 401  # without a key, no details
    answer = await client.post("/rest/tokens/", json=asked, headers=bearing(await store.keys.create("studio")))
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"][0] == "body"


async def test_an_open_service_gives_anybody_a_token_and_asks_for_none(settings: Settings, store: JobStore) -> None:
    transport = httpx.ASGITransport(app=create_app(settings.model_copy(update={"auth": "open"}), store))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
        token = (await client.post("/rest/tokens/", json=ASKED)).json()
        assert (await submit_with(client, token)).status_code == 200
        assert (await submit_with(client, "whatever")).status_code == 200


# Forgeries

SECRET = KeySecret(uuid4(), "key", ("submit",), b"k" * 32)


def part(content: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()


def test_token_that_was_changed_is_not_genuine():
    token = tokens.issue(SECRET, [ALIAS], 60)
    header, claims, signature = token.split(".")
    genuine = tokens.read(token)
    assert genuine is not None
    assert genuine.is_genuine(SECRET)
    more = json.loads(base64.urlsafe_b64decode(claims + "==")) | {"apps": ["controlnext"]}
    for forged in (f"{header}.{part(more)}.{signature}", f"{header}.{claims}.{signature[:-4]}AAAA", f"{header}.{claims}."):
        read = tokens.read(forged)
        assert read is not None
        assert not read.is_genuine(SECRET)
    assert not genuine.is_genuine(KeySecret(SECRET.id, "key", ("submit",), b"j" * 32))


@pytest.mark.parametrize("alg", ["none", "None", "HS512", "EdDSA", None])
def test_token_does_not_choose_its_algorithm(alg: str | None):
    _, claims, signature = tokens.issue(SECRET, [ALIAS], 60).split(".")
    assert tokens.read(f"{part({'alg': alg, 'kid': str(SECRET.id)})}.{claims}.{signature}") is None


HEADER = {"alg": "HS256", "kid": str(uuid4())}
CLAIMS = {"sub": "key", "use": "app", "apps": [ALIAS], "exp": 1}


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "...",
        "a.b.c",
        "é.é.é",
        "\ud800.a.b",
        "x" * 100_000,
        f"{part([])}.{part(CLAIMS)}.AAAA",
        f"{part(HEADER | {'kid': 7})}.{part(CLAIMS)}.AAAA",
        f"{part(HEADER | {'kid': 'x'})}.{part(CLAIMS)}.AAAA",
        f"{part(HEADER)}.{part([])}.AAAA",
        f"{part(HEADER)}.{part(CLAIMS | {'exp': '1'})}.AAAA",
        f"{part(HEADER)}.{part(CLAIMS | {'exp': None})}.AAAA",
        f"{part(HEADER)}.{part(CLAIMS | {'use': 'cdn'})}.AAAA",
        f"{part(HEADER)}.{part(CLAIMS | {'use': None})}.AAAA",
        f"{part(HEADER)}.{base64.urlsafe_b64encode(b'[' * 9000).decode()}.AAAA",
        f"{part(HEADER)}.{part(CLAIMS)}.A",
    ],
    ids=range(18),  # the texts contain a random key id, which differs in every test worker
)
def test_text_that_is_no_token_is_none(text: str):
    assert tokens.read(text) is None
