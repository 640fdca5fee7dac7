-- What the courier knows of each webhook, what it tried, and what it signs with. Jobs that ended before are told now.

ALTER TABLE jobs ADD COLUMN service_url text;  -- where its caller reached the service; goes before the URLs in its webhook

ALTER TABLE webhook_outbox
    ADD COLUMN owner text,
    -- Who is told, for isolation only: host and port. Cut, because an index takes no more than 2,704 bytes, and a caller's absurd
    -- URL must not keep a job from ending.
    ADD COLUMN receiver text NOT NULL
        GENERATED ALWAYS AS (left(coalesce(lower(substring(url FROM '^[^:]*://(?:[^/?#]*@)?([^/?#]*)')), ''), 255)) STORED,
    -- The very bytes of every delivery: kept before the first is sent, so that no later one can differ.
    ADD COLUMN body bytea,
    -- Null: nothing is left to do. While a courier holds the row, the end of its lease: who dies leaves nothing behind.
    ADD COLUMN next_attempt_at timestamptz DEFAULT now(),
    ADD COLUMN lease_until timestamptz,
    ADD COLUMN token uuid,  -- of the delivery in hand
    ADD COLUMN attempts integer NOT NULL DEFAULT 0,
    ADD COLUMN tries integer NOT NULL DEFAULT 0,  -- attempts since it was queued, or queued again by hand
    ADD COLUMN delivered_at timestamptz,
    ADD COLUMN last_status integer,
    ADD COLUMN last_error text;

UPDATE webhook_outbox SET owner = jobs.owner FROM jobs WHERE jobs.id = webhook_outbox.job_id;

CREATE INDEX webhook_outbox_due ON webhook_outbox (receiver, next_attempt_at) WHERE next_attempt_at IS NOT NULL;
CREATE INDEX webhook_outbox_in_hand ON webhook_outbox (receiver) WHERE lease_until IS NOT NULL;
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

-- The private key lies here as it is: whoever can read this database can sign.
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

CREATE FUNCTION webhook_outbox_before_insert() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.owner := (SELECT owner FROM jobs WHERE id = NEW.job_id);
    RETURN NEW;
END $$;

CREATE TRIGGER before_insert BEFORE INSERT ON webhook_outbox
    FOR EACH ROW EXECUTE FUNCTION webhook_outbox_before_insert();

-- Couriers hear 'webhooks'.
CREATE FUNCTION webhook_outbox_after_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('reelray', 'webhooks');
    RETURN NULL;
END $$;

CREATE TRIGGER after_insert AFTER INSERT ON webhook_outbox
    FOR EACH STATEMENT EXECUTE FUNCTION webhook_outbox_after_change();
