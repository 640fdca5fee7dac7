-- Every statement of the webhook outbox. Times are the database's.

-- name: wake
-- Webhooks whose time has come are due from now on. All others are in no index that a claim walks. Another courier that is just
-- doing the same is not waited for.
UPDATE webhook_outbox SET due = true WHERE job_id IN (
    SELECT job_id FROM webhook_outbox WHERE NOT due AND next_attempt_at <= now()
    ORDER BY next_attempt_at LIMIT 1000 FOR UPDATE SKIP LOCKED
)

-- name: claim
-- Takes up to $2 webhooks that are due: from every owner in turn, and of an owner from every receiver in turn. No more than $4 of
-- an owner are in hand at a time, and $3 of one of its receivers, whoever holds them. Owners and receivers are found by one index
-- probe each, so a backlog costs nothing, and neither does an owner who has $4 in hand. Of an owner with very many receivers only
-- $4 are looked at from the place $6 on and as many from the beginning; $6 is random, so that all have their turn. The second
-- look at the time is under the lock: another courier may have been faster.
WITH RECURSIVE owners AS (
    (SELECT coalesce(owner, '') AS owner FROM webhook_outbox WHERE due ORDER BY coalesce(owner, '') LIMIT 1)
    UNION ALL
    SELECT (
        SELECT coalesce(following.owner, '') FROM webhook_outbox AS following
        WHERE following.due AND coalesce(following.owner, '') > owners.owner
        ORDER BY coalesce(following.owner, '') LIMIT 1
    ) FROM owners WHERE owners.owner IS NOT NULL
), shares AS (
    SELECT owners.owner, in_hand.deliveries FROM owners
    CROSS JOIN LATERAL (
        SELECT count(*) AS deliveries FROM webhook_outbox
        WHERE lease_until > now() AND coalesce(webhook_outbox.owner, '') = owners.owner
    ) AS in_hand
    WHERE owners.owner IS NOT NULL AND in_hand.deliveries < $4
), receivers AS (
    SELECT shares.owner, shares.deliveries, ranges.high, 1 AS nth, (
        SELECT first.receiver FROM webhook_outbox AS first
        WHERE first.due AND coalesce(first.owner, '') = shares.owner AND first.receiver BETWEEN ranges.low AND ranges.high
        ORDER BY first.receiver LIMIT 1
    ) AS receiver
    FROM shares CROSS JOIN (
        VALUES ($6::bigint, 9223372036854775807), ((-9223372036854775808)::bigint, $6 - 1)
    ) AS ranges (low, high)
    UNION ALL
    SELECT receivers.owner, receivers.deliveries, receivers.high, receivers.nth + 1, (
        SELECT following.receiver FROM webhook_outbox AS following
        WHERE following.due AND coalesce(following.owner, '') = receivers.owner
            AND following.receiver > receivers.receiver AND following.receiver <= receivers.high
        ORDER BY following.receiver LIMIT 1
    ) FROM receivers WHERE receivers.receiver IS NOT NULL AND receivers.nth < $4
), waiting AS (
    SELECT oldest.job_id, oldest.next_attempt_at, receivers.deliveries + row_number() OVER (
        PARTITION BY receivers.owner ORDER BY in_hand.deliveries + oldest.place, oldest.next_attempt_at
    ) AS place
    FROM receivers
    CROSS JOIN LATERAL (
        SELECT count(*) AS deliveries FROM webhook_outbox
        WHERE lease_until > now() AND coalesce(owner, '') = receivers.owner AND receiver = receivers.receiver
    ) AS in_hand
    CROSS JOIN LATERAL (
        SELECT job_id, next_attempt_at, row_number() OVER (ORDER BY next_attempt_at) AS place FROM webhook_outbox
        WHERE due AND coalesce(owner, '') = receivers.owner AND receiver = receivers.receiver
        ORDER BY next_attempt_at LIMIT greatest($3 - in_hand.deliveries, 0)
    ) AS oldest
    WHERE receivers.receiver IS NOT NULL
), candidates AS (
    SELECT job_id FROM waiting WHERE place <= $4 ORDER BY place, next_attempt_at LIMIT $2
), taken AS (
    SELECT job_id FROM webhook_outbox
    WHERE job_id = ANY (ARRAY(SELECT job_id FROM candidates)) AND next_attempt_at <= now()
    FOR UPDATE SKIP LOCKED
)
UPDATE webhook_outbox SET
    token = $1,
    due = false,
    lease_until = now() + make_interval(secs => $5),
    next_attempt_at = now() + make_interval(secs => $5),
    attempts = attempts + 1,
    tries = tries + 1
FROM taken JOIN jobs ON jobs.id = taken.job_id
WHERE webhook_outbox.job_id = taken.job_id
RETURNING webhook_outbox.job_id, webhook_outbox.token, url, webhook_outbox.owner, tries, body,
    CASE WHEN body IS NULL THEN result END AS result, CASE WHEN body IS NULL THEN failure END AS failure, service_url, traceparent

-- name: keep_body
-- The bytes that every delivery sends: those of the first that asked.
UPDATE webhook_outbox SET body = coalesce(body, $3) WHERE job_id = $1 AND token = $2 RETURNING body

-- name: finish
-- Records an attempt and when the next one is due (null: none is). The token is removed, so a repeated call records nothing. Where
-- `tries` is no longer $7, somebody has asked meanwhile for the webhook to be sent again: if this try failed, the next is due now.
WITH tried AS (
    UPDATE webhook_outbox SET
        token = NULL,
        lease_until = NULL,
        next_attempt_at = now() + make_interval(secs => CASE WHEN $4::text IS NOT NULL AND tries <> $7 THEN 0 ELSE $6 END),
        delivered_at = CASE WHEN $4::text IS NULL THEN now() ELSE delivered_at END,
        last_status = $3,
        last_error = $4
    WHERE job_id = $1 AND token = $2
    RETURNING job_id, attempts
)
INSERT INTO webhook_deliveries (job_id, at, attempt, status, error, duration_s)
SELECT job_id, clock_timestamp() - make_interval(secs => $5), attempts, $3, $4, $5 FROM tried

-- name: release
-- Gives back a webhook whose attempt was interrupted, as if it had not begun.
UPDATE webhook_outbox SET
    token = NULL, lease_until = NULL, next_attempt_at = now(), attempts = attempts - 1, tries = greatest(tries - 1, 0)
WHERE job_id = $1 AND token = $2

-- name: redeliver
-- Queues a webhook again with all its tries. One that is being sent at this moment is sent again only if that fails.
WITH queued AS (
    UPDATE webhook_outbox SET next_attempt_at = CASE WHEN lease_until > now() THEN next_attempt_at ELSE now() END, tries = 0
    WHERE job_id = $1 RETURNING job_id
)
SELECT job_id, pg_notify('reelray', 'webhooks') FROM queued

-- name: get
-- One webhook.
SELECT job_id, owner, url, created_at, next_attempt_at, attempts, delivered_at, last_status, last_error, body
FROM webhook_outbox WHERE job_id = $1

-- name: backlog
-- How many will be tried again, and for how many seconds the first of them has waited.
SELECT count(*) AS waiting, coalesce(extract(epoch FROM now() - min(created_at)), 0)::double precision AS oldest_s
FROM webhook_outbox WHERE next_attempt_at IS NOT NULL

-- name: attempts
-- What was tried, in order.
SELECT at, attempt, status, error, duration_s FROM webhook_deliveries WHERE job_id = $1 ORDER BY id

-- name: list
-- An owner's webhooks, oldest first, after a place in that order and not before a time. The last $5 seconds are left out: what
-- commits late must not come to lie before a place already passed.
SELECT job_id, owner, url, created_at, next_attempt_at, attempts, delivered_at, last_status, last_error, body
FROM webhook_outbox
WHERE coalesce(owner, '') = coalesce($1, '') AND (created_at, job_id) > ($2, $3)
    AND created_at < clock_timestamp() - make_interval(secs => $5)
ORDER BY created_at, job_id LIMIT $4

-- name: signing_key
-- The newest of the keys that sign by now. If there is none, because a clock was set back, the one that signs first.
SELECT id, private_key, public_key FROM signing_keys WHERE retired_at IS NULL OR retired_at > now()
ORDER BY signs_from <= now() DESC, abs(extract(epoch FROM signs_from - now())), created_at DESC LIMIT 1

-- name: published_keys
-- The keys a receiver may meet, the next one included; newest first.
SELECT id, private_key, public_key FROM signing_keys WHERE retired_at IS NULL OR retired_at > now() ORDER BY created_at DESC, id

-- name: retire_keys
-- Sets the end of the keys before this one that have none yet; without an overlap, all of them end at once.
UPDATE signing_keys SET retired_at = now() + 2 * make_interval(secs => $2)
WHERE id <> $1 AND (retired_at IS NULL OR retired_at > now() + 2 * make_interval(secs => $2))

-- name: add_key
-- A new newest key. No row if there is one: another process was faster.
INSERT INTO signing_keys (id, private_key, public_key, signs_from)
VALUES ($1, $2, $3, now() + make_interval(secs => $4)) ON CONFLICT DO NOTHING RETURNING id
