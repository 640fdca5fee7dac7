"""What the database knows of uploads: whose they are, how much is reserved for them, and which of them are complete.

An upload is listed before the first of its bytes is stored, so one that is never finished is swept like any file whose time is
over, and so are its parts. Bytes are reserved before they are received: uploads that come at once cannot exceed a quota together.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from deployments.jobs.database import Database, load_statements
from engines.errors import Forbidden, TooManyRequests

logger = logging.getLogger(__name__)

QUERIES = load_statements("uploads.sql")
SETTLE_BATCH = 100


@dataclass(frozen=True)
class ListedFile:
    """A file that is served as its row says. owner: the key whose file it is; None where the service is open.

    access: fal's `initial_acl`; None: everybody who knows its URL may read it. size_bytes: as far as it counts for the owner's
    quota. unsettled: it was to be sent to the bucket itself, and nobody has looked yet whether it was.
    """

    owner: str | None
    content_type: str | None
    access: dict[str, Any] | None
    expires_at: datetime
    size_bytes: int
    unsettled: bool


@dataclass(frozen=True)
class Upload:
    """An upload whose time is not over. digest: of its bytes, once it is complete."""

    owner: str | None
    digest: bytes | None


class UploadIsOver(Forbidden):
    """The time of this upload is over."""


class UploadIsComplete(Forbidden):
    """This upload is complete, and a file does not change."""


class Uploads:
    """The uploads in a database. Files are named as in the file store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def begin(
        self,
        name: str,
        *,
        owner: str | None,
        content_type: str,
        open_s: float,
        keep_s: float | None,
        access: dict[str, Any] | None,
        quota: int | None,
        size: int = 0,
        arriving: str | None = None,
    ) -> None:
        """Lists an upload. It must be complete in `open_s` seconds, and is then kept for `keep_s`; None: for ever.

        quota: the most bytes that its owner may have; None: any number. size: bytes to reserve already. arriving: the name under
        which it is sent to the bucket itself; what is there is deleted in the end. Raises `TooManyRequests`.
        """

        args = (name, open_s, owner, content_type, access, keep_s, size, quota, arriving)
        if not (await self._fetch("begin_upload", *args))[0]["is_allowed"]:
            raise _over_quota(quota)

    async def find(self, name: str) -> Upload | None:
        """An upload, as long as its time is not over."""
        rows = await self._fetch("find_upload", name)
        return Upload(**rows[0]) if rows else None

    async def reserve(self, name: str, piece: str, size: int, *, max_bytes: int, quota: int | None) -> bytes | None:
        """Reserves bytes for an upload. piece: its own name, or that of one of its parts. max_bytes: of the whole upload.

        Returns the digest of the upload if it is complete already; nothing is reserved then. Raises `TooManyRequests` if they
        exceed its owner's quota, and `Forbidden` if they exceed the upload's size or its time is over.
        """
        row = (await self._fetch("reserve_upload", name, piece, size, max_bytes, quota))[0]
        if row["refusal"] == "over":
            raise UploadIsOver
        if row["refusal"] == "size":
            raise Forbidden(f"This upload may have {max_bytes} bytes.")
        if row["refusal"] == "quota":
            raise _over_quota(quota)
        digest: bytes | None = row["digest"]
        return digest

    async def release(self, piece: str) -> None:
        """What was reserved for an upload or a part is not needed: it has failed."""
        await self._fetch("release", piece)

    async def finish_part(self, part: str, digest: bytes, size: int) -> bool:
        """A part has been stored. False: its upload's time is over."""
        return bool(await self._fetch("finish_part", part, digest, size))

    async def finish_parts(
        self, name: str, digest: bytes, parts: Sequence[str], digests: Sequence[bytes], exact: int | None
    ) -> int | None:
        """An upload is complete, with these parts in this order; none is taken any more. They stay until `drop_parts`.

        digest: of the list. exact: the size in bytes that it must have. Returns None, also when it was completed with this list
        before, or the index of the first part that has not been stored with its digest. Raises `UploadIsOver`,
        `UploadIsComplete` if it was completed with another list, `Forbidden` for another size.
        """
        refusal = (await self._fetch("finish_parts", name, digest, exact, parts, digests))[0]["refusal"]
        if refusal == "over":
            raise UploadIsOver
        if refusal == "complete":
            raise UploadIsComplete
        if refusal == "size":
            raise Forbidden(f"This upload is of {exact} bytes.")
        return None if refusal is None else int(refusal) - 1

    async def part_sizes(self, name: str) -> dict[str, int]:
        """The parts that have been stored of an upload: name -> size in bytes."""
        return {row["name"]: row["size_bytes"] for row in await self._fetch("parts", name)}

    async def drop_parts(self, name: str) -> None:
        """The file is there, so its parts are not needed."""
        await self._fetch("drop_parts", name)

    async def finish(self, name: str, digest: bytes, size: int) -> bool:
        """An upload is complete. False: its time was over, or it was complete with other bytes."""
        return bool(await self._fetch("finish_upload", name, digest, size))

    async def file(self, name: str) -> ListedFile | None:
        """What is known of a file, as long as its time is not over."""
        rows = await self._fetch("find_file", name)
        return ListedFile(**rows[0]) if rows else None

    async def settle(self, name: str, size: int, reserved: int) -> bool:
        """Ends an upload to the bucket: it is complete with `size` bytes, or given up if those are too many."""
        if size > reserved:
            await self._fetch("give_up_direct", name)
            return False
        await self._fetch("settle_direct", name, size)
        return True

    async def settle_direct(self, take_in: Callable[[str, int], Awaitable[int | None]]) -> None:
        """Ends those that have arrived, and those whose time is over; `SETTLE_BATCH` at most.

        take_in: makes a file of what has arrived for this name, if it has at most so many bytes, and returns its size; None:
        nothing has. If it raises, the upload is looked up again later.
        """
        for row in await self._fetch("open_direct", SETTLE_BATCH):
            name, reserved = row["name"], row["size_bytes"]
            try:
                size = await take_in(name, reserved)
            except Exception:
                logger.warning("an upload could not be looked up", exc_info=True, extra={"action": "expiry", "file": name})
                continue
            if size is not None:
                await self.settle(name, size, reserved)
            elif row["is_over"]:
                await self._fetch("give_up_direct", name)

    async def _fetch(self, query: str, *args: object) -> list[Any]:
        return await self._database.fetch(QUERIES[query], *args)


def _over_quota(quota: int | None) -> TooManyRequests:
    return TooManyRequests(f"This key's files would have more than {quota} bytes.")
