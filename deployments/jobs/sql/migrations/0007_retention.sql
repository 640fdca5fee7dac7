-- What is kept for how long. A file is written down here before it is written, so that one whose job never came to its end
-- expires like the others.

CREATE TABLE stored_files (
    name text PRIMARY KEY,  -- within the file store
    expires_at timestamptz NOT NULL
);

CREATE INDEX stored_files_by_expiry ON stored_files (expires_at);

ALTER TABLE jobs
    ADD COLUMN files_s double precision,  -- how long its files are kept, where its caller said so
    ADD COLUMN store_io boolean NOT NULL DEFAULT true;  -- false: nothing that was sent or made is kept for longer than needed

CREATE INDEX jobs_ended ON jobs (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX jobs_ended_unstored ON jobs (finished_at) WHERE finished_at IS NOT NULL AND NOT store_io;

-- The input of such a job is needed until its last attempt has ended, whoever ends it.
CREATE FUNCTION jobs_forget_input() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.input := '{}';
    RETURN NEW;
END $$;

CREATE TRIGGER forget_input BEFORE UPDATE ON jobs FOR EACH ROW
    WHEN (NOT NEW.store_io AND OLD.state <> NEW.state AND NEW.state IN ('succeeded', 'failed', 'cancelled'))
    EXECUTE FUNCTION jobs_forget_input();
