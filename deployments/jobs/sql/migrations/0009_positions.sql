-- As before, counted to 200; and a table now, because a function that stands in FROM becomes part of the statement, which is planned
-- once, and one that stands for a value is called anew, 90 µs, for every row.

DROP FUNCTION jobs_ahead;
CREATE FUNCTION jobs_ahead(of_endpoint text, of_priority integer, of_turn bigint, of_number bigint)
RETURNS TABLE (ahead bigint) LANGUAGE sql STABLE AS $$
    SELECT count(*) FROM (
        SELECT FROM jobs
        WHERE state = 'queued' AND not_before IS NULL AND endpoint = of_endpoint
            AND (priority, turn, number) < (of_priority, of_turn, of_number)
        LIMIT 200
    ) AS counted
$$;
