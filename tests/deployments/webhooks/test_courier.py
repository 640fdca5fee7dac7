import asyncio
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from deployments.jobs.database import StoreAway
from deployments.jobs.job import NewJob
from deployments.jobs.store import JobStore
from deployments.schemas.failures import Failure, error_failure
from deployments.settings import FetchSettings, Settings, WebhookSettings
from deployments.webhooks import courier as courier_module
from deployments.webhooks import outbox as outbox_module
from deployments.webhooks.courier import RETRIES, retry_delay_s
from deployments.webhooks.outbox import Outbox, Webhook
from deployments.webhooks.signing import jwks
from engines.errors import ImageLoadError, StartTimeout
from tests.conftest import execute
from tests.deployments.webhooks.receiver import Received, answering, courier_of, is_signed, receiving
from tests.patience import PATIENCE_S

ENDPOINT = "fal-ai/animatediff-sparsectrl-lcm"
LIMITS = WebhookSettings(timeout_s=30, max_per_receiver=4)
OPEN = Settings(fetch=FetchSettings(allow_private=True), webhooks=LIMITS)
RESULT = {"video": {"url": "/files/v.mp4", "content_type": "video/mp4"}, "seed": 7}


@pytest.fixture
def outbox(store: JobStore) -> Outbox:
    return Outbox(store.database)


@asynccontextmanager
async def couriers(*outboxes: Outbox, settings: Settings = OPEN, clock: Callable[[], float] = time.time) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(courier_of(outbox, settings, clock).run()) for outbox in outboxes]
        yield
        for task in tasks:
            task.cancel()


async def ended(store: JobStore, url: str, failure: Failure | None = None, **job: Any) -> UUID:
    """Submits a job and ends it, which puts its webhook into the outbox."""
    submitted = await store.submit(NewJob(ENDPOINT, {}, webhook_url=url, **{"service_url": "http://door:8000", **job}))
    claim = await store.claims.take([ENDPOINT], 60)
    assert claim is not None
    assert claim.job_id == submitted.id
    await (store.claims.succeed(claim, RESULT, {}) if failure is None else store.claims.fail(claim, failure, {}))
    return submitted.id


async def read(outbox: Outbox, job_id: UUID) -> Webhook:
    webhook = await outbox.get(job_id)
    assert webhook is not None
    return webhook


async def until(outbox: Outbox, job_id: UUID, met: Callable[[Webhook], bool]) -> Webhook:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if met(webhook := await read(outbox, job_id)):
                return webhook
            await asyncio.sleep(0.02)


def tried(count: int) -> Callable[[Webhook], bool]:
    """`count` attempts are recorded, and the next one has not begun."""
    return lambda webhook: webhook.attempts == count and (webhook.last_status or webhook.last_error) is not None


async def delivered(outbox: Outbox, job_id: UUID) -> Webhook:
    return await until(outbox, job_id, lambda webhook: webhook.status == "delivered")


async def hurry(database: str) -> None:
    """Makes every retry due now."""
    await execute(
        database, "UPDATE webhook_outbox SET next_attempt_at = now() WHERE lease_until IS NULL AND next_attempt_at > now()"
    )
    await execute(database, "NOTIFY reelray, 'webhooks'")


# What arrives


async def test_a_result_arrives_signed_and_once(store: JobStore, outbox: Outbox) -> None:
    async with receiving(answering(200)) as receiver, couriers(outbox):
        job_id = await ended(store, receiver.url("/hook?a=1"), owner=None)
        webhook = await delivered(outbox, job_id)
        await asyncio.sleep(0.1)
    [request] = receiver.received
    assert request.path == "/hook?a=1"
    assert request.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert request.headers["content-type"] == "application/json"
    assert request.json["payload"] == {"video": {"url": "http://door:8000/files/v.mp4", "content_type": "video/mp4"}, "seed": 7}
    assert (request.json["status"], request.json["request_id"]) == ("OK", str(job_id))
    assert is_signed(request, jwks(await outbox.published_keys()), time.time())
    assert (webhook.attempts, webhook.last_status, webhook.last_error) == (1, 200, None)
    [attempt] = await outbox.attempts(job_id)
    assert (attempt.attempt, attempt.status, attempt.error) == (1, 200, None)


async def test_every_other_end_is_told_too(store: JobStore, outbox: Outbox) -> None:
    bad_image = error_failure(ImageLoadError("no image", ("body", "keyframe_0_image_url")))
    async with receiving(answering(204)) as receiver, couriers(outbox):
        failed = await ended(store, receiver.url(), bad_image)
        cancelled = (await store.submit(NewJob(ENDPOINT, {}, webhook_url=receiver.url()))).id
        await store.request_cancel(cancelled)
        late = (await store.submit(NewJob(ENDPOINT, {}, webhook_url=receiver.url(), start_timeout_s=0.001))).id
        invalid = (await store.submit_failed(NewJob(ENDPOINT, {}, webhook_url=receiver.url()), bad_image)).id
        await asyncio.sleep(0.01)
        await store.claims.sweep()
        for job_id in (failed, cancelled, late, invalid):
            await delivered(outbox, job_id)
    told = {UUID(request.request_id): request.json for request in receiver.received}
    assert {body["status"] for body in told.values()} == {"ERROR"}
    assert told[failed]["error"] == told[invalid]["error"] == "Invalid status code: 422"
    assert told[failed]["payload"] == bad_image.body
    assert told[cancelled]["error"] == "Invalid status code: 499"
    assert told[late]["payload"] == error_failure(StartTimeout()).body


async def test_a_job_submitted_without_the_services_url_is_told_at_the_public_url(store: JobStore, outbox: Outbox) -> None:
    settings = OPEN.model_copy(update={"public_url": "https://here.example/"})
    async with receiving(answering(200)) as receiver:
        job_id = await ended(store, receiver.url(), service_url=None)
        async with couriers(outbox, settings=settings):
            await delivered(outbox, job_id)
    assert receiver.received[0].json["payload"]["video"]["url"] == "https://here.example/files/v.mp4"


# Retries


def test_ten_retries_take_two_hours():
    delays = [retry_delay_s(tries, 0) for tries in range(1, RETRIES + 1)]
    assert len(delays) == 10
    assert sum(delay or 0 for delay in delays) == pytest.approx(7200, rel=0.01)
    assert retry_delay_s(RETRIES + 1, 0) is None
    assert (retry_delay_s(1, -1), retry_delay_s(1, 1)) == pytest.approx((5.6, 8.4))


async def test_a_refusal_is_tried_again_with_the_same_bytes_and_a_new_signature(
    store: JobStore, outbox: Outbox, database: str
) -> None:
    times = iter([1000.0, 2000.0, 3000.0])
    async with receiving(answering(500, 404, 200)) as receiver, couriers(outbox, clock=lambda: next(times)):
        job_id = await ended(store, receiver.url())
        webhook = await until(outbox, job_id, tried(1))
        assert (webhook.status, webhook.last_status, webhook.last_error) == ("pending", 500, "The receiver answered 500.")
        assert webhook.next_attempt_at is not None
        assert 5 < (webhook.next_attempt_at - webhook.created_at).total_seconds() < 9
        await hurry(database)
        await receiver.arrival(2)
        await until(outbox, job_id, lambda webhook: webhook.last_status == 404)
        await hurry(database)
        webhook = await delivered(outbox, job_id)
    assert webhook.next_attempt_at is None
    assert [attempt.status for attempt in await outbox.attempts(job_id)] == [500, 404, 200]
    assert len({request.body for request in receiver.received}) == 1
    keys = jwks(await outbox.published_keys())
    for request, now in zip(receiver.received, (1000, 2000, 3000), strict=True):
        assert is_signed(request, keys, now)
        assert request.headers["x-fal-webhook-timestamp"] == str(now)
    assert len({request.headers["x-fal-webhook-signature"] for request in receiver.received}) == 3


async def test_the_bytes_stay_the_same_whatever_changes_between_two_tries(store: JobStore, outbox: Outbox, database: str) -> None:
    async with receiving(answering(500, 200)) as receiver:
        job_id = await ended(store, receiver.url(), service_url=None)
        async with couriers(outbox, settings=OPEN.model_copy(update={"public_url": "https://old.example"})):
            await until(outbox, job_id, tried(1))
        await execute(database, "UPDATE jobs SET result = '{}', service_url = 'https://newer.example'")
        await hurry(database)
        async with couriers(outbox, settings=OPEN.model_copy(update={"public_url": "https://new.example"})):
            await delivered(outbox, job_id)
    first, second = receiver.received
    assert first.body == second.body
    assert b"old.example" in first.body


async def test_after_the_last_retry_nothing_more_is_sent_until_somebody_asks(
    store: JobStore, outbox: Outbox, database: str
) -> None:
    async with receiving(answering(503)) as receiver, couriers(outbox):
        job_id = await ended(store, receiver.url())
        for n in range(1, RETRIES + 2):
            await receiver.arrival(n)
            await until(outbox, job_id, tried(n))
            if n <= RETRIES:
                await until(outbox, job_id, lambda webhook: webhook.status == "pending")
            await wait_unleased(database)
            await hurry(database)
        webhook = await until(outbox, job_id, lambda webhook: webhook.status == "failed")
        assert webhook.attempts == RETRIES + 1 == len(receiver.received)
        await hurry(database)
        await asyncio.sleep(0.1)
        assert len(receiver.received) == RETRIES + 1

        receiver.answer = answering(500, 200)
        assert await outbox.redeliver(job_id)
        await until(outbox, job_id, tried(RETRIES + 2))
        await wait_unleased(database)
        assert (await read(outbox, job_id)).status == "pending", "with all its retries"
        await hurry(database)
        assert (await delivered(outbox, job_id)).attempts == RETRIES + 3
    assert len({request.body for request in receiver.received}) == 1


async def wait_unleased(database: str) -> None:
    connection = await asyncpg.connect(database)
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                if not await connection.fetchval("SELECT count(*) FROM webhook_outbox WHERE lease_until IS NOT NULL"):
                    return
                await asyncio.sleep(0.02)
    finally:
        await connection.close()


async def test_a_webhook_that_arrived_can_be_sent_again(store: JobStore, outbox: Outbox) -> None:
    async with receiving(answering(200)) as receiver, couriers(outbox):
        job_id = await ended(store, receiver.url())
        await delivered(outbox, job_id)
        assert await outbox.redeliver(job_id)
        await receiver.arrival(2)
        await until(outbox, job_id, lambda webhook: webhook.status == "delivered" and webhook.attempts == 2)
    assert receiver.received[0].body == receiver.received[1].body
    assert not await outbox.redeliver(UUID(int=0))


async def test_a_webhook_that_is_being_sent_is_not_sent_twice_for_a_request_to_send_it(store: JobStore, outbox: Outbox) -> None:
    job_id = await ended(store, "http://h.example/")
    [delivery] = await outbox.claim(1, 1, 1, 60)
    assert await outbox.redeliver(job_id)
    assert not await outbox.claim(1, 1, 1, 60)
    await outbox.finish(delivery, 200, None, 0.1, None)
    await outbox.finish(delivery, 200, None, 0.1, None)  # the answer to the first was lost
    assert (await read(outbox, job_id)).status == "delivered"
    assert len(await outbox.attempts(job_id)) == 1


async def test_a_webhook_asked_for_during_its_last_try_is_sent_again_with_all_its_retries(
    store: JobStore, outbox: Outbox
) -> None:
    job_id = await ended(store, "http://h.example/")
    [last] = await outbox.claim(1, 1, 1, 60)
    assert await outbox.redeliver(job_id)
    await outbox.finish(last, 500, "The receiver answered 500.", 0.1, None)
    [again] = await outbox.claim(1, 1, 1, 60)
    assert again.tries == 1
    await outbox.redeliver(job_id)
    await outbox.release(again)
    [again] = await outbox.claim(1, 1, 1, 60)
    assert again.tries == 1
    await outbox.finish(again, 500, "The receiver answered 500.", 0.1, None)
    assert (await read(outbox, job_id)).status == "failed"


# Fairness, and what a claim costs


async def fill(database: str, owner: str, receivers: int, *, each: int = 1, waiting: bool = False) -> None:
    """Puts webhooks of an owner into the outbox, `each` for every receiver. waiting: they are due in an hour."""
    connection = await asyncpg.connect(database)
    try:
        await connection.execute("SET session_replication_role = replica")  # without triggers and foreign keys it is quick
        await connection.execute(
            f"""
            WITH made AS (
                INSERT INTO jobs (id, endpoint, owner, priority, turn, state, input, max_attempts, finished_at, result)
                SELECT gen_random_uuid(), 'e', '{owner}', 0, 0, 'succeeded', '{{}}', 1, now(), '{{}}'
                FROM generate_series(1, {0 if waiting else receivers * each})
                RETURNING id
            ), numbered AS (
                SELECT id, row_number() OVER () AS n FROM made
                UNION ALL SELECT gen_random_uuid(), n FROM generate_series(1, {receivers * each if waiting else 0}) AS n
            )
            INSERT INTO webhook_outbox (job_id, owner, url, due, next_attempt_at)
            SELECT id, '{owner}', 'http://' || n % {receivers} || '.example', {not waiting}, now() + interval '{int(waiting)} h'
            FROM numbered
            """
        )
    finally:
        await connection.close()


async def test_an_owner_with_a_thousand_dead_receivers_delays_no_other(store: JobStore, outbox: Outbox, database: str) -> None:
    await fill(database, "many", 1000, each=2)
    await fill(database, "one", 1)
    first = await outbox.claim(128, 4, 64, 60)
    assert sorted(delivery.owner or "" for delivery in first) == ["many"] * 64 + ["one"]
    assert len({delivery.url for delivery in first if delivery.owner == "many"}) == 64, "its receivers have their turns"
    await fill(database, "one", 1)
    assert [delivery.owner for delivery in await outbox.claim(64, 4, 64, 60)] == ["one"]
    await outbox.finish(first[0], 200, None, 0.1, None)
    assert len(await outbox.claim(64, 4, 64, 60)) == 1


async def test_of_an_owners_receivers_all_have_their_turn(store: JobStore, outbox: Outbox, database: str) -> None:
    await fill(database, "many", 3, each=100)
    assert len(await outbox.claim(2, 4, 64, 60)) == 2
    second = await outbox.claim(64, 4, 64, 60)
    held = Counter(delivery.url for delivery in second)
    assert len(second) == 10
    assert len(held) == 3, "no more than four of each"
    await fill(database, "few at a time", 300)
    seen: set[str] = set()
    for _ in range(20):
        for delivery in await outbox.claim(64, 4, 16, 60):
            seen |= {delivery.url}
            await outbox.finish(delivery, 200, None, 0.1, None)
    assert len(seen) == 300, "wherever they lie in the order"


async def test_a_claim_walks_due_rows_only_and_few_of_one_owner(store: JobStore, database: str) -> None:
    async def pages(name: str, *args: object) -> int:
        [row] = await store.database.fetch(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {outbox_module._SQL[name]}", *args)
        [explained] = row[0]
        return int(explained["Plan"]["Shared Hit Blocks"] + explained["Plan"]["Shared Read Blocks"])

    async def claim() -> int:
        return await pages("wake") + await pages("claim", UUID(int=0), 64, 4, 64, 60.0, 0)

    await fill(database, "many", 100_000, waiting=True)
    await execute(database, "VACUUM ANALYZE webhook_outbox")
    assert await claim() < 20
    await fill(database, "many", 5000)
    assert await claim() < 4000, "64 receivers on each side of the place, a few pages for each, and 64 webhooks taken"
    assert await claim() < 100, "an owner who may hold no more is not looked at"


# Receivers that are malicious or broken


async def refusal(store: JobStore, outbox: Outbox, url: str, settings: Settings = OPEN) -> Webhook:
    async with couriers(outbox, settings=settings):
        webhook = await until(outbox, await ended(store, url), tried(1))
    assert webhook.status == "pending"
    return webhook


async def test_redirects_are_not_followed(store: JobStore, outbox: Outbox) -> None:
    async with receiving(answering(200)) as other, receiving(answering(307, headers="")) as receiver:
        receiver.answer = answering(307, headers=f"location: {other.url()}\r\n")
        webhook = await refusal(store, outbox, receiver.url())
        assert not other.received
    assert (webhook.last_status, webhook.last_error) == (307, "Redirects are not followed.")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0x7f000001", "169.254.169.254", "nothing.invalid"])
async def test_private_targets_are_refused_and_told_like_unknown_ones(store: JobStore, outbox: Outbox, host: str) -> None:
    async with receiving(answering(200)) as receiver:
        closed = OPEN.model_copy(update={"fetch": FetchSettings()})
        webhook = await refusal(store, outbox, receiver.url(host=host), closed)
        assert not receiver.received
    assert (webhook.last_status, webhook.last_error) == (None, "The host does not resolve to a public address.")


async def test_the_connection_goes_to_the_address_that_was_checked(
    store: JobStore, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with receiving(answering(200)) as receiver:
        asked: list[str] = []

        def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
            asked.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        async with couriers(outbox):
            await delivered(outbox, await ended(store, receiver.url(host="user:pass@hooks.example")))
    assert asked == ["hooks.example"], "looked up once, and never again"
    assert receiver.received[0].headers["host"] == f"hooks.example:{receiver.port}"


async def test_a_port_that_nobody_listens_on_is_tried_again(store: JobStore, outbox: Outbox) -> None:
    async with receiving(answering(200)) as receiver:
        pass
    assert (await refusal(store, outbox, receiver.url())).last_error == "The connection failed."


@pytest.mark.parametrize("url", ["http://h.example:99999/", "http://ex ample/", "http://[::1/", "http://-\u00ad.example/"])
async def test_a_url_that_leads_nowhere_is_a_failed_attempt(store: JobStore, outbox: Outbox, url: str) -> None:
    assert (await refusal(store, outbox, url)).last_error


async def test_an_absurdly_long_host_does_not_keep_its_job_from_ending(store: JobStore, outbox: Outbox) -> None:
    import random

    host = "".join(random.choices("abcdefghijklmnop0123456789", k=20_000))
    assert (await refusal(store, outbox, f"http://{host}/")).last_error


async def test_an_endless_answer_is_not_read(store: JobStore, outbox: Outbox) -> None:
    written = 0

    async def endless(_: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            await writer.drain()
            written += 0x10000

    async with receiving(endless) as receiver, couriers(outbox):
        webhook = await delivered(outbox, await ended(store, receiver.url()))
        assert webhook.last_status == 200
        async with asyncio.timeout(PATIENCE_S):
            await receiver.idle()
    assert written < 10_000_000  # what fits into the sockets' buffers


async def test_endless_headers_are_a_failed_attempt(store: JobStore, outbox: Outbox) -> None:
    async def endless(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"x: " + b"y" * 1000 + b"\r\n")
            await writer.drain()

    async with receiving(endless) as receiver:
        assert (await refusal(store, outbox, receiver.url())).last_error == "The connection failed."


async def silence(_: Received, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def test_a_receiver_that_says_nothing_is_given_up_in_time(store: JobStore, outbox: Outbox) -> None:
    quick = OPEN.model_copy(update={"webhooks": LIMITS.model_copy(update={"timeout_s": 0.3})})
    async with receiving(silence) as receiver:
        webhook = await refusal(store, outbox, receiver.url(), quick)
        [attempt] = await outbox.attempts(webhook.job_id)
    assert webhook.last_error == "No answer within 0.3 s."
    assert 0.3 <= attempt.duration_s < PATIENCE_S


async def test_a_dead_receiver_delays_no_other_and_holds_no_more_than_its_share(store: JobStore, outbox: Outbox) -> None:
    async with receiving(silence) as dead, receiving(answering(200)) as alive:
        for _ in range(20):
            await ended(store, dead.url())
        waiting = [await ended(store, alive.url()) for _ in range(6)]
        patient = WebhookSettings(timeout_s=30, max_in_flight=6, max_per_receiver=4)
        async with couriers(outbox, settings=OPEN.model_copy(update={"webhooks": patient})):
            for job_id in waiting:
                await delivered(outbox, job_id)  # none of them waits for one of the five timeouts in a row
            await dead.arrival(4)
            await asyncio.sleep(0.1)
            assert len(dead.received) == dead.peak == 4
            for task in asyncio.all_tasks():  # so that the test does not wait for the grace period
                if "_deliver" in repr(task):
                    task.cancel()


async def test_names_that_resolve_slowly_delay_no_other(store: JobStore, outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    look_up, go_on = socket.getaddrinfo, threading.Event()

    def getaddrinfo(host: str, *args: Any, **kwargs: Any) -> Any:
        if host.endswith("slow.example"):
            assert go_on.wait(PATIENCE_S)
        return look_up(host if not host.endswith("slow.example") else "127.0.0.1", *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    async with receiving(answering(200)) as receiver:
        for n in range(40):
            await ended(store, receiver.url(host=f"{n}.slow.example"))
        async with couriers(outbox):
            try:
                await delivered(outbox, await ended(store, receiver.url()))
            finally:
                go_on.set()
            await receiver.arrival(41)


# Couriers that die, and several of them


async def test_two_couriers_deliver_each_webhook_once(store: JobStore, outbox: Outbox, database: str) -> None:
    other = await JobStore.open(database)
    async with receiving(answering(200)) as receiver:
        jobs = [await ended(store, receiver.url(host=f"127.0.0.{n % 3 + 1}" if n % 3 == 0 else "localhost")) for n in range(40)]
        async with couriers(outbox, Outbox(other.database)):
            for job_id in jobs:
                await delivered(outbox, job_id)
    await other.close()
    assert sorted(request.request_id for request in receiver.received) == sorted(map(str, jobs))


async def test_the_webhook_of_a_courier_that_died_is_sent_by_another(store: JobStore, outbox: Outbox, database: str) -> None:
    async with receiving(answering(200)) as receiver:
        job_id = await ended(store, receiver.url())
        [lost] = await outbox.claim(10, 4, 10, 600)
        assert await outbox.keep_body(lost, b'{"first":"word"}') is not None
        assert not await outbox.claim(10, 4, 10, 60), "it is held"
        await execute(database, "UPDATE webhook_outbox SET lease_until = now(), next_attempt_at = now()")
        async with couriers(outbox):
            await delivered(outbox, job_id)
        assert await outbox.keep_body(lost, b"{}") is None, "a late write changes nothing"
        await outbox.finish(lost, 500, "late", 1.0, 5.0)
        assert (await read(outbox, job_id)).status == "delivered"
    assert receiver.received[0].body == b'{"first":"word"}'
    assert [attempt.attempt for attempt in await outbox.attempts(job_id)] == [2]


async def test_a_courier_that_stops_lets_an_attempt_end(store: JobStore, outbox: Outbox) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(_: Received, writer: asyncio.StreamWriter) -> None:
        begun.set()
        await go_on.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    async with receiving(slow) as receiver:
        job_id = await ended(store, receiver.url())
        task = asyncio.create_task(courier_of(outbox, OPEN).run())
        await begun.wait()
        task.cancel()
        await asyncio.sleep(0.05)
        go_on.set()
        await asyncio.wait([task])
        assert task.cancelled()
        assert (await read(outbox, job_id)).status == "delivered"
    assert len(receiver.received) == 1


async def test_what_a_courier_that_stops_had_to_break_off_is_sent_again_at_once(
    store: JobStore, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier_module, "GRACE_S", 0.05)
    async with receiving(silence) as receiver:
        job_id = await ended(store, receiver.url())
        async with couriers(outbox):
            await receiver.arrival()
        assert (await read(outbox, job_id)).attempts == 0
        receiver.answer = answering(200)
        async with couriers(outbox):
            assert (await delivered(outbox, job_id)).attempts == 1
    first, second = receiver.received
    assert first.body == second.body


@pytest.mark.parametrize("trouble", [StoreAway, KeyError])
async def test_a_database_that_is_away_for_a_while_stops_nothing_nor_does_a_mistake_of_ours(
    store: JobStore, outbox: Outbox, monkeypatch: pytest.MonkeyPatch, trouble: type[Exception]
) -> None:
    monkeypatch.setattr(courier_module, "OUTAGE_PAUSE_S", 0.02)
    failures = {"claim": 2, "finish": 2} if trouble is StoreAway else {"claim": 2}
    fetch = outbox._fetch

    async def sometimes_away(name: str, *args: object) -> Any:
        if failures.get(name, 0):
            failures[name] -= 1
            raise trouble
        return await fetch(name, *args)

    monkeypatch.setattr(outbox, "_fetch", sometimes_away)
    async with receiving(answering(200)) as receiver, couriers(outbox):
        await delivered(outbox, await ended(store, receiver.url()))
    assert not any(failures.values())
    assert len(receiver.received) == 1, "what had arrived was not sent again"


async def test_connections_that_break_cost_no_webhook(store: JobStore, outbox: Outbox, database: str) -> None:
    async with receiving(answering(200)) as receiver, couriers(outbox):
        first = await ended(store, receiver.url())
        await delivered(outbox, first)
        ours = "pid <> pg_backend_pid() AND datname = current_database()"
        await execute(database, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {ours}")
        await delivered(outbox, await ended(store, receiver.url()))
    assert len(receiver.received) == 2


async def test_one_webhook_that_cannot_be_sent_does_not_keep_the_others(
    store: JobStore, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    render = courier_module.webhook_body

    def sometimes(job_id: UUID, *args: Any) -> bytes:
        if job_id == bad:
            raise RuntimeError("a mistake of ours")
        return render(job_id, *args)

    async with receiving(answering(200)) as receiver:
        bad, good = await ended(store, receiver.url()), await ended(store, receiver.url())
        monkeypatch.setattr(courier_module, "webhook_body", sometimes)
        async with couriers(outbox):
            await delivered(outbox, good)
            assert (await until(outbox, bad, tried(1))).last_error == "The webhook could not be sent."


# Keys


async def test_processes_that_begin_at_once_make_one_key(store: JobStore) -> None:
    keys = await asyncio.gather(*(Outbox(store.database).signing_key() for _ in range(8)))
    assert len(set(keys)) == 1
    assert await Outbox(store.database).published_keys() == [keys[0]]


async def test_a_new_key_is_known_before_it_signs_and_the_old_one_after(store: JobStore, outbox: Outbox, database: str) -> None:
    async def hours_pass(hours: int) -> None:
        interval = f"interval '{hours} hours'"
        await execute(
            database,
            f"UPDATE signing_keys SET created_at = created_at - {interval}, signs_from = signs_from - {interval},"
            f" retired_at = retired_at - {interval}",
        )

    old = await outbox.signing_key()
    cached = jwks(await outbox.published_keys())
    async with receiving(answering(200)) as receiver, couriers(outbox):
        new = await outbox.rotate_key()
        assert await outbox.published_keys() == [new, old]
        await delivered(outbox, await ended(store, receiver.url()))
        assert is_signed(receiver.received[-1], cached, time.time()), "signed with the key that receivers have cached"

        await hours_pass(26)
        await delivered(outbox, await ended(store, receiver.url()))
        assert await outbox.signing_key() == new
        published = jwks(await outbox.published_keys())
        assert not is_signed(receiver.received[-1], cached, time.time())
        assert is_signed(receiver.received[-1], published, time.time())
        assert is_signed(receiver.received[0], published, time.time()), "the old key is still published"

        await hours_pass(25)
        assert await outbox.published_keys() == [new]


async def test_a_stolen_key_is_gone_at_once(outbox: Outbox) -> None:
    stolen = await outbox.signing_key()
    waiting = await outbox.rotate_key()
    new = await outbox.rotate_key(overlap_s=0)
    assert await outbox.published_keys() == [new]
    assert await outbox.signing_key() == new not in (stolen, waiting)


async def test_rotations_at_once_leave_one_newest_key(outbox: Outbox) -> None:
    await asyncio.gather(*(outbox.rotate_key() for _ in range(5)))
    first = await outbox.signing_key()
    assert len(await outbox.published_keys()) == 6
    assert (await outbox.published_keys())[-1] == first


async def test_the_first_key_signs_even_if_it_was_made_by_a_rotation(outbox: Outbox) -> None:
    new = await outbox.rotate_key()
    assert await outbox.signing_key() != new
    assert len(await outbox.published_keys()) == 2
