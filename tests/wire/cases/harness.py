"""What a rule is, and how many are checked at a time. `__main__.py` runs them."""

import asyncio
import inspect
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any

import httpx

AT_ONCE = 16
LIMIT_S = 90.0

Check = Callable[[], None] | Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Given:
    """base: the service's URL. keys: who -> secret; None where the service is open. hooks: where webhooks may go.

    heard: a URL that answers a path's webhook, once it has come. rules: the names of those to check.
    """

    recipe: str
    base: str
    keys: dict[str, str] | None
    hooks: str
    heard: str
    rules: list[str]


@dataclass(frozen=True)
class Rule:
    name: str
    text: str
    check: Check


RULES: list[Rule] = []
CALLS: ContextVar[list[httpx.Response]] = ContextVar("calls")
"""What the calls of the rule that is being checked were answered."""
EVERYTHING: list[httpx.Response] = []


def rule(text: str, *, only: tuple[str, ...] | None = None, with_keys: bool = False) -> Callable[[Check], Check]:
    """Adds a rule, which is called as its function.

    only: recipes that it is checked under. with_keys: not on an open service. `conformance.py` reads both, and chooses.
    """

    def add(check: Check) -> Check:
        RULES.append(Rule(check.__name__.strip("_").replace("_", "-"), text, check))
        return check

    return add


def record() -> None:
    """Notes every answer that httpx gets."""
    send, send_async = httpx.Client.send, httpx.AsyncClient.send

    def note(response: httpx.Response) -> httpx.Response:
        for calls in (EVERYTHING, CALLS.get([])):
            if not any(each is response for each in calls[-20:]):  # the client's own `send` calls httpx's
                calls.append(response)
        return response

    async def noted(self: httpx.AsyncClient, *args: Any, **options: Any) -> httpx.Response:
        return note(await send_async(self, *args, **options))

    httpx.Client.send = lambda self, *args, **options: note(send(self, *args, **options))  # type: ignore[method-assign]
    httpx.AsyncClient.send = noted  # type: ignore[method-assign]


async def outcome(rule: Rule, pool: ThreadPoolExecutor, room: asyncio.Semaphore) -> str | None:
    async with room:
        calls: list[httpx.Response] = []
        CALLS.set(calls)
        try:
            async with asyncio.timeout(LIMIT_S):
                if inspect.iscoroutinefunction(rule.check):
                    await rule.check()
                else:
                    await asyncio.get_running_loop().run_in_executor(pool, copy_context().run, rule.check)
        except BaseException:
            seen = "\n".join(f"{call.request.method} {call.request.url} {call.status_code}" for call in calls)
            return f"{rule.text}\n{traceback.format_exc()}\n{seen}"
        return None


async def outcomes(rules: list[Rule]) -> dict[str, str | None]:
    room, pool = asyncio.Semaphore(AT_ONCE), ThreadPoolExecutor(2 * AT_ONCE)  # not closed: a rule that hangs keeps its thread
    found = await asyncio.gather(*(asyncio.create_task(outcome(each, pool, room)) for each in rules))
    return {each.name: why for each, why in zip(rules, found, strict=True)}
