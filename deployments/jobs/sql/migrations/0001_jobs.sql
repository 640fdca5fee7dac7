-- Jobs, what happened to them, and what has to be told about them. One transaction with every state change: the triggers below.

CREATE TABLE jobs (
    id uuid PRIMARY KEY,
    number bigint GENERATED ALWAYS AS IDENTITY,  -- age among equals; clocks may stand still or step back
    endpoint text NOT NULL,
    owner text,
    priority integer NOT NULL,
    -- The round in which the job is due: one job of every owner a round (start-time fair queuing: Goyal, Vin, Cheng,
    -- SIGCOMM 1996, with all jobs of equal length). Given once, so that a place in the order never moves behind itself.
    turn bigint NOT NULL,
    state text NOT NULL CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    -- json and not jsonb here and below: jsonb refuses \u0000 and lone surrogates, which callers do send.
    input json NOT NULL,
    webhook_url text,
    created_at timestamptz NOT NULL DEFAULT now(),
    start_by timestamptz,
    started_at timestamptz,
    finished_at timestamptz,
    attempt integer NOT NULL DEFAULT 0,
    max_attempts integer NOT NULL,
    token uuid,  -- of the last attempt; stays on an ended job, so that its worker may repeat a write whose answer got lost
    lease_until timestamptz,
    cancel_requested boolean NOT NULL DEFAULT false,
    result json,
    failure json,
    metrics json NOT NULL DEFAULT '{}',
    reason text,  -- of the last state change, where the state does not say it
    CHECK (state <> 'running' OR (token IS NOT NULL AND lease_until IS NOT NULL AND started_at IS NOT NULL)),
    CHECK ((state IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)),
    CHECK ((state = 'succeeded') = (result IS NOT NULL)),
    CHECK ((state IN ('failed', 'cancelled')) = (failure IS NOT NULL))
) WITH (
    -- Claims and ends leave a dead row each at the head of the queue, where every claim has to step over them.
    autovacuum_vacuum_scale_factor = 0.01,
    autovacuum_analyze_scale_factor = 0.02,
    -- Heartbeats stay within the page: no index holds what they change.
    fillfactor = 80
);

-- Inputs may carry megabytes of base64, which pglz does not make smaller, only slower.
ALTER TABLE jobs ALTER COLUMN input SET STORAGE EXTERNAL;

CREATE INDEX jobs_queued ON jobs (endpoint, priority, turn, number) WHERE state = 'queued';
CREATE INDEX jobs_queued_by_owner ON jobs (endpoint, priority, (coalesce(owner, '')), turn) WHERE state = 'queued';
CREATE INDEX jobs_queued_deadlines ON jobs (start_by) WHERE state = 'queued' AND start_by IS NOT NULL;
CREATE INDEX jobs_running ON jobs (endpoint, priority, turn) WHERE state = 'running';

CREATE TABLE job_events (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    state text NOT NULL,
    attempt integer NOT NULL,
    reason text
);

CREATE INDEX job_events_by_job ON job_events (job_id, id);

CREATE TABLE job_logs (
    job_id uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
    seq bigint GENERATED ALWAYS AS IDENTITY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    level text NOT NULL,
    message text NOT NULL,
    PRIMARY KEY (job_id, seq)
);

CREATE TABLE webhook_outbox (
    job_id uuid PRIMARY KEY REFERENCES jobs ON DELETE CASCADE,
    url text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE api_keys (
    id text PRIMARY KEY,
    name text NOT NULL,
    hash bytea NOT NULL UNIQUE,
    created_at timestamptz NOT NULL DEFAULT now(),
    revoked_at timestamptz
);

-- Refuses what job.py does not draw, whoever asks, and keeps the columns that follow from the state.
CREATE FUNCTION jobs_before_transition() RETURNS trigger LANGUAGE plpgsql AS $$
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

CREATE TRIGGER before_submit BEFORE INSERT ON jobs
    FOR EACH ROW EXECUTE FUNCTION jobs_before_transition();
CREATE TRIGGER before_transition BEFORE UPDATE ON jobs
    FOR EACH ROW WHEN (OLD.state IS DISTINCT FROM NEW.state) EXECUTE FUNCTION jobs_before_transition();

-- Writes down every state change and, at the end, whom to tell. Listeners hear 'work' or the job's id.
CREATE FUNCTION jobs_after_transition() RETURNS trigger LANGUAGE plpgsql AS $$
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

CREATE TRIGGER after_submit AFTER INSERT ON jobs
    FOR EACH ROW EXECUTE FUNCTION jobs_after_transition();
CREATE TRIGGER after_transition AFTER UPDATE ON jobs
    FOR EACH ROW WHEN (OLD.state IS DISTINCT FROM NEW.state) EXECUTE FUNCTION jobs_after_transition();

-- Where a job goes whose attempt ended without an outcome. An attempt that is not counted cannot be the last.
CREATE FUNCTION jobs_after_lost_attempt(cancel_requested boolean, attempt integer, max_attempts integer, counted boolean)
RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN cancel_requested THEN 'cancelled'
        WHEN counted AND attempt >= max_attempts THEN 'failed'
        ELSE 'queued'
    END
$$;

-- How many queued jobs of its endpoint go before this one, counted to 1,000: a status must cost the same in any queue.
-- (Not given the row: that would read its input, megabytes at times.)
CREATE FUNCTION jobs_ahead(of_endpoint text, of_priority integer, of_turn bigint, of_number bigint)
RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT count(*) FROM (
        SELECT FROM jobs
        WHERE state = 'queued' AND endpoint = of_endpoint
            AND (priority, turn, number) < (of_priority, of_turn, of_number)
        LIMIT 1000
    ) AS ahead
$$;
