import re
from uuid import uuid4

import asyncpg

from deployments.jobs.database import SQL
from deployments.jobs.listener import CHANNEL, WEBHOOKS, WORK, job_subject, lines_subject


async def test_what_the_sql_notifies_of_is_what_python_listens_for(sql: asyncpg.Connection) -> None:
    """Evaluates the channel of every `pg_notify` in `sql/` for a job, in functions (`NEW`) and statements (`id`, `job_id`)."""
    text = "".join(file.read_text() for file in SQL.iterdir() if file.name.endswith(".sql"))
    calls = re.findall(r"pg_notify\('(\w+)', ([^()]+)\)", text)
    assert len(calls) == text.count("pg_notify(")
    job_id = uuid4()
    subjects = {WORK, WEBHOOKS, job_subject(job_id), lines_subject(job_id)}
    notified = {
        await sql.fetchval(f"SELECT {subject} FROM (SELECT $1::uuid AS id, $1::uuid AS job_id) AS new", job_id)
        for _, subject in calls
    }
    assert {channel for channel, _ in calls} == {CHANNEL}
    assert notified == subjects
