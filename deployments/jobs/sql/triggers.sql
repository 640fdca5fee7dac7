-- Which function of `functions.sql` runs when. A trigger is made where it is missing and left alone where it is there: CREATE OR
-- REPLACE TRIGGER would stop all writes to the table with every migration. A migration that drops a trigger
-- has it made anew as it stands here.

-- name: before_submit
CREATE TRIGGER before_submit BEFORE INSERT ON jobs
    FOR EACH ROW EXECUTE FUNCTION jobs_before_transition();

-- name: before_transition
CREATE TRIGGER before_transition BEFORE UPDATE ON jobs
    FOR EACH ROW WHEN (OLD.state IS DISTINCT FROM NEW.state) EXECUTE FUNCTION jobs_before_transition();

-- name: after_submit
CREATE TRIGGER after_submit AFTER INSERT ON jobs
    FOR EACH ROW EXECUTE FUNCTION jobs_after_transition();

-- name: after_transition
CREATE TRIGGER after_transition AFTER UPDATE ON jobs
    FOR EACH ROW WHEN (OLD.state IS DISTINCT FROM NEW.state) EXECUTE FUNCTION jobs_after_transition();

-- name: after_limited_run
CREATE TRIGGER after_limited_run AFTER UPDATE ON jobs FOR EACH ROW
    WHEN (OLD.state = 'running' AND NEW.state NOT IN ('running', 'queued') AND NEW.owner IS NOT NULL)
    EXECUTE FUNCTION jobs_after_limited_run();

-- name: forget_input
CREATE TRIGGER forget_input BEFORE UPDATE ON jobs FOR EACH ROW
    WHEN (NOT NEW.store_io AND OLD.state <> NEW.state AND NEW.state IN ('succeeded', 'failed', 'cancelled'))
    EXECUTE FUNCTION jobs_forget_input();

-- name: expire_files
CREATE TRIGGER expire_files AFTER UPDATE ON jobs FOR EACH ROW
    WHEN (OLD.state <> NEW.state AND NEW.state IN ('succeeded', 'failed', 'cancelled'))
    EXECUTE FUNCTION jobs_expire_files();

-- name: next_line
CREATE TRIGGER next_line BEFORE INSERT ON job_logs
    FOR EACH ROW EXECUTE FUNCTION job_logs_next();

-- name: before_insert
CREATE TRIGGER before_insert BEFORE INSERT ON webhook_outbox
    FOR EACH ROW EXECUTE FUNCTION webhook_outbox_before_insert();

-- name: after_insert
CREATE TRIGGER after_insert AFTER INSERT ON webhook_outbox
    FOR EACH STATEMENT EXECUTE FUNCTION webhook_outbox_after_change();
