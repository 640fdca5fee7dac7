-- Every function of the schema in its current form. The whole file is applied after the migrations, so a change here needs no
-- migration, except that a function whose arguments or result change must first be dropped by one.

-- Refuses every transition that `job.py` does not draw, and keeps the columns that follow from the state.
CREATE OR REPLACE FUNCTION jobs_before_transition() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NEW.state <> 'queued' THEN
            RAISE check_violation USING MESSAGE = format('illegal transition: submit -> %s', NEW.state);
        END IF;
    ELSIF (OLD.state, NEW.state) NOT IN (
        ('queued', 'running'), ('queued', 'failed'), ('queued', 'cancelled'),
        ('running', 'queued'), ('running', 'succeeded'), ('running', 'failed'), ('running', 'cancelled')
    ) THEN
        RAISE check_violation USING MESSAGE = format('illegal transition: %s -> %s', OLD.state, NEW.state);
    END IF;
    IF NEW.state <> 'running' THEN
        NEW.lease_until := NULL;
    END IF;
    IF NEW.state = 'queued' THEN
        NEW.started_at := NULL;
    ELSIF NEW.state <> 'running' THEN
        NEW.finished_at := clock_timestamp();
    END IF;
    RETURN NEW;
END $$;

-- Records every state change and, at the end, that a webhook is due. The subjects of all notifications are those of `listener.py`.
CREATE OR REPLACE FUNCTION jobs_after_transition() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO job_events (job_id, state, attempt, reason) VALUES (NEW.id, NEW.state, NEW.attempt, NEW.reason);
    IF NEW.finished_at IS NOT NULL AND NEW.webhook_url IS NOT NULL THEN
        INSERT INTO webhook_outbox (job_id, url) VALUES (NEW.id, NEW.webhook_url);
    END IF;
    IF NEW.state = 'queued' THEN
        PERFORM pg_notify('reelray', 'work');
    END IF;
    IF TG_OP = 'UPDATE' THEN
        PERFORM pg_notify('reelray', NEW.id::text);
    END IF;
    RETURN NULL;
END $$;

-- The end of a limited key's job makes room for one that waits, and nobody would look for that one without being told.
CREATE OR REPLACE FUNCTION jobs_after_limited_run() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM api_keys WHERE id = NEW.owner AND max_running IS NOT NULL) THEN
        PERFORM pg_notify('reelray', 'work');
    END IF;
    RETURN NULL;
END $$;

-- The input of a job that is not to be stored is needed until its last attempt has ended, whoever ends it.
CREATE OR REPLACE FUNCTION jobs_forget_input() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.input := '{}';
    RETURN NEW;
END $$;

-- The one folder in which a job's attempts keep how far they came: its name within the file store, see `files/file_store.py`.
CREATE OR REPLACE FUNCTION checkpoint_name(job_id uuid) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT 'checkpoints/' || job_id
$$;

-- The checkpoint and the input's files go when the job ends, whoever ends it. The minutes are for a worker that was stopped and
-- still writes or reads.
CREATE OR REPLACE FUNCTION jobs_expire_files() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE stored_files SET expires_at = now() + interval '10 minutes'
    WHERE name = ANY (NEW.input_files || checkpoint_name(NEW.id));
    RETURN NULL;
END $$;

-- Whether an owner may have `bytes` for the file `piece` besides what it has. Until the transaction ends, nothing else is reserved for
-- this owner; the statement after the wait for that sees what the one before has reserved.
CREATE OR REPLACE FUNCTION is_within_quota(of_owner text, piece text, bytes bigint, quota bigint)
RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    IF of_owner IS NULL OR quota IS NULL THEN
        RETURN true;
    END IF;
    PERFORM pg_advisory_xact_lock(hashtextextended('quota ' || of_owner, 0));
    RETURN bytes + (SELECT coalesce(sum(size_bytes), 0) FROM stored_files WHERE owner = of_owner AND name <> piece) <= quota;
END $$;

-- Reserves bytes for an upload, or for the part `piece` of it; returns why not, or the digest of an upload that is complete already.
-- A part that is sent again takes the place of what was sent before. Not flushed to disk: if a crash undoes it, its end finds no row.
CREATE OR REPLACE FUNCTION reserve_upload(of_name text, piece text, bytes bigint, max_bytes bigint, quota bigint)
RETURNS TABLE (refusal text, digest bytea) LANGUAGE plpgsql AS $$
DECLARE
    upload stored_files;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    SELECT * INTO upload FROM stored_files
    WHERE name = of_name AND part_of IS NULL AND NOT gone AND expires_at > now()
    FOR UPDATE;  -- so a part is refused, or its upload's end sees that it is on its way
    IF NOT FOUND THEN
        refusal := 'over';
    ELSIF upload.digest IS NOT NULL THEN
        digest := upload.digest;
    ELSIF bytes + (SELECT coalesce(sum(size_bytes), 0) FROM stored_files WHERE part_of = of_name AND name <> piece) > max_bytes THEN
        refusal := 'size';
    ELSIF NOT is_within_quota(upload.owner, piece, bytes, quota) THEN
        refusal := 'quota';
    ELSIF piece = of_name THEN
        UPDATE stored_files SET size_bytes = bytes WHERE name = of_name;
    ELSE
        INSERT INTO stored_files AS part (name, expires_at, owner, size_bytes, part_of)
        VALUES (piece, upload.expires_at, upload.owner, bytes, of_name)
        ON CONFLICT (name) DO UPDATE SET size_bytes = excluded.size_bytes, digest = NULL;
    END IF;
    RETURN NEXT;
END $$;

-- The end of an upload in parts: from now on it is these parts and no others, in this order. Returns why not, if it is not: it is over, is
-- complete with other parts, has another size than `exact`, or the number in the list of the first part that is not there.
CREATE OR REPLACE FUNCTION finish_parts(of_name text, whole bytea, exact bigint, names text[], digests bytea[])
RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    upload stored_files;
    missing bigint;
    bytes bigint;
BEGIN
    SELECT * INTO upload FROM stored_files
    WHERE name = of_name AND part_of IS NULL AND NOT gone AND expires_at > now() FOR UPDATE;
    IF NOT FOUND THEN
        RETURN 'over';
    ELSIF upload.digest IS NOT NULL THEN
        RETURN CASE WHEN upload.digest <> whole THEN 'complete' END;
    END IF;
    SELECT min(place) FILTER (WHERE part.digest IS DISTINCT FROM listed.digest), sum(part.size_bytes) INTO missing, bytes
    FROM unnest(names, digests) WITH ORDINALITY AS listed (name, digest, place)
    LEFT JOIN stored_files AS part ON part.name = listed.name AND NOT part.gone;
    IF missing IS NOT NULL THEN
        RETURN missing;
    ELSIF bytes <> exact THEN
        RETURN 'size';
    END IF;
    UPDATE stored_files SET
        digest = whole, size_bytes = bytes, expires_at = coalesce(now() + make_interval(secs => keep_s), 'infinity')
    WHERE name = of_name;
    -- they are still to be read, for an hour at least, but no longer count for the quota
    UPDATE stored_files SET owner = NULL, expires_at = greatest(expires_at, now() + interval '1 hour') WHERE part_of = of_name;
    RETURN NULL;
END $$;

-- Numbers the lines of a job's log. The writer has locked the job's row, so there is only one at a time; this statement begins after
-- the wait for that lock and so sees the line of the writer before. When the log is full, one line says so and later ones are dropped. So is a line that is there
-- already, because its writer did not get the answer; a writer repeats only its last one, so a few lines are looked at.
CREATE OR REPLACE FUNCTION job_logs_next() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    most CONSTANT integer := 2000;  -- also named in the docstring of Claims.log
BEGIN
    SELECT coalesce(max(seq), 0) + 1 INTO NEW.seq FROM job_logs WHERE job_id = NEW.job_id;
    IF NEW.seq > most + 1
        OR EXISTS (SELECT FROM job_logs WHERE job_id = NEW.job_id AND seq >= NEW.seq - 10 AND line_id = NEW.line_id)
    THEN
        RETURN NULL;
    ELSIF NEW.seq > most THEN
        NEW.level := 'WARN';
        NEW.message := format('this log is full: lines after its first %s are not kept', most);
        NEW.progress := NULL;
    END IF;
    RETURN NEW;
END $$;

-- The state of a job whose attempt ended without an outcome. An attempt that does not count cannot be the last one. retries_left:
-- how many more the caller allowed after such an end; null: any number.
CREATE OR REPLACE FUNCTION jobs_after_lost_attempt(
    cancel_requested boolean, attempt integer, max_attempts integer, counted boolean, retries_left integer
)
RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN cancel_requested THEN 'cancelled'
        WHEN counted AND (attempt >= max_attempts OR retries_left <= 0) THEN 'failed'
        ELSE 'queued'
    END
$$;

-- A lost lease is the condition `connection_error` of a caller's retry config: how many retries are left for it, and then.
CREATE OR REPLACE FUNCTION left_after_lost_lease(retries json) RETURNS integer LANGUAGE sql IMMUTABLE AS $$
    SELECT (retries ->> 'connection_error')::integer
$$;

CREATE OR REPLACE FUNCTION retries_after_lost_lease(retries json) RETURNS json LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN left_after_lost_lease(retries) > 0
        THEN (retries::jsonb || jsonb_build_object('connection_error', left_after_lost_lease(retries) - 1))::json
        ELSE retries
    END
$$;

-- How many queued jobs of its endpoint go before this one, counted to 200: a status must cost the same in any queue. Jobs that wait
-- for their next attempt are not counted. It is not given the row, because that would read the input, at times megabytes. It returns
-- a table because such a function becomes part of the calling statement and its plan; as a scalar it took 90 µs for every row.
CREATE OR REPLACE FUNCTION jobs_ahead(of_endpoint text, of_priority integer, of_turn bigint, of_number bigint)
RETURNS TABLE (ahead bigint) LANGUAGE sql STABLE AS $$
    SELECT count(*) FROM (
        SELECT FROM jobs
        WHERE state = 'queued' AND not_before IS NULL AND endpoint = of_endpoint
            AND (priority, turn, number) < (of_priority, of_turn, of_number)
        LIMIT 200
    ) AS counted
$$;

-- Starts an attempt at the next job of some endpoints. Returns no row if there is none, and a row of nulls if the caller must ask
-- again, see below. A repeated call, with the token of one whose answer was lost, returns that call's job.
--
-- The next job is the first in the order of `jobs_queued` that no other claim is taking: one index read, however long the queue is.
-- With `low_first`, it is the first one of low priority, if that has waited for `low_after_s` seconds.
-- Only if the first job's key is at its limit are the lines looked at one by one, a line being the jobs that one owner has waiting at
-- one priority. A claim then costs an index read for every owner who waits, however long their lines are.
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
    RETURN QUERY SELECT * FROM jobs WHERE state = 'running' AND token = new_token;
    IF FOUND THEN
        RETURN;
    END IF;
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

-- A webhook's owner is its job's.
CREATE OR REPLACE FUNCTION webhook_outbox_before_insert() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.owner := (SELECT owner FROM jobs WHERE id = NEW.job_id);
    RETURN NEW;
END $$;

-- Tells the couriers.
CREATE OR REPLACE FUNCTION webhook_outbox_after_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('reelray', 'webhooks');
    RETURN NULL;
END $$;
