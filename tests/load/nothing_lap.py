"""A lap whose stages do nothing: what a row costs Ray Data and the driver. See `bench_batch.py`."""

from dataclasses import replace

from deployments.batch.ray_data import main
from deployments.batch.records import Record, write_record
from deployments.batch.run_folder import RunFolder
from deployments.batch.stages import RowStage, Work


class Idle(RowStage):
    """Passes a row on."""

    def __init__(self, url: str):
        self.folder = RunFolder(url)

    def __call__(self, work: Work) -> Work:
        return work


class Preprocess(Idle):
    name = "preprocess"


class Denoise(Idle):
    name = "denoise"


class Decode(Idle):
    """Ends a row without a video."""

    name = "decode"

    def __call__(self, work: Work) -> Work:
        record = Record(work.row.id, work.row.number, "refused", seed=0, error="nothing was to be done")
        write_record(self.folder, work.row, record)
        return replace(work, record=record)


if __name__ == "__main__":
    main((Preprocess, Denoise, Decode))
