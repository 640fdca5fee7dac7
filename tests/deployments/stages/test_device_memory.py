import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from deployments.stages import device_memory
from deployments.stages.threaded import InThread
from engines.errors import GenerationFailed, RunnerDisconnected, RunnerOutOfMemory


class Activations:
    """Stands for gigabytes of GPU memory."""


@pytest.fixture(autouse=True)
def fit() -> Iterator[None]:
    yield
    device_memory._unfit.clear()


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each proof, whether the failed call's memory was free when it began."""
    seen: list[bool] = []
    prove = device_memory.prove

    def watched() -> None:
        seen.append(not any(isinstance(each, Activations) for each in gc.get_objects()))
        prove()

    monkeypatch.setattr(device_memory, "prove", watched)
    return seen


async def call(work: Callable[[], object]) -> object:
    async with InThread("decode", lambda tell, should_stop: work()) as running:
        assert [note async for note in running] == []
    return running.product


def fail_with(error: Exception) -> Callable[[], None]:
    def work() -> None:
        held = Activations()
        assert weakref.ref(held)() is held
        raise error

    return work


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_call_without_enough_memory_ends_alone_and_the_replica_proves_itself(error: Exception, proofs: list[bool]):
    with pytest.raises(RunnerOutOfMemory):
        await call(fail_with(error))
    assert proofs == [True]
    device_memory.check()
    assert await call(lambda: 7) == 7


async def test_real_allocations_that_cannot_be_made_are_recognised(proofs: list[bool]):
    with pytest.raises(RunnerOutOfMemory):
        await call(lambda: torch.empty(2**50, dtype=torch.uint8))
    assert len(proofs) == 1


async def test_any_other_error_needs_no_proof(proofs: list[bool]):
    for error in (GenerationFailed(), RuntimeError("CUDA error: an illegal memory access"), ValueError("out of memory")):
        with pytest.raises(type(error)):
            await call(fail_with(error))
    assert proofs == []


async def test_a_replica_that_fails_its_proof_takes_no_more_calls_and_is_replaced(monkeypatch: pytest.MonkeyPatch):
    def prove() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device_memory, "prove", prove)
    with pytest.raises(RunnerOutOfMemory):
        await call(fail_with(MemoryError()))
    with pytest.raises(RunnerDisconnected):
        await call(lambda: 7)
    with pytest.raises(RunnerDisconnected):
        device_memory.check()


def test_a_wrong_product_is_no_proof(monkeypatch: pytest.MonkeyPatch):
    device_memory.prove()
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.full(size, 1.5, device=device))
    assert not device_memory.succeeds(device_memory.prove)
