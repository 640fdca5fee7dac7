"""What became of a key's jobs, newest end first."""

from deployments.jobs.database import QUERIES, Database
from deployments.schemas.catalogue import Ended, HistoryQuery
from deployments.schemas.failures import Failure


async def history(database: Database, owner: str | None, asked: HistoryQuery) -> list[Ended]:
    """The owner's jobs that have ended, one more than were asked for if there are so many."""
    at, after = asked.after or (None, None)
    rows = await database.fetch(
        QUERIES["history"],
        owner,
        asked.endpoint,
        asked.start,
        asked.end,
        asked.statuses,
        asked.request_id,
        at,
        after,
        asked.limit + 1,
        asked.payloads,
    )
    return [Ended(**{**row, "failure": row["failure"] and Failure(**row["failure"])}) for row in rows]
