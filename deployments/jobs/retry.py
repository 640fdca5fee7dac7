"""Which errors are tried again, how often and after how long: every such decision, as pure functions of one table.

    what went wrong      attempts at most   waits before attempt 2, 3, 4, ... (in seconds, plus or minus a quarter)
    RunnerDisconnected   max_attempts, 3*   0, 1, 2, 4, ... 30: another replica may be there at once; a whole pool needs time
    SamplerLost          max_attempts       as above
    RunnerStalled        max_attempts, 3*   as above; each attempt may cost the whole idle deadline
    RunnerOutOfMemory    max_attempts, 2*   as above: on another replica, or beside other work, it may be enough
    StorageFailed        max_attempts       5, 10, 20, ... 300: a full disk is not fixed in a second; ten attempts last 20 min
    lost lease           max_attempts       0: the end of the lease was wait enough
    all else             1                  what the model or we refuse once is refused again

* So many attempts that were lost while the same stage worked on the job: its input kills or hangs replicas, or is too large for
them. An attempt that no replica had begun to work on does not count for this, nor one whose sampler was lost: dozens of jobs are
lost with it, each goes on at its last step, and it computes next to nothing itself. A unit of denoising that ends its replicas is
given up by the sampler, and that attempt counts. Preprocessing works on several jobs in one process, which are lost together:
after the first such loss a job is preprocessed alone, so an innocent one is lost once, not three times.

A caller may set how often a job is tried again after each condition of fal's `X-Fal-Retry-Config`, up to `max_attempts`; the
conditions have budgets of their own, and no other limit holds for them. `CONDITIONS` says what is which. A lost lease is
`connection_error`. With a budget, a job whose run deadline has passed is tried again as well.

`max_attempts` is the job's own (`queue.max_attempts`), and 1 if its caller sent `X-Fal-No-Retry`: then nothing is tried
again, not even after a lost lease. An attempt that we gave up ourselves, at a shutdown, does not count. What follows a lost
lease is decided by `sweep_leases` in `sql/queries.sql`.
"""

from dataclasses import dataclass
from math import inf

from deployments.schemas.submission import RetryCondition
from engines.errors import (
    GenerationTimeout,
    ReelrayError,
    RunnerDisconnected,
    RunnerOutOfMemory,
    RunnerStalled,
    SamplerLost,
    StorageFailed,
)

JITTER = 0.25
"""By which share a wait is longer or shorter, so that jobs that failed together do not come back together."""


@dataclass(frozen=True)
class Policy:
    """first_s, second_s: waits before the second and third attempt; then they double, up to `longest_s`. All in seconds.

    losses: so many attempts that ended with the error while the same stage worked are the last, whatever attempts are left.
    """

    first_s: float
    second_s: float
    longest_s: float
    losses: float = inf


POLICIES: dict[type[ReelrayError], Policy] = {
    RunnerDisconnected: Policy(first_s=0.0, second_s=1.0, longest_s=30.0, losses=3),
    SamplerLost: Policy(first_s=0.0, second_s=1.0, longest_s=30.0),
    RunnerStalled: Policy(first_s=0.0, second_s=1.0, longest_s=30.0, losses=3),
    RunnerOutOfMemory: Policy(first_s=0.0, second_s=1.0, longest_s=30.0, losses=2),
    StorageFailed: Policy(first_s=5.0, second_s=10.0, longest_s=300.0),
}

CONDITIONS: dict[type[ReelrayError], RetryCondition] = {
    RunnerDisconnected: "server_error",
    RunnerStalled: "timeout",
    GenerationTimeout: "timeout",
}
"""fal's names for what its callers can set a number of retries for."""


def condition_of(error: ReelrayError) -> RetryCondition | None:
    """fal's name for an error; None: it has none."""
    return next((CONDITIONS[kind] for kind in type(error).__mro__ if kind in CONDITIONS), None)


def policy_of(error: ReelrayError) -> Policy | None:
    """The table's row for an error; None: it is never tried again."""
    return next((POLICIES[kind] for kind in type(error).__mro__ if kind in POLICIES), None)


def counts_losses(error: ReelrayError) -> bool:
    """Whether a job's input may be what causes an error, if it comes again and again while the same stage works."""
    policy = policy_of(error)
    return policy is not None and policy.losses < inf


def wait_s(policy: Policy, attempt: int, draw: float = 0.5) -> float:
    """Seconds before the attempt after `attempt`, which counts from 1. draw: 0 to 1, the position within the jitter."""
    # the exponent is bounded: the operator sets the number of attempts, and 2.0**2000 is an error
    usual = policy.first_s if attempt == 1 else policy.second_s * 2.0 ** min(attempt - 2, 60)
    return min(usual, policy.longest_s) * (1 + JITTER * (2 * draw - 1))


def next_attempt_in(
    error: ReelrayError, attempt: int, max_attempts: int, losses: int = 0, draw: float = 0.5, budget: int | None = None
) -> float | None:
    """Seconds until a job whose `attempt`, from 1, ended in `error` is tried again; None: never, the job ends with the error.

    losses: how many attempts, with this one, were lost while the stage worked that did now; 0: none did.
    budget: how many more retries the caller allows after this error; None: it is ours to decide.
    """
    policy = policy_of(error)
    if budget is not None:
        policy = (policy or POLICIES[RunnerStalled]) if budget > 0 else None
    if policy is None or attempt >= max_attempts or (budget is None and losses >= policy.losses):
        return None
    return wait_s(policy, attempt, draw)
