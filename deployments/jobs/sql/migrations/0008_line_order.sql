-- Beside a key at its limit a claim looks at the lines one by one. Two flaws of that are mended: a job past its start deadline, which
-- the sweep had not yet failed, lent its place to the next one of its line; and of two jobs with one turn, as there are when a
-- job comes back to a line that had none waiting, either might go first.

DROP INDEX jobs_queued_by_owner;
CREATE INDEX jobs_queued_by_owner ON jobs (endpoint, priority, (coalesce(owner, '')), turn, number) WHERE state = 'queued';

-- Starts an attempt at the next job of the endpoints given. No row: there is none; a row of nulls: ask again, see below.
--
-- The next job is the first in the order of `jobs_queued` that nobody else is taking: one index read, whatever the queue's length.
-- With `low_first`, that is the first one of low priority, if that has waited for `low_after_s` seconds.
-- Only if the first job's key is at its limit are the lines looked at one by one, a line being what one owner has waiting at one
-- priority: then a claim costs an index read for every owner who waits, still whatever the length of their lines.
CREATE OR REPLACE FUNCTION claim_job(
    endpoints text[],
    new_token uuid,
    lease_s double precision,
    run_s double precision,
    low_first boolean,
    low_after_s double precision
) RETURNS SETOF jobs LANGUAGE plpgsql AS $$
DECLARE
    open_endpoints text[];
    full_owners text[] := '{}';
    lowest integer;
    line record;
    head_id uuid;
    head_owner text;
    head_created_at timestamptz;
    most integer;
BEGIN
    SELECT array_agg(served) INTO open_endpoints FROM unnest(endpoints) AS served
    WHERE NOT EXISTS (SELECT FROM paused_endpoints WHERE paused_endpoints.endpoint = served);
    LOOP
        lowest := CASE WHEN low_first THEN 1 ELSE -2147483648 END;
        head_id := NULL;
        IF cardinality(full_owners) = 0 THEN
            SELECT first.id, first.owner, first.created_at INTO head_id, head_owner, head_created_at
            FROM unnest(open_endpoints) AS served (endpoint)
            CROSS JOIN LATERAL (
                SELECT id, owner, priority, number, created_at FROM jobs
                WHERE state = 'queued' AND not_before IS NULL AND endpoint = served.endpoint AND priority >= lowest
                    AND (start_by IS NULL OR start_by > now())
                ORDER BY priority, turn, number LIMIT 1
                FOR UPDATE SKIP LOCKED
            ) AS first
            ORDER BY first.priority, first.number LIMIT 1;
        ELSE
            FOR line IN
                WITH RECURSIVE lines AS (
                    SELECT served.endpoint, first.priority, first.owner FROM unnest(open_endpoints) AS served (endpoint)
                    CROSS JOIN LATERAL (
                        SELECT priority, coalesce(owner, '') AS owner FROM jobs
                        WHERE state = 'queued' AND endpoint = served.endpoint AND priority >= lowest
                        ORDER BY priority, coalesce(owner, '') LIMIT 1
                    ) AS first
                    UNION ALL
                    SELECT lines.endpoint, next.priority, next.owner FROM lines
                    CROSS JOIN LATERAL (
                        SELECT priority, coalesce(owner, '') AS owner FROM jobs
                        WHERE state = 'queued' AND endpoint = lines.endpoint
                            AND (priority, coalesce(owner, '')) > (lines.priority, lines.owner)
                        ORDER BY priority, coalesce(owner, '') LIMIT 1
                    ) AS next
                )
                SELECT lines.* FROM lines
                CROSS JOIN LATERAL (
                    SELECT turn, number FROM jobs
                    WHERE state = 'queued' AND not_before IS NULL AND endpoint = lines.endpoint
                        AND priority = lines.priority AND coalesce(owner, '') = lines.owner
                        AND (start_by IS NULL OR start_by > now())
                    ORDER BY turn, number LIMIT 1
                ) AS first
                WHERE lines.owner <> ALL (full_owners)
                ORDER BY lines.priority, first.turn, first.number
            LOOP
                SELECT id, owner, created_at INTO head_id, head_owner, head_created_at FROM jobs
                WHERE state = 'queued' AND not_before IS NULL AND endpoint = line.endpoint
                    AND priority = line.priority AND coalesce(owner, '') = line.owner
                    AND (start_by IS NULL OR start_by > now())
                ORDER BY turn, number LIMIT 1
                FOR UPDATE SKIP LOCKED;
                EXIT WHEN FOUND;
            END LOOP;
        END IF;

        IF low_first AND (head_id IS NULL OR head_created_at > now() - make_interval(secs => low_after_s)) THEN
            low_first := false;
            CONTINUE;
        ELSIF head_id IS NULL THEN
            RETURN;
        END IF;

        SELECT max_running INTO most FROM api_keys WHERE id = head_owner;
        IF most IS NOT NULL THEN
            IF (SELECT count(*) FROM jobs WHERE state = 'running' AND owner = head_owner) >= most THEN
                full_owners := full_owners || head_owner;
                CONTINUE;
            END IF;
            -- One claim of a key's jobs at a time, and counted again: another one may have taken the last room. If so this one
            -- begins anew, because a transaction that held two such locks could stand against another for ever.
            PERFORM FROM api_keys WHERE id = head_owner FOR NO KEY UPDATE;
            IF (SELECT count(*) FROM jobs WHERE state = 'running' AND owner = head_owner) >= most THEN
                RETURN NEXT NULL::jobs;
                RETURN;
            END IF;
        END IF;

        RETURN QUERY UPDATE jobs SET
            state = 'running',
            attempt = attempt + 1,
            token = new_token,
            started_at = now(),
            lease_until = now() + make_interval(secs => lease_s),
            run_by = now() + make_interval(secs => run_s),
            reason = NULL
        WHERE id = head_id
        RETURNING *;
        RETURN;
    END LOOP;
END $$;
