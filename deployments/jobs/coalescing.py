"""Calls that come while another is under way, made as one: they share the cost of a single call.

Most of the ten polls a second of every waiting client come while an earlier one is being answered. A round trip, a statement's
start and a commit's flush are then paid once for all of them, and a lone call is sent at once.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class Coalescer(Generic[Q, A]):
    """Gathers the questions that come while an answer is under way, and asks them together after it.

    answer: of some questions at once, in their order; an exception among the answers is raised for its question alone, one that
    is raised for all. most: questions at once.
    """

    def __init__(self, answer: Callable[[Sequence[Q]], Awaitable[Sequence[A | Exception]]], most: int = 64):
        self._answer = answer
        self._most = most
        self._waiting: list[tuple[Q, asyncio.Future[A]]] = []
        self._asking: asyncio.Task[None] | None = None

    async def ask(self, question: Q) -> A:
        """The answer to a question that is put after this call began."""
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
            if future.done():  # who asked has gone
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
