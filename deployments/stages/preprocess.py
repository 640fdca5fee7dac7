"""Serve's wrapper of a model's preprocessing: fetches the input's files, then calls the stage.

Several calls work in one replica. If its process dies, all of them are lost, and nobody knows whose input did it. So each of
these jobs is then worked on alone, and an innocent one is not lost a second time.

It also looks for an earlier attempt's finished latents: unlike in the other two stages, no call waits here for its turn.
"""

import time
from pathlib import Path
from typing import Any

from deployments.files.checkpoints import Checkpoints
from deployments.files.download import download_all, download_folder
from deployments.files.file_store import FileStore, is_served
from deployments.schemas.endpoint import Endpoint
from deployments.schemas.inputs import KEPT
from deployments.settings import FetchSettings
from deployments.stages.isolation import Isolation
from deployments.stages.protocol import CheckpointRef, Done, Note, Started, Stream
from deployments.stages.threaded import InThread
from engines.errors import FileDownloadError
from engines.registry import build_stage
from engines.spec import Conditioning, Latents, OnProgress, ShouldStop
from engines.temporary import delete_left_folders


class Preprocess:
    """One replica, which works on as many calls at once as it is given. config: of the endpoint's model."""

    def __init__(self, endpoint: Endpoint, config: Any, fetch_settings: FetchSettings, files_url: str):
        delete_left_folders()
        self.endpoint = endpoint
        self.fetch_settings = fetch_settings
        self.stage = build_stage(endpoint.model, "preprocess", config)
        self.files = FileStore(files_url)
        self.checkpoints = Checkpoints(files_url, config)
        self.isolation = Isolation()
        self.on_gpu = config.on_gpu

    async def run(self, job_input: dict[str, Any], alone: bool = False) -> Stream[Conditioning]:
        """Notes of its progress and of what the caller should know, then the conditioning for a stored input.

        alone: no other call works in this replica meanwhile.

        Raises `ModelError` for files that cannot be downloaded or used, `StorageFailed` if they cannot be stored or read. If
        cancelled, it returns when the stage has stopped and the files are deleted.
        """
        parsed = self.endpoint.input.stored(job_input)
        async with self.isolation.turn(alone):
            started = time.monotonic()
            yield Started()
            with download_folder() as folder:
                media = await self._fetch(parsed.media(), folder)

                def encode(tell: OnProgress, should_stop: ShouldStop) -> Conditioning:
                    spec = parsed.spec(media)  # here, because it may read the files
                    return self.stage.encode(spec, on_progress=tell, should_stop=should_stop)

                async with InThread("preprocess", encode) as work:
                    async for note in work:
                        yield note
        for warning in work.product.notes:
            yield Note(warning, "WARN")
        yield Done(work.product, time.monotonic() - started, work.seconds * self.on_gpu)

    async def _fetch(self, urls: dict[str, str], folder: Path) -> dict[str, Path]:
        """Field -> file. The door has found out what is in the file store; the rest is downloaded."""
        kept = {field: url.removeprefix(KEPT) for field, url in urls.items() if url.startswith(KEPT)}
        for field, name in kept.items():
            if is_served(name) and await self.files.size(name) is None:
                raise FileDownloadError("The file could not be downloaded: its time is over.", ("body", field))
            await self.files.copy(name, folder / field)
        others = {field: url for field, url in urls.items() if field not in kept}
        return {field: folder / field for field in kept} | await download_all(others, self.fetch_settings, folder)

    async def saved(self, checkpoint: CheckpointRef) -> Stream[Latents | None]:
        """The finished latents in a checkpoint, with a note that they were found; None if it has none."""
        yield Started()
        latents = await self.checkpoints.latents(checkpoint.name)
        if latents is not None:
            yield Note("resumed after the last step")
        yield Done(latents, 0.0)
