-- A job that goes back to the queue may have to wait before it is tried again. It then stands in no index that a claim reads,
-- so that any number of such jobs costs a claim nothing; the sweep returns it to its place in the order.

ALTER TABLE jobs ADD COLUMN not_before timestamptz;

DROP INDEX jobs_queued;
CREATE INDEX jobs_queued ON jobs (endpoint, priority, turn, number) WHERE state = 'queued' AND not_before IS NULL;
CREATE INDEX jobs_delayed ON jobs (not_before) WHERE state = 'queued' AND not_before IS NOT NULL;

-- As before, but a job that may not start yet is ahead of nobody.
CREATE OR REPLACE FUNCTION jobs_ahead(of_endpoint text, of_priority integer, of_turn bigint, of_number bigint)
RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT count(*) FROM (
        SELECT FROM jobs
        WHERE state = 'queued' AND not_before IS NULL AND endpoint = of_endpoint
            AND (priority, turn, number) < (of_priority, of_turn, of_number)
        LIMIT 1000
    ) AS ahead
$$;
