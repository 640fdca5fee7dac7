"""Delivers the webhook outbox: at least once, by any number of couriers. No owner and no receiver waits because another is slow.

Any 2xx acknowledges a webhook; after anything else it is tried again, ten times in about two hours. So are refused addresses:
neither words nor behaviour show whether a name leads into the operator's network or nowhere. Bodies of answers are not read.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from deployments import metrics, tracing
from deployments.files.download import CONNECTION_ERRORS, Refused, new_client, send
from deployments.jobs.database import StoreAway
from deployments.webhooks.outbox import Delivery, Outbox
from deployments.webhooks.signing import signed_headers, webhook_body

logger = logging.getLogger(__name__)

RETRIES = 10
FIRST_RETRY_S = 7.0
"""Doubled from retry to retry: the tenth comes 7 s * (2^10 - 1), which is two hours, after the first attempt."""
JITTER = 0.2
"""A delay varies by this share either way, so that deliveries that failed together are not all tried again at once."""
LEASE_S = 60.0
"""Longer than an attempt, even if the database is not available for a while before it."""
LOOK_S = 1.0
"""How often to look for retries that come due without a notification."""
GRACE_S = 5.0
"""How long a stopping courier lets its attempts end. One that is cut off may have arrived, and will be sent again."""
OUTAGE_PAUSE_S = 1.0


class DeliveryLimits(Protocol):
    """The operator's limits on deliveries; see `WebhookSettings`."""

    @property
    def timeout_s(self) -> float:
        """From looking up the receiver's name to the end of its answer's headers, in seconds."""
        ...

    @property
    def max_in_flight(self) -> int:
        """Concurrent deliveries of one courier."""
        ...

    @property
    def max_per_receiver(self) -> int:
        """Concurrent deliveries to one host and port for one owner, of all couriers together."""
        ...

    @property
    def max_per_owner(self) -> int:
        """Concurrent deliveries for one owner, of all couriers together."""
        ...


@dataclass(frozen=True)
class Outcome:
    """The result of an attempt, for its job's owner to read. error: None if it was acknowledged."""

    status: int | None
    error: str | None


def retry_delay_s(tries: int, jitter: float) -> float | None:
    """Seconds from a try that failed to the next; None after the last. tries: so far. jitter: -1 to 1."""
    return None if tries > RETRIES else FIRST_RETRY_S * 2 ** (tries - 1) * (1 + JITTER * jitter)


class Courier:
    """Delivers what is due in `outbox`.

    allow_private: also to addresses in the operator's own network. public_url: put before the URLs of files if the address that
    the job was submitted to is not known. clock: in seconds since 1970, for the signature.
    """

    def __init__(
        self,
        outbox: Outbox,
        limits: DeliveryLimits,
        *,
        allow_private: bool,
        public_url: str | None,
        clock: Callable[[], float] = time.time,
    ):
        self.outbox = outbox
        self.limits = limits
        self.allow_private = allow_private
        self.public_url = public_url
        self.clock = clock
        self._in_hand: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Delivers until cancelled."""
        async with asyncio.TaskGroup() as group, self.outbox.watch() as due:
            try:
                while True:
                    for delivery in await self._claim():
                        task = group.create_task(self._deliver(delivery))
                        self._in_hand.add(task)
                        task.add_done_callback(self._in_hand.discard)
                        task.add_done_callback(lambda _: due.tell())  # its receiver has room again
                    await due.changed(LOOK_S)
            except asyncio.CancelledError:
                if self._in_hand:
                    await asyncio.wait(self._in_hand, timeout=GRACE_S)
                raise

    async def _claim(self) -> list[Delivery]:
        limits = self.limits
        room = limits.max_in_flight - len(self._in_hand)
        try:
            return await self.outbox.claim(room, limits.max_per_receiver, limits.max_per_owner, LEASE_S) if room else []
        except Exception:  # nothing ends a courier
            logger.exception("no webhooks could be claimed", extra={"action": "webhook_claim_failed"})
            await asyncio.sleep(OUTAGE_PAUSE_S)
            return []

    async def _deliver(self, delivery: Delivery) -> None:
        """One attempt, from claim to log, in its job's trace."""
        with tracing.span("webhook", delivery.traceparent, **_fields(delivery, "webhook")):
            await self._try(delivery)

    async def _try(self, delivery: Delivery) -> None:
        began = time.monotonic()
        try:
            body = await self._settled_body(delivery)
            if body is None:
                return
            outcome = await self._attempt(delivery, body)
        except StoreAway:  # it is tried again when its lease ends, here or elsewhere
            logger.warning("webhook postponed", exc_info=True, extra=_fields(delivery, "webhook_put_off"))
            return
        except asyncio.CancelledError:
            with suppress(Exception):
                await self.outbox.release(delivery)
            raise
        except Exception:  # a bug of ours in one webhook must not hold up the others
            logger.exception("webhook not sent", extra=_fields(delivery, "webhook_error"))
            outcome = Outcome(None, "The webhook could not be sent.")
        if outcome.error is not None:
            logger.warning("webhook refused", extra=_fields(delivery, "webhook_refused") | {"error": outcome.error})
        duration_s, ended = time.monotonic() - began, "delivered" if outcome.error is None else "refused"
        tracing.note(ended)
        metrics.DELIVERIES.record(outcome=ended)
        metrics.DELIVERY.record(duration_s)
        await self._write_down(delivery, outcome, duration_s)

    async def _settled_body(self, delivery: Delivery) -> bytes | None:
        """What to send; None: another courier has taken the webhook over."""
        if delivery.body is not None:
            return delivery.body
        service_url = delivery.service_url or self.public_url or ""
        body = webhook_body(delivery.job_id, delivery.result, delivery.failure, service_url.rstrip("/"))
        return await self.outbox.keep_body(delivery, body)

    async def _attempt(self, delivery: Delivery, body: bytes) -> Outcome:
        key = await self.outbox.signing_key()
        headers = signed_headers(key, delivery.job_id, delivery.owner, body, int(self.clock()))
        if (traceparent := tracing.current()) is not None:
            headers["traceparent"] = traceparent
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                status = await self._post(delivery.url, headers, body)
        except TimeoutError:
            return Outcome(None, f"No answer within {self.limits.timeout_s:g} s.")
        except Refused as exc:
            return Outcome(None, str(exc))
        except CONNECTION_ERRORS:  # whose texts may name addresses
            return Outcome(None, "The connection failed.")
        if 200 <= status < 300:
            return Outcome(status, None)
        return Outcome(status, "Redirects are not followed." if 300 <= status < 400 else f"The receiver answered {status}.")

    async def _post(self, url: str, headers: dict[str, str], body: bytes) -> int:
        async with new_client() as client:
            response = await send(client, "POST", httpx.URL(url), headers, body, allow_private=self.allow_private)
            await response.aclose()
            return response.status_code

    async def _write_down(self, delivery: Delivery, outcome: Outcome, duration_s: float) -> None:
        retry_in_s = None if outcome.error is None else retry_delay_s(delivery.tries, random.uniform(-1, 1))
        while True:  # else a webhook that has arrived would be sent again
            try:
                await self.outbox.finish(delivery, outcome.status, outcome.error, duration_s, retry_in_s)
                return
            except StoreAway:
                logger.exception("the outcome of a webhook was not written", extra=_fields(delivery, "webhook_finish_failed"))
                await asyncio.sleep(OUTAGE_PAUSE_S)
            except Exception:  # it is sent again when its lease ends
                logger.exception("the outcome of a webhook was not written", extra=_fields(delivery, "webhook_finish_failed"))
                return


def _fields(delivery: Delivery, action: str) -> dict[str, Any]:
    return {"action": action, "job_id": str(delivery.job_id), "attempt": delivery.tries}
