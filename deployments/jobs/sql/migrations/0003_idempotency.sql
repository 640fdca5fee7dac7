-- Submissions that their callers may repeat: which job a key of theirs stands for. One owner's key names one job, so that of any
-- number of simultaneous repeats one makes it and the others wait for that one's commit.

CREATE TABLE idempotency_keys (
    owner text NOT NULL,  -- '' where the service is open
    key text NOT NULL,
    fingerprint bytea NOT NULL,  -- of the endpoint and the body
    job_id uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
    rejected boolean NOT NULL,  -- the body was no valid input, its job failed at once: a mended body may take the key over
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (owner, key)
);

CREATE INDEX idempotency_keys_by_job ON idempotency_keys (job_id);
CREATE INDEX idempotency_keys_by_expiry ON idempotency_keys (expires_at);
