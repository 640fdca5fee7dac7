"""Callers repeat a submission blindly under its `Idempotency-Key`, poll their job's status and fetch its file.

Webhook receivers sometimes answer 500 or hang up.
"""

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.chaos.stage import clip_of
from tests.chaos.system import ENDPOINT, Plan, System
from tests.deployments.webhooks.receiver import Answer, Received, Receiver, receiving

RECEIVERS = 8
TROUBLES = 2
"""Failed deliveries of one webhook, at most. Its third attempt may come a minute after the job's end."""
POLL_S = 0.5
AT_ONCE = 60
"""Concurrent callers: as many as one process can serve beside everything else on two cores."""
TIMEOUT_S = 3.0


@dataclass
class Outcome:
    """What callers saw. acknowledged: prompt -> every request id that the service returned for it."""

    acknowledged: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    ended: dict[str, dict[str, Any]] = field(default_factory=dict)
    retries: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class Callers:
    """One task per job."""

    def __init__(self, system: System, receivers: list[Receiver]):
        self.system = system
        self.receivers = receivers
        self.random = random.Random(system.plan.seed + 1)
        self.outcome = Outcome()
        self.room = asyncio.Semaphore(AT_ONCE)

    async def run(self) -> Outcome:
        """Returns when every caller has its result, or has waited too long."""
        plan = self.system.plan
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)  # at a limit, callers starve each other
        try:
            async with (
                asyncio.timeout(plan.over_s + plan.patience_s),
                httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits, trust_env=False) as http,
                asyncio.TaskGroup() as group,
            ):
                for number in range(plan.jobs):
                    await self.room.acquire()
                    group.create_task(self._call(http, number)).add_done_callback(lambda _: self.room.release())
                    await asyncio.sleep(plan.over_s / plan.jobs)
        except TimeoutError:
            self.outcome.faults.append(f"callers without a result after {plan.patience_s:g} s: {dict(self.outcome.retries)}")
        return self.outcome

    async def _call(self, http: httpx.AsyncClient, number: int) -> None:
        prompt = f"job {number}"
        job_id = await self._submit(http, number, prompt)
        path = f"/queue/{ENDPOINT}/requests/{job_id}"
        while (await self._ask(http, "GET", f"{path}/status", (200, 202))).status_code != 200:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
        result = await self._ask(http, "GET", path, range(200, 600))
        self.outcome.ended[prompt] = result.json()
        if result.status_code == 200:
            file = await self._ask(http, "GET", httpx.URL(result.json()["video"]["url"]).path, (200,))
            if file.text != clip_of(prompt, number):
                self.outcome.faults.append(f"the file of {prompt} holds {file.text!r}")

    async def _submit(self, http: httpx.AsyncClient, number: int, prompt: str) -> str:
        for _ in range(2 if self.random.random() < 0.2 else 1):  # some repeat the submission although it was answered
            answer = await self._ask(
                http,
                "POST",
                f"/queue/{ENDPOINT}",
                (200,),
                json={"prompt": prompt, "seed": number},
                params={"fal_webhook": self.receivers[number % len(self.receivers)].url()},
                headers={"idempotency-key": f"key of {prompt}"},
            )
            self.outcome.acknowledged[prompt].append(answer.json()["request_id"])
        return self.outcome.acknowledged[prompt][0]

    async def _ask(self, http: httpx.AsyncClient, method: str, path: str, welcome: Any, **request: Any) -> httpx.Response:
        """Repeats the request, at a random gateway each time, until the answer is not a failure of the service."""
        while True:
            url = f"http://127.0.0.1:{self.random.choice(self.system.ports)}{path}"
            try:
                answer = await http.request(method, url, **request)
            except httpx.HTTPError as exc:
                self.outcome.retries[f"{method} {type(exc).__name__}"] += 1
            else:
                of_job = answer.headers["x-fal-request-id"] in path  # the status is the job's outcome, not the service's
                if answer.status_code in welcome and (answer.status_code < 500 or of_job):
                    return answer
                self.outcome.retries[f"{method} {answer.status_code}"] += 1
                if answer.status_code < 500:
                    self.outcome.faults.append(f"{method} {path} was answered {answer.status_code}: {answer.text}")
            await asyncio.sleep(self.random.uniform(0.1, 0.5))


def moody(plan: Plan) -> Answer:
    """Mostly acknowledges."""
    mood = random.Random(plan.seed + 2)
    troubles: Counter[str] = Counter()

    async def answer(request: Received, writer: asyncio.StreamWriter) -> None:
        if mood.random() < 0.25 and troubles[request.request_id] < TROUBLES:
            troubles[request.request_id] += 1
            if mood.random() < 0.5:
                return  # hangs up without an answer
            writer.write(b"HTTP/1.1 500 Moody\r\ncontent-length: 0\r\n\r\n")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    return answer


@asynccontextmanager
async def receivers(plan: Plan) -> AsyncIterator[list[Receiver]]:
    """Several receivers: each gets only a few webhooks at once, and a dead courier's count until its lease ends."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(receiving(moody(plan))) for _ in range(RECEIVERS)]
