-- Every statement of the job store. Times are the database's: now() is when the statement began, so a lease never
-- outlasts what was asked for and never seems to have ended early.

-- name: submit
-- One durable job at the end of its owner's line: its turn follows the owner's last, or is the one being served. Where
-- nothing waits, running jobs tell the turn, so that one of them that comes back keeps its place. Says nothing if the id is
-- taken: the caller has lost the answer and asks again.
INSERT INTO jobs (id, endpoint, owner, priority, input, start_by, max_attempts, webhook_url, service_url, state, turn)
SELECT $1, $2, $3, $4, $5, now() + make_interval(secs => $6), $7, $8, $9, 'queued', greatest(
    coalesce(
        (SELECT min(turn) FROM jobs WHERE state = 'queued' AND endpoint = $2 AND priority = $4),
        (SELECT max(turn) FROM jobs WHERE state = 'running' AND endpoint = $2 AND priority = $4),
        0
    ),
    (SELECT max(turn) + 1 FROM jobs
     WHERE state = 'queued' AND endpoint = $2 AND priority = $4 AND coalesce(owner, '') = coalesce($3, ''))
)
ON CONFLICT (id) DO NOTHING
RETURNING id, endpoint, owner, state, created_at, started_at, finished_at, attempt, cancel_requested, result, failure, metrics,
    priority, turn, number, jobs_ahead(endpoint, priority, turn, number) AS ahead

-- name: submit_failed
-- Closes a job that was submitted in the same transaction.
UPDATE jobs SET state = 'failed', failure = $2 WHERE id = $1 AND state = 'queued'

-- name: get
-- What a caller may see. The input stays behind: it may be megabytes, and this is what clients poll.
SELECT id, endpoint, owner, state, created_at, started_at, finished_at, attempt, cancel_requested, result, failure, metrics,
    priority, turn, number, CASE WHEN state = 'queued' THEN jobs_ahead(endpoint, priority, turn, number) END AS ahead
FROM jobs WHERE id = $1

-- name: marks
-- Every thousandth job in line, from the first: what tells a place beyond where `jobs_ahead` counts.
SELECT priority, turn, number FROM (
    SELECT priority, turn, number, row_number() OVER (ORDER BY priority, turn, number) AS place
    FROM jobs WHERE state = 'queued' AND endpoint = $1
) AS line
WHERE place % 1000 = 1 ORDER BY place

-- name: logs
-- The lines after one already seen.
SELECT seq, at, level, message FROM job_logs WHERE job_id = $1 AND seq > $2 ORDER BY seq

-- name: request_cancel
-- A queued job ends here; a running one is flagged, and whoever watches it is told. Answers the state that was found.
WITH found AS (
    SELECT id, state FROM jobs WHERE id = $1 FOR UPDATE
), changed AS (
    UPDATE jobs SET
        cancel_requested = true,
        state = CASE found.state WHEN 'queued' THEN 'cancelled' ELSE found.state END,
        failure = CASE found.state WHEN 'queued' THEN $2::json END,
        reason = NULL
    FROM found WHERE jobs.id = found.id AND found.state IN ('queued', 'running')
)
SELECT state, pg_notify('reelray', id::text) FROM found

-- name: queued
-- How many wait, counted no further than $2 (null: all).
SELECT count(*) FROM (SELECT FROM jobs WHERE state = 'queued' AND endpoint = $1 LIMIT $2) AS waiting

-- name: claim
-- The first job of each endpoint that nobody else is taking, and of those the most urgent, then the oldest.
UPDATE jobs SET
    state = 'running',
    attempt = attempt + 1,
    token = $2,
    started_at = now(),
    lease_until = now() + make_interval(secs => $3),
    reason = NULL
WHERE id = (
    SELECT head.id FROM unnest($1::text[]) AS served (endpoint)
    CROSS JOIN LATERAL (
        SELECT id, priority, number FROM jobs
        WHERE state = 'queued' AND endpoint = served.endpoint AND (start_by IS NULL OR start_by > now())
        ORDER BY priority, turn, number LIMIT 1
        FOR UPDATE SKIP LOCKED
    ) AS head
    ORDER BY head.priority, head.number LIMIT 1
)
RETURNING id AS job_id, token, endpoint, input, attempt, max_attempts

-- name: heartbeat
-- Extends the lease. Not flushed to disk: a heartbeat that a crash undoes only makes the lease end a little earlier.
WITH relaxed AS (SELECT set_config('synchronous_commit', 'off', true))
UPDATE jobs SET lease_until = now() + make_interval(secs => $3) FROM relaxed
WHERE id = $1 AND token = $2 AND state = 'running'
RETURNING cancel_requested

-- name: log
-- Adds a line. The lock keeps the attempt from ending under it, and makes the order of `seq` the order of commits, so that a
-- reader who asks for the lines after one misses none. Not flushed to disk: a crash may cost the last lines, never a job.
WITH relaxed AS (
    SELECT set_config('synchronous_commit', 'off', true)
), attempt AS (
    SELECT id FROM jobs, relaxed WHERE id = $1 AND token = $2 AND state = 'running' FOR NO KEY UPDATE OF jobs
), line AS (
    INSERT INTO job_logs (job_id, level, message) SELECT id, $3, $4 FROM attempt RETURNING job_id
)
SELECT pg_notify('reelray', job_id::text) FROM line

-- name: close
-- Ends a job with its outcome; answers a row also to the same attempt that asks again because it lost the answer.
WITH closed AS (
    UPDATE jobs SET state = $3, result = $4, failure = $5, metrics = $6, reason = NULL
    WHERE id = $1 AND token = $2 AND state = 'running'
    RETURNING id
)
SELECT id FROM closed UNION ALL SELECT id FROM jobs WHERE id = $1 AND token = $2 AND state = $3

-- name: requeue
-- Gives a job back, to go where a lost attempt goes; $5 holds the failures by state. Answers as `close` does.
WITH returned AS (
    UPDATE jobs SET
        state = jobs_after_lost_attempt(cancel_requested, attempt, max_attempts, $4),
        failure = $5::json -> jobs_after_lost_attempt(cancel_requested, attempt, max_attempts, $4),
        attempt = CASE WHEN $4 THEN attempt ELSE attempt - 1 END,
        reason = $3
    WHERE id = $1 AND token = $2 AND state = 'running'
    RETURNING id
)
SELECT id FROM returned UNION ALL SELECT id FROM jobs WHERE id = $1 AND token = $2 AND state = 'queued'

-- name: sweep_leases
-- Takes jobs from workers that fell silent; $1 holds the failures by state. A job that somebody else is just writing is left
-- for the next sweep. The token goes: whatever that worker still has to say comes too late.
WITH due AS (
    SELECT id FROM jobs WHERE state = 'running' AND lease_until < now() LIMIT 1000 FOR UPDATE SKIP LOCKED
)
UPDATE jobs SET
    state = jobs_after_lost_attempt(cancel_requested, attempt, max_attempts, true),
    failure = $1::json -> jobs_after_lost_attempt(cancel_requested, attempt, max_attempts, true),
    token = NULL,
    reason = 'lease expired'
FROM due WHERE jobs.id = due.id
RETURNING jobs.id

-- name: sweep_deadlines
-- Fails jobs that have waited longer than their callers wanted to.
WITH due AS (
    SELECT id FROM jobs WHERE state = 'queued' AND start_by <= now() LIMIT 1000 FOR UPDATE SKIP LOCKED
)
UPDATE jobs SET state = 'failed', failure = $1, reason = 'start deadline passed' FROM due WHERE jobs.id = due.id
RETURNING jobs.id

-- name: create_key
-- Says nothing if the id is taken, see `submit`.
INSERT INTO api_keys (id, name, hash) VALUES ($1, $2, $3) ON CONFLICT (id) DO NOTHING

-- name: list_keys
-- Revoked ones included.
SELECT id, name, created_at, revoked_at FROM api_keys ORDER BY created_at, id

-- name: revoke_key
-- A key stays listed after its end.
UPDATE api_keys SET revoked_at = now() WHERE id = $1 AND revoked_at IS NULL RETURNING id

-- name: owner_of
-- The key that this is the hash of.
SELECT id FROM api_keys WHERE hash = $1 AND revoked_at IS NULL
