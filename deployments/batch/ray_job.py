"""A run as a Ray job: submitted to a cluster's dashboard, followed and stopped there.

`ray job submit --address http://head:8265 -- python -m deployments.batch <the run's folder>` does the same.
"""

import asyncio
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass

from ray.job_submission import JobStatus, JobSubmissionClient

from deployments.batch.run_folder import RunFolder
from engines.errors import ReelrayError

JOB = "job.json"
PASSED_ON = ("FAL_KEY",)
"""Variables of the environment that the job gets. Whoever may read the cluster's jobs can read them."""


class NoCluster(ReelrayError):
    """The cluster does not answer."""


@dataclass(frozen=True)
class RayJob:
    """address: of the cluster's dashboard, e.g. http://head:8265. submission_id: the job's."""

    address: str
    submission_id: str

    @classmethod
    def submit(cls, folder: RunFolder, address: str, options: list[str]) -> "RayJob":
        """options: of the driver. Raises `NoCluster`."""
        command = shlex.join(["python", "-m", "deployments.batch", folder.url, *options])
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        client = _client(address)
        job = cls(address, client.submit_job(entrypoint=command, runtime_env={"env_vars": environment}))
        folder.write(JOB, json.dumps(asdict(job)).encode())
        return job

    @classmethod
    def of(cls, folder: RunFolder) -> "RayJob | None":
        """The last one that a run was submitted as; None: it is worked on without one."""
        data = folder.read(JOB)
        return None if data is None else cls(**json.loads(data))

    @property
    def status(self) -> str:
        """Ray's word for it, e.g. RUNNING. Raises `NoCluster`."""
        return str(_client(self.address).get_job_status(self.submission_id).value)

    @property
    def has_ended(self) -> bool:
        """Whether it is over."""
        return bool(JobStatus(self.status).is_terminal())

    def exit_status(self) -> int:
        """The driver's, once it has ended."""
        code = _client(self.address).get_job_info(self.submission_id).driver_exit_code
        return 1 if code is None else int(code)

    def logs(self) -> str:
        """What the driver has said so far."""
        return str(_client(self.address).get_job_logs(self.submission_id))

    def follow(self, tell: Callable[[str], None]) -> None:
        """Tells what the driver says, until it has ended."""

        async def follow() -> None:
            async for text in _client(self.address).tail_job_logs(self.submission_id):
                tell(text)

        asyncio.run(follow())

    def stop(self) -> None:
        """Ends it."""
        _client(self.address).stop_job(self.submission_id)


def _client(address: str) -> JobSubmissionClient:
    try:
        return JobSubmissionClient(address)
    except Exception as exc:  # of its many kinds
        raise NoCluster(f"{address} does not answer as a Ray dashboard: {exc}") from exc
