-- The tables of the queue and their indexes. What happens with a change of state (its event, its webhook, its notification) is in
-- `../functions.sql` and `../triggers.sql`.

CREATE TABLE jobs (
    id uuid PRIMARY KEY,
    number bigint GENERATED ALWAYS AS IDENTITY,  -- age among equals; clocks may stand still or step back
    endpoint text NOT NULL,
    owner text,
    priority integer NOT NULL,
    -- The round in which the job is due: one job of every owner a round (start-time fair queuing: Goyal, Vin, Cheng,
    -- SIGCOMM 1996, with all jobs of equal length). It never changes, so a job never falls back in the order.
    turn bigint NOT NULL,
    state text NOT NULL CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    -- json and not jsonb here and below: jsonb refuses \u0000 and lone surrogates, which callers do send.
    input json NOT NULL,
    input_version integer NOT NULL DEFAULT 1,  -- of the endpoints' schemas, when it was accepted
    webhook_url text,
    created_at timestamptz NOT NULL DEFAULT now(),
    start_by timestamptz,
    started_at timestamptz,
    finished_at timestamptz,
    attempt integer NOT NULL DEFAULT 0,
    max_attempts integer NOT NULL,
    token uuid,  -- of the last attempt; stays on an ended job, so that its worker can repeat a write whose answer was lost
    lease_until timestamptz,
    cancel_requested boolean NOT NULL DEFAULT false,
    result json,
    failure json,
    metrics json NOT NULL DEFAULT '{}',
    reason text,  -- of the last state change, where the state does not say it
    service_url text,  -- where the caller reached the service; the base of the URLs in the webhook
    -- A job that waits for its next attempt cannot start before this. It is then in no index that a claim reads, so any number of
    -- such jobs costs a claim nothing. The sweep sets it to null when the time has come.
    not_before timestamptz,
    run_by timestamptz,  -- when the running attempt must have ended: for the sweep, in case its dispatcher is dead
    files_s double precision,  -- how long its files are kept, where its caller said so
    files_access json,  -- who may read them; null: everybody who knows their URLs
    lost_in json NOT NULL DEFAULT '{}',  -- stage -> how many attempts were lost while it worked
    retries json NOT NULL DEFAULT '{}',  -- condition -> how many more retries its caller allows; others follow `retry.py` alone
    store_io boolean NOT NULL DEFAULT true,  -- false: nothing that was sent or made is kept for longer than needed
    input_files text[] NOT NULL DEFAULT '{}',  -- what the input refers to in the file store; listed in stored_files
    CHECK (state <> 'running' OR (token IS NOT NULL AND lease_until IS NOT NULL AND started_at IS NOT NULL)),
    CHECK ((state IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)),
    CHECK ((state = 'succeeded') = (result IS NOT NULL)),
    CHECK ((state IN ('failed', 'cancelled')) = (failure IS NOT NULL))
) WITH (
    -- Every claim and every end leaves a dead row at the head of the queue, and every later claim has to step over it.
    autovacuum_vacuum_scale_factor = 0.01,
    autovacuum_analyze_scale_factor = 0.02,
    -- Heartbeats stay within the page: no index holds what they change.
    fillfactor = 80
);

-- Inputs may carry megabytes of base64, which pglz does not make smaller, only slower.
ALTER TABLE jobs ALTER COLUMN input SET STORAGE EXTERNAL;

CREATE INDEX jobs_queued ON jobs (endpoint, priority, turn, number) WHERE state = 'queued' AND not_before IS NULL;
CREATE INDEX jobs_queued_by_owner ON jobs (endpoint, priority, (coalesce(owner, '')), turn, number) WHERE state = 'queued';
CREATE INDEX jobs_queued_deadlines ON jobs (start_by) WHERE state = 'queued' AND start_by IS NOT NULL;
CREATE INDEX jobs_delayed ON jobs (not_before) WHERE state = 'queued' AND not_before IS NOT NULL;
CREATE INDEX jobs_delayed_by_turn ON jobs (endpoint, priority, turn) WHERE state = 'queued' AND not_before IS NOT NULL;
CREATE INDEX jobs_running ON jobs (endpoint, priority, turn) WHERE state = 'running';
CREATE INDEX jobs_running_by_owner ON jobs (owner) WHERE state = 'running' AND owner IS NOT NULL;
CREATE INDEX jobs_running_by_token ON jobs (token) WHERE state = 'running';
CREATE INDEX jobs_ended ON jobs (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX jobs_history ON jobs ((coalesce(owner, '')), endpoint, finished_at, id) WHERE finished_at IS NOT NULL;
CREATE INDEX jobs_ended_unstored ON jobs (finished_at) WHERE finished_at IS NOT NULL AND NOT store_io;

-- Every state a job has been in: `reelray jobs show`.
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
    seq bigint NOT NULL,  -- 1, 2, 3, ... within the job
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    level text NOT NULL,
    message text NOT NULL,
    progress json,  -- the same for programs, where the line tells of progress
    line_id uuid NOT NULL DEFAULT gen_random_uuid(),  -- the writer's; a line that is written twice is kept once
    PRIMARY KEY (job_id, seq)
);

-- Which job an idempotency key stands for. One owner's key names one job: of any number of simultaneous repeats one makes the job,
-- and the others wait for its commit.
CREATE TABLE idempotency_keys (
    owner text NOT NULL,  -- '' where the service is open
    key text NOT NULL,
    fingerprint bytea NOT NULL,  -- of the endpoint and the body
    job_id uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
    rejected boolean NOT NULL,  -- the body was no valid input and its job failed at once: a corrected body may use the key again
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (owner, key)
);

CREATE INDEX idempotency_keys_by_job ON idempotency_keys (job_id);
CREATE INDEX idempotency_keys_by_expiry ON idempotency_keys (expires_at);

CREATE TABLE paused_endpoints (
    endpoint text PRIMARY KEY,
    paused_at timestamptz NOT NULL DEFAULT now()
);

-- Files to be deleted one day. A row is written before its file is, so that a file expires even if its job never ends, or its
-- upload never does.
CREATE TABLE stored_files (
    name text PRIMARY KEY,  -- within the file store
    expires_at timestamptz NOT NULL,
    gone boolean NOT NULL DEFAULT false,  -- its time was over: it is being deleted
    owner text,  -- whose it is: the API key that sent it, or whose job made it
    size_bytes bigint NOT NULL DEFAULT 0,  -- as far as it counts for the owner's quota
    content_type text,
    access json,  -- who may read it, as fal's `initial_acl`; null: everybody who knows its URL
    -- Of uploads:
    digest bytea,  -- of what was sent; null: it is not complete yet
    keep_s double precision,  -- how long it is kept from then on; null: for ever
    part_of text,  -- the upload that this is a part of
    direct boolean NOT NULL DEFAULT false  -- it is sent to the bucket itself: whether it has arrived has to be looked up there
);

CREATE INDEX stored_files_by_expiry ON stored_files (expires_at);
CREATE INDEX stored_files_by_owner ON stored_files (owner) INCLUDE (size_bytes) WHERE owner IS NOT NULL;
CREATE INDEX stored_files_direct ON stored_files (expires_at) WHERE direct AND digest IS NULL;
CREATE INDEX stored_files_by_upload ON stored_files (part_of) WHERE part_of IS NOT NULL;

-- Signs the upload URLs and tokens of an open service; with keys, each secret has its own `token_key`.
CREATE TABLE open_token_key (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    token_key bytea NOT NULL DEFAULT uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())
);

-- A key is who a caller is; a secret, which can be replaced, is how the caller proves it.
CREATE TABLE api_keys (
    id text PRIMARY KEY,
    name text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    revoked_at timestamptz,
    max_running integer CHECK (max_running > 0),
    scopes text[] NOT NULL DEFAULT '{submit,read}'
        CHECK (scopes <@ ARRAY['submit', 'read', 'admin'] AND cardinality(scopes) > 0)
);

CREATE TABLE api_key_secrets (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    key_id text NOT NULL REFERENCES api_keys,
    hash bytea NOT NULL UNIQUE,
    -- Signs the short-lived tokens that were issued for this secret, so they end with it. Two UUIDs are 244 random bits.
    token_key bytea NOT NULL DEFAULT uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz  -- null: of the one that was not replaced yet
);

CREATE INDEX api_key_secrets_by_key ON api_key_secrets (key_id);

-- The webhook of every job that has ended and asked for one: what the courier has still to do, and what it knows.
CREATE TABLE webhook_outbox (
    job_id uuid PRIMARY KEY REFERENCES jobs ON DELETE CASCADE,
    url text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    owner text,
    -- Host and port as a hash, only used to keep an owner's receivers apart and to begin with a random one of them.
    receiver bigint NOT NULL GENERATED ALWAYS AS (
        hashtextextended(coalesce(lower(substring(url FROM '^[^:]*://(?:[^/?#]*@)?([^/?#]*)')), ''), 0)
    ) STORED,
    -- The bytes of every delivery: stored before the first is sent, so that no later one can differ.
    body bytea,
    -- Null: nothing is left to do. While a courier holds the row, it is the end of its lease, so a courier that dies loses nothing.
    next_attempt_at timestamptz DEFAULT now(),
    due boolean NOT NULL DEFAULT true,  -- that time has come, as a courier has found. Claims look at no other rows.
    lease_until timestamptz,
    token uuid,  -- of the delivery in hand
    attempts integer NOT NULL DEFAULT 0,
    tries integer NOT NULL DEFAULT 0,  -- attempts since it was queued, or queued again by hand
    delivered_at timestamptz,
    last_status integer,
    last_error text
);

CREATE INDEX webhook_outbox_due ON webhook_outbox ((coalesce(owner, '')), receiver, next_attempt_at) WHERE due;
CREATE INDEX webhook_outbox_not_yet_due ON webhook_outbox (next_attempt_at) WHERE NOT due AND next_attempt_at IS NOT NULL;
CREATE INDEX webhook_outbox_in_hand ON webhook_outbox ((coalesce(owner, '')), receiver) WHERE lease_until IS NOT NULL;
CREATE INDEX webhook_outbox_by_owner ON webhook_outbox ((coalesce(owner, '')), created_at, job_id);

CREATE TABLE webhook_deliveries (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
    at timestamptz NOT NULL,
    attempt integer NOT NULL,
    status integer,
    error text,
    duration_s double precision NOT NULL
);

CREATE INDEX webhook_deliveries_by_job ON webhook_deliveries (job_id, id);

-- What webhooks are signed with. The private keys are not encrypted: whoever can read this database can sign.
CREATE TABLE signing_keys (
    id text PRIMARY KEY,
    private_key bytea NOT NULL,
    public_key bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    signs_from timestamptz NOT NULL,
    retired_at timestamptz  -- from when on it is no longer published
);

-- There is one newest key, however many processes make the first one at once.
CREATE UNIQUE INDEX signing_keys_newest ON signing_keys ((true)) WHERE retired_at IS NULL;
