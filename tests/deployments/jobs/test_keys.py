"""API keys beside what `test_store.py` has: scopes, and secrets that are replaced."""

import asyncio
from typing import Any

import asyncpg
import pytest

from deployments.jobs.keys import DEFAULT_SCOPES, KeySecret
from deployments.jobs.store import _RESOURCES, JobStore
from tests.conftest import execute, of_database

HOUR_S = 3600.0


def key_of(secret: str) -> str:
    return secret.partition(":")[0]


async def rotated(store: JobStore, secret: str, overlap_s: float) -> str:
    new = await store.rotate_key(key_of(secret), overlap_s)
    assert new is not None
    return new


async def known(store: JobStore, secret: str) -> KeySecret | None:
    """Past the cache."""
    store._secrets.clear()
    return await store.find_secret(secret)


async def test_scopes_are_kept_with_their_key(store: JobStore) -> None:
    plain, reader = await store.create_key("plain"), await store.create_key("reader", scopes=["read"])
    for secret, scopes in ((plain, list(DEFAULT_SCOPES)), (reader, ["read"])):
        found = await store.find_secret(secret)
        assert found is not None
        assert found.scopes == scopes
    assert [key.scopes for key in await store.list_keys()] == [["submit", "read"], ["read"]]


@pytest.mark.parametrize("scopes", ["{}", "{write}", "{read,write}"])
async def test_database_refuses_scopes_that_mean_nothing(store: JobStore, sql: asyncpg.Connection, scopes: str) -> None:
    await store.create_key("plain")
    with pytest.raises(asyncpg.CheckViolationError):
        await sql.execute(f"UPDATE api_keys SET scopes = '{scopes}'")


async def test_new_and_old_secret_are_the_same_key_until_the_overlap_ends(store: JobStore, sql: asyncpg.Connection) -> None:
    old = await store.create_key("studio", max_running=3, scopes=["read"])
    new = await rotated(store, old, HOUR_S)
    assert new != old
    for secret in (old, new):
        found = await known(store, secret)
        assert found is not None
        assert (found.key_id, found.scopes) == (key_of(old), ["read"])
    (key,) = await store.list_keys()
    assert key.old_secret_until is not None
    await sql.execute("UPDATE api_key_secrets SET expires_at = now() WHERE expires_at IS NOT NULL")
    assert await known(store, old) is None
    assert await known(store, new) is not None
    (key,) = await store.list_keys()
    assert (key.old_secret_until, key.max_running) == (None, 3)
    assert new.partition(":")[2] not in str(await sql.fetch("SELECT * FROM api_key_secrets"))


async def test_rotation_without_overlap_ends_every_older_secret_at_once(store: JobStore) -> None:
    first = await store.create_key("studio")
    second = await rotated(store, first, HOUR_S)
    third = await rotated(store, first, 0)
    assert [await known(store, secret) is not None for secret in (first, second, third)] == [False, False, True]


async def test_later_rotation_does_not_lengthen_an_overlap(store: JobStore, sql: asyncpg.Connection) -> None:
    secret = await store.create_key("studio")
    await rotated(store, secret, HOUR_S)
    before = await sql.fetchval("SELECT min(expires_at) FROM api_key_secrets")
    await rotated(store, secret, 10 * HOUR_S)
    assert await sql.fetchval("SELECT min(expires_at) FROM api_key_secrets") == before


async def test_rotations_at_once_leave_one_secret_without_an_end(store: JobStore, sql: asyncpg.Connection) -> None:
    secret = await store.create_key("studio")
    await asyncio.gather(*(rotated(store, secret, HOUR_S) for _ in range(6)))
    assert await sql.fetchval("SELECT count(*) FROM api_key_secrets WHERE expires_at IS NULL") == 1


async def test_revoked_or_unknown_key_is_not_rotated(store: JobStore) -> None:
    old = await store.create_key("studio")
    new = await rotated(store, old, HOUR_S)
    await store.revoke_key(key_of(old))
    assert [await known(store, secret) for secret in (old, new)] == [None, None]
    assert await store.rotate_key(key_of(old), 0) is None
    assert await store.rotate_key("nobody\x00", 0) is None


async def test_rotation_that_lost_its_answer_is_one_rotation(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    old = await store.create_key("studio")
    lost = []
    outlast = store._outlast

    async def twice(work: Any) -> Any:
        lost.append(await outlast(work))
        return await outlast(work)

    monkeypatch.setattr(store, "_outlast", twice)
    new = await rotated(store, old, HOUR_S)
    monkeypatch.undo()
    assert len(lost) == 1
    assert await known(store, new) is not None
    assert len(await store.outlast(lambda connection: connection.fetch("SELECT FROM api_key_secrets"))) == 2


async def test_a_secret_whose_time_is_over_is_forgotten_and_no_other(store: JobStore) -> None:
    old = await store.create_key("studio")
    assert await store.expire_secrets() == 0
    new = await rotated(store, old, HOUR_S)
    assert await store.expire_secrets() == 0
    newest = await rotated(store, new, 0)
    assert await store.expire_secrets() == 2
    assert [await known(store, secret) is not None for secret in (old, new, newest)] == [False, False, True]


async def test_keys_made_before_there_were_scopes_work_as_they_did(postgres: str) -> None:
    await execute(postgres, "CREATE DATABASE older_keys")
    url = of_database(postgres, "older_keys")
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE schema_migrations (name text PRIMARY KEY, applied_at timestamptz DEFAULT now())")
    for file in sorted(_RESOURCES.joinpath("migrations").iterdir(), key=lambda file: file.name):
        if file.name < "0008":
            await connection.execute(file.read_text())
            await connection.execute("INSERT INTO schema_migrations (name) VALUES ($1)", file.name)
    await connection.execute("INSERT INTO api_keys (id, name, hash) SELECT n, n, sha256(n::bytea) FROM unnest('{a,b}'::text[]) n")
    store = await JobStore.open(url)
    try:
        secrets = [await store.find_secret(secret) for secret in ("a", "b")]
        assert [(secret.key_id, secret.scopes) for secret in secrets if secret] == [
            ("a", ["submit", "read"]),
            ("b", ["submit", "read"]),
        ]
        assert len({secret.token_key for secret in secrets if secret}) == 2
    finally:
        await store.close()
        await connection.close()
        await execute(postgres, "DROP DATABASE older_keys WITH (FORCE)")
