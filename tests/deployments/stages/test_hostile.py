"""URLs and files that attack the service: each is refused as a 422 that names its field, and the service renders afterwards.

They take the way of a job's files, through the real preprocessing of both models: download, then decoding in a child process.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from PIL import Image

from deployments.files import download as download_module
from deployments.schemas.endpoint import ENDPOINTS
from deployments.settings import FetchSettings, Settings
from deployments.stages.preprocess import Preprocess
from deployments.stages.protocol import CheckpointRef, Done
from engines.controlnext.demo_pose import puppet_image
from engines.errors import ModelError
from engines.media.decoder import DECODER
from tests.deployments.stages.hostile import (
    ANSWERS,
    FORMS,
    HOSTS,
    INTERNET,
    SECRET,
    SLOW,
    URLS,
    Resolver,
    data_uri,
    encoded,
    http,
    images,
    videos,
)
from tests.fakes import LocalStages, done_of

ANIMATEDIFF, CONTROLNEXT = ENDPOINTS
FETCH = FetchSettings(max_bytes=5_000_000, timeout_s=1.0)
AT_ONCE = 2


@pytest.fixture(scope="module")
def stages(demo_settings: Settings) -> LocalStages:
    return LocalStages(demo_settings.model_copy(update={"fetch": FETCH}))


@pytest.fixture(scope="module")
def controlnext(demo_settings: Settings) -> Preprocess:
    config: Any = demo_settings.model_configs()["controlnext"]
    endpoint = ENDPOINTS[CONTROLNEXT]
    return Preprocess(endpoint, replace(config, max_image_pixels=1_000_000), FETCH, demo_settings.files_url)


async def nothing(_: object) -> None:
    pass


async def outcome(replica: Preprocess, job_input: dict[str, Any], field: str) -> str:
    """How a job's preprocessing ended: "" for a refusal in due form."""
    try:
        await done_of(replica.run(job_input | {"seed": 1}), nothing)
    except ModelError as exc:
        if exc.status != 422 or exc.loc != ("body", field):
            return f"{exc.status} at {exc.loc}"
        return f"it told: {exc.message}" if "127.0.0.1" in exc.message or "root:" in exc.message else ""
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    return "it was rendered"


async def successes(replica: Preprocess, cases: Iterable[tuple[str, dict[str, Any], str]]) -> dict[str, str]:
    """The cases that did not end in a refusal. cases: name, input, its hostile field."""
    turns = asyncio.Semaphore(AT_ONCE)
    found: dict[str, str] = {}

    async def attempt(name: str, job_input: dict[str, Any], field: str) -> None:
        async with turns:
            if wrong := await outcome(replica, job_input, field):
                found[name] = wrong

    async with asyncio.TaskGroup() as group:
        for case in cases:
            group.create_task(attempt(*case))
    return found


def keyframe(url: str) -> dict[str, Any]:
    return {"prompt": "a", "keyframe_0_image_url": url, "keyframe_0_index": 0}


async def renders(stages: LocalStages) -> bool:
    """Whether a job with a keyframe goes through all three stages."""
    job = keyframe(data_uri(puppet_image(64, 64))) | {"seed": 3, "num_inference_steps": 1}
    conditioning = (await stages.preprocess(job, nothing)).product
    latents = (await stages.denoise(conditioning, CheckpointRef(f"checkpoints/{uuid4()}", False), nothing)).product
    clip: Done[Any] = await stages.decode(latents, nothing)
    return bool(clip.product.num_frames == 16)


class Network:
    """Two servers on one port: the Internet's, and this machine's own, which nobody may reach. reached: who did."""

    def __init__(self, port: int):
        self.port, self.reached = port, list[str]()

    async def internet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
            if path.startswith("/to?"):
                writer.write(http("302 Found", location=f"http://{path[4:]}:{self.port}{SECRET}"))
            elif path in SLOW:
                for piece in SLOW[path]:
                    writer.write(piece)
                while path != "/silent":
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.05)
                await asyncio.sleep(5)
            else:
                writer.write(ANSWERS.get(path, http("200 OK", b"not an image")))
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def own(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reached.append((await reader.readline()).decode())
        writer.write(http("200 OK", puppet_image(64, 64)))
        writer.close()


@asynccontextmanager
async def network(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Network]:
    made = Network(0)
    outside = await asyncio.start_server(made.internet, INTERNET, 0)
    made.port = outside.sockets[0].getsockname()[1]
    inside = await asyncio.start_server(made.own, "127.0.0.1", made.port)
    is_public = download_module.is_public
    monkeypatch.setattr(download_module, "is_public", lambda address: str(address) == INTERNET or is_public(address))
    monkeypatch.setattr(download_module.socket, "getaddrinfo", Resolver())
    try:
        yield made
    finally:
        outside.close()
        inside.close()
        await asyncio.sleep(0)


def urls(port: int) -> dict[str, str]:
    """Where each hostile URL leads -> the URL."""
    found = {f"address {form}": f"http://{form}:{port}{SECRET}" for form in FORMS}
    found |= {f"redirect to {form}": f"http://public.example:{port}/to?{form}" for form in FORMS if form.isascii()}
    found |= {f"name {host}": f"http://{host}:{port}{SECRET}" for host in HOSTS if not host.startswith("rebinds")}
    # the first look-up is public and redirects to the same name, whose second look-up is not
    found |= {f"rebinding {host}": f"http://{host}:{port}/to?{host}" for host in HOSTS if host.startswith("rebinds")}
    found |= {f"URL {url!r}": url.format(port=port) for url in URLS}
    return found | {f"answer {path}": f"http://public.example:{port}{path}" for path in (*ANSWERS, *SLOW)}


async def test_no_url_leads_into_our_network_or_to_a_file(stages: LocalStages, monkeypatch: pytest.MonkeyPatch):
    async with network(monkeypatch) as around:
        cases = [(name, keyframe(url), "keyframe_0_image_url") for name, url in urls(around.port).items()]
        assert len(cases) > 140
        assert await successes(stages.preprocess_replica, cases) == {}
        assert around.reached == []
        good = f"http://public.example:{around.port}/good"
        ANSWERS["/good"] = http("200 OK", puppet_image(64, 64))
        assert await outcome(stages.preprocess_replica, keyframe(good), "") == "it was rendered", "the network is there"
    assert await renders(stages)


async def test_no_image_passes_that_is_none_or_too_much(stages: LocalStages, controlnext: Preprocess):
    found = list(images())
    assert len(found) > 40
    cases = [(name, keyframe(data_uri(data)), "keyframe_0_image_url") for name, data in found]
    assert await successes(stages.preprocess_replica, cases) == {}
    video = {"video_url": data_uri(b""), "height": 256, "width": 256}
    others = [(name, video | {"image_url": data_uri(data)}, "image_url") for name, data in found]
    assert await successes(controlnext, others) == {}
    assert await renders(stages)


async def test_no_video_passes_that_is_none_or_too_much(stages: LocalStages, controlnext: Preprocess, tmp_path: Path):
    image = {"image_url": data_uri(puppet_image(384, 256)), "height": 256, "width": 256, "max_frame_num": 8}
    cases = [(name, image | {"video_url": data_uri(data)}, "video_url") for name, data in videos(tmp_path)]
    assert len(cases) > 55
    assert await successes(controlnext, cases) == {}
    assert await renders(stages)


async def test_a_child_that_was_attacked_serves_the_next_file(stages: LocalStages):
    """All of the above in one process: what is left of it decodes as before."""
    assert await renders(stages)
    assert all(child.alive for child in DECODER._idle)
    red = encoded(Image.new("RGB", (64, 64), "red"), "PNG")
    assert DECODER.picture("stretched", red, 8, 8, 10_000)[0, 0].tolist() == [255, 0, 0]
