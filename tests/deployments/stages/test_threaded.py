import asyncio
import gc
import threading
import time
import weakref

import pytest

from deployments.stages.threaded import InThread
from deployments.stages.throttle import BURST
from engines.errors import Cancelled, GenerationFailed
from engines.spec import OnProgress, Progress, ShouldStop
from tests.patience import PATIENCE_S


async def notes(work: InThread[object]) -> list[str]:
    return [note.message.partition(", ")[0] async for note in work]


async def test_progress_comes_as_notes_and_the_product_after_it() -> None:
    def count(tell: OnProgress, should_stop: ShouldStop) -> str:
        for done in (1, 2, 3):
            tell(Progress("pose", done, 3))
        return threading.current_thread().name

    async with InThread("preprocess", count) as work:
        assert await notes(work) == ["preprocess: pose 1/3", "preprocess: pose 2/3", "preprocess: pose 3/3"]
    assert work.product != threading.current_thread().name


async def test_the_seconds_are_those_of_the_call() -> None:
    async with InThread("preprocess", lambda tell, should_stop: time.sleep(0.05)) as work:
        assert await notes(work) == []
    assert 0.05 <= work.seconds < PATIENCE_S


async def test_an_error_is_raised_after_the_last_note() -> None:
    seen: list[str] = []

    def fail(tell: OnProgress, should_stop: ShouldStop) -> None:
        tell(Progress("pose", 1, 3))
        raise GenerationFailed

    with pytest.raises(GenerationFailed):
        async with InThread("preprocess", fail) as work:
            seen = await notes(work)
    assert seen == ["preprocess: pose 1/3"]


@pytest.mark.parametrize("end", ["failed", "cancelled"])
async def test_what_a_failed_or_cancelled_call_held_is_free_at_once(end: str) -> None:
    class Activations:
        """Stands for gigabytes of GPU memory."""

    held: list[weakref.ref[Activations]] = []

    def work_on(tell: OnProgress, should_stop: ShouldStop) -> None:
        activations = Activations()
        held.append(weakref.ref(activations))
        tell(Progress("step", 1, 3))
        while end == "cancelled" and not should_stop():
            time.sleep(0.001)
        raise Cancelled if end == "cancelled" else GenerationFailed

    async def call() -> None:
        async with InThread("preprocess", work_on) as work:
            async for _ in work:
                if end == "cancelled":
                    task.cancel()
                    await asyncio.sleep(10)

    gc.disable()
    try:
        task = asyncio.create_task(call())
        await asyncio.wait([task])
        assert held[0]() is None
    finally:
        gc.enable()


async def test_a_cancelled_call_is_stopped_and_waited_for() -> None:
    ended: list[bool] = []

    def work_on(tell: OnProgress, should_stop: ShouldStop) -> None:
        tell(Progress("pose", 1, 3))
        while not should_stop():
            time.sleep(0.01)
        time.sleep(0.1)  # the rest of its unit
        ended.append(True)

    started = asyncio.Event()

    async def listen() -> None:
        async with InThread("preprocess", work_on) as work:
            async for _ in work:
                started.set()

    listening = asyncio.create_task(listen())
    await started.wait()
    assert not ended
    listening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await listening
    assert ended


async def test_calls_leave_asyncios_own_threads_to_others() -> None:
    all_at_work = threading.Barrier(51, timeout=PATIENCE_S)
    async with asyncio.TaskGroup() as group:
        for _ in range(50):  # asyncio has 32 at most
            group.create_task(listen_to(InThread("preprocess", lambda tell, should_stop: all_at_work.wait())))
        await asyncio.to_thread(all_at_work.wait)


async def listen_to(call: InThread[object]) -> None:
    async with call:
        await notes(call)


async def test_a_chatty_call_neither_fills_the_memory_nor_keeps_others_waiting() -> None:
    def chat(tell: OnProgress, should_stop: ShouldStop) -> None:
        for _ in range(100_000):
            tell(Progress("pose", 67, 67))

    async with InThread("preprocess", chat) as work:
        told = await notes(work)
    assert len(told) <= BURST + work.seconds + 2


@pytest.mark.parametrize("leaving", ["cancelled", "closed"])
async def test_a_second_cancel_does_not_begin_the_next_turn_before_the_thread_has_ended(leaving: str) -> None:
    released, working = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    turn = asyncio.Lock()

    def finish_the_unit(tell: OnProgress, should_stop: ShouldStop) -> None:
        loop.call_soon_threadsafe(working.set)
        released.wait(PATIENCE_S)
        raise Cancelled

    async def call() -> None:
        async with turn, InThread("denoise", finish_the_unit) as work:
            if leaving == "closed":
                await working.wait()
                raise GeneratorExit  # as a stream's `aclose` does
            await notes(work)

    calling = asyncio.create_task(call())
    await working.wait()
    for _ in range(3):
        await asyncio.sleep(0)
        calling.cancel()
    await asyncio.sleep(0.01)
    assert turn.locked()
    released.set()
    await asyncio.wait([calling])
    assert calling.cancelled()
    assert not turn.locked()
