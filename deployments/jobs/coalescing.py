"""Calls that come while another is being answered are made as one, and share the cost of a single call.

Every waiting client polls ten times a second, and most polls come while an earlier one is being answered. A round trip, a
statement's start and a commit's flush are then paid once for all of them; a lone call is sent at once.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class Coalescer(Generic[Q, A]):
    """Collects the questions that come while earlier ones are being answered, and asks them together after that.

    answer: answers some questions at once, in their order. An exception among the answers is raised for its question alone; an
    exception that `answer` raises is raised for all of them. most: questions at once.
    """

    def __init__(self, answer: Callable[[Sequence[Q]], Awaitable[Sequence[A | Exception]]], most: int = 64):
        self._answer = answer
        self._most = most
        self._waiting: list[tuple[Q, asyncio.Future[A]]] = []
        self._asking: asyncio.Task[None] | None = None

    async def ask(self, question: Q) -> A:
        """The answer to a question; it is asked after this call began, so the answer is never older than the call."""
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask_all())
        return await future

    async def _ask_all(self) -> None:
        try:
            while asked := self._waiting[: self._most]:
                del self._waiting[: self._most]
                await self._ask(asked)
        finally:
            self._asking = None

    async def _ask(self, asked: Sequence[tuple[Q, asyncio.Future[A]]]) -> None:
        answers: Sequence[A | Exception]
        try:
            answers = await self._answer([question for question, _ in asked])
        except Exception as exc:
            answers = [exc] * len(asked)
        for (_, future), answer in zip(asked, answers, strict=True):
            if future.done():  # its caller was cancelled
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
