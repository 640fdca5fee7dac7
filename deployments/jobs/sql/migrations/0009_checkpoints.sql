-- Every job may have a checkpoint, one file under a name that follows from its id. It is noted when the job is first claimed, lives
-- as long as the job, and is then deleted like any other file whose time is over.

-- Within the file store, see deployments/files/file_store.py.
CREATE FUNCTION checkpoint_name(job_id uuid) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT 'checkpoints/' || job_id || '/latents.safetensors'
$$;

-- Whoever ends the job, and however. The minutes are for a worker that was stopped and still writes.
CREATE FUNCTION jobs_expire_checkpoint() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE stored_files SET expires_at = now() + interval '10 minutes' WHERE name = checkpoint_name(NEW.id);
    RETURN NULL;
END $$;

CREATE TRIGGER expire_checkpoint AFTER UPDATE ON jobs FOR EACH ROW
    WHEN (OLD.state <> NEW.state AND NEW.state IN ('succeeded', 'failed', 'cancelled'))
    EXECUTE FUNCTION jobs_expire_checkpoint();
