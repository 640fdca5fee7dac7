-- Every statement about uploads. A row of `stored_files` with a digest is complete.

-- name: begin_upload
-- False if it exceeds its owner's quota $8. $9: where it arrives in the bucket, if it is sent there.
WITH allowed AS (
    SELECT is_within_quota($3, $1, $7, $8) AS is_allowed
), begun AS (
    INSERT INTO stored_files (name, expires_at, owner, content_type, access, keep_s, size_bytes, direct)
    SELECT $1, now() + make_interval(secs => $2), $3, $4, $5, $6, $7, $9::text IS NOT NULL FROM allowed WHERE is_allowed
    ON CONFLICT (name) DO NOTHING
), arriving AS (
    INSERT INTO stored_files (name, expires_at, part_of)
    SELECT $9, now() + make_interval(secs => $2) + interval '1 hour', $1 FROM allowed WHERE is_allowed AND $9 IS NOT NULL
    ON CONFLICT (name) DO NOTHING
)
SELECT is_allowed FROM allowed

-- name: find_upload
-- An upload whose time is not over.
SELECT owner, digest FROM stored_files WHERE name = $1 AND part_of IS NULL AND NOT gone AND expires_at > now()

-- name: reserve_upload
SELECT refusal, digest FROM reserve_upload($1, $2, $3, $4, $5)

-- name: release
UPDATE stored_files SET size_bytes = 0 WHERE name = $1 AND digest IS NULL

-- name: finish_part
-- Not flushed to disk: if a crash undoes it, the upload's end says that the part is missing.
WITH relaxed AS (SELECT set_config('synchronous_commit', 'off', true))
UPDATE stored_files SET digest = $2, size_bytes = $3 FROM relaxed WHERE name = $1 AND NOT gone AND expires_at > now()
RETURNING name

-- name: parts
SELECT name, size_bytes FROM stored_files WHERE part_of = $1 AND digest IS NOT NULL AND NOT gone

-- name: finish_upload
-- The time for which it is kept begins. Its parts are deleted by the next sweep. Returns a row also when the call is repeated.
WITH finished AS (
    UPDATE stored_files SET
        digest = $2,
        size_bytes = $3,
        expires_at = coalesce(now() + make_interval(secs => keep_s), 'infinity')
    WHERE name = $1 AND digest IS NULL AND NOT gone AND expires_at > now()
    RETURNING name
), parts AS (
    UPDATE stored_files SET expires_at = now(), size_bytes = 0 FROM finished WHERE part_of = finished.name
)
SELECT name FROM finished UNION ALL SELECT name FROM stored_files WHERE name = $1 AND digest = $2 AND NOT gone

-- name: finish_parts
SELECT finish_parts($1, $2, $3, $4, $5) AS refusal

-- name: drop_parts
-- They are in the file: the next sweep deletes them.
UPDATE stored_files SET expires_at = now() WHERE part_of = $1

-- name: find_file
-- What is known of a file, whose time is not over.
SELECT owner, content_type, access, expires_at, size_bytes, direct AND digest IS NULL AS unsettled
FROM stored_files WHERE name = $1 AND part_of IS NULL AND NOT gone AND expires_at > now()

-- name: open_direct
-- Uploads to the bucket that may have arrived: those whose time is over first, then any.
SELECT name, size_bytes, expires_at <= now() AS is_over FROM stored_files
WHERE direct AND digest IS NULL ORDER BY is_over DESC, random() LIMIT $1

-- name: settle_direct
-- One of them is complete, with $2 bytes.
UPDATE stored_files SET
    digest = '\x00',
    size_bytes = $2,
    expires_at = coalesce(now() + make_interval(secs => keep_s), 'infinity')
WHERE name = $1 AND direct AND digest IS NULL AND NOT gone

-- name: give_up_direct
-- One of them is not there, or larger than was agreed. What arrives later is deleted when its own time is over.
UPDATE stored_files SET direct = false, expires_at = now() WHERE name = $1 AND digest IS NULL
