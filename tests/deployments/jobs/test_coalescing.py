import asyncio
from collections.abc import Sequence

import pytest

from deployments.jobs.coalescing import Coalescer


class Answers:
    """Doubles numbers, once `let` is set. groups: the questions of each call."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.let = asyncio.Event()

    async def __call__(self, questions: Sequence[int]) -> Sequence[int | Exception]:
        self.groups.append(list(questions))
        await self.let.wait()
        if 13 in questions:
            raise LookupError(13)
        return [ValueError(each) if each < 0 else 2 * each for each in questions]


async def asked(coalescer: Coalescer[int, int], *questions: int) -> list[asyncio.Task[int]]:
    """Asks the questions one after the other, without waiting for answers."""
    tasks = [asyncio.create_task(coalescer.ask(each)) for each in questions]
    await asyncio.sleep(0)
    return tasks


async def test_what_is_asked_while_an_answer_is_under_way_is_asked_together_after_it() -> None:
    answers = Answers()
    coalescer = Coalescer(answers)
    first = await asked(coalescer, 1)
    await asyncio.sleep(0)
    later = [*await asked(coalescer, 2, 3), *await asked(coalescer, 4)]
    answers.let.set()
    assert await asyncio.gather(*first, *later) == [2, 4, 6, 8]
    assert answers.groups == [[1], [2, 3, 4]]


async def test_a_group_is_no_larger_than_allowed() -> None:
    answers = Answers()
    answers.let.set()
    coalescer = Coalescer(answers, most=2)
    assert await asyncio.gather(*(coalescer.ask(each) for each in range(5))) == [0, 2, 4, 6, 8]
    assert answers.groups == [[0, 1], [2, 3], [4]]


async def test_an_answer_is_never_older_than_its_question() -> None:
    said = 0

    async def answer(questions: Sequence[int]) -> Sequence[int]:
        seen = said
        await asyncio.sleep(0)
        return [seen] * len(questions)

    coalescer: Coalescer[int, int] = Coalescer(answer)
    early = await asked(coalescer, 0)
    await asyncio.sleep(0)
    said = 1
    assert await coalescer.ask(0) == 1
    assert await early[0] == 0


async def test_an_error_among_the_answers_is_raised_for_its_question_only() -> None:
    answers = Answers()
    answers.let.set()
    coalescer = Coalescer(answers)
    good, bad = await asyncio.gather(coalescer.ask(1), coalescer.ask(-1), return_exceptions=True)
    assert good == 2
    assert isinstance(bad, ValueError)


async def test_an_error_of_the_group_is_raised_for_all_its_questions_and_the_next_group_is_answered() -> None:
    answers = Answers()
    answers.let.set()
    coalescer = Coalescer(answers)
    failed = await asyncio.gather(coalescer.ask(13), coalescer.ask(1), return_exceptions=True)
    assert [type(each) for each in failed] == [LookupError, LookupError]
    assert await coalescer.ask(1) == 2


async def test_a_cancelled_question_does_not_disturb_the_others() -> None:
    answers = Answers()
    coalescer = Coalescer(answers)
    gone, stays = await asked(coalescer, 1, 2)
    await asyncio.sleep(0)
    gone.cancel()
    answers.let.set()
    assert await stays == 4
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert await coalescer.ask(3) == 6


async def test_a_question_asked_again_at_once_is_answered_again() -> None:
    answers = Answers()
    answers.let.set()
    coalescer = Coalescer(answers)
    for each in range(3):
        assert await coalescer.ask(each) == 2 * each
