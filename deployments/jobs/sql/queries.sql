-- Every statement of the job store. Times are the database's: now() is when the statement began, so a lease never
-- outlasts what was asked for and never seems to have ended early.

-- name: submit
-- One durable job at the end of its owner's line: its turn follows the owner's last, or is the one being served. Where
-- nothing waits, the turn is that of the running jobs, so that one of them that comes back keeps its place. No row if the id is
-- taken: the answer was lost and the call is repeated. No row either if the caller's idempotency key $9 already stands for a job, see
-- `repeated`. A key is free again when its time is over, or for another body if its own was no valid input ($12). The input's files
-- ($16) now stay until the job ends; $17 are the first lines of its log. $18: the version of the schemas that accepted the input.
WITH kept AS (
    INSERT INTO idempotency_keys AS taken (owner, key, fingerprint, job_id, expires_at, rejected)
    SELECT coalesce($3, ''), $9, $10::bytea, $1, now() + make_interval(secs => $11), $12
    WHERE $9::text IS NOT NULL
    ON CONFLICT (owner, key) DO UPDATE SET
        fingerprint = excluded.fingerprint,
        job_id = excluded.job_id,
        expires_at = excluded.expires_at,
        rejected = excluded.rejected
    WHERE taken.expires_at <= now() OR (taken.rejected AND taken.fingerprint <> excluded.fingerprint)
    RETURNING job_id
), fresh AS (
    SELECT WHERE ($9::text IS NULL OR EXISTS (SELECT FROM kept)) AND NOT EXISTS (SELECT FROM jobs WHERE id = $1)
), held AS (
    UPDATE stored_files SET expires_at = 'infinity' FROM fresh WHERE name = ANY ($16::text[])
), noted AS (
    INSERT INTO job_logs (job_id, level, message) SELECT $1, 'WARN', note FROM fresh CROSS JOIN unnest($17::text[]) AS note
)
INSERT INTO jobs (
    id, endpoint, owner, priority, input, start_by, max_attempts, webhook_url, files_s, store_io, service_url, input_files,
    input_version, retries, files_access, traceparent, units, parallel, state, turn
)
SELECT $1, $2, $3, $4, $5, now() + make_interval(secs => $6), $7, $8, $13, $14, $15, $16, $18, $19, $20, $21, $22, $23, 'queued', greatest(
    coalesce(
        least(
            (SELECT min(turn) FROM jobs WHERE state = 'queued' AND not_before IS NULL AND endpoint = $2 AND priority = $4),
            (SELECT min(turn) FROM jobs WHERE state = 'queued' AND not_before IS NOT NULL AND endpoint = $2 AND priority = $4)
        ),
        (SELECT max(turn) FROM jobs WHERE state = 'running' AND endpoint = $2 AND priority = $4),
        0
    ),
    (SELECT max(turn) + 1 FROM jobs
     WHERE state = 'queued' AND endpoint = $2 AND priority = $4 AND coalesce(owner, '') = coalesce($3, ''))
)
FROM fresh
ON CONFLICT (id) DO NOTHING
RETURNING id, endpoint, owner, state, created_at, started_at, finished_at, attempt, cancel_requested, result, failure, metrics,
    priority, turn, number, traceparent, (SELECT ahead FROM jobs_ahead(endpoint, priority, turn, number)) AS ahead

-- name: repeated
-- The job that an idempotency key stands for, and whether it was given with the same body. No row if the key is free, see `submit`.
SELECT job_id, fingerprint = $3 AS same FROM idempotency_keys
WHERE owner = coalesce($1, '') AND key = $2 AND expires_at > now() AND (fingerprint = $3 OR NOT rejected)

-- name: sweep_keys
-- Forgets idempotency keys whose time is over, except one that is just being used again: its row is locked.
DELETE FROM idempotency_keys WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM idempotency_keys WHERE expires_at <= now() LIMIT 1000 FOR UPDATE SKIP LOCKED
))

-- name: submit_failed
-- Closes a job that was submitted in the same transaction.
UPDATE jobs SET state = 'failed', failure = $2 WHERE id = $1 AND state = 'queued'

-- name: get
-- What callers may see of some jobs, each with its lines after one already seen ($2; null: without). The input is left out: it may be
-- megabytes, and clients poll this. Of the jobs ahead it counts no more than 200, so a status costs the same in any queue.
SELECT place, jobs.id, endpoint, owner, state, created_at, started_at, finished_at, attempt, cancel_requested, result, failure, metrics,
    priority, turn, number, traceparent,
    CASE WHEN state = 'queued' THEN (SELECT ahead FROM jobs_ahead(endpoint, priority, turn, number)) END AS ahead,
    CASE WHEN after IS NOT NULL THEN ARRAY(
        SELECT ROW(seq, at, level, message, progress) FROM job_logs WHERE job_id = jobs.id AND seq > after ORDER BY seq
    ) END AS lines
FROM unnest($1::uuid[], $2::bigint[]) WITH ORDINALITY AS asked (id, after, place) JOIN jobs ON jobs.id = asked.id

-- name: marks
-- Every 200th job in line, beginning with the first: they tell a position beyond the 200 that `jobs_ahead` counts.
SELECT priority, turn, number FROM (
    SELECT priority, turn, number, row_number() OVER (ORDER BY priority, turn, number) AS place
    FROM jobs WHERE state = 'queued' AND not_before IS NULL AND endpoint = $1
) AS line
WHERE place % 200 = 1 ORDER BY place

-- name: request_cancel
-- Cancels a queued job, or marks a running one and notifies those who watch it. Returns the state that was found.
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
-- Starts an attempt at the next job. The function explains which job that is, and what a row of nulls means. The first attempt lists
-- the job's checkpoint among the stored files, so that it is deleted after the job's end.
WITH claimed AS (
    SELECT * FROM claim_job($1, $2, $3, $4, $5, $6)
), noted AS (
    INSERT INTO stored_files (name, expires_at) SELECT checkpoint_name(id), 'infinity' FROM claimed WHERE id IS NOT NULL
    ON CONFLICT (name) DO NOTHING RETURNING name
)
SELECT id AS job_id, token, endpoint, owner, input, input_version, priority, attempt, max_attempts, files_s, files_access,
    checkpoint_name(id) AS checkpoint,
    NOT EXISTS (SELECT FROM noted) AS resumes, lost_in, retries, created_at,
    -- a claim may have begun before the job that it finds was committed
    greatest(0, extract(epoch FROM started_at - created_at)::double precision) AS waited_s, traceparent
FROM claimed

-- name: claimed
-- What a claim with this token took.
SELECT id FROM jobs WHERE state = 'running' AND token = $1

-- name: heartbeat
-- Extends the lease. Not flushed to disk: a heartbeat that a crash undoes only makes the lease end a little earlier.
WITH relaxed AS (SELECT set_config('synchronous_commit', 'off', true))
UPDATE jobs SET lease_until = now() + make_interval(secs => $3) FROM relaxed
WHERE id = $1 AND token = $2 AND state = 'running'
RETURNING cancel_requested

-- name: log
-- Adds a line unless the log is full, and returns whether it did; also true of a repeated line, which is not added again. The lock keeps the attempt from ending meanwhile, and makes the
-- order of `seq` the order of commits, so a reader who asks for the lines after one misses none. The line is on disk before anyone
-- reads it: if a crash lost lines, others would get their numbers, and readers who have seen those numbers would miss them.
WITH attempt AS (
    SELECT id FROM jobs WHERE id = $1 AND token = $2 AND state = 'running' FOR NO KEY UPDATE
), line AS (
    INSERT INTO job_logs (job_id, level, message, progress, line_id) SELECT id, $3, $4, $5, $6 FROM attempt RETURNING job_id
), told AS (
    SELECT job_id, pg_notify('reelray', 'lines ' || job_id) FROM line
)
SELECT told.job_id IS NOT NULL OR NOT EXISTS (SELECT FROM job_logs WHERE job_id = attempt.id AND seq > 2000) AS added
FROM attempt LEFT JOIN told ON told.job_id = attempt.id

-- name: close
-- Ends a job with its outcome. Returns a row also when the same attempt repeats the call because the answer was lost.
WITH closed AS (
    UPDATE jobs SET state = $3, result = $4, failure = $5, metrics = $6, reason = NULL
    WHERE id = $1 AND token = $2 AND state = 'running'
    RETURNING id
)
SELECT id FROM closed UNION ALL SELECT id FROM jobs WHERE id = $1 AND token = $2 AND state = $3

-- name: requeue
-- Gives a job back: its next state is that after a lost attempt ($5 holds the failures by state), and it is not tried again for $6
-- seconds. $7: where its attempts were lost, if that has changed; $8: which retries are left, likewise. A job whose attempt does not count (not $4) has met its start deadline, whenever it goes on. Returns rows as `close` does.
WITH returned AS (
    UPDATE jobs SET
        state = jobs_after_lost_attempt(cancel_requested, attempt, max_attempts, $4, NULL),
        failure = $5::json -> jobs_after_lost_attempt(cancel_requested, attempt, max_attempts, $4, NULL),
        attempt = CASE WHEN $4 THEN attempt ELSE attempt - 1 END,
        start_by = CASE WHEN $4 THEN start_by END,
        not_before = CASE WHEN $6 > 0 THEN now() + make_interval(secs => $6) END,
        lost_in = coalesce($7, lost_in),
        retries = coalesce($8, retries),
        reason = $3
    WHERE id = $1 AND token = $2 AND state = 'running'
    RETURNING id
)
SELECT id FROM returned UNION ALL SELECT id FROM jobs WHERE id = $1 AND token = $2 AND state = 'queued'

-- name: sweep_leases
-- Takes jobs from workers that fell silent; $1 holds the failures by state, and as `overran` that of a job which its worker
-- should have ended. A job whose row is locked is left for the next sweep. The token is removed, so whatever that worker still
-- writes has no effect.
WITH due AS (
    SELECT
        id,
        run_by <= now() AND NOT cancel_requested AS overran,
        jobs_after_lost_attempt(cancel_requested, attempt, max_attempts, true, left_after_lost_lease(retries)) AS next
    FROM jobs WHERE state = 'running' AND lease_until < now() LIMIT 1000 FOR UPDATE SKIP LOCKED
)
UPDATE jobs SET
    state = CASE WHEN due.overran THEN 'failed' ELSE due.next END,
    failure = $1::json -> CASE WHEN due.overran THEN 'overran' ELSE due.next END,
    token = NULL,
    retries = retries_after_lost_lease(retries),
    reason = CASE WHEN due.overran THEN 'run deadline passed' ELSE 'lease expired' END
FROM due WHERE jobs.id = due.id
RETURNING jobs.id

-- name: sweep_deadlines
-- Fails jobs that have waited longer than their callers wanted to.
WITH due AS (
    SELECT id FROM jobs WHERE state = 'queued' AND start_by <= now() LIMIT 1000 FOR UPDATE SKIP LOCKED
)
UPDATE jobs SET state = 'failed', failure = $1, reason = 'start deadline passed' FROM due WHERE jobs.id = due.id
RETURNING jobs.id

-- name: sweep_delays
-- Returns jobs that have waited long enough for their next attempt to their places in the order.
WITH due AS (
    SELECT id FROM jobs WHERE state = 'queued' AND not_before <= now() LIMIT 1000 FOR UPDATE SKIP LOCKED
), returned AS (
    UPDATE jobs SET not_before = NULL FROM due WHERE jobs.id = due.id RETURNING jobs.id
)
SELECT pg_notify('reelray', 'work') FROM returned LIMIT 1

-- name: add_file
-- A file that is about to be written ($2 null: it is kept for ever). A repeated call has no effect, because names are not used twice.
INSERT INTO stored_files (name, expires_at, owner, size_bytes, content_type, access)
VALUES ($1, coalesce(now() + make_interval(secs => $2), 'infinity'), $3, $4, $5, $6)
ON CONFLICT (name) DO NOTHING

-- name: take_expired_files
-- Files whose time is over, for this process to delete: no other gets them within an hour. After that, those that could not be
-- deleted are tried again. No transaction stays open while files are deleted, however slow the file store is. Meanwhile they are
-- `gone` for all others.
UPDATE stored_files SET expires_at = now() + interval '1 hour', gone = true
WHERE name IN (
    SELECT name FROM stored_files WHERE expires_at <= now() AND NOT (direct AND digest IS NULL)
    ORDER BY expires_at LIMIT $1 FOR UPDATE SKIP LOCKED
)
RETURNING name

-- name: forget_files
-- Those that are gone.
DELETE FROM stored_files WHERE name = ANY ($1::text[])

-- name: expire_jobs
-- Deletes jobs that ended $1 seconds ago (null: none), with all that belongs to them; not while their webhook is still to be
-- delivered.
WITH due AS (
    SELECT id FROM jobs
    WHERE finished_at <= now() - make_interval(secs => $1)
        AND NOT EXISTS (SELECT FROM webhook_outbox WHERE job_id = jobs.id AND next_attempt_at IS NOT NULL)
    LIMIT $2 FOR UPDATE SKIP LOCKED
)
DELETE FROM jobs USING due WHERE jobs.id = due.id RETURNING jobs.id

-- name: expire_unstored_jobs
-- The same for those whose payloads are not to be stored: $1 seconds are for fetching the result.
WITH due AS (
    SELECT id FROM jobs
    WHERE NOT store_io AND finished_at <= now() - make_interval(secs => $1)
        AND NOT EXISTS (SELECT FROM webhook_outbox WHERE job_id = jobs.id AND next_attempt_at IS NOT NULL)
    LIMIT $2 FOR UPDATE SKIP LOCKED
)
DELETE FROM jobs USING due WHERE jobs.id = due.id RETURNING jobs.id

-- name: pause
-- From its commit on no job of the endpoint is claimed. A repeated pause does not change when it began.
INSERT INTO paused_endpoints (endpoint) VALUES ($1) ON CONFLICT (endpoint) DO NOTHING

-- name: resume
-- Ends a pause, if there is one, and notifies those who wait for work.
WITH resumed AS (DELETE FROM paused_endpoints WHERE endpoint = $1 RETURNING endpoint)
SELECT endpoint, pg_notify('reelray', 'work') FROM resumed

-- name: queue_status
-- One endpoint, for its operator.
SELECT
    (SELECT count(*) FROM jobs WHERE state = 'queued' AND endpoint = $1) AS queued,
    (SELECT count(*) FROM jobs WHERE state = 'queued' AND not_before IS NOT NULL AND endpoint = $1) AS delayed,
    (SELECT count(*) FROM jobs WHERE state = 'running' AND endpoint = $1) AS running,
    (SELECT paused_at FROM paused_endpoints WHERE endpoint = $1) AS paused_at

-- name: queue_gauges
-- Every endpoint of $1, for its metrics: how many jobs wait and run, and for how long the first of those that wait has waited. Counting
-- takes 50 ms per million jobs.
SELECT served.endpoint, counted.queued, counted.delayed, counted.running, counted.oldest_s,
    EXISTS (SELECT FROM paused_endpoints WHERE paused_endpoints.endpoint = served.endpoint) AS paused
FROM unnest($1::text[]) AS served (endpoint) CROSS JOIN LATERAL (
    SELECT
        count(*) FILTER (WHERE state = 'queued') AS queued,
        count(*) FILTER (WHERE state = 'queued' AND not_before IS NOT NULL) AS delayed,
        count(*) FILTER (WHERE state = 'running') AS running,
        coalesce(extract(epoch FROM now() - min(created_at) FILTER (WHERE state = 'queued')), 0)::double precision AS oldest_s
    FROM jobs WHERE endpoint = served.endpoint AND state IN ('queued', 'running')
) AS counted

-- name: timeline
-- Every state of a job, in order.
SELECT at, state, attempt, reason FROM job_events WHERE job_id = $1 ORDER BY id

-- name: recent
-- The newest jobs: ids begin with the time of their submission, so the primary key has them in that order. With a filter ($2, $3;
-- null: none) it reads back as far as it must, through the whole index if too few jobs match (a second per million jobs).
SELECT id, endpoint, state, created_at, attempt, max_attempts FROM jobs
WHERE ($2::text IS NULL OR endpoint = $2) AND ($3::text IS NULL OR state = $3)
ORDER BY id DESC LIMIT $1

-- name: history
-- Jobs of one owner and endpoint that ended within a time, newest end first, after a place in that order ($7, $8; null: from the
-- beginning). $5: how they ended (null: anyhow). $10: with their payloads.
SELECT id, endpoint, created_at, started_at, finished_at, failure,
    CASE WHEN $10::boolean THEN input END AS input, CASE WHEN $10::boolean THEN result END AS result
FROM jobs
WHERE finished_at IS NOT NULL AND coalesce(owner, '') = coalesce($1, '') AND endpoint = $2 AND finished_at >= $3 AND finished_at < $4
    AND ($5::text[] IS NULL OR CASE
        WHEN failure IS NULL THEN 'success' WHEN (failure ->> 'status')::integer >= 500 THEN 'error' ELSE 'user_error'
    END = ANY ($5::text[]))
    AND ($6::uuid IS NULL OR id = $6)
    AND ($7::timestamptz IS NULL OR (finished_at, id) < ($7, $8::uuid))
ORDER BY finished_at DESC, id DESC LIMIT $9

-- name: create_key
-- A key with its first secret. Changes nothing if the id is taken, see `submit`.
WITH made AS (
    INSERT INTO api_keys (id, name, max_running, scopes) VALUES ($1, $2, $4, $5) ON CONFLICT (id) DO NOTHING RETURNING id
)
INSERT INTO api_key_secrets (key_id, hash) SELECT id, $3 FROM made

-- name: lock_key
-- One rotation of a key at a time: each sees the secret that the one before made.
SELECT id FROM api_keys WHERE id = $1 AND revoked_at IS NULL FOR UPDATE

-- name: retire_secrets
-- Every secret of a key but the new one ends in $3 seconds, or as it was to end before.
UPDATE api_key_secrets SET expires_at = least(expires_at, now() + make_interval(secs => $3)) WHERE key_id = $1 AND hash <> $2

-- name: add_secret
-- Changes nothing if a first try has added it.
INSERT INTO api_key_secrets (key_id, hash) VALUES ($1, $2) ON CONFLICT (hash) DO NOTHING

-- name: list_keys
-- Revoked ones included.
SELECT id, name, created_at, revoked_at, max_running, scopes,
    (SELECT max(expires_at) FROM api_key_secrets WHERE key_id = api_keys.id AND expires_at > now()) AS old_secret_until
FROM api_keys ORDER BY created_at, id

-- name: revoke_key
-- A key stays listed after its end. Returns the key also if it had ended before.
UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE id = $1 RETURNING id

-- name: key_usage
-- What a key has waiting, counted no further than $2 (null: all), and stored. The endpoints and priorities are named so that it reads
-- no more than the key's own part of an index: half a millisecond for 10,000 jobs.
SELECT
    (SELECT count(*) FROM (
        SELECT FROM unnest($3::text[]) AS served (endpoint) CROSS JOIN unnest('{0,1}'::integer[]) AS level (priority)
        JOIN jobs USING (endpoint, priority) WHERE state = 'queued' AND coalesce(owner, '') = $1 LIMIT $2
    ) AS counted) AS waiting,
    (SELECT coalesce(sum(size_bytes), 0) FROM stored_files WHERE owner = $1)::bigint AS stored_bytes

-- name: expire_secrets
-- Forgets secrets that have ended.
DELETE FROM api_key_secrets WHERE expires_at <= now() RETURNING id

-- name: find_secret
-- The secret that this is the hash of.
SELECT secret.id, key_id, scopes, token_key FROM api_key_secrets AS secret JOIN api_keys ON api_keys.id = key_id
WHERE secret.hash = $1 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())

-- name: get_secret
-- The same by its id.
SELECT secret.id, key_id, scopes, token_key FROM api_key_secrets AS secret JOIN api_keys ON api_keys.id = key_id
WHERE secret.id = $1 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())

-- name: open_secret
-- The key that an open service signs with; the first call makes it.
WITH made AS (INSERT INTO open_token_key DEFAULT VALUES ON CONFLICT DO NOTHING RETURNING token_key)
SELECT token_key FROM made UNION ALL SELECT token_key FROM open_token_key LIMIT 1

-- name: waiting_work
-- For each endpoint of $1 that is not paused: how many jobs wait that may start, and the means of their work over the first $2 of them
-- in line. Of a key with a limit count as many as may run besides those that do. It counts, which takes 50 ms per million.
WITH limited AS (
    SELECT id, greatest(0, max_running - (SELECT count(*) FROM jobs WHERE state = 'running' AND owner = api_keys.id)) AS room
    FROM api_keys WHERE max_running IS NOT NULL
)
SELECT served.endpoint, line.jobs - held.waiting + held.allowed AS jobs, mean.*
FROM unnest($1::text[]) AS served (endpoint)
CROSS JOIN LATERAL (
    SELECT count(*) AS jobs FROM jobs WHERE state = 'queued' AND not_before IS NULL AND endpoint = served.endpoint
) AS line
CROSS JOIN LATERAL (
    SELECT coalesce(sum(own.jobs), 0) AS waiting, coalesce(sum(least(own.jobs, limited.room)), 0) AS allowed
    FROM limited CROSS JOIN LATERAL (
        SELECT count(*) AS jobs FROM unnest('{0,1}'::integer[]) AS level (priority) JOIN jobs USING (priority)
        WHERE state = 'queued' AND not_before IS NULL AND endpoint = served.endpoint AND coalesce(owner, '') = limited.id
    ) AS own
) AS held
CROSS JOIN LATERAL (
    SELECT avg(units[1]) AS preprocess, avg(units[2]) AS denoise, avg(units[3]) AS decode, avg(parallel)::double precision AS parallel
    FROM (
        SELECT units, parallel FROM jobs WHERE state = 'queued' AND not_before IS NULL AND endpoint = served.endpoint
        ORDER BY priority, turn, number LIMIT $2
    ) AS first
) AS mean
WHERE line.jobs > 0 AND NOT EXISTS (SELECT FROM paused_endpoints WHERE endpoint = served.endpoint)

-- name: running_work
-- The jobs that run at the endpoints $1, each with the progress it told last.
SELECT endpoint, units, parallel, line.progress FROM jobs
LEFT JOIN LATERAL (
    SELECT progress FROM job_logs WHERE job_id = jobs.id AND progress IS NOT NULL ORDER BY seq DESC LIMIT 1
) AS line ON true
WHERE state = 'running' AND endpoint = ANY ($1::text[])

-- name: arrived_work
-- How many jobs were submitted at the endpoints $1 from each of the ids $2 on, which begin with a time, and their units. Without those of
-- keys with a limit, whatever they submit, and without jobs that failed or were cancelled.
SELECT place, endpoint, count(*) AS jobs, sum(units[1]) AS preprocess, sum(units[2]) AS denoise, sum(units[3]) AS decode
FROM unnest($2::uuid[]) WITH ORDINALITY AS since (first, place) JOIN jobs ON id >= since.first
WHERE endpoint = ANY ($1::text[]) AND state IN ('queued', 'running', 'succeeded')
    AND NOT EXISTS (SELECT FROM api_keys WHERE api_keys.id = owner AND max_running IS NOT NULL)
    AND NOT EXISTS (SELECT FROM paused_endpoints WHERE paused_endpoints.endpoint = jobs.endpoint)
GROUP BY place, endpoint

-- name: measured_work
-- What the stages took for jobs at the endpoints $1 that ended after $2 (null: in the last hour), in the order of their ends. Denoising is
-- spread over replicas, so what those took together is told beside it. What goes on from a checkpoint tells less than the whole, so
-- only jobs that began once count.
SELECT endpoint, units, metrics -> 'receipt' -> 'seconds' AS seconds, metrics -> 'receipt' -> 'replica_seconds' AS denoise_s, finished_at
FROM jobs
WHERE finished_at > coalesce($2, now() - interval '1 hour') AND state = 'succeeded' AND endpoint = ANY ($1::text[])
    AND (SELECT count(*) FROM job_events WHERE job_id = jobs.id AND job_events.state = 'running') = 1
ORDER BY finished_at LIMIT 1000

-- name: save_stages
-- Not flushed to disk: it is written again a second later.
WITH relaxed AS (SELECT set_config('synchronous_commit', 'off', true))
INSERT INTO stages AS known (endpoint, stage, unit_s, ready_s, backlog_s, replicas, target)
SELECT row.* FROM relaxed CROSS JOIN unnest(
    $1::text[], $2::text[], $3::double precision[], $4::double precision[], $5::double precision[], $6::integer[], $7::integer[]
) AS row
ON CONFLICT (endpoint, stage) DO UPDATE SET
    unit_s = excluded.unit_s,
    ready_s = excluded.ready_s,
    backlog_s = excluded.backlog_s,
    replicas = excluded.replicas,
    target = excluded.target,
    at = excluded.at

-- name: stages
-- What is known of the stages; age_s: seconds since it was written.
SELECT endpoint, stage, unit_s, ready_s, backlog_s, replicas, target, extract(epoch FROM now() - at)::double precision AS age_s FROM stages
