import asyncio
from typing import Any

import asyncpg
import pytest

from deployments.jobs.keys import DEFAULT_SCOPES, KeySecret
from deployments.jobs.store import JobStore

HOUR_S = 3600.0


def key_of(secret: str) -> str:
    return secret.partition(":")[0]


async def rotated(store: JobStore, secret: str, overlap_s: float) -> str:
    new = await store.keys.rotate(key_of(secret), overlap_s)
    assert new is not None
    return new


async def known(store: JobStore, secret: str) -> KeySecret | None:
    """Looks a secret up in the database, without the cache."""
    store.keys._known.clear()
    return await store.keys.find_secret(secret)


async def owner_of(store: JobStore, secret: str) -> str | None:
    known = await store.keys.find_secret(secret)
    return known.key_id if known else None


async def test_key_is_shown_once_and_kept_as_a_hash(store: JobStore, sql: asyncpg.Connection) -> None:
    secret = await store.keys.create("laptop")
    (key,) = await store.keys.list_all()
    assert (key.name, key.revoked_at) == ("laptop", None)
    assert await owner_of(store, secret) == key.id
    row = str([dict(await sql.fetchrow(f"SELECT * FROM {table}")) for table in ("api_keys", "api_key_secrets")])
    assert secret not in row
    assert secret.partition(":")[2] not in row


@pytest.mark.parametrize("wrong", ["", ":", "x", "\x00", "\ud800", "é" * 1000])
async def test_wrong_secret_is_nobodys(store: JobStore, wrong: str) -> None:
    secret = await store.keys.create("laptop")
    assert await owner_of(store, wrong) is None
    assert await owner_of(store, secret + wrong) == (None if wrong else (await store.keys.list_all())[0].id)


async def test_revoked_key_opens_nothing(store: JobStore) -> None:
    secret = await store.keys.create("laptop")
    owner = await owner_of(store, secret)
    assert owner is not None
    assert await store.keys.revoke(owner) is True
    assert await owner_of(store, secret) is None
    ended = (await store.keys.list_all())[0].revoked_at
    assert await store.keys.revoke(owner) is True, "a repeat is answered as the call whose answer was lost"
    assert (await store.keys.list_all())[0].revoked_at == ended
    assert await store.keys.revoke("\x00nobody") is False
    (key,) = await store.keys.list_all()
    assert key.revoked_at is not None


async def test_key_revoked_by_another_process_ends_within_seconds(
    database: str, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.jobs.keys.CACHE_S", 0.2)
    secret = await store.keys.create("laptop")
    owner = await owner_of(store, secret)
    assert owner is not None
    other = await JobStore.open(database)
    await other.keys.revoke(owner)
    await other.close()
    await asyncio.sleep(0.2)
    assert await owner_of(store, secret) is None


async def test_scopes_are_kept_with_their_key(store: JobStore) -> None:
    plain, reader = await store.keys.create("plain"), await store.keys.create("reader", scopes=["read"])
    for secret, scopes in ((plain, list(DEFAULT_SCOPES)), (reader, ["read"])):
        found = await store.keys.find_secret(secret)
        assert found is not None
        assert found.scopes == scopes
    assert [key.scopes for key in await store.keys.list_all()] == [["submit", "read"], ["read"]]


@pytest.mark.parametrize("scopes", ["{}", "{write}", "{read,write}"])
async def test_database_refuses_scopes_that_mean_nothing(store: JobStore, sql: asyncpg.Connection, scopes: str) -> None:
    await store.keys.create("plain")
    with pytest.raises(asyncpg.CheckViolationError):
        await sql.execute(f"UPDATE api_keys SET scopes = '{scopes}'")


async def test_new_and_old_secret_are_the_same_key_until_the_overlap_ends(store: JobStore, sql: asyncpg.Connection) -> None:
    old = await store.keys.create("studio", max_running=3, scopes=["read"])
    new = await rotated(store, old, HOUR_S)
    assert new != old
    for secret in (old, new):
        found = await known(store, secret)
        assert found is not None
        assert (found.key_id, found.scopes) == (key_of(old), ["read"])
    (key,) = await store.keys.list_all()
    assert key.old_secret_until is not None
    await sql.execute("UPDATE api_key_secrets SET expires_at = now() WHERE expires_at IS NOT NULL")
    assert await known(store, old) is None
    assert await known(store, new) is not None
    (key,) = await store.keys.list_all()
    assert (key.old_secret_until, key.max_running) == (None, 3)
    assert new.partition(":")[2] not in str(await sql.fetch("SELECT * FROM api_key_secrets"))


async def test_rotation_without_overlap_ends_every_older_secret_at_once(store: JobStore) -> None:
    first = await store.keys.create("studio")
    second = await rotated(store, first, HOUR_S)
    third = await rotated(store, first, 0)
    assert [await known(store, secret) is not None for secret in (first, second, third)] == [False, False, True]


async def test_later_rotation_does_not_lengthen_an_overlap(store: JobStore, sql: asyncpg.Connection) -> None:
    secret = await store.keys.create("studio")
    await rotated(store, secret, HOUR_S)
    before = await sql.fetchval("SELECT min(expires_at) FROM api_key_secrets")
    await rotated(store, secret, 10 * HOUR_S)
    assert await sql.fetchval("SELECT min(expires_at) FROM api_key_secrets") == before


async def test_rotations_at_once_leave_one_secret_without_an_end(store: JobStore, sql: asyncpg.Connection) -> None:
    secret = await store.keys.create("studio")
    await asyncio.gather(*(rotated(store, secret, HOUR_S) for _ in range(6)))
    assert await sql.fetchval("SELECT count(*) FROM api_key_secrets WHERE expires_at IS NULL") == 1


async def test_revoked_or_unknown_key_is_not_rotated(store: JobStore) -> None:
    old = await store.keys.create("studio")
    new = await rotated(store, old, HOUR_S)
    await store.keys.revoke(key_of(old))
    assert [await known(store, secret) for secret in (old, new)] == [None, None]
    assert await store.keys.rotate(key_of(old), 0) is None
    assert await store.keys.rotate("nobody\x00", 0) is None


async def test_rotation_that_lost_its_answer_is_one_rotation(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    old = await store.keys.create("studio")
    lost = []
    run = store.database.run

    async def twice(work: Any) -> Any:
        lost.append(await run(work))
        return await run(work)

    monkeypatch.setattr(store.database, "run", twice)
    new = await rotated(store, old, HOUR_S)
    monkeypatch.undo()
    assert len(lost) == 1
    assert await known(store, new) is not None
    assert len(await store.database.run(lambda connection: connection.fetch("SELECT FROM api_key_secrets"))) == 2


async def test_a_secret_whose_time_is_over_is_forgotten_and_no_other(store: JobStore) -> None:
    old = await store.keys.create("studio")
    assert await store.keys.expire_secrets() == 0
    new = await rotated(store, old, HOUR_S)
    assert await store.keys.expire_secrets() == 0
    newest = await rotated(store, new, 0)
    assert await store.keys.expire_secrets() == 2
    assert [await known(store, secret) is not None for secret in (old, new, newest)] == [False, False, True]
