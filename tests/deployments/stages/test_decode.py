import asyncio
from typing import Any

import pytest
import torch

from deployments.settings import Settings
from deployments.stages.decode import Decode
from deployments.stages.protocol import Done, Started
from deployments.stages.throttle import BURST
from engines.config import ModelConfig
from engines.errors import Cancelled
from engines.spec import Latents, Progress
from tests.fakes import CLIP, EndlessStage, LocalStages
from tests.patience import PATIENCE_S


def replica(monkeypatch: pytest.MonkeyPatch, stage: Any) -> Decode:
    monkeypatch.setattr("deployments.stages.decode.build_stage", lambda *_: stage)
    return Decode("a model", ModelConfig())


async def test_the_clip_comes_after_its_progress(monkeypatch: pytest.MonkeyPatch):
    class Stage:
        def decode(self, latents: Any, *, on_progress: Any, should_stop: Any) -> Any:
            for done in range(1, 101):
                on_progress(Progress("frame", done, 100))
            return CLIP

    begun, *notes, done = [item async for item in replica(monkeypatch, Stage()).run(None)]  # type: ignore[arg-type]
    assert begun == Started()
    done_of = [note.progress.at.done for note in notes]
    assert (done_of[0], done_of[-1]) == (1, 100)
    assert isinstance(done, Done)
    assert len(done_of) <= BURST + 2 + done.seconds
    assert done.product is CLIP


async def test_one_call_at_a_time_is_worked_on_and_a_cancelled_one_makes_room(monkeypatch: pytest.MonkeyPatch):
    stage = EndlessStage()
    wrapper = replica(monkeypatch, stage)
    first, second = wrapper.run(None), wrapper.run(None)  # type: ignore[arg-type]
    assert await anext(first) == Started()
    await anext(first)
    waiting = asyncio.ensure_future(anext(second))
    await asyncio.sleep(0.05)
    assert (stage.running, waiting.done()) == (1, False)
    await first.aclose()
    async with asyncio.timeout(PATIENCE_S):
        assert await waiting == Started()
        assert (await anext(second)).message == "decode: frame 1/1000000"
    assert stage.running == 1
    await second.aclose()
    assert stage.running == 0


async def test_animatediff_stops_within_one_call_of_the_vae(demo_settings: Settings):
    stage = LocalStages(demo_settings).decode_replica.stage
    calls: list[int] = []
    stage.vae.decoder.register_forward_pre_hook(lambda *_: calls.append(1))  # type: ignore[attr-defined]
    for stop_after in (0, 1, 2):
        calls.clear()
        with pytest.raises(Cancelled):
            stage.decode(Latents(torch.zeros(1, 4, 16, 8, 8), 1), should_stop=lambda after=stop_after: len(calls) == after)
        assert len(calls) == stop_after
