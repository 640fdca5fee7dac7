-- What the autoscaling needs to know of jobs and stages, and the trace of a job.

ALTER TABLE jobs
    -- The trace that it belongs to: W3C Trace Context, version 00. It becomes a header of the webhook, so nothing else may stand here.
    ADD traceparent text CHECK (traceparent ~ '^00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]$'),
    ADD units double precision[] NOT NULL DEFAULT '{1,1,1}',  -- of work in preprocessing, denoising and decoding, as far as its input tells
    ADD parallel integer NOT NULL DEFAULT 1;  -- units of denoising that can run at the same time

-- What the autoscaling knows of each stage, written by its policy every second: for operators, and for the policy's next start.
CREATE TABLE stages (
    endpoint text NOT NULL,
    stage text NOT NULL,
    unit_s double precision NOT NULL,  -- seconds a unit of its work takes
    ready_s double precision NOT NULL,  -- seconds from asking for a replica until it is ready
    backlog_s double precision NOT NULL,  -- of work that waits, over the replicas that there are
    replicas integer NOT NULL,
    target integer NOT NULL,
    at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (endpoint, stage)
) WITH (fillfactor = 50);
