-- What an API key may do, and secrets that can be replaced: a key is who a caller is, a secret is how it shows that.

ALTER TABLE api_keys ADD COLUMN scopes text[] NOT NULL DEFAULT '{submit,read}'
    CHECK (scopes <@ ARRAY['submit', 'read', 'admin'] AND cardinality(scopes) > 0);

CREATE TABLE api_key_secrets (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    key_id text NOT NULL REFERENCES api_keys,
    hash bytea NOT NULL UNIQUE,
    -- What short-lived tokens are signed with that this secret was shown for: they end with it. Two UUIDs are 244 bits of chance.
    token_key bytea NOT NULL DEFAULT uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz  -- null: of the one that was not replaced yet
);

CREATE INDEX api_key_secrets_by_key ON api_key_secrets (key_id);

INSERT INTO api_key_secrets (key_id, hash, created_at) SELECT id, hash, created_at FROM api_keys;

ALTER TABLE api_keys DROP COLUMN hash;
