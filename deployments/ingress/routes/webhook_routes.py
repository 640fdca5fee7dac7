"""/webhooks/deliveries: a caller's webhooks, to look at and to send again."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from deployments.ingress.access import caller_of, webhook_of
from deployments.ingress.request_context import TextRoute, UnknownRequest, outbox_of
from deployments.jobs.keys import Scope
from deployments.webhooks import listing

router = APIRouter(prefix="/webhooks/deliveries", tags=["webhooks"], route_class=TextRoute)


@router.get("")
async def list_webhooks(request: Request, since: str = "", cursor: str = "", limit: str = "50") -> Response:
    """The caller's webhooks, oldest first, e.g. for a receiver that was down. A webhook appears seconds after its job's end.

    since: list jobs that ended at or after this time, in ISO 8601 or seconds since 1970. cursor: the `next_cursor` of the
    previous page, which stays valid; `since` is ignored with it. limit: 1 to 100.
    """
    caller = await caller_of(request)
    caller.require(Scope.READ)
    after = listing.start(since, cursor)
    page = await outbox_of(request).page(caller.owner, after, listing.limit(limit))
    return JSONResponse(listing.page(page, after))


@router.get("/{request_id}")
async def webhook(request: Request, request_id: str) -> Response:
    """A request's webhook and the log of its attempts."""
    found = await webhook_of(request, request_id, Scope.READ)
    return JSONResponse(listing.entry(found) | {"log": listing.log(await outbox_of(request).attempts(found.job_id))})


@router.post("/{request_id}/redeliver", status_code=202)
async def redeliver(request: Request, request_id: str) -> Response:
    """Sends a webhook again, even if it was delivered, with all its retries."""
    found = await webhook_of(request, request_id, Scope.SUBMIT)
    if not await outbox_of(request).redeliver(found.job_id):
        raise UnknownRequest
    return JSONResponse({"status": "REDELIVERY_REQUESTED"}, 202)
