-- Log lines are counted 1, 2, 3 within their job, may say progress in a form for programs, and are only so many. Lines written
-- before are counted anew, which rewrites a large table.

ALTER TABLE job_logs ALTER COLUMN seq DROP IDENTITY;
ALTER TABLE job_logs DROP CONSTRAINT job_logs_pkey;

UPDATE job_logs SET seq = counted.place
FROM (SELECT job_id, seq, row_number() OVER (PARTITION BY job_id ORDER BY seq) AS place FROM job_logs) AS counted
WHERE (job_logs.job_id, job_logs.seq) = (counted.job_id, counted.seq) AND job_logs.seq <> counted.place;

ALTER TABLE job_logs
    ADD PRIMARY KEY (job_id, seq),
    ADD COLUMN progress json;

-- Gives a line its place, whoever writes it. Who does has locked the job's row, so there is no other at it; and this reads anew, so
-- it sees the line of another one for which that lock was waited for. Of too many lines the next says so, and the others are dropped.
CREATE FUNCTION job_logs_next() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    most CONSTANT integer := 2000;  -- also told by JobStore.log
BEGIN
    SELECT coalesce(max(seq), 0) + 1 INTO NEW.seq FROM job_logs WHERE job_id = NEW.job_id;
    IF NEW.seq > most + 1 THEN
        RETURN NULL;
    ELSIF NEW.seq > most THEN
        NEW.level := 'WARN';
        NEW.message := format('this log is full: lines after its first %s are not kept', most);
        NEW.progress := NULL;
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER next_line BEFORE INSERT ON job_logs FOR EACH ROW EXECUTE FUNCTION job_logs_next();
